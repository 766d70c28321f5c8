"""torch.nn.functional, with tritonnet's fused functions under their names, composed of torch's own."""

import torch
import torch.nn.functional as F


def __getattr__(name):
    return getattr(F, name)


def conv2d_relu(*args, **kwargs):
    return F.relu(F.conv2d(*args, **kwargs))


def conv2d_relu_max_pool2d(*args, pool_kernel_size=2, pool_stride=None, pool_padding=0, pool_ceil_mode=False, **kwargs):
    z = conv2d_relu(*args, **kwargs)
    return F.max_pool2d(z, pool_kernel_size, pool_stride, pool_padding, ceil_mode=pool_ceil_mode)


def linear_relu(*args):
    return F.relu(F.linear(*args))


def linear_chain(input, weights, biases):
    for weight, bias in zip(weights[:-1], biases):
        input = F.relu(F.linear(input, weight, bias))
    return F.linear(input, weights[-1], biases[-1])


def _activated(z, activation, slope):
    if activation == "none":
        return z
    if activation == "hardsigmoid":
        return F.relu6(z + 3) / 6  # torch's gradient in float64 has 1 / 6 in float32
    if activation == "leaky_relu":
        return F.leaky_relu(z, slope)
    return F.gelu(z, approximate="tanh") if activation == "gelu_tanh" else getattr(F, activation)(z)


def epilogue(
    input, *, mean=None, var=None, scale=None, shift=None, eps=1e-5, residual=None, activation="none", slope=0.01, dim=1
):
    """`dim`: the dimension of the channels, of which mean, var, scale and shift have one number each."""

    z = input

    def along(t):
        return t.view(-1, *(1,) * (z.dim() - 1 - dim))

    if mean is not None:
        z = z - along(mean)
    if var is not None:
        z = z / along((var + eps).sqrt())
    if scale is not None:
        z = z * along(scale)
    if shift is not None:
        z = z + along(shift)
    return _activated(z if residual is None else z + residual, activation, slope).to(input.dtype)


def conv2d_epilogue(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, **arguments):
    z = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return epilogue(z, dim=z.dim() - 3, **arguments)


def linear_epilogue(input, weight, bias=None, **arguments):
    return epilogue(F.linear(input, weight, bias), dim=input.dim() - 1, **arguments)


def squeeze_excite(input, weight1, bias1, weight2, bias2, activation="relu", gate="sigmoid"):
    hidden = _activated(
        F.linear(F.adaptive_avg_pool2d(input, 1).flatten(-3), weight1.flatten(1), bias1), activation, 0.01
    )
    gates = _activated(F.linear(hidden, weight2.flatten(1), bias2), gate, 0.01)
    return (input * gates[..., None, None]).to(gates.dtype)


def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """By its formula in training: torch's derivatives of a jvp take the statistics for constants (2.13)."""
    if not training or running_mean is not None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    var, mean = torch.var_mean(input, [dim for dim in range(input.dim()) if dim != 1], correction=0)
    return epilogue(input, mean=mean, var=var, scale=weight, shift=bias, eps=eps)


def batch_norm_epilogue(*args, residual=None, activation="none", slope=0.01):
    z = batch_norm(*args)
    return _activated(z if residual is None else z + residual, activation, slope)
