"""What this machine has: versions, devices, and the precision of its float32 products."""

import importlib.util
import platform
from importlib.metadata import version

import torch

from .. import __version__
from .terminal import UserError


def versions() -> dict[str, str]:
    """What is installed, by name."""
    found = {
        "python": platform.python_version(), "platform": platform.platform(), "tritonnet": __version__,
        "torch": torch.__version__,
    }  # fmt: skip
    found["triton"] = version("triton") if importlib.util.find_spec("triton") else "not installed"
    for kind in ("cuda", "xpu"):
        for index in range(getattr(torch, kind).device_count()):
            found[f"{kind}:{index}"] = getattr(torch, kind).get_device_name(index)
    if torch.version.cuda or torch.version.hip:
        found["built for"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return found


def find_device(name: str | None) -> torch.device:
    """The torch.device of that name, if it is there; of None, a GPU or else the CPU."""
    if name is None:
        name = next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device must be cpu, cuda, cuda:N or xpu, got {name!r}") from None
    if device.type not in ("cpu", "cuda", "xpu"):
        raise UserError(f"--device must be cpu, cuda, cuda:N or xpu, got {name!r}")
    there = getattr(torch, device.type).device_count()
    if (device.index or 0) >= there:
        raise UserError(f"--device {name}: torch {torch.__version__} sees {there} of that kind; try --device cpu")
    return device
