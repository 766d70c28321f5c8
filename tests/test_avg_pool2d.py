"""avg_pool2d and adaptive_avg_pool2d: values and gradients against torch in float64."""

import math
import random

import pytest
import torch
import torch.nn.functional as TF
from exact import DTYPES, check_linear

import tritonnet
import tritonnet.nn.functional as F
from tritonnet import ops
from tritonnet.kernels.avg_pool2d import bins, forward, gradient, whole

LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    # A slice in the middle of 16 bytes, with gaps between columns and between channels.
    "strided": lambda t: t.new_zeros(t.shape[0], 2 * t.shape[1], t.shape[2] + 1, 2 * t.shape[3] + 3)[
        :, 1::2, 1:, 3::2
    ].copy_(t),
}
WINDOWS, BINS = F.avg_pool2d, F.adaptive_avg_pool2d
# name: function, (N, C, H, W), arguments, the kernels that serve it and its gradient
BLOCKS, SINGLE = ("avg_pool2d_forward", "avg_pool2d_grad_blocks"), ("avg_pool2d_forward", "avg_pool2d_grad")
WHOLE, ADAPTIVE = ("whole_avg_pool2d", "whole_avg_pool2d_grad"), ("adaptive_avg_pool2d",) * 2
CASES = {
    "2x2": (WINDOWS, (2, 3, 8, 16), (2,), BLOCKS),
    "3x3 stride 2": (WINDOWS, (2, 8, 9, 12), (3, 2, 1), BLOCKS),
    "3x3 stride 2, pixels inside count": (WINDOWS, (2, 3, 8, 12), (3, 2, 1, False, False), BLOCKS),
    "stride 1": (WINDOWS, (2, 8, 7, 8), (3, 1, 1, False, False), BLOCKS),
    "pairs, ceil_mode, odd rows": (WINDOWS, (2, 3, 8, 11), ((3, 2), (1, 2), (1, 0), True), BLOCKS),
    "ceil_mode past the padding": (WINDOWS, (1, 9, 6, 8), (3, 2, 1, True), BLOCKS),
    "divisor_override": (WINDOWS, (2, 3, 7, 8), (3, 2, 1, True, False, 5), BLOCKS),
    "stride over kernel": (WINDOWS, (2, 3, 11, 12), (2, (3, 5)), SINGLE),
    "large": (WINDOWS, (1, 9, 13, 16), (6, 2, 3, True, False), SINGLE),
    "large, all counted": (WINDOWS, (1, 3, 12, 14), ((5, 7), (4, 3), 2), SINGLE),
    "kernel of the image": (WINDOWS, (2, 3, 7, 9), ((7, 9), 2, 0, False, True, 7), WHOLE),
    "whole images": (BINS, (3, 9, 7, 7), (1,), WHOLE),
    "large images": (BINS, (1, 3, 65, 66), ((1, 1),), WHOLE),
    "columns": (BINS, (2, 8, 16, 1), ((1, None),), WHOLE),
    "equal bins": (BINS, (2, 3, 6, 8), ((3, 4),), BLOCKS),
    "no reduction": (BINS, (2, 3, 5, 6), ((None, 6),), BLOCKS),
    "bins that overlap": (BINS, (2, 8, 7, 9), ((3, 4),), ADAPTIVE),
    "more bins than pixels": (BINS, (2, 3, 4, 5), ((7, 10),), ADAPTIVE),
    "one pixel": (BINS, (2, 1, 1, 1), (1,), WHOLE),
    "empty batch": (WINDOWS, (0, 3, 6, 6), (2,), ()),
}


