"""The order of rows and columns in LeNet's products, by which operands and results need no shared memory.

In a matrix unit's layout a warp has sixteen rows, and each group of four lanes holds one of the first eight and one of
the last eight. In a row of the left operand, lane t of a group holds the 32-bit words t, t + 4, t + 8, ...; in a row of
the result it holds the columns 2t, 2t + 1, 2t + 8, 2t + 9, ... Loads and stores are fastest if each lane has VECTOR
contiguous elements, 16 bytes. Because the terms of a sum and the columns of a result may be permuted, as long as both
operands agree, operands are permuted here into the order in which lanes load or store them. They then go from memory to
the matrix units, and results to memory, without a conversion in shared memory. This holds if the compiler gives each
warp sixteen rows: on sm_80 and sm_90 with BLOCK_M = 16 * num_warps. Elsewhere it converts, with the same results.

Source: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "Register Fragments for wgmma.mma_async.m64nNk16".
"""

import triton
import triton.language as tl


@triton.jit
def rows_of_lanes(BLOCK_M: tl.constexpr):
    """The order of a product's rows in which lanes load and store them."""
    i = tl.arange(0, BLOCK_M)
    if BLOCK_M < 16:
        return i
    return i // 8 % (BLOCK_M // 16) * 16 + i // (BLOCK_M // 2) * 8 + i % 8


@triton.jit
def columns_of_lanes(K: tl.constexpr, VECTOR: tl.constexpr, PAIR: tl.constexpr):
    """For each column of the product its column in memory; PAIR is 2 for results."""
    k = tl.arange(0, K)
    within = k // PAIR % 4 * VECTOR + k // (4 * PAIR) % (VECTOR // PAIR) * PAIR + k % PAIR
    return k // (4 * VECTOR) * (4 * VECTOR) + within


@triton.jit
def vectors(K: tl.constexpr, VECTOR: tl.constexpr):
    """(K / (4 * VECTOR), 1, 4, VECTOR): the columns in memory, VECTOR for each lane."""
    blocks, lanes, elements = tl.arange(0, K // (4 * VECTOR)), tl.arange(0, 4), tl.arange(0, VECTOR)
    columns = blocks[:, None, None] * (4 * VECTOR) + (lanes[:, None] * VECTOR + elements[None, :])[None, :, :]
    return columns[:, None, :, :]


@triton.jit
def to_operand(x, PAIR: tl.constexpr):
    """(K / (4 * VECTOR), BLOCK_M, 4, VECTOR), loaded at rows_of_lanes and `vectors` -> (BLOCK_M, K).

    Its rows are in order, its columns are columns_of_lanes(K, VECTOR, PAIR); PAIR elements are 32 bits.
    """
    J: tl.constexpr = x.shape[0]
    BLOCK_M: tl.constexpr = x.shape[1]
    VECTOR: tl.constexpr = x.shape[3]
    HALVES: tl.constexpr = min(2, BLOCK_M // 8)
    x = tl.reshape(x, (J, HALVES, BLOCK_M // 8 // HALVES, 8, 4, VECTOR // PAIR, PAIR))
    return tl.reshape(tl.permute(x, (2, 1, 3, 0, 5, 4, 6)), (BLOCK_M, J * 4 * VECTOR))


@triton.jit
def from_result(y, VECTOR: tl.constexpr):
    """(BLOCK_M, K) with the columns columns_of_lanes(K, VECTOR, 2) -> (K / (4 * VECTOR), BLOCK_M, 4, VECTOR)."""
    BLOCK_M: tl.constexpr = y.shape[0]
    J: tl.constexpr = y.shape[1] // (4 * VECTOR)
    HALVES: tl.constexpr = min(2, BLOCK_M // 8)
    y = tl.reshape(y, (BLOCK_M // 8 // HALVES, HALVES, 8, J, VECTOR // 2, 4, 2))
    return tl.reshape(tl.permute(y, (3, 1, 0, 2, 5, 4, 6)), (J, BLOCK_M, 4, VECTOR))


@triton.jit
def load_weights(
    w_ptr, k0, offs_n, STRIDE: tl.constexpr, K: tl.constexpr, VECTOR: tl.constexpr, OPERAND: tl.constexpr
):  # fmt: skip
    """(K, BLOCK_N): the columns offs_n of the rows k0 to k0 + K of w, rows in the order of to_operand's columns."""
    k = k0 + columns_of_lanes(K, VECTOR, 32 // OPERAND.primitive_bitwidth)
    return tl.load(w_ptr + (k * STRIDE)[:, None] + offs_n[None, :]).to(OPERAND)


@triton.jit
def load_transposed(
    w_ptr, offs_n, k0, STRIDE: tl.constexpr, K: tl.constexpr, VECTOR: tl.constexpr, OPERAND: tl.constexpr
):  # fmt: skip
    """(K, BLOCK_N): the columns k0 to k0 + K of the rows offs_n of w, in the order of to_operand's columns."""
    PAIR: tl.constexpr = 32 // OPERAND.primitive_bitwidth
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    w = tl.load(w_ptr + (offs_n * STRIDE)[None, :, None, None] + (k0 + vectors(K, VECTOR))).to(OPERAND)
    w = tl.reshape(w, (K // (4 * VECTOR), BLOCK_N, 4, VECTOR // PAIR, PAIR))
    # One permutation, because triton 3.6.0 does not compile a transposition after the reshape for 64 rows or more.
    return tl.reshape(tl.permute(w, (0, 3, 2, 4, 1)), (K, BLOCK_N))
