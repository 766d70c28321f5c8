"""The maxima of windows, with their codes or without."""

import math

import triton
import triton.language as tl

from .. import shapes
from .._common import acc_type, index_type
from ..launching import planned
from ..strips import UNROLLED, laid_out, offset, over, places, step, tap_inside, window_constants, within


@triton.jit
def first_inside(start, P: tl.constexpr, D: tl.constexpr):
    """The first tap k with start + k * D >= 0, where start >= -P."""
    return start * 0 if P == 0 else tl.where(start < 0, (D - 1 - start) // D, 0)


@triton.jit
def widened(x, ACC: tl.constexpr):
    """x as ACC. Of a bfloat16 the bits are moved: LLVM would compare the narrow values, in more instructions."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(ACC)


@triton.jit
def narrowed(value, dtype: tl.constexpr):
    """What `widened` has made ACC, as dtype again, with all bits of a NaN."""
    if dtype == tl.bfloat16:
        return (value.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def with_tap(best, code, x, tap):
    """The largest pixel so far and its code, after one more."""
    better = (x > best) | (x != x)
    return tl.where(better, x, best), tl.where(better, tap, code)


@triton.jit
def max_pool2d_forward_kernel(
    x_ptr, y_ptr, code_ptr,
    rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer, H, W,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_yn, stride_yc, stride_yh, stride_yw,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    UNROLLED: tl.constexpr, PAIRED: tl.constexpr, CODES: tl.constexpr,
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

    code = tl.zeros((BLOCK_R, BLOCK_V), tl.int32)
    code += (first_inside(ih0, PH, DH) * KW + first_inside(iw0, PW, DW)).to(tl.int32)
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
            in_h = tap_inside(ih0, H, kh, PH, DH)
            for kw in tl.static_range(KW):
                tap = step(kh * DH, kw * DW, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST, INDEX)
                if PAIRED and (kw - PW) % 2 == 0 and kw + 1 < KW:
                    tap = step(kh * DH, kw - PW, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST, INDEX)
                    inside = in_row & in_h & within(pairs + (kw - PW), W, kw - PW)
                    two = tl.load(pair_ptrs + tap, mask=inside, other=float("-inf"))
                    x, second = tl.split(tl.reshape(two, (BLOCK_R, BLOCK_V, 2)))
                elif PAIRED and (kw - PW) % 2 == 1 and kw > 0:
                    x = second
                else:
                    inside = mask & in_h & tap_inside(iw0, W, kw, PW, DW)
                    x = tl.load(x_ptrs + tap, mask=inside, other=float("-inf"))
                if kh + kw == 0:
                    # Where it is outside of the image, it is -inf, and the code that of the first pixel inside.
                    best = widened(x, ACC)
                else:
                    best, code = with_tap(best, code, widened(x, ACC), kh * KW + kw)
    else:
        best = tl.full((BLOCK_R, BLOCK_V), float("-inf"), ACC)
        for kh in range(0, KH):
            in_h = mask & within(ih0 + kh * DH, H, -PH)
            for kw in range(0, KW):
                tap = step(kh * DH, kw * DW, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST, INDEX)
                inside = in_h & within(iw0 + kw * DW, W, -PW)
                x = tl.load(x_ptrs + tap, mask=inside, other=float("-inf"))
                best, code = with_tap(best, code, widened(x, ACC), kh * KW + kw)

    tl.store(y_ptr + y_offs, narrowed(best, y_ptr.dtype.element_ty), mask=mask)
    if CODES:
        tl.store(code_ptr + y_offs, code.to(code_ptr.dtype.element_ty), mask=mask)


@planned(max_pool2d_forward_kernel)
def _forward(x, y, code, kernel, stride, padding, dilation):
    channels_last, vector = shapes.is_channels_last(y), 16 // y.element_size()
    (x_strides, x_unit), (y_strides, y_unit) = laid_out(x, channels_last), laid_out(y, channels_last)
    H, W = x.shape[2:]
    w_unit = math.gcd(vector, W)
    unrolled = kernel[0] * kernel[1] <= UNROLLED
    # Strips of columns: neighbouring windows with a stride of two share runs of the image.
    aligned = not channels_last and x_strides[3] == 1 and min(x_unit, w_unit) > 1
    paired = unrolled and aligned and stride[1] == 2 and dilation[1] == 1 and kernel[1] > 1
    grid, numbers, constants = over(y.shape, channels_last, vector // 2 if paired else vector)
    constants |= dict(
        UNROLLED=unrolled, PAIRED=paired, CODES=code is not None, X_UNIT=x_unit, Y_UNIT=y_unit, W_UNIT=w_unit,
        INDEX=index_type(x, y), ACC=acc_type(x.dtype), **window_constants(kernel, stride, padding, dilation),
    )  # fmt: skip
    return grid, (*numbers, H, W // w_unit, *x_strides, *y_strides), constants


def forward(x, kernel, stride, padding, dilation, ceil_mode):
    """x (N, C, H, W) -> y and code (N, C, OH, OW), the code in the narrowest integer type that holds KH * KW - 1."""
    y, code = shapes.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    if y.numel() > 0:
        _forward((x, y, code), kernel, stride, padding, dilation)
    return y, code


def values(x, kernel, stride, padding, dilation, ceil_mode):
    """x (N, C, H, W) -> y alone."""
    y = shapes.max_pool2d_values(x, kernel, stride, padding, dilation, ceil_mode)
    if y.numel() > 0:
        _forward((x, y, None), kernel, stride, padding, dilation)
    return y
