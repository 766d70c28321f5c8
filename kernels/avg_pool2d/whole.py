"""The mean of a whole image, of each channel, and its gradient."""

import math

import triton
import triton.language as tl

from .. import shapes
from .._common import OPTIONS, acc_type, cdiv, divide, index_type, power_of_2, reciprocal, round_to
from ..launching import planned
from ..strips import laid_out, offset, over, places, strip_length

# The pixels of a program's channels that are loaded at once, and the programs that are enough for any card.
LOADED, PROGRAMS = 4096, 512


@triton.jit
def whole_avg_pool2d_kernel(
    x_ptr, y_ptr,
    C, blocks, W, P, inverse_blocks, inverse_w, divisor,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_yn, stride_yc,
    C_UNIT: tl.constexpr, P_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, IN_ROWS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(INDEX)
    n = divide(pid, blocks, inverse_blocks)
    offs_c = (pid - n * blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask_c = offs_c < C * C_UNIT
    if CHANNELS_LAST:
        x_ptrs = x_ptr + n * stride_xn * X_UNIT + offs_c * stride_xc
    else:
        x_ptrs = x_ptr + (n * stride_xn + offs_c * stride_xc) * X_UNIT

    acc = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for p0 in range(0, P * P_UNIT, BLOCK_P):
        offs_p = p0 + tl.arange(0, BLOCK_P)[:, None].to(INDEX)
        if IN_ROWS:
            h = divide(offs_p, W, inverse_w)
            w = offs_p - h * W
        else:
            h, w = offs_p * 0, offs_p
        if CHANNELS_LAST:
            p_offs = (h * stride_xh + w * stride_xw) * X_UNIT
        else:
            p_offs = h * stride_xh * X_UNIT + w * stride_xw
        acc += tl.load(x_ptrs + p_offs, mask=mask_c & (offs_p < P * P_UNIT), other=0.0).to(ACC)

    mean = tl.sum(acc, axis=0, keep_dims=True) / tl.full((1, 1), divisor, ACC)
    y_offs = n * stride_yn + offs_c * stride_yc
    tl.store(y_ptr + y_offs, round_to(mean, y_ptr.dtype.element_ty), mask=mask_c)


@planned(whole_avg_pool2d_kernel)
def _forward(x, y, divisor):
    channels_last, vector = shapes.is_channels_last(x), 16 // x.element_size()
    (N, C, H, W), (x_strides, x_unit) = x.shape, laid_out(x, channels_last)
    in_rows = min(H, W) > 1 and x.stride(2) != W * x.stride(3)
    if not in_rows and W == 1:
        # The kernel counts pixels as columns.
        x_strides[3] = x_strides[2]
    c_unit, p_unit = math.gcd(vector, C), math.gcd(vector, H * W)
    block_c = strip_length(C, 8 * vector if channels_last else LOADED // min(power_of_2(H * W), LOADED // 4))
    while block_c > (vector if channels_last else 1) and N * cdiv(C, block_c) < PROGRAMS:
        block_c //= 2
    blocks = cdiv(C, block_c)
    constants = dict(
        C_UNIT=c_unit, P_UNIT=p_unit, X_UNIT=x_unit, CHANNELS_LAST=channels_last, IN_ROWS=in_rows,
        INDEX=index_type(x, y), ACC=acc_type(x.dtype), BLOCK_P=min(power_of_2(H * W), LOADED // block_c),
        BLOCK_C=block_c, num_warps=4, **OPTIONS,
    )  # fmt: skip
    numbers = C // c_unit, blocks, W, H * W // p_unit, reciprocal(blocks), reciprocal(W), divisor
    return (N * blocks,), (*numbers, *x_strides, *y.stride()[:2]), constants


@triton.jit
def whole_avg_pool2d_grad_kernel(
    dy_ptr, dx_ptr,
    rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer,
    C, P, inverse_c, inverse_p, divisor,
    stride_yn, stride_yc,
    stride_xn, stride_xc, stride_xh, stride_xw,
    Y_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
    INNER_UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    mask, n, c, h, w = places(
        rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer,
        INNER_UNIT, CHANNELS_LAST, INDEX, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    dx_offs = offset(n, c, h, w, stride_xn, stride_xc, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST)
    if not CHANNELS_LAST:
        # All pixels of all channels are one row, of which few images have a multiple of 16 bytes.
        plane = divide(w, P, inverse_p)
        n = divide(plane, C, inverse_c)
        c = plane - n * C
    dy_offs = n * stride_yn * Y_UNIT + c * stride_yc

    dy = tl.load(dy_ptr + dy_offs, mask=mask, other=0.0).to(ACC)
    dx = dy * (1.0 / tl.full((1, 1), divisor, ACC))
    tl.store(dx_ptr + dx_offs, round_to(dx, dx_ptr.dtype.element_ty), mask=mask)


@planned(whole_avg_pool2d_grad_kernel)
def _grad(dy, dx, divisor):
    channels_last, (N, C, H, W) = shapes.is_channels_last(dx), dx.shape
    image = dx.view(N, C, 1, H * W) if channels_last else dx.view(1, 1, 1, -1)
    grid, numbers, constants = over(image.shape, channels_last, 16 // dx.element_size())
    (y_strides, y_unit), (x_strides, x_unit) = laid_out(dy, True), laid_out(image, channels_last)
    constants |= dict(Y_UNIT=y_unit, X_UNIT=x_unit, INDEX=index_type(dy, dx), ACC=acc_type(dy.dtype))
    numbers = *numbers, C, H * W, reciprocal(C), reciprocal(H * W), divisor
    return grid, (*numbers, *y_strides[:2], *x_strides), constants


def serves(size, kernel, padding):
    """Whether the one window of an image of `size` (H, W) is the image."""
    return tuple(size) == tuple(kernel) and not any(padding)


def forward(x, divisor=None):
    """x (N, C, H, W) -> y (N, C, 1, 1)."""
    y = shapes.adaptive_avg_pool2d(x, (1, 1))
    if y.numel() > 0:
        _forward((x, y), divisor or x.shape[2] * x.shape[3])
    return y


def gradient(dy, size, divisor, channels_last):
    """dy (N, C, 1, 1) -> dx (N, C, H, W), where `size` is (H, W)."""
    dx = shapes.avg_pool2d_grad(dy, size, channels_last)
    if dx.numel() > 0:
        _grad((dy, dx), divisor or size[0] * size[1])
    return dx
