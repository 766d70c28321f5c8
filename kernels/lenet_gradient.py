"""Every weight and bias gradient of LeNet in one launch, each program a partial sum of one of them.

    dconv1[oc, c, kh, kw] = sum over images and pixels of dx1 x,  dx1 = the gradient of p1 at the pixel of its code
    dconv2[oc, c, kh, kw] = sum over images and pixels of dz p1,  dfc = grads^T acts
    gradient of p1 = dz WD, for squares of 2 x 2 of its pixels    (see lenet.py for the layouts)

Programs take roles by number: first those of the first convolution, then those of the second, then tiles of the
linears. Each keeps its sum in registers and writes it once.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

from ._common import INTERPRETED, OPTIONS, index_type, operand_type, round_to
from .lenet import Splits
from .lenet_forward import load_patches


class Tile(NamedTuple):
    """Blocks of a number format: squares, windows and images that a turn of each role adds, and columns of its sum."""

    M1: int
    K1: int
    M2: int
    N2: int
    M3: int
    N3: int
    num_warps: int


# Read off machine code (no register spills) and not yet timed.
TILES = {
    "bfloat16": Tile(64, 64, 64, 128, 64, 64, 8),
    "tf32": Tile(64, 32, 64, 128, 32, 64, 8),
    "ieee": Tile(16, 16, 16, 64, 16, 64, 4),
}
# Programs of each role for a batch that fills the card.
MOST = Splits(160, 64, 12)


def lanes():
    """Of a warp: AMD's waves have 64."""
    return driver.active.get_current_target().warp_size


