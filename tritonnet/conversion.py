"""Replaces the torch.nn layers in an existing model by tritonnet's, and back."""

import functools
from typing import Any

import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from . import nn
from .fusion import FusedCall
from .nn._plain import Model, check_model

_LAYERS: dict[Any, Any] = {
    ours.__base__: ours
    for ours in (
        nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU,
        nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.BatchNorm1d, nn.BatchNorm2d,
        nn.BatchNorm3d, nn.Linear, nn.CrossEntropyLoss,
    )
}  # fmt: skip
_REVERTED = {ours: theirs for theirs, ours in _LAYERS.items()}


def _rebuild(original):
    return object.__new__(_converted(original))


def _reduce_ex(module, protocol):
    """Pickle and copy a module as its original class; unpickling makes the converted class anew."""
    return (
        _rebuild,
        (type(module)._original,),
        module.__getstate__() if hasattr(module, "__getstate__") else vars(module),
    )


class _NoSubclassHook:
    """First base of the classes made here: stops __init_subclass__ of the other bases from being called."""

    def __init_subclass__(cls, **kwargs):
        pass


@functools.cache
def _converted(cls):
    """The class that does what `cls` does on our kernels, or `cls` if there is none."""
    for theirs, ours in _LAYERS.items():
        if cls is theirs:
            return ours
        # torch's Conv2d.forward calls _conv_forward, which subclasses override as well.
        kept = all(getattr(cls, name, None) is getattr(theirs, name, None) for name in ("forward", "_conv_forward"))
        # A metaclass may do anything when a subclass is made.
        if issubclass(cls, theirs) and kept and type(cls) is type:
            members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
            return type(
                cls.__name__, (_NoSubclassHook, cls, ours), {**members, "_original": cls, "__reduce_ex__": _reduce_ex}
            )
    return cls


def _lay_out_channels_last(conv):
    """Give the filters of a convolution, and gradients that they have, torch's channels_last layout."""
    for parameter in conv.parameters():
        if parameter.dim() == 4:
            # Unlike `contiguous`, `to` also changes the strides of filters with one channel or one pixel. By these
            # torch tells the layout of the result.
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
            if parameter.grad is not None:
                parameter.grad.data = parameter.grad.data.to(memory_format=torch.channels_last)


def convert(model: Model, channels_last: bool = False) -> Model:
    """Convert every torch.nn layer in `model` that tritonnet has kernels for into tritonnet's layer.

    Each module stays the same object: parameters, buffers, hooks, training mode, device, dtype, names and state_dict
    do not change, and references to it stay valid. A subclass of such a layer is converted, and stays an
    instance of its class, unless it overrides forward or _conv_forward or has a metaclass. Layers under
    torch.nn.utils.parametrize (convert first) and lazy layers (run them once first) are left unchanged too.

    With `channels_last` the weights of all of tritonnet's convolutions are kept in torch.channels_last. A convolution
    gives channels_last if its input or its weight has this layout, so that the whole network runs in it, whatever the
    images have, and no kernel has to copy its images. Values, names, shapes and Parameter objects stay. As after
    model.to(memory_format=torch.channels_last):

    - `view` raises on results of convolutions whose dimensions are not in the order of memory: use flatten or reshape.
    - Weights are in new memory. Do it before the optimizer's first step, as state that it has already keeps its layout:
      torch's optimizers with fused=True compute wrong updates for it, or raise. The same holds for a checkpoint of an
      optimizer's state in another layout. Do it before DistributedDataParallel, too.
    - load_state_dict and copies keep the layout; tensors of a state_dict have it.

    Depthwise filters and those of few channels, which are not copied in any layout, are included for the sake of the
    layers behind them. Networks in which no convolution has 16 channels have no copies to save, and TrainStep trains a
    LeNet in four launches only if its weights are contiguous.

    Args:
        model: torch.nn.Module of any depth, or one layer; changed in place.
        channels_last: whether to change the layout of the convolutions' weights; False leaves every layout as it is.

    Returns:
        model.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    check_model(model)
    for module in model.modules():
        if not isinstance(module, LazyModuleMixin) and not parametrize.is_parametrized(module):
            cls: Any = type(module)
            module.__class__ = _converted(cls)
        if channels_last and isinstance(module, nn.Conv2d):
            _lay_out_channels_last(module)
    return model


def revert(model: Model) -> Model:
    """Undo `convert` and `fuse`: make tritonnet's layers in `model` torch.nn's again, and run the forwards as written.

    Weights stay in the layout that they have; model.to(memory_format=torch.contiguous_format) changes it back.

    Args, Returns, Raises: as for `convert`.
    """
    check_model(model)
    for module in model.modules():
        cls = type(module)
        if isinstance(module._compiled_call_impl, FusedCall):
            module._compiled_call_impl = None
        module.__class__ = vars(cls).get("_original") or _REVERTED.get(cls, cls)
    return model
