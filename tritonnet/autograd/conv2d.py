"""The derivatives of convolutions, and of convolutions followed by relu and max-pooling."""

import torch

from .. import ops
from ..kernels import shapes
from ..registration import below_autograd, register_autograd, register_decomposition
from ._common import save, total


@register_autograd(ops.conv2d)
class Conv2d(torch.autograd.Function):
    """y = x * w + bias."""

    @staticmethod
    def forward(ctx, x, w, bias, *geometry):
        save(ctx, x, w)
        ctx.geometry = geometry
        y = below_autograd(ops.conv2d, x, w, bias, *geometry)
        ctx.size = y.shape
        return y

    @staticmethod
    def backward(ctx, dy):
        return conv2d_grads(ctx, dy, *ctx.saved_tensors, ctx.geometry)

    @staticmethod
    def jvp(ctx, tx, tw, tbias, *_):
        return conv2d_tangent(*ctx.saved_tensors, tx, tw, tbias, ctx.size, ctx.geometry)


def conv2d_grads(ctx, dy, x, w, geometry):
    """The gradients of the arguments of a convolution, the context's first, whose result has the gradient dy."""
    return *grads_of(ctx.needs_input_grad[:3], dy, x, w, geometry), *(None,) * len(geometry)


def grads_of(needs, dy, x, w, geometry):
    """The gradients of image, weight and bias of a convolution, None for those that are not needed."""
    needs_x, needs_w, needs_bias = needs
    dx = dw = db = None
    if needs_x and needs_w:
        dx, dw, db = ops.conv2d_grads(dy, x, w, *geometry, needs_bias)
    elif needs_x:
        dx = ops.conv2d_input_grad(dy, w, x.shape, *geometry)
    elif needs_w:
        dw, db = ops.conv2d_weight_grad(dy, x, w.shape, *geometry, needs_bias)
    if needs_bias and not needs_w:
        db = dy.sum((0, 2, 3))
    return dx, dw, db if needs_bias else None


@register_decomposition(ops.conv2d_grads)
def _separate_grads(dy, x, w, *geometry_with_bias):
    dx = ops.conv2d_input_grad(dy, w, x.shape, *geometry_with_bias[:-1])
    return dx, *ops.conv2d_weight_grad(dy, x, w.shape, *geometry_with_bias)


def conv2d_tangent(x, w, tx, tw, tbias, size, geometry):
    return total(
        ops.conv2d(tx, w, None, *geometry) if tx is not None else None,
        ops.conv2d(x, tw, None, *geometry) if tw is not None else None,
        tbias[:, None, None].expand(size) if tbias is not None else None,
    )


@register_autograd(ops.conv2d_relu)
class Conv2dReLU(torch.autograd.Function):
    """y = max(x * w + bias, 0)."""

    @staticmethod
    def forward(ctx, x, w, bias, *geometry):
        y = below_autograd(ops.conv2d_relu, x, w, bias, *geometry)
        save(ctx, x, w, y)
        ctx.geometry = geometry
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, y = ctx.saved_tensors
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        if needs_x or not needs_w:
            return conv2d_grads(ctx, ops.relu_grad(dy, y), x, w, ctx.geometry)
        # A first layer, whose images need no gradient: only the weight's gradient reads the masked dy.
        dw, db = ops.conv2d_relu_weight_grad(dy, y, x, w.shape, *ctx.geometry, needs_bias)
        return None, dw, db if needs_bias else None, *(None,) * len(ctx.geometry)

    @staticmethod
    def jvp(ctx, tx, tw, tbias, *_):
        x, w, y = ctx.saved_tensors
        return ops.relu_grad(conv2d_tangent(x, w, tx, tw, tbias, y.shape, ctx.geometry), y)


class _Pooled:
    """From the result of an operator that ends in pooling to its convolution's result and back.

    geometry is the convolution's, then the pooling's. Gradients need no ceil_mode, as it shows in the size of the code.
    """

    @staticmethod
    def keep(ctx, geometry, size, kernel_size):
        ctx.geometry, ctx.pool = geometry[:5], geometry[5:8]
        stride, padding, dilation = geometry[:3]
        ctx.before = shapes.conv2d_size(size[2:], kernel_size[2:], stride, padding, dilation)

    @staticmethod
    def scatter(ctx, dy, code):
        return ops.max_pool2d_scatter(dy, code, ctx.before, *ctx.pool, (1, 1))

    @staticmethod
    def gather(ctx, z, code):
        return ops.max_pool2d_gather(z, code, *ctx.pool, (1, 1))


