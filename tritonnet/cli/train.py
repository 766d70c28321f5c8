"""tritonnet train: train LeNet on handwritten digits, in one process or, under torchrun, data-parallel in several."""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from .. import TrainStep, backend
from ..data import load_digits
from ..dispatch import backend_name, float32_products
from ..nn import functional as F
from . import checkpoint
from .machine import compiling, find_device, threads, threads_for, versions, wait_asleep
from .resume import PRECISIONS, Run, read_checkpoint
from .terminal import HAS_RICH, Parser, UserError, progress, say, table, whole

# Options that a resumed run takes from its checkpoint; the others may change.
FIXED = {"epochs": 10, "batch_size": 64, "optimizer": "adam", "lr": None, "precision": "float32", "seed": 0}
# Largest learning rate of the one-cycle schedule, by optimizer.
RATES = {"adam": 2e-3, "adamw": 2e-3, "sgd": 5e-2}


def rate(text: str) -> float:
    """The type of --lr."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return number


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "tritonnet train",
        description="Train LeNet on handwritten digits. Ctrl-C saves a checkpoint, and --resume continues from there "
        "with the same result as without the pause.",
    )
    rates = ", ".join(f"{value} for {name}" for name, value in RATES.items())
    add = parser.add_argument
    add(
        "--data",
        metavar="DIR",
        type=Path,
        help="folder with the four MNIST files (default: the package's 10,000 digits)",
    )
    add("--epochs", type=whole(1), help=f"passes over the digits (default: {FIXED['epochs']})")
    add("--batch-size", type=whole(1), help=f"images per step of all processes (default: {FIXED['batch_size']})")
    add("--lr", type=rate, help=f"largest learning rate of the one-cycle schedule (default: {rates})")
    add("--optimizer", choices=RATES, help=f"update rule (default: {FIXED['optimizer']})")
    add("--device", help="cpu, cuda, cuda:1 or xpu (default: the GPU, if there is one)")
    add(
        "--backend",
        choices=("auto", "triton", "reference"),
        default="auto",
        help="implementation of the layers (default: auto)",
    )
    add("--precision", choices=PRECISIONS, help="format of products; tf32 and bfloat16 are for GPUs (default: float32)")
    add("--seed", type=whole(0), help=f"seed of the weights and of the order of digits (default: {FIXED['seed']})")
    add("--threads", type=whole(1), help="CPU threads (default: by the batch size, 1 below 256 images)")
    add("--resume", metavar="RUN", type=Path, help="folder (or checkpoint.pt) of a run to continue")
    add("--out", metavar="DIR", type=Path, help="folder for all results (default: lenet, or that of --resume)")
    return parser.parse_args(argv)


def settle(args: argparse.Namespace, world: int, device: torch.device) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(the options of this run, the checkpoint that it continues, or None for a new run)."""
    saved = None
    if args.resume is not None:
        path = args.resume / "checkpoint.pt" if args.resume.is_dir() else args.resume
        saved = read_checkpoint(path)
        args.out = args.out or path.parent
        if saved["options"]["processes"] != world:
            raise UserError(f"{path} is of a run in {saved['options']['processes']} processes; resume it in as many")
        for name in FIXED:
            given, kept = getattr(args, name), saved["options"][name]
            if given not in (None, kept):
                option = "--" + name.replace("_", "-")
                raise UserError(f"{option} {given}: the run in {path} has {option} {kept}; leave {option} out")
        args.data = args.data or (Path(saved["options"]["data"]) if saved["options"]["data"] else None)
    args.out = args.out or Path("lenet")
    there = args.out / "checkpoint.pt"
    if args.resume is None and there.exists():
        try:
            unfinished = read_checkpoint(there)
        except UserError as e:
            raise UserError(f"{e}; a new run needs another --out, or that file deleted") from None
        if unfinished["epoch"] < unfinished["options"]["epochs"]:
            raise UserError(
                f"{there} is of a run that is not finished: go on with --resume {args.out}, choose another --out, "
                "or delete it"
            )
    if saved:
        options = saved["options"]
    else:
        options = {
            name: default if getattr(args, name) is None else getattr(args, name) for name, default in FIXED.items()
        }
        options["lr"] = options["lr"] or RATES[options["optimizer"]]
        options["processes"] = world
    options["data"] = str(args.data) if args.data else None
    options["threads"] = settle_threads(args.threads, options, world)
    if options["precision"] == "tf32" and device.type == "cpu":
        raise UserError("--precision tf32 is a format of GPUs: leave it out on the CPU")
    try:
        backend_name(device)
    except RuntimeError as e:
        raise UserError(f"--backend {args.backend}: {e}") from None
    return options, saved


