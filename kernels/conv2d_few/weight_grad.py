"""The weight and bias gradients of convolutions with few input channels, split between programs; cut.py has the blocks.

    product[(oc, bh, bw), k] = sum over blocks of dy[block, (oc, bh, bw)] * patch[block, k]
    dw[oc, c, kh, kw]        = sum over bh, bw of product[(oc, bh, bw), (c, bh * SH + kh, bw * SW + kw)]
    db[oc]                   = sum over bh, bw and blocks of dy[block, (oc, bh, bw)]

A patch of x is read once for all pixels of the block that depend on it.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import shapes
from .._common import (
    INTERPRETED,
    OPTIONS,
    cdiv,
    compute_capability,
    index_type,
    input_precision,
    number_format,
    operand_type,
    place,
    reciprocal,
    round_to,
    strides,
)
from ..conv2d.patches import precision
from ..launching import planned, remembered
from ..tiles import clamped_power, flat_block, split_product
from .cut import FAR, Cut, candidates, in_index, readable
from .product import SIDES, column_of, rate, run_of


@triton.jit
def load_blocks(
    dy_ptr, y_ptr, y_rows, y_cols, row, col, bh, bw, mask_m, mask_i, OH, OW,
    BH: tl.constexpr, BW: tl.constexpr, EDGE_H: tl.constexpr, EDGE_W: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """dy of blocks, a block a row, each at (row, col) of its image; 0 past the image's end and where y is <= 0."""
    mask = mask_m[:, None] & mask_i[None, :]
    if EDGE_H:
        mask = mask & ((row * BH)[:, None] + bh[None, :] < OH)
    if EDGE_W:
        mask = mask & ((col * BW)[:, None] + bw[None, :] < OW)
    offs = y_rows[:, None] + y_cols[None, :]
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0)
    if RELU:
        dy = tl.where(tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32) <= 0, 0.0, dy)
    return dy


