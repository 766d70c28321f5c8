"""Depthwise convolution, one input channel per group: too few products per channel for matrix units, so plain sums.

    y[n, oc, oh, ow] = epilogue(sum over kh, kw of x[n, oc / MULT, ih, iw] * w[oc, 0, kh, kw])
    dx[n, c, ih, iw] = sum over m, kh, kw, oh, ow that reach (ih, iw) of dy[n, c * MULT + m, oh, ow] * w[.., 0, kh, kw]
    dw[oc, 0, kh, kw] = sum over n, oh, ow of dy[n, oc, oh, ow] * x[n, oc / MULT, ih, iw],    db[oc] = sum of dy

    with ih = oh * SH - PH + kh * DH and iw = ow * SW - PW + kw * DW, and MULT filters for each channel

A tile is BLOCK_P lines of LINE adjacent pixels by BLOCK_C channels; see lines.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .. import shapes
from .._common import OPTIONS, Window, acc_type, cdiv, first_tap, index_type, place, reciprocal, round_to
from ..epilogue import NONE, constant, finished, of_channels
from ..launching import planned
from ..reduce import Partials
from ..tiles import split_product
from . import lines
from .lines import add_products, add_row, load_line, load_taps, store_line, zeros
from .padding import PAD_MODES, source
from .patches import in_elements


def serves(w, groups):
    """Whether this convolution is depthwise; w is (OC, C / groups, KH, KW)."""
    return groups > 1 and w[1] == 1


def filter_strides(strides):
    """The strides of (OC, 1, KH, KW) as constants: then most of a thread's addresses differ by constants."""
    return dict(stride_wo=strides[0], stride_wh=strides[2], stride_ww=strides[3])


@triton.jit(do_not_specialize=["P", "lines", "rows", "H", "W", "OW"])
def depthwise_forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, r_ptr,
    P, lines, rows, inverse_lines, inverse_rows, H, W, OW,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_b,
    stride_wo: tl.constexpr, stride_wh: tl.constexpr, stride_ww: tl.constexpr,
    OC: tl.constexpr, MULT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAD_MODE: tl.constexpr, EPILOGUE: tl.constexpr, UNITS: tl.constexpr,
    MEET: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    stride_xn, stride_xc, stride_xh, stride_xw = in_elements((stride_xn, stride_xc, stride_xh, stride_xw), UNITS, 0)
    stride_yn, stride_yc, stride_yh, stride_yw = in_elements((stride_yn, stride_yc, stride_yh, stride_yw), UNITS, 4)
    TAPS: tl.constexpr = MEET[4]
    LINE: tl.constexpr = MEET[5]
    pid = tl.program_id(0).to(INDEX)
    tiles_c: tl.constexpr = (OC + BLOCK_C - 1) // BLOCK_C
    oc = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    p = pid // tiles_c * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    n, oh, line = place(p, lines, rows, inverse_lines, inverse_rows)
    ow = line * LINE
    mask_c = oc < OC
    mask = (p < P) & mask_c
    x_offs = n * stride_xn + oc // MULT * stride_xc
    last = (OW - 1) * SW - PW + (KW - 1) * DW

    acc = zeros(LINE, BLOCK_P, BLOCK_C, ACC)
    for kh in tl.range(0, KH, loop_unroll_factor=UNROLL):
        ih, in_h = source(oh * SH - PH + kh * DH, H, PAD_MODE)
        for kw in range(0, KW, TAPS):
            w_offs = oc * stride_wo + tl.cast(kh, INDEX) * stride_wh + tl.cast(kw, INDEX) * stride_ww
            taps = load_taps(w_ptr + w_offs, stride_ww, mask_c, True, TAPS, True, ACC)
            acc = add_row(
                acc, taps, x_ptr + (x_offs + ih * stride_xh), ow * SW + kw * DW, stride_xw, mask & in_h, W, last, True,
                MEET, True, PAD_MODE, ACC,
            )  # fmt: skip

    vectors = b_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr
    factor, summand = of_channels(vectors, stride_b, oc, mask_c, EPILOGUE, ACC)
    y_offs = n * stride_yn + oc * stride_yc + oh * stride_yh + ow * stride_yw
    r_ptrs, step = r_ptr + y_offs, tl.cast(stride_yw, INDEX)
    y = ()
    for j in tl.static_range(LINE):
        y = y + (finished(acc[j], factor, summand, r_ptrs + j * step, mask & (ow + j < OW), EPILOGUE),)
    store_line(y_ptr, y_offs, stride_yw, y, mask, OW - ow, LINE, VECTOR)


