"""The fused forward for few channels on matrix units: neighbouring windows of 2 x 2 pixels share a patch of the image.

A patch holds what a block of SIDE x SIDE pooled pixels depends on: PATCH_H x PATCH_W pixels of each channel, read once,
in contiguous runs. With (rh, rw) a pooled pixel of the block and (ah, aw) a position of its window

    z[block, position, r, oc] = bias[oc] + sum over c, ph, pw of patch[block, c, ph, pw] * w[oc, c, kh, kw]
    ph = (rh * TH + ah) * SH + kh * DH,    pw = (rw * TW + aw) * SW + kw * DW

and y and code follow from z as in general.py. This is a matrix product with one patch a row. Its right operand, made by
a small kernel, holds each filter at all of its positions in the patch, and zeros elsewhere. For full float32 there is
lanes.py.

The maximum of the four is chosen before the bias is added and before rounding to the result's number format. Because of
the zeros, a value in a patch that is not finite reaches the whole block (0 * inf is NaN), as in Winograd convolutions.
"""

import triton
import triton.language as tl

from .. import shapes
from .._common import (
    INTERPRETED,
    OPTIONS,
    cdiv,
    index_type,
    input_precision,
    operand_type,
    round_to,
)
from ..conv2d.padding import source
from ..conv2d.patches import precision
from ..launching import planned
from ..tiles import clamped_power, flat_block
from .blocks import PROGRAMS, cut, largest_of_window, locate
from .chooser import COLUMNS


@triton.jit
def pixel_of(
    k,
    C: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    stride_xc: tl.constexpr, stride_xh: tl.constexpr, stride_xw: tl.constexpr,
):  # fmt: skip
    """(c, ph, pw) of the elements k of a patch in memory order, and their offsets."""
    if stride_xc < stride_xw:
        c, ph, pw = k % C, k // (C * PATCH_W), k // C % PATCH_W
        if stride_xw == C * stride_xc:
            return c, ph, pw, ph * stride_xh + k % (C * PATCH_W) * stride_xc
    else:
        c, ph, pw = k // (PATCH_H * PATCH_W), k // PATCH_W % PATCH_H, k % PATCH_W
    return c, ph, pw, c * stride_xc + ph * stride_xh + pw * stride_xw


