"""Convolutions, products and images with an epilogue: torch has no functions of these names."""

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import ops, reference
from ..kernels import shapes
from . import _checks
from ._calls import as_autocast, autocast, convolve
from ._checks import Pixels, sized

__all__ = ["conv2d_epilogue", "epilogue", "linear_epilogue", "squeeze_excite"]


def conv2d_epilogue(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Pixels = 1, padding: Pixels | str = 0,
    dilation: Pixels = 1, groups: int = 1, *,
    mean: Tensor | None = None, var: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-5, residual: Tensor | None = None, activation: str = "none", slope: float = 0.01,
) -> Tensor:  # fmt: skip
    """act((conv2d(...) - mean) * scale / sqrt(var + eps) + shift + residual) in one kernel, rounded once.

    With the running statistics, weight and bias of a BatchNorm2d, this is what it computes in evaluation.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as for conv2d.
        mean, var, scale, shift: (OC), of any floating dtype, or None for zeros, no division, ones and zeros.
        eps: added to var.
        residual: of the result's size and input's dtype, any strides, or None.
        activation: "none", "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", "gelu_tanh", "sigmoid" or
            "hardsigmoid", as in torch; "gelu_tanh" is torch's gelu with approximate="tanh".
        slope: of leaky_relu.

    Returns:
        (N, OC, OH, OW) or (OC, OH, OW), as conv2d.

    Gradients exist for all tensors, of any order. Backward recomputes the argument of leaky_relu, silu, hardswish and
    gelu, and the convolution's result for the gradients of scale and var.

    Raises:
        TypeError: an argument is not of a type above.
        RuntimeError: sizes, dtypes, devices or values do not fit together.
        ValueError: an unknown activation.
    """
    tensors: Any = (input, weight, bias, mean, var, scale, shift, residual)
    if has_torch_function(tensors):
        return handle_torch_function(
            conv2d_epilogue, tensors, input, weight, bias, stride, padding, dilation, groups,
            mean=mean, var=var, scale=scale, shift=shift, eps=eps, residual=residual,
            activation=activation, slope=slope,
        )  # fmt: skip
    vectors, values = tensors[3:7], (eps, activation, slope)
    _checks.check_activation("conv2d_epilogue", *values)
    if residual is not None and residual.dim() == 3 and input.dim() == 3:
        residual = residual.unsqueeze(0)

    def fused(x, weight, bias, *geometry):
        size = x.shape[0], weight.shape[0], *shapes.conv2d_size(x.shape[2:], weight.shape[2:], *geometry[:3])
        added = as_autocast(residual, x)
        _checks.check_epilogue("conv2d_epilogue", x, size, *vectors, added)
        return ops.conv2d_epilogue(x, weight, bias, *geometry, *vectors, added, *values)

    def rest(z):
        return reference.epilogue(z, *vectors, residual, *values)

    arguments = input, weight, bias, stride, padding, dilation, groups, "zeros"
    return convolve("conv2d_epilogue", fused, rest, *arguments)


