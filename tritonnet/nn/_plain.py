"""Tells whether layers may be run as one: what somebody has attached to them would not be heard of."""

from torch.nn.modules import module as _torch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def is_plain(module, classes):
    """Whether calling the module does what its class, one of `classes`, does and nothing else."""
    return (
        type(module) in classes
        and "forward" not in vars(module)
        and not any(getattr(module, name) for name in _HOOKS)
        and not any(getattr(_torch, name) for name in _GLOBAL_HOOKS)
    )
