"""The gradients of LeNet's two convolutions in full float32: products and sums in the registers of lanes.

    dconv2[oc, c, kh, kw] = sum over images and windows of dz p1 at the pixel of the window's code
    dp1[c, y, x]          = sum over oc and taps of dz conv2
    dconv1[oc, c, kh, kw] = sum over images and windows of dp1 x at the pixel of the window's code

dz is the gradient of p2. It and its code lie image by image and once more, as columns, feature by feature for 32 images
at a time, so that lanes that are images read side by side; the rest lies as lenet_lanes leaves it.
"""

import triton
import triton.language as tl

from .conv2d_pool_lanes import load_patch
from .lenet_lanes import four_columns, load_square


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """A tuple of COUNT vectors."""
    zero, vectors = tl.zeros((BLOCK,), tl.float32), ()
    for _ in tl.static_range(COUNT):
        vectors = vectors + (zero,)
    return vectors


@triton.jit
def sum_lanes(v, COUNT: tl.constexpr):
    """The sums over the lanes of a tuple of COUNT vectors, a power of two, as one vector."""
    for level in tl.static_range(COUNT.bit_length() - 1):
        joined = ()
        for i in tl.static_range(COUNT >> (level + 1)):
            joined = joined + (tl.join(v[i], v[i + (COUNT >> (level + 1))]),)
        v = joined
    return tl.sum(tl.reshape(v[0], (v[0].shape[0], COUNT)), axis=0)


@triton.jit
def of_pixels(dz, code):
    """The gradients of a window's four pixels, of which one has all there is."""
    z = ()
    for q in tl.static_range(4):
        z = z + (tl.where(code == q, dz, 0.0),)
    return z


