"""The product of a fully connected layer; its input gradient is the same product with another matrix.

    y[m, n]  = epilogue(sum over k of x[m, k] * w[n, k])
    dx       = linear(dy, w transposed)
    dw[n, k] = sum over m of dy[m, n] * x[m, k],    db[n] = sum over m of dy[m, n]

Tensors may have any strides, so transposing costs nothing (but a copy in tf32 on
sm_90, see tiles.wants_k_inner).
"""

import torch
import triton
import triton.language as tl

from . import product, shapes
from ._common import cached_for_architecture, cdiv, first_column, in_units, index_type, product_types, round_to
from .epilogue import NONE, constant, parts_for, store_finished
from .launching import planned
from .reduce import Partials
from .tiles import gemm_tile, gradient_tile, wants_k_inner


def precision():
    """The precision of float32 products: torch's flag for matrix products, "ieee" unless the user changes it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def features_inner(t):
    """t with contiguous features, copied only if needed."""
    return t if t.stride(1) == 1 else t.contiguous()


@triton.jit(do_not_specialize=["M"])
def linear_forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, r_ptr,
    M, N, K,
    stride_xm, stride_xk,
    stride_wn, stride_wk,
    stride_b,
    stride_ym, stride_yn,
    EPILOGUE: tl.constexpr, PARTS: tl.constexpr, UNITS: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    N, K, stride_xm, stride_xk = N * UNITS[0], K * UNITS[1], stride_xm * UNITS[2], stride_xk * UNITS[3]
    stride_wn, stride_wk, stride_ym = stride_wn * UNITS[4], stride_wk * UNITS[5], stride_ym * UNITS[6]

    pid = tl.program_id(0).to(INDEX)
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_m = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K).to(INDEX)
        mask_k = offs_k < K
        x_offs = (offs_m * stride_xm)[:, None] + (offs_k * stride_xk)[None, :]
        w_offs = (offs_k * stride_wk)[:, None] + (offs_n * stride_wn)[None, :]
        x = tl.load(x_ptr + x_offs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptr + w_offs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(x.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)

    store_finished(
        y_ptr, r_ptr, acc, offs_m * stride_ym, mask_m, pid % tiles_n * BLOCK_N, N, 0, stride_yn,
        (b_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr), stride_b, EPILOGUE, PARTS, ACC,
    )  # fmt: skip


@planned(linear_forward_kernel)
def _forward(x, w, bias, y, mean, var, scale, shift, residual, values, precision):
    (M, K), N = x.shape, w.shape[0]
    tile = gemm_tile("matrices", M, N, K, x.dtype, precision)
    (n, k, *steps, stride_ym), units = in_units(x.itemsize, N, K, *x.stride(), *w.stride(), y.stride(0))
    epilogue = constant(bias, mean, var, scale, shift, residual, *values)
    numbers = M, n, k, *steps, 0 if bias is None else bias.stride(0), stride_ym, y.stride(1)
    return (cdiv(M, tile.M) * cdiv(N, tile.N),), numbers, dict(
        EPILOGUE=epilogue, PARTS=parts_for(tile, epilogue),
        UNITS=units,
        INDEX=index_type(x, w, bias, y), **product_types(x.dtype, precision),
        **tile.blocks, **tile.options,
    )  # fmt: skip


def forward(x, w, bias, epilogue=NONE):
    """x (M, K), w (N, K), bias (N) or None -> y (M, N), all of one floating dtype; the sums go through the epilogue."""
    y = shapes.linear(x, w)
    if wants_k_inner(x.dtype, precision()):
        x, w = features_inner(x), features_inner(w)
    if product.serves(x, w, precision()):
        product.forward(x, w, bias, y, epilogue, precision())
    elif y.numel() > 0:
        tensors, values = epilogue.of(y)
        _forward((x, w, bias, y, *tensors), values, precision())
    return y


@triton.jit
def weight_grad_tile(
    dy_ptr, x_ptr, dw_ptr, db_ptr, pid_n, pid_k, first, last, partial,
    N, K,
    stride_ym, stride_yn,
    stride_xm, stride_xk,
    stride_wn, stride_wk,
    HAS_BIAS: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the sum over the rows `first` to `last` for one tile of dw; the first tile of a row also stores db.

    `partial` is the offset of the partial sums from dw_ptr and db_ptr. db is one more product, with ones, where that is
    exact and adds little. Otherwise it is summed in a loop of its own: tf32 has too few bits, and a use of dy in
    registers inside the product's loop would stall the matrix unit.
    """
    # The product (N, M) x (M, K): BLOCK_M tiles N, BLOCK_N tiles K, and BLOCK_K walks this program's share of M.
    offs_n = pid_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n, mask_k = offs_n < N, offs_k < K

    SUM: tl.constexpr = HAS_BIAS and OPERAND.primitive_bitwidth == 16 and BLOCK_N >= 128
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc_b, ones = tl.zeros((BLOCK_M, 16), ACC), tl.full((BLOCK_K, 16), 1.0, OPERAND)
    if OPERAND.primitive_bitwidth == 16:
        # Otherwise triton 3.6.0 waits for each product before the next; no share of split_product is empty.
        tl.assume(first < last)
    for m0 in range(first, last, BLOCK_K):
        offs_m = m0 + tl.arange(0, BLOCK_K).to(INDEX)
        mask_m = offs_m < last
        y_offs = (offs_n * stride_yn)[:, None] + (offs_m * stride_ym)[None, :]
        x_offs = (offs_m * stride_xm)[:, None] + (offs_k * stride_xk)[None, :]
        dy = tl.load(dy_ptr + y_offs, mask=mask_n[:, None] & mask_m[None, :], other=0.0)
        x = tl.load(x_ptr + x_offs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(dy.to(OPERAND), x.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
        if SUM:
            acc_b = tl.dot(dy.to(OPERAND), ones, acc_b, input_precision=PRECISION, out_dtype=ACC)

    w_offs = partial + (offs_n * stride_wn)[:, None] + (offs_k * stride_wk)[None, :]
    tl.store(dw_ptr + w_offs, round_to(acc, dw_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_k[None, :])

    if SUM:
        db = round_to(first_column(acc_b), db_ptr.dtype.element_ty)
        tl.store(db_ptr + partial + offs_n, db, mask=mask_n & (pid_k == 0))
    elif HAS_BIAS:
        if pid_k == 0:
            rows = tl.zeros((BLOCK_M, BLOCK_K), ACC)
            for m0 in range(first, last, BLOCK_K):
                offs_m = m0 + tl.arange(0, BLOCK_K).to(INDEX)
                y_offs = (offs_n * stride_yn)[:, None] + (offs_m * stride_ym)[None, :]
                mask = mask_n[:, None] & (offs_m < last)[None, :]
                rows += tl.load(dy_ptr + y_offs, mask=mask, other=0.0).to(ACC)
            db = round_to(tl.sum(rows, axis=1), db_ptr.dtype.element_ty)
            tl.store(db_ptr + partial + offs_n, db, mask=mask_n)


@triton.jit(do_not_specialize=["M", "per_split"])
def linear_weight_grad_kernel(
    dy_ptr, x_ptr, dw_ptr, db_ptr,
    M, N, K, per_split,
    stride_ym, stride_yn,
    stride_xm, stride_xk,
    stride_wn, stride_wk,
    stride_split,
    HAS_BIAS: tl.constexpr, UNITS: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    N, K, stride_ym, stride_yn = N * UNITS[0], K * UNITS[1], stride_ym * UNITS[2], stride_yn * UNITS[3]
    stride_xm, stride_xk, stride_wn = stride_xm * UNITS[4], stride_xk * UNITS[5], stride_wn * UNITS[6]

    pid = tl.program_id(0).to(INDEX)
    # A layer with zero input features still has a bias, which one fully masked tile computes.
    tiles_k, tiles_n = tl.maximum(tl.cdiv(K, BLOCK_N), 1), tl.cdiv(N, BLOCK_M)
    split = pid // tiles_k // tiles_n
    first = split * per_split
    weight_grad_tile(
        dy_ptr, x_ptr, dw_ptr, db_ptr,
        pid // tiles_k % tiles_n, pid % tiles_k, first, tl.minimum(first + per_split, M), split * stride_split,
        N, K,
        stride_ym, stride_yn, stride_xm, stride_xk, stride_wn, stride_wk,
        HAS_BIAS, INDEX, OPERAND, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@cached_for_architecture
def _split(M, N, K, dtype, precision):
    """(Tile, tiles of dw, programs for each tile, rows of dy and x for each program)."""
    return gradient_tile("gradient", N, K, M, dtype, precision)


@planned(linear_weight_grad_kernel)
def _weight_grad(dy, x, dw_ptr, db_ptr, strides, stride_split, with_bias, precision):
    (M, N), K = dy.shape, x.shape[1]
    tile, tiles, splits, per_split = _split(M, N, K, dy.dtype, precision)
    (n, k, *steps, stride_wn), units = in_units(x.itemsize, N, K, *dy.stride(), *x.stride(), strides[0])
    numbers = M, n, k, per_split, *steps, stride_wn, strides[1], stride_split
    return (tiles * splits,), numbers, dict(
        HAS_BIAS=with_bias, UNITS=units,
        INDEX=index_type(dy, x, dw_ptr), **product_types(dy.dtype, precision),
        **tile.blocks, **tile.options,
    )  # fmt: skip


def weight_grad(dy, x, with_bias):
    """dy (M, N), x (M, K) -> dw (N, K) and db (N), empty without `with_bias`."""
    dw, db = shapes.linear_weight_grad(dy, x, with_bias)
    (M, N), K = dy.shape, x.shape[1]
    if N == 0:
        return dw, db
    if M == 0:
        return dw.zero_(), db.zero_()
    products = precision()
    if product.serves_weight_grad(dy, x, products):
        return product.weight_grad(dy, x, dw, db, with_bias, products)
    splits = _split(M, N, K, dy.dtype, products)[2]
    partials = Partials(splits, dw, db)
    dw_ptr, db_ptr, stride_split = partials.pointers
    _weight_grad((dy, x, dw_ptr, db_ptr), dw.stride(), stride_split, with_bias, products)
    return partials.add_up()
