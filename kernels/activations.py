"""The activations of epilogues and their derivatives, in plain torch, for code without kernels.

`slope` is that of leaky_relu. The derivatives can be differentiated again.
"""

import functools
import math

import torch
import torch.nn.functional as F

FUNCTIONS = {
    "none": lambda z: z, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish, "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid,
}  # fmt: skip
# leaky_relu's where nothing else is said, as in torch.
SLOPE = 0.01
NAMES = (*FUNCTIONS, "leaky_relu")
_BY_RESULT = ("none", "relu", "relu6", "sigmoid", "hardsigmoid")


def by_result(activation, slope):
    """Whether the derivative is computed from the result y = act(z), and not from z."""
    return activation in _BY_RESULT or (activation == "leaky_relu" and slope >= 0)


def activated(z, activation, slope):
    """act(z)."""
    return F.leaky_relu(z, slope) if activation == "leaky_relu" else FUNCTIONS[activation](z)


def _of_gelu(z):
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density


def _of_gelu_tanh(z):
    factor = math.sqrt(2 / math.pi)
    t = torch.tanh(factor * (z + 0.044715 * z * z * z))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * factor * (1 + 3 * 0.044715 * z * z)


def _of_silu(z):
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


_DERIVATIVES = {
    "silu": _of_silu, "hardswish": lambda z: torch.where(z >= 3, 1.0, z / 3 + 0.5), "gelu": _of_gelu,
    "gelu_tanh": _of_gelu_tanh, "sigmoid": lambda y: y * (1 - y), "hardsigmoid": lambda y: torch.full_like(y, 1 / 6),
}  # fmt: skip


def gradient(dy, t, activation, slope):
    """dy * act'(z), of the dtype of t, which is y = act(z) or, if not `by_result`, z."""
    wide_dy, wide = (a.float() if a.dtype in (torch.float16, torch.bfloat16) else a for a in (dy, t))
    if activation == "none":
        dz = wide_dy
    elif activation in ("relu", "relu6"):
        outside = (t <= 0) | (t >= 6) if activation == "relu6" else t <= 0
        dz = torch.where(outside, 0, wide_dy)
    elif activation == "leaky_relu":
        dz = torch.where(t > 0, wide_dy, wide_dy * slope)
    else:
        dz = wide_dy * _DERIVATIVES[activation](wide)
        if activation == "hardswish":
            dz = torch.where(t <= -3, 0, dz)
        if activation == "hardsigmoid":
            dz = torch.where((t > 0) & (t < 1), dz, 0)
    return dz.to(t.dtype)
