"""The statistics of a convolution's result that its kernel computes, part by part, against float64.

The oracle is the stored result itself: a sum of n values added in a format of unit roundoff u is off by at most n * u
times the sum of their magnitudes, see exact.py.
"""

from typing import NamedTuple
from unittest import mock

import pytest
import torch
from conftest import DEVICE, thorough_if
from exact import SUM

import tritonnet
from tritonnet.dispatch import float32_products
from tritonnet.kernels import launchers, product


class Case(NamedTuple):
    """A convolution of x (size) by w (filters), and the kernel whose tiles are the parts; None: there are no parts."""

    size: tuple
    filters: tuple
    kernel: str | None
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    mode: str = "zeros"

    @property
    def geometry(self):
        return (self.stride,) * 2, (self.padding,) * 4, (self.dilation,) * 2, self.groups, self.mode


FORWARD, PRODUCT = "conv2d_forward_kernel", "product_kernel"
# Pixels and channels fill no number of tiles.
CASES = {
    "3x3": Case((3, 20, 9, 11), (24, 20, 3, 3), FORWARD, padding=1),
    "3x3, many channels": Case((2, 40, 7, 7), (72, 40, 3, 3), FORWARD, padding=1),
    "strided 1x1": Case((2, 24, 13, 9), (40, 24, 1, 1), FORWARD, stride=2),
    "1x1": Case((3, 24, 9, 11), (40, 24, 1, 1), PRODUCT),
    "1x1, even rows": Case((2, 32, 8, 8), (64, 32, 1, 1), PRODUCT),
    "grouped": Case((2, 48, 10, 9), (60, 16, 3, 3), FORWARD, stride=2, padding=1, groups=3),
    "dilated, few channels": Case((2, 3, 12, 10), (20, 3, 3, 3), FORWARD, padding=2, dilation=2),
    "reflected": Case((2, 17, 9, 8), (20, 17, 3, 3), FORWARD, padding=1, mode="reflect"),
    "one pixel": Case((1, 16, 3, 3), (20, 16, 3, 3), FORWARD),
    "few channels": Case((2, 3, 12, 10), (20, 3, 3, 3), None, padding=1),
    "depthwise": Case((2, 4, 6, 5), (4, 1, 3, 3), None, padding=1, groups=4),
    "no images": Case((0, 20, 9, 11), (24, 20, 3, 3), None, padding=1),
}
FORMATS = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32,
    "float64": torch.float64,
}  # fmt: skip


def launched(case, format, last, mean=0.0):
    """(the result, partials, rows, launches of a case with results of about that mean)."""
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    x, w = torch.randn(case.size), torch.randn(case.filters)
    if mean:
        x, w = 1 + 0.01 * x, mean / w[0].numel() * (1 + 0.01 * w)
    x, w = (t.to(DEVICE, FORMATS[format]).contiguous(memory_format=layout) for t in (x, w))
    precision = float32_products("tf32" if format == "tf32" else "ieee")
    with precision, mock.patch.object(product, "LARGE", 0), tritonnet.count_launches() as launches:
        return *launchers.conv2d_partials(x, w, *case.geometry), launches, (x, w)


def kernel_of(name, format):
    """Full float32, float64 and GPUs before Hopper have no descriptors, and float64 no kernel for few channels."""
    case = CASES[name]
    if name == "few channels" and format == "float64":
        return FORWARD
    if case.kernel == PRODUCT and not (product.described() and format in ("bfloat16", "float16", "tf32")):
        return FORWARD
    return case.kernel


def left_out(name, format, last):
    """The default run has each case in bfloat16, and one of each kernel in the other formats and layout."""
    return (format != "bfloat16" or not last) and (name not in ("3x3", "1x1") or format != "bfloat16" and last)


def parts_of(t, rows):
    """The parts of t (N, C, H, W), each (pixels, C), in float64."""
    return t.detach().cpu().double().permute(0, 2, 3, 1).reshape(-1, t.shape[1]).split(rows)


