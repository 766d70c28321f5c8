"""LeNet's two convolutions in full float32: FMA on a patch of pixels in each thread's registers.

The formulas are those of forward.py. Filters are read from the plain buffer, one value at a time for all threads. p1
and its code are stored channel by channel, so that adjacent threads read adjacent patches.
"""

import triton
import triton.language as tl

from ..conv2d_pool.lanes import add_products, largest_of_four, load_patch, side_by_side, windows_of


@triton.jit
def load_square(
    x_ptr, image, square, channel, first,
    ROWS: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr,
    FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a channel's 8 x 8 pixels under a square, from row `first` on, as a tuple; see products.py."""
    SIDE: tl.constexpr = SIZE - 2 * FRAME
    top, left = square // (Q1 // 2) * 4 - PAD + first, square % (Q1 // 2) * 4 - PAD
    offs = image * (C * SIDE * SIDE) + (top - FRAME) * SIDE + left - FRAME
    c_ptr = x_ptr + channel * (SIDE * SIDE)
    if PAD + FRAME == 0:
        pixels = load_patch(c_ptr, offs, top, left, True, SIDE, SIDE, SIDE, 1, ROWS, 8, True)
    else:
        pixels = ()
        for i in tl.static_range(0, 8 * ROWS, 2):
            # Pairs: with an even frame and padding no pair crosses an edge.
            ih = (top + i // 8)[:, None]
            iw = (left + i % 8)[:, None] + tl.arange(0, 2)[None, :]
            inside = (ih >= FRAME) & (ih < SIZE - FRAME) & (iw >= FRAME) & (iw < SIZE - FRAME)
            pair = (offs + (i // 8 * SIDE + i % 8))[:, None] + tl.arange(0, 2)[None, :]
            pixels = pixels + tl.split(tl.load(c_ptr + pair, mask=inside, other=0))
    if x_ptr.dtype.element_ty == tl.uint8:
        scaled = ()
        for i in tl.static_range(8 * ROWS):
            x = pixels[i].to(tl.float32) * SCALE + SHIFT
            # There are pixels outside the frame only if the convolution pads.
            if PAD > 0:
                ih, iw = top + i // 8, left + i % 8
                x = tl.where((ih >= 0) & (ih < SIZE) & (iw >= 0) & (iw < SIZE), x, 0.0)
            scaled = scaled + (x,)
        pixels = scaled
    return pixels


@triton.jit
def first_convolution_of_lanes(
    x_ptr, w_ptr, bias_ptr, p1_ptr, code_ptr, i0, s0, N,
    TRAIN: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr,
    FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    SQUARES: tl.constexpr = (Q1 // 2) * (Q1 // 2)
    # With several channels two filters share the loads of the pixels.
    FILTERS: tl.constexpr = 1 if C == 1 else 2
    for m0 in range(0, BLOCK_I * SQUARES, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask = (offs_m < BLOCK_I * SQUARES) & (i0 + offs_m // SQUARES < N)
        # Elements past the end repeat a patch, so that their loads need no mask.
        image = tl.minimum(offs_m // SQUARES, tl.minimum(BLOCK_I, N - i0) - 1)
        square = offs_m % SQUARES
        p_offs = (s0 + image) * (6 * Q1 * Q1) + square // (Q1 // 2) * (2 * Q1) + square % (Q1 // 2) * 2
        if C == 1:
            pixels = load_square(x_ptr, i0 + image, square, 0, 0, 8, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT)
            windows = windows_of(pixels, 5, 5, 1, 1, 1, 1, 2, 2, 8, 2)
        for first in range(0, 6, FILTERS):
            sums = ()
            for o in tl.static_range(FILTERS):
                bias = tl.zeros((BLOCK_M, 2, 2), tl.float32) + tl.load(bias_ptr + first + o)
                sums = sums + (bias, bias, bias, bias)
            for c in range(C):
                if C > 1:
                    pixels = load_square(x_ptr, i0 + image, square, c, 0, 8, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT)
                    windows = windows_of(pixels, 5, 5, 1, 1, 1, 1, 2, 2, 8, 2)
                added = ()
                for o in tl.static_range(FILTERS):
                    w_offs = (first + o) * (C * 25) + c * 25
                    of_filter = sums[4 * o : 4 * o + 4]
                    added = added + add_products(of_filter, windows, w_ptr, w_offs, 5, 1, 5, 5, 4)
                sums = added
            for o in tl.static_range(FILTERS):
                for rh in tl.static_range(2):
                    row_sums = side_by_side(sums[4 * o + 2 * rh], sums[4 * o + 2 * rh + 1])
                    y, code = largest_of_four(row_sums)
                    offs = (p_offs + ((first + o) * (Q1 * Q1) + rh * Q1))[:, None] + tl.arange(0, 2)[None, :]
                    tl.store(p1_ptr + offs, y, mask=mask[:, None])
                    if TRAIN:
                        tl.store(code_ptr + offs, code, mask=mask[:, None])


@triton.jit
def four_columns(v):
    """(BLOCK_M, 4) of a tuple of four vectors."""
    four = tl.join(tl.join(v[0], v[2]), tl.join(v[1], v[3]))
    return tl.reshape(four, (four.shape[0], 4))


@triton.jit
def second_convolution_of_lanes(
    p1_ptr, w_ptr, bias_ptr, acts_ptr, code_ptr, i0, p0, s0, N,
    TRAIN: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr, F: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    WINDOWS: tl.constexpr = Q2 * Q2
    for m0 in range(0, BLOCK_I * WINDOWS, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask = (offs_m < BLOCK_I * WINDOWS) & (i0 + offs_m // WINDOWS < N)
        image, window = tl.minimum(offs_m // WINDOWS, tl.minimum(BLOCK_I, N - i0) - 1), offs_m % WINDOWS
        p_offs = (p0 + image) * (6 * Q1 * Q1) + window // Q2 * (2 * Q1) + window % Q2 * 2
        for first in range(0, 16, 4):
            sums = ()
            for o in tl.static_range(4):
                bias = tl.zeros((BLOCK_M, 2, 2), tl.float32) + tl.load(bias_ptr + first + o)
                sums = sums + (bias,)
            for c in range(6):
                pixels = load_patch(p1_ptr + c * (Q1 * Q1), p_offs, 0, 0, mask, Q1, Q1, Q1, 1, 6, 6, True)
                windows = windows_of(pixels, 5, 5, 1, 1, 1, 1, 2, 2, 6, 1)
                added = ()
                for o in tl.static_range(4):
                    w_offs = (first + o) * 150 + c * 25
                    added = added + add_products((sums[o],), windows, w_ptr, w_offs, 5, 1, 5, 5, 1)
                sums = added
            # The four filters are one tensor for the compiler's sake, as are the four pixels of a window in windows_of.
            of_four = tl.permute(tl.join(tl.join(sums[0], sums[2]), tl.join(sums[1], sums[3])), (0, 3, 4, 1, 2))
            y, code = largest_of_four(tl.reshape(of_four, (BLOCK_M, 4, 2, 2)))
            lanes = first + tl.arange(0, 4)
            offs = ((s0 + image) * (F + 256) + window * 16)[:, None] + lanes[None, :]
            tl.store(acts_ptr + offs, y, mask=mask[:, None])
            if TRAIN:
                offs = ((s0 + image) * F + window * 16)[:, None] + lanes[None, :]
                tl.store(code_ptr + offs, code, mask=mask[:, None])
