"""Files of tensors: written so that a crash keeps the previous file, and read so that no file can run code."""

import io
import os
import reprlib
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from .terminal import UserError

# Bytes, far more than any checkpoint of LeNet has: as many as the losses of 100 million steps.
LARGEST = 2**30
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Unfit(Exception):
    """What is wrong with the content of a file; a UserError adds the file's name."""


def write(path: Path, content: bytes) -> None:
    """Write to a file beside `path`, sync it to disk and rename it: `path` is always complete, old or new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(unfinished, path)


def save(path: Path, value: Any) -> None:
    """torch.save to `path` by `write`."""
    content = io.BytesIO()
    torch.save(value, content)
    write(path, content.getvalue())


def load(path: Path) -> Any:
    """The value that torch.save has written to `path`: only tensors and plain values, on the CPU.

    No code of the file has run, but the value cannot be trusted: it may contain tensors of any kind anywhere, and
    attributes of tensors and dicts may hide their methods. `entries`, `shape_of` and `fitted` handle such values.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; `tritonnet train` writes one")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} is not a checkpoint of LeNet, as it has more than {LARGEST >> 30} GiB: give another")
    content = path.read_bytes()
    check_archive(path, content)
    # The content is in memory, so any exception or warning of torch's means that the content is damaged or foreign.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # torch.load refuses classes and functions too, but takes minutes for its message if a name is very long.
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
            value = None if foreign else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:
        raise UserError(
            f"{path} is not opened, as it is damaged or holds more than tensors and plain values: save the "
            "state_dict() of a net"
        ) from None
    if foreign:
        raise UserError(
            f"{path} is not opened, as it holds {shown(min(foreign))} and not tensors and plain values alone: save the "
            "state_dict() of a net"
        )
    return value


def check_archive(path: Path, content: bytes) -> None:
    """Raises UserError unless the content is a zip archive as torch.save writes it, with correct checksums."""
    # torch would take any other beginning for one of its older formats, which have no checksums.
    if not content.startswith(b"PK\3\4"):
        raise UserError(f"{path} is not a checkpoint: give a file of `tritonnet train`, such as model.pt")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            as_they_are = all(m.compress_type == zipfile.ZIP_STORED and not m.flag_bits & 1 for m in members)
            # Overlapping members could unpack to many times the size of the file.
            of_torch = as_they_are and sum(m.file_size for m in members) <= len(content)
            damaged = archive.testzip() if of_torch else None
    except Exception:  # any exception, as above
        raise UserError(f"{path} is damaged or cut off: use another copy") from None
    if not of_torch:
        raise UserError(f"{path} is compressed or encrypted, which torch.save does not do: give the file that it wrote")
    if damaged:
        raise UserError(f"{path} is damaged (in {shown(damaged)}): use another copy")


def shown(value: Any) -> str:
    """A value of a file as one short line, for a message."""
    return reprlib.repr(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


def entries(value: Any) -> dict[Any, Any]:
    """The entries of a dict of a file; empty for anything else."""
    return dict(dict.items(value)) if isinstance(value, dict) else {}


def fitted(value: Any, like: Any, name: str, cast: bool = False) -> Any:
    """A copy of a value of a file, if it has the structure of `like`: the same keys, shapes and dtypes throughout.

    Args:
        value: from the file.
        like: a tensor, or a dict of tensors or such dicts.
        name: of the value in Unfit's message.
        cast: whether tensors may have another dtype of FLOATS; the copy has that of `like`.

    Returns:
        contiguous, finite tensors on the CPU, in plain dicts.

    Raises:
        Unfit: the structure differs, or a tensor is not finite.
    """
    if isinstance(like, dict):
        found = entries(value)
        for key in (*like, *found):
            if key not in like or key not in found:
                raise Unfit(f"{name} has {'an unknown' if key in found else 'no'} {shown(key)}")
        return {key: fitted(found[key], part, f"{name}[{shown(key)}]", cast) for key, part in like.items()}
    shape = shape_of(value)
    if shape is None:
        raise Unfit(f"{name} is {shown(value)}, not a dense tensor of numbers")
    if shape != like.shape:
        raise Unfit(f"{name} is of shape {reprlib.repr(list(shape))}, not {list(like.shape)}")
    if value.dtype != like.dtype and not (cast and value.dtype in FLOATS):
        raise Unfit(f"{name} is {value.dtype}, not {like.dtype}")
    # Called on the class, as attributes of the tensor may hide its methods.
    copy = torch.Tensor.detach(value).to("cpu", like.dtype, copy=True, memory_format=torch.contiguous_format)
    if not copy.isfinite().all():
        raise Unfit(f"{name} has numbers that are not finite")
    return copy


def shape_of(value: Any) -> torch.Size | None:
    """The shape of a dense, ordinary tensor of a file; None for anything else."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return None
    odd = value.is_meta or value.is_nested or value.is_quantized or value.layout != torch.strided
    return None if odd else value.shape
