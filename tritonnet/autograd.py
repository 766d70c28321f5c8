"""The derivatives: each family of operators is closed, so that any order and forward mode come out of itself."""

import torch

from . import ops
from .kernels import layered, shapes
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
        return _conv2d_grads(ctx, dy, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tx, tw, tbias, *_):
        return _conv2d_tangent(*ctx.saved_tensors, tx, tw, tbias, ctx.size, ctx.geometry)


def _conv2d_grads(ctx, dy, x, w):
    """The gradients of the arguments of a convolution whose result has the gradient dy."""
    needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
    dx = dw = db = None
    if needs_x:
        dx = ops.conv2d_input_grad(dy, w, x.shape, *ctx.geometry)
    if needs_w:
        dw, db = ops.conv2d_weight_grad(dy, x, w.shape, *ctx.geometry, needs_bias)
    elif needs_bias:
        db = dy.sum((0, 2, 3))
    return dx, dw, db if needs_bias else None, *(None,) * len(ctx.geometry)


def _conv2d_tangent(x, w, tx, tw, tbias, size, geometry):
    return _sum(
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
        _save(ctx, x, w, y)
        ctx.geometry = geometry
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, y = ctx.saved_tensors
        return _conv2d_grads(ctx, ops.relu_grad(dy, y), x, w)

    @staticmethod
    def jvp(ctx, tx, tw, tbias, *_):
        x, w, y = ctx.saved_tensors
        return ops.relu_grad(_conv2d_tangent(x, w, tx, tw, tbias, y.shape, ctx.geometry), y)


class _Pooled:
    """How the operators that end in a pooling reach the convolution in front of it: geometry is both of theirs."""

    @staticmethod
    def keep(ctx, geometry, size, kernel_size):
        ctx.geometry, ctx.pool = geometry[:5], geometry[5:]
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
        _save(ctx, x, w, code)
        _Pooled.keep(ctx, geometry, x.shape, w.shape)
        return y, code

    @staticmethod
    def backward(ctx, dy, _):
        x, w, code = ctx.saved_tensors
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        geometry = *ctx.geometry, *ctx.pool
        dx = dw = db = None
        if needs_x and dy is not None:
            dx = ops.conv2d_relu_max_pool2d_input_grad(dy, code, w, x.shape, *geometry)
        if needs_w and dy is not None:
            dw, db = ops.conv2d_relu_max_pool2d_weight_grad(dy, code, x, w.shape, *geometry, needs_bias)
        elif needs_bias and dy is not None:
            db = _Pooled.scatter(ctx, dy, code).sum((0, 2, 3))
        return dx, dw, db if needs_bias else None, *(None,) * len(geometry)

    @staticmethod
    def jvp(ctx, tx, tw, tbias, *_):
        x, w, code = ctx.saved_tensors
        size = (*code.shape[:2], *ctx.before)
        return _Pooled.gather(ctx, _conv2d_tangent(x, w, tx, tw, tbias, size, ctx.geometry), code), None


@register_autograd(ops.conv2d_relu_max_pool2d_input_grad)
class Conv2dReLUMaxPool2dInputGrad(torch.autograd.Function):
    """dx = transpose(* w) of dy where the code names a pixel."""

    @staticmethod
    def forward(ctx, dy, code, w, size, *geometry):
        _save(ctx, dy, code, w)
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
        return _sum(
            ops.conv2d_relu_max_pool2d_input_grad(tdy, code, w, *geometry) if tdy is not None else None,
            ops.conv2d_relu_max_pool2d_input_grad(dy, code, tw, *geometry) if tw is not None else None,
        )


@register_autograd(ops.conv2d_relu_max_pool2d_weight_grad)
class Conv2dReLUMaxPool2dWeightGrad(torch.autograd.Function):
    """dw = dy x, summed over the pixels that the code names, and db = the sum of dy over them."""

    @staticmethod
    def forward(ctx, dy, code, x, size, *geometry_with_bias):
        (*geometry, ctx.with_bias), ctx.size = geometry_with_bias, size
        _save(ctx, dy, code, x)
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
            tdw = _sum(tdw, ops.conv2d_relu_max_pool2d_weight_grad(dy, code, tx, *geometry, False)[0])
        return tdw, tdb


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
        return _linear_grads(ctx, dy, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tx, tw, tbias):
        return _linear_tangent(*ctx.saved_tensors, tx, tw, tbias)


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
        return _linear_grads(ctx, ops.relu_grad(dy, y), x, w)

    @staticmethod
    def jvp(ctx, tx, tw, tbias):
        x, w, y = ctx.saved_tensors
        return ops.relu_grad(_linear_tangent(x, w, tx, tw, tbias), y)


def _linear_grads(ctx, dy, x, w):
    """The gradients of the arguments of a linear layer whose result has the gradient dy."""
    needs_x, needs_w, needs_bias = ctx.needs_input_grad
    dx = ops.linear(dy, w.t(), None) if needs_x else None
    dw = db = None
    if needs_w:
        dw, db = ops.linear_weight_grad(dy, x, needs_bias)
    elif needs_bias:
        db = dy.sum(0)
    return dx, dw, db if needs_bias else None


def _linear_tangent(x, w, tx, tw, tbias):
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


def _as_layers(*lists):
    """Weights, or weights and biases, of a chain as its operators take them, None for the layers that lack."""
    pairs = [item for layer in zip(*lists) for item in layer]
    return pairs + [None] * (len(lists) * shapes.MOST_LAYERS - len(pairs))


def _present(weights):
    return [w for w in weights if w is not None]


@register_autograd(ops.linear_chain)
class LinearChain(torch.autograd.Function):
    """y = max(max(x w1T + bias1, 0) w2T + bias2, 0) ..., over matrices; the hidden layers are a result of their own."""

    @staticmethod
    def forward(ctx, x, *layers_keep):
        *layers, ctx.keep = layers_keep
        y, hidden = below_autograd(ops.linear_chain, x, *layers_keep)
        ctx.set_materialize_grads(False)
        _save(ctx, x, hidden, *layers)
        return y, hidden

    @staticmethod
    def saved(ctx):
        """x, the hidden layers, computed anew where they were not kept, and the weights."""
        x, hidden, *layers = ctx.saved_tensors
        if not ctx.keep:
            _, hidden = ops.linear_chain(x, *layers, True)
        return x, hidden, _present(layers[0::2])

    @staticmethod
    def backward(ctx, dy, dhidden):
        x, hidden, weights = LinearChain.saved(ctx)
        widths, layers = shapes.widths(weights), range(len(weights))
        needs_x, needs_w, needs_bias = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1:-1:2],
            ctx.needs_input_grad[2:-1:2],
        )
        if not ctx.keep:
            dhidden = None
        if dy is None:
            dy = x.new_zeros(x.shape[0], widths[-1])
        dx = dz = None
        if needs_x or any(needs_w[i] or needs_bias[i] for i in layers[:-1]):
            if dhidden is None:
                dx, dz = ops.linear_chain_input_grad(dy, hidden, *_as_layers(weights), needs_x)
            else:
                dx, dz = layered.input_grad(ops, dy, hidden, *weights, needs_x, dhidden=dhidden)
        dw, db = [None] * len(weights), [None] * len(weights)
        if all(needs_w[i] for i in layers):
            every = ops.linear_chain_weight_grad(dy, dz, x, hidden, widths[:-1], any(needs_bias))
            dw = [d.view_as(w) for d, w in zip(every[0].split([w.numel() for w in weights]), weights)]
            db = every[1].split(widths) if any(needs_bias) else db
        elif any(needs_w) or any(needs_bias):
            # Of some layers only.
            d, a = (*(dz.split(widths[:-1], 1) if dz is not None else db[:-1]), dy), (x, *hidden.split(widths[:-1], 1))
            for i in layers:
                if needs_w[i]:
                    dw[i], db[i] = ops.linear_weight_grad(d[i], a[i], needs_bias[i])
                elif needs_bias[i]:
                    db[i] = d[i].sum(0)
        db = [d if needs else None for d, needs in zip(db, needs_bias)]
        return dx if needs_x else None, *_as_layers(dw, db), None

    @staticmethod
    def jvp(ctx, tx, *tlayers):
        x, hidden, weights = LinearChain.saved(ctx)
        widths = shapes.widths(weights)
        h, t, thidden = hidden.split(widths[:-1], 1), tx, []
        for i, (w, tw, tbias) in enumerate(zip(weights, tlayers[0::2], tlayers[1::2])):
            t = _linear_tangent((x, *h)[i], w, t, tw, tbias)
            if i < len(h):
                t = ops.relu_grad(t, h[i]) if t is not None else None
                thidden.append(t if t is not None else torch.zeros_like(h[i]))
        return t, torch.cat(thidden, 1) if ctx.keep else x.new_zeros(x.shape[0], 0)