def settle_threads(given: int | None, options: dict[str, Any], world: int) -> int:
    """The threads of each process. A resumed run keeps its number, as sums in another order have other bits."""
    cores = os.cpu_count() or 1
    if given is not None and given > cores:
        raise UserError(f"--threads {given}: this machine has {cores} cores")
    if given is None and "threads" in options:
        # A run of an earlier version used torch's number of threads.
        given = options["threads"] or torch.get_num_threads()
    return min(given or threads_for(math.ceil(options["batch_size"] / world)), cores)


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[tuple[int, int, torch.device]]:
    """Join the other processes of torchrun, if it started this one; yields (rank, world size, device)."""
    if not dist.is_torchelastic_launched():
        yield 0, 1, device
        return
    if device.type != "cpu":
        device = find_device(f"{device.type}:{os.environ['LOCAL_RANK']}")
        torch.accelerator.set_device_index(device.index)
    dist.init_process_group({"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}[device.type])
    try:
        yield dist.get_rank(), dist.get_world_size(), device
        # Rank 0 saves and draws while the others are already done; all leave together to keep its connections.
        dist.barrier()
    finally:
        dist.destroy_process_group()


class Interruption:
    """Turns Ctrl-C, or SIGTERM from a cluster, into a request to stop after the current batch."""

    def __init__(self) -> None:
        self.requested = self.granted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True

    def check(self, step: int, world: int, device: torch.device) -> bool:
        """Whether to stop after this step; all processes stop after the same one."""
        if world == 1:
            self.granted = self.requested
        elif step % 10 == 0:  # asking the others takes a message and, on a GPU, a wait
            flag = torch.tensor(float(self.requested), device=device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.granted = flag.item() > 0
        return self.granted


@contextlib.contextmanager
def finite_losses(run: Run, title: str) -> Iterator[None]:
    """Adds advice to the error of a loss that is not finite."""
    try:
        yield
    except FloatingPointError as e:
        raise UserError(f"{e}, in {title}: try an --lr below {run.options['lr']}") from None


def train_epoch(
    run: Run, step: TrainStep, images: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor, stop: Interruption,
    shown: bool,
) -> None:  # fmt: skip
    """Train on the rest of an epoch, or until `stop` is requested."""
    world = run.options["processes"]
    run.net.train()
    batches = indices.split(run.share)
    first = len(run.losses) - run.epoch * run.steps
    losses = torch.zeros(len(batches) - first, device=run.device)
    start, done = time.perf_counter(), 0
    title = f"epoch {run.epoch + 1}/{run.options['epochs']}"
    with (
        compiling(run.device, shown) as there,
        progress(title, len(batches), first, shown) as update,
        finite_losses(run, title),
    ):
        for batch in batches[first:]:
            losses[done] = step(images[batch], labels[batch])
            there()
            run.schedule.step()
            update(len(batch) * world, losses[done].item)
            done += 1
            if stop.check(len(run.losses) + done, world, run.device):
                break
        step.check()
    if world > 1:
        dist.all_reduce(losses)
    run.losses += (losses[:done] / world).tolist()  # waits for the GPU
    run.seconds += time.perf_counter() - start


@torch.no_grad()
def logits(net: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The net's logits for all images, (N, classes)."""
    net.eval()
    return torch.cat([net(part) for part in images.split(1000)])


def finish_epoch(run: Run, answers: torch.Tensor, labels: torch.Tensor) -> str:
    """Add the finished epoch to the history; returns a line on it to print."""
    right = (answers.argmax(1) == labels).float().mean().item()
    train_loss = sum(run.losses[-run.steps :]) / run.steps
    speed = run.images / run.seconds
    run.epoch += 1
    run.history.append(
        {
            "epoch": run.epoch, "train_loss": train_loss, "test_loss": F.cross_entropy(answers, labels).item(),
            "test_accuracy": right, "seconds": run.seconds, "images_per_second": speed,
        }
    )  # fmt: skip
    run.seconds = 0.0
    return f"epoch {run.epoch}: loss {train_loss:.4f}, {speed:,.0f} images/s, test accuracy {right:.2%}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def write_results(run: Run, out: Path, answers: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Write metrics.json and the pictures, and print the final table; all tensors are on the CPU."""
    classes = answers.shape[1]
    confusion = torch.bincount(labels * classes + answers.argmax(1), minlength=classes**2).view(classes, classes)
    metrics = {
        "options": run.options, "environment": versions(), "device": str(run.device),
        "backend": backend_name(run.device), "test_accuracy": run.history[-1]["test_accuracy"],
        "confusion": confusion.tolist(), "epochs": run.history, "losses": run.losses,
    }  # fmt: skip
    checkpoint.write(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    pictures: list[str] = []
    if importlib.util.find_spec("matplotlib"):
        from .pictures import draw

        pictures = draw(out, metrics, images, labels, answers, run.net.conv1.weight.detach().cpu())
    wrong = int((answers.argmax(1) != labels).sum())
    seconds = sum(epoch["seconds"] for epoch in run.history)
    where = f"{run.options['processes']} x {run.device.type}"
    if run.device.type == "cpu":
        where += f" with {counted(run.options['threads'], 'thread')}"
    rows = [
        ("test accuracy", f"{metrics['test_accuracy']:.2%}: {wrong} of {len(labels):,} digits are read wrong"),
        ("trained", f"{run.images:,} digits, {counted(run.options['epochs'], 'epoch')}, in {seconds:.1f} s"),
        ("speed", f"{run.images * len(run.history) / seconds:,.0f} images/s"),
        ("on", f"{where}, {run.options['precision']}, {backend_name(run.device)}"),
        ("weights", str(out / "model.pt")),
        ("metrics", str(out / "metrics.json")),
        *(("pictures" if i == 0 else "", str(out / name)) for i, name in enumerate(pictures)),
    ]
    table("LeNet", ("", ""), rows)
    if not (pictures and HAS_RICH):
        say("for the pictures and a progress bar: pip install 'tritonnet[cli]'")


def prepare_folder(out: Path) -> None:
    """Make the folder, and raise UserError before the training if it cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out} cannot be made a folder ({e.strerror}): choose another") from None
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out} cannot be written to: choose another")


def read_data(folder: Path | None) -> tuple[torch.Tensor, ...]:
    try:
        return load_digits(folder)
    except (FileNotFoundError, ValueError) as e:
        raise UserError(f"{e}; --data takes the folder of the four MNIST files") from None


def train(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> int:
    """Train, print and save; returns the exit code."""
    options, saved = settle(args, world, device)
    if device.type == "cpu" and world == 1 and options["threads"] > 1 and args.threads is None:
        wait_asleep()
    prepare_folder(args.out)
    data = read_data(args.data)
    train_x, train_y, test_x, test_y = (t.to(device) for t in data)
    run = Run(options, len(train_x), device)
    if saved:
        run.load(saved)
    model = run.net if world == 1 else torch.nn.parallel.DistributedDataParallel(run.net)
    precision = PRECISIONS[options["precision"]]
    step = TrainStep(model, torch.nn.CrossEntropyLoss(), run.optimizer, precision)
    sampler = DistributedSampler(range(len(train_x)), world, rank, seed=options["seed"])  # type: ignore[var-annotated, arg-type]
    tell = say if rank == 0 else lambda *line, error=False: None
    tell(f"LeNet on {len(train_x)} digits, {world} x {device.type}, backend: {backend_name(device)}")
    if world == 1:
        tell(f"a step goes by {step.path}, because {step.reason}")
    products = float32_products("tf32" if precision == "tf32" else "ieee")
    with Interruption() as stop, threads(options["threads"]), products:
        while run.epoch < options["epochs"] and not stop.granted:
            sampler.set_epoch(run.epoch + 1)
            indices = torch.tensor(list(sampler), device=device)
            train_epoch(run, step, train_x, train_y, indices, stop, shown=rank == 0)
            if len(run.losses) == (run.epoch + 1) * run.steps:
                with compiling(device, rank == 0):
                    answers = logits(run.net, test_x)
                tell(finish_epoch(run, answers, test_y))
            if rank == 0:
                checkpoint.save(args.out / "checkpoint.pt", run.state())
        answers = logits(run.net, test_x)
    if run.epoch < options["epochs"]:
        done = len(run.losses) - run.epoch * run.steps
        tell(f"stopped in epoch {run.epoch + 1} after {done} of {run.steps} batches; to go on:", error=True)
        tell(f"tritonnet train --resume {args.out}", error=True)
        return 130
    if rank == 0:
        checkpoint.save(args.out / "model.pt", {name: t.cpu().clone() for name, t in run.net.state_dict().items()})
        write_results(run, args.out, answers.cpu(), data[2], data[3])
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    device = find_device(args.device)
    try:
        with processes(device) as (rank, world, device), backend(args.backend):
            return train(args, rank, world, device)
    except torch.OutOfMemoryError:
        raise UserError(f"the memory of {device} is full: try a smaller --batch-size") from None
