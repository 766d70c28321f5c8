"""Everything that some minutes on a GPU can prove and measure, what tells most first:

    python -m bench --verify [--minutes M]

The stages follow each other whatever comes of one. With --minutes each has its share of what is left, the first ones at
least what they need; who takes less leaves it to the later ones, and one that is still at it gets SIGINT. What a stage
finds is on disk after every case of its own, in bench/results/<GPU>-verify.json and the records of the bench. A call
after an interrupt, or after the time was over, goes on with what is missing, and then with what has failed, as long as
kernels/, tritonnet/ and the versions are the same; without the files it begins anew. If TrainStep is wrong it is not
timed. The exit status is 0 if all is there and well.
"""

import collections
import contextlib
import ctypes
import dataclasses
import fcntl
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from . import start
from .keep import ROOT, put, read_json, sources, write_json
from .record import Record, file_name, machine, same_but_date, title
from .run import QUICK
from .smoke import AGREES
from .table import markdown

PYTHON = (sys.executable,)
# Of the files that keep what the stages find, after the GPU's name.
ENDING = "-verify"
PASSED, FAILED, LATE, STOPPED = "passed", "FAILED", "out of time", "interrupted"
NO_TIME, LEFT = "no time", "left out"
# pytest's exit status where there was no test to run.
NO_TESTS = 5
# Seconds that a stage which was told to stop has for its report.
GRACE = 20
# So many times its share has a stage for which there is no limit in all: what takes longer hangs.
PATIENCE = 60
LAST_LINES = 30

