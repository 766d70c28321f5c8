"""The means of bins that cut an image into a given number of rows and columns, and their gradient.

Bin o of n over m pixels is [floor(o * m / n), ceil((o + 1) * m / n)). The bins that pixel i is in are
[floor(i * n / m), ceil((i + 1) * n / m)), by the same formula: one kernel adds pixels of a bin or bins of a pixel.
"""

import triton
import triton.language as tl

from .. import shapes
from .._common import acc_type, cdiv, divide, index_type, reciprocal, round_to
from ..launching import planned
from ..strips import laid_out, offset, over, places


@triton.jit
def bin(o, pixels, bins, inverse_bins):
    """(The first pixel of bin o, the one behind its last)."""
    start = o * pixels
    return divide(start, bins, inverse_bins), divide(start + pixels + bins - 1, bins, inverse_bins)


@triton.jit
def length(o, pixels, bins, inverse_bins):
    """The pixels of bin o."""
    start, end = bin(o, pixels, bins, inverse_bins)
    return end - start


@triton.jit
def adaptive_avg_pool2d_kernel(
    x_ptr, y_ptr,
    rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer,
    H, W, OH, OW, inverse_h, inverse_w, inverse_oh, inverse_ow, most_h, most_w,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_yn, stride_yc, stride_yh, stride_yw,
    GRAD: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    INNER_UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr, BIN: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # x is (N, C, H, W) and y is (N, C, OH, OW); with GRAD, x is dy and y is dx.
    mask, n, c, oh, ow = places(
        rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer,
        INNER_UNIT, CHANNELS_LAST, INDEX, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    y_offs = offset(n, c, oh, ow, stride_yn, stride_yc, stride_yh, stride_yw, Y_UNIT, CHANNELS_LAST)
    # Offsets may need 64 bits where rows and columns do not: dividing those takes many registers.
    h0, h1 = bin(oh.to(BIN), H, OH, inverse_oh)
    w0, w1 = bin(ow.to(BIN), W, OW, inverse_ow)

    acc = tl.zeros((BLOCK_R, BLOCK_V), ACC)
    for i in range(0, most_h):
        h = h0 + i
        for j in range(0, most_w):
            w = w0 + j
            x_offs = offset(
                n, c, h.to(INDEX), w.to(INDEX), stride_xn, stride_xc, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST
            )
            x = tl.load(x_ptr + x_offs, mask=mask & (h < h1) & (w < w1), other=0.0).to(ACC)
            if GRAD:
                x = x * (1.0 / (length(h, OH, H, inverse_h) * length(w, OW, W, inverse_w)).to(ACC))
            acc += x

    if not GRAD:
        acc = acc * (1.0 / ((h1 - h0) * (w1 - w0)).to(ACC))
    tl.store(y_ptr + y_offs, round_to(acc, y_ptr.dtype.element_ty), mask=mask)


def _most(pixels, bins):
    """The pixels of the largest bin."""
    return 1 if bins % pixels == 0 else cdiv(pixels, bins) + (pixels % bins > 1)


@planned(adaptive_avg_pool2d_kernel)
def _adaptive(x, y, grad):
    channels_last, vector, index = shapes.is_channels_last(y), 16 // y.element_size(), index_type(x, y)
    # Along columns each element has an address of its own, and those of 64 bits take twice the registers.
    most = vector if channels_last or index == tl.int32 else max(1, vector // 2)
    grid, numbers, constants = over(y.shape, channels_last, most)
    (x_strides, x_unit), (y_strides, y_unit) = laid_out(x, channels_last), laid_out(y, channels_last)
    (H, W), (OH, OW) = x.shape[2:], y.shape[2:]
    reach = max((H + 1) * (OH + 1), (W + 1) * (OW + 1))
    constants |= dict(
        GRAD=grad, X_UNIT=x_unit, Y_UNIT=y_unit, INDEX=index, BIN=index_type(reach=reach),
        ACC=acc_type(x.dtype),
    )  # fmt: skip
    numbers = *numbers, H, W, OH, OW, *map(reciprocal, (H, W, OH, OW)), _most(H, OH), _most(W, OW)
    return grid, (*numbers, *x_strides, *y_strides), constants


def forward(x, size):
    """x (N, C, H, W) -> y (N, C, OH, OW), where `size` is (OH, OW)."""
    y = shapes.adaptive_avg_pool2d(x, size)
    if y.numel() > 0:
        _adaptive((x, y), False)
    return y


def gradient(dy, size, channels_last):
    """dy (N, C, OH, OW) -> dx (N, C, H, W), where `size` is (H, W)."""
    dx = shapes.avg_pool2d_grad(dy, size, channels_last)
    if dx.numel() > 0:
        _adaptive((dy, dx), True)
    return dx
