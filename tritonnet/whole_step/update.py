"""The update of torch's SGD, Adam and AdamW by its fused implementation: one launch for each group of parameters."""

from operator import attrgetter

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from ..lenet.optimizer import have_hooks, rate_on_device, tell_schedulers

_OPTIMIZERS = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
_PLAIN = torch.Tensor, torch.nn.Parameter
_DTYPES = torch.float64, torch.float32, torch.float16, torch.bfloat16
_DEVICES = "cpu", "cuda"
_KIND = attrgetter("dtype", "device", "layout", "shape")


def settings_of(optimizer):
    """Every setting of the groups except their learning rates, which a captured update reads from the device."""
    return [item for group in optimizer.param_groups for item in group.items() if item[0] not in ("params", "lr")]


def _lie_alike(t, other):
    """Whether two tensors of one shape have the same strides, where a dimension of one element may have any."""
    strides, others = t.stride(), other.stride()
    return strides == others or all(a == b or n == 1 for a, b, n in zip(strides, others, t.shape))


def _is_dense(t):
    """Whether the elements fill their memory without gaps, each once."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, n in sorted((stride, n) for stride, n in zip(t.stride(), t.shape) if n != 1):
        if stride != expected:
            return False
        expected *= n
    return True


def _like(t, p):
    """A tensor with the elements of t and exactly the strides of p, as the fused kernels demand: t itself if it can."""
    if t.stride() == p.stride():
        return t
    if _lie_alike(t, p):
        return t.as_strided(p.shape, p.stride())
    return torch.empty_like(p, requires_grad=False).copy_(t)


class Update:
    """What optimizer.step() does, in torch's own state; torch's fused=True to the bit, and others but for rounding.

    Attributes:
        by_value: whether learning rates are constants of a launch. A captured launch reads them from the device, as
            float32 on a GPU.
        updated: [(index, count)] of the parameters in the latest launch whose count torch keeps on the host.
    """

    def __init__(self, optimizer):
        self.optimizer, self.by_value, self.updated = optimizer, True, []
        self._told, self._place, self._parameters = None, None, []
        # On the device: a learning rate for each group, and the updates of each parameter whose count is on the host.
        self._rates, self._rated, self._counts, self._counted, self._on_host = [], [], None, [], []

    def __call__(self):
        """One update by the gradients in p.grad."""
        if self.refusal():
            self.optimizer.step()
            return
        with torch.no_grad():
            self.prepare()
            self.launch()
        self.count(self.updated)

    def refusal(self):
        """Why the fused implementation cannot make the update now, or None."""
        optimizer = self.optimizer
        if type(optimizer) not in _OPTIMIZERS:
            return f"the optimizer is a {type(optimizer).__name__}"
        if have_hooks(optimizer):
            return "the optimizer has hooks"
        # A scheduler replaces it by one that notes its calls.
        if "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            return "the optimizer's step has been replaced"
        for group in optimizer.param_groups:
            if group["differentiable"]:
                return "the optimizer is differentiable"
        if any(isinstance(v, torch.Tensor) for _, value in settings_of(optimizer) for v in _each(value)):
            return "settings of the optimizer are tensors"
        devices = set()
        groups = {p: group for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        for p, group in groups.items():
            g, state, kind = p.grad, optimizer.state.get(p, {}), _KIND(p)
            devices.add(p.device)
            if type(p) not in _PLAIN or type(g) is not torch.Tensor or p.dtype not in _DTYPES:
                return "there are parameters or gradients of other types than dense floating-point tensors"
            if kind != _KIND(g) or not _lie_alike(p, g) or not _is_dense(p) or p.is_neg() or g.is_neg():
                return "gradients do not lie in memory as their parameters"
            if any(_KIND(value) != kind for name, value in state.items() if name != "step" and value is not None):
                return "the optimizer's state is of another kind than the parameters"
            if state and not isinstance(state.get("step", g), torch.Tensor):
                return "the optimizer's counts are not tensors"
            if p.dtype == torch.float64 and p.device.type == "cuda" and not self._by_value(group):
                return "torch's fused kernels read a learning rate on a GPU as float32, and parameters are float64"
        if len(devices) > 1 or any(device.type not in _DEVICES for device in devices):
            return "the parameters are not on one device, a CPU or a CUDA GPU"
        return None

    def prepare(self):
        """Before a launch: bring what it reads from the device up to date, and create what state Adam has not yet."""
        self._follow_place()
        if type(self.optimizer) is not torch.optim.SGD:
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None and not self.optimizer.state.get(p):
                        self.optimizer.state[p] = _beginning(group, p)
        self._follow_rates()
        self._follow_counts()
        if self._told != vars(self.optimizer).get("step"):
            tell_schedulers(self.optimizer, self._parameters)
            self._told = vars(self.optimizer).get("step")

    def _follow_place(self):
        """Memory on the device, anew if there are other parameters or groups."""
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        place = parameters[0].device, len(groups), list(map(id, parameters))
        if place == self._place:
            return
        device, self._parameters, self._place = parameters[0].device, parameters, place
        # torch's kernels on a GPU read a float32; on a CPU they read any number.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        self._rates = [torch.zeros((), dtype=dtype, device=device) for _ in groups]
        self._counts = torch.zeros(len(parameters), dtype=torch.float32, device=device)
        self._rated, self._counted = [0.0] * len(groups), [0.0] * len(parameters)
        self._index = {id(p): i for i, p in enumerate(parameters)}

    def _by_value(self, group):
        return self.by_value and not rate_on_device(group["lr"])

    def _follow_rates(self):
        for i, group in enumerate(self.optimizer.param_groups):
            rate = group["lr"]
            if self._by_value(group):
                continue
            if rate_on_device(rate):
                self._rates[i].copy_(rate.detach().reshape(()))
                self._rated[i] = None
            elif float(rate) != self._rated[i]:
                self._rated[i] = float(rate)
                self._rates[i].fill_(self._rated[i])

    def _follow_counts(self):
        """Take over the counts that torch keeps on the host if they are not those of the last update."""
        self._on_host = []
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                step = self.optimizer.state.get(p, {}).get("step")
                if step is not None and self._kept_here(group, step, p):
                    self._on_host.append((self._index[id(p)], step))
        if not self._on_host:
            return
        for (i, _), count in zip(self._on_host, torch.stack([step for _, step in self._on_host]).tolist()):
            if count != self._counted[i]:
                self._counts[i] = self._counted[i] = count

    def _kept_here(self, group, step, p):
        """Whether the kernels count a parameter's updates in a copy, as torch keeps its count on the host."""
        return step.device != p.device or not (self.by_value or group.get("fused") or group.get("capturable"))

    def launch(self, found=None):
        """One launch for each group, without a wait.

        Args:
            found: () float32 on the device, 1 for no update after all; only once all state exists. None for an update.
        """
        self.updated = []
        launch = self._sgd if type(self.optimizer) is torch.optim.SGD else self._adam
        for i, group in enumerate(self.optimizer.param_groups):
            parameters = [p for p in group["params"] if p.grad is not None]
            common = dict(
                lr=float(group["lr"]) if self._by_value(group) else self._rates[i], weight_decay=group["weight_decay"],
                maximize=group["maximize"], foreach=False, fused=True, grad_scale=None, found_inf=found,
            )  # fmt: skip
            if parameters:
                launch(group, parameters, common)

    def _sgd(self, group, parameters, common):
        common.update(momentum=group["momentum"], dampening=group["dampening"], nesterov=group["nesterov"])
        if group["momentum"] == 0:
            sgd(parameters, _gradients(parameters), [None] * len(parameters), has_sparse_grad=False, **common)
            return
        state = self.optimizer.state
        new = [p for p in parameters if state.get(p, {}).get("momentum_buffer") is None]
        if new and common["found_inf"] is not None:
            raise RuntimeError("there is no momentum yet")
        # torch's kernel takes a first buffer from the gradient, for all parameters of a launch or for none.
        for chosen in (new, [p for p in parameters if not any(p is q for q in new)] if new else parameters):
            if not chosen:
                continue
            buffers = [None if chosen is new else self._of(p, "momentum_buffer") for p in chosen]
            sgd(chosen, _gradients(chosen), buffers, has_sparse_grad=False, **common)
            for p, buffer in zip(chosen, buffers):
                state[p]["momentum_buffer"] = buffer

    def _adam(self, group, parameters, common):
        names = "exp_avg", "exp_avg_sq", "max_exp_avg_sq"
        beta1, beta2 = group["betas"]
        moments = [[self._of(p, name) for p in parameters] for name in names[: 3 if group["amsgrad"] else 2]]
        counts = []
        for p in parameters:
            step, i = self.optimizer.state[p]["step"], self._index[id(p)]
            if self._kept_here(group, step, p):
                self.updated.append((i, step))
                step = self._counts[i]
            counts.append(step)
        adam(
            parameters, _gradients(parameters), *moments, *([] for _ in names[len(moments) :]), counts,
            beta1=beta1, beta2=beta2, eps=group["eps"], amsgrad=group["amsgrad"],
            decoupled_weight_decay=group["decoupled_weight_decay"], **common,
        )  # fmt: skip

    def _of(self, p, name):
        """A tensor of p's state, which is replaced if it does not lie in memory as p."""
        state = self.optimizer.state[p]
        state[name] = _like(state[name], p)
        return state[name]

    def count(self, updated):
        """Count an update where torch does, as the kernels have done on the device."""
        if updated:
            torch._foreach_add_([step for _, step in updated], 1)
            for i, _ in updated:
                self._counted[i] += 1

    def start_anew(self):
        """Have the next launch take over all counts from the host, as it is not known which updates were made."""
        self._counted = [None] * len(self._counted)

    def settle(self):
        """Correct the counts for updates that were not made, as the loss was not finite; waits for the device."""
        if not self._on_host:
            return
        made = self._counts.tolist()
        for i, step in self._on_host:
            if self._counted[i] is not None and step.item() == self._counted[i]:
                step.fill_(made[i])
                self._counted[i] = made[i]


def _each(value):
    return value if isinstance(value, (tuple, list)) else (value,)


def _gradients(parameters):
    return [_like(p.grad, p) for p in parameters]


def _beginning(group, p):
    """The state that torch gives a parameter before Adam's first update."""
    on_device = group["fused"] or group["capturable"]
    wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
    count = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=p.device if on_device else "cpu")
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]
    return {"step": count, **{name: torch.zeros_like(p, requires_grad=False) for name in names}}
