"""Everything that an hour on a GPU can prove, in one command:  python -m bench --verify"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Not in these tests: the interpreter, which needs no GPU.
INTERPRETER = "tests/test_dispatch.py::test_the_interpreter_too"
SANITIZERS = "memcheck", "racecheck"


def commands(out):
    """[(title, command, variables)], and what is left out, a line each.

    Args:
        out: folder for the files of the bench, or None for its own.
    """
    left_out = [f"{INTERPRETER}: it runs without a GPU"]
    tests = [sys.executable, "-m", "pytest", "-q", "--deselect", INTERPRETER]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", "4"]
    found = [("tests", tests, {"TRITONNET_TEST_DEVICE": "cuda"})]
    if not importlib.util.find_spec("pytest"):
        left_out.append("the tests: pytest is not installed")
        found = []
    for package in ("hypothesis", "tqdm"):
        if not importlib.util.find_spec(package):
            left_out.append(f"the tests that need {package}: it is not installed")
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool in SANITIZERS:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "bench.every_kernel"]
            # Out of bounds is out of an allocation, and so each tensor gets one of its own.
            found.append((tool, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    else:
        left_out.append("the sanitizers: there is no compute-sanitizer on the PATH")
    bench = [sys.executable, "-m", "bench", "--quick", *(["--out", str(out)] if out else [])]
    return [*found, ("bench", bench, {})], left_out


def main(args):
    """Run all, one after the other whatever comes of it; returns the exit status."""
    planned, left_out = commands(args.out)
    outcomes = []
    for title, command, variables in planned:
        print(f"\n{title}: {' '.join(command)}", flush=True)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        start = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, env={**environment, **variables}).returncode
        outcomes.append((title, status, time.monotonic() - start))
    print()
    for title, status, seconds in outcomes:
        print(f"{title}: {'passed' if status == 0 else f'FAILED, status {status}'} in {seconds:.0f} s")
    for line in left_out:
        print(f"left out: {line}")
    return int(any(status for _, status, _ in outcomes))
