"""The weight and bias gradients of a convolution as a matrix product over all pixels, split between programs.

    dw[oc, c, kh, kw] = sum over n, oh, ow of dy[n, oc, oh, ow] * x[n, c, ih, iw],    db[oc] = sum of dy
    and after a relu both without the dy where y <= 0

    with ih = oh * SH - PH + kh * DH and iw = ow * SW - PW + kw * DW

C and OC count the channels of one group. The programs of a split write partial sums, which reduce.py adds up.
"""

import math

import triton
import triton.language as tl

from .. import shapes
from .._common import cached_for_architecture, cdiv, in_units, index_type, product_types, round_to, strides
from ..launching import planned
from ..reduce import Partials
from ..tiles import SQUARE, gradient_tiles, split_product, wants_k_inner
from .padding import PAD_MODES, source
from .patches import FLAT_BELOW, channels_inner, in_elements, precision, tile_for

# The most columns, C * KH * KW, that fit one tile of the weight gradient: the width of SQUARE's narrowest.
ONE_TILE = 32


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
    stride_yn, stride_yc, stride_yh, stride_yw = in_elements((stride_yn, stride_yc, stride_yh, stride_yw), UNITS, 0)
    stride_xn, stride_xc, stride_xh, stride_xw = in_elements((stride_xn, stride_xc, stride_xh, stride_xw), UNITS, 4)

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
        # Otherwise triton 3.6.0 waits for each product before the next; no share of split_product is empty.
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

    # A separate loop, in one column of programs: inside the product's loop it would stall the matrix unit.
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
    """(Tile, tiles of dw, programs for each tile, pixels for each program)."""
    OC, C, KH, KW = size
    OC, flat = OC // groups, C < FLAT_BELOW
    # Two warps have registers for the addresses of 64 columns at most, and none for those of a flat index.
    table, narrow = SQUARE if flat else gradient_tiles(), flat or wants_k_inner(dtype, precision)
    tile = tile_for(table, OC, C * KH * KW if flat else C, K, dtype, precision, index, flat, narrow)
    tiles_n = cdiv(C * KH * KW, tile.N) if flat else KH * KW * cdiv(C, tile.N)
    tiles = cdiv(OC, tile.M) * tiles_n * groups
    return tile, tiles, *split_product(tiles, K, tile.K, tile.M * tile.N)


def masks(size):
    """Whether weight_grad applies the mask y > 0 itself, for weights of `size`, if nothing else needs a masked dy.

    relu_grad reads dy and y and writes a copy, which is read again: 4 times the bytes of y. A program with all columns,
    C * KH * KW, reads dy and y: 2 times. With more columns each tile reads both again and masks in registers: by
    bench/machine_code/bounds.py such 128 x 128 products take 1.2 to 1.4 times as long. And on sm_90 the registers of
    64 or more masked rows are overwritten by the next iteration while wgmma reads them (bench/machine_code/ttgir.py).
    A single tile of columns has 32 rows, too few for wgmma.
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
    """dy (N, OC, OH, OW), x (N, C, H, W) -> dw of `size` (OC, C / groups, KH, KW), db (OC), empty without `with_bias`.

    y is the result of a relu after the convolution: dy counts only where y > 0. It is for sizes with masks(size).
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
    # The number of programs does not depend on the index type, which the buffer of partial sums may change.
    splits = _split(N * OH * OW, size, groups, dy.dtype, products, tl.int32)[2]
    partials = Partials(splits, dw, db)
    dw_ptr, db_ptr, stride_split = partials.pointers
    geometry = stride, padding, dilation, groups, pad_mode
    _weight_grad((dy, y, x, dw_ptr, db_ptr), size, tuple(strides(dw)), stride_split, *geometry, with_bias, products)
    return partials.add_up()
