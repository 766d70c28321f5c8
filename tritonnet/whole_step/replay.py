"""The training step of a model on a GPU as one CUDA graph for each kind of batch, from forward to update."""

import contextlib

import torch

from ..dispatch import on_device
from ..lenet.graph import NotCaptured, record
from ..lenet.losses import FirstBad
from ..lenet.step import MOST_BATCHES
from .operators import products_in
from .watch import Watch, circumstances, is_followed, random_numbers

# Of a kind of batch whose next call is captured, as nothing has changed since its last.
_WARM = "warm"
# Calls in a row in which a forward has done what a graph cannot do, after which none is captured any more.
_TIMES = 2


class Kind:
    """The graph for one kind of batch: its inputs and results, at addresses that do not change."""

    def __init__(self, images, labels, device):
        self.images, self.labels = images.to(device, copy=True), labels.to(device, copy=True)
        self.loss, self.grads, self.buffers, self.updated, self.replay = None, [], [], [], None


class Buffers:
    """Copies of a model's buffers, which a forward may change, such as the running statistics of batch norm."""

    def __init__(self, buffers):
        self._of = {}
        for b in buffers:
            # A constant buffer may be expanded, and cannot be written to.
            if b.numel() and not any(stride == 0 and n > 1 for stride, n in zip(b.stride(), b.shape)):
                self._of.setdefault(b.dtype, []).append(b)
        self._before = {dtype: self._joined(dtype) for dtype in self._of}

    def _joined(self, dtype):
        return torch.cat([b.reshape(-1) for b in self._of[dtype]])

    def put_back(self, where):
        """Writes the copies to the buffers if `where`, () bool on the device, is true."""
        for dtype, buffers in self._of.items():
            chosen = torch.where(where, self._before[dtype], self._joined(dtype))
            pieces = chosen.split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [piece.view(b.shape) for piece, b in zip(pieces, buffers)])


