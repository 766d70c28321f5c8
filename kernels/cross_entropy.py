"""Cross-entropy of class indices, and its gradient by the logits, in one pass over the rows.

    lse[n]     = log of the sum over c of exp(x[n, c])
    loss[n]    = (1 - SMOOTHING) * w[t] * (lse[n] - x[n, t]) + SMOOTHING / C * sum over c of w[c] * (lse[n] - x[n, c])
    grad[n, c] = (1 - SMOOTHING) * w[t] * (p[n, c] - [c = t]) + SMOOTHING / C * (p[n, c] * sum of w - w[c])

with t = target[n] and p = exp(x - lse); both are 0 for rows whose target is ignore_index. Their sum is divided by the
sum of w[t] for a mean. A target that is no class gives NaN. Source: torch.nn.functional.cross_entropy.

Every program adds up the weights of all rows by itself: targets are few bytes, and waiting for one another would take a
second launch. The loss of a large batch is the sum, in a fixed order, of what its programs leave behind.
"""

import torch
import triton
import triton.language as tl

from . import shapes
from ._common import INTERPRETED, OPTIONS, acc_type, cdiv, index_type, power_of_2, round_to
from .launching import planned
from .reduce import Partials

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


@triton.jit
def weight_of(weight_ptr, target, kept, stride_w, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr):
    """The weight of each target's class, 0 where it is not kept."""
    if HAS_WEIGHT:
        return tl.load(weight_ptr + target * stride_w, mask=kept, other=0.0).to(ACC)
    else:
        return kept.to(ACC)


