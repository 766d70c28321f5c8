"""What a machine with a GPU will launch, part by part, and the processes that compile it without one; see archive.py.

A part is a function that returns {name: call}. The calls take CPU tensors whose values do not matter: random tensors
are left uninitialised, so that most pages are never touched.
"""

import contextlib
import functools
import importlib.util
import json
import math
import runpy
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget

from tritonnet.cli import doctor

from .. import TARGETS, inference, passes, smoke, stages, training
from ..keep import ROOT
from ..libraries import installed
from ..machine_code import every_kernel
from ..machine_code.compile import compile_instead
from ..measure import Host, precision
from ..no_launch import cpu_for_gpu, forget_kernels
from ..processes import environment, kill_session
from ..record import OURS
from ..run import entries, plan
from ..tune import problems
from .launchers import Launchers, in_a_line

# The test files that launch every kernel in the most variants.
TESTS = *stages.STEP_TESTS, *stages.CONVOLUTION_TESTS, *stages.KERNEL_TESTS
# Leaves out tests that start processes, in which nothing would be compiled; and seconds for all others.
NOT_TESTS = "not from_a_data_loader and not older_flags"
TESTS_SECONDS = 3000


def _timed(cases):
    """The first step of each of our contestants in every case of the bench."""
    ours = {name: library for name, library in installed().items() if name in OURS}
    device = Host()

    def launch(case):
        with precision(case.format):
            for entry in entries(case, ours, device):
                with entry.library.context():
                    subject, format = case.subject, case.format
                    contestant = subject.contestant(entry.library, entry.layout, format, device, entry.mode)
                    for steps in contestant.steps.values():
                        # TrainStep refuses a loss that is not finite, when all of its kernels are compiled.
                        with contextlib.suppress(FloatingPointError):
                            steps[0]()

    return {case.name: functools.partial(launch, case) for case in cases()}


def _smoke():
    def launch(precision, batch):
        smoke.train(precision, smoke.batches(batch, 1, 0, "cpu"), "cpu")

    # A DataLoader's last batch may be smaller.
    sizes = {(precision, size) for precision, batch, _, loaded in smoke.CASES for size in (batch, loaded % batch)}
    return {
        f"{precision}, batch {batch}": functools.partial(launch, precision, batch)
        for precision, batch in sorted(sizes)
        if batch
    }


def _doctor():
    # Its verdict on the results does not matter, and compile_for records errors in compiling.
    return {
        f"{name} in {format}": functools.partial(doctor.check, name, format, torch.device("cpu"))
        for format in doctor.FORMATS
        for name in doctor.LAYERS
        if doctor.served(name, format)
    }


def _every_kernel():
    return {"all": lambda: every_kernel.launch_all("cpu", every_kernel.BATCH)}


# Parts with one long job come first, so that it does not run alone at the end.
PARTS = {
    "every_kernel": _every_kernel,
    "doctor": _doctor,
    "smoke": _smoke,
    "quick": functools.partial(_timed, lambda: plan(quick=True)),
    "inference": functools.partial(_timed, inference.plan),
    "training": functools.partial(_timed, training.plan),
    "passes": functools.partial(_timed, passes.plan),
    "tune": problems.jobs,
    "full": functools.partial(_timed, lambda: plan(quick=False)),
}


def calls(parts):
    """{"part: name": call} of the parts, given by their names or as Python files with a function jobs()."""
    parts = [part for part in parts if not (part == "quick" and "full" in parts)]  # which includes it
    parts.sort(key=lambda part: list(PARTS).index(part) if part in PARTS else -1)
    found = {}
    for part in parts:
        made = PARTS[part]() if part in PARTS else runpy.run_path(part)["jobs"]()
        found.update({f"{part}: {name}": call for name, call in made.items()})
    return found


@contextlib.contextmanager
def nothing_random():
    """Inside, torch.randn returns uninitialised memory, and torch.randint zeros."""

    def randn(*size, generator=None, **options):
        return torch.empty(*size, **options)

    def randint(*bounds_and_size, generator=None, **options):
        *_, size = bounds_and_size
        return torch.zeros(size, **{"dtype": torch.int64, **options})

    with mock.patch.object(torch, "randn", randn), mock.patch.object(torch, "randint", randint):
        yield


class Findings:
    """A file of the findings of several processes, a JSON object a line."""

    def __init__(self, path):
        self.path = path

    def add(self, **finding):
        # A line in a single write is not interleaved with those of other processes.
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finding) + "\n")

    def read(self):
        return [json.loads(line) for line in self.path.read_text("utf-8").splitlines()] if self.path.exists() else []