class WholeStep:
    """The step of `Operators`, replayed as a CUDA graph where it can be captured; the same bits either way.

    The first calls of a kind of batch are calls of `Operators`, until one has left everything but numbers in tensors as
    it was. The next is captured, which runs nothing, and replayed. If anything changes that a graph does not read
    from the device, all graphs are dropped, and the calls are those of `Operators` again.

    Args:
        operators: the Operators.
        refused: function that is called with a reason why calls are not captured, once for each, and whether a
            capture was tried and failed.
    """

    graphs_on = ("cuda",)

    def __init__(self, operators, refused):
        self.operators, self.refused = operators, refused
        self.update, self.watch = operators.update, Watch(operators.model, operators.loss, operators.optimizer)
        # No captures any more, and none until something changes; the reasons that have been said; and the calls in a
        # row that have done what a graph cannot do.
        self._given_up, self._hindered, self._said, self._times = False, False, set(), 0
        self._kinds, self._before, self._pool = {}, None, None
        # The stream of calls that precede a capture, and that of captures, for which cuBLAS gets memory of its own.
        self._streams = None, None
        self.bad, self._counted = None, None

    def __call__(self, images, labels):
        parameter = next(self.operators.model.parameters(), None)
        if self._given_up or parameter is None or parameter.device.type not in self.graphs_on:
            return self._run(images, labels)
        if self.operators.accumulate > 1 or self.operators.group:
            several = "gradients are accumulated over calls", "several processes train together"
            self._give_up(several[0] if self.operators.accumulate > 1 else several[1])
            return self._run(images, labels)
        device = parameter.device
        with on_device(device):
            self.update.by_value = False
            if not (_is_plain(images) and _is_plain(labels)) or is_followed():
                # This call only; the next sees what it has changed.
                return self._run(images, labels)
            look = self.watch.look()
            if self._before is None or look.since(self._before):
                self._forget()
            self._before = look
            key = _kind(images), _kind(labels), circumstances(parameter)
            kind = self._kinds.pop(key, None)
            if kind == _WARM:
                kind = self._captured(images, labels, device)
            if self._given_up:
                return self._run(images, labels)
            if kind is None:
                return self._learn(key, images, labels, device)
            self._keep(key, kind)
            return self._replay(kind, images, labels)

    def _keep(self, key, kind):
        """Remember a kind of batch, of which the most recently used are kept."""
        while len(self._kinds) >= MOST_BATCHES:
            del self._kinds[next(iter(self._kinds))]
        self._kinds[key] = kind

    def _forget(self):
        self._kinds, self._pool, self._hindered = {}, None, False

    def _learn(self, key, images, labels, device):
        """A call of the operators, after which this kind of batch may be captured."""
        before, drawn = self._before, random_numbers()
        try:
            with self._aside(device):
                loss = self._run(images, labels)
        finally:
            self._before = look = self.watch.look()
        reason = None
        if look.members_since(before):
            reason = "a call changes attributes of the model or the loss"
        elif random_numbers() != drawn:
            reason = "a call draws random numbers on the host"
        self._times = self._times + 1 if reason else 0
        if self._times >= _TIMES:
            self._give_up(reason)
        elif not (reason or self._hindered or look.since(before)):
            self._keep(key, _WARM)
        return loss

    def _run(self, images, labels):
        """A call of the operators."""
        self._counted = None
        loss = self.operators(images, labels)
        if self.bad:
            self._report_bad(self.bad.look, self.operators.calls)
        return loss

    @contextlib.contextmanager
    def _aside(self, device):
        """Another stream than the caller's, on which torch demands calls before a capture."""
        if device.type != "cuda":
            yield
            return
        if self._streams[0] is None or self._streams[0].device != device:
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
        current, aside = torch.cuda.current_stream(device), self._streams[0]
        # The stream uses its memory again only after it has waited, so that losses and gradients may be freed any time.
        aside.wait_stream(current)
        try:
            with torch.cuda.stream(aside):
                yield
        finally:
            current.wait_stream(aside)

    def _give_up(self, reason, failed=False):
        self._given_up, self.update.by_value = True, True
        self._forget()
        self._say(reason, failed)

    def _say(self, reason, failed=False):
        if reason not in self._said:
            self._said.add(reason)
            self.refused(reason, failed)

    def _captured(self, images, labels, device):
        """The Kind of this batch with its graph, or None where there can be none."""
        reason = self.watch.obstacle(device) or self.update.refusal()
        if reason:
            self._hindered = True
            self._say(reason)
            return None
        if self.bad is None or self.bad.device != device:
            self.bad, self._counted = FirstBad(device), None
        if self._pool is None and device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        kind = Kind(images, labels, device)
        parameters = [p for group in self.operators.optimizer.param_groups for p in group["params"]]
        kept = [p.grad for p in parameters]
        with torch.no_grad():
            self.update.prepare()
        try:
            kind.replay = record(lambda: self._launch(kind, parameters), self._streams[1], self._pool)
        except BaseException as e:  # nothing has run
            for p, grad in zip(parameters, kept):
                p.grad = grad
            if not isinstance(e, NotCaptured):
                raise
            self._give_up(f"capturing it failed: {e}", failed=True)
            return None
        return kind

    def _launch(self, kind, parameters):
        """Everything from the copies of the batch to the update, without a wait for the device."""
        operators, device = self.operators, kind.images.device
        for p in parameters:
            p.grad = None
        with torch.no_grad():
            kind.buffers = list(operators.model.buffers())
            before = Buffers(kind.buffers)
        with products_in(operators.precision, device):
            loss = operators.loss(operators.model(kind.images), kind.labels)
            loss.backward()
        with torch.no_grad():
            kind.loss, kind.grads = loss.detach(), [(p, p.grad) for p in parameters]
            grads = [grad for _, grad in kind.grads if grad is not None and grad.numel()]
            bad = ~kind.loss.isfinite()
            spoils = bad & ~_all_ignored(kind.labels, operators.ignore_index, grads)
            before.put_back(spoils)
            self.update.launch(spoils.float())
            kind.updated = self.update.updated
            first, calls = self.bad.numbers[0], self.bad.numbers[1]
            calls += 1
            first.copy_(torch.where(bad & (first == 0), torch.where(spoils, calls, -calls), first))

    def _replay(self, kind, images, labels):
        try:
            kind.images.copy_(images, non_blocking=True)
            kind.labels.copy_(labels, non_blocking=True)
            with torch.no_grad():
                self.update.prepare()
            if self._counted != self.operators.calls:
                self.bad.numbers[1] = self.operators.calls
            kind.replay()
            self.operators.calls += 1
            self._counted = self.operators.calls
            self.update.count(kind.updated)
        except BaseException:  # it is not known what has run
            self._counted = None
            self.update.start_anew()
            raise
        for p, grad in kind.grads:
            p.grad = grad
        # As torch's in-place operators do, so that autograd notices the writes.
        torch.autograd.graph.increment_version([p for p, grad in kind.grads if grad is not None] + kind.buffers)
        loss = kind.loss.clone()
        self._report_bad(self.bad.look, self.operators.calls)
        return loss

    def _report_bad(self, look, *args):
        """Calls look(*args); before it raises, the optimiser's counts are corrected to the updates made."""
        try:
            look(*args)
        except FloatingPointError:
            self.update.settle()
            raise

    def progress(self):
        """The Progress that another step can continue from, with corrected counts of updates; waits for the device."""
        self.update.settle()
        return self.operators.progress()

    def check(self):
        """FloatingPointError if a replay since the last check had a loss that was not finite; waits for the GPU."""
        if self.bad:
            self._report_bad(self.bad.check)


def _is_plain(t):
    return type(t) is torch.Tensor and t.layout == torch.strided and not t.requires_grad


def _kind(t):
    """What a captured step has as constants of a batch."""
    return t.shape, t.dtype, t.stride()


def _all_ignored(labels, ignore_index, grads):
    """() bool on the device: whether a loss is not finite only because every label is ignored."""
    if labels.is_floating_point():
        return torch.zeros((), dtype=torch.bool, device=labels.device)
    # Gradients that should be 0 are NaN where images are not finite.
    norms = torch.stack(torch._foreach_norm(grads, float("inf")))
    return (labels == ignore_index).all() & norms.isfinite().all()
