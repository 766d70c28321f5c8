"""The gradient of the input: each pixel adds the gradients of the windows whose code points to it."""

import math

import triton
import triton.language as tl

from .. import shapes
from .._common import Window, acc_type, cdiv, first_tap, index_type, round_to
from ..launching import planned
from ..strips import UNROLLED, laid_out, offset, over, places, step, window_constants, within


@triton.jit
def with_window(
    acc, code, dy, TAP_H: tl.constexpr, TAP_W: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
):  # fmt: skip
    """The sums of a block of SH x SW pixels after one more window, of which the block's first pixel is this tap."""
    new = ()
    for i in tl.static_range(SH * SW):
        if min(TAP_H + i // SW, TAP_W + i % SW) >= 0 and TAP_H + i // SW < KH and TAP_W + i % SW < KW:
            new += (acc[i] + tl.where(code == (TAP_H + i // SW) * KW + TAP_W + i % SW, dy, 0.0),)
        else:
            new += (acc[i],)
    return new


@triton.jit
def max_pool2d_scatter_blocks_kernel(
    dy_ptr, code_ptr, dx_ptr,
    rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer, H, W, OH, OW,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_cn, stride_cc, stride_ch, stride_cw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    Y_UNIT: tl.constexpr, C_UNIT: tl.constexpr, X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, OW_UNIT: tl.constexpr,
    JOINED: tl.constexpr, INNER_UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    mask, n, c, i, j = places(
        rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer,
        INNER_UNIT, CHANNELS_LAST, INDEX, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    W, OW = W * W_UNIT, OW * OW_UNIT
    dy_ptrs = dy_ptr + offset(n, c, i, j, stride_yn, stride_yc, stride_yh, stride_yw, Y_UNIT, CHANNELS_LAST)
    code_ptrs = code_ptr + offset(n, c, i, j, stride_cn, stride_cc, stride_ch, stride_cw, C_UNIT, CHANNELS_LAST)

    # Pixel r of a block i is tap r + PH - d * SH of window i + d. Windows are visited from last to
    # first, so that each pixel adds its taps in ascending order.
    FIRST_H: tl.constexpr = -((KH - 1 - PH) // SH)
    LAST_H: tl.constexpr = (SH - 1 + PH) // SH
    FIRST_W: tl.constexpr = -((KW - 1 - PW) // SW)
    LAST_W: tl.constexpr = (SW - 1 + PW) // SW
    acc = ()
    for _ in tl.static_range(SH * SW):
        acc += (tl.zeros((BLOCK_R, BLOCK_V), ACC),)
    for h in tl.static_range(LAST_H, FIRST_H - 1, -1):
        in_h = mask & within(i + h, OH, h)
        for w in tl.static_range(LAST_W, FIRST_W - 1, -1):
            covers = in_h & within(j + w, OW, w)
            dy_step = step(h, w, stride_yh, stride_yw, Y_UNIT, CHANNELS_LAST, INDEX)
            code_step = step(h, w, stride_ch, stride_cw, C_UNIT, CHANNELS_LAST, INDEX)
            code = tl.load(code_ptrs + code_step, mask=covers, other=KH * KW).to(tl.int32)
            dy = tl.load(dy_ptrs + dy_step, mask=covers, other=0.0).to(ACC)
            acc = with_window(acc, code, dy, PH - h * SH, PW - w * SW, KH, KW, SH, SW)

    for r in tl.static_range(SH):
        ih = i * SH + r
        if JOINED:
            # The two columns of all blocks of a strip are contiguous.
            in_row, _, _, _, iw = places(
                rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer,
                2 * BLOCK_V, CHANNELS_LAST, INDEX, BLOCK_R, 2 * BLOCK_V,
            )  # fmt: skip
            dx = tl.reshape(tl.join(acc[2 * r], acc[2 * r + 1]), (BLOCK_R, 2 * BLOCK_V))
            dx_offs = offset(n, c, ih, iw, stride_xn, stride_xc, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST)
            tl.store(dx_ptr + dx_offs, round_to(dx, dx_ptr.dtype.element_ty), mask=in_row & (ih < H) & (iw < W))
        else:
            for s in tl.static_range(SW):
                iw = j * SW + s
                dx = round_to(acc[r * SW + s], dx_ptr.dtype.element_ty)
                dx_offs = offset(n, c, ih, iw, stride_xn, stride_xc, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST)
                tl.store(dx_ptr + dx_offs, dx, mask=mask & (ih < H) & (iw < W))


@planned(max_pool2d_scatter_blocks_kernel)
def _scatter_blocks(dy, code, dx, kernel, stride, padding, dilation):
    channels_last, vector = shapes.is_channels_last(dx), 16 // dx.element_size()
    (N, C, H, W), (OH, OW) = dx.shape, dy.shape[2:]
    (y_strides, y_unit), (c_strides, c_unit), (x_strides, x_unit) = (laid_out(t, channels_last) for t in (dy, code, dx))
    w_unit, ow_unit = math.gcd(vector, W), math.gcd(vector, OW)
    joined = not channels_last and stride[1] == 2 and w_unit > 1
    blocks = N, C, cdiv(H, stride[0]), cdiv(W, stride[1])
    grid, numbers, constants = over(blocks, channels_last, vector if channels_last else max(1, vector // stride[1]))
    constants |= dict(
        Y_UNIT=y_unit, C_UNIT=c_unit, X_UNIT=x_unit, W_UNIT=w_unit, OW_UNIT=ow_unit, JOINED=joined,
        INDEX=index_type(dy, code, dx), ACC=acc_type(dy.dtype), **window_constants(kernel, stride, padding, dilation),
    )  # fmt: skip
    sizes = H, W // w_unit, OH, OW // ow_unit
    return grid, (*numbers, *sizes, *y_strides, *c_strides, *x_strides), constants


@triton.jit
def max_pool2d_scatter_kernel(
    dy_ptr, code_ptr, dx_ptr,
    rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer, OH, OW,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_cn, stride_cc, stride_ch, stride_cw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    DIVISOR_H: tl.constexpr, STEP_H: tl.constexpr, INVERSE_H: tl.constexpr,
    DIVISOR_W: tl.constexpr, STEP_W: tl.constexpr, INVERSE_W: tl.constexpr,
    Y_UNIT: tl.constexpr, C_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
    INNER_UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    mask, n, c, ih, iw = places(
        rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer,
        INNER_UNIT, CHANNELS_LAST, INDEX, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    dx_offs = offset(n, c, ih, iw, stride_xn, stride_xc, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST)

    # One window for every STEP-th tap covers a pixel, which adds the gradients of those whose code points to it.
    kh0 = first_tap(ih + PH, DIVISOR_H, STEP_H, INVERSE_H, KH)
    kw0 = first_tap(iw + PW, DIVISOR_W, STEP_W, INVERSE_W, KW)
    acc = tl.zeros((BLOCK_R, BLOCK_V), ACC)
    for th in range(0, (KH + STEP_H - 1) // STEP_H):
        kh = kh0 + th * STEP_H
        oh = (ih + PH - kh * DH) // SH
        in_h = (kh < KH) & (ih + PH >= kh * DH) & (oh < OH)
        for tw in range(0, (KW + STEP_W - 1) // STEP_W):
            kw = kw0 + tw * STEP_W
            ow = (iw + PW - kw * DW) // SW
            covers = mask & in_h & (kw < KW) & (iw + PW >= kw * DW) & (ow < OW)
            code_offs = offset(n, c, oh, ow, stride_cn, stride_cc, stride_ch, stride_cw, C_UNIT, CHANNELS_LAST)
            code = tl.load(code_ptr + code_offs, mask=covers, other=0)
            named = covers & (code.to(tl.int32) == kh * KW + kw)
            dy_offs = offset(n, c, oh, ow, stride_yn, stride_yc, stride_yh, stride_yw, Y_UNIT, CHANNELS_LAST)
            acc += tl.load(dy_ptr + dy_offs, mask=named, other=0.0).to(ACC)

    tl.store(dx_ptr + dx_offs, round_to(acc, dx_ptr.dtype.element_ty), mask=mask)


@planned(max_pool2d_scatter_kernel)
def _scatter(dy, code, dx, kernel, stride, padding, dilation):
    channels_last = shapes.is_channels_last(dx)
    window_h, window_w = Window.of(stride[0], dilation[0]), Window.of(stride[1], dilation[1])
    grid, numbers, constants = over(dx.shape, channels_last, 16 // dx.element_size())
    (y_strides, y_unit), (c_strides, c_unit), (x_strides, x_unit) = (laid_out(t, channels_last) for t in (dy, code, dx))
    constants |= dict(
        DIVISOR_H=window_h.divisor, STEP_H=window_h.step, INVERSE_H=window_h.inverse,
        DIVISOR_W=window_w.divisor, STEP_W=window_w.step, INVERSE_W=window_w.inverse,
        Y_UNIT=y_unit, C_UNIT=c_unit, X_UNIT=x_unit,
        INDEX=index_type(dy, code, dx), ACC=acc_type(dy.dtype), **window_constants(kernel, stride, padding, dilation),
    )  # fmt: skip
    return grid, (*numbers, *dy.shape[2:], *y_strides, *c_strides, *x_strides), constants


def in_blocks(kernel, stride, dilation):
    """Whether a program's blocks are of stride x stride pixels: for small windows without dilation."""
    return kernel[0] * kernel[1] <= UNROLLED and stride[0] * stride[1] <= 4 and dilation == (1, 1)


def scatter(dy, code, size, kernel, stride, padding, dilation):
    """dy and code (N, C, OH, OW) -> dx (N, C, H, W), where `size` is (H, W)."""
    dx = shapes.max_pool2d_scatter(dy, code, size)
    if dx.numel() > 0:
        launch = _scatter_blocks if in_blocks(kernel, stride, dilation) else _scatter
        launch((dy, code, dx), kernel, stride, padding, dilation)
    return dx
