"""Replaces the torch.nn layers in an existing model by tritonnet's, and back."""

import functools
from typing import Any

from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from . import nn
from .fusion import FusedCall
from .nn._plain import Model, check_model

_LAYERS: dict[Any, Any] = {
    ours.__base__: ours for ours in (nn.Conv2d, nn.MaxPool2d, nn.ReLU, nn.Linear, nn.CrossEntropyLoss)
}
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


def convert(model: Model) -> Model:
    """Convert every torch.nn layer in `model` that tritonnet has kernels for into tritonnet's layer.

    Each module stays the same object: parameters, buffers, hooks, training mode, device, dtype, names and state_dict
    do not change, and references to it stay valid. A subclass of such a layer is converted, and stays an
    instance of its class, unless it overrides forward or _conv_forward or has a metaclass. Layers under
    torch.nn.utils.parametrize (convert first) and lazy layers (run them once first) are left unchanged too.

    Args:
        model: torch.nn.Module of any depth, or one layer; changed in place.

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
    return model


def revert(model: Model) -> Model:
    """Undo `convert` and `fuse`: make tritonnet's layers in `model` torch.nn's again, and run the forwards as written.

    Args, Returns, Raises: as for `convert`.
    """
    check_model(model)
    for module in model.modules():
        cls = type(module)
        if isinstance(module._compiled_call_impl, FusedCall):
            module._compiled_call_impl = None
        module.__class__ = vars(cls).get("_original") or _REVERTED.get(cls, cls)
    return model
