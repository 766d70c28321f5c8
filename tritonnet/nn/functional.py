"""torch.nn.functional with conv2d, pooling, activations, linear and cross_entropy on tritonnet's kernels.

Fused functions are added; every other name is torch's.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as _torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import autograd, batching, ops  # noqa: F401  (the first two register the operators' rules)
from ..kernels import shapes
from ..registration import in_transforms
from . import _activations, _checks, _epilogue, _norm
from ._activations import *  # noqa: F403
from ._calls import autocast, convolve
from ._checks import Pixels, sized
from ._epilogue import *  # noqa: F403
from ._norm import batch_norm, batch_norm_epilogue  # noqa: F401
from ._pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d, max_pool2d_with_indices  # noqa: F401
from ._stand_in import stand_in

__getattr__, __dir__, __all__ = stand_in(__name__, _torch)
__all__ += [*_epilogue.__all__, *_norm.__all__, "conv2d_relu", "conv2d_relu_max_pool2d", "linear_chain", "linear_relu"]


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Pixels = 1, padding: Pixels | str = 0,
    dilation: Pixels = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.conv2d on tritonnet's kernels.

    Args:
        input: (N, C, H, W) or (C, H, W); float64, float32, float16 or bfloat16, any strides. Other dtypes go to torch.
        weight: (OC, C / groups, KH, KW), of input's dtype.
        bias: (OC), of input's dtype, or None.
        stride, dilation: pixels, an integer or a pair (height, width).
        padding: pixels of zeros on every side, an integer or a pair, or "valid" (none) or "same" (OH = H, OW = W).
        groups: number of groups of channels that are convolved separately.

    Returns:
        (N, OC, OH, OW) or (OC, OH, OW), of input's dtype; channels_last if input or weight is.

    Raises:
        TypeError: an argument is not of a type above.
        RuntimeError: sizes, dtypes, devices or values do not fit together, as in torch.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.conv2d.html
    """
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(
            conv2d, (input, weight, bias), input, weight, bias, stride, padding, dilation, groups
        )
    return _conv2d(input, weight, bias, stride, padding, dilation, groups, "zeros")


def _conv2d(input, weight, bias, stride, padding, dilation, groups, pad_mode):
    """conv2d with padding by `pad_mode`: "zeros", "reflect", "replicate" or "circular"."""
    return convolve("conv2d", ops.conv2d, lambda y: y, input, weight, bias, stride, padding, dilation, groups, pad_mode)


def conv2d_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Pixels = 1, padding: Pixels | str = 0,
    dilation: Pixels = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """relu(conv2d(...)) in one kernel: the same results and gradients, with one pass over memory less.

    Args:
        All arguments: as for conv2d.

    Returns:
        (N, OC, OH, OW) or (OC, OH, OW), as conv2d.

    Raises:
        TypeError, RuntimeError: as conv2d.
    """
    tensors = input, weight, bias
    if has_torch_function(tensors):
        return handle_torch_function(conv2d_relu, tensors, *tensors, stride, padding, dilation, groups)
    return _conv2d_relu(*tensors, stride, padding, dilation, groups, "zeros")


def _conv2d_relu(*arguments):
    return convolve("conv2d_relu", ops.conv2d_relu, _torch.relu, *arguments)


def conv2d_relu_max_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Pixels = 1, padding: Pixels | str = 0,
    dilation: Pixels = 1, groups: int = 1,
    pool_kernel_size: Pixels = 2, pool_stride: Pixels | None = None, pool_padding: Pixels = 0,
    pool_ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    """max_pool2d(relu(conv2d(...))) in one kernel, which writes the pooled result and the code of each maximum.

    Results and gradients are those of the three functions one after the other: the convolution's result is rounded to
    its dtype before the maximum is taken. Below 16 input channels, without groups, in
    whole unpadded 2x2 windows and in tf32, float16 or bfloat16, a faster kernel rounds after taking the maximum, and
    values that are not finite spread to the neighbouring windows. A code is one byte for windows below 256 pixels.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as for conv2d.
        pool_kernel_size: pixels, an integer or a pair (height, width).
        pool_stride: the same; None for pool_kernel_size.
        pool_padding: pixels of -inf on every side of the convolution's result, up to half of pool_kernel_size.
        pool_ceil_mode: include a last window that overlaps the edge, as in max_pool2d.

    Returns:
        (N, OC, QH, QW) or (OC, QH, QW), of input's dtype; channels_last if input or weight is.

    Raises:
        TypeError: an argument is not of a type above.
        RuntimeError: sizes, dtypes, devices or values do not fit together.
    """
    tensors = input, weight, bias
    pool: Any = (pool_kernel_size, pool_stride, pool_padding, pool_ceil_mode)
    if has_torch_function(tensors):
        return handle_torch_function(
            conv2d_relu_max_pool2d, tensors, *tensors, stride, padding, dilation, groups, *pool
        )
    return _conv2d_relu_max_pool2d(*tensors, stride, padding, dilation, groups, "zeros", *pool)


