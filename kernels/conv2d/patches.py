"""What the kernels of convolutions share: precision, how the summed index is walked, and the loops over it.

K, the summed index of forward and input gradient, is walked in one of three ways:
- "flat", for few channels: one index over channels and taps, so that each element computes its own address and mask;
- "taps": tap by tap, a block of channels at a time, with a bit mask of the taps that are inside the image;
- "patches": the same with the source of every pixel computed for each tap, for paddings other than zeros and for
  filters of more than 16 rows or columns.
The last two need contiguous channels, and other tensors are copied first: gathering single elements would stall the
matrix units for several times as long as the copy takes.
"""

import math

import torch
import triton
import triton.language as tl

from .._common import INTERPRETED, next_block
from .padding import source

# With fewer channels a single tap does not fill the shortest K that tl.dot accepts.
FLAT_BELOW = 16
# So few channels do not fill longer blocks of K.
SHORT_K = 32
# A bit mask of 32 has room for so many rows of taps and as many columns.
MOST_TAPS = tl.constexpr(16)


def fitted(tile, index, short=False):
    """The tile with a short K for few channels, and with the warps that 64-bit addresses take."""
    if short:
        tile = tile._replace(K=min(tile.K, SHORT_K))
    return tile._replace(num_warps=8) if index == tl.int64 else tile


def walk_for(C, taps_h, taps_w, pad_mode="zeros"):
    """How K is walked: "flat", "taps", or "patches", by taps too with the source of every pixel computed again."""
    if C < FLAT_BELOW:
        return "flat"
    return "taps" if pad_mode == "zeros" and max(taps_h, taps_w) <= MOST_TAPS.value else "patches"


def reach(size, result, kernel, stride, padding, dilation):
    """How many rows and columns a tap is from the first pixel at most, inside the image or outside, for all passes."""
    return [
        max(n + before, o * step) + k * d
        for n, o, k, step, before, d in zip(size, result, kernel, stride, padding[::2], dilation)
    ]


def family_for(walk, *operands):
    """The family of tiles for forward and input gradient."""
    if walk == "flat" or not all(is_aligned(t.shape, t.stride(), t.itemsize) for t in operands):
        return "narrow patches"
    return "patches" if walk == "taps" else "gathered patches"


def is_aligned(size, steps, itemsize):
    """Whether all strides but that of channels are multiples of 16 bytes, so that a load takes 16.

    The interpreter has no registers, and walks unaligned channels as others.
    """
    return INTERPRETED or all(n == 1 or step * itemsize % 16 == 0 for n, step in zip(size, steps) if step != 1)


