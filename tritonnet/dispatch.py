"""Chooses the implementation of a call: Triton kernels, compiled or interpreted, or the reference in plain torch."""

import collections
import contextlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import torch

from . import reference

# A build of torch for the CPU brings no Triton, and the package works without it.
if importlib.util.find_spec("triton"):
    from triton import knobs

    from .kernels import launchers
    from .kernels.launching import compiling
else:
    launchers = None

_BACKENDS = ("auto", "triton", "reference")
# One value for the process, like torch's backend flags: autograd runs a GPU's backward in its own threads, which would
# not see a value local to the caller's thread.
_backend = "auto"


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation inside a `with` block, for the whole process and for compiled code too.

    Args:
        name: "auto" for the Triton kernels on a GPU, and on the CPU if Triton's interpreter is on (TRITON_INTERPRET=1
            set before triton is imported), and the reference elsewhere; "triton" for the kernels, or an error where
            they cannot run; "reference" for plain torch.

    Raises:
        ValueError: name is not one of these.
        RuntimeError: from a call inside the block, if "triton" cannot serve its tensors.
    """
    global _backend
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of {_BACKENDS}, got {name!r}")
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def implementation(tensor: torch.Tensor) -> ModuleType:
    """The module whose functions compute an operator on this tensor: the kernels' launchers or the reference."""
    if _backend == "reference":
        return reference
    # ROCm's devices are of type cuda, too.
    device = tensor.device.type
    if launchers is not None and (device in ("cuda", "xpu") or (device == "cpu" and knobs.runtime.interpret)):
        return launchers
    if _backend == "triton":
        raise RuntimeError(
            f'backend("triton") cannot serve a tensor on {tensor.device}: it needs the triton package and a GPU, '
            "or TRITON_INTERPRET=1 set before triton is imported"
        )
    return reference


_ALREADY = contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Makes `device` current in a `with` block, as Triton launches on the current device, not on the tensors'."""
    if device.type == "cpu" or device.index in (None, torch.accelerator.current_device_index()):
        return _ALREADY
    return torch.accelerator.device_index(device.index)


def backend_name(device: torch.device) -> str:
    """The implementation that serves tensors on this device now, in words."""
    if implementation(torch.empty(0, device=device)) is reference:
        return "reference (plain torch)"
    return "Triton kernels" if device.type != "cpu" else "Triton kernels (interpreter)"


def backend_reason(device: torch.device) -> str:
    """Why that implementation serves them, in words."""
    if _backend != "auto":
        return f'tritonnet.backend("{_backend}")'
    if launchers is None:
        return "the triton package is not installed"
    if device.type in ("cuda", "xpu"):
        return "a GPU, and the triton package"
    if device.type == "cpu" and knobs.runtime.interpret:
        return "TRITON_INTERPRET=1"
    return "not a GPU, and TRITON_INTERPRET=1 was not set"


@contextlib.contextmanager
def count_launches() -> Iterator[collections.Counter[str]]:
    """Count the kernel launches inside a `with` block.

    Launches that a CUDA graph replays are not counted, only those before and during its capture. A TrainStep on a GPU
    captures in its first call for a size of batch, and replays in later calls.

    Yields:
        collections.Counter: launches so far by kernel name, such as "conv2d_forward_kernel".
    """
    launches: collections.Counter[str] = collections.Counter()
    hooks = []
    for kernel in launchers.KERNELS if launchers else ():
        name = kernel.fn.__name__

        def hook(*args, name=name, **kwargs):
            if compiling.get() is None:
                launches[name] += 1

        kernel.add_pre_run_hook(hook)
        hooks.append((kernel, hook))
    try:
        yield launches
    finally:
        for kernel, hook in hooks:
            kernel.pre_run_hooks.remove(hook)


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Set torch's flags in a `with` block so that float32 products are in "ieee" or "tf32"; the kernels follow them."""
    # torch's annotations lack backends.cudnn.conv.
    owners = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    previous = [owner.fp32_precision for owner in owners]
    for owner in owners:
        owner.fp32_precision = precision
    try:
        yield
    finally:
        for owner, value in zip(owners, previous):
            owner.fp32_precision = value
