"""A chain of two to four fully connected layers with relu between them, in one launch.

    h[0] = x,    h[i][m, n] = max(0, z[i][m, n]),    y = z[L]
    z[i][m, n]  = bias[i][n] + sum over k of h[i - 1][m, k] * w[i][n, k]
    dz[L] = dy,    dz[i - 1][m, k] = sum over n of dz[i][m, n] * w[i][n, k] where h[i - 1] > 0, else 0
    dx          = the same sum over dz[1], without the condition
    dw[i][n, k] = sum over m of dz[i][m, n] * h[i - 1][m, k],    db[i][n] = sum over m of dz[i][m, n]

A program takes a block of rows through all layers and keeps it in registers in between, which limits the widths
(shapes.linear_chain_serves). Every h and dz is rounded to its number format before the next layer uses it, as if the
layers ran one after the other. `hidden` and `dz` are h[1] ... h[L - 1] and dz[1] ... dz[L - 1] concatenated.
"""

import triton
import triton.language as tl

from .. import shapes
from .._common import INTERPRETED, cdiv, index_type, number_format, power_of_2, product_types, round_to
from ..launching import planned, remembered
from ..linear import precision, weight_grad_tile
from ..reduce import Partials
from ..tiles import Tile, gradient_tile, split_product

# M: rows of a program; N: input features in a step of dx; K: features in a step of a product. Registers hold M rows of
# two layers, and without matrix units also K columns of both operands, so M and K are small.
ROWS = {
    "half": (Tile(64, 64, 64, 8, 3), Tile(16, 128, 64, 4, 3)),
    "tf32": (Tile(32, 64, 32, 8, 3), Tile(16, 64, 32, 4, 3)),
    "ieee": (Tile(32, 64, 16, 8, 2), Tile(16, 64, 16, 8, 2)),
    "fp64": (Tile(16, 64, 16, 4, 2),),
}


