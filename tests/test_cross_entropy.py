"""F.cross_entropy against torch's in float64: values, gradients, and what torch serves."""

import functools

import pytest
import torch
import torch.nn.functional as TF
from conftest import EMULATED
from exact import DTYPES

import tritonnet
import tritonnet.nn as nn
import tritonnet.nn.functional as F

# In the interpreter a block has up to 64 classes.
SIZES = {
    "LeNet": (7, 10), "one row": (1, 3), "one class": (4, 1), "many": (300, 130),
    "below a block": (5, 63), "a block": (6, 64), "above a block": (9, 65),
}  # fmt: skip
# As compiled: whole blocks of targets and a rest, several turns of one program, several programs, and rows that just
# fit a block, are just too wide, and are loaded 16 bytes at a time or one by one.
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
    # On the CPU: another device may round the same numbers otherwise.
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
def test_numbers(size, dtype, backend, device):
    x, target, weight = draw(SIZES[size], dtype, device)
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.1, 1.0):
            for w in (None, weight):
                check(x, target, w, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("size", AS_COMPILED)
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
    """No overflow and no loss of the small ones; -inf is a class that never is."""
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


def test_one_launch(device):
    x, target, _ = draw((64, 10), torch.float32, device)
    x.requires_grad_()
    with tritonnet.backend("triton"), tritonnet.count_launches() as launches:
        F.cross_entropy(x, target).backward()
    assert launches["cross_entropy_kernel"] == 1 and set(launches) <= {"cross_entropy_kernel", "sum_losses_kernel"}


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
# Of four classes; those of the targets below are 0, 1 and 2, so that 3 is nobody's.
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
    """As torch in float64, but for the zeros of ignored rows: there torch passes on a NaN of logits or weights."""
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
def test_odd_rows_and_weights(kind, weight, backend, device):
    x, target, ignored = odd_rows(kind)
    x, target = x.to(device), target.to(device)
    weight = None if weight == "none" else torch.tensor(WEIGHTS[weight], dtype=torch.float32, device=device)
    for reduction, smoothing in (("mean", 0.0), ("mean", 0.2), ("sum", 1.0), ("none", 0.2)):
        check_derivatives(x, target, weight, ignored, reduction=reduction, label_smoothing=smoothing)


def test_odd_batches(backend, device):
    """One row, rows without a batch, none at all, pixels and probabilities: whatever serves them."""
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
    """A mean that is divided by 0: torch has infinities, a large batch NaN, and neither a number."""
    x, target, _ = odd_rows("ignored")
    weight = torch.tensor([1.0, 1.0, -1.0, 1.0], device=device)
    for smoothing in (0.0, 0.2):
        arguments = {"weight": weight, "label_smoothing": smoothing}
        loss, grad = value_and_grad(F.cross_entropy, x.to(device), target.to(device), **arguments)
        assert not loss.isfinite() and not grad[target != -100].isfinite().any() and not grad[target == -100].any()


def test_transforms_of_ignored_rows(backend, device):
    """One of three batches is ignored, and half of another: the derivatives of each are its own."""
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
                true_grad = true_grad / 0.5  # which one loss has there
                torch.testing.assert_close((loss, grad), (true_loss.detach(), true_grad), equal_nan=True)
                # An ignored row's tangent has no part in it either.
                tangent = torch.where((target_of == -100)[:, None], NAN, torch.randn_like(x_of))
                _, tloss = torch.func.jvp(functools.partial(function, target=target_of), (x_of,), (tangent,))
                true_tloss = (true_grad * tangent.nan_to_num(nan=0)).sum()
                torch.testing.assert_close(tloss, true_tloss, equal_nan=True)


def test_compiled_loss_of_ignored_rows(backend, device):
    x, target = torch.randn(3, 4, device=device), torch.full((3,), -100, device=device)
    loss, grad = value_and_grad(torch.compile(F.cross_entropy, backend="aot_eager"), x, target)
    assert loss.isnan() and not grad.any()


def test_classes_of_one_byte(backend, device):
    """156 is a class, although it is the default of ignore_index modulo 256, and 255 may be ignored."""
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
    """An error where it can be seen in time, and else NaN in its row; never a read outside the row."""
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
