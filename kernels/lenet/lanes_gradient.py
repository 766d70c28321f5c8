"""The gradients of LeNet's two convolutions in full float32: FMA on values in each thread's registers.

    dconv2[oc, c, kh, kw] = sum over images and windows of dz p1 at the pixel of the window's code
    dp1[c, y, x]          = sum over oc and taps of dz conv2
    dconv1[oc, c, kh, kw] = sum over images and windows of dp1 x at the pixel of the window's code

dz is the gradient of p2. It and its code are stored image by image and once more as columns, feature by feature for 32
images at a time, so that threads with one image each read contiguously; the rest has the layout of lanes.py.
"""

import triton
import triton.language as tl

from ..conv2d_pool.lanes import load_patch
from .lanes import four_columns, load_square


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """A tuple of COUNT tensors (BLOCK, WIDTH), or (BLOCK) where WIDTH is 1."""
    zero, tensors = tl.zeros((BLOCK,) if WIDTH == 1 else (BLOCK, WIDTH), tl.float32), ()
    for _ in tl.static_range(COUNT):
        tensors = tensors + (zero,)
    return tensors


@triton.jit
def sum_lanes(v, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """(WIDTH * COUNT): the sums over the first dimension of COUNT tensors (BLOCK, WIDTH); both are powers of two."""
    for level in tl.static_range(COUNT.bit_length() - 1):
        joined = ()
        for i in tl.static_range(COUNT >> (level + 1)):
            joined = joined + (tl.join(v[i], v[i + (COUNT >> (level + 1))]),)
        v = joined
    return tl.sum(tl.reshape(v[0], (v[0].shape[0], WIDTH * COUNT)), axis=0)


@triton.jit
def of_pixels(dz, code):
    """The gradients of a window's four pixels: dz at the pixel of the code, 0 elsewhere."""
    z = ()
    for q in tl.static_range(4):
        z = z + (tl.where(code == q, dz, 0.0),)
    return z


@triton.jit
def second_weights_of_lanes(
    dz_ptr, code_ptr, p1_ptr, partial_ptr, part, split, N,
    splits, Q1: tl.constexpr, Q2: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # An element is a window; a program adds up one channel of four filters.
    WINDOWS: tl.constexpr = Q2 * Q2
    channel, first = part % 6, part // 6 * 4
    sums, sum_b = zeros(25, BLOCK_M, 4), tl.zeros((BLOCK_M, 4), tl.float32)
    for m0 in range(split * BLOCK_M, N * WINDOWS, splits * BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask = offs_m < N * WINDOWS
        # Elements past the end repeat the last patch, and add 0.
        image = (tl.minimum(offs_m, N * WINDOWS - 1) // WINDOWS).to(INDEX)
        window = offs_m % WINDOWS
        p_offs = image * (6 * Q1 * Q1) + window // Q2 * (2 * Q1) + window % Q2 * 2
        pixels = load_patch(p1_ptr + channel * (Q1 * Q1), p_offs, 0, 0, mask, Q1, Q1, Q1, 1, 6, 6, True)
        offs = (offs_m.to(INDEX) * 16 + first)[:, None] + tl.arange(0, 4)[None, :]
        dz = tl.load(dz_ptr + offs, mask=mask[:, None], other=0.0)
        code = tl.load(code_ptr + offs, mask=mask[:, None], other=4)
        # The four filters are one tensor for the compiler's sake, see windows_of in conv2d_pool/lanes.py.
        sum_b += tl.where(code < 4, dz, 0.0)
        z = of_pixels(dz, code)
        for q in tl.static_range(4):
            added = ()
            for tap in tl.static_range(25):
                x = pixels[(q // 2 + tap // 5) * 6 + q % 2 + tap % 5]
                added = added + (tl.fma(z[q], x[:, None], sums[tap]),)
            sums = added

    i = tl.arange(0, 128)
    oc, tap = first + i // 32, i % 32
    to = tl.where(tap < 25, oc * 150 + channel * 25 + tap, 2400 + oc)
    total = sum_lanes(sums + (sum_b,) + zeros(6, BLOCK_M, 4), 32, 4)
    tl.store(partial_ptr + to, total, mask=(tap < 25) | ((tap == 25) & (channel == 0)))


@triton.jit
def add_row(sums, z, w_ptr, ROW: tl.constexpr, QY: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr):
    """sums, of two rows of three channels of dp1, plus the contribution of pixel row QY of a row of windows to row ROW.

    z has the gradients of the windows, four for each; w_ptr a row of five taps in the layout of W2, see layout.py.
    """
    added = ()
    for c in tl.static_range(3):
        row = sums[(2 * c + ROW) * Q1 : (2 * c + ROW + 1) * Q1]
        for kw in tl.static_range(5):
            w = tl.load(w_ptr + (kw * 8 + c) * 64)
            reached = ()
            for x in tl.static_range(2 * Q2):
                reached = reached + (tl.fma(z[x // 2 * 4 + QY * 2 + x % 2], w, row[kw + x]),)
            row = row[:kw] + reached + row[kw + 2 * Q2 :]
        upper = row if ROW == 0 else sums[2 * c * Q1 : (2 * c + 1) * Q1]
        added = added + upper + (row if ROW == 1 else sums[(2 * c + 1) * Q1 : (2 * c + 2) * Q1])
    return added


@triton.jit
def input_gradient(
    dz_ptr, code_ptr, w_ptr, dp_ptr, image, row, mask,
    Q1: tl.constexpr, Q2: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Three channels of a pair of rows of p1's gradient; an element is an image."""
    sums = zeros(6 * Q1, BLOCK_M, 1)
    offs = image // 32 * (32 * F) + image % 32
    # The windows of row `above` start `below` pairs of rows above this pair.
    for below in range(tl.maximum(row - Q2 + 1, 0), tl.minimum(row + 1, 3)):
        above = row - below
        for oc in range(16):
            z = ()
            for left in tl.static_range(Q2):
                place = (above * Q2 + left) * 512 + oc * 32
                dz = tl.load(dz_ptr + place + offs, mask=mask, other=0.0)
                code = tl.load(code_ptr + place + offs, mask=mask, other=4)
                z = z + of_pixels(dz, code)
            # Row ry of the pair and pixel row qy of the windows use row 2 * below + ry - qy of the taps.
            row_ptr = w_ptr + oc + below * (2 * 48 * 64)
            sums = add_row(add_row(sums, z, row_ptr, 0, 0, Q1, Q2), z, row_ptr, 1, 1, Q1, Q2)
            if below < 2:
                sums = add_row(sums, z, row_ptr + 48 * 64, 1, 0, Q1, Q2)
            if below > 0:
                sums = add_row(sums, z, row_ptr - 48 * 64, 0, 1, Q1, Q2)
    dp_offs = image * (6 * Q1 * Q1) + row * (2 * Q1)
    for c in tl.static_range(3):
        for x in tl.static_range(0, 2 * Q1, 4):
            places = (c * (Q1 * Q1) + x + dp_offs)[:, None] + tl.arange(0, 4)[None, :]
            four = four_columns(sums[2 * Q1 * c + x : 2 * Q1 * c + x + 4])
            tl.store(dp_ptr + places, four, mask=mask[:, None])


@triton.jit
def add_taps(fours, fifths, z, rows, pixels, LEFT: tl.constexpr):
    """The sums of 5 rows of taps, four taps and the fifth apart, plus those of the window LEFT pixels into a patch."""
    for q in tl.static_range(4):
        added, added_fifths = (), ()
        for kh in tl.static_range(5):
            x = rows[(q // 2 + kh) * 4 + LEFT + q % 2]
            added = added + (tl.fma(z[q][:, None], x, fours[kh]),)
            x = pixels[(q // 2 + kh) * 8 + LEFT + q % 2 + 4]
            added_fifths = added_fifths + (tl.fma(z[q], x, fifths[kh]),)
        fours, fifths = added, added_fifths
    return fours, fifths


@triton.jit
def add_windows(sums, pixels, dp_ptr, code_ptr, offs, mask, Q1: tl.constexpr):
    """sums, of three filters (5 rows of four taps, their fifth taps, biases), plus those of two windows of dp1.

    The windows are adjacent, and their patch has 6 x 8 pixels. Four taps are one tensor for the compiler's sake.
    """
    rows, fours, fifths, biases = (), (), (), ()
    for i in tl.static_range(24):
        rows = rows + (four_columns(pixels[i // 4 * 8 + i % 4 : i // 4 * 8 + i % 4 + 4]),)
    pair = tl.arange(0, 2)[None, :]
    for o in tl.static_range(3):
        places = (o * (Q1 * Q1) + offs)[:, None] + pair
        dp = tl.load(dp_ptr + places)
        code = tl.load(code_ptr + places, mask=mask[:, None], other=4)
        dp_left, dp_right = tl.split(dp)
        code_left, code_right = tl.split(code)
        bias = sums[30 + o] + tl.where(code_left < 4, dp_left, 0.0) + tl.where(code_right < 4, dp_right, 0.0)
        four, fifth = sums[5 * o : 5 * o + 5], sums[15 + 5 * o : 20 + 5 * o]
        four, fifth = add_taps(four, fifth, of_pixels(dp_left, code_left), rows, pixels, 0)
        four, fifth = add_taps(four, fifth, of_pixels(dp_right, code_right), rows, pixels, 2)
        fours, fifths, biases = fours + four, fifths + fifth, biases + (bias,)
    return fours + fifths + biases


@triton.jit
def first_weights_of_lanes(
    x_ptr, dz_ptr, code2_ptr, code1_ptr, w_ptr, dp_ptr, partial_ptr, part, split, N,
    splits, C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    F: tl.constexpr, FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # A program has three filters. For the gradient of p1 an element is an image, and all elements have the same pair of
    # rows, so that no thread idles while others have more windows. After that an element is a square of the pair.
    SIDE: tl.constexpr = Q1 // 2
    turns = tl.cdiv(N, BLOCK_M) * SIDE
    dp_ptr, code1_ptr = dp_ptr + part * (3 * Q1 * Q1), code1_ptr + part * (3 * Q1 * Q1)
    for turn in range(split, turns, splits):
        image = turn // SIDE * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
        three_ptr = w_ptr + part * (3 * 64)
        input_gradient(dz_ptr, code2_ptr, three_ptr, dp_ptr, image, turn % SIDE, image < N, Q1, Q2, F, BLOCK_M)
    tl.debug_barrier()

    for channel in range(C):
        sums = zeros(15, BLOCK_K, 4) + zeros(18, BLOCK_K, 1)
        for turn in range(split, turns, splits):
            for k0 in range(0, BLOCK_M * SIDE, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                image, column = turn // SIDE * BLOCK_M + (k // SIDE).to(INDEX), k % SIDE
                mask = (k < BLOCK_M * SIDE) & (image < N)
                # Elements past the end repeat a patch, and add 0.
                image = tl.minimum(image, N - 1)
                square = turn % SIDE * SIDE + column
                offs = image * (6 * Q1 * Q1) + turn % SIDE * (2 * Q1) + column * 2
                for ry in range(2):
                    x = load_square(x_ptr, image, square, channel, 2 * ry, 6, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT)
                    sums = add_windows(sums, x, dp_ptr, code1_ptr, offs + ry * Q1, mask, Q1)
        # Row n of the taps is row n % 5 of filter n // 5; the biases follow them.
        i = tl.arange(0, 64)
        n, kw = i % 16, i // 16
        to = (part * 3 + n // 5) * (25 * C) + channel * 25 + n % 5 * 5 + kw
        total = sum_lanes(sums[:15] + zeros(1, BLOCK_K, 4), 16, 4)
        tl.store(partial_ptr + to, total, mask=n < 15)
        n = tl.arange(0, 32)
        to = (part * 3 + n // 5) * (25 * C) + channel * 25 + n % 5 * 5 + 4
        to = tl.where(n < 15, to, 150 * C + part * 3 + n - 15)
        total = sum_lanes(sums[15:] + zeros(14, BLOCK_K, 1), 32, 1)
        tl.store(partial_ptr + to, total, mask=(n < 15) | ((n < 18) & (channel == 0)))
