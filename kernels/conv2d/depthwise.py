"""Depthwise convolution, one input channel per group: too few products per channel for matrix units, so plain sums.

    y[n, oc, oh, ow] = bias[oc] + sum over kh, kw of x[n, oc / MULT, ih, iw] * w[oc, 0, kh, kw]
    dx[n, c, ih, iw] = sum over m, kh, kw, oh, ow that reach (ih, iw) of dy[n, c * MULT + m, oh, ow] * w[.., 0, kh, kw]
    dw[oc, 0, kh, kw] = sum over n, oh, ow of dy[n, oc, oh, ow] * x[n, oc / MULT, ih, iw],    db[oc] = sum of dy

    with ih = oh * SH - PH + kh * DH and iw = ow * SW - PW + kw * DW, and MULT filters for each channel

A tile is BLOCK_P pixels by BLOCK_C channels, long in the dimension that is contiguous.
"""

import torch
import triton
import triton.language as tl

from .. import shapes
from .._common import INTERPRETED, OPTIONS, Window, acc_type, cdiv, first_tap, index_type, power_of_2, round_to
from ..launching import planned
from ..reduce import Partials
from ..tiles import flat_block, split_product
from .padding import PAD_MODES, source


def serves(w, groups):
    """Whether this convolution is depthwise; w is (OC, C / groups, KH, KW)."""
    return groups > 1 and w[1] == 1


