"""What a captured step depends on besides its batch: whether it has changed, and whether it can be captured."""

import random
import sys
from itertools import chain
from operator import attrgetter, is_
from typing import NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ..dispatch import implementation
from ..nn._plain import global_hooks
from ..registration import watched
from .update import settings_of

# A module's own attributes are looked at too, and so each of these dicts is known to be the same one.
_MEMBERS = attrgetter("_parameters", "_buffers", "_modules")
_HOOKS = attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLACE = attrgetter("dtype", "shape", "requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
_TYPES = torch.Tensor, torch.nn.Parameter


class Look(NamedTuple):
    """What was there at a time: the objects of a model and its loss, those of the optimizer's state, and numbers."""

    members: list
    state: list
    numbers: list

    def members_since(self, before):
        """Whether attributes of the model or the loss have been set, added or removed."""
        return not _same(self.members, before.members)

    def since(self, before):
        """Whether anything has changed but numbers in tensors."""
        return self.numbers != before.numbers or not _same(self.state, before.state) or self.members_since(before)


def _same(objects, others):
    return len(objects) == len(others) and all(map(is_, objects, others))


class Watch:
    """Looks at a model, its loss and the state of its optimizer, without waiting for a device."""

    def __init__(self, model, loss, optimizer):
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.modules, self._roots, self._children = [], [], []

    def look(self):
        roots = [self.model, self.loss] if isinstance(self.loss, torch.nn.Module) else [self.model]
        if not self._still_there(roots):
            self.modules = [module for root in roots for module in root.modules()]
        self._roots, self._children = roots, self._all_children()
        dicts = chain.from_iterable((vars(module), *_MEMBERS(module)) for module in self.modules)
        members = list(chain.from_iterable(map(dict.values, dicts)))
        tensors = self.tensors()
        numbers = [
            list(map(len, chain.from_iterable(map(_HOOKS, self.modules)))), settings_of(self.optimizer),
            list(map(torch.Tensor.data_ptr, tensors)), list(map(torch.Tensor.stride, tensors)),
            list(map(_PLACE, tensors)),
        ]  # fmt: skip
        return Look(members, self._state(), numbers)

    def _all_children(self):
        return [child for module in self.modules for child in module._modules.values()]

    def _still_there(self, roots):
        """Whether the modules are those of the look before, as walking through a model takes longer than the rest."""
        return _same(roots, self._roots) and _same(self._all_children(), self._children)

    def _state(self):
        return list(chain.from_iterable(map(dict.values, self.optimizer.state.values())))

    def tensors(self):
        """Every tensor of the model, the loss and the optimizer."""
        members = chain.from_iterable((*m._parameters.values(), *m._buffers.values()) for m in self.modules)
        groups = chain.from_iterable(group["params"] for group in self.optimizer.param_groups)
        return [t for t in (*members, *groups, *self._state()) if isinstance(t, torch.Tensor)]

    def obstacle(self, device):
        """Why this model cannot be captured, or None."""
        optimized = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for module in self.modules:
            if any(_HOOKS(module)):
                return "layers have hooks"
            if isinstance(module, torch.nn.DataParallel):
                return "the model is on several devices"
            if isinstance(module, _BatchNorm) and module.momentum is None and module.track_running_stats:
                return "a batch norm without momentum counts its batches on the host"
            for t in (*module._parameters.values(), *module._buffers.values()):
                if t is None:
                    continue
                if type(t) not in _TYPES or t.layout != torch.strided:
                    return "there are parameters or buffers of other types than dense tensors"
                if t.device != device:
                    return "parameters or buffers are on another device"
                if t._backward_hooks or t._post_accumulate_grad_hooks:
                    return "parameters have hooks"
                if t.requires_grad and id(t) not in optimized:
                    return "the optimizer does not have all parameters"
        return None


def circumstances(parameter):
    """Settings of torch and of this package outside of the model that decide which kernels a step launches."""
    kind, conv, matmul = parameter.device.type, torch.backends.cudnn.conv, torch.backends.cuda.matmul
    return (
        implementation(parameter), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind),
        conv.fp32_precision, matmul.fp32_precision, matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction, torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(),
    )  # fmt: skip


def is_followed():
    """Whether something follows every call of the layers or of torch's operators, or there are no gradients."""
    return (
        global_hooks() or watched() or torch._C._len_torch_function_stack() > 0 or torch.is_anomaly_enabled()
        or not torch.is_grad_enabled()
    )  # fmt: skip


def random_numbers():
    """The state of the host's generators, from which a captured forward would draw only once."""
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state(legacy=False)["state"] if numpy else {}
    return (
        random.getstate(), torch.default_generator.get_state().tolist(),
        {name: value.tolist() if hasattr(value, "tolist") else value for name, value in drawn.items()},
    )  # fmt: skip
