"""The tables of tiles, from which tiles.py chooses."""

from typing import NamedTuple

from ._common import OPTIONS


class Tile(NamedTuple):
    """The block that one program computes, and its launch options.

    taps: of a weight gradient, how many products, one a tap of the filter, a program computes. They share a block of
    dy, or, of all taps of a 3 x 3 filter, three blocks of dy and three of x.
    """

    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int
    taps: int = 1

    @property
    def blocks(self):
        return {"BLOCK_M": self.M, "BLOCK_N": self.N, "BLOCK_K": self.K}

    @property
    def options(self):
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **OPTIONS}


# The taps of a 3 x 3 filter.
ALL_TAPS = 9
# Where each element has an address of its own, wider tiles spill registers.
NARROW = 64


# Tables by family and number format, the widest tile first. Every row is compiled for every architecture by
# bench.machine_code, so each has to be worth it.
#
# patches: rows are the pixels of a batch, columns the channels of a result: forward and input gradient of convolutions;
# gathered patches: the same where the source of every pixel is computed; narrow patches: where each element of an
# operand has an address of its own.
# matrices: linear's products, by pointers.
# products: the same by tensor descriptors, on sm_90 and sm_100.
# gradient: a weight gradient, with its sum over pixels or rows; gathered gradient: the same where the source of every
# pixel is computed; flat gradient: of few channels, with one index over channels and taps; chain gradient: those of a
# chain of linears.
# pooled: patches with pooling, where the maximum so far and its position take as many registers as the accumulator.
TABLES = {
    "patches": {
        "half": (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(128, 32, 64, 4, 3)),
        "tf32": (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(128, 32, 32, 4, 3)),
        "ieee": (Tile(128, 64, 16, 8, 2), Tile(64, 32, 16, 4, 3)),
        "fp64": (Tile(64, 64, 16, 4, 2), Tile(32, 32, 16, 4, 3)),
    },
    "matrices": {
        "half": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(32, 32, 64, 4, 3)),
        "tf32": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
        "ieee": (Tile(64, 64, 32, 4, 3), Tile(32, 32, 16, 4, 3)),
        "fp64": (Tile(64, 64, 16, 4, 2), Tile(32, 32, 16, 4, 3)),
    },
    "pooled": {
        "half": (Tile(64, 64, 64, 8, 3), Tile(64, 32, 64, 8, 3)),
        "tf32": (Tile(64, 64, 32, 8, 3),),
        "ieee": (Tile(64, 32, 16, 8, 2),),
        "fp64": (Tile(32, 16, 16, 4, 2),),
    },
}
TABLES["gathered patches"], TABLES["gathered gradient"] = TABLES["patches"], TABLES["matrices"]
for _narrow, _family in (("narrow patches", "patches"), ("flat gradient", "matrices")):
    TABLES[_narrow] = {row: tuple(t for t in tiles if t.N <= NARROW) for row, tiles in TABLES[_family].items()}
# In full float32 the positions of 32 pixels would spill registers.
TABLES["gradient"] = {**TABLES["matrices"], "ieee": (Tile(64, 64, 16, 4, 3), Tile(32, 32, 16, 4, 3))}
# Small tiles, so that several programs share even a small layer.
TABLES["chain gradient"] = {row: tiles[-2:] for row, tiles in TABLES["matrices"].items()}
# On sm_90 a tile of 128 x 256 reads 128 bytes of shared memory a cycle at the full rate of the matrix units, one of
# 128 x 128 would need 160. In tf32 four warps on 128 rows were faster than eight on an H200, see
# bench/results/products-nvidia-h200.md. A weight gradient's operands are not contiguous along the summed index: wgmma
# cannot read these in tf32, and two warps get mma, which takes 0.3 to 0.5 of the time.
HOPPER = {
    "patches": {
        "half": (
            Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 256, 64, 4, 3),
            Tile(64, 128, 64, 4, 3), Tile(512, 64, 64, 8, 2), Tile(256, 64, 64, 8, 3), Tile(128, 64, 64, 8, 3),
            Tile(128, 32, 64, 4, 3),
        ),
        "tf32": (
            Tile(128, 256, 32, 8, 3), Tile(256, 128, 32, 8, 3), Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3),
            Tile(256, 64, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(128, 32, 32, 4, 3),
        ),
    },
    "matrices": {
        "half": (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), *TABLES["matrices"]["half"][1:]),
        "tf32": (Tile(128, 128, 32, 4, 3), Tile(64, 128, 32, 4, 3), *TABLES["matrices"]["tf32"][1:]),
    },
    "gradient": {
        "half": (
            Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3, 2), Tile(128, 128, 64, 8, 3),
            Tile(128, 64, 64, 8, 3, 3), Tile(64, 64, 64, 8, 3, ALL_TAPS), Tile(64, 64, 64, 4, 3, 3),
            Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3),
            Tile(32, 32, 64, 4, 3),
        ),
        "tf32": (Tile(64, 128, 32, 2, 3), Tile(64, 64, 32, 2, 3), Tile(32, 32, 32, 4, 3)),
    },
}  # fmt: skip
HOPPER["gathered gradient"] = {"tf32": HOPPER["gradient"]["tf32"]}
PRODUCTS = {
    "half": (
        Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3),
        Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 4),
    ),
    "tf32": (
        Tile(128, 256, 32, 8, 3), Tile(256, 128, 32, 8, 3), Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3),
        Tile(64, 64, 32, 4, 4),
    ),
}  # fmt: skip
# For sm_100 triton 3.7.1 makes code that reads sums of this tile before they are loaded, as tests/ptx finds.
HOPPER["products"] = {"half": (*PRODUCTS["half"], Tile(64, 256, 64, 4, 3))}
# On sm_100 four warps spill registers in weight gradients of 64 x 64.
BLACKWELL = {
    family: {"half": tuple(t._replace(num_warps=8) if t.M == 64 else t for t in TABLES[family]["half"])}
    for family in ("gradient", "chain gradient")
}
# By major compute capability, the families and formats that have tiles of their own there.
SPECIAL = {9: HOPPER, 10: BLACKWELL}
