"""Convolution as an implicit matrix product: patches are gathered into tiles as the product needs them.

    y[n, oc, oh, ow] = epilogue(sum over c, kh, kw of x[n, c, ih, iw] * w[oc, c, kh, kw])

    with ih = oh * SH - PH + kh * DH and iw = ow * SW - PW + kw * DW

C and OC count the channels of one group. Tensors may have any strides. The epilogue is in ../epilogue.py: by itself it
adds the bias. Instead it may leave the sums as they are, and a program also stores the statistics of its tile, which is
a run of pixels: mean and var are then results, see ../tile_statistics.py. The gradients are in input_grad.py and
weight_grad.py; patches.py has the loop over the summed index.

Source: the implicit GEMM of cuDNN (Chetlur et al. 2014, https://arxiv.org/abs/1410.0759).
"""

import triton
import triton.language as tl

from .. import product, shapes
from .._common import cached_for_architecture, cdiv, dense_steps, extent, in_units, index_type, product_types, strides
from ..epilogue import NONE, STATISTICS, constant, parts_for, store_finished
from ..launching import planned
from ..tile_statistics import WITH_STATISTICS, partials_for, store_statistics
from ..tiles import gemm_tile
from . import patches
from .padding import PAD_MODES
from .patches import MOST_TAPS, add_patches, add_taps, in_elements, taps_inside, tile_of