@functools.cache
def tile_for(format, images, geometry):
    """The Tile for a batch of so many images."""
    if not INTERPRETED:
        tile = TILES[format]
        # Fewer warps of more lanes have fewer registers a lane.
        return tile._replace(M1=32) if format == "tf32" and lanes() == 64 else tile
    Q1, Q2 = geometry.pooled
    rows = [min(2048, max(16, triton.next_power_of_2(images * n // 2))) for n in ((Q1 // 2) ** 2, Q2 * Q2, 1)]
    return Tile(rows[0], 64, rows[1], 512, rows[2], 128, 4)


def splits_for(format, images, geometry):
    """How many programs share each gradient: no more than there are tiles, see Splits."""
    tile, (Q1, Q2) = tile_for(format, images, geometry), geometry.pooled
    most = Splits(2, 2, 1) if INTERPRETED else MOST
    tiles = images * (Q1 // 2) ** 2 / tile.M1, images * Q2 * Q2 / tile.M2, images / (4 * tile.M3)
    return Splits(*(max(1, min(limit, int(-(-n // 1)))) for limit, n in zip(most, tiles)))


@triton.jit
def fold(scratch_ptr, elements):
    """Of each weight the sum over the windows r of a square and the pixels q of a window, from scratch[elements] on."""
    term = tl.arange(0, 16)
    y, x = term // 8 * 2 + term // 2 % 2, term // 4 % 2 * 2 + term % 2
    starts = (y * 8 + x) * 128 + term // 2 % 2 * 64 + term % 2 * 32 + term // 4 * 8
    return tl.sum(tl.load(scratch_ptr + starts[:, None] + elements[None, :]), axis=0)


@triton.jit
def first_convolution(
    x_ptr, code_ptr, dz_ptr, wd_ptr, scratch_ptr, partial_ptr, channel, split, N,
    SPLITS: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    SIDE: tl.constexpr = Q1 // 2
    lanes, offs_k = tl.arange(0, 32), tl.arange(0, 64)
    # One for each pixel of a window.
    acc0 = tl.zeros((64, 32), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    acc_b = tl.zeros((BLOCK_M, 32), tl.float32)
    for m0 in range(split * BLOCK_M, N * (SIDE * SIDE), SPLITS * BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M).to(INDEX)
        image, square = offs_m // (SIDE * SIDE), offs_m % (SIDE * SIDE)
        row, column = square // SIDE, square % SIDE
        mask = image < N

        # Nine windows of the second convolution reach the square.
        dp = tl.zeros((BLOCK_M, 32), tl.float32)
        for j in range(0, 9):
            above, left = row - j // 3, column - j % 3
            inside = mask & (above >= 0) & (above < Q2) & (left >= 0) & (left < Q2)
            offs = ((image * Q2 + above) * Q2 + left) * 64
            for k0 in tl.static_range(0, 64, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                dz = tl.load(dz_ptr + offs[:, None] + k[None, :], mask=inside[:, None], other=0.0)
                w = tl.load(wd_ptr + (j * (64 * 32) + k * 32)[:, None] + lanes[None, :])
                dp = tl.dot(dz.to(OPERAND), w.to(OPERAND), dp, input_precision=PRECISION)

        offs = image * (Q1 * Q1 * 8) + row * (Q1 * 16) + column * 16
        offs = offs[:, None] + (lanes // 16 * (Q1 * 8) + lanes % 16)[None, :]
        code = tl.load(code_ptr + offs, mask=mask[:, None], other=4)
        acc_b += tl.where(code < 4, dp, 0.0)
        x = load_patches(x_ptr, image, square, mask, channel * 64 + offs_k, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT)
        x = tl.trans(x.to(OPERAND))
        dp = round_to(dp, dz_ptr.dtype.element_ty).to(OPERAND)
        acc0 = tl.dot(x, tl.where(code == 0, dp, 0.0).to(OPERAND), acc0, input_precision=PRECISION)
        acc1 = tl.dot(x, tl.where(code == 1, dp, 0.0).to(OPERAND), acc1, input_precision=PRECISION)
        acc2 = tl.dot(x, tl.where(code == 2, dp, 0.0).to(OPERAND), acc2, input_precision=PRECISION)
        acc3 = tl.dot(x, tl.where(code == 3, dp, 0.0).to(OPERAND), acc3, input_precision=PRECISION)

    offs = (offs_k * 128)[:, None] + lanes[None, :]
    tl.store(scratch_ptr + offs, acc0)
    tl.store(scratch_ptr + offs + 32, acc1)
    tl.store(scratch_ptr + offs + 64, acc2)
    tl.store(scratch_ptr + offs + 96, acc3)
    tl.debug_barrier()
    i = tl.arange(0, 256)
    oc, tap = tl.where(i < 150, i // 25, 0), i % 25
    dw = fold(scratch_ptr, tap // 5 * (8 * 128) + tap % 5 * 128 + oc)
    tl.store(partial_ptr + oc * (25 * C) + channel * 25 + tap, dw, mask=i < 150)
    if channel == 0:
        db = tl.sum(tl.reshape(tl.sum(acc_b, axis=0), (4, 8)), axis=0)
        filters = tl.arange(0, 8)
        tl.store(partial_ptr + C * 150 + filters, db, mask=filters < 6)


@triton.jit
def second_convolution(
    dz_ptr, p1_ptr, partial_ptr, part, split, N,
    SPLITS: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The four pixels of a window stay apart: what they share is added by the last launch.
    WINDOWS: tl.constexpr = Q2 * Q2
    lanes, k = tl.arange(0, 64), part * BLOCK_N + tl.arange(0, BLOCK_N)
    acc, acc_b = tl.zeros((64, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, 64), tl.float32)
    for m0 in range(split * BLOCK_M, N * WINDOWS, SPLITS * BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M).to(INDEX)
        image, window = offs_m // WINDOWS, offs_m % WINDOWS
        mask = image < N
        rows = image * (Q1 * Q1 * 8) + window // Q2 * (Q1 * 16) + window % Q2 * 16
        dz = tl.load(dz_ptr + (offs_m * 64)[:, None] + lanes[None, :], mask=mask[:, None], other=0.0)
        offs = rows[:, None] + (k // 48 * (Q1 * 8) + k % 48)[None, :]
        p = tl.load(p1_ptr + offs, mask=mask[:, None] & (k < 288)[None, :], other=0.0)
        acc = tl.dot(tl.trans(dz.to(OPERAND)), p.to(OPERAND), acc, input_precision=PRECISION)
        acc_b += dz.to(tl.float32)

    tl.store(partial_ptr + (lanes * 288)[:, None] + k[None, :], acc, mask=(k < 288)[None, :])
    if part == 0:
        tl.store(partial_ptr + 64 * 288 + lanes, tl.sum(acc_b, axis=0))


@triton.jit
def linear(
    acts_ptr, grads_ptr, partial_ptr, tile, split, N,
    SPLITS: tl.constexpr, F: tl.constexpr, CP: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Tiles of 128 x BLOCK_N: those of fc1 along its features, those of fc2, and for 128 classes each those of fc3.
    TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    HIDDEN: tl.constexpr = 128 // BLOCK_N
    first, second = tile < TILES, tile < TILES + HIDDEN
    block = tl.where(first | second, 0, (tile - TILES - HIDDEN) // HIDDEN)
    n0 = tl.where(first, 0, tl.where(second, 128, 256 + block * 128))
    within = tl.where(first, tile, (tile - TILES) % HIDDEN) * BLOCK_N
    k0 = tl.where(first, 0, tl.where(second, F, F + 128)) + within
    K = tl.where(first, F, 128)
    start = tl.where(first, 0, tl.where(second, 128 * F, 128 * F + 128 * 128 + block * (128 * 128)))
    lanes_n, lanes_k = tl.arange(0, 128), tl.arange(0, BLOCK_N)
    mask_n, mask_k = n0 + lanes_n < 256 + CP, within + lanes_k < K

    acc = tl.zeros((128, BLOCK_N), tl.float32)
    acc_b = tl.zeros((BLOCK_M, 128), tl.float32)
    for m0 in range(split * BLOCK_M, N, SPLITS * BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M).to(INDEX)
        mask_m = offs_m < N
        offs = (offs_m * (256 + CP))[:, None] + (n0 + lanes_n)[None, :]
        dy = tl.load(grads_ptr + offs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        offs = (offs_m * (F + 256))[:, None] + (k0 + lanes_k)[None, :]
        a = tl.load(acts_ptr + offs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(tl.trans(dy.to(OPERAND)), a.to(OPERAND), acc, input_precision=PRECISION)
        acc_b += dy.to(tl.float32)

    offs = start + (lanes_n * K)[:, None] + (within + lanes_k)[None, :]
    tl.store(partial_ptr + offs, acc, mask=mask_n[:, None] & mask_k[None, :])
    if within == 0:
        biases = 128 * F + 128 * 128 + CP * 128
        tl.store(partial_ptr + biases + n0 + lanes_n, tl.sum(acc_b, axis=0), mask=mask_n)


@triton.jit(do_not_specialize=["N"])
def lenet_gradient_kernel(
    x_ptr, packed_ptr, p1_ptr, code1_ptr, acts_ptr, grads_ptr, dz_ptr, scratch_ptr, partial_ptr,
    N,
    WD: tl.constexpr, SPLITS1: tl.constexpr, SPLITS2: tl.constexpr, SPLITS3: tl.constexpr,
    PARTIAL2: tl.constexpr, PARTIAL3: tl.constexpr, ROW3: tl.constexpr,
    C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr, F: tl.constexpr,
    CLASSES: tl.constexpr, CP: tl.constexpr,
    FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M1: tl.constexpr, BLOCK_K1: tl.constexpr, BLOCK_M2: tl.constexpr, BLOCK_N2: tl.constexpr,
    BLOCK_M3: tl.constexpr, BLOCK_N3: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    PARTS: tl.constexpr = (288 + BLOCK_N2 - 1) // BLOCK_N2
    if pid < SPLITS1 * C:
        split = pid % SPLITS1
        first_convolution(
            x_ptr, code1_ptr, dz_ptr, packed_ptr + WD, scratch_ptr + pid * (64 * 128),
            partial_ptr + split * (C * 150 + 6), pid // SPLITS1, split, N,
            SPLITS1, C, SIZE, PAD, Q1, Q2, FRAME, SCALE, SHIFT, INDEX, OPERAND, PRECISION, BLOCK_M1, BLOCK_K1,
        )  # fmt: skip
    elif pid < SPLITS1 * C + SPLITS2 * PARTS:
        pid -= SPLITS1 * C
        split = pid % SPLITS2
        second_convolution(
            dz_ptr, p1_ptr, partial_ptr + PARTIAL2 + split * (64 * 288 + 64), pid // SPLITS2, split, N,
            SPLITS2, Q1, Q2, INDEX, OPERAND, PRECISION, BLOCK_M2, BLOCK_N2,
        )  # fmt: skip
    else:
        pid -= SPLITS1 * C + SPLITS2 * PARTS
        tile, split = pid // SPLITS3, pid % SPLITS3
        linear(
            acts_ptr, grads_ptr, partial_ptr + PARTIAL3 + split * ROW3, tile, split, N,
            SPLITS3, F, CP, INDEX, OPERAND, PRECISION, BLOCK_M3, BLOCK_N3,
        )  # fmt: skip


def sums(geometry, splits, device):
    """The tensors of a launch's sums: those of the first convolution before they are folded, and the partial ones."""
    sizes = splits.conv1 * geometry.channels * 64 * 128, splits.partials(geometry)[-1]
    return [torch.empty(size, dtype=torch.float32, device=device) for size in sizes]


def gradients(x, packed, geometry, format, pixels, memory, splits, scratch, partial):
    """Fills `partial` with the partial sums of all gradients of the images x, whose forward has filled `memory`."""
    N, tile = x.shape[0], tile_for(format, x.shape[0], geometry)
    hidden = 128 // tile.N3 * (1 + triton.cdiv(geometry.padded_classes, 128))
    tiles = triton.cdiv(geometry.features, tile.N3) + hidden
    _, partial2, partial3, _ = splits.partials(geometry)
    parts = triton.cdiv(288, tile.N2)
    lenet_gradient_kernel[(splits.conv1 * geometry.channels + splits.conv2 * parts + splits.linear * tiles,)](
        x, packed, memory["p1"], memory["code1"], memory["acts"], memory["grads"], memory["dz"], scratch, partial,
        N,
        WD=geometry.packed[2], SPLITS1=splits.conv1, SPLITS2=splits.conv2, SPLITS3=splits.linear,
        PARTIAL2=partial2, PARTIAL3=partial3, ROW3=geometry.row[-1],
        **geometry.constants, FRAME=pixels.frame, SCALE=pixels.scale, SHIFT=pixels.shift,
        INDEX=index_type(x, *memory.values()), OPERAND=operand_type(packed.dtype),
        PRECISION="ieee" if format == "ieee" else "tf32",
        BLOCK_M1=tile.M1, BLOCK_K1=tile.K1, BLOCK_M2=tile.M2, BLOCK_N2=tile.N2,
        BLOCK_M3=tile.M3, BLOCK_N3=tile.N3,        num_warps=tile.num_warps, num_stages=1, **OPTIONS,
    )  # fmt: skip
