"""Runs the cases within a time: each contestant through the gate, then timed; what there is no time for is listed."""

import contextlib
import time
from typing import NamedTuple

import torch

from . import FORMATS
from .case import CONTIGUOUS, Case
from .lenet import Network
from .libraries import COMPILE, COMPILE_NO_GRAPHS, WHOLE_STEPS, Library
from .measure import measure, measure_graph, precision
from .operators import catalogue
from .record import FAILED, OK, WRONG, Row

# Seconds that each is expected to take before any was seen, and the share of all that torch.compile may take.
EXPECTED = {"case": 6.0, "compile": 40.0}
COMPILE_SHARE = 0.5
# Those that torch.compile is worth its time for: of the networks all in the first format, the largest in the second.
COMPILED_NETWORKS = "bfloat16", "tf32"
COMPILED_OPERATORS = (
    "conv2d_relu_max_pool2d LeNet conv1", "conv2d_relu ResNet 3x3, 64", "linear_relu 4096 x 4096 x 4096",
    "cross_entropy 1000 classes", "conv2d_relu_max_pool2d ResNet stem",
)  # fmt: skip


class Budget:
    """Seconds to spend, and what each kind of work is likely to take, learnt on the way.

    Args:
        seconds: how many, from `start` on.
        now: a clock in seconds.
    """

    def __init__(self, seconds, start=None, now=time.monotonic):
        self.seconds, self.now = seconds, now
        self.start = now() if start is None else start
        self.expected = dict(EXPECTED)
        self.spent = dict.fromkeys(EXPECTED, 0.0)

    def fits(self, kind):
        expected = self.expected[kind]
        if kind == "compile" and self.spent[kind] + expected > COMPILE_SHARE * self.seconds:
            return False
        return self.now() - self.start + expected <= self.seconds

    @contextlib.contextmanager
    def spend(self, kind):
        start = self.now()
        yield
        took = self.now() - start
        self.spent[kind] += took
        self.expected[kind] = (self.expected[kind] + took) / 2


def plan(quick):
    """The cases, those first that are missed most if time runs out."""
    networks = [Network(training, batch) for batch in (64, 65536, 1024) for training in (True, False)]
    operators = catalogue()
    order = [(networks, "bfloat16"), (operators, "bfloat16"), (networks, "tf32")]
    if not quick:
        order += [(networks, "float32"), (networks, "float16")]
        order += [(operators, format) for format in ("tf32", "float32", "float16")]
    return [Case(subject, format) for subjects, format in order for subject in subjects]


class Entry(NamedTuple):
    """A contestant of a case: in a layout, launched as it comes (False) or in CUDA graphs (True), compiled or not."""

    name: str
    library: Library
    layout: str
    graphs: tuple
    mode: str | None = None


def entries(case, libraries, device):
    """(those as they are, those under torch.compile)."""
    subject, network = case.subject, isinstance(case.subject, Network)
    graphs = (False, True) if subject.small and device.capture else (False,)
    whole_too = network and subject.training and case.format in WHOLE_STEPS
    taking_part = {name: library for name, library in libraries.items() if whole_too or not library.whole}
    plain = [
        Entry(name, library, layout, graphs)
        for name, library in taking_part.items() if not library.compiled
        for layout in (subject.layouts[:1] if library.whole else subject.layouts)
    ]  # fmt: skip
    # Inductor lays out a network as it likes. Its strongest form comes first; CUDA graphs of its own copy all inputs,
    # which is worth it where launches take longer.
    layout = CONTIGUOUS if network else subject.layouts[-1]
    as_calls = COMPILE if network and subject.small else COMPILE_NO_GRAPHS
    compiled = [
        Entry(name, library, layout, (graph,), COMPILE_NO_GRAPHS if graph else as_calls)
        for graph in reversed(graphs)
        for name, library in taking_part.items() if library.compiled and worth_compiling(case)
    ]  # fmt: skip
    return plain, compiled


def worth_compiling(case):
    if not isinstance(case.subject, Network):
        return case.format == "bfloat16" and case.subject.name in COMPILED_OPERATORS
    first, second = COMPILED_NETWORKS
    return case.format == first or (case.format == second and not case.subject.small)


def run(record, cases, libraries, device, budget, seconds=0.1):
    """Fills the rows of `record`, and the list of what it left out.

    Args:
        cases: an iterable of Case, such as a progress bar over one.
        libraries: what libraries.installed() returns.
        device: measure.Cuda or measure.Host.
        seconds: how long to measure each row, about.

    Raises:
        RuntimeError: the device itself has failed, so that nothing more can be timed.
    """
    for case in cases:
        if not budget.fits("case"):
            record.left_out.append(f"{case.name}: no time")
            continue
        plain, compiled = entries(case, libraries, device)
        with precision(case.format):
            with budget.spend("case"):
                gate, problem = attempt(lambda case=case: _gate(case, device), device)
                if problem:
                    record.left_out.append(f"{case.name}: no truth to compare with, {problem}")
                    continue
                for entry in plain:
                    record.rows += _enter(case, entry, gate, device, seconds)
            for entry in compiled:
                if not budget.fits("compile"):
                    record.left_out.append(f"{case.name}: no time for {entry.name} in {entry.mode}")
                    continue
                with budget.spend("compile"):
                    record.rows += _enter(case, entry, gate, device, seconds)


def _gate(case, device):
    """The gate of a case; cuDNN's search for its fastest algorithm is not worth it for float64."""
    tuned, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        return case.subject.gate(case.format, device.torch_device)
    finally:
        torch.backends.cudnn.benchmark = tuned


def attempt(call, device):
    """(what call() returns, None), or (None, what it raised in a line)."""
    try:
        return call(), None
    except Exception as error:  # whatever a contestant dies of is a line of the report, and the others go on
        device.synchronize()  # raises if the device has failed
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _enter(case, entry, gate, device, seconds):
    """The rows of one contestant, each with its time or with what was wrong."""
    dtype = FORMATS[case.format][0]
    rows = {
        (task, graph): Row(
            case.subject.name, case.subject.batch, case.format, task, entry.layout, graph, entry.name,
            work.bytes(dtype), work.flops,
        )
        for task, work in case.subject.works.items()
        for graph in entry.graphs
    }  # fmt: skip

    def complaint(task, contestant, results):
        if wrong := gate.complaint(results, contestant.dtype or dtype):
            for row in rows.values():
                if row.task == task and not row.ms:
                    row.status, row.detail = WRONG, wrong
        return wrong

    def time_all():
        with entry.library.context():
            contestant = case.subject.contestant(entry.library, entry.layout, case.format, device, entry.mode)
            # All are checked before any is timed: time changes the parameters of a network in training.
            right = [task for task in contestant.steps if not complaint(task, contestant, contestant.first(task))]
            for (task, graph), row in rows.items():
                if task not in right:
                    continue
                row.detail = contestant.note()
                if not graph or entry.library.whole:
                    row.set_time(measure(contestant.steps[task], device, seconds))
                    continue
                timing, returned = measure_graph(contestant.steps[task], device, seconds)
                results = contestant.results(task, returned)
                if results is None or not complaint(task, contestant, results):
                    row.set_time(timing)

    _, problem = attempt(time_all, device)
    for row in rows.values():
        if problem and row.status == OK and row.ms is None:
            row.status, row.detail = FAILED, problem
    return list(rows.values())
