"""The means of windows."""

import math

import triton
import triton.language as tl

from .. import shapes
from .._common import acc_type, index_type, round_to
from ..launching import planned
from ..strips import UNROLLED, laid_out, offset, over, places, step, tap_inside, window_constants, within


@triton.jit
def counted(o, size, K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, INCLUDE_PAD: tl.constexpr):
    """The rows or columns of window o that count in its divisor, of an image with so many; 1 for what is no window."""
    start = o * S - P
    if INCLUDE_PAD:
        count = tl.minimum(start + K, size + P) - start
    else:
        count = tl.minimum(start + K, size) - tl.maximum(start, 0)
    return tl.maximum(count, 1)


def scale(size, windows, kernel, stride, padding, include_pad, override):
    """What every window's sum is multiplied by, or None if their divisors differ.

    Args:
        size, windows: (H, W) of the image and (OH, OW) of the result.
        override: the divisor of all windows, or None.
    """
    if override is not None:
        return 1 / override
    for n, count, k, s, p in zip(size, windows, kernel, stride, padding):
        end = (count - 1) * s - p + k
        if end > (n + p if include_pad else n) or (p > 0 and not include_pad):
            return None
    return 1 / (kernel[0] * kernel[1])


@triton.jit
def avg_pool2d_forward_kernel(
    x_ptr, y_ptr,
    rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer, H, W,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_yn, stride_yc, stride_yh, stride_yw,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    SCALE: tl.constexpr, INCLUDE_PAD: tl.constexpr, UNROLLED: tl.constexpr, PAIRED: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, W_UNIT: tl.constexpr, INNER_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    mask, n, c, oh, ow = places(
        rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer,
        INNER_UNIT, CHANNELS_LAST, INDEX, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    y_offs = offset(n, c, oh, ow, stride_yn, stride_yc, stride_yh, stride_yw, Y_UNIT, CHANNELS_LAST)
    W = W * W_UNIT
    ih0, iw0 = oh * SH - PH, ow * SW - PW
    x_ptrs = x_ptr + offset(n, c, ih0, iw0, stride_xn, stride_xc, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST)

    acc = tl.zeros((BLOCK_R, BLOCK_V), ACC)
    if UNROLLED:
        if PAIRED:
            # Columns 2 * ow and 2 * ow + 1 of all windows of a strip are contiguous, also of idle ones at its end.
            in_row, _, _, _, pairs = places(
                rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer,
                2 * BLOCK_V, CHANNELS_LAST, INDEX, BLOCK_R, 2 * BLOCK_V,
            )  # fmt: skip
            pair_ptrs = x_ptr + offset(
                n, c, ih0, pairs, stride_xn, stride_xc, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST
            )
        for kh in tl.static_range(KH):
            in_h = tap_inside(ih0, H, kh, PH, 1)
            for kw in tl.static_range(KW):
                tap = step(kh, kw, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST, INDEX)
                if PAIRED and (kw - PW) % 2 == 0 and kw + 1 < KW:
                    tap = step(kh, kw - PW, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST, INDEX)
                    inside = in_row & in_h & within(pairs + (kw - PW), W, kw - PW)
                    two = tl.load(pair_ptrs + tap, mask=inside, other=0.0)
                    x, second = tl.split(tl.reshape(two, (BLOCK_R, BLOCK_V, 2)))
                elif PAIRED and (kw - PW) % 2 == 1 and kw > 0:
                    x = second
                else:
                    inside = mask & in_h & tap_inside(iw0, W, kw, PW, 1)
                    x = tl.load(x_ptrs + tap, mask=inside, other=0.0)
                acc += x.to(ACC)
    else:
        for kh in range(0, KH):
            in_h = mask & within(ih0 + kh, H, -PH)
            for kw in range(0, KW):
                tap = step(kh, kw, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST, INDEX)
                inside = in_h & within(iw0 + kw, W, -PW)
                acc += tl.load(x_ptrs + tap, mask=inside, other=0.0).to(ACC)

    if SCALE is None:
        divisor = counted(oh, H, KH, SH, PH, INCLUDE_PAD) * counted(ow, W, KW, SW, PW, INCLUDE_PAD)
        # In channels_last a strip has one divisor, of which a thread takes one reciprocal.
        acc = acc * (1.0 / divisor.to(ACC))
    else:
        acc = acc * SCALE
    tl.store(y_ptr + y_offs, round_to(acc, y_ptr.dtype.element_ty), mask=mask)


@planned(avg_pool2d_forward_kernel)
def _forward(x, y, kernel, stride, padding, include_pad, override):
    channels_last, vector = shapes.is_channels_last(y), 16 // y.element_size()
    (x_strides, x_unit), (y_strides, y_unit) = laid_out(x, channels_last), laid_out(y, channels_last)
    H, W = x.shape[2:]
    w_unit = math.gcd(vector, W)
    unrolled = kernel[0] * kernel[1] <= UNROLLED
    # Strips of columns: neighbouring windows with a stride of two share runs of the image.
    aligned = not channels_last and x_strides[3] == 1 and min(x_unit, w_unit) > 1
    paired = unrolled and aligned and stride[1] == 2 and kernel[1] > 1
    grid, numbers, constants = over(y.shape, channels_last, vector // 2 if paired else vector)
    constants |= dict(
        SCALE=scale((H, W), y.shape[2:], kernel, stride, padding, include_pad, override), INCLUDE_PAD=include_pad,
        UNROLLED=unrolled, PAIRED=paired, X_UNIT=x_unit, Y_UNIT=y_unit, W_UNIT=w_unit, INDEX=index_type(x, y),
        ACC=acc_type(x.dtype), **window_constants(kernel, stride, padding),
    )  # fmt: skip
    return grid, (*numbers, H, W // w_unit, *x_strides, *y_strides), constants


def forward(x, kernel, stride, padding, ceil_mode, include_pad, override):
    """x (N, C, H, W) -> y (N, C, OH, OW)."""
    y = shapes.avg_pool2d(x, kernel, stride, padding, ceil_mode)
    if y.numel() > 0:
        _forward((x, y), kernel, stride, padding, include_pad, override)
    return y
