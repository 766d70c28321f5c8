"""How kernels are launched: what a launch needs is worked out once for each kind of arguments, and kept.

For a small batch the host takes longer than the GPU: Triton to find the compiled kernel of forty arguments, and a
launcher to work the arguments out. Both depend only on the tensors' shapes, strides, dtypes and alignment, on a few
values and on the device. So a launcher is written in two parts: a plan, which is a pure function of those, and a
function that allocates the results and passes the tensors on.
"""

import concurrent.futures
import contextlib
import contextvars
import functools
import os

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime._async_compile import FutureKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# The kernels that `launch` has compiled and not launched, in this thread; None where it launches.
compiling = contextvars.ContextVar("compiling", default=None)
# So many kinds of arguments are remembered, of a kernel or of a function: past that it starts again.
MOST_KEPT = 4096
# Triton compiles for this alignment of a pointer where it has it.
ALIGNMENT = 16
ROCM = torch.version.hip is not None

_run = JITFunction.run
_kept = []


def settle(function):
    """Has Triton hash a kernel's source after all that it calls, whatever was launched before.

    Up to 3.7.1 at least, Triton takes into a hash the constants that a called function uses only if that has been
    hashed already. What a kernel is called in Triton's cache would depend on which others were launched earlier in the
    process, and it would be compiled anew in another order. A function's hash is made once.
    """
    if not isinstance(function, JITFunction) or function.hash is not None:
        return
    for name in function.fn.__code__.co_names:
        called = function.fn.__globals__.get(name)
        if called is not function:
            settle(called)
    function.cache_key


def launch(kernel, grid, *args, **options):
    """Launches a kernel; inside compiled_together() it is compiled and not launched."""
    settle(kernel)
    begun = compiling.get()
    if begun is not None:
        begun.append(kernel)
        return kernel.warmup(*args, grid=grid, **options)
    return kernel[grid](*args, **options)


@contextlib.contextmanager
def compiled_together():
    """Inside, the kernels of `launch` are compiled side by side in threads; they are ready when the block ends.

    One that could not be compiled is compiled again when it is launched, and then says why. It may well compile alone:
    where other threads run, Python 3.11's ast.parse now and then raises "AST constructor recursion depth mismatch".
    """
    # An error here would leave Triton in this mode for good.
    together = triton.AsyncCompileMode
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads, together(threads, ignore_errors=True):
        begun = []
        before = compiling.set(begun)
        try:
            yield
        finally:
            compiling.reset(before)
    for kernel in begun:
        for compiled, *_ in kernel.device_caches.values():
            for key in [key for key, found in compiled.items() if _has_failed(found)]:
                del compiled[key]


def _has_failed(kernel):
    """Whether Triton keeps an error in the place of a kernel, to be raised at each launch."""
    return isinstance(kernel, FutureKernel) and kernel.kernel is None


def remembered(function):
    """functools.cache that keeps a bounded number of results: of a pure function of sizes and other values."""
    return functools.lru_cache(MOST_KEPT)(function)


def forget():
    """Launches are worked out anew from now on, as is needed when Triton's driver is exchanged for another."""
    for ready in _kept:
        ready.clear()


def _nobody_looks(kernel):
    """Whether a launch through Triton would do no more than launch: no hooks, no debugging, no stand-in."""
    runtime = knobs.runtime
    return (
        isinstance(kernel, JITFunction)  # and not interpreted
        and JITFunction.run is _run
        and not kernel.pre_run_hooks
        and not getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        and not getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        and runtime.add_stages_inspection_hook is None
        and not runtime.debug
        and not knobs.compilation.instrumentation_mode
        and compiling.get() is None
    )


def planned(kernel):
    """Decorator: makes a plan a function that launches the kernel, called as launch(tensors, *values).

    The plan is called as plan(*tensors, *values) and returns the grid, the arguments that follow the pointers, and the
    constants and options. It has to be a pure function of the tensors' shapes, strides and dtypes, of the values, which
    are hashable, and of the current device. The kernel's pointers are the tensors in their order; where one is None the
    kernel does not follow its pointer, and gets the first tensor's.

    A second call with tensors of the same kind, on the same device, launches the kernel that the first call has
    compiled or found. While there are hooks, debugging or stand-ins, every launch goes through Triton.
    """

    def decorate(plan):
        ready = {}
        _kept.append(ready)

        def in_full(tensors, values):
            grid, numbers, constants = plan(*tensors, *values)
            args = [tensors[0] if t is None else t for t in tensors]
            return launch(kernel, grid, *args, *numbers, **constants), grid, numbers, constants

        def keep(kind, tensors, compiled, grid, numbers, constants):
            names = kernel.arg_names[len(tensors) :]
            named = {**constants, **dict(zip(names, numbers))}
            # Triton refuses a tensor of another device, and has to be asked again.
            one_device = len({t.device for t in tensors if t is not None}) == 1
            if type(compiled) is CompiledKernel and one_device:
                if len(ready) >= MOST_KEPT:
                    ready.clear()
                rest = [named[name] for name in names]
                # The kernel itself as well: Triton 3.9 unloads a kernel that nobody holds.
                function, metadata = compiled.function, compiled.packed_metadata
                ready[kind] = compiled.run, (*grid, 1, 1)[:3], function, metadata, rest, compiled

        @functools.wraps(plan)
        def launch_planned(tensors, *values):
            if not _nobody_looks(kernel):
                in_full(tensors, values)
                return
            active = driver.active
            device = active.get_current_device()
            pointers, kind = [], [device, *values]
            for t in tensors:
                if t is None:
                    pointers.append(pointers[0])
                    kind.append(None)
                else:
                    pointer = t.data_ptr()
                    pointers.append(pointer)
                    kind += t.shape, t.stride(), t.dtype, t.device, pointer % ALIGNMENT == 0
                    if ROCM:
                        # Triton compiles for storages of less than 2 GiB there.
                        kind.append(t.untyped_storage().nbytes() >= 2**31)
            kind = tuple(kind)
            found = ready.get(kind)
            if found is None:
                keep(kind, tensors, *in_full(tensors, values))
                return
            run, grid, function, metadata, rest, _ = found
            run(*grid, active.get_current_stream(device), function, metadata, None, None, None, *pointers, *rest)

        return launch_planned

    return decorate
