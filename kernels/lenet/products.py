"""LeNet's two convolutions as matrix products: a patch of pixels a row, all pixels of a window as columns.

The products are permuted as lane_order.py explains; layout.py has the layout of the filters.
"""

import triton
import triton.language as tl

from .._common import round_to
from ..conv2d_pool.blocks import largest_of_window
from .lane_order import columns_of_lanes, from_result, load_weights, rows_of_lanes, to_operand, vectors


@triton.jit
def load_pixels(
    x_ptr, image, square, mask, k,
    C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr,
    FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Pixels k = c * 64 + dy * 8 + dx of the 8 x 8 patch under a square of four windows; all arguments broadcast.

    A byte p becomes p * SCALE + SHIFT, and FRAME black pixels surround an image of bytes.
    """
    SIDE: tl.constexpr = SIZE - 2 * FRAME
    top, left = square // (Q1 // 2) * 4 - PAD, square % (Q1 // 2) * 4 - PAD
    dy, dx = k // 8 % 8, k % 8
    rows = image * (C * SIDE * SIDE) + (top - FRAME) * SIDE + left - FRAME
    offs = rows + (k // 64 * (SIDE * SIDE) + dy * SIDE + dx)
    inside = mask
    if PAD + FRAME > 0:
        ih, iw = top + dy, left + dx
        framed = inside & (ih >= 0) & (ih < SIZE) & (iw >= 0) & (iw < SIZE)
        inside = inside & (ih >= FRAME) & (ih < SIZE - FRAME) & (iw >= FRAME) & (iw < SIZE - FRAME)
    x = tl.load(x_ptr + offs, mask=inside, other=0)
    if x_ptr.dtype.element_ty == tl.uint8:
        x = x.to(tl.float32) * SCALE + SHIFT
        # There are pixels outside the frame only if the convolution pads.
        if PAD > 0:
            x = tl.where(framed, x, 0.0)
    return x


@triton.jit
def load_patches(
    x_ptr, image, square, mask, k,
    C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr,
    FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_K): the pixels k of a square's patch, a row for each image and square."""
    image, square, mask = image[:, None], square[:, None], mask[:, None]
    return load_pixels(x_ptr, image, square, mask, k[None, :], C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT)


@triton.jit
def largest_of_four(acc, bias, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr):
    """(BLOCK_M, 4 * COLUMNS), window's pixels outermost -> (BLOCK_M, COLUMNS) of max(0, largest + bias), and code."""
    largest, code = largest_of_window(acc, BLOCK_M, COLUMNS)
    y = largest + bias[None, :]
    dead = y <= 0
    return tl.where(dead, 0.0, y), tl.where(dead, 4, code).to(tl.uint8)


@triton.jit
def keep_filters(
    packed_ptr, offs_n,
    COLUMNS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """All K rows of the filters in blocks of BLOCK_K, see lane_order.load_weights."""
    filters = ()
    for k0 in tl.static_range(0, K, BLOCK_K):
        filters = filters + (load_weights(packed_ptr, k0, offs_n, COLUMNS, min(BLOCK_K, K - k0), VECTOR, OPERAND),)
    return filters


@triton.jit
def first_convolution(
    x_ptr, packed_ptr, filters, bias_ptr, p1_ptr, code_ptr, i0, s0, N,
    TRAIN: tl.constexpr, KEPT: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
    Q1: tl.constexpr, FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    SQUARES: tl.constexpr = (Q1 // 2) * (Q1 // 2)
    PAIR: tl.constexpr = 32 // OPERAND.primitive_bitwidth
    VECTOR: tl.constexpr = 128 // p1_ptr.dtype.element_ty.primitive_bitwidth
    offs_n, offs_k, lanes = columns_of_lanes(128, VECTOR, 2), vectors(BLOCK_K, 4), vectors(32, VECTOR)
    oc = columns_of_lanes(32, VECTOR, 2) % 8
    bias = tl.load(bias_ptr + oc, mask=oc < 6, other=0.0)
    for m0 in range(0, BLOCK_I * SQUARES, BLOCK_M):
        offs_m = (m0 + rows_of_lanes(BLOCK_M))[None, :, None, None]
        image, square = offs_m // SQUARES, offs_m % SQUARES
        mask = (offs_m < BLOCK_I * SQUARES) & (i0 + image < N)
        acc = tl.zeros((BLOCK_M, 128), tl.float32)
        if KEPT:
            for k0 in tl.static_range(0, C * 64, BLOCK_K):
                x = load_pixels(x_ptr, i0 + image, square, mask, k0 + offs_k, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT)
                acc = tl.dot(to_operand(x.to(OPERAND), PAIR), filters[k0 // BLOCK_K], acc, input_precision=PRECISION)
        else:
            for k0 in range(0, C * 64, BLOCK_K):
                x = load_pixels(x_ptr, i0 + image, square, mask, k0 + offs_k, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT)
                w = load_weights(packed_ptr, k0, offs_n, 128, BLOCK_K, 4, OPERAND)
                acc = tl.dot(to_operand(x.to(OPERAND), PAIR), w, acc, input_precision=PRECISION)
        y, code = largest_of_four(acc, bias, BLOCK_M, 32)
        offs = (s0 + image) * (Q1 * Q1 * 8) + square // (Q1 // 2) * (Q1 * 16) + square % (Q1 // 2) * 16
        offs = offs + (lanes // 16 * (Q1 * 8) + lanes % 16)
        tl.store(p1_ptr + offs, from_result(round_to(y, p1_ptr.dtype.element_ty), VECTOR), mask=mask)
        if TRAIN:
            tl.store(code_ptr + offs, from_result(code, VECTOR), mask=mask)


@triton.jit
def second_convolution(
    p1_ptr, packed_ptr, filters, bias_ptr, acts_ptr, code_ptr, i0, p0, s0, N,
    TRAIN: tl.constexpr, KEPT: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr, F: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    WINDOWS: tl.constexpr = Q2 * Q2
    PAIR: tl.constexpr = 32 // OPERAND.primitive_bitwidth
    VECTOR: tl.constexpr = 128 // p1_ptr.dtype.element_ty.primitive_bitwidth
    offs_n, lanes = columns_of_lanes(64, 4, 2), vectors(16, 4)
    bias = tl.load(bias_ptr + columns_of_lanes(16, 4, 2))
    for m0 in range(0, BLOCK_I * WINDOWS, BLOCK_M):
        offs_m = (m0 + rows_of_lanes(BLOCK_M))[None, :, None, None]
        image, window = offs_m // WINDOWS, offs_m % WINDOWS
        mask = (offs_m < BLOCK_I * WINDOWS) & (i0 + image < N)
        # k = dy * 48 + dx * 8 + c is an element of the 6 x 6 patch under a window.
        rows = (p0 + image) * (Q1 * Q1 * 8) + window // Q2 * (Q1 * 16) + window % Q2 * 16
        acc = tl.zeros((BLOCK_M, 64), tl.float32)
        if KEPT:
            for k0 in tl.static_range(0, 288, BLOCK_K):
                k = k0 + vectors(min(BLOCK_K, 288 - k0), VECTOR)
                p = tl.load(p1_ptr + rows + (k // 48 * (Q1 * 8) + k % 48), mask=mask, other=0.0).to(OPERAND)
                acc = tl.dot(to_operand(p, PAIR), filters[k0 // BLOCK_K], acc, input_precision=PRECISION)
        else:
            for k0 in range(0, 288, BLOCK_K):
                k = k0 + vectors(BLOCK_K, VECTOR)
                p = tl.load(p1_ptr + rows + (k // 48 * (Q1 * 8) + k % 48), mask=mask, other=0.0).to(OPERAND)
                w = load_weights(packed_ptr, k0, offs_n, 64, BLOCK_K, VECTOR, OPERAND)
                acc = tl.dot(to_operand(p, PAIR), w, acc, input_precision=PRECISION)
        y, code = largest_of_four(acc, bias, BLOCK_M, 16)
        offs = (s0 + image) * (F + 256) + window * 16 + lanes
        tl.store(acts_ptr + offs, from_result(round_to(y, acts_ptr.dtype.element_ty), 4), mask=mask)
        if TRAIN:
            tl.store(code_ptr + (s0 + image) * F + window * 16 + lanes, from_result(code, 4), mask=mask)
