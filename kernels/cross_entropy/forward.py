"""Cross-entropy of class indices, and its gradient with respect to the logits, in one pass over the rows.

    lse[n]     = log of the sum over c of exp(x[n, c])
    loss[n]    = (1 - SMOOTHING) * w[t] * (lse[n] - x[n, t]) + SMOOTHING / C * sum over c of w[c] * (lse[n] - x[n, c])
    grad[n, c] = (1 - SMOOTHING) * w[t] * (p[n, c] - [c = t]) + SMOOTHING / C * (p[n, c] * sum of w - w[c])

with t = target[n] and p = exp(x - lse); loss and grad are 0 for rows whose target is ignore_index. For a mean both are
divided by the sum of w[t]. A target that is not a class gives NaN on a GPU, where raising would need a synchronisation,
and an IndexError in the interpreter. Factors are multiplied in the order of torch's autograd, for the same infinities
and NaNs. Source: torch.nn.functional.cross_entropy.

For a mean every program adds up the weights of all rows itself, while its first logits are loading: targets are few
bytes, and sharing the sum would take a second launch. The loss of a large batch is the sum, in a fixed order, of
the partial losses of its programs.
"""

import math

import torch
import triton
import triton.language as tl

from .. import shapes
from .._common import INTERPRETED, OPTIONS, acc_type, cdiv, in_units, index_type, power_of_2, round_to, strides
from ..launching import planned
from . import targets

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


@triton.jit
def weight_of(weight_ptr, target, kept, stride_w, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr):
    """The weight of each target's class, 0 where `kept` is false."""
    if HAS_WEIGHT:
        return tl.load(weight_ptr + target * stride_w, mask=kept, other=0.0).to(ACC)
    else:
        return kept.to(ACC)