def _blocks(pixels, channels, *tensors):
    """(BLOCK_P, BLOCK_C)."""
    if INTERPRETED:
        return flat_block(pixels // 2, 0), 8
    if shapes.memory_format(*tensors) is torch.channels_last:
        block_c = min(64, power_of_2(channels))
        return 512 // block_c, block_c
    return 512, 1


@triton.jit(do_not_specialize=["P"])
def depthwise_forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    P, H, W, OH, OW,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wo, stride_wh, stride_ww,
    stride_b,
    stride_yn, stride_yc, stride_yh, stride_yw,
    OC: tl.constexpr, MULT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAD_MODE: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(INDEX)
    tiles_p = tl.cdiv(P, BLOCK_P)
    p = pid % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    oc = pid // tiles_p * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_p, mask_c = p < P, oc < OC
    ow = p % OW
    oh = p // OW % OH
    n = p // OW // OH

    acc = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for kh in range(0, KH):
        ih, in_h = source(oh * SH - PH + kh * DH, H, PAD_MODE)
        for kw in range(0, KW):
            iw, in_w = source(ow * SW - PW + kw * DW, W, PAD_MODE)
            x_offs = (n * stride_xn + ih * stride_xh + iw * stride_xw)[:, None] + (oc // MULT * stride_xc)[None, :]
            x = tl.load(x_ptr + x_offs, mask=(mask_p & in_h & in_w)[:, None] & mask_c[None, :], other=0.0)
            w_offs = oc * stride_wo + tl.cast(kh, INDEX) * stride_wh + tl.cast(kw, INDEX) * stride_ww
            w = tl.load(w_ptr + w_offs, mask=mask_c, other=0.0)
            acc += x.to(ACC) * w.to(ACC)[None, :]

    if HAS_BIAS:
        acc += tl.load(b_ptr + oc * stride_b, mask=mask_c, other=0.0).to(ACC)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    y_offs = (n * stride_yn + oh * stride_yh + ow * stride_yw)[:, None] + (oc * stride_yc)[None, :]
    tl.store(y_ptr + y_offs, round_to(acc, y_ptr.dtype.element_ty), mask=mask_p[:, None] & mask_c[None, :])


@planned(depthwise_forward_kernel)
def _forward(x, w, bias, y, stride, padding, dilation, pad_mode, relu):
    (N, C, H, W), (OC, _, KH, KW), (OH, OW) = x.shape, w.shape, y.shape[2:]
    block_p, block_c = _blocks(N * OH * OW, OC, x, w)
    strides = *x.stride(), w.stride(0), *w.stride()[2:], 0 if bias is None else bias.stride(0), *y.stride()
    return (cdiv(N * OH * OW, block_p) * cdiv(OC, block_c),), (N * OH * OW, H, W, OH, OW, *strides), dict(
        OC=OC, MULT=OC // C, KH=KH, KW=KW,
        SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[2], DH=dilation[0], DW=dilation[1],
        PAD_MODE=PAD_MODES[pad_mode], HAS_BIAS=bias is not None, RELU=relu,
        INDEX=index_type(x, w, bias, y), ACC=acc_type(x.dtype),
        BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4, **OPTIONS,
    )  # fmt: skip


def forward(x, w, bias, stride, padding, dilation, groups, pad_mode, relu=False):
    """x (N, C, H, W), w (OC, 1, KH, KW), bias (OC) or None -> y (N, OC, OH, OW), all of one floating dtype."""
    y = shapes.conv2d(x, w, stride, padding, dilation)
    if y.numel() > 0:
        _forward((x, w, bias, y), stride, padding, dilation, pad_mode, relu)
    return y


@triton.jit(do_not_specialize=["P"])
def depthwise_input_grad_kernel(
    dy_ptr, w_ptr, dx_ptr,
    P, H, W, OH, OW,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_wo, stride_wh, stride_ww,
    stride_xn, stride_xc, stride_xh, stride_xw,
    C: tl.constexpr, MULT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    DIVISOR_H: tl.constexpr, STEP_H: tl.constexpr, INVERSE_H: tl.constexpr,
    DIVISOR_W: tl.constexpr, STEP_W: tl.constexpr, INVERSE_W: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(INDEX)
    tiles_p = tl.cdiv(P, BLOCK_P)
    p = pid % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    c = pid // tiles_p * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_p, mask_c = p < P, c < C
    iw = p % W
    ih = p // W % H
    n = p // W // H

    # Only every STEP-th tap reaches a pixel, so the loops have one iteration for each window of the pixel.
    kh0 = first_tap(ih + PH, DIVISOR_H, STEP_H, INVERSE_H, KH)
    kw0 = first_tap(iw + PW, DIVISOR_W, STEP_W, INVERSE_W, KW)
    acc = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for th in range(0, (KH + STEP_H - 1) // STEP_H):
        kh = kh0 + th * STEP_H
        oh, in_h = source((ih + PH - kh * DH) // SH, OH, 0)
        in_h = in_h & (kh < KH) & (ih + PH >= kh * DH)
        for tw in range(0, (KW + STEP_W - 1) // STEP_W):
            kw = kw0 + tw * STEP_W
            ow, in_w = source((iw + PW - kw * DW) // SW, OW, 0)
            mask = mask_p & in_h & in_w & (kw < KW) & (iw + PW >= kw * DW)
            for m in range(0, MULT):
                oc = c * MULT + m
                y_offs = (n * stride_yn + oh * stride_yh + ow * stride_yw)[:, None] + (oc * stride_yc)[None, :]
                w_offs = (kh * stride_wh + kw * stride_ww)[:, None] + (oc * stride_wo)[None, :]
                dy = tl.load(dy_ptr + y_offs, mask=mask[:, None] & mask_c[None, :], other=0.0)
                w = tl.load(w_ptr + w_offs, mask=mask[:, None] & mask_c[None, :], other=0.0)
                acc += dy.to(ACC) * w.to(ACC)

    x_offs = (n * stride_xn + ih * stride_xh + iw * stride_xw)[:, None] + (c * stride_xc)[None, :]
    tl.store(dx_ptr + x_offs, round_to(acc, dx_ptr.dtype.element_ty), mask=mask_p[:, None] & mask_c[None, :])


@planned(depthwise_input_grad_kernel)
def _input_grad(dy, w, dx, stride, padding, dilation):
    (N, C, H, W), (OC, _, KH, KW), (OH, OW) = dx.shape, w.shape, dy.shape[2:]
    block_p, block_c = _blocks(N * H * W, C, dy, w)
    window_h, window_w = Window.of(stride[0], dilation[0]), Window.of(stride[1], dilation[1])
    strides = *dy.stride(), w.stride(0), *w.stride()[2:], *dx.stride()
    return (cdiv(N * H * W, block_p) * cdiv(C, block_c),), (N * H * W, H, W, OH, OW, *strides), dict(
        C=C, MULT=OC // C, KH=KH, KW=KW,
        SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[2], DH=dilation[0], DW=dilation[1],
        DIVISOR_H=window_h.divisor, STEP_H=window_h.step, INVERSE_H=window_h.inverse,
        DIVISOR_W=window_w.divisor, STEP_W=window_w.step, INVERSE_W=window_w.inverse,
        INDEX=index_type(dy, w, dx), ACC=acc_type(dy.dtype), BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4, **OPTIONS,
    )  # fmt: skip


def input_grad(dy, w, size, stride, padding, dilation, groups):
    """dy (N, OC, OH, OW), w (OC, 1, KH, KW) -> dx of `size` (N, C, H, W), for padding with zeros."""
    dx = shapes.conv2d_input_grad(dy, w, size)
    if dx.numel() > 0:
        _input_grad((dy, w, dx), stride, padding, dilation)
    return dx


@triton.jit(do_not_specialize=["P", "per_split"])
def depthwise_weight_grad_kernel(
    dy_ptr, x_ptr, dw_ptr, db_ptr,
    P, per_split, H, W, OH, OW,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wo, stride_wh, stride_ww,
    stride_split,
    OC: tl.constexpr, MULT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAD_MODE: tl.constexpr, HAS_BIAS: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(INDEX)
    tiles_c: tl.constexpr = (OC + BLOCK_C - 1) // BLOCK_C
    kw = pid % KW
    kh = pid // KW % KH
    oc = pid // KW // KH % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    split = pid // KW // KH // tiles_c
    mask_c = oc < OC

    acc = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    acc_b = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    first = split * per_split
    for p0 in range(first, tl.minimum(first + per_split, P), BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P).to(INDEX)
        mask_p = p < tl.minimum(first + per_split, P)
        ow = p % OW
        oh = p // OW % OH
        n = p // OW // OH
        ih, in_h = source(oh * SH - PH + kh * DH, H, PAD_MODE)
        iw, in_w = source(ow * SW - PW + kw * DW, W, PAD_MODE)
        y_offs = (n * stride_yn + oh * stride_yh + ow * stride_yw)[:, None] + (oc * stride_yc)[None, :]
        x_offs = (n * stride_xn + ih * stride_xh + iw * stride_xw)[:, None] + (oc // MULT * stride_xc)[None, :]
        dy = tl.load(dy_ptr + y_offs, mask=mask_p[:, None] & mask_c[None, :], other=0.0).to(ACC)
        x = tl.load(x_ptr + x_offs, mask=(mask_p & in_h & in_w)[:, None] & mask_c[None, :], other=0.0).to(ACC)
        acc += dy * x
        if HAS_BIAS:
            acc_b += dy

    w_offs = split * stride_split + oc * stride_wo + kh * stride_wh + kw * stride_ww
    tl.store(dw_ptr + w_offs, round_to(tl.sum(acc, axis=0), dw_ptr.dtype.element_ty), mask=mask_c)
    if HAS_BIAS:
        if kh + kw == 0:
            db = round_to(tl.sum(acc_b, axis=0), db_ptr.dtype.element_ty)
            tl.store(db_ptr + split * stride_split + oc, db, mask=mask_c)


def _split(dy, x, size):
    """(BLOCK_P, BLOCK_C, tiles of dw, programs for each tile, pixels for each program)."""
    (N, OC, OH, OW), (KH, KW) = dy.shape, size[2:]
    block_p, block_c = _blocks(N * OH * OW, OC, dy, x)
    tiles = cdiv(OC, block_c) * KH * KW
    return block_p, block_c, tiles, *split_product(tiles, N * OH * OW, block_p)


@planned(depthwise_weight_grad_kernel)
def _weight_grad(
    dy, x, dw_ptr, db_ptr, size, strides, stride_split, stride, padding, dilation, pad_mode, with_bias
):  # fmt: skip
    (N, OC, OH, OW), (KH, KW), (_, C, H, W) = dy.shape, size[2:], x.shape
    block_p, block_c, tiles, splits, per_split = _split(dy, x, size)
    strides = *dy.stride(), *x.stride(), strides[0], *strides[2:], stride_split
    return (tiles * splits,), (N * OH * OW, per_split, H, W, OH, OW, *strides), dict(
        OC=OC, MULT=OC // C, KH=KH, KW=KW,
        SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[2], DH=dilation[0], DW=dilation[1],
        PAD_MODE=PAD_MODES[pad_mode], HAS_BIAS=with_bias,
        INDEX=index_type(dy, x, dw_ptr), ACC=acc_type(dy.dtype), BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
        **OPTIONS,
    )  # fmt: skip


def weight_grad(dy, x, size, stride, padding, dilation, groups, pad_mode, with_bias):
    """dy (N, OC, OH, OW), x (N, C, H, W) -> dw of `size` (OC, 1, KH, KW) and db (OC), empty without `with_bias`."""
    dw, db = shapes.conv2d_weight_grad(dy, x, size, with_bias)
    if dw.numel() == 0:
        return dw, db
    if dy.numel() == 0:
        return dw.zero_(), db.zero_()
    splits = _split(dy, x, size)[-2]
    partials = Partials(splits, dw, db)
    dw_ptr, db_ptr, stride_split = partials.pointers
    geometry = stride, padding, dilation, pad_mode
    _weight_grad((dy, x, dw_ptr, db_ptr), tuple(size), dw.stride(), stride_split, *geometry, with_bias)
    return partials.add_up()