@triton.jit
def add_taps(sums, z, pixels, FIRST: tl.constexpr, PATCH_W: tl.constexpr):
    """The sums of 5 x 5 taps, and the products of a window's four gradients with the patch from pixel FIRST on."""
    for q in tl.static_range(4):
        added = ()
        for tap in tl.static_range(25):
            x = pixels[FIRST + (q // 2 + tap // 5) * PATCH_W + q % 2 + tap % 5]
            added = added + (tl.fma(z[q], x, sums[tap]),)
        sums = added
    return sums


@triton.jit
def second_convolution(
    dz_ptr, code_ptr, p1_ptr, partial_ptr, part, split, N,
    SPLITS: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # A lane is a window, a program adds up one channel of four filters.
    WINDOWS: tl.constexpr = Q2 * Q2
    channel, first = part % 6, part // 6 * 4
    sums, sums_b = zeros(100, BLOCK_M), zeros(4, BLOCK_M)
    for m0 in range(split * BLOCK_M, N * WINDOWS, SPLITS * BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask = offs_m < N * WINDOWS
        # Lanes past the end repeat the last patch, and add nothing.
        image = (tl.minimum(offs_m, N * WINDOWS - 1) // WINDOWS).to(INDEX)
        window = offs_m % WINDOWS
        p_offs = image * (6 * Q1 * Q1) + window // Q2 * (2 * Q1) + window % Q2 * 2
        pixels = load_patch(p1_ptr + channel * (Q1 * Q1), p_offs, 0, 0, mask, Q1, Q1, Q1, 1, 6, 6, True)
        offs = (offs_m.to(INDEX) * 16 + first)[:, None] + tl.arange(0, 4)[None, :]
        dz = tl.load(dz_ptr + offs, mask=mask[:, None], other=0.0)
        code = tl.load(code_ptr + offs, mask=mask[:, None], other=4)
        dz_even, dz_odd = tl.split(tl.reshape(dz, (BLOCK_M, 2, 2)))
        code_even, code_odd = tl.split(tl.reshape(code, (BLOCK_M, 2, 2)))
        dz0, dz2 = tl.split(dz_even)
        dz1, dz3 = tl.split(dz_odd)
        code0, code2 = tl.split(code_even)
        code1, code3 = tl.split(code_odd)
        dzs, codes = (dz0, dz1, dz2, dz3), (code0, code1, code2, code3)
        added, added_b = (), ()
        for o in tl.static_range(4):
            z = of_pixels(dzs[o], codes[o])
            added = added + add_taps(sums[25 * o : 25 * o + 25], z, pixels, 0, 6)
            added_b = added_b + (sums_b[o] + tl.where(codes[o] < 4, dzs[o], 0.0),)
        sums, sums_b = added, added_b

    i = tl.arange(0, 128)
    to = tl.where(i < 100, (first + i // 25) * 150 + channel * 25 + i % 25, 2300 + first + i)
    mask = (i < 100) | ((i < 104) & (channel == 0))
    tl.store(partial_ptr + to, sum_lanes(sums + sums_b + zeros(24, BLOCK_M), 128), mask=mask)


@triton.jit
def add_row(sums, z, w_ptr, ROW: tl.constexpr, QY: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr):
    """sums, of two rows of three channels of dp1: to row ROW is added what row QY of a row of windows sends it.

    z has the gradients of the windows, four each; w a row of five taps as W2 has it, see lenet.py.
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
    """Three channels of a pair of rows of p1's gradient, each lane of its own image."""
    sums = zeros(6 * Q1, BLOCK_M)
    offs = image // 32 * (32 * F) + image % 32
    # The windows of row `above` are `below` pairs of rows further up.
    for below in range(tl.maximum(row - Q2 + 1, 0), tl.minimum(row + 1, 3)):
        above = row - below
        for oc in range(16):
            z = ()
            for left in tl.static_range(Q2):
                place = (above * Q2 + left) * 512 + oc * 32
                dz = tl.load(dz_ptr + place + offs, mask=mask, other=0.0)
                code = tl.load(code_ptr + place + offs, mask=mask, other=4)
                z = z + of_pixels(dz, code)
            # Row ry of the pair and row qy of the windows meet in row 2 * below + ry - qy of the taps.
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
def add_windows(sums, pixels, dp_ptr, code_ptr, offs, mask, Q1: tl.constexpr):
    """sums, the 5 x 5 taps of three filters and then their biases, and what two pixels of dp1 side by side add."""
    taps, biases = (), ()
    pair = tl.arange(0, 2)[None, :]
    for o in tl.static_range(3):
        places = (o * (Q1 * Q1) + offs)[:, None] + pair
        dp = tl.load(dp_ptr + places)
        code = tl.load(code_ptr + places, mask=mask[:, None], other=4)
        dp_left, dp_right = tl.split(dp)
        code_left, code_right = tl.split(code)
        of_bias = sums[75 + o] + tl.where(code_left < 4, dp_left, 0.0) + tl.where(code_right < 4, dp_right, 0.0)
        of_filter = add_taps(sums[25 * o : 25 * o + 25], of_pixels(dp_left, code_left), pixels, 0, 8)
        of_filter = add_taps(of_filter, of_pixels(dp_right, code_right), pixels, 2, 8)
        taps, biases = taps + of_filter, biases + (of_bias,)
    return taps + biases


@triton.jit
def first_convolution(
    x_ptr, dz_ptr, code2_ptr, code1_ptr, w_ptr, dp_ptr, partial_ptr, part, split, N,
    SPLITS: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    F: tl.constexpr, FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # A program has three filters. For the gradient of p1 a lane is an image, and all lanes see the same pair of rows:
    # none waits for windows that do not reach its own. Then a lane is a square of the pair.
    SIDE: tl.constexpr = Q1 // 2
    turns = tl.cdiv(N, BLOCK_M) * SIDE
    dp_ptr, code1_ptr = dp_ptr + part * (3 * Q1 * Q1), code1_ptr + part * (3 * Q1 * Q1)
    for turn in range(split, turns, SPLITS):
        image = turn // SIDE * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
        three_ptr = w_ptr + part * (3 * 64)
        input_gradient(dz_ptr, code2_ptr, three_ptr, dp_ptr, image, turn % SIDE, image < N, Q1, Q2, F, BLOCK_M)
    tl.debug_barrier()

    for channel in range(C):
        sums = zeros(78, BLOCK_K)
        for turn in range(split, turns, SPLITS):
            for k0 in range(0, BLOCK_M * SIDE, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                image, column = turn // SIDE * BLOCK_M + (k // SIDE).to(INDEX), k % SIDE
                mask = (k < BLOCK_M * SIDE) & (image < N)
                # Lanes past the end repeat a patch, and add nothing.
                image = tl.minimum(image, N - 1)
                square = turn % SIDE * SIDE + column
                offs = image * (6 * Q1 * Q1) + turn % SIDE * (2 * Q1) + column * 2
                for ry in range(2):
                    x = load_square(x_ptr, image, square, channel, 2 * ry, 6, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT)
                    sums = add_windows(sums, x, dp_ptr, code1_ptr, offs + ry * Q1, mask, Q1)
        i = tl.arange(0, 128)
        to = tl.where(i < 75, (part * 3 + i // 25) * (25 * C) + channel * 25 + i % 25, 150 * C + part * 3 + i - 75)
        mask = (i < 75) | ((i < 78) & (channel == 0))
        tl.store(partial_ptr + to, sum_lanes(sums + zeros(50, BLOCK_K), 128), mask=mask)
