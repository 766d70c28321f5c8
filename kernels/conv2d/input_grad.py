"""The input gradient of a convolution, for any stride: one matrix product for each phase of the stride.

    dx[n, c, ih, iw] = sum over oc, kh, kw, oh, ow that reach (ih, iw) of dy[n, oc, oh, ow] * w[oc, c, kh, kw]

    with ih = oh * SH - PH + kh * DH and iw = ow * SW - PW + kw * DW

Pixels with the same ih % SH and iw % SW, a phase, are reached by the same taps: every STEP-th from a first one. Within
a phase the gradient is a convolution of stride 1, so that no products with inserted zeros are computed. An image of
fewer rows than SH has one phase for each row, and likewise for columns. C and OC count the channels of one group.

Source: the split by phase is the usual one of transposed convolutions (Shi et al. 2016,
https://arxiv.org/abs/1609.07009).
"""

import triton
import triton.language as tl

from .. import product, shapes
from .._common import (
    Window,
    cdiv,
    dense_steps,
    extent,
    first_tap,
    in_units,
    index_type,
    next_block,
    product_types,
    round_to,
    strides,
)
from ..epilogue import NONE
from ..launching import planned
from ..tiles import gemm_tile, wants_k_inner
from . import patches
from .padding import source
from .patches import MOST_TAPS, add_taps, in_elements, taps_inside, tile_of


