"""Which tile computes a matrix product, and how many programs share its sum.

Each family of products has a table of candidates. The chooser takes the tile with the least time by a model with two
numbers a tile, which `python -m bench.tune` measures on a card:

    microseconds = ceil(programs / multiprocessors) * (steps * microseconds of a step + fixed microseconds)

A launch takes at least as long as L2 takes to deliver its operands, and as device memory where that is known.

A choice depends only on shapes, dtypes and the kind of card, so that sums have the same bits on every card of a kind.
"""

import contextlib
import math
from typing import NamedTuple

import torch

from ._common import INTERPRETED, cdiv, compute_capability, number_format, power_of_2
from .launching import forget
from .measured_tiles import MEASURED
from .tile_tables import ALL_TAPS, PRODUCTS, SPECIAL, TABLES, Tile


class Card(NamedTuple):
    """What the times of tiles that were not measured are computed from.

    rates: floating-point operations a cycle of a multiprocessor, by row of the tables.
    """

    multiprocessors: int
    gigahertz: float
    rates: dict


# By major compute capability; 0 stands for AMD's cards. From the data sheets of A100, H100, B200 and MI300X; the clock
# of an H100 is that under load.
CARDS = {
    8: Card(108, 1.41, {"half": 2048, "tf32": 1024, "ieee": 128, "fp64": 128}),
    9: Card(132, 1.755, {"half": 4096, "tf32": 2048, "ieee": 256, "fp64": 256}),
    10: Card(148, 1.85, {"half": 8192, "tf32": 4096, "ieee": 256, "fp64": 128}),
    0: Card(304, 2.1, {"half": 2048, "tf32": 1024, "ieee": 256, "fp64": 256}),
}
# Bytes a cycle that a multiprocessor reads from L2 (8 TB/s on an H100, which is assumed), and from shared memory.
L2_BYTES, SHARED_BYTES = 34, 128
# Cycles from the start of a program to its first product, and bytes a second of device memory.
LATENCY, MEMORY = 1500, 4.3e12
# Microseconds of one more launch.
LAUNCH = 2.0
FAMILIES = (*TABLES, "products")
_ITEMSIZES = {"half": 2, "tf32": 4, "ieee": 4, "fp64": 8}
# The tiles that `only` allows, by family.
_forced: dict = {}


def card():
    """The Card whose numbers stand for the current device."""
    capability = compute_capability()
    return CARDS[min(10, max(8, capability)) if capability else 0]


def table(family, row):
    """The tiles of a family in a number format, for the architecture of the current device."""
    of_all = PRODUCTS if family == "products" else TABLES[family]
    return SPECIAL.get(compute_capability(), {}).get(family, {}).get(row) or of_all.get(row, ())


def candidates(family, row):
    """Those of the table that are chosen from: none that failed on a card, and if some were measured, only these.

    Computed numbers would favour tiles for which there was no time.
    """
    if family in _forced:
        return (_forced[family],)
    every, measured = table(family, row), _measured(family, row)
    working = tuple(t for t in every if measured.get(tuple(t), ()) is not None)
    return tuple(t for t in working if tuple(t) in measured) or working or every


def _measured(family, row):
    """{tile: its two numbers, or None if it failed} as measured on the current device's architecture."""
    return MEASURED.get(f"sm_{compute_capability()}0", {}).get("families", {}).get(family, {}).get(row, {})


@contextlib.contextmanager
def only(family, tile):
    """Context in which this tile computes every product of a family that it can.

    A weight gradient whose filter has not the tile's taps takes another. Launches are planned anew, also after it.
    """
    _forced[family] = tile
    forget()
    try:
        yield
    finally:
        del _forced[family]
        forget()


def _operands(row, tile, taps):
    """Bytes of the operands of a step."""
    rows = 3 * tile.M + 3 * tile.N if tile.taps == ALL_TAPS else tile.M + tile.N * taps
    return rows * tile.K * _ITEMSIZES[row]


