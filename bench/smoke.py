"""A first check of TrainStep on a GPU: CUDA graphs and plain launches agree to the bit, and so do two runs.

    python -m bench.smoke

Small batches come first, then large ones, each in every precision, with images on the GPU and from a DataLoader that
pins memory in a thread while the step captures. Prints a line a case; the exit status is 1 if one is wrong. With --keep
FILE every case is saved in that file as it ends, and cases that agree there are skipped. A GPU that fails in a case is
lost for the whole process: a new process then goes on with the remaining cases.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch

import tritonnet
from tritonnet.lenet import step as lenet_step

from .keep import put, read_json
from .run import in_a_line

PRECISIONS = "bfloat16", "tf32", "ieee"
# Batch, steps, and how many images a DataLoader hands out; 0 for images on the GPU.
SIZES = (64, 20, 0), (1000, 20, 0), (333, 4, 1000), (8000, 10, 0), (65536, 4, 0)
CASES = [(precision, *size) for size in SIZES for precision in PRECISIONS]
AGREES, BEGUN = "agrees", "begun and not ended"


def batches(batch, steps, loaded, device):
    """Random images and labels, the same at every call."""
    seed = torch.Generator().manual_seed(0)
    count = loaded or batch
    images, labels = torch.randn(count, 1, 32, 32, generator=seed), torch.randint(10, (count,), generator=seed)
    if not loaded:
        return [(images.to(device), labels.to(device))] * steps
    data = torch.utils.data.TensorDataset(images, labels)
    pinned = torch.device(device).type == "cuda"
    return torch.utils.data.DataLoader(data, batch, pin_memory=pinned, num_workers=2)


def train(precision, batches, device):
    """(every loss, all parameters, what the step has reported) of a LeNet that was trained on the batches."""
    torch.manual_seed(0)
    net, said = tritonnet.LeNet().to(device), []
    optimizer = torch.optim.Adam(net.parameters())
    step = tritonnet.TrainStep(net, torch.nn.CrossEntropyLoss(), optimizer, precision, report=said.append)
    losses = torch.stack([step(images, labels) for images, labels in batches])
    step.check()
    return losses.cpu(), torch.cat([p.detach().flatten() for p in net.parameters()]).cpu(), said


def verdict(precision, batch, steps, loaded, device):
    """AGREES, or what is wrong, of runs with graphs, without, and with graphs once more."""
    given, runs = batches(batch, steps, loaded, device), []
    for graphs_on in ((torch.device(device).type,), (), (torch.device(device).type,)):
        with mock.patch.object(lenet_step.FusedLaunches, "graphs_on", graphs_on):
            runs.append(train(precision, given, device))
    (losses, parameters, said), *others = runs
    if "fused launches" not in said[0] or len(said) > 1:
        return "; ".join(said)
    if not losses.isfinite().all() or not parameters.isfinite().all():
        return "a loss or a parameter is not finite"
    for what, run in zip(("without graphs", "once more"), others):
        for name, one, other in zip(("losses", "parameters"), (losses, parameters), run):
            if differ := (one != other).sum().item():
                return f"{what}, {differ} of {one.numel()} {name} differ, by up to {(one - other).abs().max():.2g}"
    return AGREES


def name_of(precision, batch, steps, loaded):
    return f"{precision}, batch {batch}" + ", from a DataLoader" * bool(loaded)


def lost(device):
    """Whether the device has failed for this process."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.smoke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, metavar="FILE", help="JSON file for the outcome of each case")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU: there are no CUDA graphs to compare")
    known = read_json(args.keep).get("smoke", {}) if args.keep else {}
    agree = 0
    # Cases that failed before come last, as they may end this process.
    order = sorted(CASES, key=lambda case: known.get(name_of(*case), AGREES) != AGREES)
    for place, (precision, batch, steps, loaded) in enumerate(order):
        name = name_of(precision, batch, steps, loaded)
        outcome = known.get(name)
        if outcome != AGREES:
            start = time.monotonic()
            if args.keep:
                put(args.keep, "smoke", name, BEGUN)  # which stays if the case hangs
            try:
                outcome = verdict(precision, batch, steps, loaded, args.device)
            except Exception as e:  # any error is the outcome, and the other cases go on
                outcome = in_a_line(e)
            if args.keep:
                put(args.keep, "smoke", name, outcome)
            print(f"{name}: {outcome} ({time.monotonic() - start:.1f} s)", flush=True)
            if lost(args.device):
                if args.keep and any(name_of(*case) not in known for case in order[place + 1 :]):
                    sys.exit(subprocess.run(sys.orig_argv).returncode or 1)
                sys.exit("the GPU is lost")
        agree += outcome == AGREES
    print(f"{agree} of {len(CASES)} cases agree to the bit")
    sys.exit(0 if agree == len(CASES) else 1)


if __name__ == "__main__":
    main()