@register_autograd(ops.linear_chain_input_grad)
class LinearChainInputGrad(torch.autograd.Function):
    """dx = dz1 w1 and dz: dy back through all layers but the first, where a rectifier let something through."""

    @staticmethod
    def forward(ctx, dy, hidden, *weights_needs_dx):
        *weights, ctx.needs_dx = weights_needs_dx
        dx, dz = below_autograd(ops.linear_chain_input_grad, dy, hidden, *weights_needs_dx)
        ctx.set_materialize_grads(False)
        _save(ctx, dy, hidden, dz, *weights)
        return dx, dz

    @staticmethod
    def saved(ctx):
        """The hidden layers one by one, the gradients of all layers, and the weights."""
        dy, hidden, dz, *weights = ctx.saved_tensors
        weights = _present(weights)
        widths = shapes.widths(weights)[:-1]
        return hidden.split(widths, 1), (*dz.split(widths, 1), dy), weights

    @staticmethod
    def backward(ctx, ddx, ddz):
        h, dz, weights = LinearChainInputGrad.saved(ctx)
        needs_dy, _, *needs_w, _ = ctx.needs_input_grad
        dw, d = [None] * len(weights), ddx if ctx.needs_dx else None
        # d is the gradient of dz[i] w[i], first for dx and then, from layer to layer, for what the rectifiers let past.
        for i, w in enumerate(weights):
            if d is not None:
                dw[i] = ops.linear_weight_grad(dz[i], d, False)[0] if needs_w[i] else None
                d = ops.linear(d, w, None)
            if i < len(h):
                d = _sum(d, ddz.split([t.shape[1] for t in h], 1)[i] if ddz is not None else None)
                d = ops.relu_grad(d, h[i]) if d is not None else None
        return d if needs_dy else None, None, *_as_layers(dw), None

    @staticmethod
    def jvp(ctx, tdy, _, *tweights):
        h, dz, weights = LinearChainInputGrad.saved(ctx)

        def before(i, t):
            """The tangent of dz[i] w[i], when that of dz[i] is t."""
            return _linear_tangent(dz[i], weights[i].t(), t, None if tweights[i] is None else tweights[i].t(), None)

        t, tdz = tdy, []
        for i in reversed(range(len(h))):
            t = before(i + 1, t)
            t = ops.relu_grad(t, h[i]) if t is not None else None
            tdz.insert(0, t if t is not None else torch.zeros_like(h[i]))
        tdx = before(0, t) if ctx.needs_dx else dz[0].new_zeros(dz[0].shape[0], 0)
        return tdx, torch.cat(tdz, 1)


