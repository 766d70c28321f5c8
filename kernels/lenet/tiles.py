"""The tiles of LeNet's forward and of its gradients, by number format, card and size of the batch."""

from typing import NamedTuple

import triton

from .._common import INTERPRETED, cached_for_architecture, cdiv, compute_capability, power_of_2


class ForwardTile(NamedTuple):
    """Blocks of a number format.

    Most images of a program, and of its convolutions at a time; squares and windows of a product, and its depth; the
    depth of a linear layer's product, and features of its gradient. The filters of the first `kept` convolutions stay
    in shared memory for all images of a program, as far as registers allow it, and the loops over a product's depth
    are unrolled for them.
    """

    images: int
    S: int
    M1: int
    K1: int
    M2: int
    K2: int
    K: int
    F: int
    kept: int
    num_warps: int


# By whether it is for training; read off machine code (no register spills) and not yet timed. A turn of the lanes takes
# M1 or M2 patches.
FORWARD = {
    True: {
        "bfloat16": ForwardTile(64, 64, 64, 64, 128, 64, 32, 64, 2, 8),
        "tf32": ForwardTile(32, 32, 128, 32, 64, 32, 32, 64, 0, 8),
        "ieee": ForwardTile(16, 16, 32, 16, 64, 16, 16, 32, 0, 4),
        "lanes": ForwardTile(64, 64, 128, 16, 256, 16, 16, 64, 0, 4),
    },
    False: {
        "bfloat16": ForwardTile(64, 64, 64, 64, 128, 64, 32, 64, 1, 8),
        "tf32": ForwardTile(64, 32, 128, 32, 128, 32, 32, 32, 1, 8),
        "ieee": ForwardTile(16, 16, 64, 16, 64, 16, 16, 32, 0, 8),
        "lanes": ForwardTile(64, 64, 128, 16, 256, 16, 16, 64, 0, 4),
    },
}
# For sm_90, whose matrix units take rows from registers and filters from shared memory, which holds them all. 16 rows
# are a warp's: with 128 each row of a linear layer's product is loaded once.
HOPPER_FORWARD = {
    True: {
        "bfloat16": ForwardTile(128, 64, 128, 64, 128, 64, 32, 64, 2, 8),
        "tf32": ForwardTile(128, 32, 128, 32, 128, 32, 32, 32, 2, 8),
    },
    False: {
        "bfloat16": ForwardTile(128, 64, 128, 64, 128, 64, 32, 64, 2, 8),
        "tf32": ForwardTile(128, 32, 128, 32, 128, 32, 32, 32, 2, 8),
    },
}


def _hopper_forward(format, images, geometry, train):
    """The Tile of sm_90 for bfloat16 or tf32."""
    tile, colours, half = HOPPER_FORWARD[train][format], geometry.channels > 1, format == "bfloat16"
    if colours and train:
        # Sums over three channels stay in registers for longer.
        tile = tile._replace(images=64, M1=64)
    if colours and not half:
        # And their filters would fill shared memory.
        tile = tile._replace(kept=1)
    if half and not colours and images > 132 * 64:
        # Two programs of four warps hide more of each other's waiting than one of eight, see bench/results.
        return ForwardTile(64, 16, 64, 64, 64, 64, 32, 64, 2, 4)
    if images <= 132 * tile.images // 2:
        # Products of few rows have registers for more columns.
        tile = tile._replace(F=128)
    if images <= 132 * 16 and not colours and (half or train):
        # And for more depth: the program waits for memory fewer times in a row.
        tile = tile._replace(K=128 if half else 64)
    if images <= 132 and not (half or train):
        # One image fills no more rows.
        tile = tile._replace(M1=64, M2=64)
    return tile


