"""This machine: versions, devices, and threads of the CPU."""

import contextlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path

import torch

from .. import __version__
from .terminal import UserError, patience

# Images of a step for each thread of the CPU.
IMAGES_A_THREAD = 128


def versions() -> dict[str, str]:
    """Versions of what is installed, and names of the GPUs."""
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
    """The torch.device with that name, if it exists; for None a GPU, or the CPU if there is none."""
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


def threads_for(images: int) -> int:
    """The number of CPU threads for steps of LeNet on `images` images.

    A step has some hundred loops. At the end of each, all threads wait for the last one, even while that has to leave
    its core to another process. Images per second on two cores, by the number of other busy processes:

        images per step  threads                  idle    one    two
        64               1                       6,500  6,200  4,700
        64               2                       8,500  2,300    140
        512              1                       9,400  9,500  5,800
        512              2 (with `wait_asleep`) 12,700  8,300  5,200
    """
    if os.environ.get("OMP_NUM_THREADS", "")[:1].isdigit():
        return torch.get_num_threads()
    return max(1, min(torch.get_num_threads(), images // IMAGES_A_THREAD))


def wait_asleep() -> None:
    """Restart a command of ours with threads that sleep while they wait, which frees their cores.

    OpenMP reads this setting only once, when torch is loaded. Called from another program this does nothing.
    """
    program = Path(sys.argv[0])
    ours = program.name == "tritonnet" or program.parent == Path(__file__).parents[1]
    if ours and os.name == "posix" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Use `number` CPU threads in a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compiling(device: torch.device, shown: bool = True) -> AbstractContextManager[Callable[[], object]]:
    """`patience` for the first launches on a GPU, which compile the kernels unless Triton has cached them."""
    if device.type == "cpu" or not shown:
        return contextlib.nullcontext(lambda: None)
    return patience("compiling the kernels for this GPU, which Triton caches: on 16 cores a first step took 20 s")
