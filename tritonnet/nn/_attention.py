"""torch.nn.functional.multi_head_attention_forward with its products on our kernels."""

from types import FunctionType
from typing import Any

import torch.nn.functional as _torch

from .functional import linear

# torch's functions that multiply by weights, the last of which calls the others.
_FUNCTIONS = (
    _torch._in_projection_packed, _torch._in_projection, _torch.multi_head_attention_forward,
)  # fmt: skip
# What they call. Another library may replace some of it, such as scaled_dot_product_attention, and then expects a call.
_CALLED = {name: vars(_torch)[name] for f in _FUNCTIONS for name in f.__code__.co_names if name in vars(_torch)}
_GLOBALS: dict[str, Any] = {**_CALLED, "__builtins__": __builtins__, "linear": linear}


def _with_our_linear(function):
    """The function as it is written, in which `linear` is ours."""
    made = FunctionType(function.__code__, _GLOBALS, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


_GLOBALS |= {function.__name__: _with_our_linear(function) for function in _FUNCTIONS[:2]}
_forward = _with_our_linear(_FUNCTIONS[2])


def multi_head_attention_forward(*args, **kwargs):
    """torch.nn.functional.multi_head_attention_forward; its arguments and results."""
    unchanged = all([vars(_torch)[name] is function for name, function in _CALLED.items()])
    return (_forward if unchanged else _torch.multi_head_attention_forward)(*args, **kwargs)
