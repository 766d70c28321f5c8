"""Everything that some minutes on a GPU can prove and measure, the most informative first:

    python -m bench --verify [--minutes M]

The stages run one after another, whatever the outcome of each. With --minutes each has its share of the time left, the
first ones at least what they need; time that a stage does not use goes to the later ones, and one that exceeds its
share gets SIGINT. What a stage finds is on disk after each of its cases, in bench/results/<GPU>-verify.json and the
records of the bench. The same command after an interrupt, or after the time is up, goes on with what is missing, and
then with what has failed, as long as kernels/, tritonnet/ and the versions are the same; without the files it starts
anew. If TrainStep is wrong it is not timed. The exit status is 0 if every stage has run and passed.
"""

import collections
import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from . import stages, start
from .keep import ROOT, put, read_json, sources, write_json
from .processes import environment, kill_session
from .record import Record, file_name, machine, same_but_date, title
from .smoke import AGREES
from .table import markdown

# Follows the GPU's name in the name of the file that keeps what the stages find.
ENDING = "-verify"
PASSED, FAILED, LATE, STOPPED = "passed", "FAILED", "out of time", "interrupted"
NO_TIME, LEFT = "no time", "left out"
# Without --minutes, a stage that takes this many times its seconds is taken to hang.
PATIENCE = 60
LAST_LINES = 30


def run(stage, limit, without):
    """(status, seconds, last lines) of a stage.

    Raises:
        KeyboardInterrupt: this process was told to stop; the stage was stopped first.
    """
    command = stage.command(limit, without)
    print(f"\n{stage.name}, up to {limit:.0f} s: {' '.join(command)}", flush=True)
    begun, last = time.monotonic(), collections.deque(maxlen=LAST_LINES)
    # A session of its own, so that its children can be ended with it, and Ctrl-C reaches it once, from here.
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(PYTHONUNBUFFERED="1", **stage.variables), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", preexec_fn=_end_with_parent,
    )  # fmt: skip

    def show():
        for line in process.stdout:
            # Keep reading even if our output is closed, or the stage would block on a full pipe.
            with contextlib.suppress(OSError, ValueError):
                print(line, end="", flush=True)
            last.append(line.rstrip())

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
        reader.join(stages.GRACE)
    return status, time.monotonic() - begun, [line for line in last if line.strip()]


def _end_with_parent():
    """In a stage: have Linux kill it if this process is killed, or it would run beside the next call's stages."""
    if sys.platform == "linux":
        set_signal_of_parents_death = 1
        ctypes.CDLL(None).prctl(set_signal_of_parents_death, signal.SIGKILL)


def _end(process):
    """Ask the process to stop, then kill what is left of it."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(stages.GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also if this is interrupted again
        kill_session(process)
        # With a timeout: nothing ends a process that waits in the driver of a hanging GPU.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(stages.GRACE)


def still_to_do(planned, outcome_of):
    """The stages that have not finished, then those that failed, then those that left a contestant out."""
    outcomes = [(stage, outcome_of.get(stage.name, {})) for stage in planned]
    missing = [stage for stage, outcome in outcomes if outcome.get("status") not in (PASSED, FAILED)]
    failed = [stage for stage, outcome in outcomes if outcome.get("status") == FAILED]
    # A contestant that was wrong then may be right when its turn comes.
    without = [stage for stage, outcome in outcomes if outcome.get("status") == PASSED and outcome.get("without")]
    return missing + failed + without


def main(folder, minutes=None, begun=None):
    """Run the stages that are still to do; returns the exit status.

    Args:
        folder: where files go.
        minutes: how long it may take in all, None for as long as it takes.
        begun: when the minutes began, by time.monotonic; None for now.

    Raises:
        SystemExit: another call runs with its files in this folder; in one line.
    """
    with _alone(folder):
        return _main(folder, minutes, time.monotonic() if begun is None else begun)


@contextlib.contextmanager
def _alone(folder):
    """Locks the folder: two calls at once would overwrite each other's findings and disturb each other's times.

    The lock of a killed call is released.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"bench --verify runs already, with its files in {folder}")
        except OSError:
            pass  # the file system has no locks
        yield
    finally:
        os.close(descriptor)


def _main(folder, minutes, begun):
    here = machine("cuda")
    folder = folder.absolute()  # stages run in the project's root
    kept = folder / f"{file_name(here)}{ENDING}.json"
    planned, left_out = stages.planned(folder, kept)
    state = read_json(kept)
    known = "stages" in state and same_but_date(state["machine"], here) and state["sources"] == sources()
    if known:
        to_do = still_to_do(planned, state["stages"])
        print(f"going on with {kept}: {', '.join(stage.name for stage in to_do) or 'nothing is left to do'}")
    else:
        to_do = planned
        write_json(kept, {"machine": here, "sources": sources(), "stages": {}})
    try:
        for place, stage in enumerate(to_do):
            limit = PATIENCE * stage.seconds
            if minutes is not None:
                left = 60 * minutes - (time.monotonic() - begun)
                share = stage.seconds / sum(later.seconds for later in to_do[place:])
                # A stage that is told to stop needs a while.
                limit = min(max(share * left, stage.seconds), left - stages.GRACE)
            if limit < stage.least:
                continue
            put(kept, "stages", stage.name, {"status": STOPPED, "seconds": 0.0, "said": ""})
            without = _not_timed(read_json(kept))
            status, seconds, last = run(stage, limit, without)
            if status == PASSED and stage.name in stages.UNTIL_COMPLETE:
                record = folder / f"{file_name(here)}{stages.UNTIL_COMPLETE[stage.name]}.json"
                status = LATE if Record.read(record).missing else PASSED
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
    differs = "smoke" in state["stages"] and set(smoke.values()) != {AGREES}  # also if no case has finished
    of_step = {Path(file).stem for file in stages.STEP_TESTS}
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
    print(f"\n{title(state['machine'])}\n\n{markdown(('stage', 'outcome', 'took', 'last line'), lines)}")
    for file, of_file in state.get("tests", {}).items():
        for name in of_file["failed"]:
            print(f"failed: {file}::{name}")
    well = not still_to_do(planned, state["stages"])
    write_json(kept, state | {"summary": lines, "well": well})
    outcome = "all stages passed" if well else "some stages are missing or failed: the same command goes on"
    print(f"{outcome}; kept in {kept}")
    return 0 if well else 1


def counts(tests):
    """{"passed": int, "failed": int, "skipped": int} of what bench.outcomes keeps under "tests"."""
    return {kind: sum(len(of_file[kind]) for of_file in tests.values()) for kind in ("passed", "failed", "skipped")}


def in_words(state):
    """What the stages have found, as paragraphs and tables for bench/README.md."""
    found = []
    if smoke := state.get("smoke"):
        agree = sum(outcome == AGREES for outcome in smoke.values())
        found.append(
            f"`TrainStep` with CUDA graphs, without, and again with: the same bits in {agree} of {len(smoke)} cases"
        )
    if tests := state.get("tests"):
        of = counts(tests)
        found.append(f"{of['passed']:,} tests passed, {of['failed']} failed, {of['skipped']} skipped")
    for tool in stages.SANITIZERS:
        if status := _status(state, tool):
            said = state["stages"][tool].get("said", "").strip("= ")
            found.append(f"{tool}: {status}" + f" ({said})" * (status != PASSED and bool(said)))
    parts = [f"On it: {'; '.join(found)}."] if found else []
    if times := state.get("start"):
        parts.append(markdown(*start.table(times)).strip())
    return parts
