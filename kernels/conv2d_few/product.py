"""Forward and input gradient of convolutions with few channels as one matrix product; cut.py has the blocks.

    out[block, (c, bh, bw)] = epilogue(sum over k of patch[block, k] * placed[(c, bh, bw), k])

Forward: patches of x, and placed[(oc, bh, bw), (c, ph, pw)] = w[oc, c, ph - bh * SH, pw - bw * SW]
Input gradient: patches of dy, and placed[(c, bh, bw), (oc, ph, pw)] = w[oc, c, kh, kw], where kh and kw are those with
which the pixel (bh, bw) of the block contributes to the pixel (ph, pw) of the patch

placed is 0 where no element of the filter stands, so that one patch serves a whole block of pixels.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from .._common import (
    INTERPRETED,
    OPTIONS,
    cdiv,
    compute_capability,
    index_type,
    input_precision,
    operand_type,
    place,
    reciprocal,
    round_to,
    strides,
)
from ..epilogue import constant, finished, in_parts, of_channels, parts_for
from ..launching import planned, remembered
from ..tiles import RESIDENT, Tile, clamped_power, flat_block
from .cut import FAR, Cut, candidates, in_index


@triton.jit
def column_of(j, CO: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, PIXELS_OUT: tl.constexpr):
    """(c, bh, bw) of the columns j, in the memory order of the result."""
    if PIXELS_OUT:
        return j % CO, j // (CO * BW), j // CO % BW
    else:
        return j // (BH * BW), j // BW % BH, j % BW


@triton.jit
def run_of(k, PATCH_H: tl.constexpr, RUN: tl.constexpr):
    """(plane, row of the patch, element of the run) of the elements k of a patch."""
    return k // (RUN * PATCH_H), k // RUN % PATCH_H, k % RUN


@triton.jit
def place_few_filters_kernel(
    w_ptr, placed_ptr,
    numel,
    stride_wo, stride_wi, stride_wh, stride_ww,
    CI: tl.constexpr, CO: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    OF_BLOCK_H: tl.constexpr, OF_PATCH_H: tl.constexpr, FIRST_H: tl.constexpr,
    OF_BLOCK_W: tl.constexpr, OF_PATCH_W: tl.constexpr, FIRST_W: tl.constexpr,
    PIXELS: tl.constexpr, PIXELS_OUT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    PATCH_H: tl.constexpr, RUN: tl.constexpr, PLANES: tl.constexpr, SKIP: tl.constexpr, LENGTH: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # placed (columns, LENGTH); the strides wo and wi are those of the result's and of the image's channels
    offs = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    plane, ph, e = run_of(offs % LENGTH, PATCH_H, RUN)
    co, bh, bw = column_of(offs // LENGTH, CO, BH, BW, PIXELS_OUT)
    e -= SKIP
    if PIXELS:
        ci, pw = e % CI, e // CI
    else:
        ci, pw = plane, e

    kh = bh * OF_BLOCK_H + ph * OF_PATCH_H + FIRST_H
    kw = bw * OF_BLOCK_W + pw * OF_PATCH_W + FIRST_W
    stands = (e >= 0) & (plane < PLANES) & (co < CO) & (bh < BH) & (kh >= 0) & (kh < KH) & (kw >= 0) & (kw < KW)
    w_offs = co * stride_wo + ci * stride_wi + kh * stride_wh + kw * stride_ww
    tl.store(placed_ptr + offs, tl.load(w_ptr + w_offs, mask=mask & stands, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["M", "inverse_h", "inverse_w"])
def few_channels_product_kernel(
    image_ptr, placed_ptr, b_ptr, out_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, r_ptr,
    M, H, length, OH, OW, blocks_h, blocks_w, inverse_h, inverse_w,
    stride_in, stride_ic, stride_ih,
    stride_b,
    stride_on, stride_oc, stride_oh,
    CO: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, STEP_H: tl.constexpr, STEP_E: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, PATCH_H: tl.constexpr, RUN: tl.constexpr, PLANES: tl.constexpr,
    UNIT: tl.constexpr, UNIT_OUT: tl.constexpr, PIXELS_OUT: tl.constexpr, EDGE_H: tl.constexpr, EDGE_W: tl.constexpr,
    LENGTH: tl.constexpr, EPILOGUE: tl.constexpr, PARTS: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    stride_in, stride_ic, stride_ih = in_index((stride_in, stride_ic, stride_ih), UNIT, INDEX)
    stride_on, stride_oc, stride_oh = in_index((stride_on, stride_oc, stride_oh), UNIT_OUT, INDEX)

    # GEMM: M = N * blocks, N = CO * BH * BW, K = PLANES * PATCH_H * RUN
    tiles_n: tl.constexpr = (CO * BH * BW + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0).to(INDEX)
    offs_m = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    j = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    n, row, col = place(offs_m, blocks_w, blocks_h, inverse_w, inverse_h)

    ih0, e0 = row * STEP_H - TOP, col * STEP_E - LEFT
    # A sum of pointers, because the compiler would spread a sum of offsets over the loop.
    patches = image_ptr + (n * stride_in + ih0 * stride_ih + e0)
    # Rows of the image and of the product that do not exist are made so by a single comparison.
    ih0 = tl.where(mask_m, ih0, -FAR)
    most_h, most_e = tl.cast(H, tl.uint32), tl.cast(length * UNIT, tl.uint32)

    offs_k = tl.arange(0, BLOCK_K).to(INDEX)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, LENGTH, BLOCK_K):
        k = k0 + offs_k
        plane, ph, e = run_of(k, PATCH_H, RUN)
        offs = plane * stride_ic + ph * stride_ih + e
        if LENGTH > PLANES * PATCH_H * RUN:
            ph = tl.where(plane < PLANES, ph, -FAR)
        ih, ie = ih0[:, None] + ph[None, :], e0[:, None] + e[None, :]
        inside = (ih.to(tl.uint32) < most_h) & (ie.to(tl.uint32) < most_e)
        patch = tl.load(patches[:, None] + offs[None, :], mask=inside, other=0.0)
        placed = tl.load(placed_ptr + j[None, :] * LENGTH + k[:, None])
        acc = tl.dot(patch.to(OPERAND), placed.to(OPERAND), acc, input_precision=PRECISION)

    oh0, ow0 = row * BH, col * BW
    vectors = (b_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr)
    parts = in_parts(acc, PARTS)
    for part in tl.static_range(PARTS):
        j = pid % tiles_n * BLOCK_N + part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        co, bh, bw = column_of(j, CO, BH, BW, PIXELS_OUT)
        factor, summand = of_channels(vectors, stride_b, co, co < CO, EPILOGUE, tl.float32)
        mask = mask_m[:, None] & (j < CO * BH * BW)[None, :]
        if EDGE_H:
            mask = mask & (oh0[:, None] + bh[None, :] < OH)
        if EDGE_W:
            mask = mask & (ow0[:, None] + bw[None, :] < OW)
        # The result is dense; the compiler sees in these forms only that its elements are adjacent.
        if PIXELS_OUT:
            out_rows = n * stride_on + oh0 * stride_oh + ow0 * CO
            out_cols = bh * stride_oh + j % (CO * BW)
        else:
            out_rows = n * stride_on + oh0 * stride_oh + ow0
            out_cols = co * stride_oc + bh * stride_oh + bw
        out_offs = out_rows[:, None] + out_cols[None, :]
        out = finished(parts[part], factor[None, :], summand[None, :], r_ptr + out_offs, mask, EPILOGUE)
        tl.store(out_ptr + out_offs, round_to(out, out_ptr.dtype.element_ty), mask=mask)


class Form(NamedTuple):
    """What is launched: the Cut, the length of a patch and the columns as multiples of the tile's sides, and these."""

    cut: Cut
    length: int
    columns: int
    BLOCK_N: int
    BLOCK_K: int
    adjacent: int  # results that a thread can store at once
    cycles: float


