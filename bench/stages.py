"""The stages of --verify, the most informative first: their commands, their seconds and the test files of each."""

import dataclasses
import functools
import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable

from .record import INFERENCE_ENDING, PASSES_ENDING, TRAINING_ENDING
from .run import OF_INFERENCE, OF_PASSES, OF_TRAINING, QUICK

PYTHON = (sys.executable,)
# pytest's exit status where there was no test to run.
NO_TESTS = 5
# Seconds that a stage has for its report after it was told to stop.
GRACE = 20

# Test files. TrainStep is timed only if those of the step pass. Those of the other kernels come before the rest.
STEP_TESTS = (
    "test_graphs", "test_train_step", "test_train_step_optimizers", "test_weights", "test_lenet", "test_lenet_lanes"
)  # fmt: skip
CONVOLUTION_TESTS = (
    "test_conv2d", "test_conv2d_few", "test_conv2d_statistics", "test_depthwise", "test_fused",
    "test_conv2d_pool_grad", "test_conv2d_pool_patch",
)  # fmt: skip
KERNEL_TESTS = (
    "test_max_pool2d", "test_avg_pool2d", "test_linear", "test_linear_chain", "test_cross_entropy", "test_relu",
    "test_activations", "test_epilogue", "test_batch_norm", "test_squeeze_excite", "test_memory",
)  # fmt: skip
OTHER_TESTS = (
    "test_distributed", "test_citizenship", "test_networks", "test_network_training", "test_gradcheck", "test_peers",
    "test_properties", "test_layers", "test_fusion", "test_epilogue_patterns", "test_norm_patterns", "test_faithful",
    "test_recognition", "test_conversion", "test_serving", "test_launching", "test_dispatch", "test_in_place",
    "test_defaults", "test_errors", "test_cli", "test_examples", "test_huge",
)  # fmt: skip
# What these test is the same on every machine.
WITHOUT_GPU = (
    "test_bench", "test_bench_training", "test_compiled", "test_files", "test_images", "test_inference",
    "test_machine_code", "test_package", "test_ptx", "test_ptx_bulk", "test_ptx_faults", "test_ptx_matrices",
    "test_ptx_tensor", "test_ptx_tensor_faults", "test_step_on_host", "test_structure", "test_tiles", "test_tools",
    "test_tracing", "test_tune", "test_verify", "test_warm", "test_watch", "test_whole_step"
)  # fmt: skip
# A test of the interpreter, which needs no GPU either.
INTERPRETER = "tests/test_dispatch.py::test_the_interpreter_too"
SANITIZERS = "memcheck", "racecheck"
# What the stage "tune" writes into the folder of the records, to be copied into kernels/.
TILES = "measured_tiles.py"
# Where CUDA's tools are if they are not on the PATH.
CUDA = "/usr/local/cuda/bin"


# Stages that go on until nothing is missing in their record, with what follows the GPU's name in its file's name.
UNTIL_COMPLETE = {"inference": INFERENCE_ENDING, "training": TRAINING_ENDING, "passes": PASSES_ENDING, "bench": ""}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, which runs in a process of its own.

    Attributes:
        name: of the stage.
        command: function of the seconds that it may take and of the contestants to leave out: the command line.
        seconds: what it needs with compiled kernels; time beyond that is shared in proportion to it.
        least: seconds below which it is not worth starting.
        variables: of its environment.
        nothing_left: the exit status which says that nothing was left to do.
        times: whether contestants are timed in it.
    """

    name: str
    command: Callable
    seconds: float
    least: float
    variables: dict = dataclasses.field(default_factory=dict)
    nothing_left: int = 0
    times: bool = False


def planned(folder, kept):
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
        """`most`: the most seconds that its cases may take."""

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
            options = ["--tool", tool, "--error-exitcode", "1"]
            command = [sanitizer, *options, *PYTHON, "-m", "bench.machine_code.every_kernel"]
            # memcheck checks the bounds of allocations, and so each tensor gets one of its own.
            alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
            found.append(Stage(tool, lambda limit, without, command=command: command, 40, 20, alone))
    else:
        left_out.update(dict.fromkeys(SANITIZERS, f"there is no compute-sanitizer on the PATH or in {CUDA}"))
    add("first step and image", 60, 20, "-m", "bench.start", "--keep", str(kept), times=True)
    found.append(Stage("tune", functools.partial(_tune, folder, kept), 150, 60))
    tests("all other tests", OTHER_TESTS, 60)
    bench("inference", 100, OF_INFERENCE, "--inference", "--no-pictures")
    bench("training", 150, OF_TRAINING, "--training", "--no-pictures")
    bench("passes", 100, OF_PASSES, "--passes", "--no-pictures")
    bench("bench", 200, math.inf)
    return found, left_out


def _tune(folder, kept, limit, without):
    """The command that measures tiles. It writes no source, which must not change while it is verified."""
    options = ["--keep", str(kept), "--out", str(folder / TILES), "--minutes", f"{max(10, limit - GRACE) / 60:.2f}"]
    return [*PYTHON, "-m", "bench.tune", *options]


def _without(contestants):
    return [word for name in contestants for word in ("--without", name)]