@triton.jit
def column_of(n, SIDE: tl.constexpr, BLOCK_OC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(rh, rw, oc) of the columns n of one position, in the memory order of the result."""
    if CHANNELS_LAST:
        return n // (SIDE * BLOCK_OC), n // BLOCK_OC % SIDE, n % BLOCK_OC
    else:
        return n // SIDE % SIDE, n % SIDE, n // (SIDE * SIDE)


@triton.jit
def place_filters_kernel(
    w_ptr, placed_ptr,
    numel,
    stride_wo, stride_wc, stride_wh, stride_ww,
    C: tl.constexpr, OC: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    stride_xc: tl.constexpr, stride_xh: tl.constexpr, stride_xw: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, SIDE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    LENGTH: tl.constexpr, BLOCK_OC: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # placed (OC / BLOCK_OC, 4 * SIDE * SIDE * BLOCK_OC, LENGTH)
    offs = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    k = offs % LENGTH
    n = offs // LENGTH % (4 * SIDE * SIDE * BLOCK_OC)
    c, ph, pw, _ = pixel_of(k, C, PATCH_H, PATCH_W, stride_xc, stride_xh, stride_xw)
    position = n // (SIDE * SIDE * BLOCK_OC)
    rh, rw, oc = column_of(n % (SIDE * SIDE * BLOCK_OC), SIDE, BLOCK_OC, CHANNELS_LAST)
    oc = oc + offs // LENGTH // (4 * SIDE * SIDE * BLOCK_OC) * BLOCK_OC

    from_h = ph - (rh * TH + position // 2) * SH
    from_w = pw - (rw * TW + position % 2) * SW
    kh, kw = from_h // DH, from_w // DW
    stands = (from_h >= 0) & (kh < KH) & (from_h % DH == 0) & (from_w >= 0) & (kw < KW) & (from_w % DW == 0)
    w_offs = oc * stride_wo + c * stride_wc + kh * stride_wh + kw * stride_ww
    w = tl.load(w_ptr + w_offs, mask=mask & stands & (k < C * PATCH_H * PATCH_W) & (oc < OC), other=0.0)
    tl.store(placed_ptr + offs, w, mask=mask)


@triton.jit(do_not_specialize=["M"])
def conv2d_relu_max_pool2d_product_kernel(
    x_ptr, placed_ptr, b_ptr, y_ptr, code_ptr,
    M,
    stride_b,
    H: tl.constexpr, W: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr,
    stride_xn: tl.constexpr, stride_xc: tl.constexpr, stride_xh: tl.constexpr, stride_xw: tl.constexpr,
    stride_yn: tl.constexpr, stride_yc: tl.constexpr, stride_yh: tl.constexpr, stride_yw: tl.constexpr,
    C: tl.constexpr, OC: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, SIDE: tl.constexpr, BLOCKS_H: tl.constexpr, BLOCKS_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, INSIDE: tl.constexpr, CHANNELS_LAST: tl.constexpr, LENGTH: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_OC: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # GEMM: M = N * BLOCKS_H * BLOCKS_W patches, N = 4 * SIDE * SIDE * BLOCK_OC, K = C * PATCH_H * PATCH_W
    chunks: tl.constexpr = (OC + BLOCK_OC - 1) // BLOCK_OC
    columns: tl.constexpr = SIDE * SIDE * BLOCK_OC
    pid, programs = tl.program_id(0) // chunks, tl.num_programs(0) // chunks
    chunk = (tl.program_id(0) % chunks).to(INDEX)

    offs_n = chunk * 4 * columns + tl.arange(0, 4 * columns)
    offs_k = tl.arange(0, BLOCK_K).to(INDEX)
    filters = ()
    for k0 in tl.static_range(0, LENGTH, BLOCK_K):
        w = tl.load(placed_ptr + offs_n[None, :] * LENGTH + (k0 + offs_k)[:, None])
        filters = filters + (w.to(OPERAND),)

    rh, rw, oc = column_of(tl.arange(0, columns), SIDE, BLOCK_OC, CHANNELS_LAST)
    oc = chunk * BLOCK_OC + oc
    y_cols = rh * stride_yh + rw * stride_yw + oc * stride_yc
    bias = tl.zeros((columns,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(b_ptr + oc * stride_b, mask=oc < OC, other=0.0).to(tl.float32)

    for tile in range(pid, tl.cdiv(M, BLOCK_M), programs):
        offs_m = tl.cast(tile, INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        n, row, col, ih0, iw0, x_rows = locate(
            offs_m, stride_xn, stride_xh, stride_xw, STEP_H, STEP_W, PH, PW, BLOCKS_H, BLOCKS_W, INDEX
        )

        z = tl.zeros((BLOCK_M, 4 * columns), tl.float32)
        for k0 in tl.static_range(0, LENGTH, BLOCK_K):
            k = k0 + offs_k
            c, ph, pw, k_offs = pixel_of(k, C, PATCH_H, PATCH_W, stride_xc, stride_xh, stride_xw)
            mask = mask_m[:, None]
            if k0 + BLOCK_K > C * PATCH_H * PATCH_W:
                mask = mask & (k < C * PATCH_H * PATCH_W)[None, :]
            if not INSIDE:
                _, in_h = source(ih0[:, None] + ph[None, :], H, 0)
                _, in_w = source(iw0[:, None] + pw[None, :], W, 0)
                mask = mask & in_h & in_w
            x = tl.load(x_ptr + x_rows[:, None] + k_offs[None, :], mask=mask, other=0.0)
            z = tl.dot(x.to(OPERAND), filters[k0 // BLOCK_K], z, input_precision=PRECISION)

        best, code = largest_of_window(z, BLOCK_M, columns)
        y = round_to(best + bias[None, :], y_ptr.dtype.element_ty)
        dead = y.to(tl.float32) <= 0

        y_offs = (n * stride_yn + row * SIDE * stride_yh + col * SIDE * stride_yw)[:, None] + y_cols[None, :]
        mask = mask_m[:, None] & (oc < OC)[None, :]
        if BLOCKS_H * SIDE > QH or BLOCKS_W * SIDE > QW:
            inside = ((row * SIDE)[:, None] + rh[None, :] < QH) & ((col * SIDE)[:, None] + rw[None, :] < QW)
            mask = mask & inside
        tl.store(y_ptr + y_offs, tl.where(dead, 0.0, y.to(tl.float32)).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(code_ptr + y_offs, tl.where(dead, 4, code).to(tl.uint8), mask=mask)


def _placed_size(form, w_size):
    """The size of the product's right operand: (chunks of filters, columns, elements of a patch)."""
    OC, C, _, _ = w_size
    length = cdiv(C * form.patch[0] * form.patch[1], form.block_k) * form.block_k
    return cdiv(OC, form.channels), 4 * form.side**2 * form.channels, length


@planned(place_filters_kernel)
def _place_filters(w, placed, x_strides, channels_last, form, stride, dilation, pool_stride):
    (OC, C, KH, KW), block = w.shape, flat_block(placed.numel(), 256)
    return (cdiv(placed.numel(), block),), (placed.numel(), *w.stride()), dict(
        C=C, OC=OC, KH=KH, KW=KW, SH=stride[0], SW=stride[1], DH=dilation[0], DW=dilation[1],
        TH=pool_stride[0], TW=pool_stride[1],
        stride_xc=x_strides[1], stride_xh=x_strides[2], stride_xw=x_strides[3],
        PATCH_H=form.patch[0], PATCH_W=form.patch[1], SIDE=form.side, CHANNELS_LAST=channels_last,
        LENGTH=placed.shape[2], BLOCK_OC=form.channels, INDEX=index_type(w, placed), BLOCK=block, num_warps=4,
        **OPTIONS,
    )  # fmt: skip


@planned(conv2d_relu_max_pool2d_product_kernel)
def _product(x, placed, bias, y, code, w_size, channels_last, form, stride, padding, pool_stride, precision):
    M, constants = cut(form, x, w_size, bias, y, stride, padding, pool_stride)
    chunks, columns, length = placed.shape
    block_m = clamped_power(M // 5, 32, 4096) if INTERPRETED else 64
    tiles = cdiv(M, block_m)
    # A program loads the filters once for all of its tiles; a batch with few tiles has one program for each.
    busy = cdiv(tiles, 2) if INTERPRETED else max(PROGRAMS // 4, min(PROGRAMS, tiles // 3)) // chunks
    return (max(1, min(tiles, busy)) * chunks,), (M, 0 if bias is None else bias.stride(0)), dict(
        CHANNELS_LAST=channels_last, LENGTH=length, OPERAND=operand_type(x.dtype),
        PRECISION=input_precision(x.dtype, precision),
        INDEX=index_type(x, placed, bias, y), BLOCK_M=block_m, BLOCK_K=form.block_k, **constants,
        # Wide tiles with several blocks of K would spill registers.
        num_warps=8 if columns == COLUMNS and length > 64 else 4, num_stages=1, **OPTIONS,
    )  # fmt: skip


def forward(form, x, w, bias, stride, padding, dilation, groups, pad_mode, pool_kernel, pool_stride, *rest):
    """x (N, C, H, W), w (OC, C, KH, KW), bias (OC) or None -> y and code (N, OC, QH, QW), for a Form with `product`."""
    y, code = shapes.conv2d_relu_max_pool2d(x, w, stride, padding, dilation, pool_kernel, pool_stride, *rest)
    if y.numel() == 0:
        return y, code
    channels_last = y.stride(1) < y.stride(3)
    placed = w.new_empty(_placed_size(form, w.shape))
    _place_filters((w, placed), x.stride(), channels_last, form, stride, dilation, pool_stride)
    _product((x, placed, bias, y, code), w.shape, channels_last, form, stride, padding, pool_stride, precision())
    return y, code
