"""torch.nn.functional's activations on tritonnet's kernels.

An input may have any shape and strides, and be float64, float32, float16 or bfloat16; other dtypes go to torch. With
inplace it is overwritten and returned. Results and gradients are torch's, at NaN, infinities and -0.0 too.
Every function raises TypeError if input is not a Tensor and, in place, RuntimeError on a leaf that requires grad or on
elements that share memory.

Source of all: https://docs.pytorch.org/docs/stable/nn.functional.html#non-linear-activation-functions
"""

import torch.nn.functional as _torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import ops
from . import _checks

__all__ = [
    "gelu", "hardsigmoid", "hardswish", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "relu", "relu6", "relu_",
    "sigmoid", "silu",
]  # fmt: skip


def _activate(activation, input, inplace, slope):
    """The activation of an input that the kernels serve."""
    if not inplace:
        return ops.epilogue(input, None, None, None, None, None, 0.0, activation, slope)
    ops.activate_(input, activation, slope)
    return input


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """torch.nn.functional.relu on tritonnet's kernels.

    Args:
        input: any shape and strides; float64, float32, float16 or bfloat16. Other dtypes go to torch.
        inplace: overwrite input and return it.

    Returns:
        0 where input < 0, else input, of its shape and dtype; NaN stays NaN.

    Raises:
        TypeError: input is not a Tensor.
        RuntimeError: inplace, on a leaf that requires grad or on elements that share memory.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.relu.html
    """
    if has_torch_function((input,)):
        return handle_torch_function(relu, (input,), input, inplace)
    _checks.check_tensors("relu", input=input)
    if not _checks.is_served(input):
        return _torch.relu(input, inplace)
    if not inplace:
        return ops.relu(input)
    ops.relu_(input)
    return input


def relu_(input: Tensor) -> Tensor:
    """relu in place; returns input."""
    return relu(input, inplace=True)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(input, 0), 6)."""
    if has_torch_function((input,)):
        return handle_torch_function(relu6, (input,), input, inplace)
    _checks.check_tensors("relu6", input=input)
    return _activate("relu6", input, inplace, 0.0) if _checks.is_served(input) else _torch.relu6(input, inplace)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """min(max(input, min_val), max_val); between 0 and 6 it is relu6, and others go to torch."""
    if has_torch_function((input,)):
        return handle_torch_function(hardtanh, (input,), input, min_val, max_val, inplace)
    _checks.check_tensors("hardtanh", input=input)
    served = _checks.is_served(input) and (min_val, max_val) == (0, 6)
    return _activate("relu6", input, inplace, 0.0) if served else _torch.hardtanh(input, min_val, max_val, inplace)


def hardtanh_(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """hardtanh in place; returns input."""
    return hardtanh(input, min_val, max_val, inplace=True)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """input where it is positive, else input * negative_slope.

    Raises:
        RuntimeError: in backward, if it was in place with a negative slope.
    """
    if has_torch_function((input,)):
        return handle_torch_function(leaky_relu, (input,), input, negative_slope, inplace)
    _checks.check_tensors("leaky_relu", input=input)
    # torch checks what is not a number, and takes tensors of one element.
    if not _checks.is_served(input) or not isinstance(negative_slope, (int, float)):
        return _torch.leaky_relu(input, negative_slope, inplace)
    return _activate("leaky_relu", input, inplace, float(negative_slope))


def leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    """leaky_relu in place; returns input."""
    return leaky_relu(input, negative_slope, inplace=True)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """input * sigmoid(input)."""
    if has_torch_function((input,)):
        return handle_torch_function(silu, (input,), input, inplace)
    _checks.check_tensors("silu", input=input)
    return _activate("silu", input, inplace, 0.0) if _checks.is_served(input) else _torch.silu(input, inplace)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """input * relu6(input + 3) / 6."""
    if has_torch_function((input,)):
        return handle_torch_function(hardswish, (input,), input, inplace)
    _checks.check_tensors("hardswish", input=input)
    return _activate("hardswish", input, inplace, 0.0) if _checks.is_served(input) else _torch.hardswish(input, inplace)


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """input times the standard normal distribution's Phi(input), or its approximation with approximate="tanh"."""
    if has_torch_function((input,)):
        return handle_torch_function(gelu, (input,), input, approximate=approximate)
    _checks.check_tensors("gelu", input=input)
    if not _checks.is_served(input) or approximate not in ("none", "tanh"):
        return _torch.gelu(input, approximate=approximate)
    return _activate("gelu" if approximate == "none" else "gelu_tanh", input, False, 0.0)


def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-input))."""
    if has_torch_function((input,)):
        return handle_torch_function(sigmoid, (input,), input)
    _checks.check_tensors("sigmoid", input=input)
    return _activate("sigmoid", input, False, 0.0) if _checks.is_served(input) else _torch.sigmoid(input)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """relu6(input + 3) / 6, whose gradient is 0 where that is 0 or 1."""
    if has_torch_function((input,)):
        return handle_torch_function(hardsigmoid, (input,), input, inplace)
    _checks.check_tensors("hardsigmoid", input=input)
    return (
        _activate("hardsigmoid", input, inplace, 0.0)
        if _checks.is_served(input)
        else _torch.hardsigmoid(input, inplace)
    )
