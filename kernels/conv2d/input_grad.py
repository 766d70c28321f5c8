"""The input gradient of a convolution."""

import triton
import triton.language as tl

from .. import shapes
from .._common import Window, cdiv, first_tap, in_units, index_type, product_types, round_to, strides
from ..launching import planned
from ..tiles import TALL, wants_k_inner
from .padding import source
from .patches import FLAT_BELOW, SHORT_K, channels_inner, next_block, precision, tile_for


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
