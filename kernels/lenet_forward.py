"""LeNet's forward in one launch; in training its loss too, and the gradients down to the second convolution's result.

    p1 = pool(relu(conv1(x))), p2 = pool(relu(conv2(p1))), h1 = relu(fc1(p2)), h2 = relu(fc2(h1)), y = fc3(h2)
    loss = sum over the images with a target of lse(y) - y[target],   dy = exp(y - lse) - [class = target]
    dh2 = fc3^T(dy) where h2 > 0,  dh1 = fc2^T(dh2) where h1 > 0,  dz = fc1^T(dh1) at the pixel of p2's code

A program takes BLOCK_I images through all layers. What one layer leaves in memory is read by the next after a barrier,
out of the caches. Gradients are of the sum of the losses: the last launch divides by the number of targets, once it
knows it. See lenet.py for the layouts. Ties: the first of equal pixels wins; NaN wins over all.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import INTERPRETED, OPTIONS, index_type, operand_type, round_to


class Tile(NamedTuple):
    """Blocks of a number format: most images; squares and windows of a product, its depth, features of a gradient.

    The filters of the first `kept` convolutions stay in shared memory for all images of a program, as far as registers
    allow it, and the loops over a product's depth are unrolled for them.
    """

    images: int
    M1: int
    K1: int
    M2: int
    K2: int
    K: int
    F: int
    kept: int
    num_warps: int


# By whether it is for training; read off machine code (no register spills) and not yet timed.
TILES = {
    True: {
        "bfloat16": Tile(64, 128, 64, 128, 32, 32, 64, 1, 8),
        "tf32": Tile(32, 128, 32, 64, 32, 32, 32, 0, 8),
        "ieee": Tile(16, 32, 16, 64, 16, 16, 32, 0, 4),
    },
    False: {
        "bfloat16": Tile(64, 128, 64, 128, 64, 32, 64, 2, 8),
        "tf32": Tile(16, 128, 32, 128, 32, 32, 32, 0, 8),
        "ieee": Tile(16, 64, 16, 64, 16, 16, 32, 0, 8),
    },
}


@functools.cache
def tile_for(format, images, geometry, train):
    """(images a program, Tile) for a batch of so many images."""
    tile = TILES[train][format]
    if INTERPRETED:
        block = min(64, triton.next_power_of_2(triton.cdiv(images, 2)))
        squares = (geometry.pooled[0] // 2) ** 2
        rows = [min(2048, triton.next_power_of_2(block * n)) for n in (squares, geometry.pooled[1] ** 2)]
        return block, Tile(64, rows[0], 64, rows[1], 32, 128, 128, TILES[train][format].kept, 4)
    if geometry.channels > 1:
        # Sums over three channels stay in registers for longer.
        tile = tile._replace(M1=min(tile.M1, 64), K=64 if format == "bfloat16" else tile.K, kept=0)
        if train:
            tile = tile._replace(images=min(tile.images, 32))
    # Few images are spread over the card's multiprocessors; of many a program takes what fills its products.
    return min(tile.images, triton.next_power_of_2(triton.cdiv(images, 132))), tile


@triton.jit
def load_patches(
    x_ptr, image, square, mask, k,
    C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr,
    FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_K): pixels k = c * 64 + dy * 8 + dx of the 8 x 8 patch that feeds a square of four windows.

    Images of bytes lie in a frame of FRAME black pixels and become p * SCALE + SHIFT.
    """
    SIDE: tl.constexpr = SIZE - 2 * FRAME
    top, left = square // (Q1 // 2) * 4 - PAD, square % (Q1 // 2) * 4 - PAD
    dy, dx = k // 8 % 8, k % 8
    rows = image * (C * SIDE * SIDE) + (top - FRAME) * SIDE + left - FRAME
    offs = rows[:, None] + (k // 64 * (SIDE * SIDE) + dy * SIDE + dx)[None, :]
    inside = mask[:, None]
    if PAD + FRAME > 0:
        ih, iw = top[:, None] + dy[None, :], left[:, None] + dx[None, :]
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
def add_product(
    acc, a_ptr, a_rows, mask_m, w_ptr, w_cols,
    K: tl.constexpr, STRIDE_K: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + a w: a (BLOCK_M, K) of rows one after the other, w (K, BLOCK_N) complete to whole blocks of K."""
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + a_rows[:, None] + k[None, :], mask=mask_m[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(w_ptr + (k * STRIDE_K)[:, None] + w_cols[None, :])
        acc = tl.dot(a.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION)
    return acc


@triton.jit
def first_convolution(
    x_ptr, packed_ptr, bias_ptr, p1_ptr, code_ptr, i0, s0, N,
    TRAIN: tl.constexpr, KEPT: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
    Q1: tl.constexpr, FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    SQUARES: tl.constexpr = (Q1 // 2) * (Q1 // 2)
    offs_n, lanes = tl.arange(0, 128), tl.arange(0, 32)
    bias = tl.load(bias_ptr + lanes % 8, mask=lanes % 8 < 6, other=0.0)
    filters = ()
    if KEPT:
        for k0 in tl.static_range(0, C * 64, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            w = tl.load(packed_ptr + (k * 128)[:, None] + offs_n[None, :])
            filters = filters + (w.to(OPERAND),)
    for m0 in range(0, BLOCK_I * SQUARES, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        image, square = offs_m // SQUARES, offs_m % SQUARES
        mask = (offs_m < BLOCK_I * SQUARES) & (i0 + image < N)
        acc = tl.zeros((BLOCK_M, 128), tl.float32)
        if KEPT:
            for k0 in tl.static_range(0, C * 64, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                x = load_patches(x_ptr, i0 + image, square, mask, k, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT)
                # Nothing changes, but the compiler moves a bare cast to after the way through shared memory.
                x = tl.where(mask[:, None], x.to(OPERAND), 0.0)
                acc = tl.dot(x, filters[k0 // BLOCK_K], acc, input_precision=PRECISION)
        else:
            for k0 in range(0, C * 64, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                x = load_patches(x_ptr, i0 + image, square, mask, k, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT)
                w = tl.load(packed_ptr + (k * 128)[:, None] + offs_n[None, :])
                acc = tl.dot(x.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION)
        y, code = largest_of_four(acc, bias, BLOCK_M, 32)
        rows = (s0 + image) * (Q1 * Q1 * 8) + square // (Q1 // 2) * (Q1 * 16) + square % (Q1 // 2) * 16
        offs = rows[:, None] + (lanes // 16 * (Q1 * 8) + lanes % 16)[None, :]
        tl.store(p1_ptr + offs, round_to(y, p1_ptr.dtype.element_ty), mask=mask[:, None])
        if TRAIN:
            tl.store(code_ptr + offs, code, mask=mask[:, None])


@triton.jit
def load_windows(p1_ptr, rows, mask, k, Q1: tl.constexpr):
    """(BLOCK_M, BLOCK_K): elements k = dy * 48 + dx * 8 + c of the 6 x 6 patch that feeds a window."""
    return tl.load(p1_ptr + rows[:, None] + (k // 48 * (Q1 * 8) + k % 48)[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def second_convolution(
    p1_ptr, packed_ptr, bias_ptr, acts_ptr, code_ptr, i0, s0, N,
    TRAIN: tl.constexpr, KEPT: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr, F: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    WINDOWS: tl.constexpr = Q2 * Q2
    offs_n, lanes = tl.arange(0, 64), tl.arange(0, 16)
    bias = tl.load(bias_ptr + lanes)
    filters = ()
    if KEPT:
        for k0 in tl.static_range(0, 288, BLOCK_K):
            k = k0 + tl.arange(0, min(BLOCK_K, 288 - k0))
            w = tl.load(packed_ptr + (k * 64)[:, None] + offs_n[None, :])
            filters = filters + (w.to(OPERAND),)
    for m0 in range(0, BLOCK_I * WINDOWS, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        image, window = offs_m // WINDOWS, offs_m % WINDOWS
        mask = (offs_m < BLOCK_I * WINDOWS) & (i0 + image < N)
        rows = (s0 + image) * (Q1 * Q1 * 8) + window // Q2 * (Q1 * 16) + window % Q2 * 16
        acc = tl.zeros((BLOCK_M, 64), tl.float32)
        if KEPT:
            for k0 in tl.static_range(0, 288, BLOCK_K):
                k = k0 + tl.arange(0, min(BLOCK_K, 288 - k0))
                p = load_windows(p1_ptr, rows, mask, k, Q1)
                acc = tl.dot(p.to(OPERAND), filters[k0 // BLOCK_K], acc, input_precision=PRECISION)
        else:
            for k0 in range(0, 288, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                p = load_windows(p1_ptr, rows, mask, k, Q1)
                w = tl.load(packed_ptr + (k * 64)[:, None] + offs_n[None, :])
                acc = tl.dot(p.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION)
        y, code = largest_of_four(acc, bias, BLOCK_M, 16)
        offs = ((s0 + image) * (F + 256) + window * 16)[:, None] + lanes[None, :]
        tl.store(acts_ptr + offs, round_to(y, acts_ptr.dtype.element_ty), mask=mask[:, None])
        if TRAIN:
            offs = ((s0 + image) * F + window * 16)[:, None] + lanes[None, :]
            tl.store(code_ptr + offs, code, mask=mask[:, None])


@triton.jit
def hidden_layer(
    acts_ptr, rows, mask_m, packed_ptr, bias_ptr, K: tl.constexpr, N: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """max(0, acts w + bias), of 128 columns from the Kth on, N of them not padding."""
    offs_n = tl.arange(0, 128)
    acc = tl.zeros((BLOCK_R, 128), tl.float32)
    acc = add_product(acc, acts_ptr, rows, mask_m, packed_ptr, offs_n, K, 128, OPERAND, PRECISION, BLOCK_K)
    acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    h = round_to(tl.where(acc < 0, 0.0, acc), acts_ptr.dtype.element_ty)
    tl.store(acts_ptr + rows[:, None] + (K + offs_n)[None, :], h, mask=mask_m[:, None])


@triton.jit
def hidden_gradient(
    acts_ptr, acts_rows, grads_ptr, grads_rows, mask_m, packed_ptr, FROM: tl.constexpr, TO: tl.constexpr,
    K: tl.constexpr, STRIDE: tl.constexpr, ACTS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient at column TO of grads: that at FROM through the weights, where the layer's result is above 0."""
    offs_n = tl.arange(0, 128)
    acc = tl.zeros((BLOCK_R, 128), tl.float32)
    acc = add_product(
        acc, grads_ptr + FROM, grads_rows, mask_m, packed_ptr, offs_n * STRIDE, K, 1, OPERAND, PRECISION, BLOCK_K
    )
    h = tl.load(acts_ptr + acts_rows[:, None] + (ACTS + offs_n)[None, :], mask=mask_m[:, None], other=0.0)
    dh = round_to(tl.where(h.to(tl.float32) > 0, acc, 0.0), grads_ptr.dtype.element_ty)
    tl.store(grads_ptr + grads_rows[:, None] + (TO + offs_n)[None, :], dh, mask=mask_m[:, None])


@triton.jit
def loss_and_gradient(
    logits_ptr, target_ptr, grads_ptr, grads_rows, n, mask_m, ignore_index,
    CLASSES: tl.constexpr, CP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(loss of each row, whether it has a target); the gradient of the logits goes to column 256 of grads."""
    # The largest so far, and the sum of exponentials relative to it (Milakov and Gimelshein 2018).
    largest, sum_exp = tl.full((BLOCK_R,), float("-inf"), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    for c0 in range(0, CP, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = mask_m[:, None] & (c < CLASSES)[None, :]
        y = tl.load(logits_ptr + (n * CLASSES)[:, None] + c[None, :], mask=mask, other=0.0)
        y = tl.where((c < CLASSES)[None, :], y, float("-inf"))
        new = tl.maximum(largest, tl.max(y, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        sum_exp = sum_exp * tl.exp(largest - base) + tl.sum(tl.exp(y - base[:, None]), axis=1)
        largest = new
    lse = largest + tl.log(sum_exp)

    target = tl.load(target_ptr + n, mask=mask_m, other=0).to(tl.int64)
    kept, valid = mask_m & (target != ignore_index), (target >= 0) & (target < CLASSES)
    y_target = tl.load(logits_ptr + n * CLASSES + target, mask=kept & valid, other=float("nan"))
    for c0 in range(0, CP, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = mask_m[:, None] & (c < CLASSES)[None, :]
        y = tl.load(logits_ptr + (n * CLASSES)[:, None] + c[None, :], mask=mask, other=0.0)
        dy = tl.exp(y - lse[:, None]) - (c[None, :] == target[:, None]).to(tl.float32)
        dy = tl.where(kept[:, None], tl.where(valid[:, None], dy, float("nan")), 0.0)
        dy = tl.where((c < CLASSES)[None, :], dy, 0.0)
        offs = grads_rows[:, None] + (256 + c)[None, :]
        tl.store(grads_ptr + offs, round_to(dy, grads_ptr.dtype.element_ty), mask=mask_m[:, None])
    return tl.where(kept, lse - y_target, 0.0), kept


@triton.jit(do_not_specialize=["N", "ignore_index"])
def lenet_forward_kernel(
    x_ptr, target_ptr, flat_ptr, packed_ptr,
    p1_ptr, code1_ptr, acts_ptr, code2_ptr, logits_ptr, grads_ptr, dz_ptr, loss_ptr,
    N, ignore_index,
    B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, B4: tl.constexpr, B5: tl.constexpr,
    W2: tl.constexpr, W3: tl.constexpr, W4: tl.constexpr, W5: tl.constexpr,
    TRAIN: tl.constexpr, KEPT: tl.constexpr,
    C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    F: tl.constexpr, CLASSES: tl.constexpr, CP: tl.constexpr,
    FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M1: tl.constexpr, BLOCK_K1: tl.constexpr, BLOCK_M2: tl.constexpr, BLOCK_K2: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(INDEX)
    # In training every image keeps its activations; otherwise a program uses its own again and again.
    for group in range(pid, pid + 1 if TRAIN else tl.cdiv(N, BLOCK_I), 1 if TRAIN else tl.num_programs(0)):
        i0, s0 = group * BLOCK_I, (group if TRAIN else pid) * BLOCK_I
        first_convolution(
            x_ptr, packed_ptr, flat_ptr + B1, p1_ptr, code1_ptr, i0, s0, N,
            TRAIN, KEPT > 0, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT, OPERAND, PRECISION, BLOCK_I, BLOCK_M1, BLOCK_K1,
        )  # fmt: skip
        tl.debug_barrier()
        second_convolution(
            p1_ptr, packed_ptr + W2, flat_ptr + B2, acts_ptr, code2_ptr, i0, s0, N,
            TRAIN, KEPT > 1, Q1, Q2, F, OPERAND, PRECISION, BLOCK_I, BLOCK_M2, BLOCK_K2,
        )  # fmt: skip
        tl.debug_barrier()

        # The matrix units take sixteen rows at the least.
        lanes = tl.arange(0, BLOCK_R)
        n, acts_rows = i0 + lanes, (s0 + lanes) * (F + 256)
        mask_m = (lanes < BLOCK_I) & (n < N)
        hidden_layer(
            acts_ptr, acts_rows, mask_m, packed_ptr + W3, flat_ptr + B3, F, 120, OPERAND, PRECISION, BLOCK_R, BLOCK_K
        )
        tl.debug_barrier()
        hidden_layer(
            acts_ptr + F, acts_rows, mask_m, packed_ptr + W4, flat_ptr + B4, 128, 84,
            OPERAND, PRECISION, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        tl.debug_barrier()

        for c0 in range(0, CP, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            y = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
            h2_ptr = acts_ptr + F + 128
            y = add_product(y, h2_ptr, acts_rows, mask_m, packed_ptr + W5, c, 128, CP, OPERAND, PRECISION, BLOCK_K)
            y += tl.load(flat_ptr + B5 + c, mask=c < CLASSES, other=0.0)[None, :]
            mask = mask_m[:, None] & (c < CLASSES)[None, :]
            tl.store(logits_ptr + (n * CLASSES)[:, None] + c[None, :], y.to(logits_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()

        if TRAIN:
            grads_rows = n * (256 + CP)
            loss, kept = loss_and_gradient(
                logits_ptr, target_ptr, grads_ptr, grads_rows, n, mask_m, ignore_index, CLASSES, CP, BLOCK_R, BLOCK_C
            )  # fmt: skip
            tl.store(loss_ptr + 2 * group, tl.sum(loss, axis=0))
            tl.store(loss_ptr + 2 * group + 1, tl.sum(kept.to(tl.float32), axis=0))
            tl.debug_barrier()
            hidden_gradient(
                acts_ptr, acts_rows, grads_ptr, grads_rows, mask_m, packed_ptr + W5, 256, 128, CP, CP, F + 128,
                OPERAND, PRECISION, BLOCK_R, BLOCK_K if BLOCK_K < BLOCK_C else BLOCK_C,
            )  # fmt: skip
            tl.debug_barrier()
            hidden_gradient(
                acts_ptr, acts_rows, grads_ptr, grads_rows, mask_m, packed_ptr + W4, 128, 0, 128, 128, F,
                OPERAND, PRECISION, BLOCK_R, BLOCK_K,
            )  # fmt: skip
            tl.debug_barrier()
            for f0 in range(0, F, BLOCK_F):
                f = f0 + tl.arange(0, BLOCK_F)
                dp = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
                dp = add_product(
                    dp, grads_ptr, grads_rows, mask_m, packed_ptr + W3, f * 128, 128, 1, OPERAND, PRECISION, BLOCK_K
                )
                mask = mask_m[:, None] & (f < F)[None, :]
                code = tl.load(code2_ptr + (n * F)[:, None] + f[None, :], mask=mask, other=4)
                offs = (n * (4 * F))[:, None] + (f // 16 * 64 + f % 16)[None, :]
                for q in tl.static_range(4):
                    dz = round_to(tl.where(code == q, dp, 0.0), dz_ptr.dtype.element_ty)
                    tl.store(dz_ptr + offs + q * 16, dz, mask=mask)


class Pixels(NamedTuple):
    """How images become what the first convolution reads: bytes p as p * scale + shift, in a frame of black pixels."""

    frame: int = 0
    scale: float = 1.0
    shift: float = 0.0


def activations(N, geometry, format, device, train):
    """The tensors that the launches leave to each other for N images: p1, code1, acts, code2, grads, dz, loss."""
    (Q1, _), F = geometry.pooled, geometry.features
    dtype = torch.bfloat16 if format == "bfloat16" else torch.float32
    block, _ = tile_for(format, N, geometry, train)

    def new(*size, dtype=dtype):
        return torch.empty(size, dtype=dtype, device=device)

    if not train:
        N = min(N, inference_programs(N, block) * block)
        return {"p1": new(N, Q1, Q1, 8), "acts": new(N, F + 256)}
    return {
        "p1": new(N, Q1, Q1, 8), "code1": new(N, Q1, Q1, 8, dtype=torch.uint8),
        "acts": new(N, F + 256), "code2": new(N, F, dtype=torch.uint8),
        "logits": new(N, geometry.classes, dtype=torch.float32),
        "grads": new(N, 256 + geometry.padded_classes), "dz": new(N, F // 16, 4, 16),
        "loss": new(triton.cdiv(N, block), 2, dtype=torch.float32),
    }  # fmt: skip


def inference_programs(N, block):
    """Each program uses its activations again, so that those of all stay in the caches."""
    return min(triton.cdiv(N, block), 3 if INTERPRETED else 528)


def forward(x, target, flat, packed, geometry, format, pixels, memory, logits, ignore_index=-100):
    """x (N, C, H, W) contiguous, target (N) or None -> logits (N, classes); with a target all of `memory` is filled."""
    N, train = x.shape[0], target is not None
    block, tile = tile_for(format, N, geometry, train)
    programs = triton.cdiv(N, block) if train else inference_programs(N, block)
    p1, acts = memory["p1"], memory["acts"]
    # Pointers that inference never follows.
    code1, code2, grads, dz, loss = (memory.get(name, acts) for name in ("code1", "code2", "grads", "dz", "loss"))
    (_, W2, _, W3, W4, W5, _), starts = geometry.packed, geometry.flat
    lenet_forward_kernel[(programs,)](
        x, target if train else x, flat, packed,
        p1, code1, acts, code2, logits, grads, dz, loss,
        N, ignore_index,
        **{f"B{i + 1}": starts[2 * i + 1] for i in range(5)}, W2=W2, W3=W3, W4=W4, W5=W5,
        TRAIN=train, KEPT=tile.kept, **geometry.constants, FRAME=pixels.frame, SCALE=pixels.scale, SHIFT=pixels.shift,
        INDEX=index_type(x, p1, acts, dz, logits), OPERAND=operand_type(packed.dtype),
        PRECISION="ieee" if format == "ieee" else "tf32",
        BLOCK_I=block, BLOCK_R=max(16, block), BLOCK_C=geometry.block_classes,
        BLOCK_M1=tile.M1, BLOCK_K1=tile.K1, BLOCK_M2=tile.M2, BLOCK_K2=tile.K2, BLOCK_K=tile.K, BLOCK_F=tile.F,
        num_warps=tile.num_warps, num_stages=1, **OPTIONS,
    )  # fmt: skip
    return logits