# Tests by file. Those of the step tell whether it is timed; those of the other kernels come before all others.
STEP_TESTS = "test_graphs", "test_train_step", "test_lenet", "test_lenet_lanes"
CONVOLUTION_TESTS = "test_conv2d", "test_fused", "test_conv2d_pool_grad", "test_conv2d_pool_patch"
KERNEL_TESTS = (
    "test_max_pool2d", "test_linear", "test_linear_chain", "test_cross_entropy", "test_relu", "test_memory"
)  # fmt: skip
OTHER_TESTS = (
    "test_distributed", "test_citizenship", "test_gradcheck", "test_peers", "test_properties", "test_layers",
    "test_fusion", "test_conversion", "test_launching", "test_dispatch", "test_errors", "test_cli", "test_examples",
    "test_huge",
)  # fmt: skip
# What these look at is the same on every machine.
WITHOUT_GPU = (
    "test_bench", "test_compiled", "test_machine_code", "test_package", "test_ptx", "test_ptx_faults",
    "test_ptx_matrices", "test_ptx_tensor", "test_ptx_tensor_faults", "test_step_on_host", "test_verify", "test_warm",
    "test_watch",
)  # fmt: skip
# The interpreter, which needs no GPU either.
INTERPRETER = "tests/test_dispatch.py::test_the_interpreter_too"
SANITIZERS = "memcheck", "racecheck"
# Where CUDA's tools are that are not on the PATH.
CUDA = "/usr/local/cuda/bin"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A process of its own.

    Attributes:
        name: of the stage.
        command: function of the seconds that it may take and of the contestants to leave out that gives the command.
        seconds: what it needs with compiled kernels, and its share where there is more.
        least: seconds below which it is not worth beginning.
        variables: of its environment.
        nothing_left: the exit status that says that all was there before.
        times: whether contestants are timed in it.
    """

    name: str
    command: Callable
    seconds: float
    least: float
    variables: dict = dataclasses.field(default_factory=dict)
    nothing_left: int = 0
    times: bool = False


def stages(folder, kept):
    """([Stage], {name of what is left out: why}).

    Args:
        folder: for the records of the bench.
        kept: path of the file that keeps the outcome of each case.
    """
    found, left_out = [], {}

    def add(name, seconds, least, *arguments, **options):
        def command(limit, without):
            return [*PYTHON, *arguments, *(_without(without) if options.get("times") else ())]

        found.append(Stage(name, command, seconds, least, **options))

    def tests(name, files, seconds):
        if not importlib.util.find_spec("pytest"):
            left_out[name] = "pytest is not installed"
            return
        processes = ("-n", str(min(8, max(1, (os.cpu_count() or 1) // 2)))) if importlib.util.find_spec("xdist") else ()
        add(
            name, seconds, 20, "-m", "pytest", "-q", *processes, "-p", "bench.outcomes", "--outcomes", str(kept),
            "--deselect", INTERPRETER, *(f"tests/{file}.py" for file in files),
            variables={"TRITONNET_TEST_DEVICE": "cuda"}, nothing_left=NO_TESTS,
        )  # fmt: skip

    def bench(name, seconds, most, *arguments):
        """`most`: seconds that its cases may take if there is more."""

        def command(limit, without):
            of_cases = f"{min(most, max(10, limit - GRACE)):.0f}"
            options = ["--resume", "--out", str(folder), "--seconds", of_cases, *arguments, *_without(without)]
            return [*PYTHON, "-m", "bench", *options]

        found.append(Stage(name, command, seconds, 30, times=True))

    add("doctor", 25, 15, "-m", "tritonnet", "doctor")
    add("smoke", 60, 25, "-m", "bench.smoke", "--keep", str(kept))
    bench("quick bench", 100, QUICK, "--quick", "--no-pictures")
    tests("tests of the step", STEP_TESTS, 70)
    tests("tests of convolutions", CONVOLUTION_TESTS, 75)
    tests("tests of the other kernels", KERNEL_TESTS, 45)
    if sanitizer := shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=CUDA):
        for tool in SANITIZERS:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *PYTHON, "-m", "bench.every_kernel"]
            # Out of bounds is out of an allocation, and so each tensor gets one of its own.
            alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
            found.append(Stage(tool, lambda limit, without, command=command: command, 40, 20, alone))
    else:
        left_out.update(dict.fromkeys(SANITIZERS, f"there is no compute-sanitizer on the PATH or in {CUDA}"))
    add("first step and image", 60, 20, "-m", "bench.start", "--keep", str(kept), times=True)
    if importlib.util.find_spec("bench.tune"):
        add("tune", 100, 60, "-m", "bench.tune", "--keep", str(kept))
    else:
        left_out["tune"] = "there is no bench.tune"
    tests("all other tests", OTHER_TESTS, 60)
    bench("bench", 200, math.inf)
    return found, left_out


def _without(contestants):
    return [word for name in contestants for word in ("--without", name)]


def run(stage, limit, without=()):
    """(status, seconds, last lines) of a stage.

    Raises:
        KeyboardInterrupt: this process was told to stop; the stage has been stopped before.
    """
    command = stage.command(limit, without)
    print(f"\n{stage.name}, up to {limit:.0f} s: {' '.join(command)}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    begun, last = time.monotonic(), collections.deque(maxlen=LAST_LINES)
    # A session of its own, so that its children can be ended with it, and Ctrl-C reaches it once, from here.
    process = subprocess.Popen(
        command, cwd=ROOT, env={**environment, "PYTHONUNBUFFERED": "1", **stage.variables}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", preexec_fn=_end_with_parent,
    )  # fmt: skip

    def show():
        for line in process.stdout:
            # The stage would wait for ever if nobody read on here because nobody reads on there.
            with contextlib.suppress(OSError, ValueError):
                print(line, end="", flush=True)
            last.append(line.rstrip().rpartition("\r")[2])

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
        status = PASSED if code in (0, stage.nothing_left) else FAILED
        if code < 0:
            last.append(f"ended by {signal.Signals(-code).name}")
    except subprocess.TimeoutExpired:
        status = LATE
    finally:
        _end(process)
        reader.join(GRACE)
    return status, time.monotonic() - begun, [line for line in last if line.strip()]


def _end_with_parent():
    """In a stage: have Linux kill it once this process has been killed, or it would run beside the next call's."""
    if sys.platform == "linux":
        set_signal_of_parents_death = 1
        ctypes.CDLL(None).prctl(set_signal_of_parents_death, signal.SIGKILL)


def _end(process):
    """Ask the process to stop, and see to it that nothing of it stays."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also if this is interrupted once more
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # Not for ever: one that waits in the driver of a GPU that hangs is not ended by anything.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def still_to_do(stages, outcome_of):
    """The stages that are missing, then those that have failed, then those that have left a contestant out."""
    outcomes = [(stage, outcome_of.get(stage.name, {})) for stage in stages]
    missing = [stage for stage, outcome in outcomes if outcome.get("status") not in (PASSED, FAILED)]
    failed = [stage for stage, outcome in outcomes if outcome.get("status") == FAILED]
    # Who was wrong then may be right by the time that it is their turn.
    without = [stage for stage, outcome in outcomes if outcome.get("status") == PASSED and outcome.get("without")]
    return missing + failed + without


def main(folder, minutes=None, begun=None):
    """Run what is to be done; returns the exit status.

    Args:
        folder: where files go.
        minutes: how long it may take in all, None for as long as it takes.
        begun: of time.monotonic, when the minutes began; None for now.

    Raises:
        SystemExit: another call keeps its outcomes in this folder now; in one line.
    """
    with _alone(folder):
        return _main(folder, minutes, time.monotonic() if begun is None else begun)


@contextlib.contextmanager
def _alone(folder):
    """Two calls at once would overwrite what the other has found, and time each other's work; a killed one is none."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"bench --verify runs already, with its files in {folder}")
        except OSError:
            pass  # on a file system without locks nobody can tell
        yield
    finally:
        os.close(descriptor)


