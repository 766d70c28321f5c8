"""The derivatives of cross-entropy."""

import math

import torch

from .. import ops
from ..kernels import indices
from ..registration import below_autograd, register_autograd
from ._common import save, total


@register_autograd(ops.cross_entropy)
class CrossEntropy(torch.autograd.Function):
    """The loss and its gradient, a result like any other: the derivatives of that are the second ones of the loss."""

    @staticmethod
    def forward(ctx, x, target, weight, reduction, ignore_index, smoothing):
        loss, grad = below_autograd(ops.cross_entropy, x, target, weight, reduction, ignore_index, smoothing)
        ctx.set_materialize_grads(False)
        save(ctx, x, target, weight, grad)
        ctx.arguments = reduction, ignore_index, smoothing
        return loss, grad

    @staticmethod
    def curvature(ctx, v):
        """The second derivative of the loss times v: a factor of each row times that of the log of its sum of exp."""
        x, target, weight, _ = ctx.saved_tensors
        reduction, ignore_index, smoothing = ctx.arguments
        C = x.shape[1]
        # Sums over rows may be more than 16 bits hold.
        wide = torch.promote_types(x.dtype, torch.float32)
        kept, valid, w_target = indices.weights_of(target, weight, C, wide, ignore_index)
        scale = 1 / w_target.sum() if reduction == "mean" else 1
        factor = (1 - smoothing) * w_target * scale
        if smoothing:
            w = x.new_ones(C, dtype=wide) if weight is None else weight.to(wide)
            factor = factor + (w * (smoothing / C * scale)).sum()
        # NaN where the factor is infinite: torch adds its products with numbers of both signs.
        factor = torch.where(valid, factor + 0 * factor, math.nan).to(x.dtype)
        p = x.softmax(1)
        return torch.where(kept[:, None], factor[:, None] * p * (v - (p * v).sum(1, keepdim=True)), 0)

    @staticmethod
    def backward(ctx, dloss, dgrad):
        *_, grad = ctx.saved_tensors
        dx = None
        if dloss is not None:
            dx = (dloss[:, None] if ctx.arguments[0] == "none" else dloss) * grad
        return total(dx, CrossEntropy.curvature(ctx, dgrad) if dgrad is not None else None), *(None,) * 5

    @staticmethod
    def jvp(ctx, tx, *_):
        _, target, _, grad = ctx.saved_tensors
        # An ignored row has no part in it, whatever its tangent is.
        tloss = torch.where((target.long() != ctx.arguments[1])[:, None], grad * tx, 0).sum(1)
        return tloss if ctx.arguments[0] == "none" else tloss.sum(), CrossEntropy.curvature(ctx, tx)