# Pixels of a block along each dimension, in units of the stride for the input's gradient.
SIDES = range(1, 9)


def rate(format, m, n):
    """Floating-point operations of an SM in a cycle, for tiles of m x n.

    In full float32 the operands' loads from shared memory count: the fewer, the more sums a thread has.
    """
    return {"half": 4096, "tf32": 2048, "ieee": min(256, 32 * math.sqrt(m * n / 128))}[format]


@remembered
def form_for(format, itemsize, gradient, channels, result, size, kernel, stride, padding, pixels, pixels_out, unit):
    """The Form that takes the least cycles by a model; `size` is that of the result.

    The model adds up what a patch needs of an SM: a quarter cycle for 32 instructions, a cycle for 128 bytes through L1
    and shared memory, and its products. It was fitted to machine code for sm_90.
    """
    forms = []
    along = result if pixels_out else 1
    for cut in candidates(SIDES, gradient, channels, size, kernel, stride, padding, pixels, unit):
        wanted, adjacent = result * cut.BH * cut.BW, math.gcd(cut.BW * along, size[1] * along, 8)
        n = clamped_power(wanted, 16, 128 if format == "half" and adjacent > 1 else 64)
        k = 16 if format == "ieee" else 64 if format == "half" and cut.length >= 512 else 32
        columns, length = cdiv(wanted, n) * n, cdiv(cut.length, k) * k
        tiles, (rows, cols) = columns // n, cut.blocks(size)
        instructions = tiles * (10 * length + 16 * k) / cut.UNIT + columns * (2 + 8 / adjacent)
        bytes = itemsize * (length * (2 * tiles + columns / 40) + 3 * columns)
        cycles = rows * cols * ((instructions + bytes) / 128 + 2 * columns * length / rate(format, 4096 // n, n))
        forms.append(Form(cut, length, columns, n, k, adjacent, cycles))
    return min(forms, key=lambda form: form.cycles)


def _tile(form, M, index):
    """The Tile for M patches. The order of a sum does not depend on it."""
    n, k = form.BLOCK_N, form.BLOCK_K
    if INTERPRETED:
        return Tile(clamped_power(M // 3, 32, 4096), n, k, num_warps=4, num_stages=1)
    m = 256 if form.length >= 512 and M >= 256 * RESIDENT and compute_capability() == 9 else 128
    if form.BLOCK_K == 16:
        # Full float32: as many sums as a thread has registers for.
        m = min(4096 // n, 256 if compute_capability() == 9 else 128)
    # Sums, and addresses of loads and of stores, each in a thread's registers.
    many = m * n > 2**13 or m * k // form.cut.UNIT > 2**11 or m * n // form.adjacent > 2**12
    if compute_capability() != 9:
        many = many or m * n // form.adjacent > 2**11
    warps = 8 if many or index == tl.int64 else 4
    return Tile(m, n, k, warps, num_stages=1 if form.length <= 64 or form.cut.UNIT <= 2 else 3)


@planned(place_few_filters_kernel)
def place_filters(w, placed, form, gradient, pixels, pixels_out, taps):
    (OC, C, KH, KW), cut, block = w.shape, form.cut, flat_block(placed.numel(), 256)
    wo, wc, wh, ww = w.stride()
    (CO, CI, *steps) = (C, OC, wc, wo) if gradient else (OC, C, wo, wc)
    return (cdiv(placed.numel(), block),), (placed.numel(), *steps, wh, ww), dict(
        CI=CI, CO=CO, KH=KH, KW=KW, **taps._asdict(), PIXELS=pixels, PIXELS_OUT=pixels_out, BH=cut.BH, BW=cut.BW,
        PATCH_H=cut.PATCH_H, RUN=cut.RUN, PLANES=cut.PLANES, SKIP=cut.SKIP, LENGTH=form.length,
        INDEX=index_type(w, placed), BLOCK=block, num_warps=4, **OPTIONS,
    )  # fmt: skip


@planned(few_channels_product_kernel)
def convolve(
    image, placed, bias, out, mean, var, scale, shift, residual, form, pixels, pixels_out, values, precision
):  # fmt: skip
    (N, C, H, W), (_, CO, OH, OW), cut = image.shape, out.shape, form.cut
    rows, cols = cut.blocks((OH, OW))
    M, index, row = N * rows * cols, index_type(image, placed, bias, out), W * C if pixels else W
    tile = _tile(form, M, index)
    steps = strides(out)[:3]
    if pixels_out:
        steps[1] = 0  # that of the channels is 1, and not used
    unit_out = math.gcd(16 // out.itemsize, *steps)
    steps = [n // unit_out for n in steps]
    row, *steps_in = (n // cut.UNIT for n in (row, *strides(image)[:3]))
    epilogue = constant(bias, mean, var, scale, shift, residual, *values)
    numbers = M, H, row, OH, OW, rows, cols, reciprocal(rows), reciprocal(cols), *steps_in
    numbers += 0 if bias is None else bias.stride(0), *steps
    return (cdiv(M, tile.M) * (form.columns // tile.N),), numbers, dict(
        CO=CO, **cut.constants((OH, OW), "PLANES"), UNIT_OUT=unit_out, PIXELS_OUT=pixels_out,
        LENGTH=form.length, EPILOGUE=epilogue, PARTS=parts_for(tile, epilogue),
        INDEX=index, OPERAND=operand_type(image.dtype), PRECISION=input_precision(image.dtype, precision),
        **tile.blocks, **tile.options,
    )  # fmt: skip
