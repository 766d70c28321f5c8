"""Without a GPU the kernels run in Triton's interpreter, with one on the GPU; TRITONNET_TEST_DEVICE=cpu overrules."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

# The suite is spread over the cores by processes (pytest -n auto), not by threads; read when numpy loads its library.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch  # noqa: E402

# bench is not installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

DEVICE = os.environ.get("TRITONNET_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

if not importlib.util.find_spec("triton"):
    pytest.exit("the tests need triton: pip install -e .[test]", returncode=4)

# triton 3.6's interpreter takes no loop bound from an array of numpy 2.4.
INTERPRETER_RUNS = version("triton") >= "3.7" or version("numpy") < "2.4"
if DEVICE == "cpu" and not INTERPRETER_RUNS:
    pytest.exit("the interpreter of triton 3.6 needs numpy before 2.4: pip install 'numpy<2.4'", returncode=4)
try:
    import tritonnet
    import tritonnet.kernels
except ImportError as e:
    pytest.exit(f"tritonnet is not installed for development ({e}): pip install -e .[test]", returncode=4)

import memory  # noqa: E402  (needs triton)

if DEVICE == "cpu":
    # Checks of integer overflow that assert nothing outside debug mode take half of the interpreter's time.
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    memory.watch.install()


torch.set_num_threads(1)  # for the same reason


def pytest_collection_modifyitems(items):
    """What takes longest comes first, so that it does not run alone at the end."""
    items.sort(key=lambda item: not item.name.startswith("test_machine_code["))  # stable: the others keep their order


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def fresh_start():
    """Fixed seed; results that were never written are NaN, and operators that are not deterministic raise."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unpoisoned():
    """Filling 4 GiB with NaN would make every page real."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def memory_is_watched():
    """Fails any test in which a kernel strays from its tensors or programs race (see memory.py)."""
    with memory.watched() if DEVICE == "cpu" else memory.guard_bands() as violations:
        yield
    assert not violations, "\n".join(violations)


@pytest.fixture
def full_precision():
    """float32 products of 24 bits, so that a GPU's results can be compared with the CPU's to four digits."""
    owners = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    previous = [owner.fp32_precision for owner in owners]
    for owner in owners:
        owner.fp32_precision = "ieee"
    yield
    for owner, value in zip(owners, previous):
        owner.fp32_precision = value


@pytest.fixture(params=["triton", "reference"])
def backend(request):
    """Runs the test on the kernels, and again on the reference."""
    with tritonnet.backend(request.param):
        yield request.param


def run_python(*args, **variables):
    """A fresh Python process in the project's root; variables set to None are removed from its environment."""
    environment = {**os.environ, **variables}
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(
        [sys.executable, *args], env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
