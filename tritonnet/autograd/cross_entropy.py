"""The derivatives of cross-entropy."""

import torch

from .. import ops
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
        kept = target != ignore_index
        w = x.new_ones(x.shape[1]) if weight is None else weight
        w_target = torch.where(kept, w[torch.where(kept, target, 0).long()], 0)
        factor = (1 - smoothing) * w_target + torch.where(kept, w.sum() * (smoothing / x.shape[1]), 0)
        if reduction == "mean":
            factor = factor / w_target.sum()
        p = x.softmax(1)
        return factor[:, None] * p * (v - (p * v).sum(1, keepdim=True))

    @staticmethod
    def backward(ctx, dloss, dgrad):
        *_, grad = ctx.saved_tensors
        dx = None
        if dloss is not None:
            dx = (dloss[:, None] if ctx.arguments[0] == "none" else dloss) * grad
        return total(dx, CrossEntropy.curvature(ctx, dgrad) if dgrad is not None else None), *(None,) * 5

    @staticmethod
    def jvp(ctx, tx, *_):
        *_, grad = ctx.saved_tensors
        tloss = (grad * tx).sum(1)
        return tloss if ctx.arguments[0] == "none" else tloss.sum(), CrossEntropy.curvature(ctx, tx)
