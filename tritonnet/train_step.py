"""A training step as one call: four launches for a LeNet, the fused operators for any other model."""

import contextlib
import math
from operator import attrgetter

import torch

from .conversion import convert
from .dispatch import float32_products, implementation, launchers
from .fusion import fuse
from .lenet import LeNet
from .lenet.losses import not_finite, send
from .lenet.recognition import find_layers
from .lenet.served import FORMATS, NotServed
from .lenet.step import NOTHING_YET, FusedLaunches, Progress


def _products_in(precision, device):
    """Has the operators take products in a format of TrainStep's, None for what torch's flags say."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return float32_products(precision) if precision else contextlib.nullcontext()


def _group_of(model):
    """The processes whose gradients a model averages, or None."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    # DistributedDataParallel and its like have a group; what fully_shard has sharded is everybody's.
    sharded = any(hasattr(p, "device_mesh") for p in model.parameters())
    return getattr(model, "process_group", torch.distributed.group.WORLD if sharded else None)


_KIND = attrgetter("shape", "dtype", "device")


class _Sent:
    """A number of a device's on its way to the host, which waits for what was queued before it and no more."""

    def __init__(self, number):
        self._there, self._event = (number, None) if number.device.type == "cpu" else send(number)

    def read(self):
        if self._event is not None:
            self._event.synchronize()
        return self._there.item()


class Operators:
    """The step of any model, through autograd and the optimiser."""

    def __init__(self, model, loss, optimizer, precision, accumulate, progress):
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.precision, self.accumulate, self.calls = precision, accumulate, progress.calls
        self.ignore_index, self._spoiled = getattr(loss, "ignore_index", -100), progress.spoiled
        self.group, self._registered, self._kinds, self._copies = _group_of(model), [], [], []

    def __call__(self, images, labels):
        device = next(self.model.parameters()).device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        turn = self.calls % self.accumulate
        if turn == 0:
            self.optimizer.zero_grad()
            self._spoiled = False
        self._keep_buffers()
        with _products_in(self.precision, device):
            loss = self.loss(self.model(images), labels)
            # In front of the backward, so that a GPU has work left while the host waits for the forward.
            value = _Sent(loss.detach())
            others = _Sent(self._spoils_any(loss.detach(), labels)) if self.group else None
            # A call that has failed before this is none of its group: what comes next takes its turn.
            self.calls += 1
            (loss / self.accumulate).backward()
        finite = math.isfinite(value.read())
        own = not finite and bool(self._spoils(loss.detach(), labels))
        if not (finite or own or self.group):
            # Gradients of 0 become NaN where images are not finite.
            own = not all(p.grad is None or p.grad.isfinite().all() for p in self.model.parameters())
        if own or (others and others.read()):
            self._spoiled = True
            self._restore_buffers()
        if turn == self.accumulate - 1 and not self._spoiled:
            self.optimizer.step()
        if not finite:
            raise not_finite(self.calls, ignored=not self._spoiled)
        if others and others.read():
            raise FloatingPointError(f"the loss of call {self.calls} was not finite in another process: no update")
        return loss.detach()

    def _spoils(self, loss, labels):
        """() bool on the device: whether a loss makes no update. Where every label is ignored the gradients are 0."""
        bad = ~loss.isfinite().all()
        return bad if labels.is_floating_point() else bad & ~(labels == self.ignore_index).all()

    def _spoils_any(self, loss, labels):
        """The same of all processes: the gradients are everybody's."""
        spoils = self._spoils(loss, labels).int()
        torch.distributed.all_reduce(spoils, torch.distributed.ReduceOp.MAX, self.group)
        return spoils

    def _keep_buffers(self):
        """Copies of what a forward itself changes, such as the running statistics of batch norm."""
        self._registered = [(m._buffers, name, b) for m in self.model.modules() for name, b in m._buffers.items()]
        buffers = [b for *_, b in self._registered if b is not None]
        kinds = list(map(_KIND, buffers))
        if kinds != self._kinds:
            self._kinds, self._copies = kinds, list(map(torch.empty_like, buffers))
        if buffers:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, buffers)

    @torch.no_grad()
    def _restore_buffers(self):
        copies = iter(self._copies)
        for register, name, b in self._registered:
            # A forward may put another tensor in a buffer's place.
            register[name] = b
            # What is constant may be expanded, and cannot be written to.
            if b is not None and not torch.equal(b, before := next(copies)):
                b.copy_(before)

    def progress(self):
        return Progress(self.calls, self._spoiled)

    def check(self):
        """Nothing is left to be found out: a call raises by itself."""


