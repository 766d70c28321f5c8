"""What one run found, and where: kept as JSON."""

import datetime
import importlib.util
import json
import platform
import re
from dataclasses import asdict, dataclass, field

import torch

import tritonnet

# The contestants of this project; all others are its peers.
OURS = "tritonnet", "TrainStep"
OK, WRONG, FAILED = "ok", "WRONG", "failed"


@dataclass
class Row:
    """One time, or why there is none.

    Attributes:
        subject, batch, format, task: what was timed.
        layout: of the images and weights.
        graph: whether the calls are part of a CUDA graph.
        library: the contestant, of libraries.installed().
        bytes, flops: that one call cannot do without.
        status, detail: OK, or WRONG or FAILED and how; of one that is OK, which of several paths it took.
        ms, low, high: the median of one call in milliseconds, and the quartiles; None without a time.
    """

    subject: str
    batch: int
    format: str
    task: str
    layout: str
    graph: bool
    library: str
    bytes: int
    flops: int
    status: str = OK
    detail: str = ""
    ms: float | None = None
    low: float | None = None
    high: float | None = None

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
        quick: whether it was the short one.
        ceilings: what measure.ceilings() found.
        rows: every Row.
        accuracy: the times to a test accuracy, of accuracy.race().
        overhead: of cpu.overhead().
        launches: of cpu.launch_overhead().
        steps: of cpu.step_overhead().
        left_out: what there was no time or no way for, a line each.
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

    @property
    def name(self):
        """A file name without its ending."""
        return re.sub(r"[^a-z0-9]+", "-", self.machine["device"].lower()).strip("-") + ("-quick" if self.quick else "")

    @property
    def title(self):
        """The machine in a line."""
        m = self.machine
        versions = ", ".join(f"{name} {m[name]}" for name in ("torch", "triton", "CUDA", "cuDNN") if m.get(name))
        return f"{m['device']}, {versions}, tritonnet {m['tritonnet']}, {m['date']}" + ", quick run" * self.quick

    @property
    def faults(self):
        """Rows of this project's own that are wrong or failed."""
        return [row for row in self.rows if row.status != OK and row.library in OURS]

    def write(self, path):
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path):
        record = cls(**json.loads(path.read_text(encoding="utf-8")))
        record.rows = [Row(**row) for row in record.rows]
        return record


def machine(kind):
    """What the run is on, a `kind` of "cuda" or "cpu": device, versions, date."""
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