def _conv2d_relu_max_pool2d(
    input, weight, bias, stride, padding, dilation, groups, pad_mode,
    pool_kernel_size, pool_stride, pool_padding, pool_ceil_mode=False,
):  # fmt: skip
    name, pool = "conv2d_relu_max_pool2d", (pool_kernel_size, pool_stride, pool_padding, 1, pool_ceil_mode)

    def fused(x, weight, bias, *geometry):
        size = shapes.conv2d_size(x.shape[2:], weight.shape[2:], *geometry[:3])
        images = x.shape[0], weight.shape[0], *size
        *window, _ = _checks.check_pool2d(name, "pool_", images, *pool)
        return ops.conv2d_relu_max_pool2d(x, weight, bias, *geometry, *window, pool_ceil_mode)[0]

    def rest(z):
        return _torch.max_pool2d(_torch.relu(z), *pool)

    return convolve(name, fused, rest, input, weight, bias, stride, padding, dilation, groups, pad_mode)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear on tritonnet's kernels.

    Args:
        input: (..., K); float64, float32, float16 or bfloat16, any strides. Other dtypes go to torch.
        weight: (N, K), or (K) without bias, of input's dtype.
        bias: (N), or any shape that broadcasts to the result, of input's dtype, or None.

    Returns:
        (..., N), or (...) for a weight of one dimension, of input's dtype.

    Raises:
        TypeError: an argument is not a Tensor.
        RuntimeError: sizes, dtypes or devices do not fit together, as in torch.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.linear.html
    """
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(linear, (input, weight, bias), input, weight, bias)
    return _linear("linear", ops.linear, lambda y: y, input, weight, bias)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(linear(...)) in one kernel: the same results and gradients, with one pass over memory less.

    Args:
        input, weight, bias: as for linear.

    Returns:
        (..., N), or (...) for a weight of one dimension, of input's dtype.

    Raises:
        TypeError, RuntimeError: as linear.
    """
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(linear_relu, (input, weight, bias), input, weight, bias)
    return _linear("linear_relu", ops.linear_relu, _activations.relu, input, weight, bias)


