"""The orders in which LeNet's products take their rows and columns, so that nothing moves between a warp's lanes.

Of sixteen rows of a product that are a warp's, each group of four lanes holds one of the first eight and one of the
others. Of a row of the left operand, lane t has the 32-bit words t, t + 4, t + 8, ...; of a row of the result it has
the columns 2t, 2t + 1, 2t + 8, 2t + 9, ... But lanes load and store best VECTOR elements, 16 bytes, side by side.
A sum may take its terms in any order, and a result's columns may stand in any, as long as both operands agree: here
they are in the order in which lanes have loaded them or will store them. Operands then go from memory to the matrix
units, and results to memory, without the way through shared memory. So it is where the compiler gives each warp sixteen
rows, on sm_80 and sm_90 with BLOCK_M = 16 * num_warps; elsewhere it moves them, and the numbers are the same.

Source: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "Register Fragments for wgmma.mma_async.m64nNk16".
"""

import triton
import triton.language as tl


@triton.jit
def rows_of_lanes(BLOCK_M: tl.constexpr):
    """The rows of a product in the order in which lanes load and store them."""
    i = tl.arange(0, BLOCK_M)
    if BLOCK_M < 16:
        return i
    return i // 8 % (BLOCK_M // 16) * 16 + i // (BLOCK_M // 2) * 8 + i % 8


@triton.jit
def columns_of_lanes(K: tl.constexpr, VECTOR: tl.constexpr, PAIR: tl.constexpr):
    """The columns of memory in the order in which a product has them; PAIR is 2 for results."""
    k = tl.arange(0, K)
    within = k // PAIR % 4 * VECTOR + k // (4 * PAIR) % (VECTOR // PAIR) * PAIR + k % PAIR
    return k // (4 * VECTOR) * (4 * VECTOR) + within


@triton.jit
def vectors(K: tl.constexpr, VECTOR: tl.constexpr):
    """(K / (4 * VECTOR), 1, 4, VECTOR): the columns of memory, VECTOR to a lane."""
    blocks, lanes, elements = tl.arange(0, K // (4 * VECTOR)), tl.arange(0, 4), tl.arange(0, VECTOR)
    columns = blocks[:, None, None] * (4 * VECTOR) + (lanes[:, None] * VECTOR + elements[None, :])[None, :, :]
    return columns[:, None, :, :]


@triton.jit
def to_operand(x, PAIR: tl.constexpr):
    """(K / (4 * VECTOR), BLOCK_M, 4, VECTOR), the rows of rows_of_lanes by `vectors` -> (BLOCK_M, K).

    Its rows are in order, its columns those of columns_of_lanes(K, VECTOR, PAIR); PAIR elements are 32 bits.
    """
    J: tl.constexpr = x.shape[0]
    BLOCK_M: tl.constexpr = x.shape[1]
    VECTOR: tl.constexpr = x.shape[3]
    HALVES: tl.constexpr = min(2, BLOCK_M // 8)
    x = tl.reshape(x, (J, HALVES, BLOCK_M // 8 // HALVES, 8, 4, VECTOR // PAIR, PAIR))
    return tl.reshape(tl.permute(x, (2, 1, 3, 0, 5, 4, 6)), (BLOCK_M, J * 4 * VECTOR))


@triton.jit
def from_result(y, VECTOR: tl.constexpr):
    """(BLOCK_M, K), columns those of columns_of_lanes(K, VECTOR, 2) -> (K / (4 * VECTOR), BLOCK_M, 4, VECTOR)."""
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
    # As one permutation: triton 3.6.0 does not compile a transposition after the reshape for 64 rows and more.
    return tl.reshape(tl.permute(w, (0, 3, 2, 4, 1)), (K, BLOCK_N))
