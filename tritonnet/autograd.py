"""The derivatives: each family of operators is closed, so that any order and forward mode come out of itself."""

import torch

from . import ops
from .registration import below_autograd, register_autograd


def _sum(*terms):
    """The sum of the terms that are not None, or None."""
    terms = [term for term in terms if term is not None]
    return sum(terms[1:], terms[0]) if terms else None


def _save(ctx, *tensors):
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


@register_autograd(ops.conv2d)
class Conv2d(torch.autograd.Function):
    """y = x * w + bias."""

    @staticmethod
    def forward(ctx, x, w, bias, *geometry):
        _save(ctx, x, w)
        ctx.geometry = geometry
        y = below_autograd(ops.conv2d, x, w, bias, *geometry)
        ctx.size = y.shape
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if needs_x:
            dx = ops.conv2d_input_grad(dy, w, x.shape, *ctx.geometry)
        if needs_w:
            dw, db = ops.conv2d_weight_grad(dy, x, w.shape, *ctx.geometry, needs_bias)
        elif needs_bias:
            db = dy.sum((0, 2, 3))
        return dx, dw, db if needs_bias else None, *(None,) * len(ctx.geometry)

    @staticmethod
    def jvp(ctx, tx, tw, tbias, *_):
        x, w = ctx.saved_tensors
        return _sum(
            ops.conv2d(tx, w, None, *ctx.geometry) if tx is not None else None,
            ops.conv2d(x, tw, None, *ctx.geometry) if tw is not None else None,
            tbias[:, None, None].expand(ctx.size) if tbias is not None else None,
        )


@register_autograd(ops.conv2d_input_grad)
class Conv2dInputGrad(torch.autograd.Function):
    """dx = transpose(* w) dy."""

    @staticmethod
    def forward(ctx, dy, w, size, *geometry):
        _save(ctx, dy, w)
        ctx.size, ctx.geometry = size, geometry
        return below_autograd(ops.conv2d_input_grad, dy, w, size, *geometry)

    @staticmethod
    def backward(ctx, ddx):
        dy, w = ctx.saved_tensors
        needs_dy, needs_w = ctx.needs_input_grad[:2]
        ddy = ops.conv2d(ddx, w, None, *ctx.geometry) if needs_dy else None
        dw = ops.conv2d_weight_grad(dy, ddx, w.shape, *ctx.geometry, False)[0] if needs_w else None
        return ddy, dw, None, *(None,) * len(ctx.geometry)

    @staticmethod
    def jvp(ctx, tdy, tw, *_):
        dy, w = ctx.saved_tensors
        return _sum(
            ops.conv2d_input_grad(tdy, w, ctx.size, *ctx.geometry) if tdy is not None else None,
            ops.conv2d_input_grad(dy, tw, ctx.size, *ctx.geometry) if tw is not None else None,
        )


@register_autograd(ops.conv2d_weight_grad)
class Conv2dWeightGrad(torch.autograd.Function):
    """dw = dy x, summed over pixels, and db = the sum of dy."""

    @staticmethod
    def forward(ctx, dy, x, size, *geometry_with_bias):
        _save(ctx, dy, x)
        ctx.set_materialize_grads(False)
        ctx.size, (*ctx.geometry, ctx.with_bias) = size, geometry_with_bias
        return below_autograd(ops.conv2d_weight_grad, dy, x, size, *geometry_with_bias)

    @staticmethod
    def backward(ctx, ddw, ddb):
        dy, x = ctx.saved_tensors
        needs_dy, needs_x = ctx.needs_input_grad[:2]
        ddb = ddb if ctx.with_bias else None
        ddy = dx = None
        if needs_dy and ddw is not None:
            ddy = ops.conv2d(x, ddw, ddb, *ctx.geometry)
        elif needs_dy and ddb is not None:
            ddy = ddb[:, None, None].expand(dy.shape)
        if needs_x and ddw is not None:
            dx = ops.conv2d_input_grad(dy, ddw, x.shape, *ctx.geometry)
        return ddy, dx, None, *(None,) * len(ctx.geometry), None

    @staticmethod
    def jvp(ctx, tdy, tx, *_):
        dy, x = ctx.saved_tensors
        tdw = tdb = None
        if tdy is not None:
            tdw, tdb = ops.conv2d_weight_grad(tdy, x, ctx.size, *ctx.geometry, ctx.with_bias)
        else:
            tdb = dy.new_zeros(ctx.size[0] if ctx.with_bias else 0)
        if tx is not None:
            tdw = _sum(tdw, ops.conv2d_weight_grad(dy, tx, ctx.size, *ctx.geometry, False)[0])
        return tdw, tdb


