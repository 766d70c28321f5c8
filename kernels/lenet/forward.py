"""LeNet's forward in one launch; in training its loss too, and the gradients down to the second convolution's result.

    p1 = pool(relu(conv1(x))), p2 = pool(relu(conv2(p1))), h1 = relu(fc1(p2)), h2 = relu(fc2(h1)), y = fc3(h2)
    loss = sum over the images with a target of lse(y) - y[target],   dy = exp(y - lse) - [class = target]
    dh2 = fc3^T(dy) where h2 > 0,  dh1 = fc2^T(dh2) where h1 > 0,  dz = fc1^T(dh1) at the pixel of p2's code

A program takes BLOCK_I images through all layers, BLOCK_S at a time through the convolutions. What one layer leaves in
memory is read by the next after a barrier, out of the caches. Rows and columns of all products stand in the orders of
lane_order.py, so that images, activations and results do not pass through shared memory. Gradients are of the sum of
the losses: the last launch divides by the number of targets, once it knows it. See layout.py for the layouts. Ties: the
first of equal pixels wins; NaN wins over all.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._common import (
    INTERPRETED,
    OPTIONS,
    cached_for_architecture,
    cdiv,
    compute_capability,
    index_type,
    operand_type,
    power_of_2,
    round_to,
)
from ..launching import planned
from . import lanes as lenet_lanes
from .lane_order import columns_of_lanes, from_result, load_weights, rows_of_lanes, to_operand, vectors
from .linears import add_product, features_gradient, hidden_gradient, hidden_layer, loss_and_gradient


class Tile(NamedTuple):
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
TILES = {
    True: {
        "bfloat16": Tile(64, 64, 64, 64, 128, 64, 32, 64, 2, 8),
        "tf32": Tile(32, 32, 128, 32, 64, 32, 32, 64, 0, 8),
        "ieee": Tile(16, 16, 32, 16, 64, 16, 16, 32, 0, 4),
        "lanes": Tile(64, 64, 128, 16, 256, 16, 16, 64, 0, 4),
    },
    False: {
        "bfloat16": Tile(64, 64, 64, 64, 128, 64, 32, 64, 1, 8),
        "tf32": Tile(64, 32, 128, 32, 128, 32, 32, 32, 1, 8),
        "ieee": Tile(16, 16, 64, 16, 64, 16, 16, 32, 0, 8),
        "lanes": Tile(64, 64, 128, 16, 256, 16, 16, 64, 0, 4),
    },
}
# For sm_90, whose matrix units take rows from registers and filters from shared memory, which holds them all. 16 rows
# are a warp's: with 128 each row of a linear layer's product is loaded once.
HOPPER_TILES = {
    True: {
        "bfloat16": Tile(128, 64, 128, 64, 128, 64, 32, 64, 2, 8),
        "tf32": Tile(128, 32, 128, 32, 128, 32, 32, 32, 2, 8),
    },
    False: {
        "bfloat16": Tile(128, 64, 128, 64, 128, 64, 32, 64, 2, 8),
        "tf32": Tile(128, 32, 128, 32, 128, 32, 32, 32, 2, 8),
    },
}


def _hopper_tile(format, images, geometry, train):
    """The Tile of sm_90 for bfloat16 or tf32."""
    tile, colours, half = HOPPER_TILES[train][format], geometry.channels > 1, format == "bfloat16"
    if colours and train:
        # Sums over three channels stay in registers for longer.
        tile = tile._replace(images=64, M1=64)
    if colours and not half:
        # And their filters would fill shared memory.
        tile = tile._replace(kept=1)
    if half and not colours and images > 132 * 64:
        # Two programs of four warps hide more of each other's waiting than one of eight, see bench/results.
        return Tile(64, 16, 64, 64, 64, 64, 32, 64, 2, 4)
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


def _other_tile(form, images, geometry, train):
    """The Tile of another architecture, or for full float32."""
    tile, half = TILES[train][form], form == "bfloat16"
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
def tile_for(form, images, geometry, train):
    """(images a program, Tile) for a batch of so many images."""
    if INTERPRETED:
        block = min(64, power_of_2(cdiv(images, 2)))
        squares = (geometry.pooled[0] // 2) ** 2
        rows = [min(2048, power_of_2(block * n)) for n in (squares, geometry.pooled[1] ** 2)]
        kept = TILES[train][form].kept
        return block, Tile(64, max(1, block // 2), rows[0], 64, rows[1], 32, 128, 128, kept, 4)
    hopper = compute_capability() == 9 and form in HOPPER_TILES[train]
    tile = (_hopper_tile if hopper else _other_tile)(form, images, geometry, train)
    if tile.kept < 2:
        # Filters that are not kept are loaded in blocks of one depth, of which 288 rows have to be a multiple.
        tile = tile._replace(K2=min(tile.K2, 32))
    # Few images are spread over the card's multiprocessors; of many a program takes what fills its products.
    block = min(tile.images, power_of_2(cdiv(images, 132)))
    return block, tile._replace(F=128) if form == "lanes" and block < 32 else tile


@triton.jit
def load_pixels(
    x_ptr, image, square, mask, k,
    C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr,
    FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Pixels k = c * 64 + dy * 8 + dx of the 8 x 8 patch that feeds a square of four windows; all arguments broadcast.

    Images of bytes lie in a frame of FRAME black pixels and become p * SCALE + SHIFT.
    """
    SIDE: tl.constexpr = SIZE - 2 * FRAME
    top, left = square // (Q1 // 2) * 4 - PAD, square % (Q1 // 2) * 4 - PAD
    dy, dx = k // 8 % 8, k % 8
    rows = image * (C * SIDE * SIDE) + (top - FRAME) * SIDE + left - FRAME
    offs = rows + (k // 64 * (SIDE * SIDE) + dy * SIDE + dx)
    inside = mask
    if PAD + FRAME > 0:
        ih, iw = top + dy, left + dx
        framed = inside & (ih >= 0) & (ih < SIZE) & (iw >= 0) & (iw < SIZE)
        inside = inside & (ih >= FRAME) & (ih < SIZE - FRAME) & (iw >= FRAME) & (iw < SIZE - FRAME)
    x = tl.load(x_ptr + offs, mask=inside, other=0)
    if x_ptr.dtype.element_ty == tl.uint8:
        x = x.to(tl.float32) * SCALE + SHIFT
        # Only where the convolution pads is there anything outside the frame.
        if PAD > 0:
            x = tl.where(framed, x, 0.0)
    return x


@triton.jit
def load_patches(
    x_ptr, image, square, mask, k,
    C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr,
    FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_K): the pixels k of a square's patch, a row for each image and square."""
    image, square, mask = image[:, None], square[:, None], mask[:, None]
    return load_pixels(x_ptr, image, square, mask, k[None, :], C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT)


@triton.jit
def largest_of_four(acc, bias, BLOCK_M: tl.constexpr, LANES: tl.constexpr):
    """(BLOCK_M, 4 * LANES), the pixels of a window outermost -> max(0, largest + bias), and the code, of each lane."""
    rows, columns = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, 2, LANES)), (0, 3, 1, 2)))
    z0, z2 = tl.split(rows)
    z1, z3 = tl.split(columns)
    upper = tl.maximum(z0, z1, propagate_nan=tl.PropagateNan.ALL)
    largest = tl.maximum(upper, tl.maximum(z2, z3, propagate_nan=tl.PropagateNan.ALL), tl.PropagateNan.ALL)
    y = largest + bias[None, :]
    dead = y <= 0
    code = tl.where(z0 == largest, 0, tl.where(z1 == largest, 1, tl.where(z2 == largest, 2, 3)))
    return tl.where(dead, 0.0, y), tl.where(dead, 4, code).to(tl.uint8)