def _linear(name, operator, rest, input, weight, bias):
    """operator(rows, weight, bias) of checked arguments, or `rest` of the sum where bias has to be added separately."""
    _checks.check_tensors(name, input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    input, weight, bias = autocast(input, weight, bias)
    if not _checks.is_served(input, weight, bias):
        return rest(_torch.linear(input, weight, bias))
    _checks.check_alike(name, input=input, weight=weight, bias=bias)
    _checks.check_linear(name, input, weight, bias)
    if weight.dim() == 1:
        return _linear(name, operator, rest, input, weight.unsqueeze(0), None).squeeze(-1)
    usual = bias is None or bias.shape == weight.shape[:1]
    if usual and input.dim() == 2:
        return operator(input, weight, bias)
    size = (*input.shape[:-1], weight.shape[0])
    fused, rest_of_bias = (bias, None) if usual else (None, bias)
    if not usual:
        try:
            full = bias.expand(size)
        except RuntimeError:
            raise RuntimeError(f"{name}: bias must broadcast to {list(size)}, got {list(bias.shape)}") from None
        fused, rest_of_bias = (bias.expand(size[-1:]), None) if bias.dim() <= 1 else (None, full)
    rows = input.unsqueeze(0) if input.dim() == 1 else input.flatten(0, -2)
    if rest_of_bias is None:
        return sized(operator(rows, weight, fused), size)
    return rest(sized(ops.linear(rows, weight, None), size) + rest_of_bias)


def linear_chain(input, weights, biases=None):
    """linear layers with relu between them, but not after the last, in one kernel.

    One launch computes two to four layers of up to 128 features each, with any number of input features, without
    reading the hidden layers back from memory. Of a longer chain the last four do; wider layers run one by one.
    Results, gradients and rounding are those of linear and relu one after the other.

    Args:
        input: (..., K); float64, float32, float16 or bfloat16, any strides. Other dtypes go to torch.
        weights: list or tuple of (N, K), K being the N of the weight before; of input's dtype.
        biases: list or tuple of (N) or None, one for each weight; or None for no biases.

    Returns:
        (..., N of the last weight), of input's dtype.

    Raises:
        TypeError: weights or biases is not a list or tuple, or holds something other than Tensors.
        RuntimeError: sizes, dtypes or devices do not fit together.
    """
    name = "linear_chain"
    for argument, value in (("weights", weights), ("biases", biases)):
        if not isinstance(value, (tuple, list)) and not (argument == "biases" and value is None):
            raise TypeError(f"{name}: {argument} must be a list or tuple, got {type(value).__name__}")
    biases = [None] * len(weights) if biases is None else biases
    tensors = input, *weights, *biases
    if has_torch_function(tensors):
        return handle_torch_function(linear_chain, tensors, input, weights, biases)
    if len(weights) < 1 or len(biases) != len(weights):
        raise RuntimeError(
            f"{name}: there must be a weight, and a bias or None for each, got {len(weights)} weights and "
            f"{len(biases)} biases"
        )
    named = {f"weights[{i}]": w for i, w in enumerate(weights)}
    named |= {f"biases[{i}]": b for i, b in enumerate(biases) if b is not None}
    _checks.check_tensors(name, input=input, **named)
    input, *tensors = autocast(*tensors)
    weights, biases = tensors[: len(weights)], tensors[len(weights) :]
    if not _checks.is_served(input, *tensors):
        for w, b in zip(weights[:-1], biases):
            input = _torch.relu(_torch.linear(input, w, b))
        return _torch.linear(input, weights[-1], biases[-1])
    _checks.check_alike(name, input=input, **dict(zip(named, [t for t in tensors if t is not None])))
    _checks.check_linear_chain(name, input, weights, biases)
    while len(weights) > shapes.MOST_LAYERS:
        input, weights, biases = linear_relu(input, weights[0], biases[0]), weights[1:], biases[1:]
    if len(weights) == 1:
        return linear(input, weights[0], biases[0])
    layers = [t for layer in zip(weights, biases) for t in layer] + [None, None] * (shapes.MOST_LAYERS - len(weights))
    rows = input.unsqueeze(0) if input.dim() == 1 else input.flatten(0, -2)
    # The hidden layers are written only if backward may need them. Inside torch.func's transforms a batched tensor does
    # not show whether gradients are taken, and recomputing later would be wrong if biases were overwritten meanwhile.
    recorded = in_transforms() or any(t is not None and t.requires_grad for t in (input, *tensors))
    # A traced module may be called with and without gradients.
    keep = torch.jit.is_tracing() or (torch.is_grad_enabled() and recorded)
    y, _ = ops.linear_chain(rows, *layers, keep)
    return sized(y, (*input.shape[:-1], weights[-1].shape[0]))


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.cross_entropy on tritonnet's kernel, which gives loss and gradient in one pass.

    Args:
        input: logits, (N, C) or (C); float64, float32, float16 or bfloat16, any strides.
        target: classes from 0 to C - 1, (N) or (), int64 or uint8. On a GPU, where raising an error would make the host
            wait, any other target makes its row's loss and derivatives NaN, and with them a mean or sum.
        weight: (C), of input's dtype, or None.
        ignore_index: rows with this target are ignored. It is compared as an integer; torch with label smoothing
            takes it modulo 256 for targets of uint8.
        reduction: "mean" (weighted), "sum" or "none".
        label_smoothing: the share of the target, from 0 to 1, that is spread evenly over all classes.
        size_average, reduce: torch's deprecated arguments.

    Everything else, such as class probabilities, pixels or weights that require a gradient, goes to torch.

    NaN and infinities in logits and weights have the same effect as in torch on the CPU, in the loss, its gradient and
    its second derivative, and a mean over no rows is NaN with a gradient of 0. Differences from torch:

    - The derivatives by the logits of an ignored row are 0, as torch documents, whatever the row and the weights are;
      torch gives NaN where the row is not finite, and with smoothing where a weight is not.
    - If the loss's own gradient in backward is not finite, the gradients of rows that count are not finite either, but
      may be another of NaN and the infinities than torch's. Ignored rows have 0, as in torch.
    - Directional derivatives, in forward mode and of the gradient by the loss's own gradient, are the product of
      gradient and direction, and 0 for a mean over no rows.
    - A mean whose weights sum to 0 by cancellation is not finite, but may be another of NaN and the infinities.

    Returns:
        (), or (N) without reduction, of input's dtype.

    Raises:
        TypeError, RuntimeError, ValueError: as in torch.
        IndexError: on the CPU, if a target is not a class.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html
    """
    arguments = weight, size_average, ignore_index, reduce, reduction, label_smoothing
    tensors = input, target, weight
    if has_torch_function(tensors):
        return handle_torch_function(cross_entropy, tensors, input, target, *arguments)
    _checks.check_tensors("cross_entropy", input=input, target=target, **({} if weight is None else {"weight": weight}))
    served = (
        _checks.is_served(input, weight)
        and input.dim() in (1, 2) and target.dim() == input.dim() - 1 and target.shape == input.shape[:-1]
        and input.numel() > 0 and target.dtype in (torch.int64, torch.uint8) and target.device == input.device
        and (weight is None or (weight.shape == input.shape[-1:] and not weight.requires_grad))
        and (weight is None or (weight.dtype, weight.device) == (input.dtype, input.device))
        and size_average is None and reduce is None and reduction in ("none", "mean", "sum")
        and 0 <= label_smoothing <= 1
    )  # fmt: skip
    if not served:
        return _torch.cross_entropy(input, target, *arguments)
    device = input.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        input, weight = input.float(), None if weight is None else weight.float()  # as autocast does for losses
    unbatched = input.dim() == 1
    if unbatched:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    loss, _ = ops.cross_entropy(input, target, weight, reduction, ignore_index, float(label_smoothing))
    return loss.squeeze(0) if unbatched and reduction == "none" else loss


if TYPE_CHECKING:  # what stand_in does, for type checkers and editors; the names above take precedence
    from torch.nn.functional import *  # type: ignore[assignment]  # noqa: F403
