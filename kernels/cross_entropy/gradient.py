"""The gradient with respect to the logits, from the one that the forward pass has stored (see forward.py).

dx[n, c] = dloss * grad[n, c], or dloss[n] * grad[n, c] for a loss a row, and 0 for rows whose target is ignore_index
"""

import triton
import triton.language as tl

from .. import shapes
from .._common import OPTIONS, acc_type, cdiv, in_units, index_type, round_to, strides
from ..launching import planned
from ..tiles import flat_block


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_grad_kernel(
    dloss_ptr, grad_ptr, target_ptr, dx_ptr,
    numel, ignore_index,
    stride_dloss, stride_gn, stride_gc, stride_t,
    UNIT_NUMEL: tl.constexpr, UNIT_GN: tl.constexpr, C: tl.constexpr, DENSE: tl.constexpr, PER_ROW: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    # A block consists of runs within one row, as wide as a memory access, so that a thread loads one target a run.
    runs = tl.program_id(0).to(INDEX) * BLOCK + (tl.arange(0, BLOCK // RUN) * RUN)[:, None]
    lanes = tl.arange(0, RUN)[None, :]
    n, offs = runs // C, runs + lanes
    mask_n, mask = runs < numel * UNIT_NUMEL, offs < numel * UNIT_NUMEL

    # Ignored rows are loaded too: waiting for the targets first would leave fewer loads in flight.
    if DENSE:
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(ACC)
    else:
        # For offs % C Triton would not know that its elements are contiguous.
        places = n * (stride_gn * UNIT_GN) + (offs - n * C) * stride_gc
        grad = tl.load(grad_ptr + places, mask=mask, other=0.0).to(ACC)
    target = tl.load(target_ptr + n * stride_t, mask=mask_n, other=0).to(tl.int64)
    if PER_ROW:
        dloss = tl.load(dloss_ptr + n * stride_dloss, mask=mask_n, other=0.0).to(ACC)
    else:
        dloss = tl.load(dloss_ptr).to(ACC)
    # A select and not a factor of 0: dloss may be infinite or NaN, after a division by a count of 0.
    dx = tl.where(target != ignore_index, dloss * grad, 0.0)

    tl.store(dx_ptr + offs, round_to(dx, dx_ptr.dtype.element_ty), mask=mask)


# Bytes of a program of four warps: two accesses of 16 bytes a thread.
GRADIENT_TILE = 4096


@planned(cross_entropy_grad_kernel)
def _gradient(dloss, grad, target, dx, ignore_index):
    C, numel, vector = grad.shape[1], grad.numel(), 16 // grad.itemsize
    block = flat_block(numel, GRADIENT_TILE // grad.itemsize)
    run = 1 if C % vector else vector
    step, stride_gc = strides(grad)
    (numel, stride_gn), (unit_numel, unit_gn) = in_units(grad.itemsize, numel, step)
    stride_dloss = dloss.stride(0) if dloss.dim() else 0
    programs = cdiv(grad.numel(), block)
    return (programs,), (numel, ignore_index, stride_dloss, stride_gn, stride_gc, target.stride(0)), dict(
        UNIT_NUMEL=unit_numel, UNIT_GN=unit_gn, C=C, DENSE=grad.is_contiguous(), PER_ROW=dloss.dim() > 0,
        INDEX=index_type(dloss, grad, target, dx), ACC=acc_type(grad.dtype), BLOCK=block, RUN=run,
        num_warps=4, **OPTIONS,
    )  # fmt: skip


def gradient(dloss, grad, target, ignore_index):
    """dloss () or (N), grad (N, C), target (N) of integers -> dx (N, C)."""
    dx = shapes.cross_entropy_grad(grad)
    if dx.numel() > 0:
        _gradient((dloss, grad, target, dx), ignore_index)
    return dx
