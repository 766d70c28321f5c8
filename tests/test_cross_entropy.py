"""F.cross_entropy against torch's in float64: values, gradients, and the arguments that torch's operator serves."""

import functools

import pytest
import torch
import torch.nn.functional as TF
from conftest import EMULATED, thorough_if
from exact import DTYPES

import tritonnet
import tritonnet.nn as nn
import tritonnet.nn.functional as F
from tritonnet import ops

# In the interpreter a block has up to 64 classes.
SIZES = {
    "LeNet": (7, 10), "one row": (1, 3), "one class": (4, 1), "many": (300, 130),
    "below a block": (5, 63), "a block": (6, 64), "above a block": (9, 65),
}  # fmt: skip
# In compiled code: whole blocks of targets and a rest, several iterations of one program, several programs, and rows
# that just fit a block, are just too wide, and are loaded 16 bytes at a time or one by one.
AS_COMPILED = {
    "many targets": (2100, 3), "several turns": (700, 10), "several programs": (41, 600), "below a block": (3, 4095),
    "a block": (3, 4096), "above a block": (3, 4097), "wide": (2, 8200),
}  # fmt: skip


def draw(size, dtype, device):
    (N, C), seed = size, torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=seed).mul_(3).to(device, dtype)
    target = torch.randint(C, (N,), generator=seed).to(device)
    return x, target, torch.rand(C, generator=seed).add_(0.5).to(device, dtype)


def value_and_grad(function, x, target, **arguments):
    leaf = x.detach().requires_grad_()
    loss = function(leaf, target, **arguments)
    # On the CPU: another device may round these values otherwise.
    dloss = torch.linspace(0.5, 2, loss.numel()).view(loss.shape).to(x)
    return loss, *torch.autograd.grad(loss, leaf, dloss)


def check(x, target, weight=None, **arguments):
    """A row's sum of C exponentials, each exact to a few units, and a sum of N rows."""
    found = value_and_grad(F.cross_entropy, x, target, weight=weight, **arguments)
    weight = None if weight is None else weight.cpu().double()
    truth = value_and_grad(TF.cross_entropy, x.cpu().double(), target.cpu(), weight=weight, **arguments)
    eps = torch.finfo(x.dtype).eps
    sums = max(torch.finfo(torch.float32).eps, 2**-52) if x.dtype != torch.float64 else 2**-52
    for actual, true in zip(found, truth):
        assert actual.dtype == x.dtype and actual.shape == true.shape
        atol = (eps + 16 * sums) * true.abs().max().item()
        torch.testing.assert_close(actual.cpu().double(), true, rtol=eps + 64 * sums, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.sampled(2)
def test_numbers(size, dtype, backend, device):
    x, target, weight = draw(SIZES[size], dtype, device)
    # Every pair of two choices.
    for i, reduction in enumerate(("mean", "sum", "none")):
        for j, smoothing in enumerate((0.0, 0.1, 1.0)):
            check(x, target, (None, weight)[(i + j) % 2], reduction=reduction, label_smoothing=smoothing)


# In the interpreter, whose blocks are smaller, they are only sizes like others.
@pytest.mark.parametrize("size", thorough_if(lambda size: size != "many targets", AS_COMPILED))
def test_tiles(size, device):
    for dtype in (torch.float32, torch.bfloat16):
        x, target, weight = draw(AS_COMPILED[size], dtype, device)
        target[1] = -100
        with tritonnet.backend("triton"):
            check(x, target)
            check(x, target, weight, label_smoothing=0.1)


def test_ignored_rows_of_many_classes_may_hold_anything(device):
    """Where torch's gradient is NaN, in one block of classes and in several."""
    for C in (5, 130):
        x, target, weight = draw((9, C), torch.float64, device)
        x[::3] = torch.tensor([float("nan"), float("inf"), float("-inf")], device=device)[:, None]
        target[::3] = -100
        for arguments in ({}, {"weight": weight, "label_smoothing": 0.2}):
            for reduction in ("mean", "sum", "none"):
                with tritonnet.backend("triton"):
                    loss, grad = value_and_grad(F.cross_entropy, x, target, reduction=reduction, **arguments)
                assert loss.isfinite().all() and grad.isfinite().all()
                assert not grad[::3].any() and (reduction != "none" or not loss[::3].any())


def test_ignored_rows(backend, device):
    x, target, weight = draw((9, 5), torch.float64, device)
    for ignored in (-100, 2, 7):
        some = torch.where(torch.arange(9, device=device) % 3 == 0, ignored, target)
        for reduction in ("mean", "sum", "none"):
            check(x, some, weight, ignore_index=ignored, reduction=reduction, label_smoothing=0.2)
    none_left = torch.full_like(target, -100)
    assert F.cross_entropy(x, none_left).isnan() and F.cross_entropy(x, none_left, reduction="sum") == 0


def test_far_apart_logits(backend, device):
    """No overflow, and small ones are not lost; -inf is a class that never occurs."""
    x = torch.tensor([[1e4, 0.0, -1e4], [-1e30, 1e30, 0.0], [5.0, float("-inf"), 5.0]], device=device)
    loss, grad = value_and_grad(F.cross_entropy, x, torch.tensor([0, 1, 2], device=device), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.0, 2.0], device=device).clamp(max=0.6931472))
    assert grad.isfinite().all()
    x[1, 2] = float("nan")
    loss = F.cross_entropy(x, torch.tensor([0, 1, 2], device=device), reduction="none")
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("make", [lambda x: x.t().contiguous().t(), lambda x: x.repeat(2, 2)[::2, ::2]])
@pytest.mark.parametrize("size", [(8, 6), (9, 70)])
def test_strides(size, make, backend, device):
    for dtype in (torch.float64, torch.bfloat16):
        x, target, weight = draw(size, dtype, device)
        x, target = make(x), target.repeat_interleave(2)[::2]
        check(x, target, weight.repeat_interleave(3)[::3], label_smoothing=0.1)
        check(x, target)


