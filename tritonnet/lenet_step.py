"""A LeNet's training step in three launches: its buffers, the optimiser's state and numbers, the graph of it all."""

from array import array
from itertools import chain
from operator import attrgetter, is_

import torch

from . import nn
from .dispatch import launchers
from .lenet_weights import NotServed, default_format, geometry_of, parameters_of, weights_of
from .nn import functional as F
from .nn._plain import is_plain

if launchers is not None:
    from .kernels import lenet, lenet_forward, lenet_gradient, lenet_update

# Larger batches keep the GPU busy for longer than the host takes to queue three launches, and are read where they are.
GRAPH_BELOW = 8192
# Calls between two looks at whether a loss was not finite.
LOOK_EVERY = 64

# The state that torch keeps for a parameter, in the order of the kernel's moments.
_MOMENTS = {"SGD": ("momentum_buffer",), "Adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}


def ignored_target(loss):
    """The ignore_index of a plain mean cross-entropy; NotServed for any other loss."""
    if loss in (F.cross_entropy, torch.nn.functional.cross_entropy):
        return -100
    is_module = isinstance(loss, torch.nn.Module)
    if not is_module or not is_plain(loss, (torch.nn.CrossEntropyLoss, nn.CrossEntropyLoss)):
        raise NotServed(f"the loss is a {getattr(loss, '__name__', type(loss).__name__)} or has hooks")
    if loss.weight is not None or loss.reduction != "mean" or loss.label_smoothing:
        raise NotServed("the loss has class weights, label smoothing or no mean")
    return loss.ignore_index


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


def _on_device(rate):
    """Whether a learning rate is a tensor whose value would have to be waited for."""
    return isinstance(rate, torch.Tensor) and rate.device.type != "cpu"


class Moments:
    """The optimiser's state: views of buffers like the parameters' own, in the places where torch keeps it."""

    def __init__(self, weights, optimizer, rule):
        self.weights, self.optimizer = weights, optimizer
        count = rule["moments"] if rule["rule"] == "Adam" else int(rule["momentum"])
        self.names = _MOMENTS[rule["rule"]][:count]
        self.buffers = [torch.zeros_like(weights.flat) for _ in self.names]
        parts = list(zip(*map(weights.split, self.buffers))) if self.names else [()] * len(weights.parameters)
        self.counts = [0] * len(weights.parameters)
        self.steps, self._steps_version = None, 0
        if rule["rule"] == "Adam":
            # One tensor, so that one call counts for all; where torch looks for them.
            on_device = any(group.get("fused") for group in optimizer.param_groups)
            self.steps = torch.zeros(len(parts), device=weights.device if on_device else "cpu")
            self.names, parts = (*self.names, "step"), [(*of, step) for of, step in zip(parts, self.steps)]
        # What the optimiser's state of each parameter should be.
        self.views = [dict(zip(self.names, of)) for of in parts]
        self._seen = None

    def load(self):
        """Take over what was loaded into the optimiser or computed by it since the last step."""
        seen = [value for state in self.optimizer.state.values() for value in state.values()]
        counted = self.steps is None or self.steps._version == self._steps_version
        if counted and self._seen is not None and len(seen) == len(self._seen) and all(map(is_, seen, self._seen)):
            return
        for i, p in enumerate(self.weights.parameters):
            # Without asking for it a state comes into being.
            state = self.optimizer.state[p] if p in self.optimizer.state else {}
            known = all(state.get(name) is view for name, view in self.views[i].items())
            if not known:
                self.counts[i] = int(all(state.get(name) is not None for name in self.names))
            for name, view in self.views[i].items():
                value = state.get(name)
                if value is None:
                    view.zero_()
                elif value is not view:
                    view.copy_(value)
                    state[name] = view
            if self.steps is not None and (not known or not counted):
                # On a GPU this waits.
                self.counts[i] = int(self.steps[i])
        self._seen = [value for state in self.optimizer.state.values() for value in state.values()]
        self._steps_version = 0 if self.steps is None else self.steps._version

    def count(self):
        """Another update is on its way: count it where torch does, and let the state be found there."""
        if self.names and not all(self.counts):
            for p, count, views in zip(self.weights.parameters, self.counts, self.views):
                if count == 0:
                    self.optimizer.state[p].update(views)
            self._seen = None
        self.counts = [count + 1 for count in self.counts]
        if self.steps is not None:
            self.steps += 1
            self._steps_version = self.steps._version

    def numbers(self, groups, rule):
        """The kernel's numbers for each parameter, for the update after `counts` of them; no rate that is on a GPU."""
        rows = {}
        for group, count in zip(groups, self.counts):
            if (id(group), count) not in rows:
                rows[id(group), count] = _numbers(group, count, rule)
        return array("f", chain.from_iterable(rows[id(group), count] for group, count in zip(groups, self.counts)))


def _numbers(group, count, rule):
    """The numbers of a group's parameters that have been updated `count` times."""
    row = [0.0] * lenet.NUMBERS
    row[lenet_update.LR] = 0.0 if _on_device(group["lr"]) else float(group["lr"])
    row[lenet_update.WEIGHT_DECAY] = float(group["weight_decay"])
    row[lenet_update.SIGN] = -1.0 if group["maximize"] else 1.0
    if rule["rule"] == "SGD":
        momentum = float(group["momentum"])
        # The first buffer is the gradient itself.
        row[lenet_update.KEEP1] = momentum if count else 0.0
        row[lenet_update.ADD1] = 1 - float(group["dampening"]) if count else 1.0
        row[lenet_update.KEEP2] = momentum
    else:
        beta1, beta2 = map(float, group["betas"])
        row[lenet_update.ADD1], row[lenet_update.KEEP2], row[lenet_update.ADD2] = 1 - beta1, beta2, 1 - beta2
        row[lenet_update.EPS] = float(group["eps"])
        row[lenet_update.CORRECTION1] = 1 - beta1 ** (count + 1)
        row[lenet_update.CORRECTION2] = (1 - beta2 ** (count + 1)) ** 0.5
    return row


def capture(launch, restore, device):
    """A function that replays what launch() launches, as one CUDA graph; what a first run changes is restored."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # Compiles and loads the kernels, which a capture does not allow.
        launch()
        restore()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


class Batch:
    """The buffers for batches of one shape, between the three launches and, if they are a graph, before them."""

    def __init__(self, images, labels, geometry, format, static):
        N, device = len(images), images.device
        self.images = torch.empty_like(images, memory_format=torch.contiguous_format) if static else None
        self.labels = torch.empty_like(labels, memory_format=torch.contiguous_format) if static else None
        self.loss = torch.empty((), device=device)
        self.memory = lenet_forward.activations(N, geometry, format, device, train=True)
        self.splits = lenet_gradient.splits_for(format, N, geometry)
        self.scratch, self.partial = lenet_gradient.sums(geometry, self.splits, device)
        self.table = lenet.table(geometry, self.splits, device)
        self.replays = {}


class ThreeLaunches:
    """The step of a net that `geometry_of` knows; NotServed, when it is made or called, where there is none.

    Args:
        layers: conv1, conv2, fc1, fc2 and fc3 of the model.
        pixels: function of images that gives how the kernels read them, or None where bytes are not taken.
    """

    graphs_on = ("cuda",)

    def __init__(self, model, layers, loss, optimizer, pixels, precision, accumulate):
        self.geometry, parameters = geometry_of(layers), parameters_of(layers)
        if {id(p) for p in model.parameters()} != {id(p) for p in parameters}:
            raise NotServed("the model has parameters beside those of its five layers")
        if not all(p.requires_grad for p in parameters):
            raise NotServed("parameters are frozen")
        self.ignore_index = ignored_target(loss)
        self.rule, _ = rule_of(optimizer, parameters)
        self.optimizer, self.pixels, self.accumulate = optimizer, pixels, accumulate
        self.format = precision or default_format(parameters[0].device)
        self.weights = weights_of(model, parameters, self.geometry)
        self.weights.adopt()
        self.device, self.parameters = self.weights.device, parameters
        self.moments = Moments(self.weights, optimizer, self.rule)
        self.grad = torch.zeros_like(self.weights.flat) if accumulate > 1 else None
        self.numbers = torch.zeros(len(parameters), lenet.NUMBERS, device=self.device)
        self.trouble = torch.zeros(2, dtype=torch.int32, device=self.device)
        self._rows, self._settings, self._batches, self._calls, self._look, self._told = None, None, {}, 0, None, False

    def __call__(self, images, labels):
        key = images.shape, images.dtype, labels.shape, labels.dtype
        if key not in self._batches:
            self._check_batch(images, labels)
        self._follow_optimizer()
        if not all(map(attrgetter("requires_grad"), self.parameters)):
            raise NotServed("parameters have been frozen")
        turn, self._calls = self._calls % self.accumulate, self._calls + 1
        last = turn == self.accumulate - 1
        packed = self.weights.packed(self.format, adopt=True)
        if last:
            self._prepare_update()
        loss = self._run(key, images, labels, packed, add=turn > 0, update=last)
        if self.grad is not None and turn == 0:
            for p, view in zip(self.parameters, self.weights.split(self.grad)):
                p.grad = view
        if last:
            self.weights.mark(self.format)
        self._look_for_trouble()
        return loss

    def _follow_optimizer(self):
        """Take over what has changed about the optimizer; most calls find nothing."""
        groups = self.optimizer.param_groups
        hooks = self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks
        settings = [(*map(id, group["params"]), *group.values()) for group in groups] + [tuple(map(len, hooks))]
        if settings == self._settings:
            return
        rule, self._groups = rule_of(self.optimizer, self.parameters)
        if rule != self.rule:
            self.rule, self.moments, self._batches = rule, Moments(self.weights, self.optimizer, rule), {}
        self._settings, self._rates_on_device = settings, any(_on_device(group["lr"]) for group in groups)

    def _check_batch(self, images, labels):
        C, size = self.geometry.channels, self.geometry.size
        raw = images.dtype == torch.uint8
        if raw and self.pixels is None:
            raise TypeError("images of dtype uint8 need a tritonnet.LeNet, which knows their mean and deviation")
        if not raw and images.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"images must be floating or uint8, got {images.dtype}")
        side = tuple(images.shape[2:]) if raw else (size, size)
        if images.dim() != 4 or len(images) == 0 or tuple(images.shape[1:]) != (C, *side):
            raise ValueError(f"images must be (N, {C}, {size}, {size}) with N > 0, got {list(images.shape)}")
        if labels.shape != images.shape[:1] or labels.dtype not in (torch.int64, torch.uint8):
            raise ValueError(
                f"labels must be ({len(images)}) of int64 or uint8, got {list(labels.shape)} of {labels.dtype}"
            )

    def _prepare_update(self):
        """The optimiser's state and numbers for the coming update."""
        self.moments.load()
        rows = self.moments.numbers(self._groups, self.rule)
        if rows != self._rows:
            # From pageable memory: copied aside before the call returns, so that the next may follow at once.
            self.numbers.copy_(torch.frombuffer(rows, dtype=torch.float32).view_as(self.numbers), non_blocking=True)
            self._rows = rows
        if self._rates_on_device:
            for row, group in zip(self.numbers, self._groups):
                if _on_device(group["lr"]):
                    row[lenet_update.LR].copy_(group["lr"])
        if not self._told:
            self._tell_schedulers()
        self.moments.count()

    def _tell_schedulers(self):
        """A scheduler warns if the optimiser's step was never called: without gradients it does nothing."""
        grads = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        self.optimizer.step()
        for p, grad in zip(self.parameters, grads):
            p.grad = grad
        self._told = True

    def _run(self, key, images, labels, packed, add, update):
        if key not in self._batches:
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            static = self.device.type in self.graphs_on and len(images) < GRAPH_BELOW
            self._batches[key] = Batch(images, labels, self.geometry, self.format, static)
        batch = self._batches[key]
        if batch.images is None:
            images = images.to(self.device, non_blocking=True).contiguous()
            labels = labels.to(self.device, non_blocking=True).contiguous()
            self._launch(batch, images, labels, packed, add, update)
            return batch.loss.clone()
        batch.images.copy_(images, non_blocking=True)
        batch.labels.copy_(labels, non_blocking=True)
        if (add, update) not in batch.replays:

            def launch():
                self._launch(batch, batch.images, batch.labels, packed, add, update)

            changed = [self.weights.flat, packed, self.trouble, *self.moments.buffers]
            changed += [self.grad] if self.grad is not None else []
            before = [t.clone() for t in changed]

            def restore():
                for t, value in zip(changed, before):
                    t.copy_(value)

            batch.replays[add, update] = capture(launch, restore, self.device)
        batch.replays[add, update]()
        return batch.loss.clone()

    def _launch(self, batch, images, labels, packed, add, update):
        flat, pixels = self.weights.flat, lenet_forward.Pixels() if self.pixels is None else self.pixels(images)
        lenet_forward.forward(
            images, labels, flat, packed, self.geometry, self.format, pixels, batch.memory, batch.memory["logits"],
            self.ignore_index,
        )  # fmt: skip
        lenet_gradient.gradients(
            images, packed, self.geometry, self.format, pixels, batch.memory, batch.splits, batch.scratch, batch.partial
        )
        rule = {name: value for name, value in self.rule.items() if name != "moments"} if update else {}
        lenet_update.update(
            flat, packed, self.geometry, batch.table, self.numbers, batch.partial, batch.memory["loss"], batch.loss,
            self.trouble, self.grad, self.moments.buffers, 1 / self.accumulate, add, **rule,
        )  # fmt: skip

    def _look_for_trouble(self):
        """Ask now and then, without waiting, whether a loss was not finite; on the CPU there is nothing to wait for."""
        if self.device.type != "cuda":
            if self.device.type == "cpu" or self._calls % LOOK_EVERY == 0:
                self.check()
        elif self._look is None and self._calls % LOOK_EVERY == 0:
            seen, event = torch.empty(2, dtype=torch.int32, pin_memory=True), torch.cuda.Event()
            seen.copy_(self.trouble, non_blocking=True)
            event.record()
            self._look = seen, event
        elif self._look is not None and self._look[1].query():
            seen, self._look = self._look[0], None
            if seen[0]:
                self.check()

    def check(self):
        """FloatingPointError if the loss of a call was not finite since the last time; waits for the GPU."""
        first = int(self.trouble[0])
        if first:
            self.trouble[0] = 0
            raise FloatingPointError(f"the loss of call {first} was not a finite number")