@triton.jit
def sum_of_targets(
    target_ptr, weight_ptr,
    N, ignore_index, stride_t, stride_w,
    C: tl.constexpr, HAS_WEIGHT: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of the weights of all targets."""
    # Without weights the targets are counted in integers, which is exact.
    SUM: tl.constexpr = ACC if HAS_WEIGHT else INDEX
    sums = tl.zeros((BLOCK,), SUM)
    lanes = tl.arange(0, BLOCK).to(INDEX)
    # Full blocks have no mask, which would prevent a thread from loading two targets at once.
    whole = N // BLOCK * BLOCK
    for n0 in range(0, whole, BLOCK):
        target = tl.load(target_ptr + (n0 + lanes) * stride_t).to(tl.int64)
        kept = (target != ignore_index) & (target >= 0) & (target < C)
        sums += weight_of(weight_ptr, target, kept, stride_w, HAS_WEIGHT, SUM)
    if whole < N:
        mask = whole + lanes < N
        target = tl.load(target_ptr + (whole + lanes) * stride_t, mask=mask, other=0).to(tl.int64)
        kept = mask & (target != ignore_index) & (target >= 0) & (target < C)
        sums += weight_of(weight_ptr, target, kept, stride_w, HAS_WEIGHT, SUM)
    return tl.sum(sums, axis=0).to(ACC)


@triton.jit
def load_rows(x_ptr, n, last, stride_n, c, stride_xc, C: tl.constexpr):
    """The logits of rows n and classes c, -inf for rows from `last` on and for classes from C on."""
    mask = (n < last)[:, None] & (c < C)
    return tl.load(x_ptr + (n * stride_n)[:, None] + c * stride_xc, mask=mask, other=float("-inf"))


@triton.jit
def finite(largest):
    """The base that is subtracted from exponents: the largest of them, or 0 if that is -inf."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def along_rows(values):
    """Values of BLOCK_N rows as (1, BLOCK_N, 1), in the layout of sums over rows.

    Indexing with [None, :, None] gives each value two layouts. Triton converts between them, and 3.6.0 and 3.7.1 fail
    to compile some of that ("operand does not dominate this use").
    """
    return tl.expand_dims(tl.expand_dims(values, 1), 0)


@triton.jit
def max_of_rows(x):
    """The maximum of each row of (RUNS, BLOCK_N, RUN); a thread reduces its own elements first."""
    return tl.max(tl.max(x, axis=0), axis=1)


@triton.jit
def sum_of_rows(x):
    return tl.sum(tl.sum(x, axis=0), axis=1)


@triton.jit
def sum_of_exponentials(
    x_ptr, n, last, stride_n, c, stride_xc,
    C: tl.constexpr, ACC: tl.constexpr, RUNS: tl.constexpr, BLOCK_N: tl.constexpr, RUN: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """(base, sum over c of exp(x[n, c] - base)) of rows wider than a block (Milakov and Gimelshein 2018).

    Each thread keeps its own sum, relative to the largest value it has seen, so that threads synchronise once a row.
    """
    largest = tl.full((WARPS, BLOCK_N, RUN), float("-inf"), ACC)
    sums = tl.zeros((WARPS, BLOCK_N, RUN), ACC)
    for c0 in range(0, C, RUNS * RUN):
        x = load_rows(x_ptr, n, last, stride_n, c0 + c, stride_xc, C).to(ACC)
        x = tl.reshape(x, (RUNS // WARPS, WARPS, BLOCK_N, RUN))
        new = tl.maximum(largest, tl.max(x, axis=0))
        base = finite(new)
        sums = sums * tl.exp(largest - base) + tl.sum(tl.exp(x - base[None, :, :, :]), axis=0)
        largest = new
    base = finite(max_of_rows(largest))
    return base, sum_of_rows(sums * tl.exp(largest - along_rows(base)))


@triton.jit(do_not_specialize=["N", "rows", "ignore_index"])
def cross_entropy_kernel(
    x_ptr, target_ptr, weight_ptr, loss_ptr, grad_ptr,
    N, rows, ignore_index,
    stride_xn, stride_xc, stride_t, stride_w,
    UNIT_XN: tl.constexpr, C: tl.constexpr, SMOOTHING: tl.constexpr, REDUCTION: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, RUN: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(INDEX) * rows
    last = tl.minimum(first + rows, N)
    lanes_n = tl.arange(0, BLOCK_N).to(INDEX)
    # The logits of a block are loaded as (RUNS * BLOCK_N, RUN) and reshaped to (RUNS, BLOCK_N, RUN): runs of classes as
    # wide as a warp. Triton distributes the first dimension over warps, so that with as many rows as warps each row
    # belongs to one warp, and its sums need no shared memory. For few classes RUN is 1: each row belongs to one thread.
    RUNS: tl.constexpr = BLOCK_C // RUN
    flat, lanes = tl.arange(0, RUNS * BLOCK_N).to(INDEX), tl.arange(0, RUN).to(INDEX)
    flat_n, flat_c = flat % BLOCK_N, (flat // BLOCK_N * RUN)[:, None] + lanes[None, :]
    lanes_c = (tl.arange(0, RUNS).to(INDEX) * RUN)[:, None, None] + lanes[None, None, :]
    stride_n = stride_xn * UNIT_XN

    # Rows that fit a block are loaded one iteration ahead, the first ones before the targets are added up.
    ONE_BLOCK: tl.constexpr = C <= BLOCK_C
    if ONE_BLOCK:
        x_ahead = load_rows(x_ptr, first + flat_n, last, stride_n, flat_c, stride_xc, C)

    scale = tl.full((), 1.0, ACC)
    if REDUCTION == 1:
        scale /= sum_of_targets(
            target_ptr, weight_ptr, N, ignore_index, stride_t, stride_w, C, HAS_WEIGHT, INDEX, ACC, BLOCK_T
        )
    SMOOTH: tl.constexpr = SMOOTHING / C
    if SMOOTHING > 0:
        # Each weight is scaled before the sum, so that a class of weight 0 gives NaN if the scale is infinite.
        share = SMOOTH * scale
        sums = tl.zeros((RUNS, 1, RUN), ACC)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + lanes_c
            sums += tl.where(c < C, share * weight_of(weight_ptr, c, c < C, stride_w, HAS_WEIGHT, ACC), 0.0)
        share_of_all = sum_of_rows(sums)
        # A separate sum: without any weighted target the targets' mean has to be 0 / 0, and with this one it would not.
        total_smooth = tl.zeros((BLOCK_N,), ACC)

    total = tl.zeros((BLOCK_N,), ACC)
    for n0 in range(first, last, BLOCK_N):
        n = n0 + lanes_n
        mask_n = n < last
        target = tl.load(target_ptr + n * stride_t, mask=mask_n, other=0).to(tl.int64)

        if ONE_BLOCK:
            x = tl.reshape(x_ahead, (RUNS, BLOCK_N, RUN)).to(ACC)
            x_ahead = load_rows(x_ptr, n0 + BLOCK_N + flat_n, last, stride_n, flat_c, stride_xc, C)
            base = finite(max_of_rows(x))
            sum_exp = sum_of_rows(tl.exp(x - along_rows(base)))
        else:
            base, sum_exp = sum_of_exponentials(
                x_ptr, n0 + flat_n, last, stride_n, flat_c, stride_xc, C, ACC, RUNS, BLOCK_N, RUN, WARPS
            )

        kept, valid = mask_n & (target != ignore_index), (target >= 0) & (target < C)
        x_rows = x_ptr + n * stride_n
        x_target = tl.load(x_rows + target * stride_xc, mask=kept & valid, other=float("nan")).to(ACC)
        w_target = weight_of(weight_ptr, target, kept & valid, stride_w, HAS_WEIGHT, ACC)
        sum_exp = tl.where(kept, sum_exp, 1.0)
        lse = base + tl.log(sum_exp)
        loss = (1 - SMOOTHING) * w_target * (lse - x_target)

        # An ignored row gets zeros, whatever its logits are and even if the scale of an empty mean is infinite; a row
        # whose target is not a class gets NaN.
        factor = tl.where(valid, (1 - SMOOTHING) * w_target * scale, float("nan"))
        factor = tl.where(kept, factor, 0.0)
        slope, class_of = factor, target.to(tl.int32)
        if SMOOTHING > 0:
            slope = tl.where(kept, slope + share_of_all, 0.0)
            smooth = tl.zeros((BLOCK_N,), ACC)
        slope /= sum_exp
        for c0 in range(0, C, BLOCK_C):
            c = c0 + lanes_c
            if not ONE_BLOCK:
                x = load_rows(x_ptr, n0 + flat_n, last, stride_n, c0 + flat_c, stride_xc, C)
                x = tl.reshape(x, (RUNS, BLOCK_N, RUN)).to(ACC)
            e = tl.where(along_rows(kept), tl.exp(x - along_rows(base)), 0.0)
            gain = tl.where(c == along_rows(class_of), along_rows(factor), 0.0)
            if SMOOTHING > 0:
                # Loaded for each row, from L1: one copy for all rows would go through shared memory.
                w = weight_of(weight_ptr, c0 + flat_c, c0 + flat_c < C, stride_w, HAS_WEIGHT, ACC)
                w = tl.reshape(w, (RUNS, BLOCK_N, RUN))
                gain += tl.where(along_rows(kept), share * w, 0.0)
                # A sum of differences: a difference of sums would cancel digits.
                each = tl.where(along_rows(mask_n) & (c < C), w * (along_rows(lse) - x), 0.0)
                smooth += SMOOTH * sum_of_rows(each)
            grad = e * along_rows(slope) - gain
            grad = tl.reshape(round_to(grad, grad_ptr.dtype.element_ty), (RUNS * BLOCK_N, RUN))
            mask = (n0 + flat_n < last)[:, None] & (c0 + flat_c < C)
            tl.store(grad_ptr + ((n0 + flat_n) * C)[:, None] + c0 + flat_c, grad, mask=mask)

        loss = tl.where(kept, loss, 0.0)
        total += loss
        if SMOOTHING > 0:
            smooth = tl.where(kept, smooth, 0.0)
            loss += smooth
            total_smooth += smooth
        if REDUCTION == 0:
            tl.store(loss_ptr + n, round_to(loss, loss_ptr.dtype.element_ty), mask=mask_n)

    if REDUCTION > 0:
        loss = tl.sum(total, axis=0) * scale
        if SMOOTHING > 0:
            loss += tl.sum(total_smooth, axis=0) * scale
        tl.store(loss_ptr + tl.program_id(0), round_to(loss, loss_ptr.dtype.element_ty))


# Almost two for each multiprocessor of an H200; one further program loads all of their partial losses at once.
MOST_PROGRAMS = 256
# Bytes of a block of logits: two programs have 32 KB in flight on each multiprocessor, and the registers for them.
TILE = 2**14
# Logits of a block if they may be loaded one by one, which takes more registers, or if a row is wider than a block.
SMALL = 4096
# Up to so many classes logits may be loaded one by one; a program has twice as many warps, as it may take all rows.
FEW = 256
# Up to so many classes a thread has a whole row: otherwise the work once a row would take longer than the logits.
FEWEST = 16


def _warps(block_c, dtype):
    """The warps of a program; float64 needs more registers for each."""
    return 16 if block_c <= FEW and dtype != torch.float64 else 8


def _blocks(N, C, dtype, reduction):
    """(rows a program, BLOCK_N, BLOCK_C, BLOCK_T)."""
    if INTERPRETED:
        quarter = power_of_2(cdiv(N, 4))  # BLOCK_T; as BLOCK_N half of a program's rows
        rows = max(min(4096, cdiv(N, 2)), cdiv(N, MOST_PROGRAMS))
        return rows, min(512, quarter), min(64, power_of_2(C)), min(4096, quarter)
    tile = TILE // dtype.itemsize
    tile = min(tile, SMALL) if C <= FEW or C > tile else tile
    block_c = min(tile, power_of_2(C))
    block_n = 32 * _warps(block_c, dtype) if C <= FEWEST else tile // block_c
    tiles, most = cdiv(N, block_n), MOST_PROGRAMS
    if reduction == "mean":
        # P programs load P * N targets from L2, which takes N * P / 200 cycles at 200 targets a cycle. Each has N / P
        # rows, which take N * BLOCK_C / (4 * P) cycles at 32 instructions a logit and 128 threads a cycle. The sum is
        # least for P = sqrt(50 * BLOCK_C), rounded up to a power of 2: 32 programs for 10 classes, all for 1000.
        most = min(most, power_of_2(math.isqrt(50 * block_c)))
    # For a few blocks one program is faster than several and a second launch that adds up their losses.
    programs = 1 if N * block_c <= 4 * SMALL and reduction != "none" else min(tiles, most)
    return cdiv(tiles, programs) * block_n, block_n, block_c, 2048


@planned(cross_entropy_kernel)
def _forward(x, target, weight, loss, grad, smoothing, reduction, ignore_index):
    N, C = x.shape
    rows, block_n, block_c, block_t = _blocks(N, C, x.dtype, reduction)
    step, stride_xc = strides(x)
    (stride_xn,), (unit,) = in_units(x.itemsize, step)
    # A run is a warp's: 16 bytes a thread if C allows that. Strides do not count, for the same sums.
    vector = 1 if C % (16 // x.itemsize) else 16 // x.itemsize
    run = 1 if C <= FEWEST and not INTERPRETED else min(32 * vector, block_c)
    warps = _warps(block_c, x.dtype)
    steps = stride_xn, stride_xc, target.stride(0), 0 if weight is None else weight.stride(0)
    return (cdiv(N, rows),), (N, rows, ignore_index, *steps), dict(
        UNIT_XN=unit, C=C, SMOOTHING=smoothing, REDUCTION=REDUCTIONS[reduction], HAS_WEIGHT=weight is not None,
        INDEX=index_type(x, target, weight, grad), ACC=acc_type(x.dtype),
        BLOCK_N=block_n, BLOCK_C=block_c, BLOCK_T=block_t, RUN=run, WARPS=min(warps, block_c // run),
        num_warps=warps, **OPTIONS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["PROGRAMS"])
def sum_losses_kernel(partial_ptr, loss_ptr, PROGRAMS, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)

    partial = tl.load(partial_ptr + offs, mask=offs < PROGRAMS, other=0.0)
    loss = tl.sum(partial, axis=0)

    tl.store(loss_ptr, round_to(loss, loss_ptr.dtype.element_ty))


@planned(sum_losses_kernel)
def _sum_losses(partial, loss):
    return (1,), (partial.numel(),), {"BLOCK": MOST_PROGRAMS, "num_warps": 4, **OPTIONS}


def forward(x, target, weight, reduction, ignore_index, smoothing):
    """x (N, C), target (N) of integers, weight (C) or None -> loss, (N) or (), and its gradient (N, C).

    Raises:
        IndexError: in the interpreter, for a target that is not a class.
    """
    if INTERPRETED:
        targets.check(target, x.shape[1], ignore_index)
    loss, grad = shapes.cross_entropy(x, reduction)
    N, C = x.shape
    if N == 0:
        return loss.fill_(math.nan if reduction == "mean" else 0.0), grad
    programs = 1 if reduction == "none" else cdiv(N, _blocks(N, C, x.dtype, reduction)[0])
    if programs == 1:
        _forward((x, target, weight, loss, grad), smoothing, reduction, ignore_index)
        return loss, grad
    partial = loss.new_empty(programs, dtype=torch.promote_types(x.dtype, torch.float32))
    _forward((x, target, weight, partial, grad), smoothing, reduction, ignore_index)
    _sum_losses((partial, loss))
    return loss, grad
