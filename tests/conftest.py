"""Without a GPU the kernels run in Triton's interpreter, with one on the GPU; TRITONNET_TEST_DEVICE=cpu overrules.

TRITONNET_TEST_DEVICE=sm_80, sm_90 or sm_100 runs the kernels' compiled code for such a GPU on the CPU (emulated.py).
"""

import dataclasses
import gc
import gzip
import importlib.util
import itertools
import math
import os
import struct
import subprocess
import sys
import zlib
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

# pytest -n auto spreads the suite over the cores by processes, not threads. numpy reads this when it loads its library.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Nor does Inductor start processes of its own to compile in.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# An operator's result that is another tensor of the call is an error in torch to come, and now where CI is set.
os.environ.setdefault("TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING", "1")
# Without it torch refuses cuBLAS's products under deterministic algorithms. It is read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch  # noqa: E402
from filelock import FileLock  # noqa: E402

# bench is never installed, and in a bare clone tritonnet is not either.
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

DEVICE = os.environ.get("TRITONNET_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
# The architecture whose code is run on the CPU. Its device is "cpu:0", as "cpu" stands for the interpreter.
EMULATED = DEVICE if DEVICE.startswith("sm_") else None
DEVICE = "cpu:0" if EMULATED else DEVICE
# Whether tests marked `thorough` run too: see tests/README.md. Only the interpreter's run leaves them out unasked.
THOROUGH = os.environ.get("TRITONNET_TEST_THOROUGH", "0" if DEVICE == "cpu" else "1") == "1"
# Decides all that the ISA leaves open there: the order of warps and programs, and when copies land.
SEED = int(os.environ.get("TRITONNET_TEST_SEED", 0))
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

if not importlib.util.find_spec("triton"):
    pytest.exit("the tests need triton: pip install -e .[test]", returncode=4)

# triton 3.6's interpreter cannot take a loop bound from an array of numpy 2.4.
INTERPRETER_RUNS = version("triton") >= "3.7" or version("numpy") < "2.4"
if DEVICE == "cpu" and not INTERPRETER_RUNS:
    pytest.exit("the interpreter of triton 3.6 needs numpy before 2.4: pip install 'numpy<2.4'", returncode=4)

import memory  # noqa: E402  (needs triton)

if EMULATED:
    import emulated

import tritonnet  # noqa: E402
from tritonnet.kernels import product  # noqa: E402
from tritonnet.kernels.lenet import layout as lenet  # noqa: E402
from tritonnet.lenet import losses  # noqa: E402
from tritonnet.lenet import step as lenet_step  # noqa: E402

if DEVICE == "cpu":
    # Outside debug mode these checks of integer overflow assert nothing, and take half of the interpreter's time.
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    memory.watch.install()
    address, new_block = lenet.address, losses.new_block

    def known_address(tensor):
        memory.watch.knows(tensor, "an address in memory")
        return address(tensor)

    def known_block(device):
        block = new_block(device)
        memory.watch.knows(block, "a block of losses")
        return block

    lenet.address, losses.new_block = known_address, known_block


# The interpreter, compilers and the PTX machine make many objects and little garbage.
gc.set_threshold(100_000, 50, 50)
torch.set_num_threads(1)  # one thread, for the same reason as OPENBLAS_NUM_THREADS


def pytest_configure(config):
    """Under pytest -n a process that has run out of tests takes some of another's.

    By default each process is given a quarter of its share at once, and all slow tests are in that of the first.
    """
    if config.getoption("dist", "no") == "load":
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(config, items):
    """Leaves out the thorough tests unless they are asked for, and puts the slowest first.

    So none of these runs alone at the end; the training comes first, too, and the tests that wait for it last.
    """
    left_out = [] if THOROUGH else [item for item in items if item.get_closest_marker("thorough")] + unsampled(items)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
    first = "test_machine_code[", "test_each_kernel_once", "test_as_compiled[", "test_training_reaches_97_percent"
    # Stable: the others keep their order.
    items.sort(key=lambda item: (not item.name.startswith(first), "trained" in item.fixturenames))


def unsampled(items):
    """The cases of tests marked `sampled(k)` that are not the one in k with the smallest hash of their names.

    So each value of a parameter is in about as many of those that run, and a further case changes one other at most.
    """
    cases = defaultdict(list)
    for item in items:
        if (marker := item.get_closest_marker("sampled")) is not None:
            cases[item.path, item.originalname, *marker.args].append(item)
    left_out = []
    for (*_, k), of_test in cases.items():
        of_test.sort(key=lambda item: zlib.crc32(item.name.encode()))
        left_out += of_test[math.ceil(len(of_test) / k) :]
    return left_out


def pytest_terminal_summary(terminalreporter):
    """Prints which programs have run as compiled code, and what tests have recorded as a "summary"."""
    programs = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", None) == "teardown":
            recorded = dict(report.user_properties)
            programs.update(recorded.get("programs", {}))
            if "summary" in recorded:
                terminalreporter.write_line(recorded["summary"])
    if EMULATED:
        ran = ", ".join(f"{name} {count}" for name, count in sorted(programs.items()))
        terminalreporter.write_line(f"programs run as compiled for {EMULATED}: {ran or 'none'}")


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def fresh_start():
    """Fixed seed; unwritten memory is NaN, and nondeterministic operators raise.

    float32 products are taken as torch takes them by default, whatever an earlier test has set. Sums of 16-bit products
    are kept in float32, as the kernels keep them; cuBLAS may otherwise round partial sums.
    """
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = True  # sets the newer flags too, and leaves none that contradicts it
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unpoisoned():
    """Leaves new memory unfilled: writing NaN to 4 GiB would touch every page."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def memory_is_watched(record_property):
    """Fails any test in which a kernel accesses memory outside its tensors or programs race (see memory.py)."""
    if EMULATED:
        with emulated.emulated(EMULATED, SEED) as emulator:
            yield emulator
        record_property("programs", dict(emulator.programs))
        return
    with memory.watched() if DEVICE == "cpu" else memory.guard_bands() as violations:
        yield
    assert not violations, "\n".join(violations)


@pytest.fixture
def full_precision():
    """float32 products in full float32, so that a GPU's results can be compared with the CPU's to four digits.

    Uses the older flag: torch.export reads it, and torch raises there once the newer one says "ieee".
    """
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def descriptors(monkeypatch):
    """Tensor descriptors read the operands of small products too, if they can read them at all."""
    if not product.described():
        pytest.skip("products by tensor descriptors run in the interpreter and from sm_90 on")
    monkeypatch.setattr(product, "LARGE", 1)


@pytest.fixture
def no_graphs(monkeypatch):
    """TrainStep launches at every call: `count_launches` does not see what a CUDA graph replays."""
    monkeypatch.setattr(lenet_step.FusedLaunches, "graphs_on", ())


@pytest.fixture(params=["triton", "reference"])
def backend(request):
    """Runs the test on the kernels, and again on the reference."""
    with tritonnet.backend(request.param):
        yield request.param


def thorough_if(left_out, cases):
    """Cases for `parametrize`, of which those with left_out(*case) run in a thorough run only."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.thorough] * bool(left_out(*case))) for case in cases]


def by_turns(many, few):
    """Cases (one of many, one of few) for `parametrize`; the thorough run has all, another gives `few` by turns."""
    cases = [(a, b, few[i % len(few)] != b) for i, a in enumerate(many) for b in few]
    return [pytest.param(a, b, marks=[pytest.mark.thorough] * left_out) for a, b, left_out in cases]


def pairs(first, second, third):
    """Cases (first, second, third) for `parametrize`, of which a thorough run has all.

    Another run has half of them if the third are two: each pair of values of two of the three occurs in them.
    """
    numbered = itertools.product(*map(enumerate, (first, second, third)))
    cases = [(a, b, c, (i + j + k) % len(third)) for (i, a), (j, b), (k, c) in numbered]
    return [pytest.param(a, b, c, marks=[pytest.mark.thorough] * bool(left_out)) for a, b, c, left_out in cases]


def run_python(*args, **variables):
    """Runs Python in a new process in the project's root; variables set to None are removed from its environment."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run([sys.executable, *args], env=environment, cwd=ROOT, capture_output=True, text=True)


def write_idx(folder, name, array, zipped=False):
    """Writes a uint8 tensor as one of MNIST's files."""
    content = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape) + bytes(array.flatten().tolist())
    (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)


def write_mnist(folder, train_x, train_y, test_x, test_y, zipped=False):
    """Writes the four files of MNIST."""
    for part, images, labels in (("train", train_x, train_y), ("t10k", test_x, test_y)):
        write_idx(folder, f"{part}-images-idx3-ubyte", images, zipped)
        write_idx(folder, f"{part}-labels-idx1-ubyte", labels, zipped)


def printed_once(tmp_path_factory, name, arguments, **variables):
    """(a folder, what Python printed): run once for all tests, with the folder's path after the arguments.

    Under pytest -n one process runs it and the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    printed = folder.with_suffix(".txt")
    with FileLock(str(folder) + ".lock"):
        if not printed.exists():
            result = run_python(*arguments, str(folder), **variables)
            assert result.returncode == 0, result.stderr
            printed.write_text(result.stdout, encoding="utf-8")
    return folder, printed.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(folder of a run, what it printed): the README's command on the CPU."""
    arguments = ("-m", "tritonnet", "train", "--device", "cpu", "--out")
    return printed_once(tmp_path_factory, "lenet", arguments, TRITON_INTERPRET=None, OMP_NUM_THREADS="1")
