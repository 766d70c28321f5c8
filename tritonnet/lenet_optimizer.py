"""torch's optimisers as LeNet's last launch follows them: which rule it is, its numbers, and the state of it."""

import functools
from array import array
from itertools import chain
from operator import is_

import torch

from .dispatch import launchers
from .lenet_weights import NotServed

if launchers is not None:
    from .kernels import lenet, lenet_update

# The state that torch keeps for a parameter, in the order of the kernel's moments.
_MOMENTS = {"SGD": ("momentum_buffer",), "Adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
_END = (object(),)
_one_more = (1.0).__add__


def rule_of(optimizer, parameters):
    """(what the kernel is compiled for, the group of each parameter); NotServed if it is no rule of the kernel's."""
    kind = {torch.optim.SGD: "SGD", torch.optim.Adam: "Adam", torch.optim.AdamW: "Adam"}.get(type(optimizer))
    if kind is None:
        raise NotServed(f"the optimizer is a {type(optimizer).__name__}")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise NotServed("the optimizer has hooks")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if set(groups) != {id(p) for p in parameters}:
        raise NotServed("the optimizer has not just the parameters of the model")
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
    """Whether a learning rate is a tensor whose value would have to be waited for."""
    return isinstance(rate, torch.Tensor) and rate.device.type != "cpu"


def settings_of(optimizer):
    """Every object that an optimizer's groups hold: as long as they are the same, only tensors may have changed."""
    settings = []
    for group in optimizer.param_groups:
        settings += group.values()
        settings += group["params"]
        # A list may have been changed in place.
        settings += group.get("betas", ())
    return settings


def numbers_of(groups, rule):
    """The kernel's numbers for each parameter, given its group; a rate that is on a GPU counts as 0."""
    rows = {id(group): _numbers(group, rule) for group in groups}
    return array("f", chain.from_iterable(rows[id(group)] for group in groups))


def _numbers(group, rule):
    row = [0.0] * lenet.NUMBERS
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
    """1 - beta^(2^k) for each bit of a step's number but its sign."""
    return [1 - beta**2**k for k in range(lenet.BITS - 1)] + [0.0]


class Moments:
    """The optimiser's state: views of buffers like the parameters' own, in the places where torch keeps it.

    Attributes:
        buffers: as many as the kernel has moments, each like the flat buffer.
        counts: (programs) int32 on the device, the updates so far, for the kernel to count on.
        steps: (10) float32 on the device, where the kernel writes them for each parameter.
    """

    def __init__(self, weights, optimizer, rule):
        self.weights, self.optimizer = weights, optimizer
        adam, device, n = rule["rule"] == "Adam", weights.device, len(weights.parameters)
        self._names = _MOMENTS[rule["rule"]][: rule["moments"] if adam else int(rule["momentum"])]
        self.buffers = [torch.zeros_like(weights.flat) for _ in self._names]
        parts = list(zip(*map(weights.split, self.buffers))) if self._names else [()] * n
        blocks = torch.tensor(weights.geometry.flat) // lenet.BLOCK
        self._rows = torch.repeat_interleave(torch.arange(n), blocks.diff())
        self.counts = torch.zeros(len(self._rows), dtype=torch.int32, device=device)
        # What the optimiser's state of each parameter should be, and what was last seen there.
        self.views = [dict(zip(self._names, of)) for of in parts]
        self._seen, self._counted, self._even, self._version, self._adam = [None], b"", False, 0, adam
        if adam and any(group.get("fused") for group in optimizer.param_groups):
            self._array, self._rows = None, self._rows.to(device)
            self._show_steps(torch.zeros(n, device=device))
        else:
            self._count_in_an_array()
        self.steps = self._steps if self._array is None else torch.zeros(n, device=device)

    def _count_in_an_array(self):
        """Steps that torch looks for on the CPU are views of an array, in which Python counts faster than torch."""
        self._array = array("f", [0.0] * len(self.views))
        self._address, _ = self._array.buffer_info()
        self._show_steps(torch.frombuffer(self._array, dtype=torch.float32))

    def _show_steps(self, steps):
        """SGD's are nowhere to be seen: what matters there is whether there was an update."""
        self._steps = steps
        if self._adam:
            for views, step in zip(self.views, steps):
                views["step"] = step

    def load(self):
        """Take over what was loaded into the optimiser or computed by it since the last step."""
        if self._array is None:
            counted = self._steps._version == self._version
        else:
            counted = self._array.tobytes() == self._counted and self._steps.data_ptr() == self._address
        if counted and all(map(is_, self._values(), self._seen)):
            return
        if self._array is not None and self._steps.data_ptr() != self._address:
            # Sharing a tensor with another process moves it.
            self._count_in_an_array()
        for i, views in enumerate(self.views if self.views[0] else ()):
            state = self.optimizer.state[self.weights.parameters[i]]
            if not self._adam and state.get("momentum_buffer") is not views["momentum_buffer"]:
                self._array[i] = float(state.get("momentum_buffer") is not None)
            for name, view in views.items():
                value = state.get(name)
                if value is None:
                    view.zero_()
                elif value is not view:
                    view.copy_(value)
                state[name] = view
        self.counts.copy_(self._steps[self._rows])
        self._seen = list(self._values())
        if self._array is None:
            self._version = self._steps._version
        else:
            self._counted, self._even = self._array.tobytes(), len(set(self._array)) == 1

    def _values(self):
        """Every object of the optimiser's state, and an end, so that one that is missing or new is seen, too."""
        return chain(chain.from_iterable(map(dict.values, self.optimizer.state.values())), _END)

    def start_anew(self):
        """Take everything over from the optimiser again, the device's counts among it."""
        self._seen = [None]

    def count(self):
        """There was an update: count it where torch does, as the kernel does on the device."""
        if self._array is not None and (self._adam or 0.0 in self._array):
            if self._even:
                counted = array("f", (self._array[0] + 1,)) * len(self._array)
            else:
                counted = array("f", map(_one_more, self._array))
            self._array[:], self._counted = counted, counted.tobytes()
