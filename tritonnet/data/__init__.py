"""Handwritten digits as tensors: 10,000 that come with the package, or the four files of MNIST."""

import gzip
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# Mean and standard deviation of MNIST's training pixels, for pixels from 0 to 1.
MEAN, STD = 0.1307, 0.3081

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def load_digits(folder=None):
    """Digits to train and to test on.

    Args:
        folder: directory with the four MNIST files in IDX format, gzipped (.gz) or not; None for the digits that come
            with the package.

    Returns:
        (train images, train labels, test images, test labels): images float32 (N, 1, 32, 32), normalised and padded
        from 28 x 28 with background; labels int64 (N,).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not in the IDX format, or images and labels do not fit each other.

    Source: http://yann.lecun.com/exdb/mnist/ for the format.
    """
    if folder is None:
        with resources.files(__package__).joinpath("mnist10k.npz").open("rb") as f, np.load(f) as arrays:
            images, labels = arrays["images"], arrays["labels"]
        parts = (images[:8000], labels[:8000], images[8000:], labels[8000:])
    else:
        parts = [read_idx(Path(folder) / name) for names in _FILES.values() for name in names]
    train, test = _as_tensors(*parts[:2]), _as_tensors(*parts[2:])
    return *train, *test


def read_idx(path):
    """The uint8 array in the IDX file `path`, or in `path`.gz if there is no such file."""
    zipped = path.with_name(path.name + ".gz")
    if path.exists():
        content = path.read_bytes()
    elif zipped.exists():
        content = gzip.decompress(zipped.read_bytes())
    else:
        raise FileNotFoundError(f"no file {path} or {zipped.name} beside it")
    # Two zeros, 8 for uint8, the number of dimensions; then each size as four bytes, the highest first.
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of bytes: it starts with {content[:4].hex(' ')}")
    start = 4 + 4 * content[3]
    sizes = np.frombuffer(content[4:start], ">u4").astype(int)
    if len(content) - start != sizes.prod():
        raise ValueError(f"{path} should hold {sizes.prod()} bytes for {sizes.tolist()}, got {len(content) - start}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)


def _as_tensors(images, labels):
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(f"images must be (N, 28, 28) and labels (N,), got {images.shape} and {labels.shape}")
    pixels = torch.tensor(images, dtype=torch.float32)[:, None] / 255
    return (F.pad(pixels, (2, 2, 2, 2)) - MEAN) / STD, torch.tensor(labels, dtype=torch.int64)