def linear_epilogue(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    mean: Tensor | None = None, var: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-5, residual: Tensor | None = None, activation: str = "none", slope: float = 0.01,
) -> Tensor:  # fmt: skip
    """act((linear(...) - mean) * scale / sqrt(var + eps) + shift + residual) in one kernel, rounded once.

    Args:
        input, weight, bias: as for linear.
        mean, var, scale, shift: (N), of any floating dtype, or None.
        eps, residual, activation, slope: as for conv2d_epilogue.

    Returns:
        (..., N), or (...) for a weight of one dimension, of input's dtype.

    Raises:
        TypeError, RuntimeError, ValueError: as conv2d_epilogue.
    """
    name, tensors = "linear_epilogue", (input, weight, bias, mean, var, scale, shift, residual)
    if has_torch_function(tensors):
        return handle_torch_function(
            linear_epilogue, tensors, input, weight, bias, mean=mean, var=var, scale=scale, shift=shift, eps=eps,
            residual=residual, activation=activation, slope=slope,
        )  # fmt: skip
    vectors, values = tensors[3:7], (eps, activation, slope)
    _checks.check_activation(name, *values)
    _checks.check_tensors(name, input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    input, weight, bias = autocast(input, weight, bias)
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise RuntimeError(
            f"{name}: weight must be (N, K) and bias (N) or None, got size {list(weight.shape)} and "
            f"{None if bias is None else list(bias.shape)}"
        )
    _checks.check_alike(name, input=input, weight=weight, bias=bias)
    _checks.check_linear(name, input, weight, bias)
    size, rows = (*input.shape[:-1], weight.shape[0]), input.reshape(-1, input.shape[-1])
    residual = as_autocast(residual, input)
    _checks.check_epilogue(name, input, size, *vectors, residual)
    residual = residual if residual is None else residual.reshape(-1, size[-1])
    if not _checks.is_served(input, weight, bias):
        return reference.linear_epilogue(rows, weight, bias, *vectors, residual, *values).view(size)
    y = ops.linear_epilogue(rows, weight, bias, *vectors, residual, *values)
    return y if len(size) == 2 else sized(y, size)


def epilogue(
    input: Tensor, *,
    mean: Tensor | None = None, var: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-5, residual: Tensor | None = None, activation: str = "none", slope: float = 0.01,
) -> Tensor:  # fmt: skip
    """act((input - mean) * scale / sqrt(var + eps) + shift + residual) in one pass, rounded once.

    Args:
        input: (N, C, ...), or of any shape without mean, var, scale and shift; any strides.
        mean, var, scale, shift: (C), of any floating dtype, or None.
        eps, residual, activation, slope: as for conv2d_epilogue.

    Returns:
        input's shape and dtype and, if it is dense, its strides.

    Raises:
        TypeError, RuntimeError, ValueError: as conv2d_epilogue.
    """
    name, tensors = "epilogue", (input, mean, var, scale, shift, residual)
    if has_torch_function(tensors):
        return handle_torch_function(
            epilogue, tensors, input, mean=mean, var=var, scale=scale, shift=shift, eps=eps, residual=residual,
            activation=activation, slope=slope,
        )  # fmt: skip
    _checks.check_tensors(name, input=input)
    _checks.check_activation(name, eps, activation, slope)
    _checks.check_epilogue(name, input, tuple(input.shape), *tensors[1:])
    implementation = ops if _checks.is_served(input) else reference
    return implementation.epilogue(*tensors, eps, activation, slope)


def squeeze_excite(
    input: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
    activation: str = "relu", gate: str = "sigmoid",
) -> Tensor:  # fmt: skip
    """input * gate(weight2 act(weight1 mean + bias1) + bias2), where mean is that of each channel, in two kernels.

    Args:
        input: (N, C, H, W) or (C, H, W); float64, float32, float16 or bfloat16, any strides.
        weight1, weight2: (R, C) and (C, R), or with two further dimensions of 1, as 1x1 convolutions have; of input's
            dtype.
        bias1, bias2: (R) and (C), of input's dtype, or None.
        activation, gate: as conv2d_epilogue's activation, leaky_relu with torch's default slope.

    Returns:
        Of input's size and dtype, autocast's if that is on; channels_last if input is.

    Gradients exist for all tensors, of any order; with gradients the operators that it consists of run.

    Raises:
        TypeError, RuntimeError, ValueError: as conv2d_epilogue.
    """
    name, tensors = "squeeze_excite", (input, weight1, bias1, weight2, bias2)
    if has_torch_function(tensors):
        return handle_torch_function(squeeze_excite, tensors, *tensors, activation, gate)
    for act in (activation, gate):
        _checks.check_activation(name, 0.0, act, 0.0)
    biases = {argument: t for argument, t in (("bias1", bias1), ("bias2", bias2)) if t is not None}
    _checks.check_tensors(name, input=input, weight1=weight1, weight2=weight2, **biases)
    x, w1, b1, w2, b2 = autocast(*tensors)
    _checks.check_alike(name, input=x, weight1=w1, bias1=b1, weight2=w2, bias2=b2)
    x, unbatched = _checks.as_batch(name, x)
    _checks.check_squeeze_excite(name, x, w1, b1, w2, b2)
    implementation = ops if _checks.is_served(x) else reference
    y = implementation.squeeze_excite(x, w1.flatten(1), b1, w2.flatten(1), b2, activation, gate)
    return _checks.sized(y, y.shape[1:]) if unbatched else y
