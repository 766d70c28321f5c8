"""The derivatives of cross-entropy."""

import math

import torch

from .. import ops
from ..kernels.cross_entropy import targets
from ..registration import below_autograd, in_backward, register_autograd
from ._common import save, total


def _along(v, grad, target, ignore_index):
    """The derivative of each row's loss in the direction v of its logits: 0 in an ignored row, whatever v is there."""
    return torch.where((target.long() != ignore_index)[:, None], grad * v, 0).sum(1)


@register_autograd(ops.cross_entropy)
class CrossEntropy(torch.autograd.Function):
    """The loss and its gradient, also a result: the derivatives of the gradient are the loss's second derivatives."""

    @staticmethod
    def forward(ctx, x, target, weight, reduction, ignore_index, smoothing):
        loss, grad = below_autograd(ops.cross_entropy, x, target, weight, reduction, ignore_index, smoothing)
        ctx.set_materialize_grads(False)
        save(ctx, x, target, weight, grad)
        ctx.arguments = reduction, ignore_index, smoothing
        return loss, grad

    @staticmethod
    def curvature(ctx, v):
        """The second derivative of the loss times v: for each row, a factor times that of log-sum-exp."""
        x, target, weight, _ = ctx.saved_tensors
        reduction, ignore_index, smoothing = ctx.arguments
        C = x.shape[1]
        # Sums over rows may exceed the range of 16-bit formats.
        wide = torch.promote_types(x.dtype, torch.float32)
        kept, valid, w_target = targets.weights_of(target, weight, C, wide, ignore_index)
        scale = 1 / w_target.sum() if reduction == "mean" else 1
        factor = (1 - smoothing) * w_target * scale
        if smoothing:
            w = x.new_ones(C, dtype=wide) if weight is None else weight.to(wide)
            factor = factor + (w * (smoothing / C * scale)).sum()
        # NaN where the factor is infinite: torch adds its products with values of both signs.
        factor = torch.where(valid, factor + 0 * factor, math.nan).to(x.dtype)
        p = x.softmax(1)
        return torch.where(kept[:, None], factor[:, None] * p * (v - (p * v).sum(1, keepdim=True)), 0)

    @staticmethod
    def backward(ctx, dloss, dgrad):
        _, target, _, grad = ctx.saved_tensors
        dx = None
        if dloss is not None:
            dx = in_backward(ops.cross_entropy_grad, dloss, grad, target, ctx.arguments[1])
        return total(dx, CrossEntropy.curvature(ctx, dgrad) if dgrad is not None else None), *(None,) * 5

    @staticmethod
    def jvp(ctx, tx, *_):
        _, target, _, grad = ctx.saved_tensors
        tloss = _along(tx, grad, target, ctx.arguments[1])
        return tloss if ctx.arguments[0] == "none" else tloss.sum(), CrossEntropy.curvature(ctx, tx)


@register_autograd(ops.cross_entropy_grad)
class CrossEntropyGrad(torch.autograd.Function):
    """dx = dloss * grad, and 0 in ignored rows; linear in each factor."""

    @staticmethod
    def forward(ctx, dloss, grad, target, ignore_index):
        ctx.set_materialize_grads(False)
        save(ctx, dloss, grad, target)
        ctx.ignore_index = ignore_index
        return below_autograd(ops.cross_entropy_grad, dloss, grad, target, ignore_index)

    @staticmethod
    def backward(ctx, ddx):
        dloss, grad, target = ctx.saved_tensors
        ddloss = dgrad = None
        if ddx is not None and ctx.needs_input_grad[0]:
            ddloss = _along(ddx, grad, target, ctx.ignore_index)
            ddloss = ddloss if dloss.dim() else ddloss.sum()
        if ddx is not None and ctx.needs_input_grad[1]:
            dgrad = ops.cross_entropy_grad(dloss, ddx, target, ctx.ignore_index)
        return ddloss, dgrad, None, None

    @staticmethod
    def jvp(ctx, tdloss, tgrad, *_):
        dloss, grad, target = ctx.saved_tensors
        rest = target, ctx.ignore_index
        by_dloss = ops.cross_entropy_grad(tdloss, grad, *rest) if tdloss is not None else None
        return total(by_dloss, ops.cross_entropy_grad(dloss, tgrad, *rest) if tgrad is not None else None)
