"""tritonnet doctor: show what is installed and which backend runs and why, and compare every layer with torch."""

import importlib.util
import shutil
import time
from collections.abc import Callable, Sequence

import torch

from .. import count_launches, nn
from ..dispatch import backend_name, backend_reason, float32_products
from .machine import find_device, versions
from .terminal import Parser, say, table

# Our layer, the same in torch's layers, and the size of the input.
LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "Conv2d": (lambda: nn.Conv2d(6, 16, 5), lambda: torch.nn.Conv2d(6, 16, 5), (4, 6, 14, 14)),
    "Conv2d, depthwise": (
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
        lambda: torch.nn.Conv2d(8, 8, 3, padding=1, groups=8),
        (2, 8, 14, 14),
    ),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), lambda: torch.nn.MaxPool2d(2), (4, 6, 14, 14)),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), lambda: torch.nn.AvgPool2d(2), (4, 6, 14, 14)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(1), lambda: torch.nn.AdaptiveAvgPool2d(1), (4, 6, 14, 14)),
    "ReLU": (nn.ReLU, torch.nn.ReLU, (4, 6, 14, 14)),
    "SiLU": (nn.SiLU, torch.nn.SiLU, (4, 6, 14, 14)),
    "Linear": (lambda: nn.Linear(400, 120), lambda: torch.nn.Linear(400, 120), (4, 400)),
    "CrossEntropyLoss": (nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss, (8, 10)),
    "Conv2dReLU": (
        lambda: nn.Conv2dReLU(6, 16, 5),
        lambda: torch.nn.Sequential(torch.nn.Conv2d(6, 16, 5), torch.nn.ReLU()),
        (4, 6, 14, 14),
    ),
    "Conv2dReLUMaxPool2d": (
        lambda: nn.Conv2dReLUMaxPool2d(6, 16, 5),
        lambda: torch.nn.Sequential(torch.nn.Conv2d(6, 16, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        (4, 6, 14, 14),
    ),
    "LinearReLU": (
        lambda: nn.LinearReLU(400, 120),
        lambda: torch.nn.Sequential(torch.nn.Linear(400, 120), torch.nn.ReLU()),
        (4, 400),
    ),
    "LinearChain": (
        lambda: nn.LinearChain(400, 120, 10),
        lambda: torch.nn.Sequential(torch.nn.Linear(400, 120), torch.nn.ReLU(), torch.nn.Linear(120, 10)),
        (4, 400),
    ),
}
# Layers whose result is rounded once, and layers that multiply rounded values again.
PLAIN = "Conv2d", "Conv2d, depthwise", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "ReLU", "SiLU", "Linear"
DEEP = ("LinearChain",)
# Time limit for the formats after float32.
SECONDS = 8
FORMATS = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def allowed(format: str) -> float:
    """The relative error, by norms, that one rounding of the result and sums in float32 explain."""
    return torch.finfo(FORMATS[format]).eps + 16 * torch.finfo(torch.float32).eps


def tensor(*size: int) -> torch.Tensor:
    """Random float64 values with 8 bits, which every format holds exactly, tf32 included."""
    return torch.randn(size).bfloat16().double()


def run(layer: torch.nn.Module, x: torch.Tensor, target: torch.Tensor, dy: torch.Tensor | None) -> list[torch.Tensor]:
    """[result, gradients] of a layer or of a loss, as float64 on the CPU."""
    x = x.detach().clone().requires_grad_()
    y = layer(x, target) if isinstance(layer, torch.nn.CrossEntropyLoss) else layer(x)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y) if dy is None else dy.to(y))
    return [t.detach().cpu().double() for t in (y, *grads)]