def compile_for(name, findings, label):
    """From now on this process launches nothing and compiles for a target of TARGETS; label() names the job."""
    target = GPUTarget(*TARGETS[name])
    build, seen = Launchers(findings) if target.backend == "cuda" else None, set()

    def report(kernel_name, launch, kernel):
        if isinstance(kernel, Exception):
            findings.add(job=label(), kernel=kernel_name, error=in_a_line(kernel))
        elif build and kernel.hash not in seen:
            seen.add(kernel.hash)
            build(kernel)

    compile_instead(target, report)


def work(folder, target, parts):
    """Run one process's share of the jobs: those that no other process has claimed, one after the other."""
    findings, now = Findings(folder / "findings"), ["-"]
    compile_for(target, findings, lambda: now[0])
    torch.set_num_threads(1)
    with cpu_for_gpu(), nothing_random():
        for number, (name, call) in enumerate(calls(parts).items()):
            try:
                (folder / f"claimed {number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            now[0] = name
            print(f"job {name}", file=sys.stderr, flush=True)
            try:
                call()
            except Exception as error:  # any error of a job is a finding, and the others go on
                findings.add(job=name, kernel="", error=in_a_line(error))
            # Compiled kernels are in Triton's cache on disk, and need not stay in memory.
            forget_kernels()


def _variables(folder, cache):
    return {
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_STORE_BINARY_ONLY": "1",
        "TRITON_LIBCUDA_PATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _start(folder, cache, target, parts, number):
    command = [sys.executable, "-m", "bench.warm.work", str(folder), target, *parts]
    # If LLVM ends the process, the log names its last job and kernel.
    with open(folder / f"log {number}", "w", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment(**_variables(folder, cache)), stdout=log, stderr=log)


def run_jobs(folder, cache, target, parts, processes, seconds=math.inf):
    """Runs the jobs of the parts in processes of their own; none is left when this returns or raises.

    Args:
        folder: an empty one, which the processes share.
        cache: the folder of Triton's cache.
        seconds: how long the processes may take; jobs that they have not finished then are not done.

    Returns:
        The findings, dicts with the "error" of a "kernel" in a "job", or with what was "left_out".
    """
    findings, started, end = Findings(folder / "findings"), processes, time.monotonic() + seconds
    running = {}
    try:
        for number in range(processes):
            running[number] = _start(folder, cache, target, parts, number)
        while running and time.monotonic() < end:
            time.sleep(0.05)
            for number, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[number]
                if process.returncode == 0:
                    continue
                lines = (folder / f"log {number}").read_text("utf-8", "replace").splitlines()
                job = next((line[4:] for line in reversed(lines) if line.startswith("job ")), None)
                kernel = next((line[10:] for line in reversed(lines) if line.startswith("compiling ")), "")
                last = lines[-1] if lines else "it printed nothing"
                findings.add(job=job or "-", kernel=kernel, error=f"a process ended with {process.returncode}: {last}")
                if job:  # otherwise the next process would get no further
                    running[started] = _start(folder, cache, target, parts, started)
                    started += 1
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return findings.read()


def run_tests(folder, cache, target, processes):
    """The part "tests", in one pytest; arguments and result as those of run_jobs."""
    findings = Findings(folder / "findings")
    if not importlib.util.find_spec("pytest"):
        findings.add(left_out="the tests: pytest is not installed")
        return findings.read()
    variables = _variables(folder, cache) | {
        "TRITONNET_TEST_DEVICE": "cpu:0",
        "TRITONNET_WARM": f"{target} {findings.path}",
        # Python in the workers of xdist takes -O from the environment only.
        "PYTHONOPTIMIZE": "1",
        "PYTHONPYCACHEPREFIX": str(folder / "pycache"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "bench.warm.tests", "-p", "no:cacheprovider"]
    command += ["-n", str(processes)] if importlib.util.find_spec("xdist") else []
    command += ["-k", NOT_TESTS, *(f"tests/{name}.py" for name in TESTS)]
    log = folder / "log of the tests"
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(**variables), stdout=file, stderr=file, start_new_session=True
        )  # fmt: skip
    try:
        status = process.wait(TESTS_SECONDS)
    except subprocess.TimeoutExpired:
        findings.add(left_out=f"tests that had not run after {TESTS_SECONDS} s")
        status = 0
    finally:
        kill_session(process)
        process.wait()
    lines = log.read_text("utf-8", "replace").splitlines()
    for line in sorted({line for line in lines if "crashed while running" in line}):
        findings.add(job="tests", kernel="", error=line)
    # Tests may fail here, but some have to run.
    if status not in (0, 1):
        findings.add(job="tests", kernel="", error=f"pytest ended with {status}: {' | '.join(lines[-3:])}")
    return findings.read()


def main():
    folder, target, *parts = sys.argv[1:]
    work(Path(folder), target, parts)


if __name__ == "__main__":
    main()
