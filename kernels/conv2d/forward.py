"""Convolution as an implicit matrix product: patches are gathered into tiles as the product needs them, never copied.

    y[n, oc, oh, ow]  = bias[oc] + sum over c, kh, kw of x[n, c, ih, iw] * w[oc, c, kh, kw]
    dx[n, c, ih, iw]  = sum over oc, kh, kw, oh, ow that reach (ih, iw) of dy[n, oc, oh, ow] * w[oc, c, kh, kw]
    dw[oc, c, kh, kw] = sum over n, oh, ow of dy[n, oc, oh, ow] * x[n, c, ih, iw],    db[oc] = sum of dy
    and behind a rectifier both without the dy whose y <= 0

    with ih = oh * SH - PH + kh * DH and iw = ow * SW - PW + kw * DW

C and OC count the channels of one group. Tensors may have any strides. K, the summed index of the product, is walked
in one of two ways: FLAT, where few channels make one flat index of channels and taps, each lane working out its own;
otherwise tap by tap, a block of channels at a time, so that address and mask are worked out once a pixel. That walk
wants the channels side by side in memory, and tensors that have them otherwise are copied first: gathered one element
at a time they would keep the matrix unit waiting for several times as long as the copy takes.

Source: the implicit GEMM of cuDNN (Chetlur et al. 2014, https://arxiv.org/abs/1410.0759); the split of the input
gradient by output phase is the usual one of transposed convolutions (Shi et al. 2016, https://arxiv.org/abs/1609.07009).
"""

import math

import torch
import triton
import triton.language as tl

from .. import shapes
from .._common import (
    SQUARE,
    TALL,
    Window,
    cached_for_architecture,
    cdiv,
    first_tap,
    gemm_tile,
    gradient_tiles,
    in_units,
    index_type,
    product_types,
    round_to,
    split_product,
    strides,
    wants_k_inner,
)
from ..launching import planned
from ..reduce import Partials
from .padding import PAD_MODES, source

# Below this many channels a tap alone does not fill the shortest K that tl.dot takes.
FLAT_BELOW = 16
# As many columns of a weight's gradient as C * KH * KW are one tile, of the narrowest that SQUARE has.
ONE_TILE = 32
# A short walk, of few channels, does not fill longer blocks of K.
SHORT_K = 32
# Where lanes keep addresses of their own, wider tiles spill registers.
NARROW_N = 64


def tile_for(table, M, N, K, dtype, precision, index, short, narrow, halve=True):
    tile = gemm_tile(table, M, min(N, NARROW_N) if narrow else N, K, dtype, precision, halve)
    if short:
        tile = tile._replace(K=min(tile.K, SHORT_K))
    # Addresses of 64 bits take twice the registers.
    return tile._replace(num_warps=8) if index == tl.int64 else tile


def channels_inner(t):
    """t with its channels side by side in memory, copied only if they are not."""
    return t if t.stride(1) == 1 else t.contiguous(memory_format=torch.channels_last)


def precision():
    """What float32 products are taken in: torch's flag for convolutions, "tf32" unless the user changes it.

    Nothing rounds operands to tf32: the matrix units cut them off to 10 bits behind the point.
    """
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


@triton.jit
def next_block(c, kh, kw, C, KW, BLOCK: tl.constexpr):
    """One block of channels on, then one tap on: counters in the place of a division in the inner loop."""
    c += BLOCK
    wrap = c >= C
    c = tl.where(wrap, 0, c)
    kw += tl.where(wrap, 1, 0)
    wrap = kw >= KW
    kw = tl.where(wrap, 0, kw)
    kh += tl.where(wrap, 1, 0)
    return c, kh, kw


