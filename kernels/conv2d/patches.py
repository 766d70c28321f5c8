"""How an implicit matrix product walks the patches of an image."""

import torch
import triton
import triton.language as tl

from ..tiles import gemm_tile
from .padding import source

# Below this many channels a tap alone does not fill the shortest K that tl.dot takes.
FLAT_BELOW = 16
# A short walk, of few channels, does not fill longer blocks of K.
SHORT_K = 32
# Where lanes keep addresses of their own, wider tiles spill registers.
NARROW_N = 64


def tile_for(table, M, N, K, dtype, precision, index, short, narrow, halve=True):
    tile = gemm_tile(table, M, min(N, NARROW_N) if narrow else N, K, dtype, precision, halve)
    if short:
        tile = tile._replace(K=min(tile.K, SHORT_K))
    # Addresses of 64 bits take twice the registers.
    return tile._replace(num_warps=8) if index == tl.int64 else tile


def channels_inner(t):
    """t with its channels side by side in memory, copied only if they are not."""
    return t if t.stride(1) == 1 else t.contiguous(memory_format=torch.channels_last)


def precision():
    """What float32 products are taken in: torch's flag for convolutions, "tf32" unless the user changes it.

    Nothing rounds operands to tf32: the matrix units cut them off to 10 bits behind the point.
    """
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


@triton.jit
def next_block(c, kh, kw, C, KW, BLOCK: tl.constexpr):
    """One block of channels on, then one tap on: counters in the place of a division in the inner loop."""
    c += BLOCK
    wrap = c >= C
    c = tl.where(wrap, 0, c)
    kw += tl.where(wrap, 1, 0)
    wrap = kw >= KW
    kw = tl.where(wrap, 0, kw)
    kh += tl.where(wrap, 1, 0)
    return c, kh, kw


@triton.jit
def add_patches(
    acc, x_ptr, w_ptr, x_rows, w_cols, ih0, iw0, mask_m, mask_n, H, W,
    stride_xc, stride_xh, stride_xw, stride_wc, stride_wh, stride_ww,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAD_MODE: tl.constexpr, FLAT: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc and the products of the patches whose first pixels are (ih0, iw0), one a row, with the filters."""
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
