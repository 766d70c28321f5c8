"""What the timed subjects share, operators and networks alike: tasks, layouts, formats, work."""

from collections.abc import Callable
from typing import NamedTuple

import torch

# Tasks of an operator, and of a network: the last is the forward launch of inference alone, on weights that were packed
# before, which only our kernels have.
FORWARD, BOTH = "forward", "forward + backward"
INFERENCE, TRAINING, PACKED = "inference", "training step", "packed before"
CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
# What is timed of a call: the device's time where it is launched as it comes, where it is replayed in a CUDA graph, and
# the host's time until a call returns.
CALLS, GRAPH, HOST = "calls", "graph", "host"
# float64 is what the others are compared with.
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
        first: function of a task that runs it once, on the inputs that the gate knows, and returns its Results.
        results: function of a task and what its first step returned; Results, or None where steps build on each other.
        dtype: of the values of its results, None for that of the case's format.
        note: function that says how it went about it, where that is not plain from its name.
        replay: where the steps are CUDA graphs of their own, function that gives one that replays the last of them
            alone, without what the host and its copies do before; it gives None where there is no graph.
        input_bytes: of the tensors that the steps are given.
    """

    steps: dict
    first: Callable
    results: Callable
    dtype: torch.dtype | None = None
    note: Callable = str
    replay: Callable | None = None
    input_bytes: int = 0


class Case(NamedTuple):
    """A subject, of operators.Operator or lenet.Network, in a number format."""

    subject: object
    format: str

    @property
    def name(self):
        return f"{self.subject.name}, batch {self.subject.batch}, {self.format}"


def lay_out(t, layout):
    """t, in channels_last if that is asked for and t has four dimensions."""
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 and layout == CHANNELS_LAST else t
