"""Train LeNet on handwritten digits:  python -m tritonnet.train"""

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .data import load_digits
from .dispatch import backend, backend_name
from .lenet import LeNet


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
    parser.add_argument("--batch-size", type=_positive, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="largest learning rate of the one-cycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=("auto", "triton", "reference"), default="auto")
    parser.add_argument(
        "--save", type=Path, default=Path("lenet.pt"), metavar="FILE",
        help="where the state_dict goes after every epoch (default: %(default)s)",
    )  # fmt: skip
    return parser.parse_args(argv)


def train_epoch(model, optimizer, schedule, images, labels, batch_size, progress):
    """One pass in random order; returns the mean loss."""
    model.train()
    total = torch.zeros((), device=images.device)
    for batch in torch.randperm(len(images), device=images.device).split(batch_size):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.detach() * len(batch)
        progress.update()
    return total.item() / len(images)


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


def main(argv=None):
    """Train, print, save; returns the test accuracy after the last epoch."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    train_x, train_y, test_x, test_y = (t.to(args.device) for t in load_digits(args.data))
    model = LeNet().to(args.device)
    steps = -(-len(train_x) // args.batch_size)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps)
    with backend(args.backend):
        print(f"LeNet on {len(train_x)} digits, {args.device}, backend: {backend_name(args.device)}")
        for epoch in range(1, args.epochs + 1):
            with tqdm(total=steps, desc=f"epoch {epoch}/{args.epochs}", leave=False) as progress:
                loss = train_epoch(model, optimizer, schedule, train_x, train_y, args.batch_size, progress)
            right = accuracy(model, test_x, test_y)
            print(f"epoch {epoch}: loss {loss:.4f}, test accuracy {right:.2%}", flush=True)
            save(model, args.save)
    print(f"saved {args.save}")
    return right


if __name__ == "__main__":
    main()