def _other_forward(form, images, geometry, train):
    """The Tile of another architecture, or for full float32."""
    tile, half = FORWARD[train][form], form == "bfloat16"
    if form == "lanes":
        # But on sm_90 products of 64 rows would spill registers.
        return tile if compute_capability() == 9 else tile._replace(images=32, S=32, M2=128)
    if geometry.channels > 1:
        tile = tile._replace(M1=min(tile.M1, 64), K=64 if half else tile.K, kept=1 if half else 0)
        if train:
            tile = tile._replace(images=min(tile.images, 32), M2=64, K2=min(tile.K2, 32), F=32)
    elif half and not train and compute_capability() not in (0, 10):
        tile = tile._replace(kept=2)
    elif half and train and compute_capability() == 10 and images <= 132 * 16:
        # Products of few rows take registers that those of the convolutions lack.
        tile = tile._replace(M2=64)
    return tile


@cached_for_architecture
def forward_tile(form, images, geometry, train):
    """(images a program, Tile) for a batch of so many images."""
    if INTERPRETED:
        block = min(64, power_of_2(cdiv(images, 2)))
        squares = (geometry.pooled[0] // 2) ** 2
        rows = [min(2048, power_of_2(block * n)) for n in (squares, geometry.pooled[1] ** 2)]
        kept = FORWARD[train][form].kept
        return block, ForwardTile(64, max(1, block // 2), rows[0], 64, rows[1], 32, 128, 128, kept, 4)
    hopper = compute_capability() == 9 and form in HOPPER_FORWARD[train]
    tile = (_hopper_forward if hopper else _other_forward)(form, images, geometry, train)
    if tile.kept < 2:
        # Filters that are not kept are loaded in blocks of one depth, of which 288 rows have to be a multiple.
        tile = tile._replace(K2=min(tile.K2, 32))
    # Few images are spread over the card's multiprocessors; of many a program takes what fills its products.
    block = min(tile.images, power_of_2(cdiv(images, 132)))
    return block, tile._replace(F=128) if form == "lanes" and block < 32 else tile


class GradientTile(NamedTuple):
    """Blocks of a number format: images that a turn of each role adds, and columns of its sum.

    In the first role K1 is the depth of a window's product, and P1 how many images' one-hot rows are made at a time.
    """

    M1: int
    K1: int
    P1: int
    M2: int
    N2: int
    M3: int
    N3: int
    num_warps: int


# Read off machine code (no register spills) and not yet timed. Lanes take K1 patches a turn once M1 images are through.
GRADIENT = {
    "bfloat16": GradientTile(128, 64, 32, 64, 256, 64, 64, 4),
    "tf32": GradientTile(128, 32, 16, 32, 256, 32, 64, 4),
    "ieee": GradientTile(32, 16, 16, 16, 64, 16, 64, 4),
    "lanes": GradientTile(128, 128, 1, 128, 1, 16, 64, 4),
}
# For NVIDIA's matrix units whose operands pass through registers: all but those of sm_90 and sm_100.
SMALL_GRADIENT = {
    **GRADIENT,
    "bfloat16": GradientTile(64, 64, 64, 64, 128, 64, 64, 8),
    "tf32": GradientTile(64, 32, 32, 64, 128, 32, 64, 8),
}


@cached_for_architecture
def gradient_tile(form, images, geometry):
    """The Tile for a batch of so many images."""
    if not INTERPRETED:
        tile = (GRADIENT if compute_capability() in (0, 9, 10) else SMALL_GRADIENT)[form]
        if form == "lanes":
            return tile
        if compute_capability() == 10:
            # Results lie in a memory of their own, which many small products fill; four warps are short of registers.
            tile = tile._replace(P1=tile.M1 // 2, num_warps=8)
        elif compute_capability() == 9:
            if images <= 64:
                # That many images fill no more rows.
                tile = tile._replace(M1=64, P1=16)
            elif geometry.padding:
                # Registers that the conditions on padding take.
                tile = tile._replace(P1=16)
            if form == "tf32":
                # Operands of 32 bits that pass through registers.
                tile = tile._replace(M2=16, M3=16)
        return tile
    rows = min(2048, max(32, triton.next_power_of_2(images // 2)))
    if form == "lanes":
        windows = min(2048, triton.next_power_of_2(images * geometry.pooled[1] ** 2 // 2))
        return GradientTile(rows, rows * 8, 1, windows, 1, rows, 128, 4)
    return GradientTile(rows, 64, rows // 2, rows, 128 if form == "ieee" else 256, rows, 128, 4)