@register_autograd(ops.conv2d_relu_max_pool2d)
class Conv2dReLUMaxPool2d(torch.autograd.Function):
    """y = the elements of x * w + bias that the code names, and 0 where it names none."""

    @staticmethod
    def forward(ctx, x, w, bias, *geometry):
        y, code = below_autograd(ops.conv2d_relu_max_pool2d, x, w, bias, *geometry)
        ctx.mark_non_differentiable(code)
        ctx.set_materialize_grads(False)
        save(ctx, x, w, code)
        _Pooled.keep(ctx, geometry, x.shape, w.shape)
        return y, code

    @staticmethod
    def backward(ctx, dy, _):
        x, w, code = ctx.saved_tensors
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        geometry = *ctx.geometry, *ctx.pool
        dx = dw = db = None
        if dy is None:
            return (None,) * 12
        if needs_x and needs_w:
            dx, dw, db = ops.conv2d_relu_max_pool2d_grads(dy, code, x, w, *geometry, needs_bias)
        elif needs_x:
            dx = ops.conv2d_relu_max_pool2d_input_grad(dy, code, w, x.shape, *geometry)
        elif needs_w:
            dw, db = ops.conv2d_relu_max_pool2d_weight_grad(dy, code, x, w.shape, *geometry, needs_bias)
        if needs_bias and not needs_w:
            db = _Pooled.scatter(ctx, dy, code).sum((0, 2, 3))
        return dx, dw, db if needs_bias else None, *(None,) * 9

    @staticmethod
    def jvp(ctx, tx, tw, tbias, *_):
        x, w, code = ctx.saved_tensors
        size = (*code.shape[:2], *ctx.before)
        return _Pooled.gather(ctx, conv2d_tangent(x, w, tx, tw, tbias, size, ctx.geometry), code), None


@register_decomposition(ops.conv2d_relu_max_pool2d_grads)
def _separate_pooled_grads(dy, code, x, w, *geometry_with_bias):
    dx = ops.conv2d_relu_max_pool2d_input_grad(dy, code, w, x.shape, *geometry_with_bias[:-1])
    return dx, *ops.conv2d_relu_max_pool2d_weight_grad(dy, code, x, w.shape, *geometry_with_bias)


@register_autograd(ops.conv2d_relu_max_pool2d_input_grad)
class Conv2dReLUMaxPool2dInputGrad(torch.autograd.Function):
    """dx = transpose(* w) of dy where the code names a pixel."""

    @staticmethod
    def forward(ctx, dy, code, w, size, *geometry):
        save(ctx, dy, code, w)
        ctx.size = size
        _Pooled.keep(ctx, geometry, size, w.shape)
        return below_autograd(ops.conv2d_relu_max_pool2d_input_grad, dy, code, w, size, *geometry)

    @staticmethod
    def backward(ctx, ddx):
        dy, code, w = ctx.saved_tensors
        needs_dy, _, needs_w = ctx.needs_input_grad[:3]
        ddy = _Pooled.gather(ctx, ops.conv2d(ddx, w, None, *ctx.geometry), code) if needs_dy else None
        dw = None
        if needs_w:
            pool = *ctx.geometry, *ctx.pool, False
            dw, _ = ops.conv2d_relu_max_pool2d_weight_grad(dy, code, ddx, w.shape, *pool)
        return ddy, None, dw, None, *(None,) * 8

    @staticmethod
    def jvp(ctx, tdy, _, tw, *__):
        dy, code, w = ctx.saved_tensors
        geometry = ctx.size, *ctx.geometry, *ctx.pool
        return total(
            ops.conv2d_relu_max_pool2d_input_grad(tdy, code, w, *geometry) if tdy is not None else None,
            ops.conv2d_relu_max_pool2d_input_grad(dy, code, tw, *geometry) if tw is not None else None,
        )


@register_autograd(ops.conv2d_relu_max_pool2d_weight_grad)
class Conv2dReLUMaxPool2dWeightGrad(torch.autograd.Function):
    """dw = dy x, summed over the pixels that the code names, and db = the sum of dy over them."""

    @staticmethod
    def forward(ctx, dy, code, x, size, *geometry_with_bias):
        (*geometry, ctx.with_bias), ctx.size = geometry_with_bias, size
        save(ctx, dy, code, x)
        ctx.set_materialize_grads(False)
        _Pooled.keep(ctx, geometry, x.shape, size)
        return below_autograd(ops.conv2d_relu_max_pool2d_weight_grad, dy, code, x, size, *geometry_with_bias)

    @staticmethod
    def backward(ctx, ddw, ddb):
        dy, code, x = ctx.saved_tensors
        needs_dy, _, needs_x = ctx.needs_input_grad[:3]
        ddb = ddb if ctx.with_bias else None
        ddz = ddy = dx = None
        if needs_dy and ddw is not None:
            ddz = ops.conv2d(x, ddw, ddb, *ctx.geometry)
        elif needs_dy and ddb is not None:
            ddz = ddb[:, None, None].expand(*dy.shape[:2], *ctx.before)
        if ddz is not None:
            ddy = _Pooled.gather(ctx, ddz, code)
        if needs_x and ddw is not None:
            dx = ops.conv2d_relu_max_pool2d_input_grad(dy, code, ddw, x.shape, *ctx.geometry, *ctx.pool)
        return ddy, None, dx, None, *(None,) * 9

    @staticmethod
    def jvp(ctx, tdy, _, tx, *__):
        dy, code, x = ctx.saved_tensors
        geometry = ctx.size, *ctx.geometry, *ctx.pool
        tdw = tdb = None
        if tdy is not None:
            tdw, tdb = ops.conv2d_relu_max_pool2d_weight_grad(tdy, code, x, *geometry, ctx.with_bias)
        else:
            tdb = dy.new_zeros(ctx.size[0] if ctx.with_bias else 0)
        if tx is not None:
            tdw = total(tdw, ops.conv2d_relu_max_pool2d_weight_grad(dy, code, tx, *geometry, False)[0])
        return tdw, tdb