@register_autograd(ops.max_pool2d)
class MaxPool2d(torch.autograd.Function):
    """y = the elements of x that the code names."""

    @staticmethod
    def forward(ctx, x, kernel, stride, padding, dilation, ceil_mode):
        y, code = below_autograd(ops.max_pool2d, x, kernel, stride, padding, dilation, ceil_mode)
        ctx.mark_non_differentiable(code)
        ctx.set_materialize_grads(False)
        _save(ctx, code)
        ctx.size, ctx.window = x.shape[2:], (kernel, stride, padding, dilation)
        return y, code

    @staticmethod
    def backward(ctx, dy, _):
        (code,) = ctx.saved_tensors
        dx = None if dy is None else ops.max_pool2d_scatter(dy, code, ctx.size, *ctx.window)
        return dx, None, None, None, None, None

    @staticmethod
    def jvp(ctx, tx, *_):
        (code,) = ctx.saved_tensors
        return ops.max_pool2d_gather(tx, code, *ctx.window), None


@register_autograd(ops.max_pool2d_scatter)
class MaxPool2dScatter(torch.autograd.Function):
    """dx = dy where the code names a pixel; the transpose of the gather."""

    @staticmethod
    def forward(ctx, dy, code, size, *window):
        _save(ctx, code)
        ctx.size, ctx.window = size, window
        return below_autograd(ops.max_pool2d_scatter, dy, code, size, *window)

    @staticmethod
    def backward(ctx, ddx):
        (code,) = ctx.saved_tensors
        return ops.max_pool2d_gather(ddx, code, *ctx.window), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx, tdy, *_):
        (code,) = ctx.saved_tensors
        return ops.max_pool2d_scatter(tdy, code, ctx.size, *ctx.window)


@register_autograd(ops.max_pool2d_gather)
class MaxPool2dGather(torch.autograd.Function):
    """t = the elements of x that the code names; the transpose of the scatter."""

    @staticmethod
    def forward(ctx, x, code, *window):
        _save(ctx, code)
        ctx.size, ctx.window = x.shape[2:], window
        return below_autograd(ops.max_pool2d_gather, x, code, *window)

    @staticmethod
    def backward(ctx, dt):
        (code,) = ctx.saved_tensors
        return ops.max_pool2d_scatter(dt, code, ctx.size, *ctx.window), None, None, None, None, None

    @staticmethod
    def jvp(ctx, tx, *_):
        (code,) = ctx.saved_tensors
        return ops.max_pool2d_gather(tx, code, *ctx.window)


@register_autograd(ops.relu)
class ReLU(torch.autograd.Function):
    """y = max(x, 0); its result says all that the gradient needs."""

    @staticmethod
    def forward(ctx, x):
        y = below_autograd(ops.relu, x)
        _save(ctx, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return ops.relu_grad(dy, y)

    @staticmethod
    def jvp(ctx, tx):
        (y,) = ctx.saved_tensors
        return ops.relu_grad(tx, y)


@register_autograd(ops.relu_)
class ReLUInplace(torch.autograd.Function):
    """x = max(x, 0), overwritten."""

    @staticmethod
    def forward(ctx, x):
        below_autograd(ops.relu_, x)
        ctx.mark_dirty(x)
        _save(ctx, x)
        return x

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return ops.relu_grad(dy, y)

    @staticmethod
    def jvp(ctx, tx):
        (y,) = ctx.saved_tensors
        tx.copy_(ops.relu_grad(tx, y))
        # The engine tells by its version that the tangent was overwritten, and that of a batch does not count copies.
        torch.autograd.graph.increment_version(tx)
        return tx


@register_autograd(ops.relu_grad)
class ReLUGrad(torch.autograd.Function):
    """dx = dy where y > 0; a constant factor in dy."""

    @staticmethod
    def forward(ctx, dy, y):
        _save(ctx, y)
        return below_autograd(ops.relu_grad, dy, y)

    @staticmethod
    def backward(ctx, ddx):
        (y,) = ctx.saved_tensors
        return ops.relu_grad(ddx, y) if ctx.needs_input_grad[0] else None, None

    @staticmethod
    def jvp(ctx, tdy, _):
        (y,) = ctx.saved_tensors
        return ops.relu_grad(tdy if tdy is not None else torch.zeros_like(y), y)


@register_autograd(ops.linear)
class Linear(torch.autograd.Function):
    """y = x wT + bias, over matrices."""

    @staticmethod
    def forward(ctx, x, w, bias):
        _save(ctx, x, w)
        return below_autograd(ops.linear, x, w, bias)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_bias = ctx.needs_input_grad
        dx = ops.linear(dy, w.t(), None) if needs_x else None
        dw = db = None
        if needs_w:
            dw, db = ops.linear_weight_grad(dy, x, needs_bias)
        elif needs_bias:
            db = dy.sum(0)
        return dx, dw, db if needs_bias else None

    @staticmethod
    def jvp(ctx, tx, tw, tbias):
        x, w = ctx.saved_tensors
        return _sum(
            ops.linear(tx, w, None) if tx is not None else None,
            ops.linear(x, tw, None) if tw is not None else None,
            tbias.expand(x.shape[0], -1) if tbias is not None else None,
        )


@register_autograd(ops.linear_weight_grad)
class LinearWeightGrad(torch.autograd.Function):
    """dw = dyT x and db = the sum of dy."""

    @staticmethod
    def forward(ctx, dy, x, with_bias):
        _save(ctx, dy, x)
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
            tdw = _sum(tdw, ops.linear_weight_grad(dy, tx, False)[0])
        return tdw, tdb