@triton.jit(do_not_specialize=["M", "per_split", "inverse_h", "inverse_w"])
def few_channels_weight_grad_kernel(
    dy_ptr, y_ptr, x_ptr, partial_ptr,
    M, per_split, H, length, OH, OW, blocks_h, blocks_w, inverse_h, inverse_w,
    stride_yn, stride_yc, stride_yh,
    stride_xn, stride_xc, stride_xh,
    OC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, STEP_H: tl.constexpr, STEP_E: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, PATCH_H: tl.constexpr, RUN: tl.constexpr, PLANES: tl.constexpr,
    UNIT: tl.constexpr, UNIT_Y: tl.constexpr, PIXELS_Y: tl.constexpr, EDGE_H: tl.constexpr, EDGE_W: tl.constexpr,
    LENGTH: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    stride_yn, stride_yc, stride_yh = in_index((stride_yn, stride_yc, stride_yh), UNIT_Y, INDEX)
    stride_xn, stride_xc, stride_xh = in_index((stride_xn, stride_xc, stride_xh), UNIT, INDEX)

    # GEMM: M = OC * BH * BW, N = PLANES * PATCH_H * RUN, K = N * blocks, of which each program takes per_split
    rows: tl.constexpr = OC * BH * BW
    tiles_n: tl.constexpr = LENGTH // BLOCK_N
    tiles_m: tl.constexpr = (rows + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0).to(INDEX)
    pid_n = pid % tiles_n
    i = pid // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    split = pid // tiles_n // tiles_m
    mask_i = i < rows
    oc, bh, bw = column_of(i, OC, BH, BW, PIXELS_Y)
    # Adjacent elements of dy, in forms that the compiler understands.
    if PIXELS_Y:
        inner: tl.constexpr = OC
        y_cols = bh * stride_yh + i % (OC * BW)
    else:
        inner: tl.constexpr = 1
        y_cols = oc * stride_yc + bh * stride_yh + bw
    k = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    plane, ph, e = run_of(k, PATCH_H, RUN)
    x_cols = plane * stride_xc + ph * stride_xh + e
    if LENGTH > PLANES * PATCH_H * RUN:
        ph = tl.where(plane < PLANES, ph, -FAR)
    most_h, most_e = tl.cast(H, tl.uint32), tl.cast(length * UNIT, tl.uint32)

    offs = tl.arange(0, BLOCK_K).to(INDEX)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * per_split
    last = tl.minimum(first + per_split, M)
    # Without this triton 3.6 lets every product on sm_90 wait for the one before.
    tl.assume(first < last)
    for m0 in range(first, last, BLOCK_K):
        m = m0 + offs
        mask_m = m < last
        n, row, col = place(m, blocks_w, blocks_h, inverse_w, inverse_h)
        y_rows = n * stride_yn + row * BH * stride_yh + col * BW * inner
        dy = load_blocks(
            dy_ptr, y_ptr, y_rows, y_cols, row, col, bh, bw, mask_m, mask_i, OH, OW, BH, BW, EDGE_H, EDGE_W, RELU
        )
        ih0, e0 = row * STEP_H - TOP, col * STEP_E - LEFT
        x_rows = x_ptr + (n * stride_xn + ih0 * stride_xh + e0)
        ih, ie = tl.where(mask_m, ih0, -FAR)[:, None] + ph[None, :], e0[:, None] + e[None, :]
        inside = (ih.to(tl.uint32) < most_h) & (ie.to(tl.uint32) < most_e)
        x = tl.load(x_rows[:, None] + x_cols[None, :], mask=inside, other=0.0)
        acc = tl.dot(tl.trans(dy.to(OPERAND)), x.to(OPERAND), acc, input_precision=PRECISION)

    partial_ptr += split * (rows * (LENGTH + HAS_BIAS))
    offs_p = i[:, None] * LENGTH + k[None, :]
    tl.store(partial_ptr + offs_p, acc, mask=mask_i[:, None])

    # A separate loop, in one column of programs: inside the product's loop the sum would read an operand that the next
    # copy may already have overwritten.
    if HAS_BIAS:
        if pid_n == 0:
            acc_b = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
            for m0 in range(first, last, BLOCK_K):
                m = m0 + offs
                n, row, col = place(m, blocks_w, blocks_h, inverse_w, inverse_h)
                y_rows = n * stride_yn + row * BH * stride_yh + col * BW * inner
                dy = load_blocks(
                    dy_ptr,
                    y_ptr,
                    y_rows,
                    y_cols,
                    row,
                    col,
                    bh,
                    bw,
                    m < last,
                    mask_i,
                    OH,
                    OW,
                    BH,
                    BW,
                    EDGE_H,
                    EDGE_W,
                    RELU,
                )
                acc_b += dy.to(tl.float32)
            tl.store(partial_ptr + rows * LENGTH + i, tl.sum(acc_b, axis=0), mask=mask_i)


@triton.jit(do_not_specialize=["SPLITS"])
def fold_few_weight_grad_kernel(
    partial_ptr, dw_ptr, db_ptr,
    SPLITS, numel_w, numel_b,
    stride_wo, stride_wc, stride_wh, stride_ww,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    OC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, PIXELS: tl.constexpr, PIXELS_Y: tl.constexpr,
    PATCH_H: tl.constexpr, RUN: tl.constexpr, SKIP: tl.constexpr, LENGTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # Each element adds up SPLITS * BH * BW terms, BLOCK_S at a time.
    offs = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    kw, kh, c, oc = offs % KW, offs // KW % KH, offs // (KW * KH) % C, offs // (KW * KH * C)
    is_weight = offs < numel_w
    oc = tl.where(is_weight, oc, offs - numel_w)
    mask = offs < numel_w + numel_b

    terms = tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK, BLOCK_S), tl.float32)
    for t0 in range(0, SPLITS * BH * BW, BLOCK_S):
        t = t0 + terms
        bw, bh, split = t % BW, t // BW % BH, t // (BW * BH)
        if PIXELS_Y:
            i = (bh * BW + bw)[None, :] * OC + oc[:, None]
        else:
            i = (oc * (BH * BW))[:, None] + (bh * BW + bw)[None, :]
        ph, pw = kh[:, None] + (bh * SH)[None, :], kw[:, None] + (bw * SW)[None, :]
        if PIXELS:
            k = ph * RUN + SKIP + pw * C + c[:, None]
        else:
            k = (c[:, None] * PATCH_H + ph) * RUN + SKIP + pw
        k = tl.where(is_weight[:, None], i * LENGTH + k, OC * BH * BW * LENGTH + i)
        offs_p = split.to(INDEX)[None, :] * (OC * BH * BW * (LENGTH + HAS_BIAS)) + k
        acc += tl.load(partial_ptr + offs_p, mask=mask[:, None] & (split < SPLITS)[None, :], other=0.0)

    total = tl.sum(acc, axis=1)
    w_offs = oc * stride_wo + c * stride_wc + kh * stride_wh + kw * stride_ww
    tl.store(dw_ptr + w_offs, round_to(total, dw_ptr.dtype.element_ty), mask=is_weight)
    tl.store(db_ptr + oc, round_to(total, db_ptr.dtype.element_ty), mask=mask & (offs >= numel_w))