class TrainStep:
    """Forward, loss, backward and the optimiser's update as one call: loss = step(images, labels).

    For a LeNet this is four launches: tritonnet.LeNet, or any model whose forward is proved to be one (1 or 3
    channels, 28 or 32 pixels, 6 and 16 filters of 5 x 5, 120 and 84 hidden units, up to 1,024 classes), with the mean
    cross-entropy and torch's SGD, Adam or AdamW. On a GPU they are captured as one CUDA graph for each size of batch
    below 8,192. The same inputs give the same bits. Any other model goes through autograd, its layers converted and
    fused in place (`tritonnet.revert` undoes it). `path` says which it is, `reason` why, and `report` hears of both.

    The model stays as it is: parameters and the optimiser's state are read and written where torch has them, for
    state_dict() and load_state_dict() at any time. Whoever writes to them between two calls, however that is done, has
    written to what the next call reads; schedulers and changes of the optimiser's groups act on it too. What else may
    change the model, such as hooks on its layers, or the loss belongs before the step is built: both are looked at
    once.

    No update is made from a loss that is not finite: parameters, the optimiser's state and the model's buffers stay as
    they were, and the call is reported by a FloatingPointError. Of a group of calls none may have such a loss. Where
    every label is ignored the loss is NaN and the gradients are zeros, as in torch, and so there is an update.

    Args:
        model: torch.nn.Module on the device to train on.
        loss: function of (logits, labels), or a module such as torch.nn.CrossEntropyLoss().
        optimizer: torch.optim.Optimizer of the model's parameters.
        precision: what products are taken in, sums and weights staying float32: "ieee" (float32), "tf32" (operands cut
            off to 10 bits behind the point, not rounded) or "bfloat16" (rounded to 7).
            None for bfloat16 if autocast to it is on now, tf32 if torch's flags allow it to both convolutions and
            matrix products, and ieee otherwise.
        accumulate: calls whose gradients are averaged into one update, which the last of them makes. `p.grad` then
            holds the gradients so far. With 1 they are nowhere to be seen on the short path.
        report: function that is called with a line on the path taken, such as print, and on a CUDA graph that could not
            be captured, which is a RuntimeWarning otherwise.

    Raises:
        TypeError: model or optimizer is none.
        ValueError: precision or accumulate is not one of those above.
    """

    def __init__(self, model, loss, optimizer, precision=None, accumulate=1, report=None):
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if precision not in (None, *FORMATS):
            raise ValueError(f"precision must be one of {FORMATS} or None, got {precision!r}")
        if not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate must be a positive integer, got {accumulate!r}")
        self.model, self.loss, self.optimizer, self.precision = model, loss, optimizer, precision
        self.accumulate, self._report, self._step = accumulate, report, None
        try:
            # Buffers that are made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                fused = self._fused_launches(NOTHING_YET)
            self._step, self.path, self.reason = fused, "fused launches", "the model is a LeNet"
        except NotServed as e:
            self._use_operators(str(e), NOTHING_YET)
        else:
            self._say()

    def __getstate__(self):
        # A copy gets launches of its own: these write to where this model and this optimizer lie.
        return {**vars(self), "_step": self._step.progress()}

    def __setstate__(self, state):
        vars(self).update(state)
        progress, self._step = self._step, None
        try:
            if self.path == "operators":
                self._step = self._operators(progress)
                # Of a model that is copied or pickled this is left behind.
                self._fuse()
            else:
                with torch.inference_mode(False):
                    self._step = self._fused_launches(progress)
        except NotServed as e:
            self._use_operators(str(e), progress)

    def _fused_launches(self, progress):
        p = next(self.model.parameters(), None)
        if launchers is None or p is None or implementation(p) is not launchers:
            raise NotServed("the backend is the reference")
        is_lenet = type(self.model) is LeNet
        layers = self.model.layers if is_lenet else find_layers(self.model)
        pixels = self.model.pixels if is_lenet else None
        return FusedLaunches(
            self.model, layers, self.loss, self.optimizer, pixels, self.precision, self.accumulate, self._report,
            progress,
        )  # fmt: skip

    def _operators(self, progress):
        return Operators(self.model, self.loss, self.optimizer, self.precision, self.accumulate, progress)

    def _use_operators(self, reason, progress):
        # All at once: what follows may be interrupted.
        self.path, self.reason, self._step = "operators", reason, self._operators(progress)
        self._say()
        self._fuse()

    def _fuse(self):
        convert(self.model)
        if type(self.model) is not LeNet:  # whose layers are fused
            fuse(self.model, self._report)

    def _say(self):
        if self._report:
            self._report(f"{type(self.model).__name__}: {self.path}, because {self.reason}")

    def __call__(self, images, labels):
        """One step on a batch.

        Args:
            images: (N, C, H, W) on the model's device, or on the CPU, pinned to be copied without waiting; floating, or
                uint8 for a tritonnet.LeNet (see there). Do not write into a pinned batch before the copy is over.
            labels: (N), classes as int64 or uint8.

        Returns:
            (), the mean loss over the batch, before the update.

        Raises:
            FloatingPointError: the loss of a call was no finite number; from the four launches on a GPU up to 64 calls
                later, or by `check`, before which counts in the optimiser's state on the CPU may be ahead. On the four
                launches a label that is no class counts as that too.
            RuntimeError: inference mode is on.
            TypeError, ValueError: images or labels are not of the kinds above.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("TrainStep: a step in inference mode, which has no gradients")
        if self.path == "operators":
            return self._step(images, labels)
        fused = self._step
        try:
            return fused(images, labels)
        except NotServed as e:
            self._use_operators(str(e), fused.progress())
        loss = self._step(images, labels)
        # Calls that the launches made and nobody has looked at yet.
        fused.bad.check()
        return loss

    def check(self):
        """Wait for all calls so far, and raise FloatingPointError if the loss of one was not a finite number."""
        self._step.check()
