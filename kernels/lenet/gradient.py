"""Every weight and bias gradient of LeNet in one launch; each program computes a partial sum of one of them.

    dconv1[oc, c, kh, kw] = sum over images and pixels of dx1 x,  dx1 = the gradient of p1 at the pixel of its code
    dconv2[oc, c, kh, kw] = sum over images and pixels of dz p1,  dfc = grads^T acts
    gradient of p1 = WD dz^T, for 2 x 4 of its pixels as rows and images as columns    (see layout.py for the layouts)

A program's number decides its role: first convolution, second convolution, or a tile of the linear layers. It keeps its
sum in registers and writes it once.
"""

import torch
import triton
import triton.language as tl

from .._common import (
    INTERPRETED,
    OPTIONS,
    cdiv,
    compute_capability,
    index_type,
    operand_type,
)
from ..launching import launch
from . import tiles
from .lanes_gradient import first_weights_of_lanes, second_weights_of_lanes
from .layout import Splits
from .products_gradient import first_weights, linear_weights, second_weights

# The most splits of each role: all take about as long, and two fit on a multiprocessor.
MOST = Splits(168, 74, 2)
MOST_LANES = Splits(64, 4, 3, lanes=True)


def splits_for(format, images, geometry):
    """The layout.Splits of a batch: the fewest programs that take no longer than the most would."""
    form = tiles.form(format)
    tile, (Q1, Q2), lanes = tiles.gradient_tile(form, images, geometry), geometry.pooled, form == "lanes"
    most = Splits(2, 2, 1) if INTERPRETED else MOST_LANES if lanes else MOST
    turns = (
        cdiv(images, tile.M1) * (Q1 // 2) * (1 if lanes else cdiv(Q1, 4)),
        cdiv(images * Q2 * Q2, tile.M2) if lanes else cdiv(images, tile.M2) * Q2 * Q2,
        cdiv(images, 4 * tile.M3),
    )
    return Splits(*(cdiv(n, cdiv(n, limit)) for limit, n in zip(most, turns)), lanes=lanes)


def parts(tile, geometry, lanes):
    """How many programs share a split of the first convolution's gradient, and of the second's.

    On matrix units each takes one channel of the images, or a block of columns of the sum (one program takes 256 and
    the last 32 of 288). With `lanes` each takes half of the filters, or one channel of a quarter of them.
    """
    if lanes:
        return 2, 24
    return geometry.channels, 1 if tile.N2 == 256 else cdiv(288, tile.N2)


@triton.jit(do_not_specialize=["N", "splits1", "splits2", "splits3", "partial2", "partial3"])
def lenet_gradient_kernel(
    x_ptr, packed_ptr, p1_ptr, code1_ptr, acts_ptr, code2_ptr, grads_ptr, dz_ptr,
    dz_columns_ptr, code2_columns_ptr, dp1_ptr, scratch_ptr, partial_ptr,
    N, splits1, splits2, splits3, partial2, partial3,
    W2: tl.constexpr, WD: tl.constexpr, LANES: tl.constexpr, PARTS1: tl.constexpr, PARTS2: tl.constexpr,
    ROW3: tl.constexpr,
    C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr, F: tl.constexpr,
    CLASSES: tl.constexpr, CP: tl.constexpr,
    FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M1: tl.constexpr, BLOCK_K1: tl.constexpr, BLOCK_P1: tl.constexpr,
    BLOCK_M2: tl.constexpr, BLOCK_N2: tl.constexpr, BLOCK_M3: tl.constexpr, BLOCK_N3: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    # The number of sums in a split is a multiple of four.
    partial2_ptr = partial_ptr + tl.multiple_of(partial2, 4)
    partial3_ptr = partial_ptr + tl.multiple_of(partial3, 4)
    if pid < splits1 * PARTS1:
        part, split = pid % PARTS1, pid // PARTS1
        if LANES:
            first_weights_of_lanes(
                x_ptr, dz_columns_ptr, code2_columns_ptr, code1_ptr, packed_ptr + W2, dp1_ptr,
                partial_ptr + split * (C * 150 + 6), part, split, N,
                splits1, C, SIZE, PAD, Q1, Q2, F, FRAME, SCALE, SHIFT, INDEX, BLOCK_M1, BLOCK_K1,
            )  # fmt: skip
        else:
            first_weights(
                x_ptr, code1_ptr, dz_ptr, packed_ptr + WD, scratch_ptr, partial_ptr, part, split, N,
                splits1, C, SIZE, PAD, Q1, Q2, FRAME, SCALE, SHIFT,
                INDEX, OPERAND, PRECISION, BLOCK_M1, BLOCK_K1, BLOCK_P1,
            )  # fmt: skip
    elif pid < splits1 * PARTS1 + splits2 * PARTS2:
        pid -= splits1 * PARTS1
        part, split = pid % PARTS2, pid // PARTS2
        if LANES:
            second_weights_of_lanes(
                dz_ptr, code2_ptr, p1_ptr, partial2_ptr + split * (16 * 150 + 16), part, split, N,
                splits2, Q1, Q2, INDEX, BLOCK_M2,
            )  # fmt: skip
        else:
            second_weights(
                dz_ptr, p1_ptr, partial2_ptr + split * (64 * 288 + 64), part, split, N,
                splits2, Q1, Q2, INDEX, OPERAND, PRECISION, BLOCK_M2, BLOCK_N2, PARTS2,
            )  # fmt: skip
    else:
        pid -= splits1 * PARTS1 + splits2 * PARTS2
        tile, split = pid // splits3, pid % splits3
        linear_weights(
            acts_ptr, grads_ptr, partial3_ptr + split * ROW3, tile, split, N,
            splits3, F, CP, INDEX, OPERAND, PRECISION, BLOCK_M3, BLOCK_N3,
        )  # fmt: skip


def sums(geometry, splits, device):
    """The workspace of the first convolution's sums before they are folded, and the tensor of the partial sums."""
    sizes = 0 if splits.lanes else splits.conv1 * geometry.channels * 64 * 128, splits.partials(geometry)[-1]
    return [torch.empty(size, dtype=torch.float32, device=device) for size in sizes]


def gradients(x, packed, geometry, format, pixels, memory, splits, scratch, partial):
    """Fill `partial` with the partial sums of all gradients for the images x, whose forward has filled `memory`."""
    N, lanes = x.shape[0], splits.lanes
    tile = tiles.gradient_tile("lanes" if lanes else format, N, geometry)
    parts1, parts2 = parts(tile, geometry, lanes)
    hidden = 128 // tile.N3 * (1 + cdiv(geometry.padded_classes, 128))
    tiles_linear = cdiv(geometry.features, tile.N3) + hidden
    _, partial2, partial3, _ = splits.partials(geometry)
    dz, code2 = memory["dz"], memory["code2"]
    # Otherwise the assembler spills a few registers to fit three programs on a multiprocessor.
    spill = lanes and geometry.channels > 1 and not INTERPRETED and compute_capability() == 10
    registers = {"maxnreg": 255} if spill else {}
    launch(
        lenet_gradient_kernel, (splits.conv1 * parts1 + splits.conv2 * parts2 + splits.linear * tiles_linear,),
        x, packed, memory["p1"], memory["code1"], memory["acts"], code2, memory["grads"], dz,
        memory.get("dz_columns", dz), memory.get("code2_columns", code2), memory.get("dp1", dz), scratch, partial,
        N,
        W2=geometry.packed[1], WD=geometry.packed[2], LANES=lanes, PARTS1=parts1, PARTS2=parts2,
        splits1=splits.conv1, splits2=splits.conv2, splits3=splits.linear,
        partial2=partial2, partial3=partial3, ROW3=geometry.row[-1],
        **geometry.constants, FRAME=pixels.frame, SCALE=pixels.scale, SHIFT=pixels.shift,
        INDEX=index_type(x, *memory.values()), OPERAND=operand_type(packed.dtype),
        PRECISION="ieee" if format == "ieee" else "tf32",
        BLOCK_M1=tile.M1, BLOCK_K1=tile.K1, BLOCK_P1=tile.P1, BLOCK_M2=tile.M2, BLOCK_N2=tile.N2,
        BLOCK_M3=tile.M3, BLOCK_N3=tile.N3, num_warps=tile.num_warps, num_stages=1, **registers, **OPTIONS,
    )  # fmt: skip