def test_one_launch_each_way(device):
    x, target, _ = draw((64, 10), torch.float32, device)
    x.requires_grad_()
    with tritonnet.backend("triton"), tritonnet.count_launches() as launches:
        F.cross_entropy(x, target).backward()
    launches.pop("sum_losses_kernel", None)
    assert launches == {"cross_entropy_kernel": 1, "cross_entropy_grad_kernel": 1}


def test_unbatched_other_integers_and_module(backend, device):
    x, target, weight = draw((4, 5), torch.float64, device)
    for reduction in ("mean", "none"):
        loss = F.cross_entropy(x[0], target[0], reduction=reduction)
        torch.testing.assert_close(loss, TF.cross_entropy(x[0], target[0], reduction=reduction))
    torch.testing.assert_close(F.cross_entropy(x, target.byte()), TF.cross_entropy(x, target))
    for arguments in ({}, {"weight": weight, "label_smoothing": 0.1, "reduction": "sum"}):
        ours, theirs = nn.CrossEntropyLoss(**arguments), torch.nn.CrossEntropyLoss(**arguments)
        torch.testing.assert_close(ours(x, target), theirs(x, target))
        assert repr(ours) == repr(theirs) and type(tritonnet.convert(theirs)) is nn.CrossEntropyLoss


def test_what_torch_serves(device):
    """Probabilities, pixels, deprecated arguments, a weight with a gradient; and its errors."""
    # On a GPU torch adds up the losses of pixels in any order.
    torch.use_deterministic_algorithms(False)
    x = torch.randn(2, 3, 4, device=device)
    pixels = torch.randint(3, (2, 4), device=device)
    probabilities = x.softmax(1)
    torch.testing.assert_close(F.cross_entropy(x, pixels), TF.cross_entropy(x, pixels))
    torch.testing.assert_close(F.cross_entropy(x, probabilities), TF.cross_entropy(x, probabilities))
    with pytest.raises(ValueError, match="Expected input batch_size"):
        F.cross_entropy(x[0], torch.zeros(5, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="not a valid value for reduction"):
        F.cross_entropy(x[0], pixels[0, :3], reduction="median")
    with pytest.raises(TypeError, match="cross_entropy: target must be a Tensor, got int"):
        F.cross_entropy(x[0], 3)
    assert F.cross_entropy(x[:0, :, 0], pixels[:0, 0]).isnan()


NAN, INF = float("nan"), float("inf")
# Of four classes. The targets below are 0, 1 and 2, so that no row has 3.
WEIGHTS = {
    "none": None, "plain": (0.5, 1.5, 2, 1), "inf": (0.5, INF, 1, 2), "-inf": (0.5, -INF, 1, 2),
    "nobody's is inf": (0.5, 1.5, 1, INF), "0": (1, 0, 2, 1), "all 0": (0, 0, 0, 0), "nobody's alone": (0, 0, 0, 2),
    "negative": (1, -0.5, 2, 1), "negative sum": (-1, -2, -0.5, 1), "nan": (1, NAN, 1, 1),
    "nobody's is nan": (1, 2, 1, NAN),
}  # fmt: skip
HOLD = {
    "nan": (NAN,) * 4, "a nan": (0, NAN, 1, 2), "inf": (INF,) * 4, "an inf": (0, INF, 1, 2), "-inf": (-INF,) * 4,
    "a -inf": (0, -INF, 1, 2), "all sorts": (INF, -INF, NAN, 0), "-inf but one": (-INF, 1, -INF, -INF),
}  # fmt: skip


def odd_rows(kind):
    """(logits, targets, ignore_index)."""
    x, target = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 1, 0, 1, 2, 1])
    odd = torch.tensor(list(HOLD.values()))
    if kind == "hold anything":  # in each row's target class, and in another
        return torch.cat([odd, odd]), torch.cat([torch.ones_like(target), torch.full_like(target, 2)]), -100
    if kind == "ignored":
        return x, torch.where(target == 1, -100, target), -100
    if kind == "ignored, a class":
        return x, target, 1
    if kind == "ignored, hold anything":
        return torch.cat([x, odd]), torch.cat([target, torch.full_like(target, 4)]), 4
    return odd if "anything" in kind else x, torch.full_like(target, -100), -100


