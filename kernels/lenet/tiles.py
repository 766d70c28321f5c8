"""The tiles of LeNet's forward and of its gradients, by number format, architecture and batch size."""

from typing import NamedTuple

from .._common import INTERPRETED, cached_for_architecture, cdiv, compute_capability, power_of_2


def form(format):
    """The row of the tables of tiles: "lanes" if lanes.py and lanes_gradient.py serve the format, else `format`.

    AMD's matrix units support full float32, and in the interpreter matrix products take far fewer steps.
    """
    if format != "ieee" or INTERPRETED:
        return format
    return "lanes" if compute_capability() else format


class ForwardTile(NamedTuple):
    """Block sizes of the forward launch.

    The filters of the first `kept` convolutions stay in shared memory for all images of a program, and the loops over K
    of their products are unrolled.
    """

    images: int  # the most of a program
    S: int  # images of its convolutions at a time
    M1: int  # squares of the first convolution's product
    K1: int
    M2: int  # windows of the second convolution's product
    K2: int
    K: int  # of the linear layers' products
    F: int  # features of fc1's input gradient at a time
    kept: int
    num_warps: int


# Keyed by `train`, then by number format. Chosen from machine code (no register spills) and not yet timed. "lanes" has
# M1 and M2 patches in an iteration.
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
# For sm_90, whose matrix units read rows from registers and filters from shared memory, which holds all of them. A warp
# has 16 rows: with 128, eight warps load each row of a linear layer's product once.
HOPPER_FORWARD = {
    "bfloat16": ForwardTile(128, 64, 128, 64, 128, 64, 32, 64, 2, 8),
    "tf32": ForwardTile(128, 32, 128, 32, 128, 32, 32, 32, 2, 8),
}


def _hopper_forward(format, images, geometry, train):
    """The tile for sm_90 in bfloat16 or tf32."""
    tile, colours, half = HOPPER_FORWARD[format], geometry.channels > 1, format == "bfloat16"
    if colours and train:
        # Sums over three channels occupy registers for longer.
        tile = tile._replace(images=64, M1=64)
    if colours and not half:
        # The filters of three channels would fill shared memory.
        tile = tile._replace(kept=1)
    if half and not colours and images > 132 * 64:
        # Two programs of four warps hide more latency than one of eight, as measured on an H200.
        return ForwardTile(64, 16, 64, 64, 64, 64, 32, 64, 2, 4)
    if images <= 132 * tile.images // 2:
        # Products with few rows leave registers for more columns.
        tile = tile._replace(F=128)
    if images <= 132 * 16 and not colours and (half or train):
        # And for a larger K, so that the program waits for memory less often.
        tile = tile._replace(K=128 if half else 64)
    if images <= 132 and not (half or train):
        # One image does not fill more rows.
        tile = tile._replace(M1=64, M2=64)
    return tile


def _other_forward(form, images, geometry, train):
    """The tile for other architectures, or for full float32."""
    tile, half = FORWARD[train][form], form == "bfloat16"
    if form == "lanes":
        # Except on sm_90, products of 64 rows would spill registers.
        return tile if compute_capability() == 9 else tile._replace(images=32, S=32, M2=128)
    if geometry.channels > 1:
        tile = tile._replace(M1=min(tile.M1, 64), K=64 if half else tile.K, kept=1 if half else 0)
        if train:
            tile = tile._replace(images=min(tile.images, 32), M2=64, K2=min(tile.K2, 32), F=32)
    elif half and not train and compute_capability() not in (0, 10):
        tile = tile._replace(kept=2)
    elif half and train and compute_capability() == 10 and images <= 132 * 16:
        # Products with few rows take registers that the convolutions need.
        tile = tile._replace(M2=64)
    return tile


@cached_for_architecture
def forward_tile(form, images, geometry, train):
    """(images of a program, ForwardTile) for a batch of so many images."""
    if INTERPRETED:
        block = min(64, power_of_2(cdiv(images, 2)))
        squares = (geometry.pooled[0] // 2) ** 2
        rows = [min(2048, power_of_2(block * n)) for n in (squares, geometry.pooled[1] ** 2)]
        kept = FORWARD[train][form].kept
        return block, ForwardTile(64, max(1, block // 2), rows[0], 64, rows[1], 32, 128, 128, kept, 4)
    hopper = compute_capability() == 9 and form in HOPPER_FORWARD
    tile = (_hopper_forward if hopper else _other_forward)(form, images, geometry, train)
    if tile.kept < 2:
        # Filters that are not kept are loaded in blocks of K2 rows, which has to divide 288.
        tile = tile._replace(K2=min(tile.K2, 32))
    # Few images are spread over all multiprocessors; of many, a program takes as many as fill its products.
    block = min(tile.images, power_of_2(cdiv(images, 132)))
    return block, tile._replace(F=128) if form == "lanes" and block < 32 else tile


class GradientTile(NamedTuple):
    """Block sizes of the gradient launch, for its three roles: first convolution, second convolution, linear layers."""

    M1: int  # images of an iteration
    K1: int  # of p1's gradient
    P1: int  # images whose one-hot columns are made at a time
    M2: int
    N2: int  # columns of the sum
    M3: int
    N3: int
    num_warps: int


# Chosen from machine code (no register spills) and not yet timed. "lanes" takes M1 images, then K1 patches at a time.
GRADIENT = {
    "bfloat16": GradientTile(128, 64, 32, 64, 256, 64, 64, 4),
    "tf32": GradientTile(128, 32, 16, 32, 256, 32, 64, 4),
    "ieee": GradientTile(32, 16, 16, 16, 64, 16, 64, 4),
    "lanes": GradientTile(128, 128, 1, 128, 1, 16, 64, 4),
}
# For NVIDIA's matrix units that read both operands from registers: all but those of sm_90 and sm_100.
SMALL_GRADIENT = {
    **GRADIENT,
    "bfloat16": GradientTile(64, 64, 64, 64, 128, 64, 64, 8),
    "tf32": GradientTile(64, 32, 32, 64, 128, 32, 64, 8),
}


@cached_for_architecture
def gradient_tile(form, images, geometry):
    """The GradientTile for a batch of so many images."""
    if not INTERPRETED:
        tile = (GRADIENT if compute_capability() in (0, 9, 10) else SMALL_GRADIENT)[form]
        if form == "lanes":
            return tile
        if compute_capability() == 10:
            # Results are in tensor memory, which many small products fill; four warps have too few registers.
            tile = tile._replace(P1=tile.M1 // 2, num_warps=8)
        elif compute_capability() == 9:
            if images <= 64:
                # So few images do not fill more rows.
                tile = tile._replace(M1=64, P1=16)
            elif geometry.padding:
                # The conditions on padding take registers.
                tile = tile._replace(P1=16)
            if form == "tf32":
                # 32-bit operands go through registers.
                tile = tile._replace(M2=16, M3=16)
        return tile
    rows = min(2048, max(32, power_of_2(images // 2)))
    if form == "lanes":
        windows = min(2048, power_of_2(images * geometry.pooled[1] ** 2 // 2))
        return GradientTile(rows, rows * 8, 1, windows, 1, rows, 128, 4)
    return GradientTile(rows, 64, rows // 2, rows, 128 if form == "ieee" else 256, rows, 128, 4)
