"""The mean and the variance of each channel over a batch, and the running statistics.

    mean[c] = sum over m of x[m, c] / count,    var[c] = sum over m of (x[m, c] - mean[c])^2 / count
    running_mean = (1 - momentum) * running_mean + momentum * (mean + bias)
    running_var = (1 - momentum) * running_var + momentum * var * count / (count - 1)

The mean of the squares less the square of the mean would lose all digits where a mean is many standard deviations. So
each program takes its elements relative to a shift, the mean of its first block, and each element of a block is a
stream of its own, with a mean and a sum M2 of squared deviations that are updated by each value d (Welford 1962):

    mean += (d - mean) / n,    M2 += (d - mean)^2 * (n - 1) / n    with the mean before the update

Of b streams of n values each, M2 in total is at least b * (shift - mean)^2, as that much is in the first block alone.
So the shift is at most sqrt(n) standard deviations of these values from their mean, and differences lose little.

Streams, and then the programs' partial statistics, are put together by (Chan, Golub, LeVeque 1983)

    mean = mean_0 + sum over p of n_p * (mean_p - mean_0) / n,    M2 = sum over p of M2_p + n_p * (mean_p - mean)^2

in a fixed order. The mean of a part is kept as its shift and what is to be added, as sums of deviations from a rounded
mean are not zero. All of it is in float32, or float64 for float64.

Sources: B. P. Welford, Note on a method for calculating corrected sums of squares and products, Technometrics 4, 1962;
T. F. Chan, G. H. Golub, R. J. LeVeque, Algorithms for computing the sample variance: analysis and recommendations, The
American Statistician 37, 1983.
"""

import math
import struct

import torch
import triton
import triton.language as tl

from .. import shapes
from .._common import INTERPRETED, OPTIONS, acc_type, cdiv, round_to
from ..launching import planned
from ..relu import is_dense
from ..tiles import clamped_power
from .elements import Division, block_at, channels_of, share_of, sum_of

# Sums over threads follow products. Fused with an addition, a product would have other bits in each thread of a sum,
# and any of them might be stored. What may be fused is written as tl.fma.
UNFUSED = OPTIONS | {"enable_fp_fusion": False}


@triton.jit
def updated(mean, m2, d, n):
    """(mean, M2) of streams with their n-th values, whose differences from the mean are d."""
    share = 1.0 / n
    return tl.fma(d, share, mean), tl.fma(d * d, 1.0 - share, m2)