@triton.jit
def add_patches(
    acc, x_ptr, w_ptr, x_rows, w_cols, ih0, iw0, mask_m, mask_n, H, W,
    stride_xc, stride_xh, stride_xw, stride_wc, stride_wh, stride_ww,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAD_MODE: tl.constexpr, FLAT: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc and the products of the patches whose first pixels are (ih0, iw0), one a row, with the filters."""
    offs_k = tl.arange(0, BLOCK_K).to(INDEX)
    if FLAT:
        for k0 in range(0, C * KH * KW, BLOCK_K):
            k = k0 + offs_k
            c, kh, kw = k // (KH * KW), k // KW % KH, k % KW
            mask_k = k < C * KH * KW
            ih, in_h = source(ih0[:, None] + kh[None, :] * DH, H, PAD_MODE)
            iw, in_w = source(iw0[:, None] + kw[None, :] * DW, W, PAD_MODE)
            x_offs = x_rows[:, None] + c[None, :] * stride_xc + ih * stride_xh + iw * stride_xw
            w_offs = w_cols[None, :] + (c * stride_wc + kh * stride_wh + kw * stride_ww)[:, None]
            x = tl.load(x_ptr + x_offs, mask=mask_m[:, None] & mask_k[None, :] & in_h & in_w, other=0.0)
            w = tl.load(w_ptr + w_offs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(x.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        start = tl.cast(0, INDEX)
        c0, kh, kw = start, start, start
        for _ in range(0, KH * KW * ((C + BLOCK_K - 1) // BLOCK_K)):
            c = c0 + offs_k
            mask_k = c < C
            ih, in_h = source(ih0 + kh * DH, H, PAD_MODE)
            iw, in_w = source(iw0 + kw * DW, W, PAD_MODE)
            x_offs = (x_rows + ih * stride_xh + iw * stride_xw)[:, None] + c[None, :] * stride_xc
            w_offs = w_cols[None, :] + (c * stride_wc + kh * stride_wh + kw * stride_ww)[:, None]
            x = tl.load(x_ptr + x_offs, mask=(mask_m & in_h & in_w)[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_ptr + w_offs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(x.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
            c0, kh, kw = next_block(c0, kh, kw, C, KW, BLOCK_K)
    return acc


@triton.jit(do_not_specialize=["M"])
def conv2d_forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    M, H, W, OH, OW,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wo, stride_wc, stride_wh, stride_ww,
    stride_b,
    stride_yn, stride_yc, stride_yh, stride_yw,
    C: tl.constexpr, OC: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAD_MODE: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, FLAT: tl.constexpr, UNITS: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    stride_xn, stride_xc = stride_xn * UNITS[0], stride_xc * UNITS[1]
    stride_xh, stride_xw = stride_xh * UNITS[2], stride_xw * UNITS[3]
    stride_wo, stride_wc = stride_wo * UNITS[4], stride_wc * UNITS[5]
    stride_wh, stride_ww = stride_wh * UNITS[6], stride_ww * UNITS[7]
    stride_yn, stride_yc = stride_yn * UNITS[8], stride_yc * UNITS[9]
    stride_yh, stride_yw = stride_yh * UNITS[10], stride_yw * UNITS[11]

    # GEMM: M = N * OH * OW, N = OC, K = C * KH * KW
    pid = tl.program_id(0).to(INDEX)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(OC, BLOCK_N)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n % tiles_m
    group = pid // tiles_n // tiles_m

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < OC
    ow = offs_m % OW
    oh = offs_m // OW % OH
    n = offs_m // OW // OH
    ih0, iw0 = oh * SH - PH, ow * SW - PW

    x_ptr += group * C * stride_xc
    w_ptr += group * OC * stride_wo
    x_rows = n * stride_xn
    w_cols = offs_n * stride_wo

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc = add_patches(
        acc, x_ptr, w_ptr, x_rows, w_cols, ih0, iw0, mask_m, mask_n, H, W,
        stride_xc, stride_xh, stride_xw, stride_wc, stride_wh, stride_ww,
        C, KH, KW, DH, DW, PAD_MODE, FLAT, INDEX, OPERAND, ACC, PRECISION, BLOCK_K,
    )  # fmt: skip

    if HAS_BIAS:
        acc += tl.load(b_ptr + (group * OC + offs_n) * stride_b, mask=mask_n, other=0.0).to(ACC)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    y_rows = n * stride_yn + oh * stride_yh + ow * stride_yw
    y_offs = y_rows[:, None] + (group * OC + offs_n)[None, :] * stride_yc
    tl.store(y_ptr + y_offs, round_to(acc, y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@planned(conv2d_forward_kernel)
def _forward(x, w, bias, y, stride, padding, dilation, groups, pad_mode, relu, precision):
    (N, _, H, W), (OC, C, KH, KW), (OH, OW) = x.shape, w.shape, y.shape[2:]
    M, OC, flat = N * OH * OW, OC // groups, C < FLAT_BELOW
    index = index_type(x, w, bias, y)
    K, inner = C * KH * KW if flat else C, y.stride(1) == 1
    # Where results go to addresses of their own each, four warps on 64 rows spill registers.
    tile = tile_for(TALL, M, OC, K, x.dtype, precision, index, C <= SHORT_K, flat, halve=inner)
    steps, units = in_units(x.itemsize, *strides(x), *strides(w), *strides(y))
    numbers = M, H, W, OH, OW, *steps[:8], 0 if bias is None else bias.stride(0), *steps[8:]
    return (cdiv(M, tile.M) * cdiv(OC, tile.N) * groups,), numbers, dict(
        C=C, OC=OC, KH=KH, KW=KW,
        SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[2], DH=dilation[0], DW=dilation[1],
        PAD_MODE=PAD_MODES[pad_mode], HAS_BIAS=bias is not None, RELU=relu, FLAT=flat, UNITS=units,
        INDEX=index, **product_types(x.dtype, precision),
        **tile.blocks, **tile.options,
    )  # fmt: skip


def forward(x, w, bias, stride, padding, dilation, groups, pad_mode, relu=False):
    """x (N, C, H, W), w (OC, C / groups, KH, KW), bias (OC) or None -> y (N, OC, OH, OW), of one floating dtype.

    With `relu` what is negative becomes 0.
    """
    y = shapes.conv2d(x, w, stride, padding, dilation)
    if y.numel() == 0:
        return y
    if w.shape[1] >= FLAT_BELOW:
        x, w = channels_inner(x), channels_inner(w)
    _forward((x, w, bias, y), stride, padding, dilation, groups, pad_mode, relu, precision())
    return y


@triton.jit(do_not_specialize=["M"])
def conv2d_input_grad_kernel(
    dy_ptr, w_ptr, dx_ptr,
    M, H, W, OH, OW,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_wo, stride_wc, stride_wh, stride_ww,
    stride_xn, stride_xc, stride_xh, stride_xw,
    C: tl.constexpr, OC: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    DIVISOR_H: tl.constexpr, STEP_H: tl.constexpr, INVERSE_H: tl.constexpr,
    DIVISOR_W: tl.constexpr, STEP_W: tl.constexpr, INVERSE_W: tl.constexpr,
    FLAT: tl.constexpr, UNITS: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    stride_yn, stride_yc = stride_yn * UNITS[0], stride_yc * UNITS[1]
    stride_yh, stride_yw = stride_yh * UNITS[2], stride_yw * UNITS[3]
    stride_wo, stride_wc = stride_wo * UNITS[4], stride_wc * UNITS[5]
    stride_wh, stride_ww = stride_wh * UNITS[6], stride_ww * UNITS[7]
    stride_xn, stride_xc = stride_xn * UNITS[8], stride_xc * UNITS[9]
    stride_xh, stride_xw = stride_xh * UNITS[10], stride_xw * UNITS[11]

    # Pixels whose (ih + PH) % SH and (iw + PW) % SW agree, a phase, are reached by the same taps: every STEP-th from
    # the first. For one phase it is a convolution of stride 1, with no products by inserted zeros.
    # GEMM of a phase: M = N * QH * QW, N = C, K = OC * taps, where QH * QW pixels are the most that a phase has.
    pid = tl.program_id(0).to(INDEX)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_N)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n % tiles_m
    rest = pid // tiles_n // tiles_m
    phase_w = rest % SW
    phase_h = rest // SW % SH
    group = rest // SW // SH

    kh0 = first_tap(phase_h, DIVISOR_H, STEP_H, INVERSE_H, KH)
    kw0 = first_tap(phase_w, DIVISOR_W, STEP_W, INVERSE_W, KW)
    taps_h, taps_w = tl.cdiv(KH - kh0, STEP_H), tl.cdiv(KW - kw0, STEP_W)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(INDEX)
    QH, QW = tl.cdiv(H, SH), tl.cdiv(W, SW)
    ih = offs_m // QW % QH * SH + (phase_h + SH - PH % SH) % SH
    iw = offs_m % QW * SW + (phase_w + SW - PW % SW) % SW
    n = offs_m // QW // QH
    mask_m, mask_n = (offs_m < M) & (ih < H) & (iw < W), offs_n < C
    # The output position that the first tap comes from; each further tap lies DILATION / DIVISOR before it.
    oh0, ow0 = (ih + PH - kh0 * DH) // SH, (iw + PW - kw0 * DW) // SW

    dy_ptr += group * OC * stride_yc
    w_ptr += group * OC * stride_wo + kh0 * stride_wh + kw0 * stride_ww
    y_rows = n * stride_yn
    x_rows = n * stride_xn + ih * stride_xh + iw * stride_xw
    w_cols = offs_n * stride_wc

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if FLAT:
        for k0 in range(0, OC * taps_h * taps_w, BLOCK_K):
            k = k0 + offs_k
            oc, th, tw = k % OC, k // OC // taps_w, k // OC % taps_w
            mask_k = k < OC * taps_h * taps_w
            oh, in_h = source(oh0[:, None] - th[None, :] * (DH // DIVISOR_H), OH, 0)
            ow, in_w = source(ow0[:, None] - tw[None, :] * (DW // DIVISOR_W), OW, 0)
            y_offs = y_rows[:, None] + oc[None, :] * stride_yc + oh * stride_yh + ow * stride_yw
            w_offs = w_cols[None, :] + (oc * stride_wo + th * STEP_H * stride_wh + tw * STEP_W * stride_ww)[:, None]
            dy = tl.load(dy_ptr + y_offs, mask=mask_m[:, None] & mask_k[None, :] & in_h & in_w, other=0.0)
            w = tl.load(w_ptr + w_offs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(dy.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        start = tl.cast(0, INDEX)
        oc0, th, tw = start, start, start
        for _ in range(0, taps_h * taps_w * ((OC + BLOCK_K - 1) // BLOCK_K)):
            oc = oc0 + offs_k
            mask_k = oc < OC
            oh, in_h = source(oh0 - th * (DH // DIVISOR_H), OH, 0)
            ow, in_w = source(ow0 - tw * (DW // DIVISOR_W), OW, 0)
            y_offs = (y_rows + oh * stride_yh + ow * stride_yw)[:, None] + oc[None, :] * stride_yc
            w_offs = w_cols[None, :] + (oc * stride_wo + th * STEP_H * stride_wh + tw * STEP_W * stride_ww)[:, None]
            dy = tl.load(dy_ptr + y_offs, mask=(mask_m & in_h & in_w)[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_ptr + w_offs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(dy.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
            oc0, th, tw = next_block(oc0, th, tw, OC, taps_w, BLOCK_K)

    x_offs = x_rows[:, None] + (group * C + offs_n)[None, :] * stride_xc
    tl.store(dx_ptr + x_offs, round_to(acc, dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@planned(conv2d_input_grad_kernel)
def _input_grad(dy, w, dx, stride, padding, dilation, groups, precision):
    (N, _, H, W), (OC, C, KH, KW), (OH, OW) = dx.shape, w.shape, dy.shape[2:]
    (SH, SW), (DH, DW), OC = stride, dilation, OC // groups
    M, flat = N * cdiv(H, SH) * cdiv(W, SW), OC < FLAT_BELOW
    index = index_type(dy, w, dx)
    narrow = flat or dx.stride(1) != 1
    tile = tile_for(TALL, M, C, OC * KH * KW if flat else OC, dy.dtype, precision, index, OC <= SHORT_K, narrow)
    window_h, window_w = Window.of(SH, DH), Window.of(SW, DW)
    steps, units = in_units(dy.itemsize, *strides(dy), *strides(w), *strides(dx))
    numbers = M, H, W, OH, OW, *steps
    return (cdiv(M, tile.M) * cdiv(C, tile.N) * SH * SW * groups,), numbers, dict(
        C=C, OC=OC, KH=KH, KW=KW, SH=SH, SW=SW, PH=padding[0], PW=padding[2], DH=DH, DW=DW,
        DIVISOR_H=window_h.divisor, STEP_H=window_h.step, INVERSE_H=window_h.inverse,
        DIVISOR_W=window_w.divisor, STEP_W=window_w.step, INVERSE_W=window_w.inverse,
        FLAT=flat, UNITS=units,
        INDEX=index, **product_types(dy.dtype, precision),
        **tile.blocks, **tile.options,
    )  # fmt: skip


def input_grad(dy, w, size, stride, padding, dilation, groups):
    """dy (N, OC, OH, OW), w (OC, C / groups, KH, KW) -> dx of `size` (N, C, H, W), for padding with zeros."""
    dx = shapes.conv2d_input_grad(dy, w, size)
    if dx.numel() == 0:
        return dx
    if w.shape[0] // groups >= FLAT_BELOW:
        dy, w = channels_inner(dy), channels_inner(w)
        if wants_k_inner(w.dtype, precision()):
            w = w.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    _input_grad((dy, w, dx), stride, padding, dilation, groups, precision())
    return dx


@triton.jit(do_not_specialize=["K", "per_split"])
def conv2d_weight_grad_kernel(
    dy_ptr, y_ptr, x_ptr, dw_ptr, db_ptr,
    K, per_split, H, W, OH, OW,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wo, stride_wc, stride_wh, stride_ww,
    stride_split,
    C: tl.constexpr, OC: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAD_MODE: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr,
    FLAT: tl.constexpr, GROUPS: tl.constexpr, UNITS: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    stride_yn, stride_yc = stride_yn * UNITS[0], stride_yc * UNITS[1]
    stride_yh, stride_yw = stride_yh * UNITS[2], stride_yw * UNITS[3]
    stride_xn, stride_xc = stride_xn * UNITS[4], stride_xc * UNITS[5]
    stride_xh, stride_xw = stride_xh * UNITS[6], stride_xw * UNITS[7]

    # GEMM: M = OC, N = C * KH * KW, K = N * OH * OW, of which each program takes per_split pixels
    pid = tl.program_id(0).to(INDEX)
    blocks_c: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tiles_n: tl.constexpr = (C * KH * KW + BLOCK_N - 1) // BLOCK_N if FLAT else KH * KW * blocks_c
    tiles_m: tl.constexpr = (OC + BLOCK_M - 1) // BLOCK_M
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n % tiles_m
    group = pid // tiles_n // tiles_m % GROUPS
    split = pid // tiles_n // tiles_m // GROUPS

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K).to(INDEX)
    mask_m = offs_m < OC
    if FLAT:
        j = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        c, kh, kw = j // (KH * KW), (j // KW % KH)[None, :], (j % KW)[None, :]
    else:
        tap = pid_n // blocks_c
        c, kh, kw = pid_n % blocks_c * BLOCK_N + tl.arange(0, BLOCK_N), tap // KW, tap % KW
    mask_n = c < C

    dy_ptr += group * OC * stride_yc
    y_ptr += group * OC * stride_yc
    x_ptr += group * C * stride_xc
    y_rows = offs_m * stride_yc
    x_cols = c * stride_xc

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    first = split * per_split
    last = tl.minimum(first + per_split, K)
    if OPERAND.primitive_bitwidth == 16:
        # Without it triton 3.6.0 waits for each product before it goes on; see split_product.
        tl.assume(first < last)
    for k0 in range(first, last, BLOCK_K):
        k = k0 + offs_k
        mask_k = k < last
        ow = k % OW
        oh = k // OW % OH
        n = k // OW // OH
        ih, in_h = source((oh * SH - PH)[:, None] + kh * DH, H, PAD_MODE)
        iw, in_w = source((ow * SW - PW)[:, None] + kw * DW, W, PAD_MODE)
        y_offs = y_rows[:, None] + (n * stride_yn + oh * stride_yh + ow * stride_yw)[None, :]
        x_offs = (n * stride_xn)[:, None] + ih * stride_xh + iw * stride_xw + x_cols[None, :]
        dy = tl.load(dy_ptr + y_offs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if RELU:
            y = tl.load(y_ptr + y_offs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            dy = tl.where(y.to(ACC) <= 0, 0.0, dy)
        x = tl.load(x_ptr + x_offs, mask=mask_k[:, None] & in_h & in_w & mask_n[None, :], other=0.0)
        acc = tl.dot(dy.to(OPERAND), x.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)

    dw_ptr += split * stride_split + group * OC * stride_wo
    w_offs = (offs_m * stride_wo)[:, None] + c[None, :] * stride_wc + kh * stride_wh + kw * stride_ww
    tl.store(dw_ptr + w_offs, round_to(acc, dw_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])

    # A loop of its own, by one column of programs: inside the product's it would hold up the matrix unit.
    if HAS_BIAS:
        if pid_n == 0:
            acc_b = tl.zeros((BLOCK_M, BLOCK_K), ACC)
            for k0 in range(first, last, BLOCK_K):
                k = k0 + offs_k
                k_offs = k // OW // OH * stride_yn + k // OW % OH * stride_yh + k % OW * stride_yw
                y_offs = y_rows[:, None] + k_offs[None, :]
                mask = mask_m[:, None] & (k < last)[None, :]
                dy = tl.load(dy_ptr + y_offs, mask=mask, other=0.0).to(ACC)
                if RELU:
                    y = tl.load(y_ptr + y_offs, mask=mask, other=0.0)
                    dy = tl.where(y.to(ACC) <= 0, 0.0, dy)
                acc_b += dy
            db = round_to(tl.sum(acc_b, axis=1), db_ptr.dtype.element_ty)
            tl.store(db_ptr + split * stride_split + group * OC + offs_m, db, mask=mask_m)


@cached_for_architecture
def _split(K, size, groups, dtype, precision, index):
    """(Tile, tiles of dw, programs that share each of them, pixels for each of these)."""
    OC, C, KH, KW = size
    OC, flat = OC // groups, C < FLAT_BELOW
    # Two warps have registers for no addresses beside 64 x 64 sums, nor for those of a flat index.
    table, narrow = SQUARE if flat else gradient_tiles(), flat or wants_k_inner(dtype, precision)
    tile = tile_for(table, OC, C * KH * KW if flat else C, K, dtype, precision, index, flat, narrow)
    tiles_n = cdiv(C * KH * KW, tile.N) if flat else KH * KW * cdiv(C, tile.N)
    tiles = cdiv(OC, tile.M) * tiles_n * groups
    return tile, tiles, *split_product(tiles, K, tile.K, tile.M * tile.N)


def masks(size):
    """Whether weight_grad masks dy by y itself, for weights of `size`, where nothing else reads a masked dy.

    relu_grad reads dy and y and writes a copy, which is read again: 4 times the bytes of y. A program that has all
    columns, C * KH * KW, reads dy and y: 2 times. Where there are more, each tile of them reads both again and takes
    them through registers: by bench/machine_code/bounds.py such products of 128 x 128 take 1.2 to 1.4 times as long.
    And on sm_90 the registers of 64 masked rows or more are overwritten by the next turn while wgmma reads them
    (bench/machine_code/ttgir.py). One tile of columns has 32 rows, too few for wgmma.
    """
    return math.prod(size[1:]) <= ONE_TILE


@planned(conv2d_weight_grad_kernel)
def _weight_grad(
    dy, y, x, dw_ptr, db_ptr, size, w_strides, stride_split,
    stride, padding, dilation, groups, pad_mode, with_bias, precision,
):  # fmt: skip
    (N, OC, OH, OW), (_, C, KH, KW), (H, W) = dy.shape, size, x.shape[2:]
    K, index = N * OH * OW, index_type(dy, x, dw_ptr)
    tile, tiles, splits, per_split = _split(K, size, groups, dy.dtype, precision, index)
    steps, units = in_units(dy.itemsize, *strides(dy), *strides(x))
    numbers = K, per_split, H, W, OH, OW, *steps, *w_strides, stride_split
    return (tiles * splits,), numbers, dict(
        C=C, OC=OC // groups, KH=KH, KW=KW,
        SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[2], DH=dilation[0], DW=dilation[1],
        PAD_MODE=PAD_MODES[pad_mode], HAS_BIAS=with_bias, RELU=y is not None,
        FLAT=C < FLAT_BELOW, GROUPS=groups, UNITS=units,
        INDEX=index, **product_types(dy.dtype, precision),
        **tile.blocks, **tile.options,
    )  # fmt: skip


def weight_grad(dy, x, size, stride, padding, dilation, groups, pad_mode, with_bias, y=None):
    """dy (N, OC, OH, OW), x (N, C, H, W) -> dw of `size` (OC, C / groups, KH, KW), and db (OC), empty unless wanted.

    With y, what the rectifier behind the convolution gave, dy counts where y is above 0; of weights that `masks` names.
    """
    dw, db = shapes.conv2d_weight_grad(dy if y is None else y, x, size, with_bias)
    if dw.numel() == 0:
        return dw, db
    N, _, OH, OW = dy.shape
    if N * OH * OW == 0:
        return dw.zero_(), db.zero_()
    if size[1] >= FLAT_BELOW:
        dy, x = channels_inner(dy), channels_inner(x)
    if y is not None:
        layout = shapes.memory_format(y)
        dy, y = dy.contiguous(memory_format=layout), y.contiguous(memory_format=layout)
    size, products = tuple(size), precision()
    # As many programs, whether offsets into the buffer of their sums need 64 bits or not.
    splits = _split(N * OH * OW, size, groups, dy.dtype, products, tl.int32)[2]
    partials = Partials(splits, dw, db, torch.float64 if dy.dtype == torch.float64 else torch.float32)
    dw_ptr, db_ptr, stride_split = partials.pointers
    geometry = stride, padding, dilation, groups, pad_mode
    _weight_grad((dy, y, x, dw_ptr, db_ptr), size, tuple(strides(dw)), stride_split, *geometry, with_bias, products)
    return partials.add_up()
