"""The padding of a convolution, read in place: the source of each padded coordinate, and the gradient of the copies.

padded[n, c, ph, pw] = x[n, c, source(ph), source(pw)], or 0 outside in the mode "zeros"
dx[n, c, ih, iw]     = sum over the ph, pw that copy (ih, iw) of dpadded[n, c, ph, pw]
"""

import triton
import triton.language as tl

from .._common import OPTIONS, acc_type, cdiv, index_type, round_to
from ..launching import planned
from ..tiles import flat_block

PAD_MODES = {"zeros": 0, "reflect": 1, "replicate": 2, "circular": 3}


@triton.jit
def source(i, size, PAD_MODE: tl.constexpr):
    """The source of coordinate i, negative in the padding before the image, and whether it has one (else it is 0)."""
    if PAD_MODE == 0:  # zeros
        return i, (i >= 0) & (i < size)
    elif PAD_MODE == 1:  # reflect
        i = tl.where(i < 0, -i, i)
        return tl.where(i >= size, 2 * size - 2 - i, i), i >= 0
    elif PAD_MODE == 2:  # replicate
        return tl.where(i < 0, 0, tl.where(i >= size, size - 1, i)), i == i
    else:  # circular
        return tl.where(i < 0, i + size, tl.where(i >= size, i - size, i)), i == i


@triton.jit
def fold_padding_kernel(
    dp_ptr, dx_ptr,
    numel, H, W,
    stride_pn, stride_pc, stride_ph, stride_pw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    C: tl.constexpr, TOP: tl.constexpr, BOTTOM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PAD_MODE: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    iw = offs % W
    ih = offs // W % H
    c = offs // W // H % C
    n = offs // W // H // C

    # Iteration 0 is the pixel itself; the others are rows (columns) of the padding, masked to those that copy it.
    acc = tl.zeros((BLOCK,), ACC)
    for row in range(0, 1 + TOP + BOTTOM):
        ph = tl.where(row == 0, ih, tl.where(row <= TOP, row - 1 - TOP, H + row - 1 - TOP))
        copied_h, _ = source(ph, H, PAD_MODE)
        for col in range(0, 1 + LEFT + RIGHT):
            pw = tl.where(col == 0, iw, tl.where(col <= LEFT, col - 1 - LEFT, W + col - 1 - LEFT))
            copied_w, _ = source(pw, W, PAD_MODE)
            p_offs = n * stride_pn + c * stride_pc + (ph + TOP) * stride_ph + (pw + LEFT) * stride_pw
            acc += tl.load(dp_ptr + p_offs, mask=mask & (copied_h == ih) & (copied_w == iw), other=0.0).to(ACC)

    x_offs = n * stride_xn + c * stride_xc + ih * stride_xh + iw * stride_xw
    tl.store(dx_ptr + x_offs, round_to(acc, dx_ptr.dtype.element_ty), mask=mask)


@planned(fold_padding_kernel)
def _fold(dp, dx, padding, pad_mode):
    (top, bottom, left, right), block = padding, flat_block(dx.numel(), 512)
    return (cdiv(dx.numel(), block),), (dx.numel(), *dx.shape[2:], *dp.stride(), *dx.stride()), dict(
        C=dx.shape[1], TOP=top, BOTTOM=bottom, LEFT=left, RIGHT=right, PAD_MODE=PAD_MODES[pad_mode],
        INDEX=index_type(dp, dx), ACC=acc_type(dx.dtype), BLOCK=block, num_warps=4, **OPTIONS,
    )  # fmt: skip


def fold_padding(dp, dx, padding, pad_mode):
    """dp (N, C, H + top + bottom, W + left + right), gradient of the padded image -> dx (N, C, H, W), of the image."""
    if dx.numel() > 0:
        _fold((dp, dx), padding, pad_mode)
    return dx
