"""How long LeNet trains with each library until it classifies 99 % of MNIST's test digits correctly.

    python -m bench.accuracy --data DIR

DIR holds the four IDX files, gzipped or not. Only training is timed, not the accuracy test between epochs.
"""

import argparse
import time
from pathlib import Path

import torch

from tritonnet.data import load_digits

from . import FORMATS
from .lenet import initial, sgd
from .libraries import installed
from .measure import Cuda, precision
from .record import Record, machine
from .report import accuracy_table
from .run import attempt

MOST_EPOCHS = 20
BATCH, LR = 256, 0.05


def add_arguments(parser):
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the four MNIST files")
    parser.add_argument("--target", type=float, default=0.99, help="test accuracy to reach (default: %(default)s)")


@torch.no_grad()
def accuracy(model, images, labels):
    """The share of the images that the model classifies correctly."""
    right = sum((model(x).argmax(1) == y).sum() for x, y in zip(images.split(1000), labels.split(1000)))
    return right.item() / len(images)


def train(library, digits, format, device, target, epochs=MOST_EPOCHS):
    """Train to a test accuracy of `target`, with the same initial weights and order of images for every library.

    Args:
        digits: training and test images and labels, as tritonnet.data.load_digits returns them.
        epochs: after how many to give up.

    Returns:
        {"accuracy": share, "epochs": int, "seconds": of training, "reached": bool}
    """
    dtype = FORMATS[format][0]
    train_x, train_y, test_x, test_y = (t.to(device.torch_device) for t in digits)
    train_x, test_x = train_x.to(dtype), test_x.to(dtype)
    model = initial(device.torch_device, dtype, library.lenet)
    step = library.training_step(model, torch.nn.CrossEntropyLoss(), sgd(model, LR), format)
    order = torch.Generator().manual_seed(0)
    seconds, right, epoch = 0.0, 0.0, 0
    while right < target and epoch < epochs:
        batches = torch.randperm(len(train_x), generator=order).to(device.torch_device).split(BATCH)
        device.synchronize()
        start = time.perf_counter()
        for batch in batches:
            step(train_x[batch], train_y[batch])
        device.synchronize()
        seconds += time.perf_counter() - start
        epoch += 1
        right = accuracy(model, test_x, test_y)
    return {"accuracy": right, "epochs": epoch, "seconds": seconds, "reached": right >= target}


def race(record, folder, target, libraries, device, format="tf32"):
    """Adds to `record` the training time of every library that is not compiled, or the error that ended it."""
    digits = load_digits(folder)
    for name, library in libraries.items():
        if library.compiled:
            continue

        def trained(library=library):
            with precision(format), library.context():
                train(library, digits, format, device, target, epochs=1)  # compiles, and is not timed
                return train(library, digits, format, device, target)

        result, problem = attempt(trained, device)
        if problem:
            record.left_out.append(f"{name}, time to {target:.0%} on MNIST: {problem}")
        else:
            record.accuracy.append({"library": name, "format": format, **result})


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__.split("\n")[0])
    add_arguments(parser)
    args = parser.parse_args(argv)
    if not args.data:
        parser.error("--data is needed: reaching 99 % takes all of MNIST, which is not part of the package")
    if not torch.cuda.is_available():
        parser.error("a GPU is needed")
    device = Cuda()
    record = Record(machine("cuda"))
    race(record, args.data, args.target, installed(), device)
    print(record.title, accuracy_table(record.accuracy), *record.left_out, sep="\n\n")


if __name__ == "__main__":
    main()
