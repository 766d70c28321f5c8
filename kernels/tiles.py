"""Which tile computes a matrix product, and how many programs share its sum.

There is one table for each kind of product, and `gemm_tile` chooses one of its tiles. Both results depend only on
shapes, dtypes and the architecture, so that sums have the same bits on every card of a kind.
"""

from typing import NamedTuple

import torch

from ._common import INTERPRETED, OPTIONS, cdiv, compute_capability, number_format, power_of_2


class Tile(NamedTuple):
    """The block that one program computes, and its launch options."""

    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int

    @property
    def blocks(self):
        return {"BLOCK_M": self.M, "BLOCK_N": self.N, "BLOCK_K": self.K}

    @property
    def options(self):
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **OPTIONS}


def wants_k_inner(dtype, precision):
    """Whether a product's operands should be contiguous along the summed index, even at the cost of a copy.

    The matrix units of sm_90 read tf32 operands in that order only. Triton reorders other operands 4 bytes at a time,
    which on an H200 took up to five times as long as the product.
    """
    return dtype == torch.float32 and precision == "tf32" and compute_capability() == 9


# Programs with a 128 x 128 tile that an H100 or H200 runs at once.
RESIDENT = 2 * 132
# Tiles by number format, the widest first. Those of ieee float32 and float64 were chosen from machine code (no register
# spills); the others were timed on an H200, see bench/results/products-nvidia-h200.md. Every row is compiled for every
# architecture by bench.machine_code, so each has to be worth it.
SQUARE = {
    "half": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(32, 32, 64, 4, 3)),
    "tf32": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
    "ieee": (Tile(64, 64, 32, 4, 3), Tile(32, 32, 16, 4, 3)),
    "fp64": (Tile(64, 64, 16, 4, 2), Tile(32, 32, 16, 4, 3)),
}
# For operands that are contiguous along the summed index on sm_90: in tf32 four warps were faster than eight.
HOPPER_SQUARE = {**SQUARE, "tf32": (Tile(128, 128, 32, 4, 3), *SQUARE["tf32"][1:])}
# For the weight gradient on sm_90, where neither operand is contiguous along the summed index. In tf32 four warps on 64
# rows would get wgmma, which cannot read such operands; two warps get mma, which takes 0.3 to 0.5 of the time.
GRADIENT = {**SQUARE, "tf32": (Tile(64, 128, 32, 2, 3), Tile(64, 64, 32, 2, 3), Tile(32, 32, 32, 4, 3))}
# For products with many more rows than columns, such as the pixels of a batch.
TALL = {
    "half": (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(128, 32, 64, 4, 3)),
    "tf32": (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(128, 32, 32, 4, 3)),
    "ieee": (Tile(128, 64, 16, 8, 2), Tile(64, 32, 16, 4, 3)),
    "fp64": (Tile(64, 64, 16, 4, 2), Tile(32, 32, 16, 4, 3)),
}
# The same with pooling, where the maximum so far and its position take as many registers as the accumulator.
POOLED = {
    "half": (Tile(64, 64, 64, 8, 3), Tile(64, 32, 64, 8, 3)),
    "tf32": (Tile(64, 64, 32, 8, 3),),
    "ieee": (Tile(64, 32, 16, 8, 2),),
    "fp64": (Tile(32, 16, 16, 4, 2),),
}


def square_tiles():
    """The table of tiles for a product of matrices."""
    return HOPPER_SQUARE if compute_capability() == 9 else SQUARE


def gradient_tiles():
    """The table of tiles for a weight gradient."""
    return GRADIENT if compute_capability() == 9 else SQUARE


def clamped_power(size, least, most):
    """The power of two at or above `size`, clamped to [least, most]."""
    return min(most, max(least, power_of_2(size)))


def gemm_tile(table, M, N, K, dtype, precision, halve=True):
    """The tile for an (M, K) x (K, N) product: the widest of the table that the product fills more than half of.

    On sm_90, if `halve`, a 128 x 128 tile gets half as many rows if there are too few for two on every multiprocessor.
    """
    if INTERPRETED:
        # The interpreter takes as long for a small operation as for a large one: few tiles, yet more than one.
        m, n, k = clamped_power(M // 3, 32, 4096), clamped_power(N // 2, 16, 128), clamped_power(K // 4, 32, 256)
        return Tile(m, n, k, num_warps=4, num_stages=1)
    tiles, square = table[number_format(dtype, precision)], table is not TALL and table is not POOLED
    tile = next((t for t in tiles if N > t.N // 2 and (M > t.M // 2 or not square)), tiles[-1])
    if tile[:2] == (128, 128) and table is not GRADIENT and compute_capability() == 9:
        if halve and cdiv(M, 128) * cdiv(N, 128) < RESIDENT:
            return tile._replace(M=64, num_warps=4)
    return tile


def flat_block(numel, block):
    """The block size of an elementwise kernel over `numel` elements: `block`, or a size that suits the interpreter."""
    return clamped_power(numel // 3, 256, 2**16) if INTERPRETED else block


def split_count(tiles, K, block_k):
    """How many programs share the K products of one tile, so that a large GPU is filled.

    It depends on shapes alone: asking the device would give sums that differ from card to card.
    """
    programs, least = (2, 1) if INTERPRETED else (512, 4)
    return max(1, min(programs // max(tiles, 1), K // (least * block_k)))


def split_product(tiles, K, block_k, elements=128 * 128):
    """(programs that share the K > 0 products of a tile of `elements`, products of each but the last); none is idle.

    The number of programs minimises a model of the time in steps of block_k products: the steps of one program times
    the waves that an H200 needs for all programs, plus the traffic of the partial sums at 3 TB/s against 3 TFLOP/s for
    each multiprocessor.
    """
    if INTERPRETED:
        splits = split_count(tiles, K, block_k)
    else:
        resident, steps = RESIDENT * (1 if elements >= 128 * 128 else 2), K / block_k
        most = max(1, min(4 * resident // tiles, K // (4 * block_k)))
        splits = min(range(1, most + 1), key=lambda s: cdiv(tiles * s, resident) * steps / s + 2 * tiles * s / block_k)
    per_split = cdiv(cdiv(K, splits), block_k) * block_k
    return cdiv(K, per_split), per_split
