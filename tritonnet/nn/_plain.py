"""Tells whether layers may run as one kernel, in which hooks on the layers would not be called."""

from typing import TypeVar

from torch.nn import Module
from torch.nn.modules import module as _torch

Model = TypeVar("Model", bound=Module)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def is_plain(module, classes):
    """Whether the module is of one of `classes` exactly, and calling it runs that class's forward and no hooks."""
    attributes = vars(module)
    if type(module) not in classes or "forward" in attributes or "_conv_forward" in attributes:
        return False
    # A loop, as a LeNet checks five layers for each batch, and generators would take as long as a launch.
    for name in _HOOKS:
        if attributes[name]:
            return False
    return not global_hooks()


def global_hooks():
    """Whether there are hooks on all modules."""
    for name in _GLOBAL_HOOKS:
        if getattr(_torch, name):
            return True
    return False


def check_model(model):
    """TypeError if `model` is not a torch.nn.Module."""
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
