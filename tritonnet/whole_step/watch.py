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
    return objects is others or (len(objects) == len(others) and all(map(is_, objects, others)))


class Watch:
    """Looks at a model, its loss and the state of its optimizer, without waiting for a device."""

    def __init__(self, model, loss, optimizer):
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.modules, self._dicts, self._hooks = [], [], []
        self._members, self._state, self._parameters, self._tensors = [], [], [], []

    def look(self):
        members = list(chain.from_iterable(map(dict.values, self._dicts)))
        state = list(chain.from_iterable(map(dict.values, self.optimizer.state.values())))
        parameters = list(chain.from_iterable(group["params"] for group in self.optimizer.param_groups))
        # Walking through a model takes longer than seeing that it is the same: its layers are among its members.
        if not (members and _same(members, self._members)):
            self._walk()
            members = self._members
        if not (self._tensors and _same(state, self._state) and _same(parameters, self._parameters)):
            self._state, self._parameters = state, parameters
            found = (*self._members, *state, *parameters)
            self._tensors = [t for t in found if type(t) in _TYPES and t.layout == torch.strided]
        numbers = [
            list(map(len, self._hooks)), settings_of(self.optimizer), list(map(id, parameters)),
            list(map(torch.Tensor.data_ptr, self._tensors)), list(map(torch.Tensor.stride, self._tensors)),
            list(map(_PLACE, parameters)),
        ]  # fmt: skip
        return Look(self._members, self._state, numbers)

    def _walk(self):
        """Find all members of the model and the loss."""
        roots = [self.model, self.loss] if isinstance(self.loss, torch.nn.Module) else [self.model]
        self.modules = [module for root in roots for module in root.modules()]
        self._dicts = list(chain.from_iterable((vars(module), *_MEMBERS(module)) for module in self.modules))
        self._hooks = list(chain.from_iterable(map(_HOOKS, self.modules)))
        self._members, self._tensors = list(chain.from_iterable(map(dict.values, self._dicts))), []

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
