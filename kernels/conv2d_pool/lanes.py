"""The fused forward for few channels in full float32: FMA on a patch of the image in each thread's registers.

The formula and the blocks of pooled pixels that share a patch are those of patch.py. Sums start from the bias, FMA adds
unrounded products, and maximum and code follow torch's rules for NaN and ties exactly.
"""

import triton
import triton.language as tl

from .. import shapes
from .._common import INTERPRETED, OPTIONS, cdiv, index_type, named_strides
from ..launching import planned
from .blocks import PROGRAMS, cut, locate


@triton.jit
def load_patch(
    x_ptr, x_offs, ih0, iw0, mask, H, W,
    stride_xh: tl.constexpr, stride_xw: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """The pixels of one channel's patches as a tuple, row by row, each a vector over the threads' patches."""
    pixels = ()
    for ph in tl.static_range(PATCH_H):
        row = x_ptr + x_offs + ph * stride_xh
        if INSIDE and PATCH_W % 4 == 0:
            for pw in tl.static_range(0, PATCH_W, 4):
                four = tl.load(row[:, None] + (pw + tl.arange(0, 4))[None, :] * stride_xw)
                even, odd = tl.split(tl.reshape(four, (four.shape[0], 2, 2)))
                x0, x2 = tl.split(even)
                x1, x3 = tl.split(odd)
                pixels = pixels + (x0, x1, x2, x3)
        elif INSIDE and PATCH_W % 2 == 0:
            for pw in tl.static_range(0, PATCH_W, 2):
                pixels = pixels + tl.split(tl.load(row[:, None] + (pw + tl.arange(0, 2))[None, :] * stride_xw))
        else:
            for pw in tl.static_range(PATCH_W):
                inside = mask & (ih0 + ph >= 0) & (ih0 + ph < H) & (iw0 + pw >= 0) & (iw0 + pw < W)
                pixels = pixels + (tl.load(row + pw * stride_xw, mask=inside, other=0.0),)
    return pixels


@triton.jit
def window_at(pixels, AT: tl.constexpr, DOWN: tl.constexpr, RIGHT: tl.constexpr):
    """(patches, column, row): four pixels that are DOWN and RIGHT apart in the tuple, the first at AT."""
    upper = tl.join(pixels[AT], pixels[AT + RIGHT])
    return tl.join(upper, tl.join(pixels[AT + DOWN], pixels[AT + DOWN + RIGHT]))


@triton.jit
def windows_of(
    pixels,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, PATCH_W: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """The pixels that each tap multiplies in each of SIDE x SIDE windows, a tuple over (kh, kw, rh, rw).

    The four pixels of a window are one tensor, because compile time grows with the square of the number of operations.
    """
    windows = ()
    for tap in tl.static_range(KH * KW):
        for i in tl.static_range(SIDE * SIDE):
            windows = windows + (
                window_at(
                    pixels,
                    (i // SIDE * TH * SH + tap // KW * DH) * PATCH_W + i % SIDE * TW * SW + tap % KW * DW,
                    SH * PATCH_W, SW,
                ),
            )  # fmt: skip
    return windows


@triton.jit
def add_products(
    sums, windows, w_ptr, w_offs,
    stride_wh: tl.constexpr, stride_ww: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """sums, one for each window, plus the products of one channel with one filter."""
    for tap in tl.static_range(KH * KW):
        w = tl.load(w_ptr + (w_offs + (tap // KW * stride_wh + tap % KW * stride_ww)))
        added = ()
        for i in tl.static_range(WINDOWS):
            added = added + (tl.fma(windows[tap * WINDOWS + i], w, sums[i]),)
        sums = added
    return sums


@triton.jit
def filter_at(oc, OC: tl.constexpr, BLOCK_OC: tl.constexpr):
    """oc, or the last filter again if BLOCK_OC does not divide OC."""
    return oc if OC % BLOCK_OC == 0 else tl.minimum(oc, OC - 1)


@triton.jit
def largest_of_four(sums):
    """(..., column, row) of windows -> relu of the maximum of each by torch's rules, and its code."""
    upper, lower = tl.split(sums)
    z0, z1 = tl.split(upper)
    z2, z3 = tl.split(lower)
    z, best, code = (z0, z1, z2, z3), z0, tl.zeros(z0.shape, tl.int32)
    for i in tl.static_range(1, 4):
        better = (z[i] > best) | (z[i] != z[i])
        best, code = tl.where(better, z[i], best), tl.where(better, i, code)
    dead = best <= 0
    return tl.where(dead, 0.0, best), tl.where(dead, 4, code).to(tl.uint8)


@triton.jit
def side_by_side(left, right):
    """(patches, 2, column, row) of two windows."""
    return tl.permute(tl.join(left, right), (0, 3, 1, 2))


@triton.jit(do_not_specialize=["M"])
def conv2d_relu_max_pool2d_lanes_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, code_ptr,
    M,
    stride_b,
    stride_wo: tl.constexpr, stride_wc: tl.constexpr, stride_wh: tl.constexpr, stride_ww: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr,
    stride_xn: tl.constexpr, stride_xc: tl.constexpr, stride_xh: tl.constexpr, stride_xw: tl.constexpr,
    stride_yn: tl.constexpr, stride_yc: tl.constexpr, stride_yh: tl.constexpr, stride_yw: tl.constexpr,
    C: tl.constexpr, OC: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, SIDE: tl.constexpr, BLOCKS_H: tl.constexpr, BLOCKS_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, INSIDE: tl.constexpr, TURNS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_OC: tl.constexpr,
):  # fmt: skip
    # One patch an element; the outer loop takes BLOCK_OC filters, the inner loop one of their channels.
    programs: tl.constexpr = ((OC + BLOCK_OC - 1) // BLOCK_OC + TURNS - 1) // TURNS
    offs_m = (tl.program_id(0) // programs).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = offs_m < M
    # Elements past the end repeat the last patch, so that their loads need no mask.
    n, row, col, ih0, iw0, x_offs = locate(
        tl.minimum(offs_m, M - 1), stride_xn, stride_xh, stride_xw, STEP_H, STEP_W, PH, PW, BLOCKS_H, BLOCKS_W, INDEX
    )
    y_offs = n * stride_yn + row * SIDE * stride_yh + col * SIDE * stride_yw

    if C == 1:
        pixels = load_patch(x_ptr, x_offs, ih0, iw0, mask, H, W, stride_xh, stride_xw, PATCH_H, PATCH_W, INSIDE)
        windows = windows_of(pixels, KH, KW, SH, SW, DH, DW, TH, TW, PATCH_W, SIDE)
    turn = tl.program_id(0) % programs * TURNS
    for first in range(turn * BLOCK_OC, (turn + TURNS) * BLOCK_OC, BLOCK_OC):
        oc0 = tl.cast(first, INDEX)
        sums = ()
        for o in tl.static_range(BLOCK_OC):
            z = tl.zeros((BLOCK_M, 2, 2), tl.float32)
            if HAS_BIAS:
                z += tl.load(b_ptr + filter_at(oc0 + o, OC, BLOCK_OC) * stride_b)
            for _ in tl.static_range(SIDE * SIDE):
                sums = sums + (z,)

        for c in range(C):
            if C > 1:
                # Advance the scalar pointer: AMD's compiler passes take minutes for vectors of changing pointers.
                c_ptr = x_ptr + tl.cast(c, INDEX) * stride_xc
                pixels = load_patch(c_ptr, x_offs, ih0, iw0, mask, H, W, stride_xh, stride_xw, PATCH_H, PATCH_W, INSIDE)
                windows = windows_of(pixels, KH, KW, SH, SW, DH, DW, TH, TW, PATCH_W, SIDE)
            added = ()
            for o in tl.static_range(BLOCK_OC):
                of_filter = sums[o * SIDE * SIDE : (o + 1) * SIDE * SIDE]
                w_offs = filter_at(oc0 + o, OC, BLOCK_OC) * stride_wo + tl.cast(c, INDEX) * stride_wc
                added = added + add_products(
                    of_filter, windows, w_ptr, w_offs, stride_wh, stride_ww, KH, KW, SIDE * SIDE
                )
            sums = added

        for o in tl.static_range(BLOCK_OC):
            for rh in tl.static_range(SIDE):
                offs = y_offs + (oc0 + o) * stride_yc + rh * stride_yh
                inside = mask
                if OC % BLOCK_OC != 0:
                    inside = inside & (oc0 + o < OC)
                if BLOCKS_H * SIDE > QH:
                    inside = inside & (row * SIDE + rh < QH)
                row_sums = sums[(o * SIDE + rh) * SIDE]
                if SIDE == 2:
                    row_sums = side_by_side(row_sums, sums[(o * SIDE + rh) * SIDE + 1])
                    side = tl.arange(0, 2)
                    offs = offs[:, None] + (side * stride_yw)[None, :]
                    inside = inside[:, None]
                    if BLOCKS_W * SIDE > QW:
                        inside = inside & ((col * SIDE)[:, None] + side[None, :] < QW)
                y, code = largest_of_four(row_sums)
                tl.store(y_ptr + offs, y, mask=inside)
                tl.store(code_ptr + offs, code, mask=inside)


@planned(conv2d_relu_max_pool2d_lanes_kernel)
def _forward(x, w, bias, y, code, form, stride, padding, dilation, pool_stride):
    M, constants = cut(form, x, w.shape, bias, y, stride, padding, pool_stride)
    constants |= named_strides("w", w.stride(), "ochw")
    # If that still fills half of a large GPU, each thread has two patches, which share the loads of the filters, and a
    # program takes all filters, which share the loads of the patches (with one channel it always does).
    many = M >= 256 * PROGRAMS // 8
    block_m = 256 if many or INTERPRETED else 64
    tiles, chunks = cdiv(M, block_m), cdiv(w.shape[0], form.channels)
    turns = chunks if many or w.shape[1] == 1 else 1
    return (tiles * cdiv(chunks, turns),), (M, 0 if bias is None else bias.stride(0)), dict(
        SH=stride[0], SW=stride[1], DH=dilation[0], DW=dilation[1], TH=pool_stride[0], TW=pool_stride[1],
        TURNS=turns, INDEX=index_type(x, w, bias, y), BLOCK_M=block_m, **constants,
        num_warps=4 if many else 2, num_stages=1, **OPTIONS,
    )  # fmt: skip


def forward(form, x, w, bias, stride, padding, dilation, groups, pad_mode, pool_kernel, pool_stride, *rest):
    """x (N, C, H, W), w (OC, C, KH, KW), bias (OC) or None -> y and code (N, OC, QH, QW), no `product` in `form`."""
    y, code = shapes.conv2d_relu_max_pool2d(x, w, stride, padding, dilation, pool_kernel, pool_stride, *rest)
    if y.numel() > 0:
        _forward((x, w, bias, y, code), form, stride, padding, dilation, pool_stride)
    return y, code