@register_autograd(ops.linear_chain_weight_grad)
class LinearChainWeightGrad(torch.autograd.Function):
    """dw = dzT h and db = the sum of dz, of each layer."""

    @staticmethod
    def forward(ctx, dy, dz, x, hidden, widths, with_bias):
        _save(ctx, dy, dz, x, hidden)
        ctx.set_materialize_grads(False)
        ctx.widths, ctx.with_bias = widths, with_bias
        return below_autograd(ops.linear_chain_weight_grad, dy, dz, x, hidden, widths, with_bias)

    @staticmethod
    def backward(ctx, ddw, ddb):
        dy, dz, x, hidden = ctx.saved_tensors
        every = *ctx.widths, dy.shape[1]
        d, a = (*dz.split(ctx.widths, 1), dy), (x, *hidden.split(ctx.widths, 1))
        sizes = [n * k.shape[1] for n, k in zip(every, a)]
        ddw = ddw.split(sizes) if ddw is not None else [dy.new_zeros(size) for size in sizes]
        ddb = ddb.split(every) if ddb is not None and ctx.with_bias else [None] * len(every)
        ddw = [g.view(n, -1) for g, n in zip(ddw, every)]
        ddy = ddz = dx = dhidden = None
        if any(ctx.needs_input_grad[:2]):
            *ddz, ddy = (ops.linear(k, g, b) for k, g, b in zip(a, ddw, ddb))
            ddz = torch.cat(ddz, 1)
        if any(ctx.needs_input_grad[2:4]):
            dx, *dhidden = (ops.linear(g, w.t(), None) for g, w in zip(d, ddw))
            dhidden = torch.cat(dhidden, 1)
        return ddy, ddz, dx, dhidden, None, None

    @staticmethod
    def jvp(ctx, tdy, tdz, tx, thidden, *_):
        dy, dz, x, hidden = ctx.saved_tensors
        tdy, tdz, tx, thidden = (
            torch.zeros_like(t) if tangent is None else tangent
            for t, tangent in zip((dy, dz, x, hidden), (tdy, tdz, tx, thidden))
        )
        tdw, tdb = ops.linear_chain_weight_grad(tdy, tdz, x, hidden, ctx.widths, ctx.with_bias)
        return tdw + ops.linear_chain_weight_grad(dy, dz, tx, thidden, ctx.widths, False)[0], tdb


@register_autograd(ops.cross_entropy)
class CrossEntropy(torch.autograd.Function):
    """The loss and its gradient, a result like any other: the derivatives of that are the second ones of the loss."""

    @staticmethod
    def forward(ctx, x, target, weight, reduction, ignore_index, smoothing):
        loss, grad = below_autograd(ops.cross_entropy, x, target, weight, reduction, ignore_index, smoothing)
        ctx.set_materialize_grads(False)
        _save(ctx, x, target, weight, grad)
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
        return _sum(dx, CrossEntropy.curvature(ctx, dgrad) if dgrad is not None else None), *(None,) * 5

    @staticmethod
    def jvp(ctx, tx, *_):
        *_, grad = ctx.saved_tensors
        tloss = (grad * tx).sum(1)
        return tloss if ctx.arguments[0] == "none" else tloss.sum(), CrossEntropy.curvature(ctx, tx)
