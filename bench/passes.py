"""The passes of training, each alone: of ResNet-50's convolutions at batch 128, and of linear; nothing has a bias.

    python -m bench --passes           # in bfloat16, then in tf32, then torch.compile in bfloat16
    python -m bench --passes bfloat16  # in one format, for a GPU that is there for a few minutes

The first convolution has no gradient of its input, as images need none. How often the network has each convolution
counts in the ratio of all its convolutions together.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from . import resnet
from .case import FORWARD, INPUT_GRAD, WEIGHT_GRAD, Case, Contestant, Work
from .exactness import Results
from .libraries import compiled
from .operators import Operator
from .record import OURS, best_of_ours, groups
from .table import markdown

FORMATS = "bfloat16", "tf32"
BATCH = 128
# (M, K, N): M rows of K features, with N results each.
LINEARS = (4096, 4096, 4096), (1024, 4096, 1024), (8192, 1024, 1000)
PASSES = FORWARD, INPUT_GRAD, WEIGHT_GRAD
# Shapes in which a peer takes less than this many times our time are named.
SLOWER = 0.9
SUMMARY = (
    "Each pass of training alone, and how many times as long as ours a peer takes: the geometric mean over the shapes "
    "that both have times for, and all of ResNet-50's convolutions among them, each as often as the network has it"
)


@dataclass(frozen=True)
class Passes(Operator):
    """An operator of two inputs whose passes are timed one by one.

    Attributes:
        gradients: for each gradient's task, a function of a class of gradients.py, dy, x and w.
        count: how often the network has it, 0 if it is not of the network.
    """

    gradients: dict[str, Callable] = field(default_factory=dict)
    count: int = 0

    def contestant(self, library, layout, format, device, mode=None):
        def run(task, x, w, dy):
            if task == FORWARD:
                return [self.call(library.functional, x, w)]
            return [self.gradients[task](library.gradients, dy, x, w)]

        run = compiled(run, mode)
        sets = self.sets(layout, format, device)
        steps = {
            task: [lambda task=task, x=x, w=w, dy=dy: run(task, x, w, dy) for (x, w), dy in sets] for task in self.works
        }
        return Contestant(steps, lambda task: self._results(task, steps[task][0]()), self._results)

    def _results(self, task, returned):
        if task not in self.gradients:
            return super()._results(task, returned)
        return Results(None, [*returned, None] if task == INPUT_GRAD else [None, *returned])


def convolution(layer, network="ResNet-50"):
    """The Passes of a resnet.Layer; `network` is for the name.

    Each pass takes the same products, and reads or writes x, w and y or their gradients once; where the stride leaves
    out pixels, only the input gradient has them, as zeros.
    """
    count, N, C, H, OC, K, stride = layer
    x, w, y = (N, C, H, H), (OC, C, K, K), (N, OC, layer.OH, layer.OH)
    read = N * C * min(H, layer.OH * K) ** 2
    flops, rest = 2 * math.prod(y) * C * K * K, math.prod(w) + math.prod(y)
    works = {task: Work(flops, read + rest) for task in (FORWARD, WEIGHT_GRAD)}
    works[INPUT_GRAD] = Work(flops, math.prod(x) + rest)
    geometry = {"stride": stride, "padding": K // 2}
    gradients = {
        INPUT_GRAD: lambda of, *tensors: of.conv2d_input_grad(*tensors, **geometry),
        WEIGHT_GRAD: lambda of, *tensors: of.conv2d_weight_grad(*tensors, **geometry),
    }
    tasks = PASSES if C > resnet.CHANNELS else (FORWARD, WEIGHT_GRAD)
    return Passes(
        f"conv2d {network} {layer.name}", N, lambda f, x, w: f.conv2d(x, w, **geometry), (x, w), y,
        {task: works[task] for task in tasks}, gradients=gradients, count=count,
    )  # fmt: skip


def linear(M, K, N):
    gradients = {
        INPUT_GRAD: lambda of, *tensors: of.linear_input_grad(*tensors),
        WEIGHT_GRAD: lambda of, *tensors: of.linear_weight_grad(*tensors),
    }
    works = dict.fromkeys(PASSES, Work(2 * M * K * N, M * K + N * K + M * N))
    return Passes(
        f"linear without bias {M} x {K} x {N}", M, lambda f, x, w: f.linear(x, w), ((M, K), (N, K)), (M, N), works,
        gradients=gradients,
    )  # fmt: skip


def subjects():
    """Every Passes that is timed."""
    return [*map(convolution, resnet.layers(BATCH)), *(linear(*sizes) for sizes in LINEARS)]


def plan(formats=FORMATS):
    """The cases of `python -m bench --passes`."""
    return [Case(subject, format) for format in formats for subject in subjects()]


def summary(record):
    """(header, rows) of the ratios of all shapes together, and [a line for each shape in which a peer is faster].

    A row has the geometric mean of their time / ours over the shapes that both have times for, how many of all those
    are, and for convolutions the same ratio of the network's time, in which each counts as often as it is used.
    """
    of_name = {subject.name: subject for subject in subjects()}
    found, faster = {}, []
    for (name, _, format, task, layout, form), group in groups(record.rows).items():
        subject, ours = of_name.get(name), best_of_ours(group)
        if not (subject and ours):
            continue
        for library, row in group.items():
            if library in OURS or not row.ms:
                continue
            ratio, kind = row.ms / ours.ms, (name.split()[0], task, format, layout, form, library)
            found.setdefault(kind, []).append((ratio, subject.count * row.ms, subject.count * ours.ms))
            if ratio < SLOWER:
                faster.append(f"{name}, {task}, {format}, {layout}, {form}: {library} takes {ratio:.2f}x")
    rows = []
    for kind, times in found.items():
        operator, task, *_ = kind
        of_all = sum(name.startswith(f"{operator} ") and task in subject.works for name, subject in of_name.items())
        ratios, theirs, ours = zip(*times)
        network = f"{math.fsum(theirs) / math.fsum(ours):.2f}x" if any(ours) else "-"
        rows.append((*kind, f"{len(times)} of {of_all}", f"{statistics.geometric_mean(ratios):.2f}x", network))
    return (
        ("operator", "pass", "format", "layout", "as", "against", "shapes", "geometric mean", "ResNet-50"),
        rows,
    ), faster


def in_words(record):
    """The summary in Markdown, or "" if no passes were timed."""
    (header, rows), faster = summary(record)
    if not rows:
        return ""
    named = "".join(f"- {line}\n" for line in faster)
    below = f"Below {SLOWER}x:\n\n{named}" if faster else f"No shape is below {SLOWER}x.\n"
    return f"{SUMMARY}:\n\n{markdown(header, rows)}\n{below}"
