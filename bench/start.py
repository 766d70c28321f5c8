"""The wait for a first training step and for a first image, with kernels already compiled and without:

    python -m bench.start

Each is timed in a process of its own, from its start: importing, finding the GPU, compiling or loading kernels. "cold"
starts with an empty Triton cache, "warm" with what the cold run left there; torch has no such cache.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .keep import ROOT, put, read_json
from .table import markdown

BATCH = 64
TASKS = "first image", "first step"
CASES = [(task, library) for task in TASKS for library in ("tritonnet", "torch")]


def once(task, library, began, device):
    """Do the task, and print the milliseconds since `began` of time.time(): until the device is ready, and in all."""
    import torch

    import tritonnet

    from .libraries import TutorialLeNet

    torch.zeros(1, device=device)
    there = time.time()
    model = (tritonnet.LeNet() if library == "tritonnet" else TutorialLeNet()).to(device)
    images, labels = torch.randn(BATCH, 1, 32, 32, device=device), torch.randint(10, (BATCH,), device=device)
    if task == "first image":
        with torch.no_grad():
            model.eval()(images[:1]).cpu()
    else:
        loss, optimizer = torch.nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters())
        if library == "tritonnet":
            tritonnet.TrainStep(model, loss, optimizer)(images, labels).item()
        else:
            value = loss(model(images), labels)
            value.backward()
            optimizer.step()
            value.item()
    print((there - began) * 1e3, (time.time() - began) * 1e3)


def timed(task, library, device):
    """Yields (state of the cache, {"there_ms": until torch and the device were ready, "ms": until the end})."""
    with tempfile.TemporaryDirectory() as cache:
        for state in states(library):
            yield state, _timed(task, library, device, cache)


def states(library):
    return ("cold", "warm") if library == "tritonnet" else ("-",)


def _timed(task, library, device, cache):
    command = [sys.executable, "-m", "bench.start", "--device", device, "--once", task, library, str(time.time())]
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    there, end = map(float, done.stdout.split()[-2:])
    return {"there_ms": there, "ms": end}


def table(found):
    """(header, rows) of the times that --keep saves under "start"."""
    header = "", "library", "kernels", "ms until torch and the GPU are ready", "ms until the end"
    rows = []
    for task, library in CASES:
        for state in states(library):
            if times := found.get(f"{task}, {library}, {state}"):
                rows.append((task, library, state, round(times["there_ms"]), round(times["ms"])))
    return header, rows


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="JSON file for each time; times in it are not taken again"
    )
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--without", action="append", default=[], help="TrainStep: do not time our first step")
    parser.add_argument("--once", nargs=3, metavar=("TASK", "LIBRARY", "BEGAN"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.once:
        task, library, began = args.once
        return once(task, library, float(began), args.device)
    found, failed = read_json(args.keep).get("start", {}) if args.keep else {}, []
    for task, library in CASES:
        if "TrainStep" in args.without and (task, library) == ("first step", "tritonnet"):
            continue
        if all(f"{task}, {library}, {state}" in found for state in states(library)):
            continue
        try:
            for state, times in timed(task, library, args.device):
                name = f"{task}, {library}, {state}"
                found[name] = times
                if args.keep:
                    put(args.keep, "start", name, times)
                print(f"{name}: {times['ms']:.0f} ms", flush=True)
        except subprocess.CalledProcessError as e:  # it has printed why, and the others go on
            failed.append(f"{task}, {library}")
            print(f"{failed[-1]}: its process ended with {e.returncode}", flush=True)
    print(markdown(*table(found)))
    return f"failed: {'; '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