def store_in(y, adjacent=True):
    """y itself, or where its results cannot be stored 8 bytes at once, a channels_last tensor to be copied to it.

    In NCHW an image of 7 x 7 pixels begins at a multiple of 2 bytes, and without `adjacent` pixels no two results are
    adjacent. To store them one by one would take a register for each address, and longer than a copy.
    """
    if y.stride(1) == 1 or y.shape[1] < FLAT_BELOW:
        return y
    together = math.gcd(y.shape[2] * y.shape[3], 16 // y.itemsize) if adjacent else 1
    if together * y.itemsize >= 8:
        return y
    return torch.empty_like(y, memory_format=torch.channels_last)


def channels_inner(t):
    """t with contiguous channels, copied only if needed."""
    return t if t.stride(1) == 1 else t.contiguous(memory_format=torch.channels_last)


def precision():
    """The precision of float32 products: torch's flag for convolutions, "tf32" unless the user changes it.

    Operands are not rounded to tf32: the matrix units truncate them to 10 mantissa bits.
    """
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def as_matrix(t):
    """t (N, C, H, W) as (pixels, C), or None where its pixels do not follow each other at one distance."""
    last = t.is_contiguous(memory_format=torch.channels_last)
    return t.permute(0, 2, 3, 1).view(-1, t.shape[1]) if last else None


def is_product(w, stride, padding, groups):
    """Whether a convolution by w (OC, C / groups, KH, KW) is a product of matrices."""
    return tuple(w[2:]) == (1, 1) and stride == (1, 1) and not any(padding) and groups == 1


@triton.jit
def in_elements(steps, UNITS: tl.constexpr, FIRST: tl.constexpr):
    """Four strides in elements from strides in units (see _common.in_units), which begin at UNITS[FIRST]."""
    return (
        steps[0] * UNITS[FIRST], steps[1] * UNITS[FIRST + 1],
        steps[2] * UNITS[FIRST + 2], steps[3] * UNITS[FIRST + 3],
    )  # fmt: skip


@triton.jit
def tile_of(pid, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows and columns of a program's tile, columns fastest, and the index of its product (group and phase)."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    offs_m = pid // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    return offs_m, offs_n, pid // tiles_n // tiles_m


@triton.jit
def taps_inside(pixel, SIZE, STEP: tl.constexpr, TAPS: tl.constexpr):
    """A bit for each of TAPS <= MOST_TAPS taps: whether `pixel` + tap * STEP is one of SIZE pixels."""
    bits = tl.zeros(pixel.shape, tl.int32)
    for tap in tl.static_range(TAPS):
        bits |= ((pixel + tap * STEP >= 0) & (pixel + tap * STEP < SIZE)).to(tl.int32) << tap
    return bits


@triton.jit
def add_taps(
    acc, x_ptrs, w_ptrs, bits, blocks,
    step_xh, step_xw, stride_wk, step_wh, step_ww,
    C: tl.constexpr, taps_w, INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc plus the product of patches and filters, tap by tap, `blocks` blocks of channels in all.

    x_ptrs and w_ptrs point at the first channels of the first tap. `bits` has in its lower half the rows of taps inside
    the image, and in its upper half the columns. All that changes from one iteration to the next is the same for every
    element, so that addresses cost one addition each.
    """
    offs_k = tl.arange(0, BLOCK_K)
    c0, th, tw = tl.cast(0, INDEX), tl.cast(0, INDEX), tl.cast(0, INDEX)
    for _ in range(0, blocks):
        tap = (1 << th.to(tl.int32)) | (1 << (tw.to(tl.int32) + MOST_TAPS))
        mask = ((bits & tap) == tap)[:, None]
        x_offs, w_offs = th * step_xh + tw * step_xw + c0, th * step_wh + tw * step_ww + c0 * stride_wk
        if C % BLOCK_K == 0:
            x = tl.load(x_ptrs + x_offs, mask=mask, other=0.0)
            w = tl.load(w_ptrs + w_offs)
        else:
            mask_k = c0 + offs_k < C
            x = tl.load(x_ptrs + x_offs, mask=mask & mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs + w_offs, mask=mask_k[:, None], other=0.0)
        acc = tl.dot(x.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
        c0, th, tw = next_block(c0, th, tw, C, taps_w, BLOCK_K)
    return acc


@triton.jit
def add_patches(
    acc, x_ptr, w_ptr, x_rows, w_cols, ih0, iw0, mask_m, mask_n, H, W,
    stride_xc, stride_xh, stride_xw, stride_wc, stride_wh, stride_ww,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAD_MODE: tl.constexpr, FLAT: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc plus the product of patches, one a row with its first pixel at (ih0, iw0), and filters."""
    offs_k = tl.arange(0, BLOCK_K).to(INDEX)
    if FLAT:
        for k0 in range(0, C * KH * KW, BLOCK_K):
            k = k0 + offs_k
            c, kh, kw = k // (KH * KW), k // KW % KH, k % KW
            mask_k = k < C * KH * KW
            ih, in_h = source(ih0[:, None] + kh[None, :] * DH, H, PAD_MODE)
            iw, in_w = source(iw0[:, None] + kw[None, :] * DW, W, PAD_MODE)
            x_offs = x_rows[:, None] + c[None, :] * stride_xc + ih * stride_xh + iw * stride_xw
            w_offs = w_cols[None, :] + (c * stride_wc + kh * stride_wh + kw * stride_ww)[:, None]
            x = tl.load(x_ptr + x_offs, mask=mask_m[:, None] & mask_k[None, :] & in_h & in_w, other=0.0)
            w = tl.load(w_ptr + w_offs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(x.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        start = tl.cast(0, INDEX)
        c0, kh, kw = start, start, start
        for _ in range(0, KH * KW * ((C + BLOCK_K - 1) // BLOCK_K)):
            c = c0 + offs_k
            mask_k = c < C
            ih, in_h = source(ih0 + kh * DH, H, PAD_MODE)
            iw, in_w = source(iw0 + kw * DW, W, PAD_MODE)
            x_offs = (x_rows + ih * stride_xh + iw * stride_xw)[:, None] + c[None, :] * stride_xc
            w_offs = w_cols[None, :] + (c * stride_wc + kh * stride_wh + kw * stride_ww)[:, None]
            x = tl.load(x_ptr + x_offs, mask=(mask_m & in_h & in_w)[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_ptr + w_offs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(x.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
            c0, kh, kw = next_block(c0, kh, kw, C, KW, BLOCK_K)
    return acc
