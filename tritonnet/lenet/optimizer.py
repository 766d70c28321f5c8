"""How LeNet's last launch follows torch's optimisers: the update rule, its hyperparameters, and the state."""

import ctypes
import functools
from array import array
from itertools import chain, zip_longest
from operator import attrgetter, is_

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..dispatch import launchers
from .served import NotServed

if launchers is not None:
    from ..kernels.lenet import layout
    from ..kernels.lenet import update as lenet_update

# The state that torch keeps for a parameter, in the order of the kernel's moments.
_MOMENTS = {"SGD": ("momentum_buffer",), "Adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
_END = (object(),)
_ADDRESS, _VALUE = torch.Tensor.data_ptr, attrgetter("value")


def have_hooks(optimizer):
    """Whether this optimizer, or all optimizers, have hooks on their step."""
    return bool(
        optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks or _global_optimizer_post_hooks
    )  # fmt: skip


def rule_of(optimizer, parameters):
    """(constants for the kernel, the group of each parameter); NotServed if the kernel does not have this rule."""
    kind = {torch.optim.SGD: "SGD", torch.optim.Adam: "Adam", torch.optim.AdamW: "Adam"}.get(type(optimizer))
    if kind is None:
        raise NotServed(f"the optimizer is a {type(optimizer).__name__}")
    if have_hooks(optimizer):
        raise NotServed("the optimizer has hooks")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if set(groups) != {id(p) for p in parameters}:
        raise NotServed("the optimizer does not have exactly the model's parameters")
    rules = []
    for group in optimizer.param_groups:
        if group["differentiable"] or group.get("capturable"):
            raise NotServed("the optimizer is differentiable or capturable")
        if kind == "SGD":
            rule = {"momentum": group["momentum"] != 0, "nesterov": group["nesterov"]}
        else:
            rule = {"decoupled": group["decoupled_weight_decay"], "moments": 3 if group["amsgrad"] else 2}
        rules.append({"rule": kind, **rule})
    if any(rule != rules[0] for rule in rules):
        raise NotServed("groups of the optimizer differ in more than numbers")
    return rules[0], [groups[id(p)] for p in parameters]


def rate_on_device(rate):
    """Whether a learning rate is a tensor on a device, which the host would have to wait for to read."""
    return isinstance(rate, torch.Tensor) and rate.device.type != "cpu"


def settings_of(optimizer):
    """Every object in an optimizer's groups: while these are the same objects, only tensors may have changed."""
    settings = []
    for group in optimizer.param_groups:
        settings += group.values()
        settings += group["params"]
        # betas may be a list that is changed in place.
        settings += group.get("betas", ())
    return settings


def numbers_of(groups, rule):
    """The kernel's hyperparameters, a row for each parameter's group; a learning rate on a GPU is left as 0."""
    rows = {id(group): _numbers(group, rule) for group in groups}
    return array("f", chain.from_iterable(rows[id(group)] for group in groups))


def _numbers(group, rule):
    row = [0.0] * layout.NUMBERS
    row[lenet_update.LR] = 0.0 if rate_on_device(group["lr"]) else float(group["lr"])
    row[lenet_update.WEIGHT_DECAY] = float(group["weight_decay"])
    row[lenet_update.SIGN] = -1.0 if group["maximize"] else 1.0
    if rule["rule"] == "SGD":
        row[lenet_update.KEEP1], row[lenet_update.ADD1] = float(group["momentum"]), 1 - float(group["dampening"])
    else:
        beta1, beta2 = map(float, group["betas"])
        row[lenet_update.ADD1], row[lenet_update.KEEP2], row[lenet_update.ADD2] = 1 - beta1, beta2, 1 - beta2
        row[lenet_update.EPS] = float(group["eps"])
        row[lenet_update.POWERS1 :] = [*_powers(beta1), *_powers(beta2)]
    return row


@functools.lru_cache(16)
def _powers(beta):
    """1 - beta^(2^k) for each bit k of a step number except its sign."""
    return [1 - beta**2**k for k in range(layout.BITS - 1)] + [0.0]


def tell_schedulers(optimizer, parameters):
    """Calls optimizer.step() without gradients: a scheduler wraps it, and warns if it was never called."""
    grads = [p.grad for p in parameters]
    try:
        # Without gradients it changes nothing.
        for p in parameters:
            p.grad = None
        optimizer.step()
    finally:
        for p, grad in zip(parameters, grads):
            p.grad = grad


# The ctypes through which Python counts in a tensor's memory.
_COUNTERS = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


class Moments:
    """The optimiser's state, which the kernels change in torch's own tensors; missing ones are created.

    Attributes:
        names: torch's names of the rule's moments.
        addresses: of all tensors in the state, when it was last taken over.
        steps: (10) float32 on the device, the updates of each parameter so far. The kernels count here unless torch's
            own count is on the device, as a fused optimiser's is. Others keep it on the CPU, and SGD has none.
    """

    def __init__(self, parameters, optimizer, rule):
        self.parameters, self.optimizer, self._adam = parameters, optimizer, rule["rule"] == "Adam"
        self.names = _MOMENTS[rule["rule"]][: rule["moments"] if self._adam else int(rule["momentum"])]
        self.device, n = parameters[0].device, len(parameters)
        self.steps = torch.zeros(n, dtype=torch.float32, device=self.device)
        # For each parameter: its moments, and the count that the kernel updates. For each count that torch keeps on
        # the CPU: its ctypes object, and the index of its parameter.
        self._moments, self._counts, self._counters, self._counter_of = [()] * n, list(self.steps.unbind()), [], []
        self._own_counts = list(self._counts)
        self._seen, self._tensors, self._counted, self.addresses = [None], [], [], []

    def load(self):
        """Take over what was loaded into the optimiser's state or changed in it since the last step."""
        if not all(map(is_, self._values(), self._seen)) or self._moved():
            self._take_over()
        counts = list(map(_VALUE, self._counters))
        if counts != self._counted:
            for i, count, before in zip_longest(self._counter_of, counts, self._counted):
                if count != before:
                    self.steps[i] = count
            self._counted = counts

    def _moved(self):
        """Whether a tensor has new memory, such as after being shared with another process."""
        return list(map(_ADDRESS, self._tensors)) != self.addresses

    def _take_over(self):
        """Go through the whole state: create what is missing, and convert what the kernels cannot read."""
        tensors, self._counters, self._counter_of = [], [], []
        fused = {id(p) for group in self.optimizer.param_groups if group.get("fused") for p in group["params"]}
        for i, p in enumerate(self.parameters if self.names or self._adam else ()):
            state = self.optimizer.state[p]
            found = [state.get(name) for name in self.names]
            if self._adam:
                state["step"] = self._find_count(i, state.get("step", 0.0), id(p) in fused)
                tensors.append(state["step"])
            elif not (self._moments[i] and found[0] is self._moments[i][0]):
                # For SGD it only matters whether there was an update.
                self.steps[i] = float(found[0] is not None)
            self._moments[i] = [_like(value, p) for value in found]
            state.update(zip(self.names, self._moments[i]))
            tensors += self._moments[i]
        self._seen, self._tensors, self.addresses = list(self._values()), tensors, list(map(_ADDRESS, tensors))

    def _find_count(self, i, step, fused):
        """The count of parameter i in the optimiser's state, or an equal one of a kind that can be updated."""
        fits = isinstance(step, torch.Tensor) and step.dim() == 0
        if fused:
            if not (fits and step.dtype == torch.float32 and step.device == self.device):
                step = torch.tensor(float(step), dtype=torch.float32, device=self.device)
            self._counts[i] = step
        else:
            self._counts[i] = self._own_counts[i]
            if not (fits and step.dtype in _COUNTERS and step.device.type == "cpu"):
                step = torch.tensor(float(step), dtype=torch.float32, device="cpu")
            # Writing to the tensor's memory from Python is faster than an operation of torch's.
            self._counters.append(_COUNTERS[step.dtype].from_address(step.data_ptr()))
            self._counter_of.append(i)
        return step

    def of(self, i):
        """(the moments of parameter i, the tensor in which the kernel counts its updates)."""
        return self._moments[i], self._counts[i]

    def changed(self):
        """Every tensor that a launch changes."""
        return [*chain.from_iterable(self._moments), *self._counts]

    def _values(self):
        """Every object in the optimiser's state, then an end mark, so that a missing or new object is noticed."""
        return chain(chain.from_iterable(map(dict.values, self.optimizer.state.values())), _END)

    def start_anew(self):
        """Have the next load take over everything from the optimiser again, including counts."""
        self._seen, self._counted = [None], []

    def count(self):
        """Count an update where torch does, as the kernel has done on the device."""
        self._counted = [count + 1 for count in self._counted]
        for counter, count in zip(self._counters, self._counted):
            counter.value = count

    def settle(self):
        """Correct the counts for updates that were not made, as the loss was not finite; waits for the device."""
        if self._moved():
            self._take_over()
        made = [int(count) for count in self._counts]
        for k, (i, counter, counted) in enumerate(zip(self._counter_of, self._counters, self._counted)):
            if counter.value == counted:
                counter.value = self._counted[k] = made[i]
        for p, count, moments in zip(self.parameters, made, self._moments):
            state = self.optimizer.state.get(p)
            # State that a user has put there, such as one with its count reset, is not all zeros and stays.
            if not state or count or not moments or state.get(self.names[0]) is not moments[0]:
                continue
            if not any(moment.any() for moment in moments):
                # torch has no state before the first update.
                for name in ("step", *self.names):
                    state.pop(name, None)
                if not state:
                    del self.optimizer.state[p]


def _like(value, parameter):
    """A tensor of the state as the kernels read it: itself if it is contiguous and like its parameter, else a copy."""
    if value is None:
        return torch.zeros_like(parameter, memory_format=torch.contiguous_format, requires_grad=False)
    fits = value.dtype == parameter.dtype and value.device == parameter.device and value.shape == parameter.shape
    if fits and value.is_contiguous() and not value.is_neg():
        return value
    return torch.empty_like(parameter, memory_format=torch.contiguous_format, requires_grad=False).copy_(value)
