"""Tells whether layers may be run as one: what somebody has attached to them would not be heard of."""

from torch.nn.modules import module as _torch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def is_plain(module, classes):
    """Whether calling the module does what its class, one of `classes`, does and nothing else."""
    attributes = vars(module)
    if type(module) not in classes or "forward" in attributes:
        return False
    # A loop: a LeNet of one launch asks five times for each batch, and generators take as long as the launch.
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