def _main(folder, minutes, begun):
    here = machine("cuda")
    folder = folder.absolute()  # stages run in the project's root
    kept = folder / f"{file_name(here)}{ENDING}.json"
    planned, left_out = stages(folder, kept)
    state = read_json(kept)
    known = "stages" in state and same_but_date(state["machine"], here) and state["sources"] == sources()
    if known:
        to_do = still_to_do(planned, state["stages"])
        print(f"going on with {kept}: {', '.join(stage.name for stage in to_do) or 'all is there'}")
    else:
        to_do = planned
        write_json(kept, {"machine": here, "sources": sources(), "stages": {}})
    try:
        for place, stage in enumerate(to_do):
            limit = PATIENCE * stage.seconds
            if minutes is not None:
                left = 60 * minutes - (time.monotonic() - begun)
                share = stage.seconds / sum(later.seconds for later in to_do[place:])
                # A stage that is told to stop takes a while to do so.
                limit = min(max(share * left, stage.seconds), left - GRACE)
            if limit < stage.least:
                continue
            put(kept, "stages", stage.name, {"status": STOPPED, "seconds": 0.0, "said": ""})
            without = _not_timed(read_json(kept))
            status, seconds, last = run(stage, limit, without)
            if status == PASSED and stage.name == "bench" and Record.read(folder / f"{file_name(here)}.json").missing:
                status = LATE
            entry = {"status": status, "seconds": round(seconds, 1), "said": last[-1] if last else ""}
            if status != PASSED:
                entry["last_lines"] = last
            if stage.times and without:
                entry["without"] = without
            put(kept, "stages", stage.name, entry)
    except KeyboardInterrupt:
        print("\ninterrupted")
        _finish(kept, planned, left_out)
        return 130
    return _finish(kept, planned, left_out)


def _not_timed(state):
    """The contestants that have been found wrong so far."""
    smoke, tests = state.get("smoke", {}), state.get("tests", {})
    differs = "smoke" in state["stages"] and set(smoke.values()) != {AGREES}  # also if it has not come to a first case
    of_step = {Path(file).stem for file in STEP_TESTS}
    fails = any(of_file["failed"] and Path(file).stem in of_step for file, of_file in tests.items())
    return ("TrainStep",) if differs or fails or _status(state, "smoke") == FAILED else ()


def _status(state, name):
    return state["stages"].get(name, {}).get("status")


def _finish(kept, planned, left_out):
    """Print a line for each stage, and keep the same; returns the exit status."""
    state, lines = read_json(kept), []
    for stage in planned:
        outcome = state["stages"].get(stage.name, {"status": NO_TIME, "seconds": 0.0, "said": ""})
        lines.append((stage.name, outcome["status"], f"{outcome['seconds']:.0f} s", outcome["said"][:60]))
    lines += [(name, LEFT, "", why) for name, why in left_out.items()]
    print(f"\n{title(state['machine'])}\n\n{markdown(('stage', 'outcome', 'took', 'its last words'), lines)}")
    for file, of_file in state.get("tests", {}).items():
        for name in of_file["failed"]:
            print(f"failed: {file}::{name}")
    well = not still_to_do(planned, state["stages"])
    write_json(kept, state | {"summary": lines, "well": well})
    print(f"{'all is well' if well else 'not all is there and well: the same command goes on'}; kept in {kept}")
    return 0 if well else 1


def counts(tests):
    """{"passed": int, "failed": int, "skipped": int} of what bench.outcomes keeps under "tests"."""
    return {kind: sum(len(of_file[kind]) for of_file in tests.values()) for kind in ("passed", "failed", "skipped")}


def in_words(state):
    """What the stages have found, for the README, a paragraph or a table each."""
    found = []
    if smoke := state.get("smoke"):
        agree = sum(outcome == AGREES for outcome in smoke.values())
        found.append(
            f"`TrainStep` with CUDA graphs, without, and once more: the same bits in {agree} of {len(smoke)} cases"
        )
    if tests := state.get("tests"):
        of = counts(tests)
        found.append(f"{of['passed']:,} tests passed, {of['failed']} failed, {of['skipped']} skipped")
    found += [f"{tool}: {status}" for tool in SANITIZERS if (status := _status(state, tool))]
    parts = [f"On it: {'; '.join(found)}."] if found else []
    if times := state.get("start"):
        parts.append(markdown(*start.table(times)).strip())
    return parts
