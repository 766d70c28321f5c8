"""Handwritten digits as tensors: the package's 10,000, or the four files of MNIST."""

import gzip
import math
import zipfile
import zlib
from importlib import resources
from io import BufferedIOBase
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F

# Mean and standard deviation of MNIST's training pixels, for pixels from 0 to 1.
MEAN, STD = 0.1307, 0.3081

# Limit in bytes for a file's pixels, which are also held as float32.
_LARGEST = 2**30
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def load_digits(
    folder: str | PathLike[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Load digits for training and for testing.

    Args:
        folder: directory with the four MNIST files in IDX format, gzipped (.gz) or not; None for the digits that come
            with the package.

    Returns:
        (train images, train labels, test images, test labels): images float32 (N, 1, 32, 32), normalised and padded
        from 28 x 28 with background; labels int64 (N,).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, is not in the IDX format or does not hold what its name says, or the numbers
            of images and labels differ.

    Source: http://yann.lecun.com/exdb/mnist/ for the format.
    """
    if folder is None:
        images, labels = _packaged("images").view(-1, 28, 28), _packaged("labels")
        return *as_tensors(images[:8000], labels[:8000]), *as_tensors(images[8000:], labels[8000:])
    train, test = (_read_digits(*(Path(folder) / name for name in names)) for names in _FILES.values())
    return *train, *test


def _read_digits(images_file: Path, labels_file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of two IDX files, as `load_digits` returns them."""
    images, labels = read_idx(images_file), read_idx(labels_file)
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{images_file} should hold images (N, 28, 28), got {tuple(images.shape)}")
    if labels.dim() != 1:
        raise ValueError(f"{labels_file} should hold labels (N,), got {tuple(labels.shape)}")
    if len(images) != len(labels):
        raise ValueError(f"{images_file} has {len(images)} images, but {labels_file.name} has {len(labels)} labels")
    if labels.max() > 9:
        raise ValueError(f"{labels_file} should hold digits, got the label {labels.max()}")
    return as_tensors(images, labels)


def _packaged(name: str) -> torch.Tensor:
    """The bytes of an array in the package's .npz file, read without NumPy, which torch does not require."""
    with resources.files(__name__).joinpath("mnist10k.npz").open("rb") as f, zipfile.ZipFile(f) as arrays:
        content = bytearray(arrays.read(f"{name}.npy"))
    # Format: eight bytes of magic and version, two for the length of the header, the header, the array.
    return torch.frombuffer(content, dtype=torch.uint8, offset=10 + int.from_bytes(content[8:10], "little"))


def read_idx(path: Path) -> torch.Tensor:
    """The uint8 tensor in the IDX file `path`, or in `path`.gz if there is no such file.

    Raises:
        FileNotFoundError: neither file exists.
        ValueError: it cannot be read, is not an IDX file of uint8, is damaged, or is empty.
    """
    zipped = path.with_name(path.name + ".gz")
    file = path if path.exists() else zipped
    if not file.exists():
        raise FileNotFoundError(f"no file {path} or {zipped.name} beside it")
    if not file.is_file():
        raise ValueError(f"{file} is not a file, but a folder or a device")
    try:
        with gzip.open(file) if file == zipped else file.open("rb") as f:
            return _read_idx(f, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f"{file} is not a gzip file, or a damaged one: {e}") from None
    except OSError as e:
        raise ValueError(f"{file} cannot be read: {e.strerror or e}") from None


def _read_idx(f: BufferedIOBase, file: Path) -> torch.Tensor:
    """`read_idx` of an open file. Reads at most what the header declares, as a gzip file may unpack to any size."""
    # Two zeros, 8 for uint8, the number of dimensions; then each size as four bytes, big-endian.
    start = f.read(4)
    if len(start) < 4 or start[:3] != b"\x00\x00\x08":
        raise ValueError(f"{file} is not an IDX file of bytes: it starts with {start.hex(' ') or 'nothing'}")
    if not 1 <= start[3] <= 3:
        raise ValueError(f"{file} should have one to three dimensions, as MNIST's files have, got {start[3]}")
    header = f.read(4 * start[3])
    if len(header) < 4 * start[3]:
        raise ValueError(f"{file} ends before the sizes of its {start[3]} dimensions")
    sizes = [int.from_bytes(header[i : i + 4], "big") for i in range(0, len(header), 4)]
    length = math.prod(sizes)
    if length == 0:
        raise ValueError(f"{file} holds nothing: its sizes are {sizes}")
    if length > _LARGEST:
        raise ValueError(f"{file} should hold at most {_LARGEST >> 30} GiB, got sizes of {sizes}")
    content = f.read(length + 1)
    if len(content) != length:
        got = "more" if len(content) > length else len(content)
        raise ValueError(f"{file} should hold {length} bytes for {sizes}, got {got}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(sizes)


def as_tensors(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images (N, 28, 28) and labels (N,) as `load_digits` returns them."""
    return normalize(images[:, None].float() / 255), labels.long()


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (N, 1, 28, 28), 0 background to 1 ink, padded and normalised for LeNet: (N, 1, 32, 32)."""
    return (F.pad(pixels, (2, 2, 2, 2)) - MEAN) / STD