@register_autograd(ops.conv2d_input_grad)
class Conv2dInputGrad(torch.autograd.Function):
    """dx = transpose(* w) dy."""

    @staticmethod
    def forward(ctx, dy, w, size, *geometry):
        save(ctx, dy, w)
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
        return total(
            ops.conv2d_input_grad(tdy, w, ctx.size, *ctx.geometry) if tdy is not None else None,
            ops.conv2d_input_grad(dy, tw, ctx.size, *ctx.geometry) if tw is not None else None,
        )


@register_autograd(ops.conv2d_weight_grad)
class Conv2dWeightGrad(torch.autograd.Function):
    """dw = dy x, summed over pixels, and db = the sum of dy."""

    @staticmethod
    def forward(ctx, dy, x, size, *geometry_with_bias):
        save(ctx, dy, x)
        ctx.set_materialize_grads(False)
        ctx.size, (*ctx.geometry, ctx.with_bias) = size, geometry_with_bias
        return below_autograd(ops.conv2d_weight_grad, dy, x, size, *geometry_with_bias)

    @staticmethod
    def backward(ctx, ddw, ddb):
        dy, x = ctx.saved_tensors
        needs_dy, needs_x = ctx.needs_input_grad[:2]
        dx = ops.conv2d_input_grad(dy, ddw, x.shape, *ctx.geometry) if needs_x and ddw is not None else None
        return _conv2d_of(ctx, x, ddw, ddb, dy.shape) if needs_dy else None, dx, *(None,) * 7

    @staticmethod
    def jvp(ctx, tdy, tx, *_):
        dy, x = ctx.saved_tensors
        tdw = tdb = None
        if tdy is not None:
            tdw, tdb = ops.conv2d_weight_grad(tdy, x, ctx.size, *ctx.geometry, ctx.with_bias)
        else:
            tdb = dy.new_zeros(ctx.size[0] if ctx.with_bias else 0)
        if tx is not None:
            tdw = total(tdw, ops.conv2d_weight_grad(dy, tx, ctx.size, *ctx.geometry, False)[0])
        return tdw, tdb


def _conv2d_of(ctx, x, ddw, ddb, size):
    """The gradient of dy, given the gradients ddw and ddb of a weight's gradient; either may be None."""
    ddb = ddb if ctx.with_bias else None
    if ddw is not None:
        return ops.conv2d(x, ddw, ddb, *ctx.geometry)
    return ddb[:, None, None].expand(size) if ddb is not None else None


@register_autograd(ops.conv2d_relu_weight_grad)
class Conv2dReLUWeightGrad(torch.autograd.Function):
    """dw = dy x, summed over the pixels whose y is above 0, and db = the sum of dy over them."""

    @staticmethod
    def forward(ctx, dy, y, x, size, *geometry_with_bias):
        save(ctx, dy, y, x)
        ctx.set_materialize_grads(False)
        ctx.size, (*ctx.geometry, ctx.with_bias) = size, geometry_with_bias
        return below_autograd(ops.conv2d_relu_weight_grad, dy, y, x, size, *geometry_with_bias)

    @staticmethod
    def backward(ctx, ddw, ddb):
        dy, y, x = ctx.saved_tensors
        needs_dy, _, needs_x = ctx.needs_input_grad[:3]
        ddy = _conv2d_of(ctx, x, ddw, ddb, dy.shape) if needs_dy else None
        dx = None
        if needs_x and ddw is not None:
            dx = ops.conv2d_input_grad(ops.relu_grad(dy, y), ddw, x.shape, *ctx.geometry)
        return ops.relu_grad(ddy, y) if ddy is not None else None, None, dx, *(None,) * 7

    @staticmethod
    def jvp(ctx, tdy, _, tx, *__):
        dy, y, x = ctx.saved_tensors
        tdw = tdb = None
        if tdy is not None:
            tdw, tdb = ops.conv2d_relu_weight_grad(tdy, y, x, ctx.size, *ctx.geometry, ctx.with_bias)
        else:
            tdb = dy.new_zeros(ctx.size[0] if ctx.with_bias else 0)
        if tx is not None:
            tdw = total(tdw, ops.conv2d_relu_weight_grad(dy, y, tx, ctx.size, *ctx.geometry, False)[0])
        return tdw, tdb
