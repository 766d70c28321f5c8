"""The gradients of conv2d_pool's kernel for few channels, straight from the pooled gradient and the code.

    dz[n, oc, oh, ow] = dy[n, oc, qh, qw] where the code names the pixel (oh, ow), else 0; it is never written to memory
    dw[oc, c, kh, kw] = sum over n, oh, ow of dz[n, oc, oh, ow] * x[n, c, ih, iw],    db[oc] = sum of dz
    dx[n, c, ih, iw]  = sum over oc, kh, kw, oh, ow that reach (ih, iw) of dz[n, oc, oh, ow] * w[oc, c, kh, kw]

    with ih, iw as in conv2d, and oh = qh * TH - UH + position / WW, ow = qw * TW - UW + position % WW

Both products take dz as a one-hot row for each pooled pixel, dy at the position of its window that the code names, made
in registers. A row of the products is an image and all its rows see the same pixels, so that addresses are one number a
row and one a column. Geometry and strides are part of the program: what is left of the addresses is worked out once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import shapes
from .._common import (
    OPTIONS,
    cdiv,
    compute_capability,
    flat_block,
    index_type,
    input_precision,
    number_format,
    operand_type,
    power_of_2,
    round_to,
    split_count,
)
from ..conv2d.forward import FLAT_BELOW, next_block, precision
from ..launching import planned, remembered
from ..reduce import Partials

# The most positions of a window, pixels times channels that one window sees, and pixels times channels of a block.
MOST_POSITIONS, MOST_PATCH, MOST_BLOCK = 4, 256, 64
# Rows are images: fewer than this many leave most rows empty, which costs little only if each is small.
MANY_IMAGES, FEW_WINDOWS = 32, 1024
# Images in a turn of the weight gradient, and filters of one of its programs by the pooled pixels of a row: read off
# machine code (no register spills on any target) and not yet timed.
IMAGES, FILTERS = 32, {1: 16, 4: 8}


def serves(dy, w_size, *geometry):
    """Whether these kernels are for the gradients of such a convolution; w_size is (OC, C, KH, KW).

    Not in full float32: for sm_100 triton 3.7.1 takes products in tf32, whatever precision they ask for, if an operand
    depends on what was loaded as bytes, and the code is.
    """
    return _serves(number_format(dy.dtype, precision()), dy.shape, tuple(w_size), *geometry)


@remembered
def _serves(format, size, w_size, stride, padding, dilation, groups, pad_mode, pool_kernel, pool_stride, pool_padding):
    (_, C, KH, KW), (N, _, QH, QW) = w_size, size
    block = C * pool_stride[0] * stride[0] * pool_stride[1] * stride[1]
    patch = C * _patch(1, KH, stride[0], dilation[0], pool_kernel[0], pool_stride[0])
    patch *= _patch(1, KW, stride[1], dilation[1], pool_kernel[1], pool_stride[1])
    return (
        groups == 1
        and pad_mode == "zeros"
        and format in ("half", "tf32")
        and C < FLAT_BELOW
        and pool_kernel[0] * pool_kernel[1] <= MOST_POSITIONS
        and patch <= MOST_PATCH
        and block <= MOST_BLOCK
        and (N >= MANY_IMAGES or QH * QW <= FEW_WINDOWS)
    )


def _patch(R, K, S, D, W, T):
    """How many pixels, along one dimension, R pooled pixels side by side are made from."""
    return ((R - 1) * T + W - 1) * S + (K - 1) * D + 1


def _strides(letter, t):
    return {f"stride_{letter}{dim}": t.stride(i) for i, dim in enumerate("nchw")}


@triton.jit
def one_hot(dy, code, COUNT: tl.constexpr, POSITIONS: tl.constexpr):
    """(M, N) -> (M, N * POSITIONS): each element of dy at that of COUNT positions that the code names, among zeros."""
    columns: tl.constexpr = dy.shape[1] * POSITIONS
    if POSITIONS > 1:
        dy, code = tl.join(dy, dy), tl.join(code, code)
    if POSITIONS > 2:
        dy, code = tl.join(dy, dy), tl.join(code, code)
    dy, code = tl.reshape(dy, (dy.shape[0], columns)), tl.reshape(code, (dy.shape[0], columns))
    position = tl.arange(0, columns) % POSITIONS
    if COUNT < POSITIONS:
        position = tl.where(position < COUNT, position, -1)
    return tl.where(code.to(tl.int32) == position[None, :], dy, 0.0)


@triton.jit
def pixel(j, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(c, h, w) of the elements j of H x W pixels, counted in memory order."""
    if CHANNELS_LAST:
        return j % C, j // C // W, j // C % W
    else:
        return j // W // H, j // W % H, j % W


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
    # f[pooled pixel in reach of a block, block of filters, pixel and channel of the block, filter and position]
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
    # A GEMM for each block of BH x BW pixels: M = N images, N = C * BH * BW, K = OC * COUNT * pooled pixels in reach.
    # The blocks lie STEP pooled pixels apart, so that to all of them the filters look the same.
    pid = tl.program_id(0).to(INDEX)
    blocks_h: tl.constexpr = (H + BH - 1) // BH
    blocks_w: tl.constexpr = (W + BW - 1) // BW
    blocks_oc: tl.constexpr = (OC + BLOCK_OC - 1) // BLOCK_OC
    bw = pid % blocks_w
    bh = pid // blocks_w % blocks_h
    n0 = pid // blocks_w // blocks_h * BLOCK_M
    # Of the pooled pixels in reach those that there are: dh, dw count from the first of them.
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
    """(first, count) of the pooled pixels, along one dimension, that B pixels from the first on had a part in."""
    first = -((U - W + 1 - (P - (K - 1) * D) // -S) // -T)
    return first, ((B - 1 + P) // S + U) // T - first + 1


class _Blocks(NamedTuple):
    """How the input's gradient is cut into blocks of BH x BW pixels, and which pooled pixels each is made of."""

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
    """What both kernels of the input's gradient are compiled for."""
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
    # One stage: with more the compiler has every product wait for the one before.
    block_m = 64 if N <= 64 else 128
    return (cdiv(H, blocks.BH) * cdiv(W, blocks.BW) * cdiv(N, block_m),), (N,), dict(
        H=H, W=W, QH=QH, QW=QW, **_strides("y", dy), **_strides("c", code), **_strides("x", dx),
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


@triton.jit(do_not_specialize=["N", "turns", "per_split"])
def conv2d_relu_max_pool2d_weight_grad_kernel(
    dy_ptr, code_ptr, x_ptr, dw_ptr, db_ptr,
    N, turns, per_split, stride_split,
    H: tl.constexpr, W: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr,
    stride_yn: tl.constexpr, stride_yc: tl.constexpr, stride_yh: tl.constexpr, stride_yw: tl.constexpr,
    stride_cn: tl.constexpr, stride_cc: tl.constexpr, stride_ch: tl.constexpr, stride_cw: tl.constexpr,
    stride_xn: tl.constexpr, stride_xc: tl.constexpr, stride_xh: tl.constexpr, stride_xw: tl.constexpr,
    stride_wo: tl.constexpr, stride_wc: tl.constexpr, stride_wh: tl.constexpr, stride_ww: tl.constexpr,
    C: tl.constexpr, OC: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, UH: tl.constexpr, UW: tl.constexpr,
    RH: tl.constexpr, RW: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, POSITIONS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, EDGES: tl.constexpr, HAS_BIAS: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    # GEMM: M = OC * RH * RW * WH * WW, a row of z's pixels under RH x RW pooled ones for each filter; N = C * PATCH_H *
    # PATCH_W, the pixels that they are made from; K = images times blocks of pooled pixels, of which a program takes
    # per_split turns of BLOCK_K images at one block. At the end each row holds dw at a shift of its own.
    R: tl.constexpr = RH * RW
    M: tl.constexpr = BLOCK_OC * R * POSITIONS
    BH: tl.constexpr = (QH + RH - 1) // RH
    BW: tl.constexpr = (QW + RW - 1) // RW
    tiles_oc: tl.constexpr = (OC + BLOCK_OC - 1) // BLOCK_OC
    pid = tl.program_id(0).to(INDEX)
    oc0 = pid % tiles_oc * BLOCK_OC
    split = pid // tiles_oc

    n = tl.arange(0, BLOCK_K).to(INDEX)
    i = tl.arange(0, BLOCK_OC * R).to(INDEX)
    oc, rh, rw = oc0 + i // R, i // RW % RH, i % RW
    mask_i = oc < OC
    y_offs = (n * stride_yn)[:, None] + (oc * stride_yc + rh * stride_yh + rw * stride_yw)[None, :]
    code_offs = (n * stride_cn)[:, None] + (oc * stride_cc + rh * stride_ch + rw * stride_cw)[None, :]
    j = tl.arange(0, BLOCK_N).to(INDEX)
    c, ph, pw = pixel(j, C, PATCH_H, PATCH_W, CHANNELS_LAST)
    mask_j = j < C * PATCH_H * PATCH_W
    if CHANNELS_LAST:
        # The pixels of a row lie side by side, which the compiler sees in this form only.
        x_cols = ph * stride_xh + j % (PATCH_W * C)
    else:
        x_cols = c * stride_xc + ph * stride_xh + pw * stride_xw
    x_offs = (n * stride_xn)[:, None] + x_cols[None, :]

    acc = tl.zeros((M, BLOCK_N), tl.float32)
    acc_b = tl.zeros((BLOCK_K, BLOCK_OC * R), tl.float32)
    first = split * per_split
    last = tl.minimum(first + per_split, turns)
    bw = first % BW
    bh = first // BW % BH
    tile = first // BW // BH
    for _ in range(first, last):
        n0, qh, qw = tile * BLOCK_K, bh * RH, bw * RW
        mask_n = n < N - n0

        mask = mask_i
        if QH % RH or QW % RW:
            mask &= (rh < QH - qh) & (rw < QW - qw)
        mask = mask_n[:, None] & mask[None, :]
        y_base = dy_ptr + (n0 * stride_yn + qh * stride_yh + qw * stride_yw)
        code_base = code_ptr + (n0 * stride_cn + qh * stride_ch + qw * stride_cw)
        dy = tl.load(y_base + y_offs, mask=mask, other=0.0).to(OPERAND)
        code = tl.load(code_base + code_offs, mask=mask, other=WH * WW)

        ih, iw = (qh * TH - UH) * SH - PH, (qw * TW - UW) * SW - PW
        mask = mask_j
        if EDGES:
            mask &= (ih + ph >= 0) & (ih + ph < H) & (iw + pw >= 0) & (iw + pw < W)
        x_base = x_ptr + (n0 * stride_xn + ih * stride_xh + iw * stride_xw)
        x = tl.load(x_base + x_offs, mask=mask_n[:, None] & mask[None, :], other=0.0).to(OPERAND)

        dz = one_hot(dy, code, WH * WW, POSITIONS)
        acc = tl.dot(tl.trans(dz), x, acc, input_precision=PRECISION, out_dtype=tl.float32)
        if HAS_BIAS:
            acc_b += tl.where(code < WH * WW, dy.to(tl.float32), 0.0)
        bw, tile, bh = next_block(bw, tile, bh, BW, BH, 1)

    # One row for each pooled pixel and position, oc and tap in it: the sum goes over rows, which one lane holds.
    i = tl.arange(0, M * BLOCK_T)
    row, oc, t = i // BLOCK_T // BLOCK_OC, i // BLOCK_T % BLOCK_OC, i % BLOCK_T
    position, r = row % POSITIONS, row // POSITIONS
    c, kh, kw = t // (KH * KW), t // KW % KH, t % KW
    h, w = (r // RW * TH + position // WW) * SH, (r % RW * TW + position % WW) * SW
    if CHANNELS_LAST:
        shift, tap = (h * PATCH_W + w) * C, (kh * DH * PATCH_W + kw * DW) * C + c
    else:
        shift, tap = h * PATCH_W + w, (c * PATCH_H + kh * DH) * PATCH_W + kw * DW
    shift, tap = tl.where(position < WH * WW, shift, 0), tl.where(c < C, tap, 0)
    dw = tl.gather(tl.reshape(acc, (M * BLOCK_N,)), (oc * (R * POSITIONS) + row) * BLOCK_N + shift + tap, 0)
    dw = tl.sum(tl.reshape(dw, (R * POSITIONS, BLOCK_OC * BLOCK_T)), axis=0)

    i = tl.arange(0, BLOCK_OC * BLOCK_T).to(INDEX)
    oc, t = oc0 + i // BLOCK_T, i % BLOCK_T
    c, kh, kw = t // (KH * KW), t // KW % KH, t % KW
    w_offs = oc * stride_wo + c * stride_wc + kh * stride_wh + kw * stride_ww
    dw_ptr += split * stride_split
    tl.store(dw_ptr + w_offs, round_to(dw, dw_ptr.dtype.element_ty), mask=(oc < OC) & (c < C))
    if HAS_BIAS:
        db = tl.sum(tl.reshape(tl.sum(acc_b, axis=0), (BLOCK_OC, R)), axis=1)
        oc = oc0 + tl.arange(0, BLOCK_OC)
        tl.store(db_ptr + split * stride_split + oc, round_to(db, db_ptr.dtype.element_ty), mask=oc < OC)


@remembered
def _split(size, w_size, pool_kernel, pool_stride, stride, dilation):
    """(pooled pixels a row along each dimension, patch of a row, turns, turns of a program, programs for a tile)."""
    (N, OC, QH, QW), (_, C, KH, KW) = size, w_size
    (SH, SW), (DH, DW), (WH, WW), (TH, TW) = stride, dilation, pool_kernel, pool_stride

    def patch(R):
        return _patch(R, KH, SH, DH, WH, TH), _patch(R, KW, SW, DW, WW, TW)

    # Where a patch is small, one of four pooled pixels is hardly larger.
    R = 2 if C * patch(2)[0] * patch(2)[1] <= 64 and QH > 1 and QW > 1 else 1
    tiles, turns = cdiv(OC, FILTERS[R * R]), cdiv(N, IMAGES) * cdiv(QH, R) * cdiv(QW, R)
    # Six turns or more to a program: at its end it takes about as long as over three of them.
    per_split = max(1, cdiv(turns, split_count(tiles, 2 * turns, 3)))
    return R, patch(R), turns, per_split, max(1, cdiv(turns, per_split))


@planned(conv2d_relu_max_pool2d_weight_grad_kernel)
def _weight_grad(
    dy, code, x, dw_ptr, db_ptr, size, strides, stride_split,
    stride, padding, dilation, pool_kernel, pool_stride, pool_padding, with_bias, precision,
):  # fmt: skip
    (N, OC, QH, QW), (_, C, KH, KW), (H, W) = dy.shape, size, x.shape[2:]
    (SH, SW), (PH, PW), (DH, DW) = stride, padding[::2], dilation
    (WH, WW), (TH, TW), (UH, UW) = pool_kernel, pool_stride, pool_padding
    R, (PATCH_H, PATCH_W), turns, per_split, splits = _split(dy.shape, size, pool_kernel, pool_stride, stride, dilation)
    BH, BW, block_oc = cdiv(QH, R), cdiv(QW, R), FILTERS[R * R]
    first_h, first_w = -UH * SH - PH, -UW * SW - PW
    last_h, last_w = (BH - 1) * R * TH * SH + first_h + PATCH_H, (BW - 1) * R * TW * SW + first_w + PATCH_W
    # The gradients are multiplied out of registers. On sm_90 a pipelined loop writes them for the next turn while a
    # product may still read them (https://github.com/triton-lang/triton/issues/9433; bench/machine_code/ttgir.py looks
    # for it).
    num_stages = 1 if compute_capability() == 9 else 2
    return (cdiv(OC, block_oc) * splits,), (N, turns, per_split, stride_split), dict(
        H=H, W=W, QH=QH, QW=QW, **_strides("y", dy), **_strides("c", code), **_strides("x", x),
        **dict(zip(("stride_wo", "stride_wc", "stride_wh", "stride_ww"), strides)),
        C=C, OC=OC, KH=KH, KW=KW, SH=SH, SW=SW, PH=PH, PW=PW, DH=DH, DW=DW,
        WH=WH, WW=WW, TH=TH, TW=TW, UH=UH, UW=UW,
        RH=R, RW=R, PATCH_H=PATCH_H, PATCH_W=PATCH_W, POSITIONS=power_of_2(WH * WW),
        CHANNELS_LAST=C > 1 and x.stride(1) == 1 and x.stride(3) == C,
        EDGES=first_h < 0 or first_w < 0 or last_h > H or last_w > W, HAS_BIAS=with_bias,
        INDEX=index_type(dy, code, x, dw_ptr), OPERAND=operand_type(dy.dtype),
        PRECISION=input_precision(dy.dtype, precision),
        BLOCK_OC=block_oc, BLOCK_N=max(16, power_of_2(C * PATCH_H * PATCH_W)), BLOCK_K=IMAGES,
        BLOCK_T=max(16, power_of_2(C * KH * KW)), num_warps=4,
        num_stages=num_stages, **OPTIONS,
    )  # fmt: skip


def weight_grad(dy, code, x, size, stride, padding, dilation, pool_kernel, pool_stride, pool_padding, with_bias):
    """dy and code (N, OC, QH, QW), x (N, C, H, W) -> dw of `size` (OC, C, KH, KW), and db (OC), empty unless wanted."""
    dw, db = shapes.conv2d_relu_max_pool2d_weight_grad(dy, code, x, size, with_bias)
    if dw.numel() == 0:
        return dw, db
    size = tuple(size)
    splits = _split(dy.shape, size, pool_kernel, pool_stride, stride, dilation)[-1]
    partials = Partials(splits, dw, db, torch.float32)
    dw_ptr, db_ptr, stride_split = partials.pointers
    geometry = stride, padding, dilation, pool_kernel, pool_stride, pool_padding
    tensors = dy, code, x, dw_ptr, db_ptr
    _weight_grad(tensors, size, dw.stride(), stride_split, *geometry, with_bias, precision())
    return partials.add_up()