def derivatives(function, x, target, **arguments):
    """(loss, gradient, second derivative times a vector)."""
    leaf = x.detach().requires_grad_()
    loss = function(leaf, target, **arguments)
    dloss = torch.linspace(0.5, 2, loss.numel()).view(loss.shape).to(x)
    (grad,) = torch.autograd.grad(loss, leaf, dloss, create_graph=True)
    v = torch.linspace(-1, 1.3, x.numel()).view(x.shape).to(x)
    return loss.detach(), grad.detach(), *torch.autograd.grad(grad, leaf, v)


def check_derivatives(x, target, weight=None, ignore_index=-100, **arguments):
    """As torch in float64, except for the zeros of ignored rows: there torch passes on a NaN of logits or weights."""
    arguments["ignore_index"] = ignore_index
    found = derivatives(F.cross_entropy, x, target, weight=weight, **arguments)
    weight = None if weight is None else weight.cpu().double()
    loss, *true = derivatives(TF.cross_entropy, x.cpu().double(), target.cpu(), weight=weight, **arguments)
    kept = (target.cpu() != ignore_index).unsqueeze(min(target.dim(), 1))
    truth = loss, *(torch.where(kept, t, 0) for t in true)
    for what, actual, t in zip(("loss", "gradient", "second derivative"), found, truth, strict=True):
        message = f"{what} of {arguments}: {actual}, not {t}"
        torch.testing.assert_close(actual.cpu().double(), t, rtol=2e-5, atol=1e-6, equal_nan=True, msg=message)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    "kind",
    ["hold anything", "ignored", "ignored, a class", "ignored, hold anything", "all ignored", "all ignored, anything"],
)
@pytest.mark.sampled(4)
def test_odd_rows_and_weights(kind, weight, backend, device):
    x, target, ignored = odd_rows(kind)
    x, target = x.to(device), target.to(device)
    weight = None if weight == "none" else torch.tensor(WEIGHTS[weight], dtype=torch.float32, device=device)
    for reduction, smoothing in (("mean", 0.0), ("mean", 0.2), ("sum", 1.0), ("none", 0.2)):
        check_derivatives(x, target, weight, ignored, reduction=reduction, label_smoothing=smoothing)


