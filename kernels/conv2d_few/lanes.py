"""Forward and input gradient of convolutions with few channels in full float32: FMA in each thread's registers.

The formula, and the filters' places in a patch, are those of product.py, but no zeros are multiplied: a thread has a
block of pixels of the result, for BLOCK_C channels at a time. It reads its patch row by row, and adds the products of
a row with all filters before it reads the next. Images have their rows' pixels adjacent, channel by channel.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from .._common import INTERPRETED, OPTIONS, cdiv, index_type, named_strides, place, reciprocal, strides
from ..epilogue import constant, finished, of_channels
from ..launching import planned, remembered
from .cut import FAR, Cut, candidates, in_index, least_block


@triton.jit
def load_row(ptrs, e0, inside, most_e, RUN: tl.constexpr, UNIT: tl.constexpr):
    """The elements of a run of each patch as a tuple of vectors over the patches; 0 where they are not `inside`."""
    elements = ()
    for e in tl.static_range(0, RUN, UNIT):
        mask = inside & ((e0 + e).to(tl.uint32) < most_e)
        if UNIT == 1:
            elements = elements + (tl.load(ptrs + e, mask=mask, other=0.0),)
        else:
            vector = tl.load(ptrs[:, None] + (e + tl.arange(0, UNIT))[None, :], mask=mask[:, None], other=0.0)
            if UNIT == 2:
                elements = elements + tl.split(vector)
            else:
                even, odd = tl.split(tl.reshape(vector, (vector.shape[0], 2, 2)))
                x0, x2 = tl.split(even)
                x1, x3 = tl.split(odd)
                elements = elements + (x0, x1, x2, x3)
    return elements


@triton.jit
def add_row(
    sums, row, w_ptr, first: tl.constexpr,
    stride_ww: tl.constexpr, KW: tl.constexpr, BW: tl.constexpr,
    OF_BLOCK_W: tl.constexpr, OF_PATCH_W: tl.constexpr, FIRST_W: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """sums, of which BW from `first` on are those of a row of the block, plus the products with one row of a filter."""
    for kw in tl.static_range(KW):
        w = tl.load(w_ptr + kw * stride_ww)
        for bw in tl.static_range(BW):
            if (kw - bw * OF_BLOCK_W - FIRST_W) % OF_PATCH_W == 0:
                pixel = row[SKIP + (kw - bw * OF_BLOCK_W - FIRST_W) // OF_PATCH_W]
                total = tl.fma(pixel, w, sums[first + bw])
                sums = sums[: first + bw] + (total,) + sums[first + bw + 1 :]
    return sums


@triton.jit(do_not_specialize=["M", "inverse_h", "inverse_w"])
def few_channels_lanes_kernel(
    image_ptr, w_ptr, b_ptr, out_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, r_ptr,
    M, H, width, OH, OW, blocks_h, blocks_w, inverse_h, inverse_w,
    stride_in, stride_ic, stride_ih,
    stride_b,
    stride_on, stride_oc, stride_oh,
    stride_wo: tl.constexpr, stride_wi: tl.constexpr, stride_wh: tl.constexpr, stride_ww: tl.constexpr,
    CI: tl.constexpr, CO: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    OF_BLOCK_H: tl.constexpr, OF_PATCH_H: tl.constexpr, FIRST_H: tl.constexpr,
    OF_BLOCK_W: tl.constexpr, OF_PATCH_W: tl.constexpr, FIRST_W: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, STEP_H: tl.constexpr, STEP_E: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, PATCH_H: tl.constexpr, RUN: tl.constexpr, SKIP: tl.constexpr,
    UNIT: tl.constexpr, UNIT_OUT: tl.constexpr, EDGE_H: tl.constexpr, EDGE_W: tl.constexpr,
    EPILOGUE: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    stride_in, stride_ic, stride_ih = in_index((stride_in, stride_ic, stride_ih), UNIT, INDEX)
    stride_on, stride_oc, stride_oh = in_index((stride_on, stride_oc, stride_oh), UNIT_OUT, INDEX)

    # One block an element, for BLOCK_C channels.
    chunks: tl.constexpr = (CO + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0).to(INDEX)
    c0 = pid % chunks * BLOCK_C
    offs_m = pid // chunks * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    n, row, col = place(offs_m, blocks_w, blocks_h, inverse_w, inverse_h)
    ih0, e0 = row * STEP_H - TOP, col * STEP_E - LEFT
    x_offs = n * stride_in + ih0 * stride_ih + e0
    ih0 = tl.where(mask_m, ih0, -FAR)
    most_h, most_e = tl.cast(H, tl.uint32), tl.cast(width * UNIT, tl.uint32)

    sums = ()
    for _ in tl.static_range(BLOCK_C * BH * BW):
        sums = sums + (tl.zeros((BLOCK_M,), tl.float32),)

    for ci in range(CI):
        # Scalar pointers advance: AMD's compiler passes take minutes for vectors of changing pointers.
        c_ptr = image_ptr + tl.cast(ci, INDEX) * stride_ic
        for ph in tl.static_range(PATCH_H):
            inside = (ih0 + ph).to(tl.uint32) < most_h
            pixels = load_row(c_ptr + ph * stride_ih + x_offs, e0, inside, most_e, RUN, UNIT)
            for o in tl.static_range(BLOCK_C):
                # The last channels again if BLOCK_C does not divide them.
                f_ptr = w_ptr + (tl.minimum(c0 + o, CO - 1) * stride_wo + tl.cast(ci, INDEX) * stride_wi)
                for bh in tl.static_range(BH):
                    if (
                        bh * OF_BLOCK_H + ph * OF_PATCH_H + FIRST_H >= 0
                        and bh * OF_BLOCK_H + ph * OF_PATCH_H + FIRST_H < KH
                    ):
                        sums = add_row(
                            sums, pixels, f_ptr + (bh * OF_BLOCK_H + ph * OF_PATCH_H + FIRST_H) * stride_wh,
                            (o * BH + bh) * BW,
                            stride_ww, KW, BW, OF_BLOCK_W, OF_PATCH_W, FIRST_W, SKIP,
                        )  # fmt: skip

    oh0, ow0 = row * BH, col * BW
    vectors = (b_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr)
    for o in tl.static_range(BLOCK_C):
        channel = tl.full((1,), 0, INDEX) + tl.minimum(c0 + o, CO - 1)
        factor, summand = of_channels(vectors, stride_b, channel, channel < CO, EPILOGUE, tl.float32)
        for bh in tl.static_range(BH):
            offs = n * stride_on + (c0 + o) * stride_oc + (oh0 + bh) * stride_oh + ow0
            mask = mask_m
            if CO % BLOCK_C != 0:
                mask = mask & (c0 + o < CO)
            if EDGE_H:
                mask = mask & (oh0 + bh < OH)
            for bw in tl.static_range(0, BW, 4 if BW % 4 == 0 else 2 if BW % 2 == 0 else 1):
                row_sums = sums[(o * BH + bh) * BW + bw : (o * BH + bh) * BW + BW]
                if BW % 2 == 0:
                    z = tl.join(row_sums[0], row_sums[1])
                    if BW % 4 == 0:
                        z = tl.join(z, tl.join(row_sums[2], row_sums[3]))
                        z = tl.reshape(tl.permute(z, (0, 2, 1)), (BLOCK_M, 4))
                    adjacent = bw + tl.arange(0, z.shape[1])
                    if EDGE_W:
                        inner = mask[:, None] & (ow0[:, None] + adjacent[None, :] < OW)
                    else:
                        inner = mask[:, None]
                    out_offs = offs[:, None] + adjacent[None, :]
                else:
                    z, inner, out_offs = row_sums[0], mask & (ow0 + bw < OW), offs + bw
                if BW % 2 == 0:
                    y = finished(z, factor[None, :], summand[None, :], r_ptr + out_offs, inner, EPILOGUE)
                else:
                    y = finished(z, factor, summand, r_ptr + out_offs, inner, EPILOGUE)
                tl.store(out_ptr + out_offs, y, mask=inner)


class Form(NamedTuple):
    """What is launched: the Cut, and how many channels of the result a thread has."""

    cut: Cut
    BLOCK_C: int
    cycles: float


# Limits of a thread's sums, of the products of a channel and of a patch's elements, which the compiler unrolls.
SUMS, PRODUCTS, ELEMENTS = 32, 640, 200


@remembered
def form_for(gradient, channels, result, size, kernel, stride, padding, unit):
    """The Form that takes the fewest instructions by a model, or None if none serves; `size` is that of the result."""
    forms, least = [], least_block(gradient, size, stride)
    for cut in candidates((1, 2, 4), gradient, channels, size, kernel, stride, padding, False, unit):
        pixels = cut.BH * cut.BW
        # Of each filter's taps, those that meet a pixel of the block, and how often a row of them is loaded.
        taps = pixels * math.prod(kernel) // math.prod(least)
        loads = cut.BH * math.prod(kernel) // least[0]
        most = min(SUMS // pixels, PRODUCTS // max(taps, 1))
        if most < 1 or cut.PATCH_H * cut.RUN > ELEMENTS:
            continue
        block_c = cdiv(result, cdiv(result, most))
        chunks, (rows, cols) = cdiv(result, block_c), cut.blocks(size)
        instructions = channels * chunks * (6 * cut.PATCH_H * cut.RUN / cut.UNIT + block_c * (taps + 1.5 * loads))
        instructions += chunks * (40 + 4 * block_c * cut.BH)
        forms.append(Form(cut, block_c, rows * cols * instructions / 128))
    return min(forms, key=lambda form: form.cycles, default=None)


@planned(few_channels_lanes_kernel)
def convolve(image, w, bias, out, mean, var, scale, shift, residual, form, gradient, taps, values):
    (N, CI, H, W), (_, CO, OH, OW), cut = image.shape, out.shape, form.cut
    rows, cols = cut.blocks((OH, OW))
    M, (wo, wc, wh, ww) = N * rows * cols, w.stride()
    block_m = 1024 if INTERPRETED else 128
    unit_out = math.gcd(16 // out.itemsize, *strides(out)[:3])
    steps = [n // unit_out for n in strides(out)[:3]]
    width, *steps_in = (n // cut.UNIT for n in (W, *strides(image)[:3]))
    numbers = M, H, width, OH, OW, rows, cols, reciprocal(rows), reciprocal(cols), *steps_in
    constants = taps._asdict() | named_strides("w", (wc, wo, wh, ww) if gradient else (wo, wc, wh, ww), "oihw")
    grid = (cdiv(M, block_m) * cdiv(CO, form.BLOCK_C),)
    return grid, (*numbers, 0 if bias is None else bias.stride(0), *steps), dict(
        CI=CI, CO=CO, KH=w.shape[2], KW=w.shape[3], **constants,
        **cut.constants((OH, OW), "SKIP"), UNIT_OUT=unit_out,
        EPILOGUE=constant(bias, mean, var, scale, shift, residual, *values),
        INDEX=index_type(image, w, bias, out), BLOCK_M=block_m, BLOCK_C=form.BLOCK_C,
        num_warps=4, num_stages=1, **OPTIONS,
    )  # fmt: skip