@triton.jit
def keep_filters(
    packed_ptr, offs_n,
    COLUMNS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """All of K rows of filters in blocks of BLOCK_K, see load_weights."""
    filters = ()
    for k0 in tl.static_range(0, K, BLOCK_K):
        filters = filters + (load_weights(packed_ptr, k0, offs_n, COLUMNS, min(BLOCK_K, K - k0), VECTOR, OPERAND),)
    return filters


@triton.jit
def first_convolution(
    x_ptr, packed_ptr, filters, bias_ptr, p1_ptr, code_ptr, i0, s0, N,
    TRAIN: tl.constexpr, KEPT: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
    Q1: tl.constexpr, FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    SQUARES: tl.constexpr = (Q1 // 2) * (Q1 // 2)
    PAIR: tl.constexpr = 32 // OPERAND.primitive_bitwidth
    VECTOR: tl.constexpr = 128 // p1_ptr.dtype.element_ty.primitive_bitwidth
    offs_n, offs_k, lanes = columns_of_lanes(128, VECTOR, 2), vectors(BLOCK_K, 4), vectors(32, VECTOR)
    oc = columns_of_lanes(32, VECTOR, 2) % 8
    bias = tl.load(bias_ptr + oc, mask=oc < 6, other=0.0)
    for m0 in range(0, BLOCK_I * SQUARES, BLOCK_M):
        offs_m = (m0 + rows_of_lanes(BLOCK_M))[None, :, None, None]
        image, square = offs_m // SQUARES, offs_m % SQUARES
        mask = (offs_m < BLOCK_I * SQUARES) & (i0 + image < N)
        acc = tl.zeros((BLOCK_M, 128), tl.float32)
        if KEPT:
            for k0 in tl.static_range(0, C * 64, BLOCK_K):
                x = load_pixels(x_ptr, i0 + image, square, mask, k0 + offs_k, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT)
                acc = tl.dot(to_operand(x.to(OPERAND), PAIR), filters[k0 // BLOCK_K], acc, input_precision=PRECISION)
        else:
            for k0 in range(0, C * 64, BLOCK_K):
                x = load_pixels(x_ptr, i0 + image, square, mask, k0 + offs_k, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT)
                w = load_weights(packed_ptr, k0, offs_n, 128, BLOCK_K, 4, OPERAND)
                acc = tl.dot(to_operand(x.to(OPERAND), PAIR), w, acc, input_precision=PRECISION)
        y, code = largest_of_four(acc, bias, BLOCK_M, 32)
        offs = (s0 + image) * (Q1 * Q1 * 8) + square // (Q1 // 2) * (Q1 * 16) + square % (Q1 // 2) * 16
        offs = offs + (lanes // 16 * (Q1 * 8) + lanes % 16)
        tl.store(p1_ptr + offs, from_result(round_to(y, p1_ptr.dtype.element_ty), VECTOR), mask=mask)
        if TRAIN:
            tl.store(code_ptr + offs, from_result(code, VECTOR), mask=mask)


@triton.jit
def second_convolution(
    p1_ptr, packed_ptr, filters, bias_ptr, acts_ptr, code_ptr, i0, p0, s0, N,
    TRAIN: tl.constexpr, KEPT: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr, F: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    WINDOWS: tl.constexpr = Q2 * Q2
    PAIR: tl.constexpr = 32 // OPERAND.primitive_bitwidth
    VECTOR: tl.constexpr = 128 // p1_ptr.dtype.element_ty.primitive_bitwidth
    offs_n, lanes = columns_of_lanes(64, 4, 2), vectors(16, 4)
    bias = tl.load(bias_ptr + columns_of_lanes(16, 4, 2))
    for m0 in range(0, BLOCK_I * WINDOWS, BLOCK_M):
        offs_m = (m0 + rows_of_lanes(BLOCK_M))[None, :, None, None]
        image, window = offs_m // WINDOWS, offs_m % WINDOWS
        mask = (offs_m < BLOCK_I * WINDOWS) & (i0 + image < N)
        # An element k = dy * 48 + dx * 8 + c of the 6 x 6 patch that feeds a window.
        rows = (p0 + image) * (Q1 * Q1 * 8) + window // Q2 * (Q1 * 16) + window % Q2 * 16
        acc = tl.zeros((BLOCK_M, 64), tl.float32)
        if KEPT:
            for k0 in tl.static_range(0, 288, BLOCK_K):
                k = k0 + vectors(min(BLOCK_K, 288 - k0), VECTOR)
                p = tl.load(p1_ptr + rows + (k // 48 * (Q1 * 8) + k % 48), mask=mask, other=0.0).to(OPERAND)
                acc = tl.dot(to_operand(p, PAIR), filters[k0 // BLOCK_K], acc, input_precision=PRECISION)
        else:
            for k0 in range(0, 288, BLOCK_K):
                k = k0 + vectors(BLOCK_K, VECTOR)
                p = tl.load(p1_ptr + rows + (k // 48 * (Q1 * 8) + k % 48), mask=mask, other=0.0).to(OPERAND)
                w = load_weights(packed_ptr, k0, offs_n, 64, BLOCK_K, VECTOR, OPERAND)
                acc = tl.dot(to_operand(p, PAIR), w, acc, input_precision=PRECISION)
        y, code = largest_of_four(acc, bias, BLOCK_M, 16)
        offs = (s0 + image) * (F + 256) + window * 16 + lanes
        tl.store(acts_ptr + offs, from_result(round_to(y, acts_ptr.dtype.element_ty), 4), mask=mask)
        if TRAIN:
            tl.store(code_ptr + (s0 + image) * F + window * 16 + lanes, from_result(code, 4), mask=mask)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def lenet_forward_kernel(
    x_ptr, target_ptr, plain_ptr, packed_ptr,
    p1_ptr, code1_ptr, acts_ptr, code2_ptr, logits_ptr, grads_ptr, dz_ptr, dz_columns_ptr, code2_columns_ptr, loss_ptr,
    N, ignore_index,
    B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, B4: tl.constexpr, B5: tl.constexpr,
    CONV2: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, W4: tl.constexpr, W5: tl.constexpr,
    LANES: tl.constexpr, TRAIN: tl.constexpr, KEPT: tl.constexpr,
    C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    F: tl.constexpr, CLASSES: tl.constexpr, CP: tl.constexpr,
    FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M1: tl.constexpr, BLOCK_K1: tl.constexpr, BLOCK_M2: tl.constexpr, BLOCK_K2: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(INDEX)
    WIDE: tl.constexpr = 128 // p1_ptr.dtype.element_ty.primitive_bitwidth
    first, second = (), ()
    if KEPT > 0:
        first = keep_filters(packed_ptr, columns_of_lanes(128, WIDE, 2), 128, C * 64, BLOCK_K1, 4, OPERAND)
    if KEPT > 1:
        second = keep_filters(packed_ptr + W2, columns_of_lanes(64, 4, 2), 64, 288, BLOCK_K2, WIDE, OPERAND)
    # In training every image keeps its activations; otherwise a program uses its own again and again.
    for group in range(pid, pid + 1 if TRAIN else tl.cdiv(N, BLOCK_I), 1 if TRAIN else tl.num_programs(0)):
        i0, s0 = group * BLOCK_I, (group if TRAIN else pid) * BLOCK_I
        # The convolutions of some of the images at a time: the first's result stays in the caches for the second.
        for j0 in range(0, BLOCK_I, BLOCK_S):
            p0 = i0 + j0 if TRAIN else pid * BLOCK_S
            if LANES:
                lenet_lanes.first_convolution(
                    x_ptr, plain_ptr, plain_ptr + B1, p1_ptr, code1_ptr, i0 + j0, p0, N,
                    TRAIN, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT, BLOCK_S, BLOCK_M1,
                )  # fmt: skip
            else:
                first_convolution(
                    x_ptr, packed_ptr, first, plain_ptr + B1, p1_ptr, code1_ptr, i0 + j0, p0, N,
                    TRAIN, KEPT > 0, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT,
                    OPERAND, PRECISION, BLOCK_S, BLOCK_M1, BLOCK_K1,
                )  # fmt: skip
            tl.debug_barrier()
            if LANES:
                lenet_lanes.second_convolution(
                    p1_ptr, plain_ptr + CONV2, plain_ptr + B2, acts_ptr, code2_ptr, i0 + j0, p0, s0 + j0, N,
                    TRAIN, Q1, Q2, F, BLOCK_S, BLOCK_M2,
                )  # fmt: skip
            else:
                second_convolution(
                    p1_ptr, packed_ptr + W2, second, plain_ptr + B2, acts_ptr, code2_ptr, i0 + j0, p0, s0 + j0, N,
                    TRAIN, KEPT > 1, Q1, Q2, F, OPERAND, PRECISION, BLOCK_S, BLOCK_M2, BLOCK_K2,
                )  # fmt: skip
            tl.debug_barrier()

        # The matrix units take sixteen rows at the least, and lanes are good for eight.
        rows = rows_of_lanes(BLOCK_R)[None, :, None, None]
        acts_rows, grads_rows = (s0 + rows) * (F + 256), (i0 + rows) * (256 + CP)
        mask = (rows < BLOCK_I) & (i0 + rows < N)
        hidden_layer(
            acts_ptr, acts_rows, mask, packed_ptr + W3, plain_ptr + B3, F, 120,
            OPERAND, PRECISION, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        tl.debug_barrier()
        hidden_layer(
            acts_ptr + F, acts_rows, mask, packed_ptr + W4, plain_ptr + B4, 128, 84,
            OPERAND, PRECISION, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        tl.debug_barrier()

        for c0 in range(0, CP, BLOCK_C):
            offs_c = c0 + tl.arange(0, BLOCK_C)
            y = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
            y = add_product(
                y, acts_ptr + F + 128, acts_rows, mask, packed_ptr + W5, offs_c, 128, CP,
                OPERAND, PRECISION, BLOCK_K,
            )  # fmt: skip
            y += tl.load(plain_ptr + B5 + offs_c, mask=offs_c < CLASSES, other=0.0)[None, :]
            c = c0 + vectors(BLOCK_C, 2)
            y = from_result(y.to(logits_ptr.dtype.element_ty), 2)
            tl.store(logits_ptr + (i0 + rows) * CLASSES + c, y, mask=mask & (c < CLASSES))
        tl.debug_barrier()

        if TRAIN:
            lanes = tl.arange(0, BLOCK_R)
            n = i0 + lanes
            loss, kept = loss_and_gradient(
                logits_ptr, target_ptr, grads_ptr, n * (256 + CP), n, (lanes < BLOCK_I) & (n < N), ignore_index,
                CLASSES, CP, BLOCK_R, BLOCK_C,
            )  # fmt: skip
            tl.store(loss_ptr + 2 * group + tl.arange(0, 2), tl.sum(tl.join(loss, kept.to(tl.float32)), axis=0))
            tl.debug_barrier()
            hidden_gradient(
                acts_ptr, acts_rows, grads_ptr, grads_rows, mask, packed_ptr + W5, 256, 128, CP, F + 128,
                OPERAND, PRECISION, BLOCK_R, BLOCK_K if BLOCK_K < BLOCK_C else BLOCK_C,
            )  # fmt: skip
            tl.debug_barrier()
            hidden_gradient(
                acts_ptr, acts_rows, grads_ptr, grads_rows, mask, packed_ptr + W4, 128, 0, 128, F,
                OPERAND, PRECISION, BLOCK_R, BLOCK_K,
            )  # fmt: skip
            tl.debug_barrier()
            features_gradient(
                grads_ptr, grads_rows, code2_ptr, dz_ptr, dz_columns_ptr, code2_columns_ptr, i0 + rows, mask,
                packed_ptr + W3, F, LANES, OPERAND, PRECISION, BLOCK_R, BLOCK_K, BLOCK_F,
            )  # fmt: skip


class Pixels(NamedTuple):
    """How images become what the first convolution reads: bytes p as p * scale + shift, in a frame of black pixels."""

    frame: int = 0
    scale: float = 1.0
    shift: float = 0.0


def _pooled_size(form, geometry):
    """Of an image after the first pooling, as the kernels keep it."""
    Q1, _ = geometry.pooled
    return (6, Q1, Q1) if form == "lanes" else (Q1, Q1, 8)


@cached_for_architecture
def _inference_sizes(N, geometry, form, device):
    """(name, size) of the tensors of a launch for inference; its programs use them again and again."""
    block, tile = tile_for(form, N, geometry, False)
    programs = inference_programs(N, block, tile, torch.device(device))
    # The last program may have fewer images than the others.
    block_s, last = min(block, tile.S), N - (programs - 1) * block
    p1 = (programs - 1) * block_s + min(block_s, last), *_pooled_size(form, geometry)
    return ("p1", p1), ("acts", (min(N, programs * block), geometry.features + 256))


def activations(N, geometry, format, device, train):
    """The tensors that the launches leave to each other for N images: p1, code1, acts, code2, grads, dz, loss."""
    form, dtype = lenet_lanes.form(format), torch.bfloat16 if format == "bfloat16" else torch.float32
    if not train:
        sizes = _inference_sizes(N, geometry, form, device)
        return {name: torch.empty(size, dtype=dtype, device=device) for name, size in sizes}
    F = geometry.features
    block, _ = tile_for(form, N, geometry, train)

    def new(*size, dtype=dtype):
        return torch.empty(size, dtype=dtype, device=device)

    pixels = _pooled_size(form, geometry)
    tensors = {
        "p1": new(N, *pixels), "code1": new(N, *pixels, dtype=torch.uint8),
        "acts": new(N, F + 256), "code2": new(N, F, dtype=torch.uint8),
        "logits": new(N, geometry.classes, dtype=torch.float32),
        "grads": new(N, 256 + geometry.padded_classes), "dz": new(N, F) if form == "lanes" else new(N, F // 16, 4, 16),
        "loss": new(cdiv(N, block), 2, dtype=torch.float32),
    }  # fmt: skip
    if form == "lanes":
        tensors["dz_columns"], tensors["dp1"] = new(cdiv(N, 32), F, 32), new(N, *pixels)
        tensors["code2_columns"] = new(cdiv(N, 32), F, 32, dtype=torch.uint8)
    return tensors


def inference_programs(N, block, tile, device):
    """As many as run at once, so that the activations that they use again and again stay in the caches."""
    groups = cdiv(N, block)
    return min(groups, 3) if INTERPRETED else min(groups, multiprocessors(device) * 8 // tile.num_warps)


@functools.cache
def multiprocessors(device):
    """How many a GPU has, each with registers for eight warps; those of an H200 in the place of another device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@planned(lenet_forward_kernel)
def _forward(
    x, target, plain, packed, p1, code1, acts, code2, logits, grads, dz, dz_columns, code2_columns, loss,
    geometry, format, pixels, ignore_index,
):  # fmt: skip
    N, train = x.shape[0], target is not None
    form = lenet_lanes.form(format)
    block, tile = tile_for(form, N, geometry, train)
    programs = cdiv(N, block) if train else inference_programs(N, block, tile, x.device)
    (_, W2, _, W3, W4, W5, _), (_, B1, CONV2, B2, B3, B4, B5, _) = geometry.packed, geometry.plain
    return (programs,), (N, ignore_index), dict(
        B1=B1, B2=B2, B3=B3, B4=B4, B5=B5, CONV2=CONV2, W2=W2, W3=W3, W4=W4, W5=W5,
        LANES=form == "lanes", TRAIN=train, KEPT=tile.kept, **geometry.constants,
        FRAME=pixels.frame, SCALE=pixels.scale, SHIFT=pixels.shift,
        INDEX=index_type(x, p1, code1, acts, code2, logits, grads, dz, dz_columns, code2_columns, loss),
        OPERAND=operand_type(packed.dtype),
        PRECISION="ieee" if format == "ieee" else "tf32",
        BLOCK_I=block, BLOCK_S=min(block, tile.S), BLOCK_R=max(8 if form == "lanes" else 16, block),
        BLOCK_C=min(32 if form == "lanes" else 128, geometry.block_classes),
        BLOCK_M1=tile.M1, BLOCK_K1=tile.K1, BLOCK_M2=tile.M2, BLOCK_K2=tile.K2, BLOCK_K=tile.K, BLOCK_F=tile.F,
        num_warps=tile.num_warps, num_stages=1, **OPTIONS,
    )  # fmt: skip


def forward(x, target, plain, packed, geometry, format, pixels, memory, logits, ignore_index=-100):
    """x (N, C, H, W) contiguous, target (N) or None -> logits (N, classes); with a target all of `memory` is filled."""
    p1, acts = memory["p1"], memory["acts"]
    # Pointers that inference never follows are not there.
    names = "code2", "grads", "dz", "dz_columns", "code2_columns", "loss"
    code2, grads, dz, dz_columns, code2_columns, loss = map(memory.get, names)
    tensors = x, target, plain, packed, p1, memory.get("code1"), acts, code2, logits, grads, dz, dz_columns
    _forward((*tensors, code2_columns, loss), geometry, format, pixels, ignore_index)
    return logits
