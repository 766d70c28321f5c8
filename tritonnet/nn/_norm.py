"""Batch norm, alone and with what follows it: torch has no functions of the names with an epilogue."""

import numbers

import torch
import torch.nn.functional as _torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import ops
from ..kernels import activations, shapes
from . import _checks
from ._calls import autocast, convolve

__all__ = ["batch_norm_epilogue"]

_VECTORS = "running_mean", "running_var", "weight", "bias"


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.batch_norm on tritonnet's kernels.

    Args:
        input: (N, C, ...), float64, float32, float16 or bfloat16, any strides. Other dtypes go to torch.
        running_mean, running_var: (C), of input's dtype or, for 16-bit inputs, float32. In training both may be None;
            otherwise they are updated, with the unbiased variance.
        weight, bias: (C), dtypes as for running_mean, or None for ones and zeros.
        training: normalise by the mean and biased variance of the batch, not by the running ones.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.

    Returns:
        input's shape and dtype, channels_last if input is. The same inputs give the same bits. In training only input
        and statistics are kept for backward.

    Raises:
        TypeError, RuntimeError, ValueError: as torch does; a batch of one value a channel is a ValueError in training.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.batch_norm.html
    """
    tensors = input, running_mean, running_var, weight, bias
    if has_torch_function(tensors):
        return handle_torch_function(
            batch_norm, tensors, input, running_mean, running_var, weight=weight, bias=bias, training=training,
            momentum=momentum, eps=eps,
        )  # fmt: skip
    if _goes_to_torch("batch_norm", *tensors):
        return _torch.batch_norm(*tensors, training, momentum, eps)
    return _batch_norm("batch_norm", *tensors, training, momentum, eps, None, "none", 0.0)


def batch_norm_epilogue(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5, *,
    residual: Tensor | None = None, activation: str = "none", slope: float = 0.01,
) -> Tensor:  # fmt: skip
    """act(batch_norm(...) + residual), in the same pass over the images, rounded once.

    Args:
        input ... eps: as for batch_norm.
        residual, activation, slope: as for conv2d_epilogue.

    Returns:
        As batch_norm. Backward computes the activation's argument again from input, or takes its sign from the result
        if there is a residual, and the residual's gradient comes from the same pass as the statistics'.

    Raises:
        TypeError, RuntimeError, ValueError: as batch_norm and conv2d_epilogue.
    """
    tensors = input, running_mean, running_var, weight, bias, residual
    if has_torch_function(tensors):
        return handle_torch_function(
            batch_norm_epilogue, tensors, *tensors[:5], training, momentum, eps, residual=residual,
            activation=activation, slope=slope,
        )  # fmt: skip
    name = "batch_norm_epilogue"
    _checks.check_activation(name, eps, activation, slope)
    _checks.check_tensors(name, input=input)
    _checks.check_epilogue(name, input, tuple(input.shape), None, None, None, None, residual)
    if _goes_to_torch(name, *tensors[:5]):
        y = _torch.batch_norm(*tensors[:5], training, momentum, eps)
        return activations.activated(y if residual is None else y + residual, activation, slope)
    return _batch_norm(name, *tensors[:5], training, momentum, eps, residual, activation, slope)


def normalise(layer, input):
    """The forward of a layer of batch norm: torch's choice of statistics, and its counting of batches."""
    layer._check_input_dim(input)
    tracked = layer.track_running_stats or not layer.training
    training = layer.training or (layer.running_mean is None and layer.running_var is None)
    momentum = 0.0 if layer.momentum is None else layer.momentum
    if layer.training and layer.track_running_stats and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:
            momentum = 1.0 / float(layer.num_batches_tracked)
    running = (layer.running_mean, layer.running_var) if tracked else (None, None)
    return batch_norm(input, *running, layer.weight, layer.bias, training, momentum, layer.eps)


def norm_conv2d(
    values, norm, running, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, pad_mode=None
):  # fmt: skip
    """A convolution between batch norms in training, for fused graphs: it keeps what it normalises, not its image.

    Args:
        values: images (N, C, H, W), or with `norm` (z, mean, var) as this function returns them.
        norm: (weight, bias, eps, activation, slope) of a batch norm of z whose result is convolved, or None.
        running: (running_mean, running_var, momentum) of a batch norm behind, or None if there is none.
        weight ... groups: as for conv2d, or with `pad_mode` as for ops.conv2d.

    Returns:
        (z, mean, var): the result, without bias, and its statistics; or without `running` the result alone.
    """
    if norm is not None and autocast(values[0])[0] is not values[0]:
        values, norm = normed(values, None, *norm), None
    x, *statistics = (values, None, None) if norm is None else values
    scale, shift, eps, *activation = norm or (None, None, 0.0, "none", 0.0)
    running_mean, running_var, momentum = running or (None, None, 0.0)

    def fused(x, weight, bias, *geometry):
        before = x, *statistics, scale, shift, float(eps), *activation
        after = running_mean, running_var, float(momentum), running is not None
        results = ops.norm_conv2d(*before, weight, bias, *geometry, *after)
        return results[0] if running is None else results

    if pad_mode is not None:
        return fused(x, weight, bias, stride, padding, dilation, groups, pad_mode)
    return convolve("conv2d", fused, None, x, weight, bias, stride, padding, dilation, groups, "zeros")