def assert_statistics(z, partials, rows):
    """The error of a mean is relative to the values, and that of the squares to the squares themselves."""
    parts, u = parts_of(z, rows), SUM[z.dtype]
    assert partials.shape == (2, len(parts), z.shape[1])
    assert partials.dtype == torch.promote_types(z.dtype, torch.float32)
    for part, mean, squares in zip(parts, *partials.cpu().double()):
        assert ((mean - part.mean(0)).abs() <= (len(part) + 1) * u * part.abs().mean(0)).all()
        truth = (part - mean).square().sum(0)
        assert ((squares - truth).abs() <= (len(part) + 3) * u * truth).all()


SERVED = [(name, format, last) for name in CASES for format in FORMATS for last in (False, True)]


@pytest.mark.parametrize("name, format, last", thorough_if(left_out, SERVED))
@pytest.mark.sampled(2)
def test_against_float64(name, format, last):
    case = CASES[name]
    z, partials, rows, launches, (x, w) = launched(case, format, last)
    with float32_products("tf32" if format == "tf32" else "ieee"), mock.patch.object(product, "LARGE", 0):
        assert torch.equal(z, launchers.conv2d(x, w, None, *case.geometry))
    kernel = kernel_of(name, format)
    if kernel is None:
        assert (partials, rows) == (None, 0)
        return
    assert launches == {kernel: 1}
    assert_statistics(z, partials, rows)


@pytest.mark.parametrize("name", ["3x3", "1x1"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_mean_of_many_standard_deviations(name, format):
    """The mean square less the square of the mean would have no digits left."""
    case = CASES[name]._replace(padding=0)
    z, partials, rows, *_ = launched(case, format, True, mean=1000.0)
    assert z.double().mean() > 500
    assert_statistics(z, partials, rows)


@pytest.mark.parametrize("name", ["3x3", "1x1"])
def test_every_run_has_the_same_bits(name):
    first, second = (launched(CASES[name], "bfloat16", False) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def channels_of(t):
    """t (N, C, H, W) as (C, pixels), in float64."""
    return t.detach().cpu().double().transpose(0, 1).flatten(1)


@pytest.mark.parametrize("name, biased", [("3x3", True), ("1x1", False), ("depthwise", True)])
def test_norm_conv2d(name, biased, device):
    """Batch norm and silu, a convolution, and statistics of its result with running ones; or its bias without them."""
    case, momentum = CASES[name], 0.3
    C, OC = case.size[1], case.filters[0]
    x, w = torch.randn(case.size).to(device), torch.randn(case.filters).to(device)
    b = torch.randn(OC).to(device) if biased else None
    norm = [t.to(device) for t in (torch.randn(C), torch.rand(C) + 0.5, torch.randn(C), torch.randn(C))]
    activation = 1e-3, "silu", 0.0
    running = torch.randn(OC).to(device), torch.rand(OC).to(device)
    before = [t.cpu().double() for t in running]
    with float32_products("ieee"):
        y = launchers.batch_norm(x, *norm, None, *activation)
        z, mean, var = launchers.norm_conv2d(x, *norm, *activation, w, b, *case.geometry, *running, momentum, True)
        assert torch.equal(z, launchers.conv2d(y, w, None, *case.geometry))
        of_none = launchers.norm_conv2d(y, *[None] * 4, *activation, w, b, *case.geometry, None, None, 0.0, True)
        assert all(torch.equal(a, c) for a, c in zip((z, mean, var), of_none))
        plain, *empty = launchers.norm_conv2d(x, *norm, *activation, w, b, *case.geometry, None, None, 0.0, False)
        assert torch.equal(plain, launchers.conv2d(y, w, b, *case.geometry)) and [t.numel() for t in empty] == [0, 0]

    values = channels_of(z)
    true_var, true_mean = torch.var_mean(values, 1, correction=0)
    bound = values.shape[1] * SUM[z.dtype] * values.abs().amax(1)
    assert ((mean.cpu() - true_mean).abs() <= bound).all()
    assert ((var.cpu() - true_var).abs() <= bound * values.abs().amax(1)).all()
    shifted = true_mean + (b.cpu().double() if biased else 0)
    for actual, old, new in zip(running, before, (shifted, values.var(1))):
        torch.testing.assert_close(actual.cpu().double(), old + momentum * (new - old), rtol=1e-5, atol=1e-5)
