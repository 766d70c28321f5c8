"""The input gradient of the fused kernel for few channels, a matrix product for each block; see one_hot.py."""

from typing import NamedTuple

import triton
import triton.language as tl

from .. import shapes
from .._common import (
    OPTIONS,
    cdiv,
    index_type,
    input_precision,
    named_strides,
    next_block,
    operand_type,
    power_of_2,
    round_to,
)
from ..conv2d.patches import precision
from ..launching import planned, remembered
from ..tiles import flat_block
from .chooser import MOST_BLOCK
from .one_hot import one_hot, pixel


@triton.jit
def filters_for_blocks_kernel(
    w_ptr, f_ptr,
    numel,
    stride_wo: tl.constexpr, stride_wc: tl.constexpr, stride_wh: tl.constexpr, stride_ww: tl.constexpr,
    C: tl.constexpr, OC: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, UH: tl.constexpr, UW: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, LOW_H: tl.constexpr, LOW_W: tl.constexpr, REACH_W: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_OC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # f[pooled pixel that reaches the block, block of filters, pixel and channel of the block, filter and position]
    offs = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    blocks_oc: tl.constexpr = (OC + BLOCK_OC - 1) // BLOCK_OC
    position = offs % POSITIONS
    rest = offs // POSITIONS // BLOCK_OC // BLOCK_N
    oc = rest % blocks_oc * BLOCK_OC + offs // POSITIONS % BLOCK_OC
    c, h, w = pixel(offs // POSITIONS // BLOCK_OC % BLOCK_N, C, BH, BW, CHANNELS_LAST)

    oh = (rest // blocks_oc // REACH_W + LOW_H) * TH - UH + position // WW
    ow = (rest // blocks_oc % REACH_W + LOW_W) * TW - UW + position % WW
    kh, kw = h + PH - oh * SH, w + PW - ow * SW  # times the dilation
    mask = (offs < numel) & (c < C) & (h < BH) & (position < WH * WW) & (oc < OC)
    mask &= (kh >= 0) & (kh < KH * DH) & (kh % DH == 0) & (kw >= 0) & (kw < KW * DW) & (kw % DW == 0)
    w_offs = oc * stride_wo + c * stride_wc + kh // DH * stride_wh + kw // DW * stride_ww
    tl.store(f_ptr + offs, tl.load(w_ptr + w_offs, mask=mask, other=0.0), mask=offs < numel)


@triton.jit(do_not_specialize=["N"])
def conv2d_relu_max_pool2d_input_grad_kernel(
    dy_ptr, code_ptr, f_ptr, dx_ptr,
    N,
    H: tl.constexpr, W: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr,
    stride_yn: tl.constexpr, stride_yc: tl.constexpr, stride_yh: tl.constexpr, stride_yw: tl.constexpr,
    stride_cn: tl.constexpr, stride_cc: tl.constexpr, stride_ch: tl.constexpr, stride_cw: tl.constexpr,
    stride_xn: tl.constexpr, stride_xc: tl.constexpr, stride_xh: tl.constexpr, stride_xw: tl.constexpr,
    C: tl.constexpr, OC: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    LOW_H: tl.constexpr, LOW_W: tl.constexpr, REACH_H: tl.constexpr, REACH_W: tl.constexpr,
    COUNT: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OC: tl.constexpr,
):  # fmt: skip
    # A GEMM for each block of BH x BW pixels: M = N images, N = C * BH * BW, K = OC * COUNT * pooled pixels around it.
    # Blocks are STEP pooled pixels apart, so that the same arrangement of the filters serves all of them.
    pid = tl.program_id(0).to(INDEX)
    blocks_h: tl.constexpr = (H + BH - 1) // BH
    blocks_w: tl.constexpr = (W + BW - 1) // BW
    blocks_oc: tl.constexpr = (OC + BLOCK_OC - 1) // BLOCK_OC
    bw = pid % blocks_w
    bh = pid // blocks_w % blocks_h
    n0 = pid // blocks_w // blocks_h * BLOCK_M
    # The pooled pixels that reach the block and exist: dh, dw count from the first of them.
    qh0, qw0 = bh * STEP_H + LOW_H, bw * STEP_W + LOW_W
    first_h, first_w = tl.maximum(-qh0, 0), tl.maximum(-qw0, 0)
    rows = tl.maximum(tl.minimum(QH - qh0, REACH_H) - first_h, 0)
    columns = tl.maximum(tl.minimum(QW - qw0, REACH_W) - first_w, 0)

    n = tl.arange(0, BLOCK_M).to(INDEX)
    oc = tl.arange(0, BLOCK_OC).to(INDEX)
    j = tl.arange(0, BLOCK_N).to(INDEX)
    mask_n = n < N - n0
    y_offs = (n * stride_yn)[:, None] + (oc * stride_yc)[None, :]
    code_offs = (n * stride_cn)[:, None] + (oc * stride_cc)[None, :]
    f_offs = tl.arange(0, BLOCK_OC * POSITIONS)[:, None] + (j * (BLOCK_OC * POSITIONS))[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    start = tl.cast(0, INDEX)
    oc0, dh, dw = start, start, start
    for _ in range(0, rows * columns * blocks_oc):
        qh, qw = qh0 + first_h + dh, qw0 + first_w + dw
        y_base = dy_ptr + (n0 * stride_yn + oc0 * stride_yc + qh * stride_yh + qw * stride_yw)
        code_base = code_ptr + (n0 * stride_cn + oc0 * stride_cc + qh * stride_ch + qw * stride_cw)
        f_block = ((first_h + dh) * REACH_W + first_w + dw) * blocks_oc + oc0 // BLOCK_OC
        mask = mask_n[:, None] & (oc < OC - oc0)[None, :]
        dy = tl.load(y_base + y_offs, mask=mask, other=0.0).to(OPERAND)
        code = tl.load(code_base + code_offs, mask=mask, other=COUNT)
        f = tl.load(f_ptr + f_block * (BLOCK_OC * POSITIONS * BLOCK_N) + f_offs).to(OPERAND)
        dz = one_hot(dy, code, COUNT, POSITIONS)
        acc = tl.dot(dz, f, acc, input_precision=PRECISION, out_dtype=tl.float32)
        oc0, dh, dw = next_block(oc0, dh, dw, OC, columns, BLOCK_OC)

    c, h, w = pixel(j, C, BH, BW, CHANNELS_LAST)
    mask_j = (c < C) & (h < BH) & (h < H - bh * BH) & (w < W - bw * BW)
    x_base = dx_ptr + (n0 * stride_xn + bh * (BH * stride_xh) + bw * (BW * stride_xw))
    x_offs = (n * stride_xn)[:, None] + (c * stride_xc + h * stride_xh + w * stride_xw)[None, :]
    tl.store(x_base + x_offs, round_to(acc, dx_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_j[None, :])


def _reach(B, K, S, P, D, W, T, U):
    """(first, count) of the pooled pixels, along one dimension, that depend on the first B pixels."""
    first = -((U - W + 1 - (P - (K - 1) * D) // -S) // -T)
    return first, ((B - 1 + P) // S + U) // T - first + 1


class _Blocks(NamedTuple):
    """How the input gradient is divided into blocks of BH x BW pixels, and which pooled pixels reach a block."""

    BH: int
    BW: int
    LOW_H: int
    LOW_W: int
    REACH_H: int
    REACH_W: int
    COUNT: int
    BLOCK_N: int


@remembered
def _blocks(C, KH, KW, stride, padding, dilation, pool_kernel, pool_stride, pool_padding):
    (SH, SW), (PH, PW), (DH, DW) = stride, padding[::2], dilation
    (WH, WW), (TH, TW), (UH, UW) = pool_kernel, pool_stride, pool_padding
    BH, BW = TH * SH, TW * SW
    while 2 * C * BH * BW <= MOST_BLOCK:
        BH, BW = (BH, 2 * BW) if BW <= BH else (2 * BH, BW)
    (LOW_H, REACH_H), (LOW_W, REACH_W) = _reach(BH, KH, SH, PH, DH, WH, TH, UH), _reach(BW, KW, SW, PW, DW, WW, TW, UW)
    return _Blocks(BH, BW, LOW_H, LOW_W, REACH_H, REACH_W, WH * WW, max(16, power_of_2(C * BH * BW)))


BLOCK_OC = 16


def _constants(blocks, C, OC, channels_last):
    """The constants that both kernels of this file share."""
    return {
        "C": C, "OC": OC, "BH": blocks.BH, "BW": blocks.BW, "LOW_H": blocks.LOW_H, "LOW_W": blocks.LOW_W,
        "REACH_W": blocks.REACH_W, "POSITIONS": power_of_2(blocks.COUNT), "CHANNELS_LAST": channels_last,
        "BLOCK_OC": BLOCK_OC, "BLOCK_N": blocks.BLOCK_N,
    }  # fmt: skip


@planned(filters_for_blocks_kernel)
def _filters(w, f, blocks, channels_last, stride, padding, dilation, pool_kernel, pool_stride, pool_padding):
    (OC, C, KH, KW), block_f = w.shape, flat_block(f.numel(), 1024)
    (SH, SW), (PH, PW), (DH, DW) = stride, padding[::2], dilation
    (WH, WW), (TH, TW), (UH, UW) = pool_kernel, pool_stride, pool_padding
    return (cdiv(f.numel(), block_f),), (f.numel(), *w.stride()), dict(
        KH=KH, KW=KW, SH=SH, SW=SW, PH=PH, PW=PW, DH=DH, DW=DW, WH=WH, WW=WW, TH=TH, TW=TW, UH=UH, UW=UW,
        INDEX=index_type(w, f), BLOCK=block_f, num_warps=4, **_constants(blocks, C, OC, channels_last), **OPTIONS,
    )  # fmt: skip


@planned(conv2d_relu_max_pool2d_input_grad_kernel)
def _input_grad(dy, code, f, dx, blocks, channels_last, stride, pool_stride, precision):
    (N, C, H, W), (_, OC, QH, QW) = dx.shape, dy.shape
    # One stage: with more, the compiler makes every product wait for the one before.
    block_m = 64 if N <= 64 else 128
    return (cdiv(H, blocks.BH) * cdiv(W, blocks.BW) * cdiv(N, block_m),), (N,), dict(
        H=H, W=W, QH=QH, QW=QW,
        **named_strides("y", dy.stride()), **named_strides("c", code.stride()), **named_strides("x", dx.stride()),
        STEP_H=blocks.BH // (pool_stride[0] * stride[0]), STEP_W=blocks.BW // (pool_stride[1] * stride[1]),
        REACH_H=blocks.REACH_H, COUNT=blocks.COUNT,
        INDEX=index_type(dy, code, f, dx), OPERAND=operand_type(dy.dtype),
        PRECISION=input_precision(dy.dtype, precision),
        BLOCK_M=block_m, num_warps=4, num_stages=1, **_constants(blocks, C, OC, channels_last), **OPTIONS,
    )  # fmt: skip


def input_grad(dy, code, w, size, stride, padding, dilation, pool_kernel, pool_stride, pool_padding):
    """dy and code (N, OC, QH, QW), w (OC, C, KH, KW) -> dx of `size` (N, C, H, W)."""
    dx = shapes.conv2d_relu_max_pool2d_input_grad(dy, code, w, size)
    if dx.numel() == 0:
        return dx
    OC, C, KH, KW = w.shape
    geometry = stride, padding, dilation, pool_kernel, pool_stride, pool_padding
    blocks, channels_last = _blocks(C, KH, KW, *geometry), shapes.is_channels_last(dx)
    reach = blocks.REACH_H * blocks.REACH_W
    f = w.new_empty(reach, cdiv(OC, BLOCK_OC), blocks.BLOCK_N, BLOCK_OC, power_of_2(blocks.COUNT))
    _filters((w, f), blocks, channels_last, *geometry)
    _input_grad((dy, code, f, dx), blocks, channels_last, stride, pool_stride, precision())
    return dx
