"""Depthwise convolution, one input channel per group: too few products per channel for matrix units, so plain sums.

    y[n, oc, oh, ow] = bias[oc] + sum over kh, kw of x[n, oc / MULT, ih, iw] * w[oc, 0, kh, kw]
    dx[n, c, ih, iw] = sum over m, kh, kw, oh, ow that reach (ih, iw) of dy[n, c * MULT + m, oh, ow] * w[.., 0, kh, kw]
    dw[oc, 0, kh, kw] = sum over n, oh, ow of dy[n, oc, oh, ow] * x[n, oc / MULT, ih, iw],    db[oc] = sum of dy

    with ih = oh * SH - PH + kh * DH and iw = ow * SW - PW + kw * DW, and MULT filters for each channel

A tile is BLOCK_P lines of LINE adjacent pixels by BLOCK_C channels; see lines.py, also for height and width in NCHW.
"""

import triton
import triton.language as tl

from .. import shapes
from .._common import OPTIONS, Window, acc_type, cdiv, first_tap, index_type, round_to
from ..launching import planned
from ..reduce import Partials
from ..tiles import split_product
from . import lines
from .lines import add_products, add_row, load_taps, place, zeros
from .padding import PAD_MODES, source
from .patches import in_elements


def serves(w, groups):
    """Whether this convolution is depthwise; w is (OC, C / groups, KH, KW)."""
    return groups > 1 and w[1] == 1


@triton.jit(do_not_specialize=["P", "inner", "outer", "H", "W", "OW"])
def depthwise_forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    P, inner, outer, inverse_inner, inverse_outer, H, W, OW,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_wo, stride_wh, stride_ww,
    stride_b,
    OC: tl.constexpr, MULT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAD_MODE: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, SWAP: tl.constexpr, UNITS: tl.constexpr,
    TAPS: tl.constexpr, UNROLL: tl.constexpr, LINE: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    stride_xn, stride_xc, stride_xh, stride_xw = in_elements((stride_xn, stride_xc, stride_xh, stride_xw), UNITS, 0)
    stride_yn, stride_yc, stride_yh, stride_yw = in_elements((stride_yn, stride_yc, stride_yh, stride_yw), UNITS, 4)
    pid = tl.program_id(0).to(INDEX)
    tiles_c: tl.constexpr = (OC + BLOCK_C - 1) // BLOCK_C
    oc = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    p = pid // tiles_c * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    n, oh, line = place(p, inner, outer, inverse_inner, inverse_outer, SWAP)
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
                acc, taps, x_ptr, x_offs + ih * stride_xh, ow * SW - PW + kw * DW, stride_xw, mask & in_h, W, last,
                True, SW, DW, TAPS, LINE, True, PAD_MODE, ACC,
            )  # fmt: skip

    y_offs = n * stride_yn + oc * stride_yc + oh * stride_yh
    for j in tl.static_range(LINE):
        y = acc[j]
        if HAS_BIAS:
            y += tl.load(b_ptr + oc * stride_b, mask=mask_c, other=0.0).to(ACC)
        if RELU:
            y = tl.where(y < 0, 0.0, y)
        y_ptrs = y_ptr + (y_offs + (ow + j) * stride_yw)
        tl.store(y_ptrs, round_to(y, y_ptr.dtype.element_ty), mask=mask & (ow + j < OW))


@planned(depthwise_forward_kernel)
def _forward(x, w, bias, y, stride, padding, dilation, pad_mode, relu):
    swap = lines.channels_first(x, w)
    size, out, kernel, stride, dilation, pad, steps_w = lines.swapped(
        swap, x.shape[2:], y.shape[2:], w.shape[2:], stride, dilation, padding[::2], w.stride()[2:]
    )
    (N, OC), (KH, KW), line = y.shape[:2], kernel, lines.line_for(out[1])
    rows, columns, taps = out[0], cdiv(out[1], line), lines.taps_of(KW)
    P = N * rows * columns
    block_p, block_c = lines.blocks(P, OC, y.itemsize, swap)
    steps, units = lines.steps_of(swap, x, y)
    numbers = P, *lines.order_of(swap, rows, columns), *size, out[1], *steps, w.stride(0), *steps_w
    return (cdiv(P, block_p) * cdiv(OC, block_c),), (*numbers, 0 if bias is None else bias.stride(0)), dict(
        OC=OC, MULT=OC // x.shape[1], KH=KH, KW=KW,
        SH=stride[0], SW=stride[1], PH=pad[0], PW=pad[1], DH=dilation[0], DW=dilation[1],
        PAD_MODE=PAD_MODES[pad_mode], HAS_BIAS=bias is not None, RELU=relu, SWAP=swap, UNITS=units,
        TAPS=taps, UNROLL=KH if KH * KW <= lines.MOST_UNROLLED else 1, LINE=line,
        INDEX=index_type(x, w, bias, y), ACC=acc_type(x.dtype),
        BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4, **OPTIONS,
    )  # fmt: skip


