"""The training step of any model through autograd and its optimiser, which waits for each loss."""

import contextlib
import math
from operator import attrgetter

import torch

from ..dispatch import float32_products
from ..lenet.losses import not_finite, send
from ..lenet.step import Progress
from .update import Update


@contextlib.contextmanager
def products_in(precision, device):
    """A context in which the operators take products in one of FORMATS, or as torch's flags say for None.

    Under an autocast that is on around several steps, torch would keep the first step's copies of weights.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        if precision == "bfloat16":
            context = torch.autocast(device.type, torch.bfloat16)
        else:
            context = float32_products(precision) if precision else contextlib.nullcontext()
        with context:
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _group_of(model):
    """The process group over which a model averages gradients, or None."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    # DistributedDataParallel and its like have a group; for fully_shard, take all processes.
    sharded = any(hasattr(p, "device_mesh") for p in model.parameters())
    return getattr(model, "process_group", torch.distributed.group.WORLD if sharded else None)


_KIND = attrgetter("shape", "dtype", "device")


class _Sent:
    """A copy of a value to the host. Reading it waits only for work queued before the copy."""

    def __init__(self, number):
        self._there, self._event = (number, None) if number.device.type == "cpu" else send(number)

    def read(self):
        if self._event is not None:
            self._event.synchronize()
        return self._there.item()


class Operators:
    """The training step of any model, through autograd and the optimiser."""

    def __init__(self, model, loss, optimizer, precision, accumulate, progress):
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.precision, self.accumulate, self.calls = precision, accumulate, progress.calls
        self.update = Update(optimizer)
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
        with products_in(self.precision, device):
            loss = self.loss(self.model(images), labels)
            # Before the backward, so that the GPU has work while the host waits for the loss.
            value = _Sent(loss.detach())
            others = _Sent(self._spoils_any(loss.detach(), labels)) if self.group else None
            # A call that fails before this does not count: the next call takes its turn in the group.
            self.calls += 1
            (loss / self.accumulate).backward()
        finite = math.isfinite(value.read())
        own = not finite and bool(self._spoils(loss.detach(), labels))
        if not (finite or own or self.group):
            # Gradients that should be 0 are NaN where images are not finite.
            own = not all(p.grad is None or p.grad.isfinite().all() for p in self.model.parameters())
        if own or (others and others.read()):
            self._spoiled = True
            self._restore_buffers()
        if turn == self.accumulate - 1 and not self._spoiled:
            self.update()
        if not finite:
            raise not_finite(self.calls, ignored=not self._spoiled)
        if others and others.read():
            raise FloatingPointError(f"the loss of call {self.calls} was not finite in another process: no update")
        return loss.detach()

    def _spoils(self, loss, labels):
        """() bool on the device: whether the loss prevents an update. If every label is ignored it does not."""
        bad = ~loss.isfinite().all()
        return bad if labels.is_floating_point() else bad & ~(labels == self.ignore_index).all()

    def _spoils_any(self, loss, labels):
        """`_spoils` in any process, as they share the gradients."""
        spoils = self._spoils(loss, labels).int()
        torch.distributed.all_reduce(spoils, torch.distributed.ReduceOp.MAX, self.group)
        return spoils

    def _keep_buffers(self):
        """Copy the buffers, which a forward may change, such as the running statistics of batch norm."""
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
            # A forward may replace a buffer by another tensor.
            register[name] = b
            # A constant buffer may be expanded, and cannot be written to.
            if b is not None and not torch.equal(b, before := next(copies)):
                b.copy_(before)

    def progress(self):
        return Progress(self.calls, self._spoiled)

    def check(self):
        """Nothing to check: each call raises by itself."""
