"""Files of tensors: written so that no crash loses the previous one, read so that no file can run code."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from .terminal import UserError


def write(path: Path, content: bytes) -> None:
    """Write beside `path`, down to the disk, and move it there: at every moment `path` is whole, old or new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(unfinished, path)


def save(path: Path, value: Any) -> None:
    """torch.save to `path`, as `write` does it."""
    content = io.BytesIO()
    torch.save(value, content)
    write(path, content.getvalue())


def load(path: Path) -> Any:
    """What torch.save has written to `path`: tensors and plain values only, on the CPU."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; `tritonnet train` writes one")
    content = io.BytesIO(path.read_bytes())
    # torch.save writes zip archives, and their checksums tell a damaged file before its content is believed.
    try:
        with zipfile.ZipFile(content) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, ValueError):
        raise UserError(f"{path} is not a checkpoint: give a file of `tritonnet train`, such as model.pt") from None
    if damaged:
        raise UserError(f"{path} is damaged (in {damaged}): use another copy")
    content.seek(0)
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as e:
        raise UserError(
            f"{path} is not a checkpoint of tensors alone, and other files are not opened: {str(e).splitlines()[0]}"
        ) from None
