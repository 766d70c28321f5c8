"""What timed operators and networks share: tasks, layouts, formats, work."""

from collections.abc import Callable
from typing import NamedTuple

import torch

# Tasks of an operator, its gradients alone, and tasks of a network. PACKED is the forward launch of inference alone, on
# weights packed before; only our kernels have it.
FORWARD, BOTH = "forward", "forward + backward"
INPUT_GRAD, WEIGHT_GRAD = "input gradient", "weight gradient"
INFERENCE, TRAINING, PACKED = "inference", "training step", "packed before"
CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
# How a call is timed: the device's time when it is launched directly, the device's time when it is replayed in a CUDA
# graph, and the host's time until it returns.
CALLS, GRAPH, HOST = "calls", "graph", "host"
# float64 is not timed: the other formats are compared with it.
TIMED = ("bfloat16", "tf32", "float16", "float32")


class Work(NamedTuple):
    """FLOPs, elements of the case's format that are read or written, and bytes of anything else."""

    flops: int
    elements: int
    other_bytes: int = 0

    def bytes(self, dtype):
        return self.elements * dtype.itemsize + self.other_bytes


class Contestant(NamedTuple):
    """One library's way through a case.

    Attributes:
        steps: for each task, functions that do the same work on tensors of their own.
        first: function of a task: runs it once on the gate's inputs and returns its Results.
        results: function of a task and what its first step returned: Results, or None if steps depend on each other.
        dtype: of the values of its results; None for that of the case's format.
        note: function that returns the path taken, where the name does not say it.
        replay: where steps run CUDA graphs of their own, function that returns a call that replays the last graph
            alone, without the host's work and copies before it; it returns None where there is no graph.
        input_bytes: of the steps' input tensors.
        saved: of a training step, function that returns the bytes that a forward saves for backward.
    """

    steps: dict
    first: Callable
    results: Callable
    dtype: torch.dtype | None = None
    note: Callable = str
    replay: Callable | None = None
    input_bytes: int = 0
    saved: Callable | None = None


class Case(NamedTuple):
    """A subject, such as an operators.Operator or a lenet.Network, in a number format."""

    subject: object
    format: str

    @property
    def name(self):
        return f"{self.subject.name}, batch {self.subject.batch}, {self.format}"


def lay_out(t, layout):
    """t, in channels_last if that is asked for and t has four dimensions."""
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 and layout == CHANNELS_LAST else t
