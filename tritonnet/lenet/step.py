"""A LeNet's training step in four launches: its buffers, and how it follows parameters, gradients and optimiser."""

import warnings
from operator import attrgetter, is_
from typing import NamedTuple

import torch

from ..dispatch import implementation, launchers, on_device
from .graph import NotCaptured, capture
from .losses import FirstBad, Losses
from .optimizer import Moments, have_hooks, numbers_of, rate_on_device, rule_of, settings_of, tell_schedulers
from .served import NotServed, check_batch, default_format, geometry_of, ignored_target, parameters_of
from .weights import buffers

if launchers is not None:
    from ..kernels._common import INTERPRETED
    from ..kernels.launching import compiled_together
    from ..kernels.lenet import forward as lenet_forward
    from ..kernels.lenet import gradient as lenet_gradient
    from ..kernels.lenet import layout
    from ..kernels.lenet import pack as lenet_pack
    from ..kernels.lenet import update as lenet_update

# Larger batches keep the GPU busy for longer than the host takes to queue four launches, and are not copied.
GRAPH_BELOW = 8192
# Kinds of batches whose buffers and graphs are kept, the most recently used.
MOST_BATCHES = 8

_ADDRESS, _IS_CONTIGUOUS = torch.Tensor.data_ptr, torch.Tensor.is_contiguous
# A change of shape or dtype shows in the size in bytes, and a change of device in the address.
_BYTES, _REQUIRES_GRAD, _GRAD = attrgetter("nbytes"), attrgetter("requires_grad"), attrgetter("grad")
# A parameter's hooks on its gradient, and on the gradient after accumulation.
_ON_GRADIENT, _ON_SUM = attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")


def _have_hooks(parameters):
    """Whether these parameters have hooks on their gradients, which the launches would not call."""
    return any(map(_ON_GRADIENT, parameters)) or any(map(_ON_SUM, parameters))


def _lie_in_order(tensors, sizes):
    """Whether the tensors are contiguous and have these sizes in bytes."""
    return list(map(_BYTES, tensors)) == sizes and all(map(_IS_CONTIGUOUS, tensors))


class Batch:
    """The buffers for batches of one shape: between the launches, and for a graph's inputs if `static`."""

    def __init__(self, images, labels, geometry, format, static):
        N, device = len(images), images.device
        self.images = torch.empty_like(images, memory_format=torch.contiguous_format) if static else None
        self.labels = torch.empty_like(labels, memory_format=torch.contiguous_format) if static else None
        self.memory = lenet_forward.activations(N, geometry, format, device, train=True)
        self.splits = lenet_gradient.splits_for(format, N, geometry)
        self.scratch, self.partial = lenet_gradient.sums(geometry, self.splits, device)
        self.table = layout.table(geometry, self.splits, device)
        self.replays, self.captured = {}, static  # False once a capture has failed


class Progress(NamedTuple):
    """State of a step: its calls, whether one of the current group had a loss that was not finite, and the format."""

    calls: int = 0
    spoiled: bool = False
    format: str | None = None


NOTHING_YET = Progress()


