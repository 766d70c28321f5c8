"""A training step as one call: four launches for a LeNet, the fused operators for any other model."""

import warnings

import torch

from .conversion import convert
from .dispatch import implementation, launchers
from .fusion import fuse
from .lenet import LeNet
from .lenet.recognition import find_layers
from .lenet.served import FORMATS, NotServed
from .lenet.step import NOTHING_YET, FusedLaunches
from .nn._plain import check_model
from .whole_step import Operators, WholeStep


class TrainStep:
    """Forward, loss, backward and the optimiser's update as one call: loss = step(images, labels).

    For a LeNet this is four launches: tritonnet.LeNet, or any model whose forward is proved to be one (1 or 3
    channels, 28 or 32 pixels, 6 and 16 filters of 5 x 5, 120 and 84 hidden units, up to 1,024 classes), with the mean
    cross-entropy and torch's SGD, Adam or AdamW. On a GPU they are captured as one CUDA graph for each size of batch
    below 8,192. The same inputs give the same bits. Any other model goes through autograd, its layers converted and
    fused in place (`tritonnet.revert` undoes it), and on a GPU its whole step is captured as one CUDA graph for each
    kind of batch. `path` names the path taken, `reason` says why, and `report` is called with both.

    Parameters and the optimiser's state stay in torch's tensors, so state_dict() and load_state_dict() work at any
    time. The next call sees every write to them between two calls, as well as schedulers and changes of the optimiser's
    groups. Other changes of the model or the loss, such as hooks on layers, must come before the step is built, as both
    are checked only once.

    SGD, Adam and AdamW update by torch's fused implementation, whatever their `fused` and `foreach` say; any other
    optimizer by its own step. The first calls with a kind of batch (its shapes, dtypes and strides) run as they are
    written. A graph follows, with the same bits, unless they wait for the device, draw random numbers on the host,
    change attributes of the model, or there are hooks; `reason` then says so. The forward's Python code does not run
    when a graph is replayed. After a change that a graph does not read from the device, such as of momentum or of a
    layer's mode, but not of learning rates, the calls run as they are written again before the next graph.

    A loss that is not finite makes no update: parameters, the optimiser's state and the model's buffers stay as they
    were, and the call is reported by a FloatingPointError. With `accumulate`, one such loss in a group of calls
    prevents the group's update. If every label is ignored, the loss is NaN and the gradients are zeros, as in torch,
    and there is an update.

    Args:
        model: torch.nn.Module on the device to train on.
        loss: function of (logits, labels), or a module such as torch.nn.CrossEntropyLoss().
        optimizer: torch.optim.Optimizer of the model's parameters.
        precision: format of the products, while sums and weights stay float32: "ieee" (float32), "tf32" (operands
            truncated to 10 bits of mantissa, not rounded) or "bfloat16" (rounded to 7). None for bfloat16 if autocast
            to it is on now, tf32 if torch's flags allow it for both convolutions and matrix products, and ieee
            otherwise; without the four launches, torch's flags and autocast count at each call.
        accumulate: number of calls whose gradients are averaged into one update, which the last of them makes. If it is
            above 1, `p.grad` holds the gradients so far, and there is a graph for the four launches only. With 1, the
            four launches do not write `p.grad`, and any other step leaves the latest call's gradients there, a graph in
            tensors that its next replay overwrites.
        report: function such as print, called with a line on the path taken, and with one if there is no CUDA graph. A
            capture that fails is a RuntimeWarning otherwise.

    Raises:
        TypeError: model is not a torch.nn.Module, or optimizer not a torch.optim.Optimizer.
        ValueError: precision or accumulate is not one of the values above.
    """

    def __init__(self, model, loss, optimizer, precision=None, accumulate=1, report=None):
        check_model(model)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if precision not in (None, *FORMATS):
            raise ValueError(f"precision must be one of {FORMATS} or None, got {precision!r}")
        if not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate must be a positive integer, got {accumulate!r}")
        self.model, self.loss, self.optimizer, self.precision = model, loss, optimizer, precision
        self.accumulate, self._report, self._step = accumulate, report, None
        try:
            # Buffers made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                fused = self._fused_launches(NOTHING_YET)
            self._step, self.path, self.reason = fused, "fused launches", "the model is a LeNet"
        except NotServed as e:
            self._use_operators(str(e), NOTHING_YET)
        else:
            self._say()

    def __getstate__(self):
        # A copy gets its own FusedLaunches: this one writes to this model and this optimizer.
        return {**vars(self), "_step": self._step.progress()}

    def __setstate__(self, state):
        vars(self).update(state)
        progress, self._step = self._step, None
        try:
            if self.path == "operators":
                self._step = self._operators(progress)
                # Copies and pickles of a model are not fused.
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
        operators = Operators(self.model, self.loss, self.optimizer, self.precision, self.accumulate, progress)
        return WholeStep(operators, self._without_graph)

    def _without_graph(self, reason, failed):
        """Says why calls of the operators are not replayed as a CUDA graph."""
        line = f"without a CUDA graph, because {reason}"
        if line not in self.reason:
            self.reason = f"{self.reason}; {line}"
        if self._report:
            self._report(f"{type(self.model).__name__}: {line}")
        elif failed:
            warnings.warn(f"{type(self.model).__name__}: {line}", RuntimeWarning, stacklevel=7)

    def _use_operators(self, reason, progress):
        # Set together, as what follows may be interrupted.
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
            images: (N, C, H, W) on the model's device or on the CPU, pinned to be copied without waiting. The four
                launches take float32, float16 and bfloat16, and uint8 for a tritonnet.LeNet (see there). Do not write
                to a pinned batch before the copy is complete.
            labels: (N), classes, int64 or uint8.

        Returns:
            (), the mean loss over the batch, before the update.

        Raises:
            FloatingPointError: the loss of a call was not finite. On a GPU the four launches and graphs report this up
                to 64 calls later, or in `check`; until then, update counts in the optimiser's state on the CPU may be
                too high. On the four launches, a label that is not a class has the same effect.
            RuntimeError: inference mode is on.
            TypeError, ValueError: images or labels are not as described, on the four launches; otherwise what the model
                and the loss raise.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("TrainStep: inference mode has no gradients to train with")
        if self.path == "operators":
            return self._step(images, labels)
        fused = self._step
        try:
            return fused(images, labels)
        except NotServed as e:
            self._use_operators(str(e), fused.progress())
        loss = self._step(images, labels)
        # Report calls of the launches that have not been checked yet.
        fused.bad.check()
        return loss

    def check(self):
        """Wait for all calls so far, and raise FloatingPointError if one since the last check had a loss not finite."""
        self._step.check()
