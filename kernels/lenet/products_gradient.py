"""LeNet's weight gradients as matrix products; gradient.py has the formulas, layout.py the layouts.

An iteration of a program is a block of images at one position: all of them read the same pixels, so that an address is
the sum of one number an image and one number a pixel.
"""

import triton
import triton.language as tl

from .._common import next_block, round_to
from ..conv2d_pool.one_hot import one_hot
from .products import load_patches


@triton.jit
def fold(scratch_ptr, elements):
    """The sum over the windows r of a square and the pixels q of a window, for the weights at scratch[elements]."""
    term = tl.arange(0, 16)
    y, x = term // 8 * 2 + term // 2 % 2, term // 4 % 2 * 2 + term % 2
    starts = (term // 2 % 2 * 64 + term // 4 * 16 + term % 2 * 8) * 64 + y * 8 + x
    return tl.sum(tl.load(scratch_ptr + starts[:, None] + elements[None, :]), axis=0)


@triton.jit
def squares_of(z):
    """(64, M) -> two (4, 8, M): the rows of each square of a pair; the squares alternate every eight rows."""
    return tl.split(tl.permute(tl.reshape(z, (4, 2, 8, z.shape[1])), (0, 2, 3, 1)))


@triton.jit
def living(marked):
    """The gradients whose code, in their last three bits, is below 4 and so points to a pixel; 0 for the others."""
    return tl.where((marked & 7) < 4, (marked & -8).to(tl.float32, bitcast=True), 0.0)


@triton.jit
def of_images(z, k, M: tl.constexpr, P: tl.constexpr):
    """(4, 8, M) -> (32, P): the kth block of P of the M images, for M up to 8 * P."""
    for i in tl.static_range(3):
        if M >> i > P:
            first, second = tl.split(tl.permute(tl.reshape(z, (4, 8, 2, M >> i + 1)), (0, 1, 3, 2)))
            z = first if k * P // (M >> i + 1) % 2 == 0 else second
    return tl.reshape(z, (32, P))


@triton.jit
def pair_gradient(
    dz_ptr, wd_ptr, mask, row, pair,
    Q2: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(64, BLOCK_M): the gradient of p1 at a pair of squares; its rows are those of WD, its columns images."""
    # Twelve windows of the second convolution reach the pair, fewer at the edges.
    top, left = tl.maximum(row - 2, 0), tl.maximum(2 * pair - 2, 0)
    height, width = tl.minimum(row + 1, Q2) - top, tl.minimum(2 * pair + 2, Q2) - left
    n, i, k = tl.arange(0, BLOCK_M), tl.arange(0, 64), tl.arange(0, BLOCK_K)
    dz_offs, wd_offs = (n * (Q2 * Q2 * 64))[:, None] + k[None, :], (i * 64)[:, None] + k[None, :]
    dp = tl.zeros((64, BLOCK_M), tl.float32)
    start = tl.cast(0, tl.int32)
    k0, h, w = start, start, start
    for _ in tl.range(0, height * width * (64 // BLOCK_K), num_stages=2):
        j = (row - top - h) * 4 + 2 * pair + 1 - left - w
        dz_base, wd_base = dz_ptr + ((top + h) * Q2 + left + w) * 64 + k0, wd_ptr + j * (64 * 64) + k0
        dz = tl.load(dz_base + dz_offs, mask=mask[:, None], other=0.0)
        wd = tl.load(wd_base + wd_offs)
        dp = tl.dot(wd.to(OPERAND), tl.trans(dz.to(OPERAND)), dp, input_precision=PRECISION)
        k0, h, w = next_block(k0, h, w, 64, width, BLOCK_K)
    return dp


@triton.jit
def first_weights(
    x_ptr, code_ptr, dz_ptr, wd_ptr, scratch_ptr, partial_ptr, channel, split, N,
    splits, C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    SIDE: tl.constexpr = Q1 // 2
    PAIRS: tl.constexpr = (SIDE + 1) // 2
    IMAGE: tl.constexpr = C * (SIZE - 2 * FRAME) * (SIZE - 2 * FRAME)
    # The code is stored in the last three bits of a gradient, which products in tf32 and bf16 do not use.
    MARKED: tl.constexpr = PRECISION == "tf32"
    rows, lanes = tl.arange(0, BLOCK_M), tl.arange(0, 64)
    code_columns = lanes // 32 * (Q1 * 8) + lanes // 8 % 2 * 16 + lanes // 16 % 2 * 8 + lanes % 8
    # The gradients become the next product's left operand in their registers; 32-bit operands need another order.
    SWAPPED: tl.constexpr = MARKED and dz_ptr.dtype.element_ty == tl.float32
    LAST: tl.constexpr = 3 if SWAPPED else 4
    images = tl.arange(0, BLOCK_P)
    if SWAPPED:
        images = images // 8 * 8 + images % 4 * 2 + images // 4 % 2

    # A row for each pixel of a window and each window and filter of a square (32), a column for each pixel of a patch.
    acc, acc_b = tl.zeros((128, 64), tl.float32), tl.zeros((32, 8), tl.float32)
    for turn in range(split, tl.cdiv(N, BLOCK_M) * (SIDE * PAIRS), splits):
        block = turn % (SIDE * PAIRS)
        row, pair = block // PAIRS, block % PAIRS
        n0 = tl.cast(turn // (SIDE * PAIRS) * BLOCK_M, INDEX)
        mask = rows < N - n0

        dz_base = dz_ptr + n0 * (Q2 * Q2 * 64)
        dp = pair_gradient(dz_base, wd_ptr, mask, row, pair, Q2, OPERAND, PRECISION, BLOCK_M, BLOCK_K)
        code_base = code_ptr + n0 * (Q1 * Q1 * 8) + row * (Q1 * 16) + pair * 32
        exists = mask[:, None] & (2 * pair + lanes // 8 % 2 < SIDE)[None, :]
        code = tl.load(code_base + (rows * (Q1 * Q1 * 8))[:, None] + code_columns[None, :], mask=exists, other=4)
        code = tl.trans(code)
        if MARKED:
            left, right = squares_of((dp.to(tl.int32, bitcast=True) & -8) + code)
            alive = living(left) + living(right)
        else:
            left, right = squares_of(dp)
            code_left, code_right = squares_of(code)
            alive = tl.where(code_left < 4, left, 0.0) + tl.where(code_right < 4, right, 0.0)
        acc_b += tl.sum(tl.reshape(alive, (32, BLOCK_M // 8, 8)), axis=1)
        for s in range(0, tl.minimum(2, SIDE - 2 * pair)):
            square = tl.where(s == 0, left, right)
            if not MARKED:
                codes = tl.where(s == 0, code_left, code_right)
            squares = tl.full((BLOCK_P,), row * SIDE + 2 * pair + s, tl.int32)
            for k in tl.static_range(BLOCK_M // BLOCK_P):
                if MARKED:
                    bits = of_images(square, k, BLOCK_M, BLOCK_P)
                    dy, position = (bits & -8).to(tl.float32, bitcast=True), bits & 7
                else:
                    dy = of_images(square, k, BLOCK_M, BLOCK_P)
                    position = of_images(codes, k, BLOCK_M, BLOCK_P)
                # With 64-bit indices the compiler sees constant strides, which become part of the load instructions.
                n = k * BLOCK_P + images
                x = load_patches(
                    x_ptr + n0 * IMAGE, n.to(tl.int64), squares, n < N - n0, channel * 64 + lanes,
                    C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT,
                )  # fmt: skip
                dz1 = one_hot(round_to(dy, dz_ptr.dtype.element_ty).to(OPERAND), position, 4, 4)
                dz1 = tl.reshape(dz1, (4, 8, BLOCK_P // 8, 4, 2, 2, 2))
                dz1 = tl.reshape(tl.permute(dz1, (5, 0, 6, 1, 2, 7 - LAST, LAST)), (128, BLOCK_P))
                acc = tl.dot(dz1, x.to(OPERAND), acc, input_precision=PRECISION)

    scratch_ptr += (channel * splits + split) * (128 * 64)
    partial_ptr += split * (C * 150 + 6)
    tl.store(scratch_ptr + (tl.arange(0, 128) * 64)[:, None] + lanes[None, :], acc)
    tl.debug_barrier()
    i = tl.arange(0, 256)
    oc, tap = tl.where(i < 150, i // 25, 0), i % 25
    dw = fold(scratch_ptr, oc * 64 + tap // 5 * 8 + tap % 5)
    tl.store(partial_ptr + oc * (25 * C) + channel * 25 + tap, dw, mask=i < 150)
    if channel == 0:
        db = tl.sum(tl.reshape(tl.sum(acc_b, axis=1), (4, 8)), axis=0)
        filters = tl.arange(0, 8)
        tl.store(partial_ptr + C * 150 + filters, db, mask=filters < 6)


@triton.jit
def load_again(ptrs, mask):
    """Load a product's operand once more, as float32, for a use beside the product.

    An operand of a product in a pipelined loop must have no other use: otherwise Triton keeps it in one buffer for all
    iterations, and on sm_90 the next iteration's copy overwrites it while the product still reads it (seen in triton
    3.6.0, 3.7.1 and 3.9.0; bench/machine_code/ttgir.py looks for it). The different cache modifier prevents the two
    loads from being merged.
    """
    return tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".ca").to(tl.float32)


@triton.jit
def second_weights(
    dz_ptr, p1_ptr, partial_ptr, part, split, N,
    splits, Q1: tl.constexpr, Q2: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # The four pixels of a window have rows of their own, which the last launch adds up.
    WINDOWS: tl.constexpr = Q2 * Q2
    REST: tl.constexpr = 288 - BLOCK_N if PARTS == 1 else 0
    rows, lanes, k = tl.arange(0, BLOCK_M), tl.arange(0, 64), part * BLOCK_N + tl.arange(0, BLOCK_N)
    p_rows = (rows * (Q1 * Q1 * 8))[:, None]
    acc, acc_b = tl.zeros((64, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, 64), tl.float32)
    if REST > 0:
        rest = BLOCK_N + tl.arange(0, REST)
        acc_rest = tl.zeros((64, REST), tl.float32)
    for turn in tl.range(split, tl.cdiv(N, BLOCK_M) * WINDOWS, splits, num_stages=2):
        window = turn % WINDOWS
        n0 = tl.cast(turn // WINDOWS * BLOCK_M, INDEX)
        mask = rows < N - n0
        dz_base = dz_ptr + n0 * (WINDOWS * 64) + window * 64
        p_base = p1_ptr + n0 * (Q1 * Q1 * 8) + window // Q2 * (Q1 * 16) + window % Q2 * 16
        dz_ptrs = dz_base + (rows * (WINDOWS * 64))[:, None] + lanes[None, :]
        dz = tl.load(dz_ptrs, mask=mask[:, None], other=0.0)
        offs = p_rows + (k // 48 * (Q1 * 8) + k % 48)[None, :]
        p = tl.load(p_base + offs, mask=mask[:, None] & (k < 288)[None, :], other=0.0)
        acc = tl.dot(tl.trans(dz.to(OPERAND)), p.to(OPERAND), acc, input_precision=PRECISION)
        if REST > 0:
            offs = p_rows + (rest // 48 * (Q1 * 8) + rest % 48)[None, :]
            p = tl.load(p_base + offs, mask=mask[:, None], other=0.0)
            acc_rest = tl.dot(tl.trans(dz.to(OPERAND)), p.to(OPERAND), acc_rest, input_precision=PRECISION)
        acc_b += load_again(dz_ptrs, mask[:, None] & (part == 0))

    tl.store(partial_ptr + (lanes * 288)[:, None] + k[None, :], acc, mask=(k < 288)[None, :])
    if REST > 0:
        tl.store(partial_ptr + (lanes * 288)[:, None] + rest[None, :], acc_rest)
    if part == 0:
        tl.store(partial_ptr + 64 * 288 + lanes, tl.sum(acc_b, axis=0))


@triton.jit
def linear_weights(
    acts_ptr, grads_ptr, partial_ptr, tile, split, N,
    splits, F: tl.constexpr, CP: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Tiles of 128 x BLOCK_N: those of fc1 along its features, those of fc2, and those of fc3 for each 128 classes.
    TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    HIDDEN: tl.constexpr = 128 // BLOCK_N
    first, second = tile < TILES, tile < TILES + HIDDEN
    block = tl.where(first | second, 0, (tile - TILES - HIDDEN) // HIDDEN)
    n0 = tl.where(first, 0, tl.where(second, 128, 256 + block * 128))
    within = tl.where(first, tile, (tile - TILES) % HIDDEN) * BLOCK_N
    k0 = tl.where(first, 0, tl.where(second, F, F + 128)) + within
    K = tl.where(first, F, 128)
    start = tl.where(first, 0, tl.where(second, 128 * F, 128 * F + 128 * 128 + block * (128 * 128)))
    rows, lanes_n, lanes_k = tl.arange(0, BLOCK_M), tl.arange(0, 128), tl.arange(0, BLOCK_N)
    mask_n, mask_k = n0 + lanes_n < 256 + CP, within + lanes_k < K

    acc = tl.zeros((128, BLOCK_N), tl.float32)
    acc_b = tl.zeros((BLOCK_M, 128), tl.float32)
    for m0 in tl.range(split * BLOCK_M, N, splits * BLOCK_M, num_stages=2):
        n = tl.cast(m0, INDEX)
        mask_m = rows < N - m0
        offs = (rows * (256 + CP))[:, None] + (n0 + lanes_n)[None, :]
        dy_ptrs, mask = grads_ptr + n * (256 + CP) + offs, mask_m[:, None] & mask_n[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0)
        offs = (rows * (F + 256))[:, None] + (k0 + lanes_k)[None, :]
        a = tl.load(acts_ptr + n * (F + 256) + offs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(tl.trans(dy.to(OPERAND)), a.to(OPERAND), acc, input_precision=PRECISION)
        acc_b += load_again(dy_ptrs, mask & (within == 0))

    offs = start + (lanes_n * K)[:, None] + (within + lanes_k)[None, :]
    tl.store(partial_ptr + offs, acc, mask=mask_n[:, None] & mask_k[None, :])
    if within == 0:
        biases = 128 * F + 128 * 128 + CP * 128
        tl.store(partial_ptr + biases + n0 + lanes_n, tl.sum(acc_b, axis=0), mask=mask_n)
