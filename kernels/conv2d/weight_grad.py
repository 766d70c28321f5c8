"""The weight and bias gradients of a convolution as a matrix product over all pixels, split between programs.

    dw[oc, c, kh, kw] = sum over n, oh, ow of dy[n, oc, oh, ow] * x[n, c, ih, iw],    db[oc] = sum of dy
    and after a relu both without the dy where y <= 0

    with ih = oh * SH - PH + kh * DH and iw = ow * SW - PW + kw * DW

C and OC count the channels of one group. The programs of a split write partial sums, which reduce.py adds up.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from .. import product, shapes
from .._common import (
    cached_for_architecture,
    compute_capability,
    extent,
    first_column,
    in_units,
    index_type,
    number_format,
    product_types,
    round_to,
    strides,
)
from ..launching import planned
from ..reduce import Partials
from ..tile_tables import NARROW, Tile
from ..tiles import gradient_tile
from . import patches
from .padding import PAD_MODES, source
from .patches import in_elements
from .shared_taps import all_taps, some_taps

# How many taps may share a block of dy; and the filters whose taps may all be computed by one program.
MOST_SHARED, WHOLE = 3, (3, 3)
# The columns of the narrowest tile: where elements are loaded one by one, the addresses of more would spill registers.
NARROWEST = 32
# The most columns, C * KH * KW, of a convolution whose weight gradient masks dy itself: too few rows for wgmma.
ONE_TILE = 32


@triton.jit
def add_gathered(
    dy_ptr, y_ptr, x_ptr, y_rows, x_cols, kh, kw, mask_m, mask_n, first, last, H, W, OH, OW,
    stride_yn, stride_yh, stride_yw, stride_xn, stride_xh, stride_xw,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAD_MODE: tl.constexpr, RELU: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The product of dy and x over the pixels `first` to `last`, with the address of every pixel computed anew."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if OPERAND.primitive_bitwidth == 16:
        tl.assume(first < last)
    for k0 in range(first, last, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K).to(INDEX)
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
    return acc


@triton.jit
def sum_of_dy(
    dy_ptr, y_ptr, y_rows, mask_m, first, last, rows, OH, OW, stride_yn, stride_yh, stride_yw,
    RELU: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum of dy over the pixels `first` to `last` of images with so many rows, of which dy has OH.

    In the loop of the products it would stall the matrix unit, and tf32 has too few bits for a product with ones.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    for k0 in range(first, last, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K).to(INDEX)
        oh = k // OW % rows
        y_offs = y_rows[:, None] + (k // OW // rows * stride_yn + oh * stride_yh + k % OW * stride_yw)[None, :]
        mask = mask_m[:, None] & ((k < last) & (oh < OH))[None, :]
        dy = tl.load(dy_ptr + y_offs, mask=mask, other=0.0).to(ACC)
        if RELU:
            y = tl.load(y_ptr + y_offs, mask=mask, other=0.0)
            dy = tl.where(y.to(ACC) <= 0, 0.0, dy)
        acc += dy
    return tl.sum(acc, axis=1)


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
    WALK: tl.constexpr, TAPS: tl.constexpr, GROUPS: tl.constexpr, UNITS: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    stride_yn, stride_yc, stride_yh, stride_yw = in_elements((stride_yn, stride_yc, stride_yh, stride_yw), UNITS, 0)
    stride_xn, stride_xc, stride_xh, stride_xw = in_elements((stride_xn, stride_xc, stride_xh, stride_xw), UNITS, 4)
    stride_wo, stride_wc, stride_wh, stride_ww = in_elements((stride_wo, stride_wc, stride_wh, stride_ww), UNITS, 8)

    # GEMM: M = OC, N = C * KH * KW, K = N * OH * OW, of which each program takes per_split pixels
    pid = tl.program_id(0).to(INDEX)
    blocks_c: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    blocks_t: tl.constexpr = (KH * KW + TAPS - 1) // TAPS
    tiles_n: tl.constexpr = (C * KH * KW + BLOCK_N - 1) // BLOCK_N if WALK == "flat" else blocks_t * blocks_c
    tiles_m: tl.constexpr = (OC + BLOCK_M - 1) // BLOCK_M
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n % tiles_m
    group = pid // tiles_n // tiles_m % GROUPS
    split = pid // tiles_n // tiles_m // GROUPS

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tap = (pid_n // blocks_c * TAPS).to(tl.int32)
    if WALK == "flat":
        j = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        c, kh, kw = j // (KH * KW), (j // KW % KH)[None, :], (j % KW)[None, :]
    else:
        c, kh, kw = pid_n % blocks_c * BLOCK_N + tl.arange(0, BLOCK_N), tap // KW, tap % KW
    mask_m, mask_n = offs_m < OC, c < C
    first = split * per_split
    last = tl.minimum(first + per_split, K)

    dy_ptr += group * OC * stride_yc
    y_ptr += group * OC * stride_yc
    x_ptr += group * C * stride_xc
    dw_ptr += split * stride_split + group * OC * stride_wo
    db_ptr += split * stride_split + group * OC
    w_offs = (offs_m * stride_wo)[:, None] + c[None, :] * stride_wc
    mask_w = mask_m[:, None] & mask_n[None, :]

    SUM: tl.constexpr = HAS_BIAS and (WALK == "taps" or WALK == "whole") and OPERAND.primitive_bitwidth == 16
    if WALK == "taps" or WALK == "whole":
        y_ptrs, x_ptrs = dy_ptr + (offs_m % OC)[:, None], x_ptr + (c % C)[None, :]
        if WALK == "taps":
            accs, acc_b = some_taps(
                y_ptrs, x_ptrs, tap, first, last, H, W, OH, OW, stride_yw, stride_xn, stride_xh, stride_xw,
                KH, KW, SH, SW, PH, PW, DH, DW, SUM, TAPS, INDEX, OPERAND, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            accs, acc_b = all_taps(
                y_ptrs, x_ptrs, first, last, H, W, OH, OW,
                stride_yn, stride_yh, stride_yw, stride_xn, stride_xh, stride_xw,
                KH, KW, PH, PW, DH, DW, SUM, INDEX, OPERAND, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        for t in tl.static_range(TAPS):
            ptrs = dw_ptr + w_offs + ((tap + t) // KW * stride_wh + (tap + t) % KW * stride_ww)
            tl.store(ptrs, round_to(accs[t], dw_ptr.dtype.element_ty), mask=mask_w & (tap + t < KH * KW))
        if SUM:
            db = round_to(first_column(acc_b), db_ptr.dtype.element_ty)
            tl.store(db_ptr + offs_m, db, mask=mask_m & (pid_n == 0))
    else:
        acc = add_gathered(
            dy_ptr, y_ptr, x_ptr, offs_m * stride_yc, c * stride_xc, kh, kw, mask_m, mask_n, first, last, H, W, OH, OW,
            stride_yn, stride_yh, stride_yw, stride_xn, stride_xh, stride_xw,
            SH, SW, PH, PW, DH, DW, PAD_MODE, RELU, INDEX, OPERAND, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        w_ptrs = dw_ptr + w_offs + kh * stride_wh + kw * stride_ww
        tl.store(w_ptrs, round_to(acc, dw_ptr.dtype.element_ty), mask=mask_w)

    # In one column of programs.
    if HAS_BIAS and not SUM:
        if pid_n == 0:
            db = sum_of_dy(
                dy_ptr, y_ptr, offs_m * stride_yc, mask_m, first, last,
                OH + (KH - 1) * DH if WALK == "whole" else OH, OH, OW, stride_yn, stride_yh, stride_yw,
                RELU, INDEX, ACC, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            tl.store(db_ptr + offs_m, round_to(db, db_ptr.dtype.element_ty), mask=mask_m)


class Split(NamedTuple):
    """How a weight gradient is computed.

    Attributes:
        walk: over columns, see patches.walk_for; "whole" for all taps by one program.
        step: elements from a pixel of dy to the next, if all follow each other at one distance.
        pixels: of the sum.
        tile, tiles, splits, per_split: what tiles.gradient_tile gives.
    """

    walk: str
    step: int
    pixels: int
    tile: Tile
    tiles: int
    splits: int
    per_split: int


@cached_for_architecture
def _split(dy_size, dy_steps, x_size, x_steps, size, stride, dilation, groups, pad_mode, masked, dtype, precision):
    """The Split for tensors with these sizes and strides, where dy is `masked` by a relu or not."""
    (images, _, OH, OW), (OC, C, KH, KW) = dy_size, size
    step = dy_steps[3] if OW > 1 else dy_steps[2] if OH > 1 else dy_steps[0]
    even = (OH == 1 or dy_steps[2] == OW * step) and (images == 1 or dy_steps[0] == OH * OW * step)
    walk = patches.walk_for(C, KH, KW, pad_mode)
    if walk == "taps" and (masked or not even):
        walk = "patches"
    aligned = all(patches.is_aligned(*t, dtype.itemsize) for t in ((dy_size, dy_steps), (x_size, x_steps)))
    # Where addresses take few registers, several taps share a block of dy.
    shared = walk == "taps" and aligned
    K, padded = images * OH * OW, images * (OH + (KH - 1) * dilation[0]) * OW
    if walk == "flat":
        found = gradient_tile("flat gradient", OC // groups, C * KH * KW, K, dtype, precision, repeats=groups)
        return Split(walk, step, K, *found)
    # Two warps, in tf32 on sm_90, have registers for the addresses of NARROW columns at most.
    two_warps = number_format(dtype, precision) == "tf32" and compute_capability() == 9
    found = gradient_tile(
        "gradient" if shared else "gathered gradient", OC // groups, C, K, dtype, precision,
        taps=KH * KW, most_taps=MOST_SHARED if shared else 1,
        padded=padded if shared and (KH, KW) == WHOLE and stride == (1, 1) else None,
        repeats=groups, narrow=NARROWEST if not aligned else NARROW if two_warps else math.inf,
    )  # fmt: skip
    whole = found[0].taps > MOST_SHARED
    return Split("whole" if whole else walk, step, padded if whole else K, *found)


def _split_of(dy, y, x, size, stride, dilation, groups, pad_mode, precision):
    of_tensors = dy.shape, dy.stride(), x.shape, x.stride()
    return _split(*of_tensors, size, stride, dilation, groups, pad_mode, y is not None, dy.dtype, precision)


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
    (_, OC, OH, OW), (_, C, KH, KW), (H, W) = dy.shape, size, x.shape[2:]
    reach = patches.reach((H, W), (OH, OW), (KH, KW), stride, padding, dilation)
    index = index_type(dy, x, dw_ptr, reach=max(extent(dy, *reach), extent(x, *reach)))
    split = _split_of(dy, y, x, size, stride, dilation, groups, pad_mode, precision)
    tile, steps_y = patches.fitted(split.tile, index, split.walk == "flat"), strides(dy)
    if split.walk == "taps":
        steps_y[3] = split.step
    steps, units = in_units(dy.itemsize, *steps_y, *strides(x), *w_strides)
    numbers = split.pixels, split.per_split, H, W, OH, OW, *steps, stride_split
    return (split.tiles * split.splits,), numbers, dict(
        C=C, OC=OC // groups, KH=KH, KW=KW,
        SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[2], DH=dilation[0], DW=dilation[1],
        PAD_MODE=PAD_MODES[pad_mode], HAS_BIAS=with_bias, RELU=y is not None,
        WALK=split.walk, TAPS=tile.taps, GROUPS=groups, UNITS=units,
        INDEX=index, **product_types(dy.dtype, precision),
        **tile.blocks, **tile.options,
    )  # fmt: skip


def weight_grad(dy, x, size, stride, padding, dilation, groups, pad_mode, with_bias, y=None, grads=None):
    """dy (N, OC, OH, OW), x (N, C, H, W) -> dw of `size` (OC, C / groups, KH, KW), db (OC), empty without `with_bias`.

    y is the result of a relu after the convolution: dy counts only where y > 0. It is for sizes with masks(size).
    `grads`, dw and db, are allocated here unless they are given.
    """
    dw, db = shapes.conv2d_weight_grad(dy if y is None else y, x, size, with_bias) if grads is None else grads
    if dw.numel() == 0:
        return dw, db
    N, _, OH, OW = dy.shape
    if N * OH * OW == 0:
        return dw.zero_(), db.zero_()
    if size[1] >= patches.FLAT_BELOW:
        dy, x = patches.channels_inner(dy), patches.channels_inner(x)
    if y is not None:
        layout = shapes.memory_format(y)
        dy, y = dy.contiguous(memory_format=layout), y.contiguous(memory_format=layout)
    size, products = tuple(size), patches.precision()
    if y is None and patches.is_product(size, stride, padding, groups):
        a, b = patches.as_matrix(dy), patches.as_matrix(x)
        if a is not None and b is not None and product.serves_weight_grad(a, b, products):
            return product.weight_grad(a, b, dw, db, with_bias, products)
    split = _split_of(dy, y, x, size, stride, dilation, groups, pad_mode, products)
    partials = Partials(split.splits, dw, db)
    dw_ptr, db_ptr, stride_split = partials.pointers
    geometry = stride, padding, dilation, groups, pad_mode
    _weight_grad((dy, y, x, dw_ptr, db_ptr), size, tuple(strides(dw)), stride_split, *geometry, with_bias, products)
    return partials.add_up()