@triton.jit(do_not_specialize=["N", "rows", "ignore_index"])
def cross_entropy_kernel(
    x_ptr, target_ptr, weight_ptr, loss_ptr, grad_ptr,
    N, rows, ignore_index,
    stride_xn, stride_xc, stride_t, stride_w,
    C: tl.constexpr, SMOOTHING: tl.constexpr, REDUCTION: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(INDEX)
    lanes_n, lanes_c = tl.arange(0, BLOCK_N).to(INDEX), tl.arange(0, BLOCK_C).to(INDEX)

    scale = 1.0
    if REDUCTION == 1:
        sums = tl.zeros((BLOCK_N,), ACC)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + lanes_n
            target = tl.load(target_ptr + n * stride_t, mask=n < N, other=0).to(tl.int64)
            kept = (n < N) & (target != ignore_index) & (target >= 0) & (target < C)
            sums += weight_of(weight_ptr, target, kept, stride_w, HAS_WEIGHT, ACC)
        scale = 1.0 / tl.sum(sums, axis=0)

    total = tl.zeros((BLOCK_N,), ACC)
    last = tl.minimum((pid + 1) * rows, N)
    for n0 in range(pid * rows, last, BLOCK_N):
        n = n0 + lanes_n
        mask_n = n < last
        target = tl.load(target_ptr + n * stride_t, mask=mask_n, other=0).to(tl.int64)
        kept, valid = mask_n & (target != ignore_index), (target >= 0) & (target < C)
        x_rows = x_ptr + n * stride_xn

        # The largest so far, and the sum of exponentials relative to it (Milakov and Gimelshein 2018).
        largest = tl.full((BLOCK_N,), float("-inf"), ACC)
        sum_exp = tl.zeros((BLOCK_N,), ACC)
        sum_w = tl.zeros((BLOCK_N,), ACC)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + lanes_c
            mask = mask_n[:, None] & (c < C)[None, :]
            x = tl.load(x_rows[:, None] + (c * stride_xc)[None, :], mask=mask, other=0.0).to(ACC)
            if SMOOTHING > 0:
                w = weight_of(weight_ptr, c, c < C, stride_w, HAS_WEIGHT, ACC)
                sum_w += tl.sum(w, axis=0)
            x = tl.where((c < C)[None, :], x, float("-inf"))
            new = tl.maximum(largest, tl.max(x, axis=1))
            base = tl.where(new == float("-inf"), 0.0, new)
            sum_exp = sum_exp * tl.exp(largest - base) + tl.sum(tl.exp(x - base[:, None]), axis=1)
            largest = new
        lse = largest + tl.log(sum_exp)

        x_target = tl.load(x_rows + target * stride_xc, mask=kept & valid, other=float("nan")).to(ACC)
        w_target = weight_of(weight_ptr, target, kept & valid, stride_w, HAS_WEIGHT, ACC)
        loss = (1 - SMOOTHING) * w_target * (lse - x_target)

        for c0 in range(0, C, BLOCK_C):
            c = c0 + lanes_c
            mask = mask_n[:, None] & (c < C)[None, :]
            x = tl.load(x_rows[:, None] + (c * stride_xc)[None, :], mask=mask, other=0.0).to(ACC)
            p = tl.exp(x - lse[:, None])
            is_target = c[None, :] == target[:, None]
            grad = (1 - SMOOTHING) * w_target[:, None] * (p - is_target.to(ACC))
            if SMOOTHING > 0:
                w = weight_of(weight_ptr, c, c < C, stride_w, HAS_WEIGHT, ACC)
                grad += SMOOTHING / C * (sum_w[:, None] * p - w[None, :])
                # Of differences, as a difference of sums would lose digits that they agree in.
                each = tl.where((c < C)[None, :], w[None, :] * (lse[:, None] - x), 0.0)
                loss += SMOOTHING / C * tl.sum(each, axis=1)
            grad = tl.where(valid[:, None], grad * scale, float("nan"))
            grad = tl.where(kept[:, None], grad, 0.0)
            grad_offs = (n * C)[:, None] + c[None, :]
            tl.store(grad_ptr + grad_offs, round_to(grad, grad_ptr.dtype.element_ty), mask=mask)

        loss = tl.where(kept, loss, 0.0)
        if REDUCTION == 0:
            tl.store(loss_ptr + n, round_to(loss, loss_ptr.dtype.element_ty), mask=mask_n)
        total += loss

    if REDUCTION > 0:
        loss = tl.sum(total, axis=0) * scale
        tl.store(loss_ptr + pid, round_to(loss, loss_ptr.dtype.element_ty))


def _blocks(N, C):
    """(rows a program, BLOCK_N, BLOCK_C)."""
    if INTERPRETED:
        return min(4096, cdiv(N, 2)), min(512, power_of_2(N)), min(64, power_of_2(C))
    block_c = min(1024, power_of_2(C))
    block_n = max(1, 2048 // block_c)
    # As many programs as a large GPU runs at once, each with enough rows to be worth it.
    programs = min(128, cdiv(N, 8 * block_n))
    return cdiv(cdiv(N, programs), block_n) * block_n, block_n, block_c


@planned(cross_entropy_kernel)
def _forward(x, target, weight, loss_ptr, grad, smoothing, reduction, ignore_index):
    N, C = x.shape
    rows, block_n, block_c = _blocks(N, C)
    strides = *x.stride(), target.stride(0), 0 if weight is None else weight.stride(0)
    return (cdiv(N, rows),), (N, rows, ignore_index, *strides), dict(
        C=C, SMOOTHING=smoothing, REDUCTION=REDUCTIONS[reduction], HAS_WEIGHT=weight is not None,
        INDEX=index_type(x, target, weight, grad), ACC=acc_type(x.dtype), BLOCK_N=block_n, BLOCK_C=block_c,
        num_warps=4, **OPTIONS,
    )  # fmt: skip


def forward(x, target, weight, reduction, ignore_index, smoothing):
    """x (N, C), target (N) of integers, weight (C) or None -> loss, (N) or (), and its gradient (N, C)."""
    loss, grad = shapes.cross_entropy(x, reduction)
    N, C = x.shape
    # Of the losses of the rows each program writes its own.
    splits = 1 if reduction == "none" else cdiv(N, _blocks(N, C)[0])
    partials = Partials(splits, loss.view(-1), loss.new_empty(0), torch.promote_types(x.dtype, torch.float32))
    _forward((x, target, weight, partials.pointers[0], grad), smoothing, reduction, ignore_index)
    partials.add_up()
    return loss, grad
