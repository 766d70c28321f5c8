"""Checks and times everything against torch, on one GPU.

    python -m bench             # everything, below 8 minutes; --quick takes below 2
    python -m bench --data DIR  # and the time to 99 % on MNIST, from the four IDX files in DIR
    python -m bench --cpu       # without a GPU: what a call costs in Python, and the reference
    python -m bench --verify    # on a GPU: all tests, the sanitizers, then --quick

Prints tables, and writes them with JSON and pictures to bench/results. The exit status is 1 if a result of ours is
wrong or a contestant of ours failed.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import tritonnet

from . import cpu, plots, verify
from .accuracy import add_arguments, race
from .case import TIMED
from .libraries import installed
from .measure import Cuda, ceilings
from .progress import progress
from .record import Record, machine
from .report import page
from .run import COMPILED_OPERATORS, Budget, plan, run

RESULTS = Path(__file__).parent / "results"
# Seconds for the cases; starting, the ceilings before them and the pictures after them take the rest.
FULL, QUICK = 440, 90


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="LeNet in bfloat16 and tf32, operators in bfloat16")
    parser.add_argument("--cpu", action="store_true", help="without a GPU: the cost of a call, and the reference")
    parser.add_argument("--verify", action="store_true", help="tests on the GPU, sanitizers, then the quick run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where files go (default: bench/results, or nowhere)")
    add_arguments(parser)
    return parser.parse_args(argv)


def on_gpu(record, args, start):
    """Fills the record of a run on the current GPU that started at `start` of time.monotonic."""
    device, libraries = Cuda(), installed()
    torch.backends.cudnn.benchmark = True
    if "FlagGems" not in libraries:
        record.left_out.append("FlagGems: it is not installed")
    record.left_out.append("torch.compile, other than for LeNet in bfloat16, at batch 65536 in tf32, and for the "
                           f"operators {'; '.join(COMPILED_OPERATORS)} in bfloat16: it takes too long")  # fmt: skip
    if args.quick:
        record.left_out.append("--quick: float16, float32, and operators in tf32")
    record.ceilings = ceilings(TIMED, device)
    if args.data:
        race(record, args.data, args.target, libraries, device)
    budget = Budget(QUICK if args.quick else FULL, start)
    run(record, progress(plan(args.quick)), libraries, device, budget, seconds=0.05 if args.quick else 0.1)


def save(record, folder):
    """Write JSON, Markdown and pictures, and say where."""
    folder.mkdir(parents=True, exist_ok=True)
    record.write(folder / f"{record.name}.json")
    pictures = plots.draw(record, folder) if not (why := plots.missing()) else print(why) or []
    (folder / f"{record.name}.md").write_text(page(record, pictures), encoding="utf-8")
    print(f"written: {folder / record.name}.json, .md" + "".join(f", {name}" for name in pictures))


def main(argv=None):
    start = time.monotonic()
    args = parse(argv)
    if not args.cpu and not torch.cuda.is_available():
        sys.exit("no GPU: nothing is timed without one, except what `python -m bench --cpu` compares")
    if args.verify:
        sys.exit(verify.main(args))
    record = Record(machine("cpu" if args.cpu else "cuda"), args.quick)
    try:
        if args.cpu:
            with tritonnet.backend("reference"):
                cpu.compare(record)
        else:
            on_gpu(record, args, start)
    finally:  # also of a run that is interrupted, or that loses its GPU
        print(page(record))
        if folder := args.out or (None if args.cpu else RESULTS):
            save(record, folder)
    sys.exit(1 if record.faults else 0)


if __name__ == "__main__":
    main()