@triton.jit(do_not_specialize=["N", "blocks"])
def conv2d_input_grad_kernel(
    dy_ptr, w_ptr, dx_ptr,
    N, H, W, OH, OW, blocks,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_wo, stride_wc, stride_wh, stride_ww,
    PIXELS, stride_xn, stride_xc, stride_xp,
    stride_xh, stride_xw,
    C: tl.constexpr, OC: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    DIVISOR_H: tl.constexpr, STEP_H: tl.constexpr, INVERSE_H: tl.constexpr, PHASES_H: tl.constexpr,
    DIVISOR_W: tl.constexpr, STEP_W: tl.constexpr, INVERSE_W: tl.constexpr, PHASES_W: tl.constexpr,
    WALK: tl.constexpr, UNITS: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    stride_yn, stride_yc, stride_yh, stride_yw = in_elements((stride_yn, stride_yc, stride_yh, stride_yw), UNITS, 0)
    stride_wo, stride_wc, stride_wh, stride_ww = in_elements((stride_wo, stride_wc, stride_wh, stride_ww), UNITS, 4)
    PIXELS, stride_xn, stride_xc, stride_xp = in_elements((PIXELS, stride_xn, stride_xc, stride_xp), UNITS, 8)
    stride_xh, stride_xw = stride_xh * UNITS[12], stride_xw * UNITS[13]
    M = tl.cast(N, INDEX) * PIXELS

    # GEMM of a phase: M = N * QH * QW, N = C, K = OC * taps, where QH * QW is the largest number of pixels in a phase
    offs_m, offs_n, rest = tile_of(tl.program_id(0).to(INDEX), M, C, BLOCK_M, BLOCK_N)
    phase_w = rest % PHASES_W
    phase_h = rest // PHASES_W % PHASES_H
    group = rest // PHASES_W // PHASES_H

    kh0 = first_tap(phase_h + PH, DIVISOR_H, STEP_H, INVERSE_H, KH)
    kw0 = first_tap(phase_w + PW, DIVISOR_W, STEP_W, INVERSE_W, KW)
    taps_h, taps_w = tl.cdiv(KH - kh0, STEP_H), tl.cdiv(KW - kw0, STEP_W)

    offs_k = tl.arange(0, BLOCK_K).to(INDEX)
    QW = tl.cdiv(W, SW)
    n = offs_m // PIXELS
    pixel = offs_m - n * PIXELS
    row, column = pixel // QW, pixel % QW
    ih, iw = row * SH + phase_h, column * SW + phase_w
    mask_m, mask_n = offs_m < M, offs_n < C
    if SH * SW > 1:
        mask_m &= (ih < H) & (iw < W)
    # The output position of the first tap; that of each further tap is DH / DIVISOR_H (DW / DIVISOR_W) less.
    oh0, ow0 = row + (phase_h + PH - kh0 * DH) // SH, column + (phase_w + PW - kw0 * DW) // SW

    dy_ptr += group * OC * stride_yc
    w_ptr += group * OC * stride_wo + kh0 * stride_wh + kw0 * stride_ww
    y_rows = n * stride_yn
    x_rows = n * stride_xn + (pixel * stride_xp if SH * SW == 1 else ih * stride_xh + iw * stride_xw)
    w_cols = offs_n * stride_wc

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if WALK == "flat":
        for k0 in range(0, OC * taps_h * taps_w, BLOCK_K):
            k = k0 + offs_k
            oc, th, tw = k % OC, k // OC // taps_w, k // OC % taps_w
            mask_k = k < OC * taps_h * taps_w
            oh, in_h = source(oh0[:, None] - th[None, :] * (DH // DIVISOR_H), OH, 0)
            ow, in_w = source(ow0[:, None] - tw[None, :] * (DW // DIVISOR_W), OW, 0)
            y_offs = y_rows[:, None] + oc[None, :] * stride_yc + oh * stride_yh + ow * stride_yw
            w_offs = w_cols[None, :] + (oc * stride_wo + th * STEP_H * stride_wh + tw * STEP_W * stride_ww)[:, None]
            dy = tl.load(dy_ptr + y_offs, mask=mask_m[:, None] & mask_k[None, :] & in_h & in_w, other=0.0)
            w = tl.load(w_ptr + w_offs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(dy.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
    elif WALK == "taps":
        bits = taps_inside(oh0, OH, -(DH // DIVISOR_H), (KH + STEP_H - 1) // STEP_H)
        bits |= taps_inside(ow0, OW, -(DW // DIVISOR_W), (KW + STEP_W - 1) // STEP_W) << MOST_TAPS
        y_ptrs = dy_ptr + (y_rows + oh0 * stride_yh + ow0 * stride_yw)[:, None] + offs_k[None, :]
        w_ptrs = w_ptr + (offs_n % C * stride_wc)[None, :] + (offs_k * stride_wo)[:, None]
        blocks *= taps_h * taps_w
        if DIVISOR_H * DIVISOR_W == 1 and KH >= STEP_H and KW >= STEP_W:
            # Every phase has taps. Otherwise triton 3.6.0 waits for each product before the next.
            tl.assume(blocks > 0)
        acc = add_taps(
            acc, y_ptrs, w_ptrs, tl.where(mask_m, bits, 0), blocks,
            tl.cast(stride_yh, INDEX) * -(DH // DIVISOR_H), tl.cast(stride_yw, INDEX) * -(DW // DIVISOR_W),
            stride_wo, STEP_H * stride_wh, STEP_W * stride_ww,
            OC, taps_w, INDEX, OPERAND, ACC, PRECISION, BLOCK_K,
        )  # fmt: skip
    else:
        start = tl.cast(0, INDEX)
        oc0, th, tw = start, start, start
        for _ in range(0, taps_h * taps_w * ((OC + BLOCK_K - 1) // BLOCK_K)):
            oc = oc0 + offs_k
            mask_k = oc < OC
            oh, in_h = source(oh0 - th * (DH // DIVISOR_H), OH, 0)
            ow, in_w = source(ow0 - tw * (DW // DIVISOR_W), OW, 0)
            y_offs = (y_rows + oh * stride_yh + ow * stride_yw)[:, None] + oc[None, :] * stride_yc
            w_offs = w_cols[None, :] + (oc * stride_wo + th * STEP_H * stride_wh + tw * STEP_W * stride_ww)[:, None]
            dy = tl.load(dy_ptr + y_offs, mask=(mask_m & in_h & in_w)[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_ptr + w_offs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(dy.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
            oc0, th, tw = next_block(oc0, th, tw, OC, taps_w, BLOCK_K)

    x_offs = x_rows[:, None] + (group * C + offs_n)[None, :] * stride_xc
    tl.store(dx_ptr + x_offs, round_to(acc, dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@planned(conv2d_input_grad_kernel)
def _input_grad(dy, w, dx, stride, padding, dilation, groups, precision):
    (N, _, H, W), (OC, C, KH, KW), (OH, OW) = dx.shape, w.shape, dy.shape[2:]
    (SH, SW), (DH, DW), OC = stride, dilation, OC // groups
    QH, QW, phases_h, phases_w = cdiv(H, SH), cdiv(W, SW), min(SH, H), min(SW, W)
    repeats = phases_h * phases_w * groups
    reach = patches.reach((H, W), (OH, OW), (KH, KW), stride, padding, dilation)
    index = index_type(dy, w, dx, reach=extent(dy, *reach))
    window_h, window_w = Window.of(SH, DH), Window.of(SW, DW)
    taps_h, taps_w = cdiv(KH, window_h.step), cdiv(KW, window_w.step)
    walk, even = patches.walk_for(OC, taps_h, taps_w), SH * SW == 1
    K, taps = (OC * KH * KW, 1) if walk == "flat" else (OC, taps_h * taps_w)
    family = patches.family_for(walk, dy, w)
    tile = gemm_tile(family, N * QH * QW, C, K, dy.dtype, precision, taps=taps, repeats=repeats)
    tile = patches.fitted(tile, index, OC <= patches.SHORT_K)
    steps, units = in_units(dy.itemsize, *strides(dy), *strides(w))
    steps_x, units_x = dense_steps(dx) if even else in_units(dx.itemsize, QH * QW, *dx.stride()[:2], 0)
    rows_x, units_rows = in_units(dx.itemsize, *dx.stride()[2:])
    numbers = N, H, W, OH, OW, cdiv(OC, tile.K), *steps, *steps_x, *rows_x
    return (cdiv(N * QH * QW, tile.M) * cdiv(C, tile.N) * repeats,), numbers, dict(
        C=C, OC=OC, KH=KH, KW=KW, SH=SH, SW=SW, PH=padding[0], PW=padding[2], DH=DH, DW=DW,
        DIVISOR_H=window_h.divisor, STEP_H=window_h.step, INVERSE_H=window_h.inverse, PHASES_H=phases_h,
        DIVISOR_W=window_w.divisor, STEP_W=window_w.step, INVERSE_W=window_w.inverse, PHASES_W=phases_w,
        WALK=walk, UNITS=units + units_x + units_rows,
        INDEX=index, **product_types(dy.dtype, precision),
        **tile.blocks, **tile.options,
    )  # fmt: skip


def input_grad(dy, w, size, stride, padding, dilation, groups, dx=None):
    """dy (N, OC, OH, OW), w (OC, C / groups, KH, KW) -> dx of `size` (N, C, H, W), for padding with zeros.

    dx is allocated here unless it is given.
    """
    dx = shapes.conv2d_input_grad(dy, w, size) if dx is None else dx
    if dx.numel() == 0:
        return dx
    if w.shape[0] // groups >= patches.FLAT_BELOW:
        dy = patches.channels_inner(dy)
        if wants_k_inner(w.dtype, patches.precision()):
            w = w.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        else:
            w = patches.channels_inner(w)
    # Of several phases none has adjacent pixels.
    stored, products = patches.store_in(dx, adjacent=stride == (1, 1)), patches.precision()
    a = patches.as_matrix(dy) if patches.is_product(w.shape, stride, padding, groups) else None
    if a is not None and product.serves(a, w[:, :, 0, 0].t(), products):
        product.forward(a, w[:, :, 0, 0].t(), None, stored, NONE, products)
    else:
        _input_grad((dy, w, stored), stride, padding, dilation, groups, products)
    return dx if stored is dx else dx.copy_(stored)
