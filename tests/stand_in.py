"""Stands in for a GPU in the processes that `bench --verify` starts:  python tests/stand_in.py -m MODULE ARGUMENTS

Calls run on the reference, times are made up, CUDA graphs are lists of calls. The rest of a stage is real.
"""

import functools
import os
import runpy
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

_, dash_m, module, *arguments = sys.argv
assert dash_m == "-m"


def bench():
    """As on a GPU, with made-up times and few cases."""
    import torch
    from test_bench import MACHINE, Clockwork, small_operators
    from test_bench_training import small_step
    from test_inference import small_evaluation

    import tritonnet
    from bench import __main__ as main
    from bench import run
    from bench.case import Case
    from bench.measure import ceilings

    # Only the command's own question has this answer: Dynamo would ask the GPU for its random numbers' state.
    answers = iter([True])
    torch.cuda.is_available = lambda: next(answers, False)
    run.MOST_COMPILING_A_NETWORK = 5.0
    main.Cuda, main.machine = Clockwork, lambda kind: MACHINE
    main.ceilings = functools.partial(ceilings, size=8)
    main.passes.plan = lambda formats: [Case(operator, "bfloat16") for operator in small_operators()[:1]]
    main.inference.plan = lambda formats: [Case(small_evaluation(), "bfloat16")]
    main.training.plan = lambda formats: [Case(small_step(), "bfloat16")]
    main.plan = lambda quick: [Case(operator, "bfloat16") for operator in small_operators()[: 1 if quick else 3]]
    main.plots.missing = lambda: "no pictures"
    with tritonnet.backend("reference"):
        main.main(arguments)


def smoke():
    """On the CPU, where a step's launches run in the interpreter and a capture keeps the calls."""
    os.environ["TRITON_INTERPRET"] = "1"
    from bench import no_launch, smoke
    from tritonnet.lenet import step as lenet_step

    lenet_step.capture = no_launch.captured
    smoke.CASES = [("ieee", 2, 1, 2)]
    smoke.main([*arguments, "--device", "cpu"])


def start():
    """One of its cases, on the CPU."""
    from bench import start

    start.CASES = [("first image", "torch")]
    sys.exit(start.main([*arguments, "--device", "cpu"]))


def tune():
    """Invented problems and times."""
    import test_tune
    from pytest import MonkeyPatch

    from bench.tune.__main__ import main

    test_tune.on_made_up_card(MonkeyPatch(), test_tune.measured)
    sys.exit(main(arguments))


stood_in_for = {"bench": bench, "bench.tune": tune, "bench.smoke": smoke, "bench.start": start}
if module in stood_in_for:
    stood_in_for[module]()
else:
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
