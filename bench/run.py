"""Runs the cases within a time limit: each contestant is checked and then timed; what does not fit is listed."""

import contextlib
import itertools
import time
from typing import NamedTuple

import torch

from . import FORMATS
from .case import CALLS, CONTIGUOUS, GRAPH, HOST, PACKED, TRAINING, Case
from .inference import Evaluation
from .lenet import Network
from .libraries import COMPILE, COMPILE_NO_GRAPHS, COMPILE_QUICKLY, WHOLE_STEPS, Library, installed, load_compiler
from .limit import OutOfTime, limited
from .measure import measure, measure_graph, measure_host, precision
from .operators import catalogue
from .passes import Passes
from .record import FAILED, OK, OURS, WRONG, Row
from .training import TrainingStep

# Seconds until the last case ends; the start of Python and the pictures take the rest of the planned time.
FULL, QUICK, OF_PASSES, OF_INFERENCE, OF_TRAINING = 440, 75, 300, 400, 660
# Seconds that each is expected to take before one has run, and the most that an entry under torch.compile gets, by
# mode.
EXPECTED = {"case": 4.0, "compile": 8.0}
MOST_COMPILING = {COMPILE: 60.0, COMPILE_NO_GRAPHS: 60.0, COMPILE_QUICKLY: 15.0}
# The same for a network of --inference or --training, which has some tens of convolutions.
MOST_COMPILING_A_NETWORK = 240.0
# The quick run has this many operators of the catalogue, from the first on.
QUICK_OPERATORS = 8
# What is worth torch.compile's time: networks at all batches in the first format, at the largest in the second.
COMPILED_NETWORKS = "bfloat16", "tf32"
COMPILED_OPERATORS = (
    "conv2d_relu_max_pool2d LeNet conv1", "conv2d_relu ResNet 3x3, 64", "linear_relu 4096 x 4096 x 4096",
    "cross_entropy 1000 classes", "conv2d_relu_max_pool2d ResNet stem",
)  # fmt: skip
# The batches at which the quick run has time to compile networks.
COMPILED_QUICKLY = 64, 65536


class Budget:
    """Seconds to spend, and a running estimate of what each kind of work takes.

    Args:
        seconds: how many, from `start` on.
        now: a clock in seconds.
    """

    def __init__(self, seconds, start=None, now=time.monotonic):
        self.seconds, self.now = seconds, now
        self.start = now() if start is None else start
        self.expected = dict(EXPECTED)

    @property
    def left(self):
        return self.start + self.seconds - self.now()

    def fits(self, kind):
        return self.expected[kind] <= self.left

    @contextlib.contextmanager
    def spend(self, kind):
        start = self.now()
        yield
        self.expected[kind] = (self.expected[kind] + self.now() - start) / 2


def plan(quick):
    """The cases, the most important first, as time may run out."""
    networks = [Network(training, batch) for batch in (64, 65536, 1024) for training in (True, False)]
    operators = catalogue()
    if quick:
        order = [(networks, "bfloat16"), (operators[:QUICK_OPERATORS], "bfloat16"), (networks, "tf32")]
    else:
        order = [(networks, "bfloat16"), (operators, "bfloat16"), (networks, "tf32")]
        order += [(networks, "float32"), (networks, "float16")]
        order += [(operators, format) for format in ("tf32", "float32", "float16")]
    return [Case(subject, format) for subjects, format in order for subject in subjects]


class Entry(NamedTuple):
    """A contestant of a case: in a layout, timed in some of the forms of bench.case, compiled or not."""

    name: str
    library: Library
    layout: str
    forms: tuple
    mode: str | None = None


def forms_on(device, subject):
    """The forms in which a device can time a subject; of passes the device's time counts, without the host's work."""
    if isinstance(subject, Passes):
        return (GRAPH,) if device.capture else (CALLS,)
    return (CALLS, HOST, GRAPH) if device.capture else (CALLS, HOST)


def entries(case, libraries, device):
    """The entries of a case without torch.compile."""
    subject = case.subject
    trains = isinstance(subject, TrainingStep) or (isinstance(subject, Network) and subject.training)
    whole_too = trains and case.format in WHOLE_STEPS
    return [
        Entry(name, library, layout, forms_on(device, subject))
        for name, library in libraries.items() if not library.compiled and (whole_too or not library.whole)
        for layout in (subject.layouts[:1] if library.whole else subject.layouts)
    ]  # fmt: skip