def test_odd_batches(backend, device):
    """One row, rows without a batch, none at all, pixels and probabilities, whatever serves them."""
    torch.use_deterministic_algorithms(False)
    x, weight = torch.randn(4, device=device), torch.tensor([0.5, 1.5, 2, 1], device=device)
    for reduction in ("mean", "sum", "none"):
        for arguments in ({}, {"weight": weight, "label_smoothing": 0.2}):
            arguments["reduction"] = reduction
            for label in (2, -100):
                target = torch.tensor(label, device=device)
                check_derivatives(x.expand(1, 4), target.view(1), **arguments)
                check_derivatives(x[:, None].expand(1, 4, 2), target.expand(1, 2), **arguments)
                check_derivatives(x, target, **arguments)
            check_derivatives(x.expand(0, 4), target.new_empty(0), **arguments)
            found = F.cross_entropy(x.expand(3, 4), x.softmax(0).expand(3, 4), **arguments)
            torch.testing.assert_close(found, TF.cross_entropy(x.expand(3, 4), x.softmax(0).expand(3, 4), **arguments))


def test_weights_that_cancel(backend, device):
    """A mean divided by 0: torch gives infinities, a large batch NaN, and neither is finite."""
    x, target, _ = odd_rows("ignored")
    weight = torch.tensor([1.0, 1.0, -1.0, 1.0], device=device)
    for smoothing in (0.0, 0.2):
        arguments = {"weight": weight, "label_smoothing": smoothing}
        loss, grad = value_and_grad(F.cross_entropy, x.to(device), target.to(device), **arguments)
        assert not loss.isfinite() and not grad[target != -100].isfinite().any() and not grad[target == -100].any()


def test_transforms_of_ignored_rows(backend, device):
    """One of three batches is ignored, and half of another: each has its own derivatives."""
    x = torch.randn(3, 4, 5, device=device)
    target = torch.tensor([[-100] * 4, [0, -100, 1, -100], [4, 3, 2, 1]], device=device)
    x[target == -100] = NAN
    for weight in (None, (1.0, 2, 0, 4, 5), (0.0, 0, 3, 4, 5)):
        weight = None if weight is None else torch.tensor(weight, device=device)
        for reduction in ("mean", "sum", "none"):
            arguments = {"weight": weight, "reduction": reduction, "label_smoothing": 0.1}

            def function(x, target, arguments=arguments):
                return F.cross_entropy(x, target, **arguments).sum()

            losses = torch.func.vmap(function)(x, target)
            grads = torch.func.vmap(torch.func.grad(function))(x, target)
            for loss, grad, x_of, target_of in zip(losses, grads, x, target, strict=True):
                true_loss, true_grad = value_and_grad(function, x_of, target_of)
                true_grad = true_grad / 0.5  # the dloss of a single loss
                torch.testing.assert_close((loss, grad), (true_loss.detach(), true_grad), equal_nan=True)
                # An ignored row's tangent is not used either.
                tangent = torch.where((target_of == -100)[:, None], NAN, torch.randn_like(x_of))
                _, tloss = torch.func.jvp(functools.partial(function, target=target_of), (x_of,), (tangent,))
                true_tloss = (true_grad * tangent.nan_to_num(nan=0)).sum()
                torch.testing.assert_close(tloss, true_tloss, equal_nan=True)