def error(name: str, format: str, device: torch.device) -> float:
    """The largest relative error, by norms, of a layer's result and gradients against torch's in float64."""
    torch.manual_seed(0)
    build, build_truth, size = LAYERS[name]
    layer, truth = build().to(device, FORMATS[format]), build_truth().double()
    with torch.no_grad():
        for p, q in zip(layer.parameters(), truth.parameters()):
            q.copy_(tensor(*q.shape) / 16)
            p.copy_(q)
    x, target = tensor(*size), torch.randint(10, size[:1])
    y = truth(x, target) if isinstance(truth, torch.nn.CrossEntropyLoss) else truth(x)
    dy = tensor(*y.shape) if y.dim() else None
    actual = run(layer, x.to(device, FORMATS[format]), target.to(device), dy)
    errors = [(a - b).norm() / b.norm() for a, b in zip(actual, run(truth, x, target, dy))]
    return max(e.item() if e == e else float("inf") for e in errors)


def check(name: str, format: str, device: torch.device) -> tuple[str, bool]:
    """(the error of a layer as text, whether it is allowed)."""
    try:
        with float32_products("tf32" if format == "tf32" else "ieee"):
            off = error(name, format, device)
    except Exception as e:  # any exception is the finding
        return f"{type(e).__name__}: {e}".splitlines()[0], False
    well = off <= allowed(format)
    return f"{off:.1e}" + ("" if well else " WRONG"), well


def served(name: str, format: str) -> bool:
    """Whether a layer is compared in a format.

    Float64 is no reference where values are rounded midway: in 16 bits before a relu, pooling or logarithm, in tf32
    before a second product.
    """
    return format == "float32" or name in PLAIN or (format == "tf32" and name not in DEEP)


def check_all(device: torch.device) -> tuple[list[list[str]], list[str], bool]:
    """(the table with its header, what is wrong, whether there was time for every format)."""
    start, wrong, enough = time.perf_counter(), [], True
    formats = [format for format in FORMATS if format != "tf32" or device.type != "cpu"]
    kernels: dict[str, set[str]] = {name: set() for name in LAYERS}
    cells: dict[str, list[str]] = {name: [] for name in LAYERS}
    for format in formats:
        for name in LAYERS:
            if not served(name, format):
                cells[name].append("")
            elif format != "float32" and time.perf_counter() - start > SECONDS:
                cells[name].append("no time")
                enough = False
            else:
                with count_launches() as launches:
                    cell, well = check(name, format, device)
                cells[name].append(cell)
                kernels[name] |= launches.keys()
                if not well:
                    wrong.append(f"{name} in {format} does not compute what torch does: {cell}")
    rows = [[name, f"{len(used)} kernels" if used else "reference", *cells[name]] for name, used in kernels.items()]
    limits = ["allowed", "", *(f"{allowed(format):.1e}" for format in formats)]
    return [["layer", "runs on", *formats], *rows, limits], wrong, enough


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        "tritonnet doctor",
        description="Show what is installed and which backend each layer uses and why, and compare every layer with "
        "torch in float64. The exit code is 1 if anything is wrong.",
    )
    parser.parse_args(argv)
    start = time.perf_counter()
    found = versions()
    for module in ("rich", "matplotlib", "PIL"):
        there = importlib.util.find_spec(module) is not None
        found[module] = "installed" if there else "not installed: pip install 'tritonnet[cli]'"
    table("Installed", ("", ""), list(found.items()))
    device = find_device(None)
    name = backend_name(device)
    (heads, *rows), wrong, enough = check_all(device)
    table(f"Relative error on {device.type} of result and gradients, against float64", heads, rows)
    say(f"{name}, because: {backend_reason(device)}.")
    if not enough:
        say(
            "There was no time for some formats. On a GPU, what has been compiled is kept: run this again for the rest."
        )
    if device.type != "cpu" and name.startswith("reference"):
        wrong.append(f"{found[device.type + ':0']} is there, but triton is not: pip install triton")
    driver = shutil.which("nvidia-smi") or shutil.which("rocm-smi")
    if device.type == "cpu" and driver:
        say(f"{driver} is there, but torch sees no GPU: install a build of torch for it (https://pytorch.org).")
    elif device.type == "cpu":
        say("The kernels are for GPUs; on the CPU, plain torch is faster, and gives the same results.")
    for line in wrong:
        say(f"wrong: {line}", error=True)
    say(f"{'Something is wrong' if wrong else 'All is well'} ({time.perf_counter() - start:.1f} s).")
    return 1 if wrong else 0
