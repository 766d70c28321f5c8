"""Train LeNet on handwritten digits, in one process or data-parallel in several.

python -m tritonnet.train
torchrun --nproc-per-node 2 -m tritonnet.train
"""

import argparse
import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler
from tqdm import tqdm

from .data import load_digits
from .dispatch import backend, backend_name
from .lenet import LeNet
from .nn import functional as F


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tritonnet.train", description="Train LeNet on handwritten digits.")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of the four MNIST files (default: 10,000 digits of the package)",
    )
    parser.add_argument("--epochs", type=_positive, default=10)
    parser.add_argument("--batch-size", type=_positive, default=64, help="of all processes together")
    parser.add_argument("--lr", type=float, default=2e-3, help="largest learning rate of the one-cycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=("auto", "triton", "reference"), default="auto")
    parser.add_argument(
        "--save", type=Path, default=Path("lenet.pt"), metavar="FILE",
        help="where the state_dict goes after every epoch (default: %(default)s)",
    )  # fmt: skip
    return parser.parse_args(argv)


@contextlib.contextmanager
def processes(device):
    """Join the other processes of torchrun, if it started this one: (rank, world size, device of this process)."""
    if not dist.is_torchelastic_launched():
        yield 0, 1, torch.device(device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield dist.get_rank(), dist.get_world_size(), torch.device(device)
        # Rank 0 tests and saves when the others are done already; leaving together, none loses its connections.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def train_epoch(model, optimizer, schedule, images, labels, batches, progress):
    """One pass over the batches of indices; returns the mean loss of this process."""
    model.train()
    total, count = torch.zeros((), device=images.device), 0
    for batch in batches:
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.detach() * len(batch)
        count += len(batch)
        progress.update()
    return total / count


@torch.no_grad()
def accuracy(model, images, labels, batch_size=1000):
    """The share of the images that the model names right."""
    model.eval()
    right = sum((model(x).argmax(1) == y).sum() for x, y in zip(images.split(batch_size), labels.split(batch_size)))
    return right.item() / len(images)


def save(model, path):
    """Write the state_dict beside `path` and move it there, so that a crash never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save(model.state_dict(), unfinished)
    os.replace(unfinished, path)


def train(args, rank, world, device):
    """Train, print, save; returns the test accuracy after the last epoch in the process of rank 0, None in others."""
    torch.manual_seed(args.seed)
    train_x, train_y, test_x, test_y = (t.to(device) for t in load_digits(args.data))
    net = LeNet().to(device)
    model = net if world == 1 else torch.nn.parallel.DistributedDataParallel(net)
    sampler = DistributedSampler(train_x, num_replicas=world, rank=rank, seed=args.seed)
    share = -(-args.batch_size // world)
    steps = -(-len(sampler) // share)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps)
    right = None
    if rank == 0:
        print(f"LeNet on {len(train_x)} digits, {world} x {device.type}, backend: {backend_name(device)}", flush=True)
    for epoch in range(1, args.epochs + 1):
        sampler.set_epoch(epoch)
        batches = torch.tensor(list(sampler), device=device).split(share)
        with tqdm(total=steps, desc=f"epoch {epoch}/{args.epochs}", leave=False, disable=rank != 0) as progress:
            loss = train_epoch(model, optimizer, schedule, train_x, train_y, batches, progress)
        if world > 1:
            dist.all_reduce(loss)
        if rank == 0:
            right = accuracy(net, test_x, test_y)
            print(f"epoch {epoch}: loss {loss / world:.4f}, test accuracy {right:.2%}", flush=True)
            save(net, args.save)
    if rank == 0:
        print(f"saved {args.save}")
    return right


def main(argv=None):
    args = parse(argv)
    with processes(args.device) as (rank, world, device), backend(args.backend):
        return train(args, rank, world, device)


if __name__ == "__main__":
    main()