def _tile(M, dtype, precision):
    """The tile with the most rows that still gives each multiprocessor of a large GPU a program, or with the fewest."""
    if INTERPRETED:
        return Tile(min(4096, max(16, power_of_2(M // 2))), 32, 32, 4, 1)
    tiles = ROWS[number_format(dtype, precision)]
    return next((t for t in tiles if M > 128 * t.M), tiles[-1])


@triton.constexpr_function
def padded(width):
    """A layer's width as tl.dot accepts it: a power of two from 16 on."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def columns(a, first, BLOCK_K: tl.constexpr):
    """BLOCK_K columns of a, starting at `first`."""
    if a.shape[1] <= BLOCK_K:
        return a
    else:
        offs = tl.broadcast_to((first + tl.arange(0, BLOCK_K))[None, :], (a.shape[0], BLOCK_K))
        return tl.gather(a, offs, axis=1)


@triton.jit
def multiply(
    a, w_ptr, offs_n, stride_wn, stride_wk,
    N: tl.constexpr, K: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a, with K columns, times the columns offs_n of w (K, N)."""
    STEP: tl.constexpr = min(BLOCK_K, a.shape[1])
    acc = tl.zeros((a.shape[0], offs_n.shape[0]), ACC)
    for k0 in range(0, K, STEP):
        offs_k = k0 + tl.arange(0, STEP).to(INDEX)
        w_offs = (offs_k * stride_wk)[:, None] + (offs_n * stride_wn)[None, :]
        w = tl.load(w_ptr + w_offs, mask=(offs_k < K)[:, None] & (offs_n < N)[None, :], other=0.0)
        acc = tl.dot(columns(a, k0, STEP), w.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def add_bias(acc, b_ptr, N: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        offs_n = tl.arange(0, acc.shape[1])
        acc += tl.load(b_ptr + offs_n, mask=offs_n < N, other=0.0).to(acc.dtype)[None, :]
    return acc


@triton.jit(do_not_specialize=["M"])
def linear_chain_forward_kernel(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr, w4_ptr, b4_ptr, y_ptr, h_ptr,
    M,
    stride_xm, stride_xk,
    K: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    LAYERS: tl.constexpr, HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = (N1, N2, N3, N4)
    w_ptrs = (w1_ptr, w2_ptr, w3_ptr, w4_ptr)
    b_ptrs = (b1_ptr, b2_ptr, b3_ptr, b4_ptr)
    offs_m = tl.program_id(0).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M

    offs_n = tl.arange(0, padded(N1)).to(INDEX)
    acc = tl.zeros((BLOCK_M, padded(N1)), ACC)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K).to(INDEX)
        mask_k = offs_k < K
        x_offs = (offs_m * stride_xm)[:, None] + (offs_k * stride_xk)[None, :]
        w_offs = offs_k[:, None] + (offs_n * K)[None, :]
        x = tl.load(x_ptr + x_offs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w1_ptr + w_offs, mask=mask_k[:, None] & (offs_n < N1)[None, :], other=0.0)
        acc = tl.dot(x.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
    acc = add_bias(acc, b1_ptr, N1, HAS_BIAS)

    for i in tl.static_range(1, LAYERS):
        # Columns past the width are 0, even if infinities in x have made them NaN.
        inside = offs_n < N[i - 1]
        h = tl.where(inside[None, :] & ~(acc < 0), acc, 0.0)
        h = round_to(h, y_ptr.dtype.element_ty)
        if KEEP:
            h_offs = (offs_m * HIDDEN)[:, None] + offs_n[None, :]
            tl.store(h_ptr + h_offs, h, mask=mask_m[:, None] & inside[None, :])
            h_ptr += N[i - 1]
        offs_n = tl.arange(0, padded(N[i])).to(INDEX)
        acc = multiply(
            h.to(OPERAND), w_ptrs[i], offs_n, N[i - 1], 1, N[i], N[i - 1], INDEX, OPERAND, ACC, PRECISION, BLOCK_K
        )
        acc = add_bias(acc, b_ptrs[i], N[i], HAS_BIAS)

    WIDTH: tl.constexpr = N[LAYERS - 1]
    y_offs = (offs_m * WIDTH)[:, None] + offs_n[None, :]
    mask = mask_m[:, None] & (offs_n < WIDTH)[None, :]
    tl.store(y_ptr + y_offs, round_to(acc, y_ptr.dtype.element_ty), mask=mask)


def _matrices(weights):
    """The weights, contiguous as the kernels read them; the first one stands in for missing layers."""
    return [(weights[0] if w is None else w).contiguous() for w in [*weights, None, None][: shapes.MOST_LAYERS]]


def _sizes(features, widths):
    """The constants of a kernel: input features, the width of each layer (0 if missing), and the number of layers."""
    numbers = [*widths, 0, 0][: shapes.MOST_LAYERS]
    return {"K": features, **{f"N{i}": n for i, n in enumerate(numbers, 1)}, "LAYERS": len(widths)}


@planned(linear_chain_forward_kernel)
def _forward(x, w1, b1, w2, b2, w3, b3, w4, b4, y, hidden, widths, has_bias, keep, precision):
    M, K = x.shape
    tile = _tile(M, x.dtype, precision)
    return (cdiv(M, tile.M),), (M, *x.stride()), dict(
        **_sizes(K, widths), HIDDEN=sum(widths[:-1]), HAS_BIAS=has_bias, KEEP=keep,
        INDEX=index_type(x, w1, w2, w3, w4, y, hidden), **product_types(x.dtype, precision),
        BLOCK_M=tile.M, BLOCK_K=tile.K, **tile.options,
    )  # fmt: skip


def forward(x, *layers_keep):
    """x (M, K), then w (N, N of the layer before) and bias (N) or None a layer, keep -> y (M, N), hidden (M, sum of N).

    Missing layers, up to the fourth, are None, None. `hidden` has no columns unless `keep`.
    """
    *layers, keep = layers_keep
    weights, biases = layers[0::2], layers[1::2]
    widths = shapes.widths(weights)
    y, hidden = shapes.linear_chain(x, weights, keep)
    if x.shape[0] == 0:
        return y, hidden
    has_bias = any(b is not None for b in biases)
    if has_bias:
        # A layer without bias among layers with one is rare; it gets zeros.
        biases = [
            x if w is None else x.new_zeros(w.shape[0]) if b is None else b.contiguous()
            for w, b in zip(weights, biases)
        ]
    matrices = _matrices(weights)
    tensors = x, *(t for layer in zip(matrices, biases if has_bias else matrices) for t in layer), y, hidden
    _forward(tensors, tuple(widths), has_bias, keep, precision())
    return y, hidden


@triton.jit(do_not_specialize=["M"])
def linear_chain_input_grad_kernel(
    dy_ptr, h_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, dx_ptr, dz_ptr,
    M,
    stride_ym, stride_yn,
    K: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    LAYERS: tl.constexpr, HIDDEN: tl.constexpr, NEEDS_DX: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = (N1, N2, N3, N4)
    w_ptrs = (w1_ptr, w2_ptr, w3_ptr, w4_ptr)
    offs_m = tl.program_id(0).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M

    offs_n = tl.arange(0, padded(N[LAYERS - 1])).to(INDEX)
    y_offs = (offs_m * stride_ym)[:, None] + (offs_n * stride_yn)[None, :]
    mask = mask_m[:, None] & (offs_n < N[LAYERS - 1])[None, :]
    dz = tl.load(dy_ptr + y_offs, mask=mask, other=0.0)

    h_ptr += HIDDEN
    dz_ptr += HIDDEN
    for i in tl.static_range(LAYERS - 1, 0, -1):
        h_ptr -= N[i - 1]
        dz_ptr -= N[i - 1]
        offs_n = tl.arange(0, padded(N[i - 1])).to(INDEX)
        acc = multiply(
            dz.to(OPERAND), w_ptrs[i], offs_n, 1, N[i - 1], N[i - 1], N[i], INDEX, OPERAND, ACC, PRECISION, BLOCK_K
        )
        h_offs = (offs_m * HIDDEN)[:, None] + offs_n[None, :]
        mask = mask_m[:, None] & (offs_n < N[i - 1])[None, :]
        h = tl.load(h_ptr + h_offs, mask=mask, other=0.0).to(ACC)
        dz = round_to(tl.where(h <= 0, 0.0, acc), dz_ptr.dtype.element_ty)
        tl.store(dz_ptr + h_offs, dz, mask=mask)

    if NEEDS_DX:
        for k0 in range(0, K, BLOCK_N):
            offs_k = k0 + tl.arange(0, BLOCK_N).to(INDEX)
            dx = multiply(dz.to(OPERAND), w1_ptr, offs_k, 1, K, K, N1, INDEX, OPERAND, ACC, PRECISION, BLOCK_K)
            x_offs = (offs_m * K)[:, None] + offs_k[None, :]
            mask_x = mask_m[:, None] & (offs_k < K)[None, :]
            tl.store(dx_ptr + x_offs, round_to(dx, dx_ptr.dtype.element_ty), mask=mask_x)


@planned(linear_chain_input_grad_kernel)
def _input_grad(dy, hidden, w1, w2, w3, w4, dx, dz, K, widths, needs_dx, precision):
    tile = _tile(dy.shape[0], dy.dtype, precision)
    return (cdiv(dy.shape[0], tile.M),), (dy.shape[0], *dy.stride()), dict(
        **_sizes(K, widths), HIDDEN=hidden.shape[1], NEEDS_DX=needs_dx,
        INDEX=index_type(dy, hidden, w1, w2, w3, w4, dx), **product_types(dy.dtype, precision),
        **tile.blocks, **tile.options,
    )  # fmt: skip


def input_grad(dy, hidden, *weights_needs_dx):
    """dy (M, N), hidden, w or None for each layer, needs_dx -> dx (M, K), without columns unless needed, and dz."""
    *weights, needs_dx = weights_needs_dx
    dx, dz = shapes.linear_chain_input_grad(dy, hidden, weights, needs_dx)
    if dy.shape[0] > 0:
        tensors = dy, hidden.contiguous(), *_matrices(weights), dx, dz
        _input_grad(tensors, weights[0].shape[1], tuple(shapes.widths(weights)), needs_dx, precision())
    return dx, dz


@triton.jit(do_not_specialize=["M", "per_split"])
def linear_chain_weight_grad_kernel(
    dy_ptr, dz_ptr, x_ptr, h_ptr, dw_ptr, db_ptr,
    M, per_split,
    stride_ym, stride_yn,
    stride_xm, stride_xk,
    stride_split,
    K: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    LAYERS: tl.constexpr, HIDDEN: tl.constexpr, TILES: tl.constexpr, HAS_BIAS: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = (N1, N2, N3, N4)
    FEATURES: tl.constexpr = (K, N1, N2, N3)
    pid = tl.program_id(0).to(INDEX)
    split = pid // TILES
    first = split * per_split
    last = tl.minimum(first + per_split, M)

    # The tiles of all layers are numbered consecutively, and a program has one of them.
    tile = pid % TILES
    dw_ptr += split * stride_split
    db_ptr += split * stride_split
    for i in tl.static_range(0, LAYERS):
        tiles_k = tl.cdiv(FEATURES[i], BLOCK_N)
        tiles = tl.cdiv(N[i], BLOCK_M) * tiles_k
        if (tile >= 0) & (tile < tiles):
            weight_grad_tile(
                dy_ptr if i == LAYERS - 1 else dz_ptr, x_ptr if i == 0 else h_ptr, dw_ptr, db_ptr,
                tile // tiles_k, tile % tiles_k, first, last, 0,
                N[i], FEATURES[i],
                stride_ym if i == LAYERS - 1 else HIDDEN, stride_yn if i == LAYERS - 1 else 1,
                stride_xm if i == 0 else HIDDEN, stride_xk if i == 0 else 1,
                FEATURES[i], 1,
                HAS_BIAS, INDEX, OPERAND, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        tile -= tiles
        dz_ptr += N[i]
        if i > 0:
            h_ptr += FEATURES[i]
        dw_ptr += N[i] * FEATURES[i]
        db_ptr += N[i]


@remembered
def _split(M, K, widths, dtype, precision):
    """(Tile, tiles of all layers, programs for each tile, rows for each program)."""
    # Tiles of at most 64 x 64, so that several programs share even a small layer.
    tile = gradient_tile("chain gradient", max(widths), K, M, dtype, precision)[0]
    tiles = sum(cdiv(n, tile.M) * cdiv(k, tile.N) for n, k in zip(widths, [K, *widths]))
    return tile, tiles, *split_product(tiles, M, tile.K)


@planned(linear_chain_weight_grad_kernel)
def _weight_grad(dy, dz, x, hidden, dw_ptr, db_ptr, widths, stride_split, with_bias, precision):
    M, K = x.shape
    tile, tiles, splits, per_split = _split(M, K, widths, dy.dtype, precision)
    return (tiles * splits,), (M, per_split, *dy.stride(), *x.stride(), stride_split), dict(
        **_sizes(K, widths), HIDDEN=hidden.shape[1], TILES=tiles, HAS_BIAS=with_bias,
        INDEX=index_type(dy, dz, x, hidden, dw_ptr), **product_types(dy.dtype, precision),
        **tile.blocks, **tile.options,
    )  # fmt: skip


def weight_grad(dy, dz, x, hidden, widths, with_bias):
    """dy (M, N), dz, x (M, K), hidden, the widths of its parts -> dw, db of all layers; db empty without with_bias."""
    dw, db = shapes.linear_chain_weight_grad(dy, x, widths, with_bias)
    if dy.shape[0] == 0:
        return dw.zero_(), db.zero_()
    dz, hidden, widths, products = dz.contiguous(), hidden.contiguous(), (*widths, dy.shape[1]), precision()
    splits = _split(*x.shape, widths, dy.dtype, products)[2]
    partials = Partials(splits, dw, db)
    dw_ptr, db_ptr, stride_split = partials.pointers
    _weight_grad((dy, dz, x, hidden, dw_ptr, db_ptr), widths, stride_split, with_bias, products)
    return partials.add_up()