def compiled_entries(case, libraries, device, quick):
    """The entries of a case under torch.compile.

    Inductor chooses the layout of a network itself. Its code in a CUDA graph of the bench comes first, which is its
    fastest form: its own CUDA graphs copy all inputs, which pays only where launches take longer.
    """
    if not worth_compiling(case, quick):
        return []
    network = isinstance(case.subject, (Network, Evaluation))
    quickly = quick or isinstance(case.subject, (Passes, TrainingStep))
    modes = [(forms_on(device, case.subject), COMPILE_QUICKLY if quickly else COMPILE_NO_GRAPHS)]
    if network and case.subject.small and not quick:
        modes = [((GRAPH,), COMPILE_NO_GRAPHS)] if device.capture else []
        modes.append(((CALLS, HOST), COMPILE))
    layout = CONTIGUOUS if network else case.subject.layouts[-1]
    return [
        Entry(name, library, layout, of_mode, mode)
        for of_mode, mode in modes
        for name, library in libraries.items() if library.compiled
    ]  # fmt: skip


def most_compiling(case, mode):
    """The most seconds that an entry of a case under torch.compile gets."""
    return MOST_COMPILING_A_NETWORK if isinstance(case.subject, (Evaluation, TrainingStep)) else MOST_COMPILING[mode]


def worth_compiling(case, quick):
    if isinstance(case.subject, (Evaluation, TrainingStep)):
        return True
    if isinstance(case.subject, Passes):
        return case.format == "bfloat16"
    if not isinstance(case.subject, Network):
        return not quick and case.format == "bfloat16" and case.subject.name in COMPILED_OPERATORS
    first, second = COMPILED_NETWORKS
    if quick:
        return case.format == first and case.subject.batch in COMPILED_QUICKLY
    return case.format == first or (case.format == second and not case.subject.small)


def run(record, cases, libraries, device, budget, seconds=0.05, keep=lambda: None):
    """Fills the rows of `record`, and the list of what it had no time for.

    Everything without torch.compile comes first (in a quick run, format by format), as compiling may use up the time.

    Args:
        cases: an iterable of Case, such as a progress bar over one; what `record` has already is skipped.
        libraries: what libraries.installed() returns.
        device: measure.Cuda or measure.Host.
        seconds: how long to measure each row, about.
        keep: called whenever the record has something new.

    Raises:
        RuntimeError: the device itself has failed, so that nothing more can be timed.
    """
    for _, of_group in itertools.groupby(cases, lambda case: case.format if record.quick else None):
        seen = []
        for case in of_group:
            seen.append(case)
            _measure(record, case, entries(case, libraries, device), device, budget, seconds, keep)
        to_compile = [(c, entry) for c in seen for entry in compiled_entries(c, libraries, device, record.quick)]
        if to_compile and budget.fits("compile"):
            load_compiler()
        for case, entry in to_compile:
            _measure(record, case, [entry], device, budget, seconds, keep)


def _measure(record, case, of_case, device, budget, seconds, keep):
    """Measures entries of a case: either all that are not compiled, or one that is."""
    if not of_case:
        return
    mode, kind = of_case[0].mode, "compile" if of_case[0].mode else "case"
    name = f"{case.name}: torch.compile in {mode}, {' and '.join(of_case[0].forms)}" if mode else case.name
    # A run that resumes this one may include the contestants that it leaves out.
    missed = [] if mode else entries(case, {name: installed()[name] for name in record.without}, device)
    done = f"{name} without {', '.join(dict.fromkeys(entry.name for entry in missed))}" if missed else name
    if name in record.done or done in record.done:
        return
    if name in record.lost:
        record.left_out.append(f"{name}: the device was lost in it")
        return
    if not budget.fits(kind):
        record.missing.append(f"{name}: no time")
        return
    record.begun = name
    keep()
    most = most_compiling(case, mode) if mode else None
    begun, limit = [], min(most, budget.left) if mode else None
    try:
        with precision(case.format), budget.spend(kind), limited(limit) if mode else contextlib.nullcontext():
            gate, problem = attempt(lambda: _gate(case, device), device)
            if problem:
                record.left_out.append(f"{name}: no reference to compare with, {problem}")
                return
            for entry in of_case:
                begun.append(_rows(case, entry))
                _enter(case, entry, begun[-1], gate, device, seconds)
    except OutOfTime as e:
        if limit < most:
            record.missing.append(f"{name}: no time")
            return
        begun = begun or [_rows(case, of_case[0])]
        _fail(begun, f"{mode} took {e}")
    except Exception as e:  # the device has failed; a run that resumes this one has to skip the case
        _fail(begun, f"the device was lost: {in_a_line(e)}")
        record.lost.append(name)
        raise
    finally:  # unless the process is killed
        record.begun = ""
        rows = [row for of_entry in begun for row in of_entry.values() if row.ms or row.status != OK]
        record.add(rows)
        keep()
    if not any(row.status != OK and row.library in OURS for row in rows):
        record.done.append(done)
        keep()


