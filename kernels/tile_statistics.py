"""Statistics of a convolution's result that its kernel stores, tile by tile, for batch norm in training behind it.

    partials[0, p, c] = mean of z[m, c],    partials[1, p, c] = sum of (z[m, c] - partials[0, p, c])^2

over the pixels m = p * rows, ..., (p + 1) * rows - 1 of all images, in the order (n, oh, ow); the last part may be
shorter. rows is the number of rows of a tile. batch_norm/statistics.py: `fold` makes of the parts the mean and the
variance of the batch. They are of z as it is stored, rounded.
"""

import torch
import triton
import triton.language as tl

from ._common import cdiv
from .epilogue import NONE

# The values of an epilogue that stores its sums as they are; mean and var of the launch are where the parts go.
WITH_STATISTICS = *NONE[5:], True


def partials_for(z, rows):
    """Room for the statistics of z (N, C, H, W): (2, parts, C) in the type of the accumulators."""
    acc_dtype = torch.promote_types(z.dtype, torch.float32)
    return z.new_empty(2, cdiv(z.numel() // z.shape[1], rows), z.shape[1], dtype=acc_dtype)


@triton.jit
def store_statistics(
    mean_ptr, squares_ptr, z_ptr, rows, mask_m, tile, M, n0, N, channel0, channels, stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store each channel's mean in a tile of z, and the sum of squared deviations from it, in row `tile` of each.

    z is read back in the layout of stores, in which a thread has several rows, and of the sums few or a single one. To
    add up rows of the sums would take 2 to 5 times as many shuffles on sm_90, and 7 to 16 times on sm_100.
    """
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    count = tl.minimum(M - tile * BLOCK_M, BLOCK_M).to(ACC)

    # Other threads have stored what a thread reads.
    tl.debug_barrier()
    z = tl.load(z_ptr + rows[:, None] + ((channel0 + offs_n) * stride_n)[None, :], mask=mask, other=0.0).to(ACC)
    mean = tl.sum(z, axis=0) / count
    deviation = tl.where(mask_m[:, None], z - mean[None, :], 0.0)
    # A product that the sum's additions were fused with would have other bits in each thread.
    squares = tl.sum(tl.fma(deviation, deviation, tl.zeros_like(deviation)), axis=0)

    offs = tile * channels + channel0 + offs_n
    tl.store(mean_ptr + offs, mean, mask=mask_n)
    tl.store(squares_ptr + offs, squares, mask=mask_n)