@triton.jit(do_not_specialize=["N", "blocks"])
def conv2d_forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, r_ptr,
    N, H, W, OW, blocks,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wo, stride_wc, stride_wh, stride_ww,
    stride_b,
    PIXELS, stride_yn, stride_yc, stride_yp,
    C: tl.constexpr, OC: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAD_MODE: tl.constexpr, EPILOGUE: tl.constexpr, WALK: tl.constexpr, UNITS: tl.constexpr,
    PARTS: tl.constexpr, INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    stride_xn, stride_xc, stride_xh, stride_xw = in_elements((stride_xn, stride_xc, stride_xh, stride_xw), UNITS, 0)
    stride_wo, stride_wc, stride_wh, stride_ww = in_elements((stride_wo, stride_wc, stride_wh, stride_ww), UNITS, 4)
    PIXELS, stride_yn, stride_yc, stride_yp = in_elements((PIXELS, stride_yn, stride_yc, stride_yp), UNITS, 8)
    M = tl.cast(N, INDEX) * PIXELS

    # GEMM: M = N * OH * OW, N = OC, K = C * KH * KW
    pid = tl.program_id(0).to(INDEX)
    offs_m, offs_n, group = tile_of(pid, M, OC, BLOCK_M, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < OC
    n = offs_m // PIXELS
    pixel = offs_m - n * PIXELS
    ih0, iw0 = pixel // OW * SH - PH, pixel % OW * SW - PW

    x_ptr += group * C * stride_xc
    w_ptr += group * OC * stride_wo
    x_rows = n * stride_xn
    w_cols = offs_n * stride_wo

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if WALK == "taps":
        bits = taps_inside(ih0, H, DH, KH) | (taps_inside(iw0, W, DW, KW) << MOST_TAPS)
        offs_k = tl.arange(0, BLOCK_K).to(INDEX)
        # Otherwise triton 3.6.0 waits for each product before the next.
        tl.assume(blocks > 0)
        x_ptrs = x_ptr + (x_rows + ih0 * stride_xh + iw0 * stride_xw)[:, None] + offs_k[None, :]
        w_ptrs = w_ptr + (offs_n % OC * stride_wo)[None, :] + (offs_k * stride_wc)[:, None]
        acc = add_taps(
            acc, x_ptrs, w_ptrs, tl.where(mask_m, bits, 0), blocks,
            tl.cast(stride_xh, INDEX) * DH, tl.cast(stride_xw, INDEX) * DW, stride_wc, stride_wh, stride_ww,
            C, KW, INDEX, OPERAND, ACC, PRECISION, BLOCK_K,
        )  # fmt: skip
    else:
        acc = add_patches(
            acc, x_ptr, w_ptr, x_rows, w_cols, ih0, iw0, mask_m, mask_n, H, W,
            stride_xc, stride_xh, stride_xw, stride_wc, stride_wh, stride_ww,
            C, KH, KW, DH, DW, PAD_MODE, WALK == "flat", INDEX, OPERAND, ACC, PRECISION, BLOCK_K,
        )  # fmt: skip

    rows, tiles_n = n * stride_yn + pixel * stride_yp, tl.cdiv(OC, BLOCK_N)
    store_finished(
        y_ptr, r_ptr, acc, rows, mask_m, pid % tiles_n * BLOCK_N, OC, group * OC, stride_yc,
        (b_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr), stride_b, EPILOGUE, PARTS, ACC,
    )  # fmt: skip
    if EPILOGUE[STATISTICS]:
        tiles_m = tl.cdiv(M, BLOCK_M)
        store_statistics(
            mean_ptr, var_ptr, y_ptr, rows, mask_m, pid // tiles_n % tiles_m, M,
            pid % tiles_n * BLOCK_N, OC, group * OC, tl.num_programs(0) // (tiles_m * tiles_n) * OC, stride_yc,
            BLOCK_M, BLOCK_N, ACC,
        )  # fmt: skip


@cached_for_architecture
def _tile_for(family, M, N, K, dtype, precision, taps, groups):
    return gemm_tile(family, M, N, K, dtype, precision, taps=taps, repeats=groups)


def _product(x, w, y, groups, pad_mode, precision):
    """(how K is walked, K of a tap, taps, the Tile)."""
    (N, OC, OH, OW), (_, C, KH, KW) = y.shape, w.shape
    walk = patches.walk_for(C, KH, KW, pad_mode)
    K, taps = (C * KH * KW, 1) if walk == "flat" else (C, KH * KW)
    family = patches.family_for(walk, x, w)
    return walk, K, taps, _tile_for(family, N * OH * OW, OC // groups, K, x.dtype, precision, taps, groups)


@planned(conv2d_forward_kernel)
def _forward(x, w, bias, y, mean, var, scale, shift, residual, geometry, values, precision):
    (N, _, H, W), (OC, C, KH, KW), (OH, OW) = x.shape, w.shape, y.shape[2:]
    stride, padding, dilation, groups, pad_mode = geometry
    reach = patches.reach((H, W), (OH, OW), (KH, KW), stride, padding, dilation)
    index, OC = index_type(x, w, bias, y, reach=extent(x, *reach)), OC // groups
    walk, K, taps, tile = _product(x, w, y, groups, pad_mode, precision)
    tile = patches.fitted(tile, index, C <= patches.SHORT_K)
    (steps, units), (steps_y, units_y) = in_units(x.itemsize, *strides(x), *strides(w)), dense_steps(y)
    epilogue = constant(bias, mean, var, scale, shift, residual, *values)
    numbers = N, H, W, OW, taps * cdiv(K, tile.K), *steps, 0 if bias is None else bias.stride(0), *steps_y
    return (cdiv(N * OH * OW, tile.M) * cdiv(OC, tile.N) * groups,), numbers, dict(
        C=C, OC=OC, KH=KH, KW=KW,
        SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[2], DH=dilation[0], DW=dilation[1],
        PAD_MODE=PAD_MODES[pad_mode], WALK=walk, UNITS=units + units_y,
        EPILOGUE=epilogue, PARTS=parts_for(tile, epilogue),
        INDEX=index, **product_types(x.dtype, precision),
        **tile.blocks, **tile.options,
    )  # fmt: skip


def _operands(x, w, y, stride, padding, groups):
    """(x and w as the kernels read them, where y is stored, precision, and x as a matrix if product.py serves it)."""
    if w.shape[1] >= patches.FLAT_BELOW:
        x, w = patches.channels_inner(x), patches.channels_inner(w)
    products = patches.precision()
    a = patches.as_matrix(x) if patches.is_product(w.shape, stride, padding, groups) else None
    a = a if a is not None and product.serves(a, w[:, :, 0, 0], products) else None
    return x, w, patches.store_in(y), products, a


def forward(x, w, bias, stride, padding, dilation, groups, pad_mode, epilogue=NONE):
    """x (N, C, H, W), w (OC, C / groups, KH, KW), bias (OC) or None -> y (N, OC, OH, OW), all of one floating dtype.

    The sums go through the epilogue, an Epilogue.
    """
    y = shapes.conv2d(x, w, stride, padding, dilation)
    if y.numel() == 0:
        return y
    x, w, stored, products, a = _operands(x, w, y, stride, padding, groups)
    if a is not None:
        product.forward(a, w[:, :, 0, 0], bias, stored, epilogue, products)
    else:
        tensors, values = epilogue.of(stored)
        geometry = stride, padding, dilation, groups, pad_mode
        _forward((x, w, bias, stored, *tensors), geometry, values, products)
    return y if stored is y else y.copy_(stored)


def partials(x, w, stride, padding, dilation, groups, pad_mode):
    """The result of `forward` without bias and epilogue, its partial statistics, and the pixels of a part.

    See tile_statistics.py.
    """
    y = shapes.conv2d(x, w, stride, padding, dilation)
    if y.numel() == 0:
        return y, None, 0
    x, w, stored, products, a = _operands(x, w, y, stride, padding, groups)
    if a is not None:
        found, rows = product.partials(a, w[:, :, 0, 0], stored, products)
    else:
        *_, tile = _product(x, w, stored, groups, pad_mode, products)
        found, rows = partials_for(stored, tile.M), tile.M
        geometry = stride, padding, dilation, groups, pad_mode
        _forward((x, w, None, stored, *found, None, None, None), geometry, WITH_STATISTICS, products)
    return y if stored is y else y.copy_(stored), found, rows
