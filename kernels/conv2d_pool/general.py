"""Convolution, relu and max-pooling in one kernel for any geometry; the result of the convolution stays in registers.

    z[n, oc, oh, ow]   = bias[oc] + sum over c, kh, kw of x[n, c, ih, iw] * w[oc, c, kh, kw]
    y[n, oc, qh, qw]   = max(0, max over the window of z)
    code[n, oc, qh, qw] = the position of that maximum in the window, or WH * WW where it is <= 0
    dz = dy at the pixel that the code points to, else 0; dx, dw and db are those of the convolution for dz

with ih, iw as in conv2d/forward.py, and oh = qh * TH - UH + position / WW, ow = qw * TW - UW + position % WW

The part of a window outside z is ignored. With ceil_mode a last, partial window may reach past the end of z, which only
changes QH and QW, the size of the result.

C and OC count the channels of one group. z is rounded to its number format before it is compared, so that result and
code have the same bits as the three operators one after the other; the rules for NaN and ties are max_pool2d's.
"""

import triton
import triton.language as tl

from .. import shapes
from .._common import cdiv, index_type, product_types, round_to, strides
from ..conv2d.padding import PAD_MODES
from ..conv2d.patches import FLAT_BELOW, SHORT_K, add_patches, channels_inner, fitted, precision, tile_of
from ..launching import planned
from ..tiles import gemm_tile


@triton.jit(do_not_specialize=["M"])
def conv2d_relu_max_pool2d_forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, code_ptr,
    M, H, W, OH, OW, QH, QW,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wo, stride_wc, stride_wh, stride_ww,
    stride_b,
    stride_yn, stride_yc, stride_yh, stride_yw,
    C: tl.constexpr, OC: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, UH: tl.constexpr, UW: tl.constexpr,
    PAD_MODE: tl.constexpr, HAS_BIAS: tl.constexpr, FLAT: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # For each position of the window a GEMM: M = N * QH * QW windows, N = OC, K = C * KH * KW
    offs_m, offs_n, group = tile_of(tl.program_id(0).to(INDEX), M, OC, BLOCK_M, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < OC
    qw = offs_m % QW
    qh = offs_m // QW % QH
    n = offs_m // QW // QH
    oh0, ow0 = qh * TH - UH, qw * TW - UW

    x_ptr += group * C * stride_xc
    w_ptr += group * OC * stride_wo
    x_rows = n * stride_xn
    w_cols = offs_n * stride_wo

    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), ACC)
    code = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for position in range(0, WH * WW):
        oh, ow = oh0 + position // WW, ow0 + position % WW
        inside = mask_m & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        acc = add_patches(
            acc, x_ptr, w_ptr, x_rows, w_cols, oh * SH - PH, ow * SW - PW, inside, mask_n, H, W,
            stride_xc, stride_xh, stride_xw, stride_wc, stride_wh, stride_ww,
            C, KH, KW, DH, DW, PAD_MODE, FLAT, INDEX, OPERAND, ACC, PRECISION, BLOCK_K,
        )  # fmt: skip
        if HAS_BIAS:
            acc += tl.load(b_ptr + (group * OC + offs_n) * stride_b, mask=mask_n, other=0.0).to(ACC)[None, :]
        acc = round_to(acc, y_ptr.dtype.element_ty).to(ACC)
        better = inside[:, None] & ((acc > best) | (acc != acc))
        best = tl.where(better, acc, best)
        code = tl.where(better, position, code)

    dead = best <= 0
    y_rows = n * stride_yn + qh * stride_yh + qw * stride_yw
    y_offs = y_rows[:, None] + (group * OC + offs_n)[None, :] * stride_yc
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(y_ptr + y_offs, tl.where(dead, 0.0, best).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(code_ptr + y_offs, tl.where(dead, WH * WW, code).to(code_ptr.dtype.element_ty), mask=mask)


@planned(conv2d_relu_max_pool2d_forward_kernel)
def _forward(
    x, w, bias, y, code,
    stride, padding, dilation, groups, pad_mode, pool_kernel, pool_stride, pool_padding, precision,
):  # fmt: skip
    (N, _, H, W), (OC, C, KH, KW), (QH, QW) = x.shape, w.shape, y.shape[2:]
    OH, OW = shapes.conv2d_size((H, W), (KH, KW), stride, padding, dilation)
    M, OC, flat = N * QH * QW, OC // groups, C < FLAT_BELOW
    index = index_type(x, w, bias, y)
    K = C * KH * KW if flat else C
    tile = fitted(gemm_tile("pooled", M, OC, K, x.dtype, precision, repeats=groups), index, C <= SHORT_K)
    steps = *strides(x), *strides(w), 0 if bias is None else bias.stride(0), *strides(y)
    return (cdiv(M, tile.M) * cdiv(OC, tile.N) * groups,), (M, H, W, OH, OW, QH, QW, *steps), dict(
        C=C, OC=OC, KH=KH, KW=KW,
        SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[2], DH=dilation[0], DW=dilation[1],
        WH=pool_kernel[0], WW=pool_kernel[1], TH=pool_stride[0], TW=pool_stride[1],
        UH=pool_padding[0], UW=pool_padding[1],
        PAD_MODE=PAD_MODES[pad_mode], HAS_BIAS=bias is not None, FLAT=flat,
        INDEX=index, **product_types(x.dtype, precision),
        **tile.blocks, **tile.options,
    )  # fmt: skip


def forward(x, w, bias, *geometry_ceil_mode):
    """x (N, C, H, W), w (OC, C / groups, KH, KW), bias (OC) or None -> y and code (N, OC, QH, QW)."""
    *geometry, ceil_mode = geometry_ceil_mode
    y, code = shapes.conv2d_relu_max_pool2d(x, w, *geometry[:3], *geometry[5:], ceil_mode)
    if y.numel() == 0:
        return y, code
    if w.shape[1] >= FLAT_BELOW:
        x, w = channels_inner(x), channels_inner(w)
    _forward((x, w, bias, y, code), *geometry, precision())
    return y, code
