"""The derivatives of linear, and of linear followed by relu."""

import torch

from .. import ops
from ..registration import below_autograd, register_autograd
from ._common import save, total


def _save(ctx, x, w, *result):
    """Like torch's linear, does not save x if w is frozen, nor w if x is, so that they may be overwritten."""
    needs_x, needs_w, _ = ctx.needs_input_grad
    ctx.save_for_backward(x if needs_w else None, w if needs_x else None, *result)
    ctx.save_for_forward(x, w, *result)


@register_autograd(ops.linear)
class Linear(torch.autograd.Function):
    """y = x wT + bias, over matrices."""

    @staticmethod
    def forward(ctx, x, w, bias):
        _save(ctx, x, w)
        return below_autograd(ops.linear, x, w, bias)

    @staticmethod
    def backward(ctx, dy):
        return linear_grads(ctx, dy, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tx, tw, tbias):
        return linear_tangent(*ctx.saved_tensors, tx, tw, tbias)


@register_autograd(ops.linear_relu)
class LinearReLU(torch.autograd.Function):
    """y = max(x wT + bias, 0), over matrices."""

    @staticmethod
    def forward(ctx, x, w, bias):
        y = below_autograd(ops.linear_relu, x, w, bias)
        _save(ctx, x, w, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, y = ctx.saved_tensors
        return linear_grads(ctx, ops.relu_grad(dy, y), x, w)

    @staticmethod
    def jvp(ctx, tx, tw, tbias):
        x, w, y = ctx.saved_tensors
        return ops.relu_grad(linear_tangent(x, w, tx, tw, tbias), y)


def linear_grads(ctx, dy, x, w):
    """The gradients of the arguments of a linear layer whose result has the gradient dy."""
    needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
    dx = ops.linear(dy, w.t(), None) if needs_x else None
    dw = db = None
    if needs_w:
        dw, db = ops.linear_weight_grad(dy, x, needs_bias)
    elif needs_bias:
        db = dy.sum(0)
    return dx, dw, db if needs_bias else None


def linear_tangent(x, w, tx, tw, tbias):
    return total(
        ops.linear(tx, w, None) if tx is not None else None,
        ops.linear(x, tw, None) if tw is not None else None,
        tbias.expand(x.shape[0], -1) if tbias is not None else None,
    )


@register_autograd(ops.linear_weight_grad)
class LinearWeightGrad(torch.autograd.Function):
    """dw = dyT x and db = the sum of dy."""

    @staticmethod
    def forward(ctx, dy, x, with_bias):
        save(ctx, dy, x)
        ctx.set_materialize_grads(False)
        ctx.with_bias = with_bias
        return below_autograd(ops.linear_weight_grad, dy, x, with_bias)

    @staticmethod
    def backward(ctx, ddw, ddb):
        dy, x = ctx.saved_tensors
        needs_dy, needs_x, _ = ctx.needs_input_grad
        ddb = ddb if ctx.with_bias else None
        ddy = dx = None
        if needs_dy and ddw is not None:
            ddy = ops.linear(x, ddw, ddb)
        elif needs_dy and ddb is not None:
            ddy = ddb.expand(dy.shape)
        if needs_x and ddw is not None:
            dx = ops.linear(dy, ddw.t(), None)
        return ddy, dx, None

    @staticmethod
    def jvp(ctx, tdy, tx, _):
        dy, x = ctx.saved_tensors
        tdw = tdb = None
        if tdy is not None:
            tdw, tdb = ops.linear_weight_grad(tdy, x, ctx.with_bias)
        else:
            tdb = dy.new_zeros(dy.shape[1] if ctx.with_bias else 0)
        if tx is not None:
            tdw = total(tdw, ops.linear_weight_grad(dy, tx, False)[0])
        return tdw, tdb
