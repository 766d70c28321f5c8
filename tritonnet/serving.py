"""Gives calls of torch's own functions, in code that cannot be changed, to ours of the same arguments.

A private name of PyTorch here is `_top_saved_tensors_default_hooks`: what packs the tensors that are saved for
backward, which tells whether a checkpoint has begun.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as _torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .nn import functional as F
from .nn._attention import multi_head_attention_forward

# torch's functions and methods that ours of these names take the same arguments as, except `out`.
_SAME: dict[str, list[Callable]] = {
    "conv2d": [torch.conv2d], "linear": [_torch.linear],
    "max_pool2d": [_torch.max_pool2d, torch.max_pool2d],
    "avg_pool2d": [_torch.avg_pool2d], "adaptive_avg_pool2d": [_torch.adaptive_avg_pool2d],
    "relu": [_torch.relu, torch.relu, Tensor.relu], "relu_": [torch.relu_, Tensor.relu_],
    "relu6": [_torch.relu6], "hardtanh": [_torch.hardtanh], "hardtanh_": [_torch.hardtanh_],
    "leaky_relu": [_torch.leaky_relu], "leaky_relu_": [_torch.leaky_relu_], "silu": [_torch.silu],
    "hardswish": [_torch.hardswish], "gelu": [_torch.gelu],
    "sigmoid": [_torch.sigmoid, torch.sigmoid, Tensor.sigmoid], "hardsigmoid": [_torch.hardsigmoid],
}  # fmt: skip
OURS: dict[Any, Callable] = {theirs: getattr(F, name) for name, functions in _SAME.items() for theirs in functions}
OURS[_torch.multi_head_attention_forward] = multi_head_attention_forward
# Those that a captured graph does not hold as one call.
_IN_EAGER = {
    _torch.batch_norm: F.batch_norm,
    _torch.max_pool2d_with_indices: F.max_pool2d_with_indices,
    _torch.cross_entropy: F.cross_entropy,
}
_SERVED = OURS | _IN_EAGER
_PLAIN = torch.Tensor, torch.nn.Parameter


def _is_plain(cls):
    """Whether a class of tensors overrides no functions, as those of tracers, like FakeTensor, do not."""
    return cls in _PLAIN or cls.__torch_function__ is torch.nn.Parameter.__torch_function__


def _checkpoint():
    """What packs saved tensors, if it is torch.utils.checkpoint's: an object for each checkpoint and each rerun."""
    hooks = _top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint" else None


class _Serve(TorchFunctionMode):
    def __init__(self, checkpoint):
        super().__init__()
        self.checkpoint = checkpoint

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return (_SERVED[func] if func in _SERVED and self.serves(types, args, kwargs) else func)(*args, **kwargs)

    def serves(self, types, args, kwargs):
        # torch's functions in C++ take `x`, numpy's name, for `input`; ours, like torch's in Python, do not.
        if "out" in kwargs or "x" in kwargs or not all([_is_plain(cls) for cls in types]):
            return False
        # Others, such as DTensor, override operators, and may not know ours.
        if any([is_traceable_wrapper_subclass(t) for t in (*args, *kwargs.values())]):
            return False
        # What a checkpoint that has begun in the block runs will run again outside of it, as torch's functions.
        return torch.compiler.is_compiling() or _checkpoint() is self.checkpoint


def serve() -> TorchFunctionMode:
    """Compute calls of torch's functions inside a `with` block by ours, in code and layers that cannot be changed.

        with tritonnet.serve():
            loss = criterion(model(x), y)  # F.conv2d, torch.relu, x.relu() ... in it run on tritonnet's kernels
        loss.backward()  # and so do their gradients

    Inside the block these functions of torch, of torch.nn.functional and of tensors do what those of the same names in
    tritonnet.nn.functional do: conv2d, linear, max_pool2d, avg_pool2d, adaptive_avg_pool2d, batch_norm, cross_entropy,
    relu, relu6, hardtanh, leaky_relu, silu, hardswish, gelu, sigmoid, hardsigmoid; and the products of
    multi_head_attention_forward are ours. So torch.nn's layers are served too, and subclasses that change a weight
    before they call F.conv2d. All else is torch's, as are these with `out`, with `x` for `input`, as numpy calls it, or
    with tensors of a subclass.

    The block counts for its own thread, for code that torch.compile compiles as well, and may be nested. A function
    under torch.utils.checkpoint with use_reentrant=False, which runs again in backward and outside of the block, is
    torch's unless it opens a block itself. Functions that torch calls in C++ are not seen; the fast path of
    torch.nn.TransformerEncoder is one, and not taken in the block. Every call of a function of torch in the block takes
    some microseconds longer: `convert` is better for what it serves, and so is `fuse` for the rest if Dynamo can
    capture it.

    Returns:
        a context manager.

    Source: https://docs.pytorch.org/docs/stable/torch.overrides.html
    """
    return _Serve(None if torch.compiler.is_compiling() else _checkpoint())