def _fail(begun, why):
    """Marks the rows that have no time as failed, with the reason."""
    for row in (row for of_entry in begun for row in of_entry.values()):
        if row.status == OK and row.ms is None:
            row.status, row.detail = FAILED, why


def _gate(case, device):
    """The gate of a case, without cuDNN's search for the fastest algorithm, which does not pay for float64."""
    tuned, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        return case.subject.gate(case.format, device.torch_device)
    finally:
        torch.backends.cudnn.benchmark = tuned


def attempt(call, device):
    """(what call() returns, None), or (None, what it raised in a line)."""
    try:
        return call(), None
    except Exception as error:  # any error of a contestant is a line of the report, and the others go on
        device.synchronize()  # raises if the device has failed
        return None, in_a_line(error)


def in_a_line(error):
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _rows(case, entry):
    """{(task, form): Row} of an entry, without times."""
    dtype, subject = FORMATS[case.format][0], case.subject
    return {
        (task, form): Row(
            subject.name, subject.batch, case.format, task, entry.layout, form, entry.name, work.bytes(dtype),
            work.flops,
        )
        for task, work in subject.works.items() if task != PACKED or entry.library.packed
        for form in entry.forms
    }  # fmt: skip


def _enter(case, entry, rows, gate, device, seconds):
    """Fills the rows of one contestant, made by _rows, with their times or with what was wrong."""
    dtype = FORMATS[case.format][0]

    def complaint(task, contestant, results):
        if wrong := gate.complaint(results, contestant.dtype or dtype):
            for row in rows.values():
                if row.task == task and not row.ms:
                    row.status, row.detail = WRONG, wrong
        return wrong

    def time_all():
        with entry.library.context():
            if entry.mode:
                torch.compiler.reset()  # or memory of an earlier entry would be freed between the two readings
            before = device.allocated() if device.allocated else 0
            contestant = case.subject.contestant(entry.library, entry.layout, case.format, device, entry.mode)
            # Our forward on packed weights does not exist in every layout and format.
            for key in [key for key in rows if key[0] not in contestant.steps]:
                del rows[key]
            # All are checked before any is timed: timing changes the parameters of a network in training.
            right = [task for task in contestant.steps if not complaint(task, contestant, contestant.first(task))]
            for task in right:
                # torch does not count what torch.compile's own CUDA graphs hold.
                if task == TRAINING and device.peak_bytes and entry.mode != COMPILE:
                    peak, row = device.peak_bytes(contestant.steps[task][0]), rows[task, entry.forms[0]]
                    row.peak_bytes = peak - before - contestant.input_bytes
                    row.saved_bytes = contestant.saved() if contestant.saved else None
                for form in entry.forms:
                    time_one(contestant, task, form)

    def time_one(contestant, task, form):
        row, steps = rows[task, form], contestant.steps[task]
        row.detail = "; ".join(filter(None, [contestant.note(), entry.mode]))
        if form != GRAPH:
            row.set_time((measure if form == CALLS else measure_host)(steps, device, seconds))
        elif entry.library.whole:
            if replay := contestant.replay():
                row.set_time(measure([replay], device, seconds))
            else:
                del rows[task, form]  # there is no graph to time
        else:
            timing, returned = measure_graph(steps, device, seconds)
            results = contestant.results(task, returned)
            if results is None or not complaint(task, contestant, results):
                row.set_time(timing)

    _, problem = attempt(time_all, device)
    if problem:
        _fail([rows], problem)
