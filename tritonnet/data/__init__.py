"""Handwritten digits as tensors: 10,000 that come with the package, or the four files of MNIST."""

import gzip
import math
import zipfile
import zlib
from importlib import resources
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F

# Mean and standard deviation of MNIST's training pixels, for pixels from 0 to 1.
MEAN, STD = 0.1307, 0.3081

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def load_digits(
    folder: str | PathLike[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
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
        images, labels = _packaged("images").view(-1, 28, 28), _packaged("labels")
        parts = [images[:8000], labels[:8000], images[8000:], labels[8000:]]
    else:
        parts = [read_idx(Path(folder) / name) for names in _FILES.values() for name in names]
    return *as_tensors(*parts[:2]), *as_tensors(*parts[2:])


def _packaged(name: str) -> torch.Tensor:
    """The bytes of an array in the package's NumPy file, which is read without NumPy: torch does not require it."""
    with resources.files(__name__).joinpath("mnist10k.npz").open("rb") as f, zipfile.ZipFile(f) as arrays:
        content = bytearray(arrays.read(f"{name}.npy"))
    # Eight bytes of magic and version, two for the length of the header, the header, the array.
    return torch.frombuffer(content, dtype=torch.uint8, offset=10 + int.from_bytes(content[8:10], "little"))


def read_idx(path: Path) -> torch.Tensor:
    """The uint8 tensor in the IDX file `path`, or in `path`.gz if there is no such file."""
    zipped = path.with_name(path.name + ".gz")
    if path.exists():
        content = path.read_bytes()
    elif zipped.exists():
        try:
            content = gzip.decompress(zipped.read_bytes())
        except (OSError, EOFError, zlib.error) as e:
            raise ValueError(f"{zipped} is not a gzip file: {e}") from None
    else:
        raise FileNotFoundError(f"no file {path} or {zipped.name} beside it")
    # Two zeros, 8 for uint8, the number of dimensions; then each size as four bytes, the highest first.
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of bytes: it starts with {content[:4].hex(' ')}")
    start = 4 + 4 * content[3]
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != math.prod(sizes):
        raise ValueError(f"{path} should hold {math.prod(sizes)} bytes for {sizes}, got {len(content) - start}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(sizes)


def as_tensors(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images (N, 28, 28) and labels (N,) as `load_digits` returns them."""
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"images must be (N, 28, 28) and labels (N,), got {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    return normalize(images[:, None].float() / 255), labels.long()


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (N, 1, 28, 28), 0 background to 1 ink, as LeNet takes them: (N, 1, 32, 32), normalised."""
    return (F.pad(pixels, (2, 2, 2, 2)) - MEAN) / STD