def statistics_of(x, running_mean, running_var, momentum):
    """(x, mean, var), as norm_conv2d returns them."""
    x = _laid_out(x)
    if running_mean is None:
        return x, *ops.batch_statistics(x)
    return x, *ops.tracked_statistics(x, None, running_mean, running_var, float(momentum))


def normed(values, residual, weight, bias, eps, activation, slope):
    """act(batch_norm + residual) of the first of values, (z, mean, var) as norm_conv2d returns them."""
    z, mean, var = values
    return ops.batch_norm(z, mean, var, weight, bias, residual, float(eps), activation, slope)


def _goes_to_torch(name, input, *vectors):
    """Whether torch computes a batch norm: of other dtypes, and of empty batches."""
    given = {argument: t for argument, t in zip(_VECTORS, vectors) if t is not None}
    _checks.check_tensors(name, input=input, **given)
    return not _checks.is_served(input, *vectors) or input.numel() == 0


def _batch_norm(name, input, running_mean, running_var, weight, bias, training, momentum, eps, *epilogue):
    _check(name, input, running_mean, running_var, weight, bias, training, momentum, eps)
    x = _laid_out(input)
    if not training:
        return ops.epilogue(x, running_mean, running_var, weight, bias, epilogue[0], float(eps), *epilogue[1:])
    _, mean, var = statistics_of(x, running_mean, running_var, momentum)
    return ops.batch_norm(x, mean, var, weight, bias, epilogue[0], float(eps), *epilogue[1:])


def _laid_out(x):
    """x in one of the layouts that torch's results have: contiguous or channels_last."""
    layout = shapes.memory_format(x)
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        layout = torch.channels_last_3d
    return x if x.is_contiguous(memory_format=layout) else x.contiguous(memory_format=layout)


def _check(name, x, running_mean, running_var, weight, bias, training, momentum, eps):
    """Raises what torch raises for the arguments of a batch norm."""
    if not isinstance(training, bool):
        raise TypeError(f"{name}: training must be a bool, got {training!r}")
    for argument, value in (("momentum", momentum), ("eps", eps)):
        if not _is_number(value):
            raise TypeError(f"{name}: {argument} must be a float, got {value!r}")
    if x.dim() < 2:
        raise RuntimeError(f"{name}: input must be (N, C, ...), got size {list(x.shape)}")
    if training and x.numel() == x.shape[1]:
        raise ValueError(f"{name}: more than 1 value per channel is needed in training, got input size {list(x.shape)}")
    if eps < 0 or (training and eps <= 0):
        raise ValueError(f"{name}: eps must be positive{'' if training else ' or zero'}, got {eps}")
    if not training:
        for argument, t in (("running_mean", running_mean), ("running_var", running_var)):
            if t is None:
                raise RuntimeError(f"{name}: {argument} must be a Tensor in evaluation, got None")
    elif (running_mean is None) != (running_var is None):
        raise ValueError(f"{name}: running_mean and running_var must either both be None or neither")
    allowed = {x.dtype, torch.float32} if x.dtype.itemsize == 2 else {x.dtype}
    for argument, t in zip(_VECTORS, (running_mean, running_var, weight, bias)):
        if t is None:
            continue
        if t.shape != x.shape[1:2]:
            raise RuntimeError(f"{name}: {argument} must have size [{x.shape[1]}], got {list(t.shape)}")
        if t.dtype not in allowed:
            raise RuntimeError(f"{name}: {argument} must have input's dtype {x.dtype}, got {t.dtype}")
        if t.device != x.device:
            raise RuntimeError(f"{name}: {argument} must be on input's device {x.device}, got {t.device}")
        if training and t.requires_grad and torch.is_grad_enabled() and argument.startswith("running"):
            raise RuntimeError(f"{name}: {argument} is updated and cannot require a gradient")


def _is_number(value):
    """Whether torch takes the value for a float: any real number, NumPy's too, and a tensor of one without gradient."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not (value.is_complex() or value.requires_grad)
    return isinstance(value, (numbers.Real, torch.SymFloat))
