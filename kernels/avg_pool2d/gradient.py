"""The gradient of the input: each pixel adds the gradients of the windows that it is in, over their divisors."""

import math

import triton
import triton.language as tl

from .. import shapes
from .._common import acc_type, cdiv, index_type, round_to
from ..launching import planned
from ..strips import UNROLLED, laid_out, offset, over, places, step, window_constants, within
from .forward import counted, scale


@triton.jit
def with_window(
    acc, dy, TAP_H: tl.constexpr, TAP_W: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
):  # fmt: skip
    """The sums of a block of SH x SW pixels after one more window, of which the block's first pixel is this tap."""
    new = ()
    for i in tl.static_range(SH * SW):
        if min(TAP_H + i // SW, TAP_W + i % SW) >= 0 and TAP_H + i // SW < KH and TAP_W + i % SW < KW:
            new += (acc[i] + dy,)
        else:
            new += (acc[i],)
    return new


@triton.jit
def avg_pool2d_grad_blocks_kernel(
    dy_ptr, dx_ptr,
    rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer, H, W, OH, OW,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    SCALE: tl.constexpr, INCLUDE_PAD: tl.constexpr,
    Y_UNIT: tl.constexpr, X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, OW_UNIT: tl.constexpr,
    JOINED: tl.constexpr, INNER_UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    mask, n, c, i, j = places(
        rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer,
        INNER_UNIT, CHANNELS_LAST, INDEX, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    W, OW = W * W_UNIT, OW * OW_UNIT
    dy_ptrs = dy_ptr + offset(n, c, i, j, stride_yn, stride_yc, stride_yh, stride_yw, Y_UNIT, CHANNELS_LAST)

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
            dy = tl.load(dy_ptrs + dy_step, mask=covers, other=0.0).to(ACC)
            if SCALE is None:
                # Rows and columns apart, as all windows of a strip share the reciprocals of their rows.
                share_h = 1.0 / counted(i + h, H, KH, SH, PH, INCLUDE_PAD).to(ACC)
                dy = dy * (share_h * (1.0 / counted(j + w, W, KW, SW, PW, INCLUDE_PAD).to(ACC)))
            acc = with_window(acc, dy, PH - h * SH, PW - w * SW, KH, KW, SH, SW)

    FACTOR: tl.constexpr = 1 if SCALE is None else SCALE
    for r in tl.static_range(SH):
        ih = i * SH + r
        if JOINED:
            # The two columns of all blocks of a strip are contiguous.
            in_row, _, _, _, iw = places(
                rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer,
                2 * BLOCK_V, CHANNELS_LAST, INDEX, BLOCK_R, 2 * BLOCK_V,
            )  # fmt: skip
            dx = tl.reshape(tl.join(acc[2 * r], acc[2 * r + 1]), (BLOCK_R, 2 * BLOCK_V)) * FACTOR
            dx_offs = offset(n, c, ih, iw, stride_xn, stride_xc, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST)
            tl.store(dx_ptr + dx_offs, round_to(dx, dx_ptr.dtype.element_ty), mask=in_row & (ih < H) & (iw < W))
        else:
            for s in tl.static_range(SW):
                iw = j * SW + s
                dx = round_to(acc[r * SW + s] * FACTOR, dx_ptr.dtype.element_ty)
                dx_offs = offset(n, c, ih, iw, stride_xn, stride_xc, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST)
                tl.store(dx_ptr + dx_offs, dx, mask=mask & (ih < H) & (iw < W))


def _constants(dy, dx, kernel, stride, padding, include_pad, override):
    """The constants that both gradients share."""
    return dict(
        SCALE=scale(dx.shape[2:], dy.shape[2:], kernel, stride, padding, include_pad, override),
        INCLUDE_PAD=include_pad, INDEX=index_type(dy, dx), ACC=acc_type(dy.dtype),
        **window_constants(kernel, stride, padding),
    )  # fmt: skip


@planned(avg_pool2d_grad_blocks_kernel)
def _grad_blocks(dy, dx, kernel, stride, *rest):
    channels_last, vector = shapes.is_channels_last(dx), 16 // dx.element_size()
    (N, C, H, W), (OH, OW) = dx.shape, dy.shape[2:]
    (y_strides, y_unit), (x_strides, x_unit) = laid_out(dy, channels_last), laid_out(dx, channels_last)
    w_unit, ow_unit = math.gcd(vector, W), math.gcd(vector, OW)
    joined = not channels_last and stride[1] == 2 and w_unit > 1
    blocks = N, C, cdiv(H, stride[0]), cdiv(W, stride[1])
    grid, numbers, constants = over(blocks, channels_last, vector if channels_last else max(1, vector // stride[1]))
    constants |= dict(
        Y_UNIT=y_unit, X_UNIT=x_unit, W_UNIT=w_unit, OW_UNIT=ow_unit, JOINED=joined,
        **_constants(dy, dx, kernel, stride, *rest),
    )  # fmt: skip
    return grid, (*numbers, H, W // w_unit, OH, OW // ow_unit, *y_strides, *x_strides), constants


@triton.jit
def avg_pool2d_grad_kernel(
    dy_ptr, dx_ptr,
    rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer, H, W, OH, OW,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    SCALE: tl.constexpr, INCLUDE_PAD: tl.constexpr, Y_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
    INNER_UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    mask, n, c, ih, iw = places(
        rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer,
        INNER_UNIT, CHANNELS_LAST, INDEX, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    dx_offs = offset(n, c, ih, iw, stride_xn, stride_xc, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST)

    # From the last window that begins before a pixel to the first that may reach it.
    last_h, last_w = (ih + PH) // SH, (iw + PW) // SW
    acc = tl.zeros((BLOCK_R, BLOCK_V), ACC)
    for back_h in range(0, (KH + SH - 1) // SH):
        oh = last_h - back_h
        in_h = mask & within(oh, OH, -1) & (oh * SH - PH + KH > ih)
        for back_w in range(0, (KW + SW - 1) // SW):
            ow = last_w - back_w
            covers = in_h & within(ow, OW, -1) & (ow * SW - PW + KW > iw)
            dy_offs = offset(n, c, oh, ow, stride_yn, stride_yc, stride_yh, stride_yw, Y_UNIT, CHANNELS_LAST)
            dy = tl.load(dy_ptr + dy_offs, mask=covers, other=0.0).to(ACC)
            if SCALE is None:
                divisor = counted(oh, H, KH, SH, PH, INCLUDE_PAD) * counted(ow, W, KW, SW, PW, INCLUDE_PAD)
                dy = dy * (1.0 / divisor.to(ACC))
            acc += dy

    FACTOR: tl.constexpr = 1 if SCALE is None else SCALE
    tl.store(dx_ptr + dx_offs, round_to(acc * FACTOR, dx_ptr.dtype.element_ty), mask=mask)


@planned(avg_pool2d_grad_kernel)
def _grad(dy, dx, *window):
    channels_last = shapes.is_channels_last(dx)
    grid, numbers, constants = over(dx.shape, channels_last, 16 // dx.element_size())
    (y_strides, y_unit), (x_strides, x_unit) = laid_out(dy, channels_last), laid_out(dx, channels_last)
    constants |= dict(Y_UNIT=y_unit, X_UNIT=x_unit, **_constants(dy, dx, *window))
    return grid, (*numbers, *dx.shape[2:], *dy.shape[2:], *y_strides, *x_strides), constants


def in_blocks(kernel, stride):
    """Whether a program's blocks are of stride x stride pixels: for small windows."""
    return kernel[0] * kernel[1] <= UNROLLED and stride[0] * stride[1] <= 4


def gradient(dy, size, kernel, stride, padding, include_pad, override, channels_last):
    """dy (N, C, OH, OW) -> dx (N, C, H, W), where `size` is (H, W)."""
    dx = shapes.avg_pool2d_grad(dy, size, channels_last)
    if dx.numel() > 0:
        launch = _grad_blocks if in_blocks(kernel, stride) else _grad
        launch((dy, dx), kernel, stride, padding, include_pad, override)
    return dx
