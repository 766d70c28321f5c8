"""The weight and bias gradients of the fused kernel for few channels, split between programs; see one_hot.py."""

import triton
import triton.language as tl

from .. import shapes
from .._common import (
    OPTIONS,
    cdiv,
    compute_capability,
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
from ..reduce import Partials
from ..tiles import split_count
from .chooser import patch_size
from .one_hot import one_hot, pixel

# Images in an iteration, and filters of a program by its number of pooled pixels: chosen from machine code (no register
# spills on any target) and not yet timed.
IMAGES, FILTERS = 32, {1: 16, 4: 8}


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
    # GEMM: M = OC * RH * RW * WH * WW, a row for each filter and each pixel of z under RH x RW pooled pixels; N = C *
    # PATCH_H * PATCH_W, the pixels that these depend on; K = images times blocks of pooled pixels, of which a program
    # takes per_split iterations of BLOCK_K images at one block. At the end each row holds dw at a shift of its own.
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
        # The pixels of a row are contiguous, which the compiler sees in this form only.
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

    # Gather (pooled pixel and position, oc and tap) and add up the first dimension, which lies within a thread.
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
    """(pooled pixels of a block along each dimension, patch, iterations, those of a program, programs for a tile)."""
    (N, OC, QH, QW), (_, C, KH, KW) = size, w_size
    (SH, SW), (DH, DW), (WH, WW), (TH, TW) = stride, dilation, pool_kernel, pool_stride

    def patch(R):
        return patch_size(R, KH, SH, DH, WH, TH), patch_size(R, KW, SW, DW, WW, TW)

    # If a patch is small, that of four pooled pixels is hardly larger.
    R = 2 if C * patch(2)[0] * patch(2)[1] <= 64 and QH > 1 and QW > 1 else 1
    tiles, turns = cdiv(OC, FILTERS[R * R]), cdiv(N, IMAGES) * cdiv(QH, R) * cdiv(QW, R)
    # At least six iterations a program: its end takes about as long as three of them.
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
    # The gradients are an operand in registers. On sm_90 a pipelined loop writes them for the next iteration while a
    # product may still read them (https://github.com/triton-lang/triton/issues/9433; bench/machine_code/ttgir.py looks
    # for it).
    num_stages = 1 if compute_capability() == 9 else 2
    return (cdiv(OC, block_oc) * splits,), (N, turns, per_split, stride_split), dict(
        H=H, W=W, QH=QH, QW=QW,
        **named_strides("y", dy.stride()), **named_strides("c", code.stride()), **named_strides("x", x.stride()),
        **named_strides("w", strides, "ochw"),
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
    """dy, code (N, OC, QH, QW), x (N, C, H, W) -> dw of `size` (OC, C, KH, KW), db (OC), empty without `with_bias`."""
    dw, db = shapes.conv2d_relu_max_pool2d_weight_grad(dy, code, x, size, with_bias)
    if dw.numel() == 0:
        return dw, db
    size = tuple(size)
    splits = _split(dy.shape, size, pool_kernel, pool_stride, stride, dilation)[-1]
    partials = Partials(splits, dw, db)
    dw_ptr, db_ptr, stride_split = partials.pointers
    geometry = stride, padding, dilation, pool_kernel, pool_stride, pool_padding
    tensors = dy, code, x, dw_ptr, db_ptr
    _weight_grad(tensors, size, dw.stride(), stride_split, *geometry, with_bias, precision())
    return partials.add_up()
