"""tritonnet predict: read the digits in image files."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import LeNet
from . import checkpoint
from .images import SUFFIXES, read_digit
from .machine import compiling, find_device, threads, threads_for
from .terminal import Parser, UserError, say, table

T = TypeVar("T")
# The keys under which files hold a state_dict beside other things.
HOLDERS = "model", "state_dict"
# Prefixes that DataParallel, DistributedDataParallel and torch.compile add to the names of the net that they wrap.
WRAPPERS = re.compile(r"(module\.|_orig_mod\.)*")


def load_net(path: Path) -> LeNet:
    """A LeNet with the weights in `path`: a state_dict, or a checkpoint of `tritonnet train`."""
    net = LeNet()
    expected, found = net.state_dict(), without_wrappers(state_dict_in(checkpoint.load(path)))
    classes = other_classes(found, expected)
    if classes is not None:
        raise UserError(
            f"{path} is of a net that has {classes} classes, not {len(net.fc3.bias)}: `tritonnet train` makes one that "
            "reads digits"
        )
    try:
        net.load_state_dict(checkpoint.fitted(found, expected, "state_dict", cast=True))
    except checkpoint.Unfit as e:
        raise UserError(f"{path} holds no weights of this LeNet ({e}): `tritonnet train` makes such a file") from None
    return net


def state_dict_in(value: Any) -> dict[Any, Any]:
    """The state_dict in a file's content: the content itself, or its entry under one of the usual keys."""
    found = checkpoint.entries(value)
    return next((checkpoint.entries(found[name]) for name in HOLDERS if isinstance(found.get(name), dict)), found)


def without_wrappers(found: dict[Any, Any]) -> dict[Any, Any]:
    """A state_dict with the wrappers' prefix removed from its names, if all names have the same prefix."""
    if not all(isinstance(name, str) for name in found):
        return found
    wrappers = WRAPPERS.match(next(iter(found), ""))[0]  # type: ignore[index]
    if not all(name.startswith(wrappers) for name in found):
        return found
    return {name.removeprefix(wrappers): value for name, value in found.items()}


def other_classes(found: dict[Any, Any], expected: dict[str, torch.Tensor]) -> int | None:
    """The number of classes of a state_dict's net, if that is its only difference from the expected one."""
    shapes = {name: checkpoint.shape_of(value) for name, value in found.items()}
    classes = (shapes.get("fc3.bias") or (None,))[0]
    like = {name: (classes, *t.shape[1:]) if name.startswith("fc3.") else t.shape for name, t in expected.items()}
    return None if shapes != like or classes == len(expected["fc3.bias"]) else classes


def image_files(path: Path) -> list[Path]:
    """The image itself, or the images of a folder, sorted by name."""
    if not path.exists():
        raise UserError(f"there is no {path}: give an image file or a folder of them")
    if not path.is_dir():
        return [path]
    # Opening a named pipe could wait for ever for a writer.
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.is_fifo())
    if not files:
        raise UserError(f"{path} has no images in it ({', '.join(sorted(SUFFIXES))})")
    return files


@torch.no_grad()
def read_all(net: LeNet, paths: Iterable[Path], device: torch.device) -> tuple[list[dict[str, Any]], list[str]]:
    """(the result for each image of the files and folders, a message for each that could not be read)."""
    results: list[dict[str, Any]] = []
    unread: list[str] = []

    def attempt(read: Callable[[Path], T], path: Path) -> T | None:
        """read(path), or None if that fails; the reason is added to `unread`."""
        try:
            return read(path)
        except UserError as e:
            unread.append(str(e))
        except OSError as e:
            unread.append(f"{path} cannot be looked into ({e.strerror or e})")
        return None

    for path in paths:
        for file in attempt(image_files, path) or ():
            digit = attempt(read_digit, file)
            if digit is None:
                continue
            with compiling(device, shown=not results):
                probabilities = net(digit.to(device)).softmax(1)[0].tolist()
            if not all(map(math.isfinite, probabilities)):
                raise UserError(f"the weights give no finite numbers for {file}: use those of another training")
            read = max(range(len(probabilities)), key=probabilities.__getitem__)
            results.append({"file": str(file), "digit": read, "probabilities": probabilities})
    return results, unread


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        "tritonnet predict",
        description="Read the digit in each image: any size, grey or colour, dark on light or light on dark.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument(
        "--weights", type=Path, default=Path("lenet/model.pt"), metavar="FILE",
        help="model.pt or checkpoint.pt of `tritonnet train` (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or xpu (default: the GPU, if there is one)")
    parser.add_argument("--json", action="store_true", help="print a JSON list of file, digit and probabilities")
    args = parser.parse_args(argv)
    device = find_device(args.device)
    net = load_net(args.weights).to(device).eval()
    with threads(threads_for(1)):
        results, unread = read_all(net, args.images, device)
    if args.json:
        print(json.dumps(results, indent=1), flush=True)
    elif results:
        rows = [[str(r["file"]), str(r["digit"]), *(f"{100 * p:.1f}" for p in r["probabilities"])] for r in results]
        table("Digits, and the probability of each in %", ("file", "digit", *"0123456789"), rows)
    for line in unread:
        say(f"tritonnet predict: {line}", error=True)
    return 2 if unread else 0