@planned(depthwise_forward_kernel)
def _forward(x, w, bias, y, mean, var, scale, shift, residual, stride, padding, dilation, pad_mode, values):
    (N, OC, OH, OW), (H, W), (KH, KW), size = y.shape, x.shape[2:], w.shape[2:], y.itemsize
    inner, taps = lines.channels_inner(x, w), lines.taps_of(KW)
    line = lines.line_for(size, OW, inner, stride[1])
    channels = lines.channels_for(size, OC, OC // x.shape[1]) if inner else 0
    in_x = 1 if inner or taps < KW or pad_mode != "zeros" else lines.vector_for(size, W, line)
    in_y = 1 if inner else lines.vector_for(size, OW, line)
    per_row = cdiv(OW, line)
    P = N * OH * per_row
    block_p, block_c = lines.blocks(size, P, OC, channels)
    steps, units = lines.steps_of((x, max(channels, in_x)), (y, max(channels, in_y)))
    numbers = P, per_row, OH, reciprocal(per_row), reciprocal(OH), H, W, OW, *steps
    return (cdiv(P, block_p) * cdiv(OC, block_c),), (*numbers, 0 if bias is None else bias.stride(0)), dict(
        **filter_strides(w.stride()), OC=OC, MULT=OC // x.shape[1], KH=KH, KW=KW,
        SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[2], DH=dilation[0], DW=dilation[1],
        PAD_MODE=PAD_MODES[pad_mode], EPILOGUE=constant(bias, mean, var, scale, shift, residual, *values), UNITS=units,
        MEET=(1, stride[1], dilation[1], -padding[2], taps, line, in_x), VECTOR=in_y,
        UNROLL=lines.unrolled(KH, KW, inner), INDEX=index_type(x, w, bias, y), ACC=acc_type(x.dtype),
        BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4, **OPTIONS,
    )  # fmt: skip


def forward(x, w, bias, stride, padding, dilation, groups, pad_mode, epilogue=NONE):
    """x (N, C, H, W), w (OC, 1, KH, KW), bias (OC) or None, an Epilogue -> y (N, OC, OH, OW) of x's dtype."""
    y = shapes.conv2d(x, w, stride, padding, dilation)
    if y.numel() > 0:
        tensors, values = epilogue.of(y)
        _forward((x, w, bias, y, *tensors), stride, padding, dilation, pad_mode, values)
    return y


@triton.jit(do_not_specialize=["P", "lines", "rows", "H", "W", "OH", "OW"])
def depthwise_input_grad_kernel(
    dy_ptr, w_ptr, dx_ptr,
    P, lines, rows, inverse_lines, inverse_rows, H, W, OH, OW,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wo: tl.constexpr, stride_wh: tl.constexpr, stride_ww: tl.constexpr,
    C: tl.constexpr, MULT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    DIVISOR_H: tl.constexpr, STEP_H: tl.constexpr, INVERSE_H: tl.constexpr, PHASES_H: tl.constexpr,
    DIVISOR_W: tl.constexpr, STEP_W: tl.constexpr, INVERSE_W: tl.constexpr, PHASES_W: tl.constexpr,
    ADJACENT: tl.constexpr, UNITS: tl.constexpr, MEET: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    stride_yn, stride_yc, stride_yh, stride_yw = in_elements((stride_yn, stride_yc, stride_yh, stride_yw), UNITS, 0)
    stride_xn, stride_xc, stride_xh, stride_xw = in_elements((stride_xn, stride_xc, stride_xh, stride_xw), UNITS, 4)
    TAPS: tl.constexpr = MEET[4]
    LINE: tl.constexpr = MEET[5]
    # The pixels of a line are adjacent, and MEET says which taps reach which of them; or they lie a stride apart, so
    # that the same taps reach all of them. A program's rows lie a stride apart for that reason.
    SPACE: tl.constexpr = 1 if ADJACENT else SW
    pid = tl.program_id(0).to(INDEX)
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    phase_h = pid // tiles_c % PHASES_H
    phase_w = pid // tiles_c // PHASES_H % PHASES_W
    p = pid // tiles_c // PHASES_H // PHASES_W * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    n, row, line = place(p, lines, rows, inverse_lines, inverse_rows)
    ih = row * SH + phase_h
    iw = line * (LINE * SPACE) + phase_w
    mask_c = c < C
    mask = (p < P) & (ih < H) & mask_c

    # The output position of the first tap; that of each further tap is DH / DIVISOR_H (DW / DIVISOR_W) less.
    kh0 = first_tap(phase_h + PH, DIVISOR_H, STEP_H, INVERSE_H, KH)
    kw0 = first_tap(phase_w + PW, DIVISOR_W, STEP_W, INVERSE_W, KW)
    oh0 = (ih + PH - kh0 * DH) // SH
    base = line * (LINE // SW) if ADJACENT else (iw + PW - kw0 * DW) // SW
    ALL_H: tl.constexpr = KH % STEP_H == 0 and DIVISOR_H == 1
    ALL_W: tl.constexpr = KW % STEP_W == 0 and DIVISOR_W == 1

    acc = zeros(LINE, BLOCK_P, BLOCK_C, ACC)
    for m in range(0, MULT):
        oc = c * MULT + m
        y_offs = n * stride_yn + oc * stride_yc
        for th in tl.range(0, (KH + STEP_H - 1) // STEP_H, loop_unroll_factor=UNROLL):
            kh = kh0 + th * STEP_H
            oh, reached = source(oh0 - th * (DH // DIVISOR_H), OH, 0)
            exists = mask_c
            if not ALL_H:
                reached, exists = reached & (kh < KH), exists & (kh < KH)
            if DIVISOR_W != 1:
                reached, exists = reached & (kw0 < KW), exists & (kw0 < KW)
            for tw in range(0, (KW + STEP_W - 1) // STEP_W, TAPS):
                kw = kw0 + tw * STEP_W
                last_tap = kw + (TAPS - 1) * STEP_W < KW
                w_ptrs = w_ptr + (oc * stride_wo + kh * stride_wh + kw * stride_ww)
                taps = load_taps(w_ptrs, STEP_W * stride_ww, exists, last_tap, TAPS, ALL_W, ACC)
                acc = add_row(
                    acc, taps, dy_ptr + (y_offs + oh * stride_yh), base - tw * (DW // DIVISOR_W), stride_yw,
                    mask & reached, OW, OW, last_tap, MEET, ALL_W, 0, ACC,
                )  # fmt: skip

    x_offs = n * stride_xn + c * stride_xc + ih * stride_xh + iw * stride_xw
    left = (W - iw + SPACE - 1) // SPACE
    store_line(dx_ptr, x_offs, SPACE * stride_xw, acc, mask, left, LINE, VECTOR)


@planned(depthwise_input_grad_kernel)
def _input_grad(dy, w, dx, stride, padding, dilation):
    (N, C, H, W), (OH, OW), (KH, KW), (SH, SW), (DH, DW) = dx.shape, dy.shape[2:], w.shape[2:], stride, dilation
    inner, size, window_h, window_w = lines.channels_inner(dy, w), dx.itemsize, Window.of(SH, DH), Window.of(SW, DW)
    channels, in_y, in_x = lines.channels_for(size, C, w.shape[0] // C) if inner else 0, 1, 1
    longest = lines.lengths(size)[0]
    adjacent = SW <= longest and KW <= lines.MOST_TAPS
    if adjacent:
        window_w = Window.of(1, 1)
        line = lines.line_for(size, W, inner) if SW == 1 else longest // SW * SW
        meet = SW, 1, -DW, padding[2], KW, line
        if not inner:
            in_y, in_x = lines.vector_for(size, OW, line // SW), lines.vector_for(size, W, line)
    else:
        line = lines.line_for(size, cdiv(W, SW), True)
        meet = 1, 1, -DW // window_w.divisor, 0, lines.taps_of(cdiv(KW, window_w.step)), line
    per_row, rows = cdiv(W, line if adjacent else line * SW), cdiv(H, SH)
    P, phases_h, phases_w = N * rows * per_row, min(SH, H), 1 if adjacent else min(SW, W)
    block_p, block_c = lines.blocks(size, P, C, channels)
    steps, units = lines.steps_of((dy, max(channels, in_y)), (dx, max(channels, in_x)))
    numbers = P, per_row, rows, reciprocal(per_row), reciprocal(rows), H, W, OH, OW, *steps
    return (cdiv(P, block_p) * cdiv(C, block_c) * phases_h * phases_w,), numbers, dict(
        **filter_strides(w.stride()), C=C, MULT=w.shape[0] // C, KH=KH, KW=KW,
        SH=SH, SW=SW, PH=padding[0], PW=padding[2], DH=DH, DW=DW,
        DIVISOR_H=window_h.divisor, STEP_H=window_h.step, INVERSE_H=window_h.inverse, PHASES_H=phases_h,
        DIVISOR_W=window_w.divisor, STEP_W=window_w.step, INVERSE_W=window_w.inverse, PHASES_W=phases_w,
        ADJACENT=adjacent, UNITS=units, MEET=(*meet, in_y), VECTOR=in_x,
        UNROLL=lines.unrolled(cdiv(KH, window_h.step), KW, inner),
        INDEX=index_type(dy, w, dx), ACC=acc_type(dy.dtype), BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4, **OPTIONS,
    )  # fmt: skip


def input_grad(dy, w, size, stride, padding, dilation, groups):
    """dy (N, OC, OH, OW), w (OC, 1, KH, KW) -> dx of `size` (N, C, H, W), for padding with zeros."""
    dx = shapes.conv2d_input_grad(dy, w, size)
    if dx.numel() > 0:
        _input_grad((dy, w, dx), stride, padding, dilation)
    return dx


@triton.jit(do_not_specialize=["P", "per_split", "lines", "rows", "H", "W", "OW"])
def depthwise_weight_grad_kernel(
    dy_ptr, x_ptr, dw_ptr, db_ptr,
    P, per_split, lines, rows, inverse_lines, inverse_rows, H, W, OW,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_split,
    stride_wo: tl.constexpr, stride_wh: tl.constexpr, stride_ww: tl.constexpr,
    OC: tl.constexpr, MULT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAD_MODE: tl.constexpr, HAS_BIAS: tl.constexpr,
    UNITS: tl.constexpr, MEET: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    stride_yn, stride_yc, stride_yh, stride_yw = in_elements((stride_yn, stride_yc, stride_yh, stride_yw), UNITS, 0)
    stride_xn, stride_xc, stride_xh, stride_xw = in_elements((stride_xn, stride_xc, stride_xh, stride_xw), UNITS, 4)
    TAPS: tl.constexpr = MEET[4]
    LINE: tl.constexpr = MEET[5]
    pid = tl.program_id(0).to(INDEX)
    tiles_c: tl.constexpr = (OC + BLOCK_C - 1) // BLOCK_C
    oc = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    # A program adds up ROWS x TAPS taps, which are all of a small window.
    kw0 = pid // tiles_c % (KW // TAPS) * TAPS
    kh0 = pid // tiles_c // (KW // TAPS) % (KH // ROWS) * ROWS
    split = pid // tiles_c // (KW // TAPS) // (KH // ROWS)
    mask_c = oc < OC
    last = (OW - 1) * SW - PW + (KW - 1) * DW

    acc = zeros(ROWS * TAPS, BLOCK_P, BLOCK_C, ACC)
    acc_b = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    first = split * per_split
    end = tl.minimum(first + per_split, P)
    for p0 in range(first, end, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P).to(INDEX)[:, None]
        n, oh, line = place(p, lines, rows, inverse_lines, inverse_rows)
        ow = line * LINE
        mask = (p < end) & mask_c
        y_offs = n * stride_yn + oc * stride_yc + oh * stride_yh + ow * stride_yw
        dy = load_line(dy_ptr + y_offs, stride_yw, mask, OW - ow, LINE, VECTOR, WHOLE, ACC)
        if HAS_BIAS:
            for j in tl.static_range(LINE):
                acc_b += dy[j]
        x_offs = n * stride_xn + oc // MULT * stride_xc
        for th in tl.static_range(ROWS):
            ih, in_h = source(oh * SH - PH + (kh0 + th) * DH, H, PAD_MODE)
            acc = add_products(
                acc, dy, x_ptr + (x_offs + ih * stride_xh), ow * SW + kw0 * DW, stride_xw, mask & in_h, W, last,
                OW - ow, th * TAPS, MEET, WHOLE, PAD_MODE, ACC,
            )  # fmt: skip

    for k in tl.static_range(ROWS * TAPS):
        w_offs = split * stride_split + oc * stride_wo + (kh0 + k // TAPS) * stride_wh + (kw0 + k % TAPS) * stride_ww
        dw = tl.sum(acc[k], axis=0, keep_dims=True)
        tl.store(dw_ptr + w_offs, round_to(dw, dw_ptr.dtype.element_ty), mask=mask_c)
    if HAS_BIAS:
        if kh0 + kw0 == 0:
            db = tl.sum(acc_b, axis=0, keep_dims=True)
            tl.store(db_ptr + split * stride_split + oc, round_to(db, db_ptr.dtype.element_ty), mask=mask_c)


class Split(NamedTuple):
    """How a weight gradient is divided among programs."""

    line: int
    per_row: int
    rows: int  # of taps, for each program
    taps: int  # of a row
    channels: int  # of a thread's vectors, 0 in NCHW
    blocks: tuple
    tiles: int
    splits: int
    per_split: int

    @classmethod
    def of(cls, dy, x, size, stride):
        (N, OC, OH, OW), (KH, KW), inner = dy.shape, size[2:], lines.channels_inner(dy, x)
        taps, rows = lines.taps_of(KW), KH if KH * KW <= lines.MOST_IN_PROGRAM else 1
        # Wider vectors would have more sums than a thread has registers, and so would longer lines of wide elements.
        most = 16 if rows * taps * 16 // dy.itemsize <= lines.MOST_SUMS else 8
        channels = lines.channels_for(dy.itemsize, OC, OC // x.shape[1], most) if inner else 0
        short = inner and dy.itemsize > 2 and rows * taps > lines.MOST_UNROLLED[True]
        line = lines.SHORT if short else lines.line_for(dy.itemsize, OW, inner, stride[1])
        per_row = cdiv(OW, line)
        block_p, block_c = lines.blocks(dy.itemsize, N * OH * per_row, OC, channels)
        tiles = cdiv(OC, block_c) * (KH // rows) * (KW // taps)
        rest = split_product(tiles, N * OH * per_row, block_p)
        return cls(line, per_row, rows, taps, channels, (block_p, block_c), tiles, *rest)


@planned(depthwise_weight_grad_kernel)
def _weight_grad(
    dy, x, dw_ptr, db_ptr, size, strides, stride_split, stride, padding, dilation, pad_mode, with_bias
):  # fmt: skip
    (N, OC, OH, OW), (H, W), (KH, KW), itemsize = dy.shape, x.shape[2:], size[2:], dy.itemsize
    split = Split.of(dy, x, size, stride)
    in_x = 1 if split.channels or split.taps < KW or pad_mode != "zeros" else lines.vector_for(itemsize, W, split.line)
    in_y = 1 if split.channels else lines.vector_for(itemsize, OW, split.line)
    steps, units = lines.steps_of((dy, max(split.channels, in_y)), (x, max(split.channels, in_x)))
    order = split.per_row, OH, reciprocal(split.per_row), reciprocal(OH)
    numbers = N * OH * split.per_row, split.per_split, *order, H, W, OW, *steps, stride_split
    return (split.tiles * split.splits,), numbers, dict(
        **filter_strides(strides), OC=OC, MULT=OC // x.shape[1], KH=KH, KW=KW,
        SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[2], DH=dilation[0], DW=dilation[1],
        PAD_MODE=PAD_MODES[pad_mode], HAS_BIAS=with_bias, UNITS=units,
        MEET=(1, stride[1], dilation[1], -padding[2], split.taps, split.line, in_x), VECTOR=in_y,
        ROWS=split.rows, WHOLE=OW % split.line == 0, INDEX=index_type(dy, x, dw_ptr), ACC=acc_type(dy.dtype),
        BLOCK_P=split.blocks[0], BLOCK_C=split.blocks[1], num_warps=4, **OPTIONS,
    )  # fmt: skip


def weight_grad(dy, x, size, stride, padding, dilation, groups, pad_mode, with_bias):
    """dy (N, OC, OH, OW), x (N, C, H, W) -> dw of `size` (OC, 1, KH, KW) and db (OC), empty without `with_bias`."""
    dw, db = shapes.conv2d_weight_grad(dy, x, size, with_bias)
    if dw.numel() == 0:
        return dw, db
    if dy.numel() == 0:
        return dw.zero_(), db.zero_()
    partials = Partials(Split.of(dy, x, size, stride).splits, dw, db)
    dw_ptr, db_ptr, stride_split = partials.pointers
    geometry = stride, padding, dilation, pad_mode
    _weight_grad((dy, x, dw_ptr, db_ptr), tuple(size), dw.stride(), stride_split, *geometry, with_bias)
    return partials.add_up()