class Form(NamedTuple):
    """What is launched: the Cut, the length of a patch as a multiple of the tile's side, and the tile."""

    cut: Cut
    length: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int

    @property
    def blocks(self):
        return {"BLOCK_M": self.BLOCK_M, "BLOCK_N": self.BLOCK_N, "BLOCK_K": self.BLOCK_K}


@remembered
def _form(format, itemsize, channels, result, size, kernel, stride, padding, pixels, pixels_y, unit, unit_y):
    """The Form that takes the least cycles by the model of product.form_for; `size` is that of dy."""
    forms = []
    for cut in candidates(SIDES, False, channels, size, kernel, stride, padding, pixels, unit):
        rows = result * cut.BH * cut.BW
        # In tf32 wgmma, which takes 64 rows, cannot read operands in this order.
        m = clamped_power(rows, 16, 32 if format == "tf32" else 64)
        n = clamped_power(cut.length, 16, {"half": 256, "tf32": 128, "ieee": 4096 // m}[format])
        tiles_n = cdiv(cut.length, n)
        tiles, together = cdiv(rows, m) * tiles_n, math.gcd(cut.BW * (result if pixels_y else 1), unit_y)
        instructions, bytes = 10 * (m / together + n / cut.UNIT), 2 * itemsize * (m + n)
        half_rate = format == "tf32" or format == "half" and m < 64
        products = 2 * m * n / rate(format, m, n) * (1 + half_rate)
        blocks = math.prod(cut.blocks(size))
        form = Form(cut, tiles_n * n, m, n, 64 if format == "half" else 32)
        forms.append((blocks * tiles * ((instructions + bytes) / 128 + products), form))
    return min(forms, key=lambda pair: pair[0])[1]


def _split(form, OC, M):
    """(tiles, programs for each tile, blocks of pixels for each program)."""
    cut = form.cut
    tiles = cdiv(OC * cut.BH * cut.BW, form.BLOCK_M) * (form.length // form.BLOCK_N)
    return tiles, *split_product(tiles, M, form.BLOCK_K, form.BLOCK_M * form.BLOCK_N)


@planned(few_channels_weight_grad_kernel)
def _product(dy, y, x, partial, form, pixels, pixels_y, unit_y, with_bias, precision):
    (N, OC, OH, OW), (_, C, H, W), cut = dy.shape, x.shape, form.cut
    rows, cols = cut.blocks((OH, OW))
    M, index, row = N * rows * cols, index_type(dy, x, partial), W * C if pixels else W
    tiles, splits, per_split = _split(form, OC, M)
    row, *steps = (n // cut.UNIT for n in (row, *strides(x)[:3]))
    numbers = M, per_split, H, row, OH, OW, rows, cols, reciprocal(rows), reciprocal(cols)
    steps_y = [n // unit_y for n in strides(dy)[:3]]
    return (tiles * splits,), (*numbers, *steps_y, *steps), dict(
        OC=OC, **cut.constants((OH, OW), "PLANES"), UNIT_Y=unit_y, PIXELS_Y=pixels_y, LENGTH=form.length,
        HAS_BIAS=with_bias, RELU=y is not None,
        INDEX=index, OPERAND=operand_type(x.dtype), PRECISION=input_precision(x.dtype, precision),
        **form.blocks, num_warps=8 if form.BLOCK_N == 256 or index == tl.int64 else 4,
        # On sm_90 a masked operand is in registers, which a pipelined loop would overwrite while wgmma reads them. The
        # shared memory of AMD's cards holds the operands of one iteration.
        num_stages=1 if y is not None else 3 if INTERPRETED or compute_capability() else 2, **OPTIONS,
    )  # fmt: skip


@planned(fold_few_weight_grad_kernel)
def _fold(partial, dw, db, form, pixels, pixels_y, stride, splits):
    (OC, C, KH, KW), cut, numel = dw.shape, form.cut, dw.numel() + db.numel()
    # Triton limits BLOCK * BLOCK_S to 2^20 elements.
    block = min(2**14, flat_block(numel, 32))
    return (cdiv(numel, block),), (splits, dw.numel(), db.numel(), *dw.stride()), dict(
        C=C, KH=KH, KW=KW, SH=stride[0], SW=stride[1], OC=OC, BH=cut.BH, BW=cut.BW, PIXELS=pixels, PIXELS_Y=pixels_y,
        PATCH_H=cut.PATCH_H, RUN=cut.RUN, SKIP=cut.SKIP, LENGTH=form.length, HAS_BIAS=db.numel() > 0,
        INDEX=index_type(partial, dw), BLOCK=block, BLOCK_S=32, num_warps=4, **OPTIONS,
    )  # fmt: skip


def weight_grad(dy, x, size, stride, padding, with_bias, y=None):
    """dy (N, OC, OH, OW), x (N, C, H, W) -> dw of `size` (OC, C, KH, KW) and db (OC), empty without `with_bias`.

    y is the result of a relu after the convolution: dy counts only where y is not <= 0.
    """
    dw, db = shapes.conv2d_weight_grad(dy if y is None else y, x, size, with_bias)
    if dw.numel() == 0:
        return dw, db
    N, OC, OH, OW = dy.shape
    if N * OH * OW == 0:
        return dw.zero_(), db.zero_()
    if y is not None:
        layout = shapes.memory_format(y)
        dy, y = dy.contiguous(memory_format=layout), y.contiguous(memory_format=layout)
    (dy, pixels_y, unit_y), (x, pixels, unit) = (readable(t, innermost=False) for t in (dy, x))
    products = precision()
    form = _form(
        number_format(dy.dtype, products), dy.itemsize, x.shape[1], OC, (OH, OW), tuple(size[2:]), stride, padding,
        pixels, pixels_y, unit, unit_y,
    )  # fmt: skip
    rows, cols = form.cut.blocks((OH, OW))
    _, splits, _ = _split(form, OC, N * rows * cols)
    numel = splits * OC * form.cut.BH * form.cut.BW * (form.length + with_bias)
    partial = dy.new_empty(numel, dtype=torch.float32)
    _product((dy, y, x, partial), form, pixels, pixels_y, unit_y, with_bias, products)
    _fold((partial, dw, db), form, pixels, pixels_y, stride, splits)
    return dw, db
