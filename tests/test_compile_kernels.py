"""Every kernel compiles to machine code for each supported GPU, without one, and fits its registers and shared memory.

What no interpreter shows: shapes that tl.dot refuses, types that change inside a loop, spilled registers.
"""

import concurrent.futures

import pytest
from conftest import run_python

from tritonnet.kernels import launchers

# Between them the targets see every dtype; sm_90, which the tiles were chosen for, sees them all.
TARGETS = {
    "sm_80": "cuda 80 32 float16 float32",
    "sm_90": "cuda 90 32",
    "sm_100": "cuda 100 32 bfloat16",
    "gfx942": "hip gfx942 64 bfloat16 float64",
}
# Bytes that one program may have: CUDA C++ Programming Guide, table of compute capabilities; CDNA3 ISA, LDS.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@pytest.fixture(scope="module")
def compiled():
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = {
            name: pool.submit(run_python, "tests/compile_kernels.py", *target.split(), TRITON_INTERPRET=None)
            for name, target in TARGETS.items()
        }
        return {name: job.result() for name, job in jobs.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target, compiled):
    result = compiled[target]
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [line.split("\t") for line in result.stdout.splitlines() if "\t" in line]
    assert {row[0] for row in rows} == {kernel.fn.__name__ for kernel in launchers.KERNELS}
    assert not [row for row in rows if int(row[3]) > SHARED_MEMORY[target]]
    if target == "sm_90":
        # Up to eight registers saved around a loop: triton 3.7 needs 8 bytes at most and 3.9 needs 24. A tile that does
        # not fit costs hundreds.
        assert not [row for row in rows if int(row[5]) > 32]