class FusedLaunches:
    """The step of a net that `geometry_of` accepts; raises NotServed, when made or called, for any other.

    Args:
        layers: conv1, conv2, fc1, fc2 and fc3 of the model.
        pixels: function of images that returns how the kernels read them, or None where uint8 is not accepted.
        report: function that is called when a capture fails, in place of a warning.
        progress: of the step that this one continues.
    """

    graphs_on = ("cuda",)

    def __init__(
        self, model, layers, loss, optimizer, pixels, precision, accumulate, report=None, progress=NOTHING_YET
    ):
        self.geometry = geometry_of(layers)
        self.parameters = parameters = parameters_of(layers, self.geometry)
        if {id(p) for p in model.parameters()} != {id(p) for p in parameters}:
            raise NotServed("the model has parameters besides those of its five layers")
        if not all(p.requires_grad for p in parameters):
            raise NotServed("parameters are frozen")
        if _have_hooks(parameters):
            raise NotServed("parameters have hooks")
        self.ignore_index = ignored_target(loss)
        self.rule, _ = rule_of(optimizer, parameters)
        self.layers, self.optimizer, self.pixels, self.accumulate = layers, optimizer, pixels, accumulate
        self.device, self.calls = parameters[0].device, progress.calls
        self.format = progress.format or precision or default_format(self.device)
        self.moments = Moments(parameters, optimizer, self.rule)
        self.grads = [torch.zeros_like(p, requires_grad=False) for p in parameters] if accumulate > 1 else []
        self.numbers = torch.zeros(len(parameters), layout.NUMBERS, dtype=torch.float32, device=self.device)
        self.places = torch.zeros(len(parameters), layout.PLACES, dtype=torch.int64, device=self.device)
        self.steps = torch.zeros(len(parameters), dtype=torch.int32, device=self.device)
        self.plain, self.packed = buffers(self.geometry, self.format, self.device)
        self.losses, self.bad = Losses(self.device), FirstBad(self.device, progress.calls, progress.spoiled)
        self.report, self._said, self._told, self._unsettled = report, False, None, False
        self._settings, self._rows, self._batches, self._latest = [], None, {}, None
        self._bytes, self._addresses = list(map(_BYTES, parameters)), []
        # The dicts and names of the model's parameters, to notice if one is replaced.
        own = [(m._parameters, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
        self._registers, self._names, self._registered = zip(*own)

    def __call__(self, images, labels):
        if implementation(self.plain) is not launchers:
            raise NotServed("the backend is the reference")
        with on_device(self.device):
            self._follow_optimizer()
            if not all(map(is_, map(dict.get, self._registers, self._names), self._registered)):
                raise NotServed("parameters have been replaced")
            if images.requires_grad:
                raise NotServed("images take gradients, too")
            if not all(map(_REQUIRES_GRAD, self.parameters)):
                raise NotServed("parameters have been frozen")
            if _have_hooks(self.parameters):
                raise NotServed("parameters have hooks now")
            if not _lie_in_order(self.parameters, self._bytes):
                raise NotServed("parameters have changed their dtype, shape or memory order")
            key = images.shape, images.dtype, labels.shape, labels.dtype
            batch = self._batches.get(key)
            if batch is None:
                check_batch(images, labels, self.geometry, self.pixels)
            turn = self.calls % self.accumulate
            last = turn == self.accumulate - 1
            if self.grads:
                self._follow_gradients(turn)
            if last:
                self._prepare_update()
            self._follow_memory()
            loss = self.losses.next()
            try:
                if batch is None:
                    batch = self._new_batch(key, images, labels, turn > 0, last)
                elif batch is not self._latest:
                    self._batches[key] = self._batches.pop(key)
                self._latest = batch
                self._run(batch, images, labels, turn > 0, last)
            except BaseException:  # it is not known which launches ran
                self.losses.start_anew()
                self.moments.start_anew()
                raise
            # A call that fails does not count: the next call takes its turn in the group.
            self.calls += 1
            if last:
                self.moments.count()
                if self._unsettled:
                    self.moments.settle()
                    self._unsettled = False
                # As torch's in-place operators do, so that autograd notices the write.
                torch.autograd.graph.increment_version(self.parameters)
            self._report_bad(self.bad.look, self.calls)
            return loss

    def _report_bad(self, look, *args):
        """Calls look(*args); before it raises, the optimiser's counts are corrected to the updates made."""
        try:
            look(*args)
        except FloatingPointError:
            with on_device(self.device):
                self.moments.settle()
            # The group's last call will make no update either.
            self._unsettled = self.calls % self.accumulate != 0
            raise

    def _follow_memory(self):
        """Update the table of addresses if parameters, gradients or state have moved."""
        addresses = [*map(_ADDRESS, self.parameters), *map(_ADDRESS, self.grads), *self.moments.addresses]
        if addresses == self._addresses:
            return
        parameters_of(self.layers, self.geometry)  # two of them may have become views of one tensor
        rows = []
        for i, p in enumerate(self.parameters):
            moments, count = self.moments.of(i)
            rows.append(layout.place(p, self.grads[i] if self.grads else None, moments, count))
        # A copy from pageable memory is staged before the call returns, so the next call may follow at once.
        rows = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self.places.copy_(rows, non_blocking=True)
        self._addresses = addresses

    def _follow_gradients(self, turn):
        """Put the group's gradients into p.grad, and take over what has been changed there since."""
        grads = self.grads
        if all(map(is_, map(_GRAD, self.parameters), grads)) and _lie_in_order(grads, self._bytes):
            return
        for i, p in enumerate(self.parameters):
            if not _lie_in_order(grads[i : i + 1], self._bytes[i : i + 1]):
                grads[i] = torch.zeros_like(p, requires_grad=False)
            if turn > 0 and p.grad is not grads[i]:
                grads[i].zero_() if p.grad is None else grads[i].copy_(p.grad)
            p.grad = grads[i]

    def _follow_optimizer(self):
        """Take over what has changed in the optimizer; in most calls nothing has."""
        optimizer = self.optimizer
        if have_hooks(optimizer):
            raise NotServed("the optimizer has hooks")
        settings = settings_of(optimizer)
        if len(settings) == len(self._settings) and all(map(is_, settings, self._settings)):
            return
        rule, self._groups = rule_of(optimizer, self.parameters)
        if rule != self.rule:
            self.rule, self.moments, self._batches = rule, Moments(self.parameters, optimizer, rule), {}
            self._addresses = []
        rates = [group["lr"] for group in self._groups]
        self._rates = rates if any(map(rate_on_device, rates)) else None
        # Whether hyperparameters are tensors, which may change in place.
        self._loose = any(
            isinstance(value, torch.Tensor) and not (name == "lr" and rate_on_device(value))
            for group in optimizer.param_groups
            for name, values in group.items()
            for value in (values if name == "betas" else [values])
        )
        self._settings, self._settled = settings, False

    def _prepare_update(self):
        """Bring the optimiser's state and hyperparameters up to date for the next update."""
        self.moments.load()
        if not self._settled or self._loose:
            rows = numbers_of(self._groups, self.rule)
            if rows != self._rows:
                # A copy from pageable memory is staged before the call returns, so the next call may follow at once.
                rows_now = torch.frombuffer(rows, dtype=torch.float32).view_as(self.numbers)
                self.numbers.copy_(rows_now, non_blocking=True)
                self._rows = rows
            self._settled = True
        if self._rates:
            self._fetch_rates()
        if self._told != vars(self.optimizer).get("step"):
            tell_schedulers(self.optimizer, self.parameters)
            self._told = vars(self.optimizer).get("step")

    def _fetch_rates(self):
        """Copy learning rates that are on a device, in one call if all parameters share one."""
        places, first = self.numbers[:, lenet_update.LR], self._rates[0]
        if all(rate is first for rate in self._rates):
            places.copy_(first)
            return
        for place, rate in zip(places, self._rates):
            if rate_on_device(rate):
                place.copy_(rate)

    def _new_batch(self, key, images, labels, add, update):
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        static = self.device.type in self.graphs_on and len(images) < GRAPH_BELOW
        while len(self._batches) >= MOST_BATCHES:
            del self._batches[next(iter(self._batches))]
        batch = Batch(images, labels, self.geometry, self.format, static)
        if not INTERPRETED:
            # In parallel, as each kernel takes seconds to compile.
            with compiled_together():
                where = (batch.images, batch.labels) if static else (images, labels)
                self._launch(batch, *where, add, update)
        self._batches[key] = batch
        return batch

    def _run(self, batch, images, labels, add, update):
        if batch.images is None:
            images = images.to(self.device, non_blocking=True).resolve_neg().contiguous()
            labels = labels.to(self.device, non_blocking=True).resolve_neg().contiguous()
            self._launch(batch, images, labels, add, update)
            return
        # One call for both copies would be no faster: torch copies tensors of two dtypes one after the other.
        batch.images.copy_(images, non_blocking=True)
        batch.labels.copy_(labels, non_blocking=True)
        replay = batch.replays.get((add, update))
        if replay is None:

            def launch():
                self._launch(batch, batch.images, batch.labels, add, update)

            changed = [p.detach() for p in self.parameters] + self.grads + self.moments.changed()
            changed += [self.bad.numbers, self.losses.place]
            before = [t.clone() for t in changed]

            def restore():
                for t, value in zip(changed, before):
                    t.copy_(value)

            try:
                replay = capture(launch, restore, self.device)
            except NotCaptured as e:
                replay, batch.captured = launch, False
                self._say_once(f"batches of {len(images)} take four launches without a CUDA graph: {e}")
            batch.replays[add, update] = replay
        replay()

    def _say_once(self, line):
        if self._said:
            return
        self._said = True
        if self.report:
            self.report(line)
        else:
            warnings.warn(line, RuntimeWarning, stacklevel=5)

    def _launch(self, batch, images, labels, add, update):
        geometry, format = self.geometry, self.format
        pixels = lenet_forward.Pixels() if self.pixels is None else self.pixels(images)
        lenet_pack.pack(
            self.places, torch.float32, self.plain, self.packed, geometry, format, self.steps, self.bad.numbers, not add
        )
        lenet_forward.forward(
            images, labels, self.plain, self.packed, geometry, format, pixels, batch.memory, batch.memory["logits"],
            self.ignore_index,
        )  # fmt: skip
        lenet_gradient.gradients(
            images, self.packed, geometry, format, pixels, batch.memory, batch.splits, batch.scratch, batch.partial
        )
        rule = {**self.rule, "moments": len(self.moments.names)} if update else {}
        lenet_update.update(
            self.places, geometry, batch.table, self.numbers, self.steps, batch.partial, batch.memory["loss"],
            self.losses.place, self.bad.numbers, keep=bool(self.grads), add=add, scale=1 / self.accumulate, **rule,
        )  # fmt: skip

    def latest_replay(self):
        """A function that replays the last batch's step in its buffers, for measurements; None without a graph.

        Only for steps that do not accumulate. The host's part of a call, such as counting it, is left out.
        """
        graph = self._latest.replays.get((False, True))
        if graph is None or not self._latest.captured:
            return None

        def replay():
            self.losses.next()  # so that the replay does not write its loss past the end of a block
            graph()

        return replay

    def progress(self):
        """The Progress that another step can continue from, with corrected counts of updates; waits for the device."""
        with on_device(self.device):
            self.moments.settle()
        spoiled = self.calls % self.accumulate > 0 and self.bad.in_group()
        return Progress(self.calls, spoiled, self.format)

    def check(self):
        """FloatingPointError if a call since the last check had a loss that was not finite; waits for the GPU."""
        self._report_bad(self.bad.check)
