"""LeNet's linear layers inside the second launch: forward, loss, and the gradients of their inputs.

    h = relu(a w + bias),   loss = lse(y) - y[target],   dy = exp(y - lse) - [class = target],   dh = dy w^T where h > 0

An image is a row. The kernel in forward.py calls a function for each layer, with a barrier between them. Operands are
permuted as lane_order.py explains.
"""

import triton
import triton.language as tl

from .._common import round_to
from .lane_order import columns_of_lanes, from_result, load_transposed, load_weights, to_operand, vectors


@triton.jit
def load_rows(ptr, rows, mask_m, k0, K: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr):
    """(BLOCK_K / (4 * VECTOR), BLOCK_R, 4, VECTOR): columns k0 to k0 + BLOCK_K of the rows, 0 from column K on."""
    k = k0 + vectors(BLOCK_K, VECTOR)
    mask = mask_m if K % BLOCK_K == 0 else mask_m & (k < K)
    return tl.load(ptr + rows + k, mask=mask, other=0.0)


@triton.jit
def add_product(
    acc, a_ptr, rows, mask_m, w_ptr, offs_n,
    K: tl.constexpr, STRIDE_K: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + a w: a (BLOCK_R, K) with contiguous rows, w (K, BLOCK_N) padded to whole blocks of K."""
    VECTOR: tl.constexpr = min(128 // a_ptr.dtype.element_ty.primitive_bitwidth, BLOCK_K // 4)
    PAIR: tl.constexpr = 32 // OPERAND.primitive_bitwidth
    for k0 in range(0, K, BLOCK_K):
        a = load_rows(a_ptr, rows, mask_m, k0, K, BLOCK_K, VECTOR).to(OPERAND)
        w = load_weights(w_ptr, k0, offs_n, STRIDE_K, BLOCK_K, VECTOR, OPERAND)
        acc = tl.dot(to_operand(a, PAIR), w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def hidden_layer(
    acts_ptr, rows, mask_m, packed_ptr, bias_ptr, K: tl.constexpr, N: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store max(0, acts w + bias) in 128 columns from column K on, N of which are not padding."""
    offs_n = tl.arange(0, 128)
    acc = tl.zeros((BLOCK_R, 128), tl.float32)
    acc = add_product(acc, acts_ptr, rows, mask_m, packed_ptr, offs_n, K, 128, OPERAND, PRECISION, BLOCK_K)
    acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    h = round_to(tl.where(acc < 0, 0.0, acc), acts_ptr.dtype.element_ty)
    tl.store(acts_ptr + rows + K + vectors(128, 2), from_result(h, 2), mask=mask_m)


@triton.jit
def add_transposed_product(
    acc, a_ptr, rows, mask_m, w_ptr, offs_n,
    K: tl.constexpr, VECTOR: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + a w^T: a (BLOCK_R, K), w (BLOCK_N, K) the rows offs_n of w_ptr."""
    for k0 in range(0, K, BLOCK_K):
        a = load_rows(a_ptr, rows, mask_m, k0, K, BLOCK_K, VECTOR).to(OPERAND)
        w = load_transposed(w_ptr, offs_n, k0, K, BLOCK_K, VECTOR, OPERAND)
        acc = tl.dot(to_operand(a, 32 // OPERAND.primitive_bitwidth), w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def hidden_gradient(
    acts_ptr, acts_rows, grads_ptr, grads_rows, mask_m, packed_ptr, FROM: tl.constexpr, TO: tl.constexpr,
    K: tl.constexpr, ACTS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store at column TO of grads the gradient at FROM times the weights, where the layer's result is above 0."""
    MOST: tl.constexpr = 128 // grads_ptr.dtype.element_ty.primitive_bitwidth
    dh = add_transposed_product(
        tl.zeros((BLOCK_R, 128), tl.float32), grads_ptr + FROM, grads_rows, mask_m,
        packed_ptr, columns_of_lanes(128, MOST, 2), K, min(MOST, BLOCK_K // 4), OPERAND, PRECISION, BLOCK_K,
    )  # fmt: skip
    h = load_rows(acts_ptr + ACTS, acts_rows, mask_m, 0, 128, 128, MOST)
    dh = tl.where(h.to(tl.float32) > 0, from_result(dh, MOST), 0.0)
    tl.store(grads_ptr + grads_rows + TO + vectors(128, MOST), round_to(dh, grads_ptr.dtype.element_ty), mask=mask_m)


@triton.jit
def features_gradient(
    grads_ptr, grads_rows, code_ptr, dz_ptr, dz_columns_ptr, code_columns_ptr, n, mask_m, packed_ptr, F: tl.constexpr,
    LANES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the second convolution's result: fc1's times its weights, at the pixel of the code.

    With LANES that of p2 is stored instead, and it and the code once more as columns; see layout.py.
    """
    VECTOR: tl.constexpr = 128 // grads_ptr.dtype.element_ty.primitive_bitwidth
    # In full float32 there are no registers for all of dh.
    WHOLE: tl.constexpr = PRECISION != "ieee"
    if WHOLE:
        dh = load_rows(grads_ptr, grads_rows, mask_m, 0, 128, 128, VECTOR).to(OPERAND)
        dh = to_operand(dh, 32 // OPERAND.primitive_bitwidth)
    for f0 in range(0, F, BLOCK_F):
        offs_n = f0 + columns_of_lanes(BLOCK_F, VECTOR, 2)
        if WHOLE:
            w = load_transposed(packed_ptr, offs_n, 0, 128, 128, VECTOR, OPERAND)
            dp = tl.dot(dh, w, input_precision=PRECISION)
        else:
            dp = add_transposed_product(
                tl.zeros((BLOCK_R, BLOCK_F), tl.float32), grads_ptr, grads_rows, mask_m,
                packed_ptr, offs_n, 128, VECTOR, OPERAND, PRECISION, BLOCK_K,
            )  # fmt: skip
        dp, f = from_result(dp, VECTOR), f0 + vectors(BLOCK_F, VECTOR)
        mask = mask_m & (f < F)
        code = tl.load(code_ptr + n * F + f, mask=mask, other=4)
        if LANES:
            tl.store(dz_ptr + n * F + f, dp, mask=mask)
            columns = n // 32 * (32 * F) + n % 32 + f * 32
            tl.store(dz_columns_ptr + columns, dp, mask=mask)
            tl.store(code_columns_ptr + columns, code, mask=mask)
        else:
            for q in tl.static_range(4):
                dz = round_to(tl.where(code == q, dp, 0.0), dz_ptr.dtype.element_ty)
                tl.store(dz_ptr + n * (4 * F) + (f // 16 * 64 + f % 16) + q * 16, dz, mask=mask)


@triton.jit
def loss_and_gradient(
    logits_ptr, target_ptr, grads_ptr, grads_rows, n, mask_m, ignore_index,
    CLASSES: tl.constexpr, CP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(loss of each row, whether it has a target); stores the gradient of the logits from column 256 of grads on."""
    # The maximum so far, and the sum of exponentials relative to it (Milakov and Gimelshein 2018).
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