def numbers(family, row, tile):
    """(microseconds of a step, fixed microseconds) of a program with this tile, while every multiprocessor is busy."""
    return _measured(family, row).get(tuple(tile)) or computed(row, tile)


def computed(row, tile):
    """The numbers of a tile that was not measured, from what the card can do at the most."""
    here, itemsize, columns = card(), _ITEMSIZES[row], tile.N * tile.taps
    # Operands are written to shared memory once, and read from there.
    if row == "ieee" and compute_capability():
        # A thread of FMA reads the rows and columns of its share of the tile, which is about a square.
        read = 2 * math.isqrt(tile.M * columns * 32 * tile.num_warps) * tile.K * itemsize
    else:
        # Four warps compute 64 rows: they read these and all columns, or a share of the columns where warps are more.
        rows = tile.M * max(1, tile.num_warps // 4 * 64 // tile.M) * tile.taps
        read = (rows + cdiv(tile.M, 64) * columns) * tile.K * itemsize
    step = max(2 * tile.M * columns * tile.K / here.rates[row], (_operands(row, tile, tile.taps) + read) / SHARED_BYTES)
    # Two programs of a small tile hide each other's latency.
    latency = LATENCY / (2 if tile.M * columns <= 128 * 128 else 1)
    return step / here.gigahertz / 1e3, (latency + tile.M * columns * itemsize / L2_BYTES) / here.gigahertz / 1e3


def microseconds(family, row, tile, programs, steps, taps=1):
    """The model's time of a launch, which is at least that of reading its operands from L2.

    taps: of a weight gradient, how many a program has on average.
    """
    here, (step, fixed) = card(), numbers(family, row, tile)
    l2 = programs * steps * _operands(row, tile, taps) / L2_BYTES / here.multiprocessors / here.gigahertz / 1e3
    return max(cdiv(programs, here.multiprocessors) * (steps * step + fixed), l2)


def wants_k_inner(dtype, precision):
    """Whether a product's operands should be contiguous along the summed index, even at the cost of a copy.

    The matrix units of sm_90 and sm_100 read tf32 operands in that order only. Triton reorders other operands 4 bytes
    at a time, which on an H200 took up to five times as long as the product.
    """
    return dtype == torch.float32 and precision == "tf32" and compute_capability() in (9, 10)


def clamped_power(size, least, most):
    """The power of two at or above `size`, clamped to [least, most]."""
    return min(most, max(least, power_of_2(size)))


def interpreted_tile(M, N, K):
    """A tile for the interpreter, which takes as long for a small operation as for a large one: few, but several."""
    m, n, k = clamped_power(M // 3, 32, 4096), clamped_power(N // 2, 16, 128), clamped_power(K // 4, 32, 256)
    return Tile(m, n, k, num_warps=4, num_stages=1)


def gemm_tile(family, M, N, K, dtype, precision, *, taps=1, repeats=1):
    """The tile for `repeats` products of (M, taps * K) and (taps * K, N); a tap's K begins a new step."""
    row = number_format(dtype, precision)
    if INTERPRETED:
        return interpreted_tile(M, N, K)

    def time(t):
        programs, steps = cdiv(M, t.M) * cdiv(N, t.N) * repeats, taps * max(1, cdiv(K, t.K))
        return microseconds(family, row, t, programs, steps)

    return min(candidates(family, row), key=time)


def _no_wider(tiles, narrow):
    """The tiles of at most `narrow` columns, or the narrowest."""
    return [t for t in tiles if t.N <= narrow] or [min(tiles, key=lambda t: t.N)]


def flat_block(numel, block):
    """The block size of an elementwise kernel over `numel` elements: `block`, or a size that suits the interpreter."""
    return clamped_power(numel // 3, 256, 2**16) if INTERPRETED else block


def _most_splits(tiles, steps):
    """The most programs that may share a product of so many steps: each has four, and four run on a multiprocessor."""
    if INTERPRETED:
        return max(1, min(2 // max(tiles, 1), steps))
    return max(1, min(4 * card().multiprocessors // max(tiles, 1), steps // 4))


def _best_split(family, row, tile, tiles, steps, taps, operands):
    """(microseconds, splits): by the model, and with the launch that adds up partial sums and their traffic.

    taps: as in `microseconds`. operands: bytes that are read from device memory in any case.
    """
    most = _most_splits(tiles, steps)
    if INTERPRETED:
        return 0.0, most
    # In float32.
    partial = 4 * tiles * tile.M * tile.N * tile.taps

    def time(splits):
        written = splits * partial if splits > 1 else 0
        product = microseconds(family, row, tile, tiles * splits, cdiv(steps, splits), taps)
        adding = LAUNCH + written / MEMORY * 1e6 if splits > 1 else 0.0
        return max(product, (operands + written) / MEMORY * 1e6) + adding, splits

    return min(map(time, range(1, most + 1)))


def gradient_tile(
    family, M, N, K, dtype, precision, *, taps=1, most_taps=1, padded=None, repeats=1, narrow=math.inf
):  # fmt: skip
    """(Tile, tiles, programs that share a tile's sum, products of each but the last) of a weight gradient.

    It is the product of (M, K) and (K, N) for each of `taps` and `repeats`, of which a program computes at most
    `most_taps` and `narrow` columns, or all taps in a sum of `padded` products unless that is None. No share is empty,
    and one is a whole number of blocks.
    """
    row = number_format(dtype, precision)

    def tiles(t):
        return cdiv(M, t.M) * max(1, cdiv(N, t.N)) * cdiv(taps, t.taps) * repeats

    def allowed(rows):
        return [t for t in _no_wider(rows, narrow) if t.taps <= most_taps or padded and t.taps == taps]

    def length(t):
        return padded if t.taps > most_taps else K

    def best(t):
        operands = (M + N) * repeats * K * _ITEMSIZES[row]
        return _best_split(family, row, t, tiles(t), cdiv(length(t), t.K), taps / cdiv(taps, t.taps), operands)

    if INTERPRETED:
        tile = interpreted_tile(M, min(N, narrow), K)._replace(taps=taps if padded else min(taps, most_taps))
    else:
        found = allowed(candidates(family, row)) or allowed(table(family, row))
        tile = min(found, key=lambda t: best(t)[0])
    per_split = cdiv(cdiv(length(tile), tile.K), best(tile)[1]) * tile.K
    return tile, tiles(tile), cdiv(length(tile), per_split), per_split


# Programs with a 128 x 128 tile that an H100 or H200 runs at once.
RESIDENT = 2 * 132


def split_count(tiles, K, block_k):
    """How many programs share the K products of one tile, so that a large GPU is filled.

    It depends on shapes alone: asking the device would give sums that differ from card to card.
    """
    programs, least = (2, 1) if INTERPRETED else (512, 4)
    return max(1, min(programs // max(tiles, 1), K // (least * block_k)))


def split_product(tiles, K, block_k, elements=128 * 128):
    """(programs that share the K > 0 products of a tile of `elements`, products of each but the last); none is idle.

    For kernels without a table: the number of programs minimises a model of the time in steps of block_k products, the
    steps of one program times the waves that an H200 needs for all programs, plus the traffic of the partial sums at
    3 TB/s against 3 TFLOP/s for each multiprocessor.
    """
    if INTERPRETED:
        splits = split_count(tiles, K, block_k)
    else:
        resident, steps = RESIDENT * (1 if elements >= 128 * 128 else 2), K / block_k
        most = max(1, min(4 * resident // tiles, K // (4 * block_k)))
        splits = min(range(1, most + 1), key=lambda s: cdiv(tiles * s, resident) * steps / s + 2 * tiles * s / block_k)
    per_split = cdiv(cdiv(K, splits), block_k) * block_k
    return cdiv(K, per_split), per_split
