"""The derivatives of a chain of linears."""

import torch

from .. import ops
from ..kernels import shapes
from ..kernels.linear_chain import layered
from ..registration import below_autograd, register_autograd
from ._common import save, total
from .linear import linear_tangent


def _as_layers(*lists):
    """Weights, or weights and biases, of a chain as its operators take them, with None for missing layers."""
    pairs = [item for layer in zip(*lists) for item in layer]
    return pairs + [None] * (len(lists) * shapes.MOST_LAYERS - len(pairs))


def _present(weights):
    return [w for w in weights if w is not None]


@register_autograd(ops.linear_chain)
class LinearChain(torch.autograd.Function):
    """y = max(max(x w1T + bias1, 0) w2T + bias2, 0) ..., over matrices; the hidden layers are the second result."""

    @staticmethod
    def forward(ctx, x, *layers_keep):
        *layers, ctx.keep = layers_keep
        y, hidden = below_autograd(ops.linear_chain, x, *layers_keep)
        ctx.set_materialize_grads(False)
        # Biases are saved to recompute hidden layers that were not kept.
        save(ctx, x, hidden, *(t if i % 2 == 0 or not ctx.keep else None for i, t in enumerate(layers)))
        return y, hidden

    @staticmethod
    def saved(ctx):
        """x, the hidden layers, recomputed if they were not kept, and the weights."""
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
            # Only some layers need gradients.
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
            t = linear_tangent((x, *h)[i], w, t, tw, tbias)
            if i < len(h):
                t = ops.relu_grad(t, h[i]) if t is not None else None
                thidden.append(t if t is not None else torch.zeros_like(h[i]))
        return t, torch.cat(thidden, 1) if ctx.keep else x.new_zeros(x.shape[0], 0)


@register_autograd(ops.linear_chain_input_grad)
class LinearChainInputGrad(torch.autograd.Function):
    """dx = dz1 w1 and dz: dy propagated back through all layers but the first, masked by each relu."""

    @staticmethod
    def forward(ctx, dy, hidden, *weights_needs_dx):
        *weights, ctx.needs_dx = weights_needs_dx
        dx, dz = below_autograd(ops.linear_chain_input_grad, dy, hidden, *weights_needs_dx)
        ctx.set_materialize_grads(False)
        save(ctx, dy, hidden, dz, *weights)
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
        # d is the gradient of dz[i] w[i]: of dx at first, then, layer by layer, of what each relu masks.
        for i, w in enumerate(weights):
            if d is not None:
                dw[i] = ops.linear_weight_grad(dz[i], d, False)[0] if needs_w[i] else None
                d = ops.linear(d, w, None)
            if i < len(h):
                d = total(d, ddz.split([t.shape[1] for t in h], 1)[i] if ddz is not None else None)
                d = ops.relu_grad(d, h[i]) if d is not None else None
        return d if needs_dy else None, None, *_as_layers(dw), None

    @staticmethod
    def jvp(ctx, tdy, _, *tweights):
        h, dz, weights = LinearChainInputGrad.saved(ctx)

        def before(i, t):
            """The tangent of dz[i] w[i], given the tangent t of dz[i]."""
            return linear_tangent(dz[i], weights[i].t(), t, None if tweights[i] is None else tweights[i].t(), None)

        t, tdz = tdy, []
        for i in reversed(range(len(h))):
            t = before(i + 1, t)
            t = ops.relu_grad(t, h[i]) if t is not None else None
            tdz.insert(0, t if t is not None else torch.zeros_like(h[i]))
        tdx = before(0, t) if ctx.needs_dx else None
        if tdx is None:
            tdx = dz[0].new_zeros(dz[0].shape[0], weights[0].shape[1] if ctx.needs_dx else 0)
        return tdx, torch.cat(tdz, 1)


@register_autograd(ops.linear_chain_weight_grad)
class LinearChainWeightGrad(torch.autograd.Function):
    """dw = dzT h and db = the sum of dz, of each layer."""

    @staticmethod
    def forward(ctx, dy, dz, x, hidden, widths, with_bias):
        save(ctx, dy, dz, x, hidden)
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
