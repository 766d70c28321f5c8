"""Checks and times everything against torch, on one GPU.

    python -m bench             # everything, in less than 8 minutes; --quick takes 90 seconds
    python -m bench --passes    # ResNet-50's convolutions and linear, pass by pass, against cuDNN and cuBLAS
    python -m bench --inference # ResNet-50, MobileNetV2 and EfficientNet-B0 in evaluation
    python -m bench --training  # ResNet-50 and MobileNetV2 in training
    python -m bench --data DIR  # and the time to 99 % on MNIST, from the four IDX files in DIR
    python -m bench --cpu       # without a GPU: the cost of a call in Python, and the reference
    python -m bench --verify    # on a GPU: whether it is right and how fast, in stages (see bench/verify.py)

Prints tables and writes them, with JSON and pictures, to bench/results; the JSON is written after every case. Ctrl-C
and SIGTERM end it with a report of what was measured; --resume measures what is missing, if code and machine are the
same. The exit status is 1 if a result of ours is wrong or one of our contestants failed.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import tritonnet

from . import cpu, inference, passes, plots, training, verify
from .accuracy import add_arguments, race
from .case import TIMED
from .keep import ROOT, sources
from .libraries import installed
from .limit import interrupted_by_sigterm
from .measure import Cuda, ceilings
from .progress import progress
from .record import Record, earlier, machine
from .report import page
from .run import (
    COMPILED_OPERATORS,
    COMPILED_QUICKLY,
    FULL,
    OF_INFERENCE,
    OF_PASSES,
    OF_TRAINING,
    QUICK,
    Budget,
    plan,
    run,
)

RESULTS = ROOT / "bench" / "results"
FULL_LEAVES_OUT = (
    "torch.compile, other than for LeNet in bfloat16, at batch 65536 in tf32, and for the operators "
    f"{'; '.join(COMPILED_OPERATORS)} in bfloat16: it takes too long"
)
QUICK_LEAVES_OUT = (
    "--quick: float16, float32, operators in tf32, some of them in bfloat16, and torch.compile but for LeNet in "
    f"bfloat16 at batch {' and '.join(map(str, COMPILED_QUICKLY))} in its default mode"
)
PASSES_LEAVE_OUT = "--passes: torch.compile in tf32, and in its slower modes"
INFERENCE_LEAVES_OUT = "--inference: float32, and torch.compile in its quicker modes"
TRAINING_LEAVES_OUT = "--training: float16, float32, and torch.compile in its slower modes"
ALL_FORMATS = "all"
# Runs of one kind alone: the module with its cases and formats, its seconds, and what it leaves out.
KINDS = {
    "passes": (passes, passes.FORMATS, OF_PASSES, PASSES_LEAVE_OUT),
    "inference": (inference, inference.FORMATS_TIMED, OF_INFERENCE, INFERENCE_LEAVES_OUT),
    "training": (training, training.FORMATS_TIMED, OF_TRAINING, TRAINING_LEAVES_OUT),
}
OF_KIND = {
    "passes": "ResNet-50's convolutions and linear, each pass alone",
    "inference": "whole networks in evaluation",
    "training": "whole networks in training",
}
NOT_OF_VERIFY = "quick", *KINDS, "cpu", "resume", "seconds", "without", "data"


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="LeNet in bfloat16 and tf32, some operators in bfloat16")
    for kind, (_, formats, *_) in KINDS.items():
        parser.add_argument(
            f"--{kind}",
            nargs="?",
            const=ALL_FORMATS,
            choices=(ALL_FORMATS, *formats),
            metavar="FORMAT",
            help=f"only {OF_KIND[kind]}; one of {', '.join(formats)} (default: all)",
        )
    parser.add_argument("--cpu", action="store_true", help="without a GPU: the cost of a call, and the reference")
    parser.add_argument("--verify", action="store_true", help="tests, sanitizers and measurements in stages")
    parser.add_argument("--minutes", type=float, metavar="M", help="with --verify: how long it may take in all")
    parser.add_argument("--resume", action="store_true", help="continue the run whose files are in the folder")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help=f"time for the cases (default: {FULL}, quick {QUICK}, "
        + "".join(f"{kind} {seconds}, " for kind, (*_, seconds, _) in KINDS.items())
        + f"on the CPU {cpu.FULL} or {cpu.QUICK})",
    )
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="leave a contestant out")
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="write tables and JSON only")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the files (default: bench/results, or none)"
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.without and (unknown := set(args.without) - set(installed())):
        parser.error(f"--without {unknown.pop()}: it has to be one of {', '.join(installed())}")
    if args.minutes is not None and not args.minutes > 0:  # nor NaN
        parser.error(f"--minutes has to be more than 0, got {args.minutes:g}")
    if args.minutes is not None and not args.verify:
        parser.error("--minutes goes with --verify; --seconds is for the cases alone")
    for kind in KINDS:
        others = [name for name in ("quick", "cpu", *KINDS) if name != kind and getattr(args, name)]
        if getattr(args, kind) and others:
            parser.error(f"--{kind} has no --{others[0]}")
    if args.verify and (others := [name for name in NOT_OF_VERIFY if getattr(args, name)]):
        parser.error(f"--verify has no --{others[0]}: its stages are fixed")
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out has to be a folder, {args.out} is a file")
    return args


def on_gpu(record, args, start, keep):
    """Fills the record of a run on the current GPU; `start` is its start by time.monotonic."""
    device, libraries = Cuda(), installed()
    torch.backends.cudnn.benchmark = True
    record.without = sorted(set(args.without))
    for name in record.without:
        del libraries[name]
        record.left_out.append(f"{name}: by --without")
    if "FlagGems" not in libraries:
        record.left_out.append("FlagGems: it is not installed")
    if chosen := next((kind for kind in KINDS if getattr(args, kind)), None):
        module, formats, seconds, leaves_out = KINDS[chosen]
        asked_for = getattr(args, chosen)
        cases = module.plan(formats if asked_for == ALL_FORMATS else (asked_for,))
    elif args.quick:
        cases, seconds, leaves_out = plan(quick=True), QUICK, QUICK_LEAVES_OUT
    else:
        cases, seconds, leaves_out = plan(quick=False), FULL, FULL_LEAVES_OUT
    record.left_out.append(leaves_out)
    record.ceilings = record.ceilings or ceilings(TIMED, device)
    keep()
    if args.data and not record.accuracy:
        race(record, args.data, args.target, libraries, device)
    budget = Budget(args.seconds or seconds, start)
    run(record, progress(cases), libraries, device, budget, keep=keep)


def save(record, folder, draw=True):
    """Write JSON, Markdown and pictures, and say where."""
    record.write(folder / f"{record.name}.json")
    pictures = []
    if why := plots.missing():
        print(why)
    elif draw:
        pictures = plots.draw(record, folder)
    (folder / f"{record.name}.md").write_text(page(record, pictures), encoding="utf-8")
    print(f"written: {folder / record.name}.json, .md" + "".join(f", {name}" for name in pictures))


def main(argv=None):
    start = time.monotonic()
    args = parse(argv)
    if not args.cpu and not torch.cuda.is_available():
        sys.exit("no GPU: without one, only `python -m bench --cpu` measures anything")
    folder = args.out or (None if args.cpu else RESULTS)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    with interrupted_by_sigterm():
        if args.verify:
            sys.exit(verify.main(folder, args.minutes, start))
        here = machine("cpu" if args.cpu else "cuda")
        kind = {name: bool(getattr(args, name)) for name in KINDS}
        record = Record(here, args.quick, **kind)
        if args.resume and folder:
            record = earlier(here, args.quick, folder, **kind)
        record.sources = sources()
        keep = (lambda: record.write(folder / f"{record.name}.json")) if folder else lambda: None
        try:
            if args.cpu:
                with tritonnet.backend("reference"):
                    cpu.compare(record, args.seconds)
            else:
                on_gpu(record, args, start, keep)
        finally:  # also after an interrupt, or when the GPU has failed
            print(page(record))
            if folder:
                save(record, folder, args.pictures)
    sys.exit(1 if record.faults else 0)


if __name__ == "__main__":
    main()
