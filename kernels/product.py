"""A matrix product whose operands are read by tensor descriptors: large products of linear and of 1x1 convolutions.

    c[m, n]  = epilogue(sum over k of a[m, k] * b[n, k])
    sum_a[m] = sum over k of a[m, k]

On sm_90 and sm_100 a descriptor is a tensor map, by which one thread copies a whole block to shared memory. Either
operand may be contiguous along k or along its other index; in tf32 the matrix units read the first form only. Programs
that share a sum write partial sums, which reduce.py adds up.

Source: Triton's tensor descriptors, https://triton-lang.org/main/python-api/triton.language.html, and the order of
programs in Triton's tutorial on matrix multiplication.
"""

import torch
import triton
import triton.language as tl

from ._common import (
    INTERPRETED,
    cached_for_architecture,
    cdiv,
    compute_capability,
    dense_steps,
    first_column,
    in_units,
    index_type,
    product_types,
    round_to,
)  # fmt: skip
from .epilogue import NONE, STATISTICS, constant, parts_for, store_finished
from .launching import planned
from .reduce import Partials
from .tile_statistics import WITH_STATISTICS, partials_for, store_statistics
from .tiles import gemm_tile, gradient_tile

# Multiply-adds below which a launch takes longer on the host, which makes the descriptors, than on the GPU.
LARGE = 2**28
# The largest size of an operand, whose coordinates are int32, as are those of blocks past its end; and the bytes from
# one row to the next for which a tensor map has no room.
MOST, TOO_FAR = 2**31 - 2**20, 2**40
# Major compute capabilities whose shared memory holds the tiles of products.
DESCRIBED = 9, 10
# Rows of tiles whose programs run together, so that they find each other's operands in L2.
GROUP = 8


def described():
    """Whether the current device has descriptors for products; the interpreter has."""
    return INTERPRETED or compute_capability() in DESCRIBED


def serves(a, b, precision):
    """Whether the product of a (M, K) and b (N, K) has its operands read by descriptors."""
    (M, K), N = a.shape, b.shape[0]
    if M * N * K < LARGE or not described():
        return False
    if a.dtype == torch.float32:
        return precision == "tf32" and _is_box(a, 1) and _is_box(b, 1)
    half = a.dtype in (torch.bfloat16, torch.float16)
    return half and all(_is_box(t, 1) or _is_box(t, 0) for t in (a, b))


def serves_weight_grad(dy, x, precision):
    """The same for `weight_grad` of dy (M, N) and x (M, K). In tf32 its product with ones would cut off dy."""
    return dy.dtype != torch.float32 and serves(dy.t(), x.t(), precision)


def _is_box(t, inner):
    """Whether a tensor map describes t with `inner` as the contiguous dimension: 16-byte rows at 16-byte addresses."""
    step = t.stride(1 - inner)
    rows = t.stride(inner) == 1 and step >= t.shape[inner] and step * t.itemsize % 16 == 0
    return rows and t.data_ptr() % 16 == 0 and max(t.shape) <= MOST and step * t.itemsize < TOO_FAR


