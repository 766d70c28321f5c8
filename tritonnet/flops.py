"""How many FLOPs the operators take, for torch.utils.flop_counter.FlopCounterMode.

Each counts what torch's formula counts for the convolutions and products that it stands for; as in torch, whatever else
it computes counts nothing. A fused pooling that skips work counts like the convolution before it.
"""

import torch

from .kernels import shapes


def register() -> None:
    """Register a formula for every operator with convolutions or products; it imports torch.utils.flop_counter."""
    _register_convolutions()
    _register_products()


def _register_convolutions():
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    ours, aten = torch.ops.tritonnet, torch.ops.aten
    conv, backward = flop_registry[aten.convolution], flop_registry[aten.convolution_backward]

    @register_flop_formula([ours.conv2d, ours.conv2d_relu, ours.conv2d_epilogue, ours.conv2d_relu_max_pool2d])
    def _(x, w, bias, stride, padding, dilation, *_, **__):
        y = x[0], w[0], *shapes.conv2d_size(x[2:], w[2:], stride, padding, dilation)
        return conv(x, w, bias, stride, padding, dilation, False, out_val=y)

    @register_flop_formula(ours.norm_conv2d)
    def _(x, mean, var, scale, shift, eps, activation, slope, w, bias, stride, padding, dilation, *_, **__):
        y = x[0], w[0], *shapes.conv2d_size(x[2:], w[2:], stride, padding, dilation)
        return conv(x, w, bias, stride, padding, dilation, False, out_val=y)

    def gradients(x_at, w_at, of_x, of_w):
        """The formula of an operator whose arguments there have the sizes of x and w, and behind them the geometry."""

        def formula(*args, **_):
            x, w, (stride, padding, dilation, groups) = args[x_at], args[w_at], args[max(x_at, w_at) + 1 :][:4]
            dy = x[0], w[0], *shapes.conv2d_size(x[2:], w[2:], stride, padding, dilation)
            geometry = stride, padding, dilation, False, [0, 0], groups
            return backward(dy, x, w, None, *geometry, [of_x, of_w, False], out_val=(x, w, None))

        return formula

    for operators, formula in (
        (ours.conv2d_input_grad, gradients(2, 1, True, False)),
        (ours.conv2d_relu_max_pool2d_input_grad, gradients(3, 2, True, False)),
        (ours.conv2d_weight_grad, gradients(1, 2, False, True)),
        ([ours.conv2d_relu_weight_grad, ours.conv2d_relu_max_pool2d_weight_grad], gradients(2, 3, False, True)),
        (ours.conv2d_grads, gradients(1, 2, True, True)),
        (ours.conv2d_relu_max_pool2d_grads, gradients(2, 3, True, True)),
    ):
        register_flop_formula(operators)(formula)


def _register_products():
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    ours, mm = torch.ops.tritonnet, flop_registry[torch.ops.aten.mm]

    def product(rows, *layers):
        """Of (rows, K) with (N, K) for all of the layers."""
        return sum(mm((rows, K), (K, N)) for N, K in layers)

    @register_flop_formula([ours.linear, ours.linear_relu, ours.linear_epilogue])
    def _(x, w, *_, **__):
        return product(x[0], w)

    @register_flop_formula(ours.linear_weight_grad)
    def _(dy, x, *_, **__):
        return product(x[0], (dy[1], x[1]))

    @register_flop_formula(ours.linear_chain)
    def _(x, *layers_keep, **_):
        return product(x[0], *[w for w in layers_keep[:-1:2] if w is not None])

    @register_flop_formula(ours.linear_chain_input_grad)
    def _(dy, hidden, *weights_needs_dx, **_):
        *weights, needs_dx = weights_needs_dx
        return product(dy[0], *[w for w in weights[0 if needs_dx else 1 :] if w is not None])

    @register_flop_formula(ours.linear_chain_weight_grad)
    def _(dy, dz, x, hidden, widths, *_, **__):
        every = [*widths, dy[1]]
        return product(x[0], *zip(every, [x[1], *every]))

    @register_flop_formula(ours.squeeze_excite)
    def _(x, w1, b1, w2, *_, **__):
        return product(x[0], w1, w2)