def same_where_finite(actual, truth, message):
    """Where the truth is not finite, NaN and the infinities may replace each other."""
    truth = truth.to(actual)
    assert torch.equal(actual.isfinite(), truth.isfinite()), f"{message}: {actual}, not {truth}"
    actual, truth = (torch.where(truth.isfinite(), t, 0) for t in (actual, truth))
    torch.testing.assert_close(actual, truth, rtol=1e-5, atol=1e-6, msg=f"{message}: {actual}, not {truth}")


ODD_GRADIENTS = {
    "plain": (0.5, 1, -2, 1.5), "inf": (INF,) * 4, "-inf": (-INF,) * 4, "nan": (NAN,) * 4,
    "of ignored rows": (0.5, INF, 1, NAN), "of rows that count": (INF, 1, NAN, -1), "all sorts": (INF, NAN, 1, -INF),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD_GRADIENTS)
@pytest.mark.parametrize("target", [(0, -100, 2, -100), (-100,) * 4], ids=["some ignored", "all ignored"])
def test_ignored_rows_under_any_gradient(target, kind, backend, device):
    """Their gradient is 0 whatever the loss is multiplied by; so are both second derivatives."""
    x, target = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), torch.tensor(target)
    v = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    v[target == -100] = NAN
    for reduction in ("none", "sum", "mean"):
        odd = torch.tensor(ODD_GRADIENTS[kind]) if reduction == "none" else torch.tensor(ODD_GRADIENTS[kind][0])
        for arguments in ({}, {"weight": torch.tensor([0.5, 1.5, 2]), "label_smoothing": 0.2}):
            found = []
            for f, dtype, place in ((F, torch.float32, device), (TF, torch.float64, "cpu")):
                moved = {k: a.to(place, dtype) if k == "weight" else a for k, a in arguments.items()}
                leaf, dloss = (t.to(place, dtype, copy=True).requires_grad_() for t in (x, odd))
                loss = f.cross_entropy(leaf, target.to(place), reduction=reduction, **moved)
                (grad,) = torch.autograd.grad(loss, leaf, dloss, create_graph=True)
                found.append([grad, *torch.autograd.grad(grad, (dloss, leaf), v.to(place, dtype))])
            for what, actual, truth in zip(("gradient", "by dloss", "by logits"), *found, strict=True):
                actual, truth = actual.detach().cpu(), truth.detach()
                if what != "by dloss":
                    assert not actual[target == -100].any(), f"{what}, {reduction}: {actual}"
                if what == "by logits":  # torch passes on the NaN of v in ignored rows
                    truth[target == -100] = 0
                elif what == "by dloss" and reduction == "mean" and (target == -100).all():
                    truth.zero_()  # torch divides by the number of rows that count, 0
                same_where_finite(actual, truth, f"{what}, {reduction}, {arguments}")


def test_a_batch_without_targets_leaves_weights_alone(backend, device):
    """As in a masked language model: sums divided by a count of 0, and masked means over no tokens."""
    x, w = torch.randn(6, 5, device=device), torch.randn(3, 5, device=device)
    target = torch.full((6,), -100, device=device)
    kept = target != -100
    makes = {
        "sum": lambda f, x, t: f.cross_entropy(x, t, reduction="sum") / kept.sum(),
        "none": lambda f, x, t: (f.cross_entropy(x, t, reduction="none") * kept).sum() / kept.sum(),
        "none, summed": lambda f, x, t: f.cross_entropy(x, t, reduction="none").sum() / kept.sum(),
        "mean": lambda f, x, t: f.cross_entropy(x, t),
        "mean, smoothed": lambda f, x, t: f.cross_entropy(x, t, label_smoothing=0.1) / kept.sum(),
    }
    for name, make in makes.items():
        for f in (F, TF):
            weight = w.clone().requires_grad_()
            loss = make(f, torch.nn.functional.linear(x, weight), target)
            loss.backward()
            assert loss.isnan() and torch.equal(weight.grad, torch.zeros_like(w)), (name, f.__name__, weight.grad)


