"""A stub GPU that runs nothing, to measure what a call of the kernels costs on the host without their launches.

Kernels are not compiled. Each variant is identified by the `hash` that Triton computes from source, constants, types
and options, so that it is known which variant a call launched. TRITON_INTERPRET must not be set.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

import tritonnet  # noqa: F401  (tritonnet.kernels needs its parent)
from tritonnet import dispatch, ops, train_step
from tritonnet.kernels import launchers, launching
from tritonnet.lenet import step as lenet_step
from tritonnet.lenet import weights as lenet_weights

from .machine_code.compile import NoDevice


def _nothing(*args):
    pass


class Launcher:
    """A launcher with as much Python around the driver's launch as Triton's own has."""

    def __init__(self, launch):
        self.launch = launch

    def __call__(self, x, y, z, stream, function, *args):
        self.launch(x, y, z, stream, function, *args)


def _not_compiled(src, target=None, options=None, **kwargs):
    kernel = CompiledKernel.__new__(CompiledKernel)
    kernel.src, kernel.name = src, src.fn.__name__
    kernel.hash = f"{src.hash()} {target} {sorted(options.items(), key=str)}"
    kernel.metadata = SimpleNamespace(num_warps=options["num_warps"], shared=0)
    kernel.module, kernel.function, kernel.packed_metadata = 1, kernel.hash, ()
    kernel._module_pid = None  # there is nothing to unload
    kernel._run = Launcher(driver.active.launch)
    return kernel


@contextlib.contextmanager
def served_by(implementation):
    """Inside, implementation(tensor) chooses kernels or reference instead of dispatch.implementation."""
    with contextlib.ExitStack() as stack:
        for module in (dispatch, lenet_step, lenet_weights, ops, train_step):
            stack.enter_context(mock.patch.object(module, "implementation", implementation))
        yield


def kernels_unless_reference(tensor):
    """For `served_by`: the kernels, as on a GPU, except inside tritonnet.backend("reference")."""
    return dispatch.reference if dispatch._backend == "reference" else launchers


def captured(launch, restore, device):
    """Stands in for lenet_step.capture: runs what precedes a capture, and returns a replay that launches directly."""
    launch()
    restore()
    return launch


@contextlib.contextmanager
def cpu_for_gpu():
    """Inside, tensors on the CPU take the same path as a GPU's, up to the launches, which the caller has to replace.

    A TrainStep copies its batches into its own buffers, as for a CUDA graph, and does not compile in threads.
    """
    with (
        served_by(kernels_unless_reference),
        mock.patch.object(lenet_step, "capture", captured),
        mock.patch.object(lenet_step, "compiled_together", contextlib.nullcontext),
        mock.patch.object(lenet_step.FusedLaunches, "graphs_on", ("cuda", "cpu")),
    ):
        yield


def forget_kernels():
    """Empties the caches of the launchers and the kernels that Triton keeps in memory."""
    launching.forget()
    for kernel in launchers.KERNELS:
        kernel.device_caches.clear()


@contextlib.contextmanager
def gpu_that_does_nothing(arch=90, launch=_nothing):
    """Inside, tensors on the CPU stand in for those of a GPU, and launches do nothing.

    Args:
        arch: NVIDIA's architecture.
        launch: called instead of the driver: launch(x, y, z, stream, hash of the kernel, packed metadata,
            launch metadata, hook before, hook after, *arguments).
    """
    device, before = NoDevice(GPUTarget("cuda", arch, 32)), driver._active
    device.launch = launch
    with served_by(lambda tensor: launchers), mock.patch.object(triton.compiler, "compile", _not_compiled):
        driver._active = device
        try:
            yield device
        finally:
            driver._active = before
            forget_kernels()
