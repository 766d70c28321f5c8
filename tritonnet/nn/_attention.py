"""torch.nn.functional.multi_head_attention_forward with its products by weights on our kernels."""

from types import FunctionType
from typing import Any

import torch.nn.functional as _torch

from .functional import linear

_THEIRS: Any = _torch.multi_head_attention_forward


def _called_by(function):
    """{name: value} of torch.nn.functional's members that a function of that module uses."""
    return {name: vars(_torch)[name] for name in function.__code__.co_names if name in vars(_torch)}


def _with(function, members):
    """The function as it is written, with these members of its module."""
    made = FunctionType(function.__code__, members, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


# The functions that it calls for the products of its inputs.
_PROJECTIONS = {
    name: value
    for name, value in _called_by(_THEIRS).items()
    if isinstance(value, FunctionType) and "linear" in value.__code__.co_names and value is not _THEIRS
}
_MEMBERS = dict(item for f in (_THEIRS, *_PROJECTIONS.values()) for item in _called_by(f).items())
_OURS: dict[str, Any] = {**_MEMBERS, "__builtins__": __builtins__, "linear": linear}
_OURS |= {name: _with(projection, _OURS) for name, projection in _PROJECTIONS.items()}
_ours = _with(_THEIRS, _OURS)


def multi_head_attention_forward(*args, **kwargs):
    """torch.nn.functional.multi_head_attention_forward; its arguments and results."""
    # Who replaces a member, such as scaled_dot_product_attention, expects it to be called.
    unchanged = all([vars(_torch)[name] is member for name, member in _MEMBERS.items()])
    return (_ours if unchanged else _THEIRS)(*args, **kwargs)