def strided(grad):
    """The same values in other layouts: rows of wider ones, columns, gaps, and one row for all."""
    N, C = grad.shape
    yield torch.cat([grad, grad], 1)[:, :C]
    yield torch.cat([grad, grad, grad[:, :1]], 1)[:, :C]
    yield grad.t().contiguous().t()
    yield grad.repeat_interleave(2, 1)[:, ::2]
    yield grad[:1].expand(N, C)


def check_product(grad, target, device):
    """Bit for bit torch's product in rows that count, and 0 in the others."""
    N, dtype = len(grad), grad.dtype
    per_row = torch.linspace(-2, 2, N + 2, dtype=dtype)[:N]
    for dloss in (
        torch.tensor(0.7, dtype=dtype),
        per_row,
        per_row.repeat_interleave(2)[::2],
        torch.tensor(1.5, dtype=dtype).expand(N),
    ):
        dx = ops.cross_entropy_grad(dloss.to(device), grad.to(device), target.to(device), 1)
        truth = torch.where((target.long() != 1)[:, None], dloss.unsqueeze(-1) * grad, 0)
        assert dx.dtype == dtype and dx.is_contiguous() and torch.equal(dx.cpu(), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES.values(), (3, 0), (0, 3), (5, 16), (257, 8)], ids=str)
@pytest.mark.sampled(3)
def test_product(size, dtype, backend, device):
    grad, target = torch.randn(size).to(dtype), torch.randint(3, size[:1])
    check_product(grad, target, device)
    check_product(grad, target.byte().repeat_interleave(2)[::2], device)
    for other in strided(grad) if grad.numel() else ():
        check_product(other, target, device)


@pytest.mark.parametrize("size", AS_COMPILED.values(), ids=str)
def test_product_of_many_programs(size, device):
    with tritonnet.backend("triton"):
        for dtype in (torch.float32, torch.bfloat16):
            check_product(torch.randn(size).to(dtype), torch.randint(3, size[:1]), device)


def test_product_under_vmap(backend, device):
    """Over any of its arguments, with a gradient for all rows and with one for each."""
    grad, target = torch.randn(2, 3, 4, device=device), torch.tensor([[0, 1, 2], [1, 1, 0]], device=device)
    for dloss in (torch.randn(2, device=device), torch.randn(2, 3, device=device)):
        for dims in ((0, None, None), (None, 0, None), (None, None, 0), (0, 0, None), (0, 0, 0), (None, 0, 0)):
            arguments = [t if dim == 0 else t[0] for t, dim in zip((dloss, grad, target), dims)]

            def product(dloss, grad, target):
                return ops.cross_entropy_grad(dloss, grad, target, 1)

            each = [product(*(t[i] if dim == 0 else t for t, dim in zip(arguments, dims))) for i in range(2)]
            found = torch.func.vmap(product, dims)(*arguments)
            torch.testing.assert_close(found, torch.stack(each), rtol=0, atol=0)


def test_compiled_loss_of_ignored_rows(backend, device):
    x, target = torch.randn(3, 4, device=device), torch.full((3,), -100, device=device)
    loss, grad = value_and_grad(torch.compile(F.cross_entropy, backend="aot_eager"), x, target)
    assert loss.isnan() and not grad.any()
    sums = torch.compile(lambda x, t: F.cross_entropy(x, t, reduction="sum") / (t != -100).sum(), backend="aot_eager")
    loss, grad = value_and_grad(sums, x, target)
    assert loss.isnan() and not grad.any()


