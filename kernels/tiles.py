"""Which tile computes a product, and how many programs share its sum: one table for each kind of product, one chooser.

Both are functions of shapes, dtypes and the kind of card alone, so that sums repeat on every card of a kind.
"""

from typing import NamedTuple

import torch

from ._common import INTERPRETED, OPTIONS, cdiv, compute_capability, number_format, power_of_2


class Tile(NamedTuple):
    """The block that one program computes, and the launch options that go with it."""

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
    """Whether a product's operands should have the summed index side by side in memory, also at the cost of a copy.

    The matrix units of sm_90 read tf32 in that order alone, where Triton reorders other operands 4 bytes at a time: on
    an H200 that took up to five times as long as the product.
    """
    return dtype == torch.float32 and precision == "tf32" and compute_capability() == 9


# Programs of 128 x 128 that an H100 or H200 runs at once.
RESIDENT = 2 * 132
# Tiles by number format, from the widest down. Those of float32 and float64 are read off machine code (no register
# spills); the others were timed on an H200, see bench/results/products-nvidia-h200.md. Every row is compiled for every
# architecture by bench.machine_code, so each has to be worth it.
SQUARE = {
    "half": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(32, 32, 64, 4, 3)),
    "tf32": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
    "ieee": (Tile(64, 64, 32, 4, 3), Tile(32, 32, 16, 4, 3)),
    "fp64": (Tile(64, 64, 16, 4, 2), Tile(32, 32, 16, 4, 3)),
}
# For rows side by side in memory on sm_90: in tf32 four warps were faster than eight.
HOPPER_SQUARE = {**SQUARE, "tf32": (Tile(128, 128, 32, 4, 3), *SQUARE["tf32"][1:])}
# For the weight's gradient on sm_90, whose operands both have the summed index far apart. In tf32 four warps on 64 rows
# would be given to the units that do not read such operands; those that two warps get take 0.3 to 0.5 of the time.
GRADIENT = {**SQUARE, "tf32": (Tile(64, 128, 32, 2, 3), Tile(64, 64, 32, 2, 3), Tile(32, 32, 32, 4, 3))}
# For products of many more rows than columns, as the pixels of a batch are.
TALL = {
    "half": (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(128, 32, 64, 4, 3)),
    "tf32": (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(128, 32, 32, 4, 3)),
    "ieee": (Tile(128, 64, 16, 8, 2), Tile(64, 32, 16, 4, 3)),
    "fp64": (Tile(64, 64, 16, 4, 2), Tile(32, 32, 16, 4, 3)),
}
# For as many rows, where the best so far and its position take as many registers as the products.
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
    """The table of tiles for a weight's gradient."""
    return GRADIENT if compute_capability() == 9 else SQUARE


def _block(size, least, most):
    """The power of two at or above `size`, within bounds."""
    return min(most, max(least, power_of_2(size)))


def gemm_tile(table, M, N, K, dtype, precision, halve=True):
    """The tile of a table for an (M, K) x (K, N) product: the widest that it fills over half of.

    On sm_90 one of half as many rows, if `halve`, where there are too few for every multiprocessor to have two.
    """
    if INTERPRETED:
        # The interpreter's time goes by the operation, whatever its size: few tiles, yet more than one.
        return Tile(_block(M // 3, 32, 4096), _block(N // 2, 16, 128), _block(K // 4, 32, 256), 4, 1)
    tiles, square = table[number_format(dtype, precision)], table is not TALL and table is not POOLED
    tile = next((t for t in tiles if N > t.N // 2 and (M > t.M // 2 or not square)), tiles[-1])
    if tile[:2] == (128, 128) and table is not GRADIENT and compute_capability() == 9:
        if halve and cdiv(M, 128) * cdiv(N, 128) < RESIDENT:
            return tile._replace(M=64, num_warps=4)
    return tile


def flat_block(numel, block):
    """The block of a kernel that walks `numel` elements: `block`, or what suits the interpreter."""
    return _block(numel // 3, 256, 2**16) if INTERPRETED else block


def split_count(tiles, K, block_k):
    """How many programs share the K products of one tile: enough to fill a large GPU, a function of shapes alone.

    Asking the device would give sums that differ from card to card.
    """
    programs, least = (2, 1) if INTERPRETED else (512, 4)
    return max(1, min(programs // max(tiles, 1), K // (least * block_k)))


def split_product(tiles, K, block_k, elements=128 * 128):
    """(programs that share the K > 0 products of a tile of `elements`, products of each but the last); none is idle.

    The number of least time by a model, in steps of block_k products: a program takes its share of them in as many
    turns as the H200 needs for all programs, and partial sums are written and read at 3 TB/s, where a multiprocessor
    does 3 TFLOP/s.
    """
    if INTERPRETED:
        splits = split_count(tiles, K, block_k)
    else:
        resident, steps = RESIDENT * (1 if elements >= 128 * 128 else 2), K / block_k
        most = max(1, min(4 * resident // tiles, K // (4 * block_k)))
        splits = min(range(1, most + 1), key=lambda s: cdiv(tiles * s, resident) * steps / s + 2 * tiles * s / block_k)
    per_split = cdiv(cdiv(K, splits), block_k) * block_k
    return cdiv(K, per_split), per_split