@triton.jit(do_not_specialize=["count"])
def batch_statistics_kernel(
    x_ptr, partial_ptr,
    count, rows, C, inner, inverse_inner,
    C_UNIT: tl.constexpr, INNER_UNIT: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    # The elements of a channel in a block.
    BLOCK: tl.constexpr = BLOCK_M if CHANNELS else BLOCK_M * BLOCK_N
    C *= C_UNIT
    sizes = (C, inner * INNER_UNIT, inverse_inner)
    channel = channels_of(CHANNELS, BLOCK_N)
    mask_c = channel < C
    first, last = share_of(count, rows, INDEX)

    offs, inside = block_at(first, last, channel, sizes, CHANNELS, INDEX, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + offs, mask=mask_c & inside, other=0.0).to(ACC)
    shift = sum_of(x, CHANNELS) / tl.minimum(last - first, BLOCK).to(ACC)

    mean, m2 = tl.zeros((BLOCK_M, BLOCK_N), ACC), tl.zeros((BLOCK_M, BLOCK_N), ACC)
    n = tl.zeros((), ACC)
    whole = first + (last - first) // (BLOCK * UNROLL) * (BLOCK * UNROLL)
    for m0 in range(first, whole, BLOCK * UNROLL):
        blocks = ()
        for i in tl.static_range(UNROLL):
            offs, _ = block_at(m0 + i * BLOCK, last, channel, sizes, CHANNELS, INDEX, BLOCK_M, BLOCK_N)
            blocks = blocks + (tl.load(x_ptr + offs, mask=mask_c, other=0.0),)
        for i in tl.static_range(UNROLL):
            n += 1.0
            mean, m2 = updated(mean, m2, blocks[i].to(ACC) - shift - mean, n)
    for m0 in range(whole, last, BLOCK):
        offs, inside = block_at(m0, last, channel, sizes, CHANNELS, INDEX, BLOCK_M, BLOCK_N)
        x = tl.load(x_ptr + offs, mask=mask_c & inside, other=0.0).to(ACC)
        n += 1.0
        mean, m2 = updated(mean, m2, tl.where(inside, x - shift - mean, 0.0), n)

    # How many values each stream has had.
    STEP: tl.constexpr = 1 if CHANNELS else BLOCK_N
    begins = tl.arange(0, BLOCK_M)[:, None] * STEP
    values = ((last - first - begins + BLOCK - 1) // BLOCK).to(ACC)
    total = sum_of(mean * values, CHANNELS) / (last - first).to(ACC)
    apart = mean - total
    m2 = sum_of(m2 + apart * apart * values, CHANNELS)

    ptrs, step = partial_ptr + tl.program_id(1) * C + channel, tl.num_programs(1) * C
    tl.store(ptrs, shift + tl.zeros_like(m2), mask=mask_c)
    tl.store(ptrs + step, m2, mask=mask_c)
    tl.store(ptrs + 2 * step, total, mask=mask_c)


@planned(batch_statistics_kernel)
def _partial_statistics(x, partials):
    grid, numbers, constants = Division.of(x).launch(x)
    return grid, numbers, {**constants, **UNFUSED}


@triton.jit
def moved(running_ptr, channel, mask, target, momentum, momentum_rest):
    """Move the running statistics to the target by momentum + momentum_rest of the way: at 1 exactly there."""
    running = tl.load(running_ptr + channel, mask=mask, other=0.0)
    # In float64 where the running statistics are, else in the accumulators' type.
    TYPE: tl.constexpr = tl.float64 if running.dtype == tl.float64 else target.dtype
    old = running.to(TYPE)
    share = tl.full((1, 1), momentum, TYPE) + tl.full((1, 1), momentum_rest, TYPE)
    new = old * (1.0 - share) + target.to(TYPE) * share
    tl.store(running_ptr + channel, round_to(new, running_ptr.dtype.element_ty), mask=mask)


@triton.jit
def part_means(partial_ptr, rest_ptr, start, p, P, C, channel, mask_c, HAS_REST: tl.constexpr):
    """The means of the parts p less `start`, which is near them: differences of near numbers are exact."""
    offs, mask = p * C + channel, mask_c & (p < P)
    apart = tl.load(partial_ptr + offs, mask=mask, other=0.0) - start
    if HAS_REST:
        apart += tl.load(rest_ptr + offs, mask=mask, other=0.0)
    return apart


@triton.jit(do_not_specialize=["P", "rows", "remainder", "count"])
def fold_statistics_kernel(
    partial_ptr, mean_ptr, var_ptr, b_ptr, running_mean_ptr, running_var_ptr,
    C, P, rows, remainder, count, momentum, momentum_rest,
    HAS_REST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RUNNING: tl.constexpr,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask_c = channel < C
    offs_p = tl.arange(0, BLOCK_P)[:, None]
    m2_ptr, rest_ptr = partial_ptr + P * C, partial_ptr + 2 * P * C
    total = tl.full((1, 1), count, ACC)

    # The last part has what the others leave over.
    start = tl.load(partial_ptr + channel, mask=mask_c, other=0.0)
    sums = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + offs_p
        n = tl.where(p < P - 1, rows, tl.where(p < P, remainder, 0)).to(ACC)
        sums += n * part_means(partial_ptr, rest_ptr, start, p, P, C, channel, mask_c, HAS_REST)
    mean = tl.sum(sums, axis=0, keep_dims=True) / total

    sums = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + offs_p
        n = tl.where(p < P - 1, rows, tl.where(p < P, remainder, 0)).to(ACC)
        apart = part_means(partial_ptr, rest_ptr, start, p, P, C, channel, mask_c, HAS_REST) - mean
        sums += tl.load(m2_ptr + p * C + channel, mask=mask_c & (p < P), other=0.0) + n * apart * apart
    m2 = tl.sum(sums, axis=0, keep_dims=True)

    mean += start
    tl.store(mean_ptr + channel, mean, mask=mask_c)
    tl.store(var_ptr + channel, m2 / total, mask=mask_c)
    if HAS_RUNNING:
        if HAS_BIAS:
            mean += tl.load(b_ptr + channel, mask=mask_c, other=0.0).to(ACC)
        moved(running_mean_ptr, channel, mask_c, mean, momentum, momentum_rest)
        moved(running_var_ptr, channel, mask_c, m2 / (total - 1.0), momentum, momentum_rest)


def fold_blocks(parts, C):
    """(BLOCK_P, BLOCK_C) and the warps of a kernel that adds up the partial results of C channels."""
    block_p = clamped_power(parts, 1, 1024)
    block_c = clamped_power(C, 1, max(8, (2**14 if INTERPRETED else 512) // block_p))
    return block_p, block_c, 8 if block_p >= 512 else 4


def halves(number):
    """A float as the sum of two numbers of float32, as which Triton passes all floats; the second is a remainder."""
    (first,) = struct.unpack("f", struct.pack("f", number))
    return first, number - first


@planned(fold_statistics_kernel)
def _fold(partials, mean, var, bias, running_mean, running_var, rows, count, momentum):
    results, P, C = partials.shape
    block_p, block_c, num_warps = fold_blocks(P, C)
    numbers = C, P, rows, count - (P - 1) * rows, count, *halves(momentum)
    return (cdiv(C, block_c),), numbers, dict(
        HAS_REST=results > 2, HAS_BIAS=bias is not None, HAS_RUNNING=running_mean is not None,
        ACC=acc_type(partials.dtype), BLOCK_P=block_p, BLOCK_C=block_c,
        num_warps=num_warps, **UNFUSED,
    )  # fmt: skip


def fold(partials, rows, count, bias, running_mean, running_var, momentum):
    """partials (2, P, C) or (3, P, C) -> mean (C), var (C); moves running_mean and running_var (C), or None, in place.

    partials[0, p] is the mean and partials[1, p] the sum of squared deviations from it of the elements p * rows to
    (p + 1) * rows of each channel, of which there are `count`; no part is empty. partials[2, p], if there, is added to
    the mean, which then has more digits than its type. bias (C) or None counts in the running mean alone.
    """
    mean, var = shapes.batch_statistics(partials, partials.shape[2])
    bias = None if bias is None else bias.contiguous()
    running = [None if t is None else t.contiguous() for t in (running_mean, running_var)]
    _fold((partials, mean, var, bias, *running), rows, count, momentum)
    for t, dense in zip((running_mean, running_var), running):
        if dense is not t:
            t.copy_(dense)
    return mean, var


def forward(x, bias, running_mean, running_var, momentum):
    """x (N, C, *) -> mean (C), var (C), the biased variance; both NaN without elements.

    running_mean and running_var (C), or None, are moved in place; bias (C) or None counts in the running mean alone.
    """
    if x.numel() == 0:
        return tuple(t.fill_(math.nan) for t in shapes.batch_statistics(x, x.shape[1]))
    if not is_dense(x):
        x = torch.empty_like(x).copy_(x)
    division = Division.of(x)
    partials = division.partials(x, 3)
    _partial_statistics((x, partials))
    return fold(partials, division.rows, division.count, bias, running_mean, running_var, momentum)
