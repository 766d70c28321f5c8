"""Gives calls of torch's own functions, in code that cannot be changed, to ours of the same arguments."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as _torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
_IN_EAGER = {_torch.max_pool2d_with_indices: F.max_pool2d_with_indices, _torch.cross_entropy: F.cross_entropy}
_SERVED = OURS | _IN_EAGER
_PLAIN = torch.Tensor, torch.nn.Parameter


class _Serve(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # A tensor of another class may not know our functions.
        if func in _SERVED and "out" not in kwargs and all([cls in _PLAIN for cls in types]):
            func = _SERVED[func]
        return func(*args, **kwargs)


def serve() -> TorchFunctionMode:
    """Compute the calls of torch's functions inside a `with` block by ours, in layers and code that cannot be changed.

        with tritonnet.serve():
            y = model(x)  # F.conv2d, torch.relu, x.relu() ... in it run on tritonnet's kernels, and so do gradients

    Inside the block a call of torch's conv2d, linear, max_pool2d, avg_pool2d, adaptive_avg_pool2d, cross_entropy,
    multi_head_attention_forward or of an activation that tritonnet has (relu, relu6, hardtanh, leaky_relu, silu,
    hardswish, gelu, sigmoid, hardsigmoid), as a function of torch or torch.nn.functional or as a method of a tensor,
    does what the function of that name in tritonnet.nn.functional does. So do torch.nn's own layers, which call these,
    and subclasses that change a weight before torch's convolution. Every other call is torch's, as are these with
    `out` or with tensors of a subclass. Gradients of a result are ours wherever they are taken, inside or outside.

    It holds for this thread, until the block ends, by an exception too, and may be nested. Calls within torch's C++
    code, such as the fast path of torch.nn.TransformerEncoder, are not seen; inside the block torch does not take that
    path. Every call of any function of torch in the block takes a microsecond or two longer, so that `convert` is the
    better way for layers that it serves.

    Returns:
        a context manager, a torch.overrides.TorchFunctionMode.

    Source: https://docs.pytorch.org/docs/stable/torch.overrides.html
    """
    return _Serve()
