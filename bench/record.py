"""The results of one run and the machine that it ran on, kept as JSON."""

import datetime
import importlib.util
import platform
import re
import sys
from dataclasses import asdict, dataclass, field

import torch

import tritonnet

from .keep import read_json, sources, write_json

# The contestants of this project; all others are its peers.
OURS = "tritonnet", "TrainStep"
OK, WRONG, FAILED = "ok", "WRONG", "failed"
# Follow the GPU's name in the names of the files of a quick run, and of runs of passes, inference and training alone.
QUICK_ENDING, PASSES_ENDING, INFERENCE_ENDING, TRAINING_ENDING = "-quick", "-passes", "-inference", "-training"


@dataclass
class Row:
    """One time, or why there is none.

    Attributes:
        subject, batch, format, task: what was timed.
        layout: of the images and weights.
        form: CALLS, GRAPH or HOST of bench.case.
        library: the contestant, of libraries.installed().
        bytes, flops: the least that one call needs.
        status, detail: OK with the path taken, or WRONG or FAILED with the reason.
        ms, low, high: the median of one call in milliseconds, and the quartiles; None without a time.
        peak_bytes: peak memory of a training step beside its images and labels; None if not measured.
        saved_bytes: memory that a training step's forward saves for backward; None if not measured.
    """

    subject: str
    batch: int
    format: str
    task: str
    layout: str
    form: str
    library: str
    bytes: int
    flops: int
    status: str = OK
    detail: str = ""
    ms: float | None = None
    low: float | None = None
    high: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None

    @property
    def key(self):
        """What distinguishes it from the other rows of a record."""
        return self.subject, self.batch, self.format, self.task, self.layout, self.form, self.library

    @property
    def images_per_s(self):
        return self.batch / self.ms * 1e3

    def set_time(self, timing):
        self.ms, self.low, self.high = timing

    def floor_ms(self, ceilings):
        """The least time that the ceilings allow: all bytes at the rate of a copy, all FLOPs at that of a product."""
        seconds = self.bytes / ceilings["bytes_per_s"], self.flops / ceilings["flops_per_s"][self.format]
        return max(seconds) * 1e3


@dataclass
class Record:
    """A whole run.

    Attributes:
        machine: what it ran on, with versions and date.
        quick: whether it was the quick run.
        passes, inference, training: whether it was the run of the passes alone, or of the inference or the training of
            networks alone.
        ceilings: what measure.ceilings() found.
        rows: every Row.
        accuracy: the times to a test accuracy, of accuracy.race().
        overhead: of cpu.overhead().
        launches: of cpu.launch_overhead().
        steps: of cpu.step_overhead().
        left_out: what could not be measured, or is not worth its time, a line each.
        missing: what there was no time for, a line each; a run that resumes this one measures it.
        done: names of what has been measured, each with the contestants that were left out of it.
        lost: names of cases in which the device failed; they are not tried again.
        begun: the name of what is being measured; it stays if the process is killed meanwhile, as the case may hang.
        without: contestants that this run leaves out.
        sources: keep.sources() of the code that was measured.
    """

    machine: dict
    quick: bool = False
    ceilings: dict = field(default_factory=dict)
    rows: list = field(default_factory=list)
    accuracy: list = field(default_factory=list)
    overhead: list = field(default_factory=list)
    launches: list = field(default_factory=list)
    steps: list = field(default_factory=list)
    left_out: list = field(default_factory=list)
    missing: list = field(default_factory=list)
    done: list = field(default_factory=list)
    lost: list = field(default_factory=list)
    begun: str = ""
    without: list = field(default_factory=list)
    sources: str = ""
    passes: bool = False
    inference: bool = False
    training: bool = False

    @property
    def name(self):
        """A file name without its ending."""
        ending = QUICK_ENDING * self.quick + PASSES_ENDING * self.passes + INFERENCE_ENDING * self.inference
        return file_name(self.machine) + ending + TRAINING_ENDING * self.training

    @property
    def title(self):
        """The machine in a line."""
        kind = ", quick run" * self.quick + ", passes" * self.passes + ", inference" * self.inference
        return title(self.machine) + kind + ", training" * self.training

    @property
    def of_one_kind(self):
        """Whether it is of passes, inference or training alone, and so not the record of a full or a quick run."""
        return self.passes or self.inference or self.training

    @property
    def faults(self):
        """Our rows that are wrong or failed."""
        return [row for row in self.rows if row.status != OK and row.library in OURS]

    def add(self, rows):
        """Append rows, in place of an earlier run's rows with the same keys."""
        new = {row.key for row in rows}
        self.rows = [row for row in self.rows if row.key not in new] + rows

    def write(self, path):
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path):
        """The Record in the file; None, with a message, if it holds none."""
        try:
            record = cls(**read_json(path))
            record.rows = [Row(**row) for row in record.rows]
        except TypeError as e:
            print(f"{path} is ignored: it holds no record ({e})", file=sys.stderr)
            return None
        return record


def groups(rows):
    """{(subject, batch, format, task, layout, form): {library: Row}}, of rows that did the same work."""
    found = {}
    for row in rows:
        key = row.subject, row.batch, row.format, row.task, row.layout, row.form
        found.setdefault(key, {})[row.library] = row
    return found


def best_of_ours(group):
    """The fastest Row of this project in a group, or None."""
    timed = [group[name] for name in OURS if name in group and group[name].ms]
    return min(timed, key=lambda row: row.ms, default=None)


def file_name(machine):
    """The name of a machine's files, without an ending."""
    return re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")


def title(machine):
    """A machine, its versions and the date, in a line."""
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "triton", "CUDA", "cuDNN") if machine.get(name)
    )
    return f"{machine['device']}, {versions}, tritonnet {machine['tritonnet']}, {machine['date']}"


def same_but_date(one, other):
    """Whether two machines are the same, with the same versions."""
    return {**one, "date": ""} == {**other, "date": ""}


def earlier(machine, quick, folder, **kind):
    """The Record of an earlier run of the same code on the same machine, to be continued, or a new one.

    A full run without an earlier one starts from the quick run's record.

    Args:
        machine: what `machine` returns.
        quick: whether it is the quick run.
        folder: of the records.
        kind: passes, inference or training, as for Record.
    """
    new, code = Record(machine, quick, **kind), sources()
    for name in [new.name] if new.of_one_kind else dict.fromkeys((new.name, file_name(machine) + QUICK_ENDING)):
        path = folder / f"{name}.json"
        if path.exists():
            found = Record.read(path)
            if found and same_but_date(found.machine, machine) and found.sources == code:
                found.quick, found.machine, found.left_out, found.missing, found.without = quick, machine, [], [], []
                found.lost, found.begun = found.lost + [found.begun] * bool(found.begun), ""
                return found
    return new


def machine(kind):
    """What the run is on: device, versions, date; `kind` is "cuda" or "cpu"."""
    found = {"device": f"{platform.machine()} CPU", "date": str(datetime.date.today())}
    found |= {"torch": torch.__version__, "tritonnet": tritonnet.__version__, "python": platform.python_version()}
    if importlib.util.find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    if kind == "cuda":
        properties = torch.cuda.get_device_properties()
        found |= {
            "device": properties.name, "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version(),
            "multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }  # fmt: skip
    return found
