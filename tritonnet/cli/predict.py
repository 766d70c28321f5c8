"""tritonnet predict: the digits in image files."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import LeNet
from . import checkpoint
from .images import SUFFIXES, read_digit
from .machine import find_device
from .terminal import Parser, UserError, say, table


def load_net(path: Path) -> LeNet:
    """A LeNet with the weights in `path`: a state_dict, or a checkpoint of `tritonnet train`."""
    value = checkpoint.load(path)
    if isinstance(value, dict) and isinstance(value.get("model"), dict):
        value = value["model"]
    net = LeNet()
    expected = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    found = {name: tuple(getattr(t, "shape", ())) for name, t in value.items()} if isinstance(value, dict) else {}
    if found != expected:
        name = next((name for name in (*expected, *found) if expected.get(name) != found.get(name)), None)
        raise UserError(f"{path} holds no weights of this LeNet (look at {name}): `tritonnet train` makes such a file")
    net.load_state_dict(value)
    return net


def image_files(path: Path) -> list[Path]:
    """The image itself, or the images of a folder, by name."""
    if not path.exists():
        raise UserError(f"there is no {path}: give an image file or a folder of them")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{path} has no images in it ({', '.join(sorted(SUFFIXES))})")
    return files


@torch.no_grad()
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
    parser.add_argument("--device", help="cpu, cuda, cuda:1, xpu (default: the GPU, if there is one)")
    parser.add_argument("--json", action="store_true", help="print a JSON list of file, digit and probabilities")
    args = parser.parse_args(argv)
    device = find_device(args.device)
    net = load_net(args.weights).to(device).eval()
    results, unread = [], []
    for file in [file for path in args.images for file in image_files(path)]:
        try:
            digit = read_digit(file)
        except UserError as e:
            unread.append(str(e))
            continue
        probabilities = net(digit.to(device)).softmax(1)[0].tolist()
        read = max(range(len(probabilities)), key=probabilities.__getitem__)
        results.append({"file": str(file), "digit": read, "probabilities": probabilities})
    if args.json:
        say(json.dumps(results, indent=1))
    elif results:
        rows = [[str(r["file"]), str(r["digit"]), *(f"{100 * p:.1f}" for p in r["probabilities"])] for r in results]
        table("Digits, and the probability of each in %", ("file", "digit", *"0123456789"), rows)
    for line in unread:
        say(f"tritonnet predict: {line}", sys.stderr)
    return 2 if unread else 0