@triton.jit(do_not_specialize=["IMAGES", "per_split"])
def product_kernel(
    a_desc, b_desc, bias_ptr, c_ptr, sum_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, r_ptr,
    IMAGES, N, K, per_split,
    stride_bias,
    PIXELS, stride_ci, stride_cn, stride_cm,
    stride_split,
    A_INNER: tl.constexpr, B_INNER: tl.constexpr,
    EPILOGUE: tl.constexpr, PARTS: tl.constexpr, SUM: tl.constexpr, ONE: tl.constexpr, UNITS: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PIXELS, stride_ci, stride_cn = PIXELS * UNITS[0], stride_ci * UNITS[1], stride_cn * UNITS[2]
    stride_cm, N, M = stride_cm * UNITS[3], N * UNITS[4], IMAGES * PIXELS

    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // (tiles_m * tiles_n)
    pid = tl.program_id(0) % (tiles_m * tiles_n)
    first_m = pid // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first_m, GROUP)
    pid_m = first_m + pid % (GROUP * tiles_n) % rows
    pid_n = pid % (GROUP * tiles_n) // rows
    first = split * per_split
    last = tl.minimum(first + per_split, K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc_a, ones = tl.zeros((BLOCK_M, 16), ACC), tl.full((BLOCK_K, 16), 1.0, OPERAND)
    # Otherwise triton 3.6.0 waits for each product before the next; no share of a split product is empty.
    tl.assume(first < last)
    for k in range(first, last, BLOCK_K):
        if A_INNER:
            a = a_desc.load([pid_m * BLOCK_M, k])
        else:
            a = a_desc.load([k, pid_m * BLOCK_M]).T
        if B_INNER:
            b = b_desc.load([pid_n * BLOCK_N, k]).T
        else:
            b = b_desc.load([k, pid_n * BLOCK_N])
        acc = tl.dot(a.to(OPERAND), b.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
        if SUM:
            # Operands in shared memory must have no use but in products, see bench/machine_code/ttgir.py.
            acc_a = tl.dot(a.to(OPERAND), ones, acc_a, input_precision=PRECISION, out_dtype=ACC)

    offs_m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    if not ONE:
        image = offs_m // PIXELS
        rows_c = image * stride_ci + (offs_m - image * PIXELS) * stride_cm
    else:
        rows_c = offs_m * stride_cm
    store_finished(
        c_ptr, r_ptr, acc, split.to(INDEX) * stride_split + rows_c, mask_m, pid_n.to(INDEX) * BLOCK_N, N, 0, stride_cn,
        (bias_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr), stride_bias, EPILOGUE, PARTS, ACC,
    )  # fmt: skip
    if EPILOGUE[STATISTICS]:
        store_statistics(
            mean_ptr, var_ptr, c_ptr, rows_c, mask_m, pid_m.to(INDEX), M, pid_n.to(INDEX) * BLOCK_N, N, 0, N, stride_cn,
            BLOCK_M, BLOCK_N, ACC,
        )  # fmt: skip
    if SUM:
        sum_ptrs = sum_ptr + split.to(INDEX) * stride_split + offs_m
        tl.store(sum_ptrs, round_to(first_column(acc_a), sum_ptr.dtype.element_ty), mask=mask_m & (pid_n == 0))


@cached_for_architecture
def _share(M, N, K, dtype, precision, shared):
    """(Tile, tiles, programs that share a tile's sum, products of each); one program unless it is `shared`."""
    if shared:
        return gradient_tile("products", M, N, K, dtype, precision)
    tile = gemm_tile("products", M, N, K, dtype, precision)
    return tile, cdiv(M, tile.M) * cdiv(N, tile.N), 1, cdiv(K, tile.K) * tile.K


@planned(product_kernel)
def _product(
    a, b, bias, c, sums, mean, var, scale, shift, residual, inner, strides_c, stride_split, shared, values, precision
):  # fmt: skip
    (M, K), (N, _) = (t.shape if inside else t.shape[::-1] for t, inside in zip((a, b), inner))
    tile, tiles, splits, per_split = _share(M, N, K, a.dtype, precision, shared)
    if c.dim() == 4 and not shared and c.shape[2] * c.shape[3] > 1:
        steps, units = dense_steps(c)
    else:
        steps, units = in_units(c.itemsize, 1, 0, strides_c[1], strides_c[0])
    (n,), unit = in_units(c.itemsize, N)
    images = M // (steps[0] * units[0])
    numbers = images, n, K, per_split, 0 if bias is None else bias.stride(0), *steps, stride_split
    epilogue = constant(bias, mean, var, scale, shift, residual, *values)
    boxes = [(t, tile.K) if inside else (tile.K, t) for t, inside in zip((tile.M, tile.N), inner)]
    return (tiles * splits,), numbers, dict(
        A_INNER=inner[0], B_INNER=inner[1],
        EPILOGUE=epilogue, PARTS=parts_for(tile, epilogue),
        SUM=sums is not None,
        ONE=steps[0] * units[0] == 1, UNITS=units + unit,
        INDEX=index_type(a, b, bias, c), **product_types(a.dtype, precision), GROUP=GROUP,
        **tile.blocks, **tile.options,
    ), boxes  # fmt: skip


def _launch(a, b, bias, c, sums, tensors_values, strides_c, stride_split, shared, precision):
    inner, (tensors, values) = (a.stride(1) == 1, b.stride(1) == 1), tensors_values
    operands = a if inner[0] else a.t(), b if inner[1] else b.t()
    _product((*operands, bias, c, sums, *tensors), inner, strides_c, stride_split, shared, values, precision)


def forward(a, b, bias, c, epilogue, precision):
    """Store the product of a (M, K) and b (N, K), which `serves` accepts, and bias (N) or None.

    c has M rows of N: it is (M, N), or a dense (I, N, H, W) with M pixels. The sums go through the epilogue.
    """
    _launch(a, b, bias, c, None, epilogue.of(c), c.stride()[:2], 0, False, precision)


def partials(a, b, c, precision):
    """Store the product in c, a dense (I, N, H, W), and return its partial statistics and the rows of a part.

    See tile_statistics.py.
    """
    tile, *_ = _share(len(a), len(b), a.shape[1], a.dtype, precision, False)
    found = partials_for(c, tile.M)
    _launch(
        a, b, None, c, None, ((*found, None, None, None), WITH_STATISTICS), c.stride()[:2], 0, False, precision
    )  # fmt: skip
    return found, tile.M


def weight_grad(dy, x, dw, db, with_bias, precision):
    """dw (N, K) and db (N), of dy (M, N) and x (M, K), which `serves_weight_grad` accepts."""
    N, K = dw.shape[:2]
    splits = _share(N, K, dy.shape[0], dy.dtype, precision, True)[2]
    partials = Partials(splits, dw, db)
    dw_ptr, db_ptr, stride_split = partials.pointers
    sums = db_ptr if with_bias else None
    _launch(dy.t(), x.t(), None, dw_ptr, sums, NONE.of(dw), dw.stride()[:2], stride_split, True, precision)
    return partials.add_up()