def forward(x, w, bias, stride, padding, dilation, groups, pad_mode, relu=False):
    """x (N, C, H, W), w (OC, 1, KH, KW), bias (OC) or None -> y (N, OC, OH, OW), all of one floating dtype."""
    y = shapes.conv2d(x, w, stride, padding, dilation)
    if y.numel() > 0:
        _forward((x, w, bias, y), stride, padding, dilation, pad_mode, relu)
    return y


@triton.jit(do_not_specialize=["P", "inner", "outer", "H", "W", "OH", "OW"])
def depthwise_input_grad_kernel(
    dy_ptr, w_ptr, dx_ptr,
    P, inner, outer, inverse_inner, inverse_outer, H, W, OH, OW,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wo, stride_wh, stride_ww,
    C: tl.constexpr, MULT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    DIVISOR_H: tl.constexpr, STEP_H: tl.constexpr, INVERSE_H: tl.constexpr,
    DIVISOR_W: tl.constexpr, STEP_W: tl.constexpr, INVERSE_W: tl.constexpr,
    SWAP: tl.constexpr, UNITS: tl.constexpr,
    TAPS: tl.constexpr, UNROLL: tl.constexpr, LINE: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    stride_yn, stride_yc, stride_yh, stride_yw = in_elements((stride_yn, stride_yc, stride_yh, stride_yw), UNITS, 0)
    stride_xn, stride_xc, stride_xh, stride_xw = in_elements((stride_xn, stride_xc, stride_xh, stride_xw), UNITS, 4)
    pid = tl.program_id(0).to(INDEX)
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    # The pixels of a line lie a stride apart, so that the same taps reach all of them. A program's lines have the same
    # taps in a row, and the same rows of taps too unless adjacent threads have adjacent rows.
    phase_w = pid // tiles_c % SW
    rest = pid // tiles_c // SW
    PHASES_H: tl.constexpr = 1 if SWAP else SH
    p = rest // PHASES_H * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    n, row, line = place(p, inner, outer, inverse_inner, inverse_outer, SWAP)
    ih = row * PHASES_H + rest % PHASES_H
    iw = line * (LINE * SW) + phase_w
    mask_c = c < C
    mask = (p < P) & (ih < H) & mask_c

    shifted_h = rest % PHASES_H + PH if PHASES_H == SH else ih + PH
    kh0 = first_tap(shifted_h, DIVISOR_H, STEP_H, INVERSE_H, KH)
    kw0 = first_tap(phase_w + PW, DIVISOR_W, STEP_W, INVERSE_W, KW)
    # The output position of the first tap; that of each further tap is DH / DIVISOR_H (DW / DIVISOR_W) less.
    oh0, ow0 = (ih + PH - kh0 * DH) // SH, (iw + PW - kw0 * DW) // SW
    ALL_H: tl.constexpr = KH % STEP_H == 0 and DIVISOR_H == 1
    ALL_W: tl.constexpr = KW % STEP_W == 0 and DIVISOR_W == 1
    ROWS: tl.constexpr = (KH + STEP_H - 1) // STEP_H
    COLUMNS: tl.constexpr = (KW + STEP_W - 1) // STEP_W

    acc = zeros(LINE, BLOCK_P, BLOCK_C, ACC)
    for m in range(0, MULT):
        oc = c * MULT + m
        y_offs = n * stride_yn + oc * stride_yc
        for th in tl.range(0, ROWS, loop_unroll_factor=UNROLL):
            kh = kh0 + th * STEP_H
            oh, in_h = source(oh0 - th * (DH // DIVISOR_H), OH, 0)
            for tw in range(0, COLUMNS, TAPS):
                kw = kw0 + tw * STEP_W
                last_tap = kw + (TAPS - 1) * STEP_W < KW
                reached, mask_w = mask & in_h, mask_c
                if not ALL_H:
                    reached, mask_w = reached & (kh < KH), mask_w & (kh < KH)
                if DIVISOR_W != 1:
                    reached, mask_w = reached & (kw0 < KW), mask_w & (kw0 < KW)
                w_ptrs = w_ptr + (oc * stride_wo + kh * stride_wh + kw * stride_ww)
                taps = load_taps(w_ptrs, STEP_W * stride_ww, mask_w, last_tap, TAPS, ALL_W, ACC)
                acc = add_row(
                    acc, taps, dy_ptr, y_offs + oh * stride_yh, ow0 - tw * (DW // DIVISOR_W), stride_yw, reached, OW,
                    OW, last_tap, 1, -(DW // DIVISOR_W), TAPS, LINE, ALL_W, 0, ACC,
                )  # fmt: skip

    x_offs = n * stride_xn + c * stride_xc + ih * stride_xh
    for j in tl.static_range(LINE):
        dx_ptrs = dx_ptr + (x_offs + (iw + j * SW) * stride_xw)
        tl.store(dx_ptrs, round_to(acc[j], dx_ptr.dtype.element_ty), mask=mask & (iw + j * SW < W))


@planned(depthwise_input_grad_kernel)
def _input_grad(dy, w, dx, stride, padding, dilation):
    swap = lines.channels_first(dy, w)
    size, out, kernel, stride, dilation, pad, steps_w = lines.swapped(
        swap, dx.shape[2:], dy.shape[2:], w.shape[2:], stride, dilation, padding[::2], w.stride()[2:]
    )
    (N, C), (KH, KW), (SH, SW) = dx.shape[:2], kernel, stride
    window_h, window_w = Window.of(SH, dilation[0]), Window.of(SW, dilation[1])
    reaching_h, reaching_w = cdiv(KH, window_h.step), cdiv(KW, window_w.step)
    line = lines.line_for(cdiv(size[1], SW))
    rows, columns = size[0] if swap else cdiv(size[0], SH), cdiv(size[1], SW * line)
    P, phases = N * rows * columns, SW if swap else SH * SW
    block_p, block_c = lines.blocks(P, C, dx.itemsize, swap)
    steps, units = lines.steps_of(swap, dy, dx)
    numbers = P, *lines.order_of(swap, rows, columns), *size, *out, *steps, w.stride(0), *steps_w
    return (cdiv(P, block_p) * cdiv(C, block_c) * phases,), numbers, dict(
        C=C, MULT=w.shape[0] // C, KH=KH, KW=KW,
        SH=SH, SW=SW, PH=pad[0], PW=pad[1], DH=dilation[0], DW=dilation[1],
        DIVISOR_H=window_h.divisor, STEP_H=window_h.step, INVERSE_H=window_h.inverse,
        DIVISOR_W=window_w.divisor, STEP_W=window_w.step, INVERSE_W=window_w.inverse,
        SWAP=swap, UNITS=units, TAPS=lines.taps_of(reaching_w),
        UNROLL=reaching_h if reaching_h * reaching_w <= lines.MOST_UNROLLED else 1, LINE=line,
        INDEX=index_type(dy, w, dx), ACC=acc_type(dy.dtype), BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4, **OPTIONS,
    )  # fmt: skip


def input_grad(dy, w, size, stride, padding, dilation, groups):
    """dy (N, OC, OH, OW), w (OC, 1, KH, KW) -> dx of `size` (N, C, H, W), for padding with zeros."""
    dx = shapes.conv2d_input_grad(dy, w, size)
    if dx.numel() > 0:
        _input_grad((dy, w, dx), stride, padding, dilation)
    return dx


@triton.jit(do_not_specialize=["P", "per_split", "inner", "outer", "H", "W", "OW"])
def depthwise_weight_grad_kernel(
    dy_ptr, x_ptr, dw_ptr, db_ptr,
    P, per_split, inner, outer, inverse_inner, inverse_outer, H, W, OW,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wo, stride_wh, stride_ww,
    stride_split,
    OC: tl.constexpr, MULT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAD_MODE: tl.constexpr, HAS_BIAS: tl.constexpr, SWAP: tl.constexpr, UNITS: tl.constexpr,
    ROWS: tl.constexpr, TAPS: tl.constexpr, LINE: tl.constexpr, WHOLE: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    stride_yn, stride_yc, stride_yh, stride_yw = in_elements((stride_yn, stride_yc, stride_yh, stride_yw), UNITS, 0)
    stride_xn, stride_xc, stride_xh, stride_xw = in_elements((stride_xn, stride_xc, stride_xh, stride_xw), UNITS, 4)
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
        n, oh, line = place(p, inner, outer, inverse_inner, inverse_outer, SWAP)
        ow = line * LINE
        mask = (p < end) & mask_c
        y_offs = n * stride_yn + oc * stride_yc + oh * stride_yh
        dy = ()
        for j in tl.static_range(LINE):
            inside = mask if WHOLE else mask & (ow + j < OW)
            dy = dy + (tl.load(dy_ptr + (y_offs + (ow + j) * stride_yw), mask=inside, other=0.0).to(ACC),)
            if HAS_BIAS:
                acc_b += dy[j]
        x_offs = n * stride_xn + oc // MULT * stride_xc
        for th in tl.static_range(ROWS):
            ih, in_h = source(oh * SH - PH + (kh0 + th) * DH, H, PAD_MODE)
            acc = add_products(
                acc, dy, x_ptr, x_offs + ih * stride_xh, ow * SW - PW + kw0 * DW, stride_xw, mask & in_h, W, last,
                OW - ow, th * TAPS, SW, DW, TAPS, LINE, WHOLE, PAD_MODE, ACC,
            )  # fmt: skip

    for k in tl.static_range(ROWS * TAPS):
        w_offs = split * stride_split + oc * stride_wo + (kh0 + k // TAPS) * stride_wh + (kw0 + k % TAPS) * stride_ww
        dw = tl.sum(acc[k], axis=0, keep_dims=True)
        tl.store(dw_ptr + w_offs, round_to(dw, dw_ptr.dtype.element_ty), mask=mask_c)
    if HAS_BIAS:
        if kh0 + kw0 == 0:
            db = tl.sum(acc_b, axis=0, keep_dims=True)
            tl.store(db_ptr + split * stride_split + oc, round_to(db, db_ptr.dtype.element_ty), mask=mask_c)


def _split(dy, x, size):
    """What a launch of the weight gradient is split into.

    (whether height and width are swapped, (rows, lines of a row, LINE), (ROWS, TAPS), blocks, tiles of dw, programs for
    each tile, units for each program)
    """
    swap = lines.channels_first(dy, x)
    (rows, columns), (KH, KW) = lines.swapped(swap, dy.shape[2:], size[2:])
    line, taps = lines.line_for(columns), (KH if KH * KW <= lines.MOST_UNROLLED else 1, lines.taps_of(KW))
    P = dy.shape[0] * rows * cdiv(columns, line)
    block_p, block_c = lines.blocks(P, size[0], dy.itemsize, swap, lines.vector_of(taps, dy.itemsize))
    tiles = cdiv(size[0], block_c) * (KH // taps[0]) * (KW // taps[1])
    return swap, (rows, cdiv(columns, line), line), taps, (block_p, block_c), tiles, *split_product(tiles, P, block_p)


@planned(depthwise_weight_grad_kernel)
def _weight_grad(
    dy, x, dw_ptr, db_ptr, size, strides, stride_split, stride, padding, dilation, pad_mode, with_bias
):  # fmt: skip
    swap, (rows, columns, line), (rows_w, taps), (block_p, block_c), tiles, splits, per_split = _split(dy, x, size)
    image, out, kernel, stride, dilation, pad, steps_w = lines.swapped(
        swap, x.shape[2:], dy.shape[2:], size[2:], stride, dilation, padding[::2], strides[2:]
    )
    steps, units = lines.steps_of(swap, dy, x)
    numbers = dy.shape[0] * rows * columns, per_split, *lines.order_of(swap, rows, columns), *image, out[1], *steps
    return (tiles * splits,), (*numbers, strides[0], *steps_w, stride_split), dict(
        OC=size[0], MULT=size[0] // x.shape[1], KH=kernel[0], KW=kernel[1],
        SH=stride[0], SW=stride[1], PH=pad[0], PW=pad[1], DH=dilation[0], DW=dilation[1],
        PAD_MODE=PAD_MODES[pad_mode], HAS_BIAS=with_bias, SWAP=swap, UNITS=units,
        ROWS=rows_w, TAPS=taps, LINE=line, WHOLE=out[1] % line == 0,
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
    partials = Partials(_split(dy, x, size)[-2], dw, db)
    dw_ptr, db_ptr, stride_split = partials.pointers
    geometry = stride, padding, dilation, pad_mode
    _weight_grad((dy, x, dw_ptr, db_ptr), tuple(size), dw.stride(), stride_split, *geometry, with_bias)
    return partials.add_up()
