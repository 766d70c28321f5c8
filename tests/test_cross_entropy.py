"""F.cross_entropy against torch's in float64: values, gradients, and what torch serves."""

import pytest
import torch
import torch.nn.functional as TF
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


def test_ignored_rows_may_hold_anything(device):
    """Where torch's gradient is NaN."""
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


def test_a_target_that_is_no_class(device):
    """An error where it can be seen in time; never a read outside the row."""
    x, target = torch.randn(3, 4, device=device), torch.tensor([1, 4, 2], device=device)
    if device.type == "cpu":
        with tritonnet.backend("reference"), pytest.raises(IndexError, match="Target 4 is out of bounds"):
            F.cross_entropy(x, target)
    with tritonnet.backend("triton"):
        loss, grad = value_and_grad(F.cross_entropy, x, target, reduction="none")
        assert loss.isnan().tolist() == grad.isnan().any(1).tolist() == [False, True, False]