def test_compiled_backward(backend, device):
    """Dynamo also traces a rule's backward where autograd itself is compiled."""
    x, target = torch.randn(3, 4, device=device, requires_grad=True), torch.tensor([1, -100, 2], device=device)
    torch._dynamo.reset()
    loss = F.cross_entropy(x, target, reduction="sum")
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    torch.testing.assert_close(x.grad, value_and_grad(TF.cross_entropy, x, target, reduction="sum")[1] / 0.5)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_operator_without_rows(reduction, backend, device):
    """F.cross_entropy hands empty batches to torch; whoever calls the operator gets what torch gives."""
    x, target = torch.zeros(0, 3, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    loss, grad = ops.cross_entropy(x, target, None, reduction, -100, 0.0)
    assert loss.equal(TF.cross_entropy(x, target, reduction=reduction)) or loss.isnan() and reduction == "mean"
    assert grad.shape == x.shape


def test_no_more_partial_losses_than_one_program_adds_up():
    forward = pytest.importorskip("tritonnet.kernels.cross_entropy.forward")
    for N in (1, 1000, 2**20, 2**20 + 1, 3 * 10**6):
        rows = forward._blocks(N, 10, torch.float32, "sum")[0]
        assert (N + rows - 1) // rows <= forward.MOST_PROGRAMS, N


def test_classes_of_one_byte(backend, device):
    """156 is a class, although it is ignore_index's default modulo 256, and 255 may be ignored."""
    x, target = torch.randn(4, 200, device=device), torch.tensor([156, 3, 255, 156], device=device)
    for ignored in (-100, 255):
        some = target if ignored == 255 else target[:2]
        found = derivatives(F.cross_entropy, x[: len(some)], some.byte(), ignore_index=ignored, label_smoothing=0.1)
        truth = derivatives(F.cross_entropy, x[: len(some)], some, ignore_index=ignored, label_smoothing=0.1)
        torch.testing.assert_close(found, truth, rtol=0, atol=0)
        function = torch.func.vmap(functools.partial(F.cross_entropy, ignore_index=ignored))
        losses = [function(x[: len(some), None], t[:, None]) for t in (some.byte(), some)]
        torch.testing.assert_close(*losses, rtol=0, atol=0, equal_nan=True)


def test_more_rows_than_float16_counts(device):
    """The mean of the second derivative: float16 ends at 65504."""
    x = torch.zeros(70000, 2, dtype=torch.float16, device=device, requires_grad=True)
    with tritonnet.backend("reference"):
        loss = F.cross_entropy(x, torch.zeros(70000, dtype=torch.int64, device=device))
        (grad,) = torch.autograd.grad(loss * 2**15, x, create_graph=True)
        (second,) = torch.autograd.grad(grad[:, 0].sum(), x)
    torch.testing.assert_close(second[:, 0].float(), torch.full_like(x[:, 0], 2**13 / 70000).float(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("label, ignored", [(4, -100), (-1, -100), (2**40, -100), (-100, 2), (200, -100)])
def test_a_target_that_is_no_class(label, ignored, backend, device):
    """An error where it can be seen in time, otherwise NaN in its row; never a read outside the row."""
    x, target = torch.randn(3, 4, device=device), torch.tensor([1, label, 2], device=device)
    target = target.byte() if label == 200 else target
    seen = device.type == "cpu" and (backend == "reference" or EMULATED is None)
    for arguments in ({}, {"weight": torch.ones(4, device=device), "label_smoothing": 0.1}):
        arguments["ignore_index"] = ignored
        if seen:
            message = f"Target {label} is out of bounds"
            for reduction in ("mean", "sum", "none"):
                with pytest.raises(IndexError, match=message):
                    F.cross_entropy(x, target, reduction=reduction, **arguments)
                with pytest.raises(IndexError, match=message):
                    nn.CrossEntropyLoss(reduction=reduction, **arguments)(x[1], target[1])
            with pytest.raises(IndexError, match=message):
                torch.func.vmap(functools.partial(F.cross_entropy, **arguments))(x[:, None], target[:, None])
        elif backend == "triton":
            counts = target.cpu().long() != ignored
            for reduction in ("mean", "none"):
                loss, *rest = derivatives(F.cross_entropy, x, target, reduction=reduction, **arguments)
                assert loss.isnan().any() and loss.isnan().sum() == 1
                for result in rest:
                    assert result[0].isfinite().all() and result[1].isnan().all() and counts[1]