def terms(function, arguments, size, result):
    """The most pixels in a window or bin, and the most of these that a pixel is in, one more for their reciprocals."""
    if function is WINDOWS:
        kernel, stride = ((n, n) if isinstance(n, int) else n for n in (*arguments, arguments[0])[:2])
        return [math.prod(kernel), math.prod(-(-k // s) for k, s in zip(kernel, stride)) + 1]
    shares = zip(size[2:], result[2:])
    per_bin, per_pixel = zip(*((-(-pixels // bins) + 1, -(-bins // pixels) + 1) for pixels, bins in shares))
    return [math.prod(per_bin), math.prod(per_pixel) + 1]


def check(function, size, arguments, dtype, device, layout="contiguous"):
    theirs = getattr(TF, function.__name__)
    result = theirs(torch.empty(size), *arguments).shape
    results = []

    def ours(x):
        results.extend((x, function(x, *arguments)))
        return results[-1]

    check_linear(
        ours, lambda x: theirs(x, *arguments).clone(), [torch.randn(size, dtype=torch.float64)],
        terms(function, arguments, size, result), dtype, device,
        prepare=lambda t: LAYOUTS[layout](t) if t.shape == torch.Size(size) else t,
    )  # fmt: skip
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_case(case, layout, backend, device):
    """In bfloat16, whose vectors are the longest; the result and the gradient have the image's layout."""
    function, size, arguments, kernels = CASES[case]
    with tritonnet.count_launches() as launches:
        x, y = check(function, size, arguments, torch.bfloat16, device, layout)
    expected = {f"{name}_kernel" for name in kernels} if backend == "triton" else set()
    assert set(launches) == expected
    (dx,) = torch.autograd.grad(y.sum(), x)
    if layout != "strided":
        theirs = getattr(TF, function.__name__)(x.detach(), *arguments)
        assert (y.stride(), dx.stride()) == (theirs.stride(), x.stride()) or y.numel() == 0


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.bfloat16], ids=str)
def test_formats(dtype, backend, device):
    for case in ("3x3 stride 2, pixels inside count", "large", "whole images", "bins that overlap"):
        for layout in LAYOUTS:
            check(*CASES[case][:3], dtype, device, layout)


def test_drawn_windows(device):
    """The divisor of every window is torch's: of images of ones the kernels' results are its results."""
    draw = random.Random(0)
    with tritonnet.backend("triton"):
        for _ in range(60):
            kernel, stride = ([draw.randint(1, most) for _ in range(2)] for most in (5, 6))
            padding, size = [draw.randint(0, k // 2) for k in kernel], [draw.randint(5, 9) for _ in range(2)]
            rest = draw.random() < 0.5, draw.random() < 0.5, draw.choice([None, None, 3, -3])
            x = torch.ones(1, 2, *size, dtype=torch.float64)
            theirs = TF.avg_pool2d(x.requires_grad_(), kernel, stride, padding, *rest)
            dy = torch.randint(-3, 4, theirs.shape).double()
            (dx,) = torch.autograd.grad(theirs, x, dy)
            window = tuple(kernel), tuple(stride), tuple(padding), *rest
            close = dict(rtol=1e-14, atol=1e-14, msg=str((size, window)))
            torch.testing.assert_close(ops.avg_pool2d(x.detach().to(device), *window).cpu(), theirs.detach(), **close)
            torch.testing.assert_close(
                ops.avg_pool2d_grad(dy.to(device), size, *window, False).cpu(), dx, **close
            )  # fmt: skip


def test_nan_and_infinities_stay_in_their_windows(backend, device):
    for case in ("2x2", "3x3 stride 2, pixels inside count", "large", "whole images", "bins that overlap"):
        function, size, arguments, _ = CASES[case]
        x = torch.randn(size)
        for i, value in enumerate(("nan", "inf", "-inf")):
            x[torch.rand(size) < 0.02] = float(value)
            x[0, i, i, i] = float(value)
        leaf, truth = x.to(device).requires_grad_(), x.clone().requires_grad_()
        y, true_y = function(leaf, *arguments), getattr(TF, function.__name__)(truth, *arguments)
        torch.testing.assert_close(y.detach().cpu(), true_y.detach(), equal_nan=True)
        dy = torch.where(torch.rand(true_y.shape) < 0.2, float("inf"), torch.ones(true_y.shape))
        dy[torch.rand(true_y.shape) < 0.1] = float("nan")
        (dx,), (true_dx,) = torch.autograd.grad(y, leaf, dy.to(device)), torch.autograd.grad(true_y, truth, dy)
        torch.testing.assert_close(dx.cpu(), true_dx, equal_nan=True)


def test_unbatched_and_what_is_torchs(backend, device):
    x = torch.randn(3, 6, 7, device=device)
    for function, arguments in ((F.avg_pool2d, (3, 2)), (F.adaptive_avg_pool2d, (4,))):
        theirs = getattr(TF, function.__name__)
        torch.testing.assert_close(function(x, *arguments), theirs(x, *arguments))
    assert F.adaptive_avg_pool2d(x, (0, 2)).shape == (3, 0, 2) and F.adaptive_avg_pool2d(x[:0], 4).shape == (0, 4, 4)
    assert torch.equal(F.avg_pool2d(x.long().cpu(), 2), TF.avg_pool2d(x.long().cpu(), 2))


def plan(launch, *args):
    """The constants of a launch."""
    return launch.__wrapped__(*args)[2]


def test_accesses_of_16_bytes():
    """What the plans say of the addresses of 16-bit images: units of 8 elements wherever rows allow it."""
    last, window = dict(memory_format=torch.channels_last), ((3, 3), (2, 2), (1, 1), True, None)

    def images(*size, **layout):
        return torch.empty(size, dtype=torch.bfloat16, **layout)

    for layout, paired in (({}, True), (last, False)):
        x, y = images(2, 24, 28, 32, **layout), images(2, 24, 14, 16, **layout)
        assert plan(forward._forward, x, y, *window).items() >= dict(PAIRED=paired, X_UNIT=8, Y_UNIT=8).items()
        assert plan(gradient._grad_blocks, y, x, *window).items() >= dict(JOINED=paired, X_UNIT=8).items()
    x, y = images(64, 2040, 7, 7, **last), images(64, 2040, 1, 1, **last)
    assert plan(whole._forward, x, y, 49).items() >= dict(X_UNIT=8, C_UNIT=8, BLOCK_C=64, BLOCK_P=64).items()
    # Images of 49 pixels begin in the middle of 16 bytes, but their gradients are written as one row.
    dx = images(64, 2040, 7, 7)
    assert plan(whole._grad, y, dx, 49).items() >= dict(BLOCK_V=8, INNER_UNIT=8).items()
    # A batch of one has as many programs as its channels allow.
    (grid, *_), _, constants = whole._forward.__wrapped__(images(1, 512, 7, 7, **last), images(1, 512, 1, 1), 49)
    assert (grid, constants["BLOCK_C"]) == (64, 8)
    x, y = images(1, 8, 7, 9, **last), images(1, 8, 3, 4, **last)
    assert plan(bins._adaptive, x, y, False).items() >= dict(BLOCK_V=8, X_UNIT=8, Y_UNIT=8).items()
