"""How kernels are launched: what a launch needs is computed once for each kind of arguments, and cached.

For a small batch the host takes longer than the GPU: Triton looks up the compiled kernel by forty arguments, which a
launcher has to compute first. Both depend only on the tensors' shapes, strides, dtypes and alignment, on a few values
and on the device. So a launcher has two parts: a plan, which is a pure function of those, and a function that allocates
the results and passes the tensors on.
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
from triton.tools.tensor_descriptor import TensorDescriptor

# The kernels that `launch` has compiled instead of launching them, in this thread; None outside compiled_together().
compiling = contextvars.ContextVar("compiling", default=None)
# Entries of a cache. A kernel's full cache is cleared; a function's drops what was used least recently.
MOST_KEPT = 4096
# Triton specialises a kernel on pointers with this alignment in bytes.
ALIGNMENT = 16
ROCM = torch.version.hip is not None

_run = JITFunction.run
# The caches of launches, and those of what is computed for them.
_kept, _chosen = [], []


def settle(function):
    """Compute the hash of a kernel's source after the hashes of all functions that it calls.

    At least up to 3.7.1, Triton includes the constants that a called function uses only if that function has been
    hashed before. A kernel's key in Triton's cache would then depend on what was launched earlier in the process, and
    the kernel would be compiled again in another order. Triton computes the hash of a function once.
    """
    if not isinstance(function, JITFunction) or function.hash is not None:
        return
    for name in function.fn.__code__.co_names:
        called = function.fn.__globals__.get(name)
        if called is not function:
            settle(called)
    function.cache_key


def launch(kernel, grid, *args, **options):
    """Launch a kernel; inside compiled_together() it is compiled and not launched."""
    settle(kernel)
    begun = compiling.get()
    if begun is not None:
        begun.append(kernel)
        return kernel.warmup(*args, grid=grid, **options)
    return kernel[grid](*args, **options)


@contextlib.contextmanager
def compiled_together():
    """Context in which the kernels of `launch` are compiled in parallel threads; they are ready when it ends.

    A kernel that fails to compile is compiled again when it is launched, which raises its error. It may well succeed
    then: with other threads running, Python 3.11's ast.parse sometimes raises "AST constructor recursion depth
    mismatch".
    """
    # Without ignore_errors an exception would leave Triton in this mode for good.
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
    """Whether Triton's cache holds an error for this kernel, which every launch would raise."""
    return isinstance(kernel, FutureKernel) and kernel.kernel is None


def remembered(function):
    """functools.lru_cache for pure functions of sizes and other hashable values."""
    cached = functools.lru_cache(MOST_KEPT)(function)
    _chosen.append(cached)
    return cached


def forget():
    """Clear the cached launches and choices, as is needed when Triton's driver or the tables of tiles are replaced."""
    for ready in _kept:
        ready.clear()
    for cached in _chosen:
        cached.cache_clear()


def _unobserved(kernel):
    """Whether a launch through Triton would do nothing but launch: no hooks, no debugging, no patched run."""
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


def _descriptor(like, base):
    """The TensorDescriptor with the attributes `like` of another tensor; its constructor takes microseconds."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(like)
    descriptor.base = base
    return descriptor


def _kind(tensors, device, values):
    """(The tensors' addresses, everything that a launch depends on)."""
    pointers, kind = [], [device, *values]
    for t in tensors:
        if t is None:
            pointers += pointers[:1]
            kind += (None,)
        else:
            pointer = t.data_ptr()
            pointers.append(pointer)
            kind += t.shape, t.stride(), t.dtype, t.device, pointer % ALIGNMENT == 0
            if ROCM:
                # On ROCm Triton specialises on storages of less than 2 GiB.
                kind.append(t.untyped_storage().nbytes() >= 2**31)
    return pointers, tuple(kind)


def planned(kernel):
    """Decorator: turns a plan into a function that launches the kernel, called as launch(tensors, *values).

    The plan is called as plan(*tensors, *values) and returns the grid, the arguments that follow the pointers, and the
    constants and options. It must be a pure function of the tensors' shapes, strides and dtypes, of the values, which
    are hashable, and of the current device. The kernel's pointers are the tensors in their order. A tensor may be None
    if the kernel does not dereference its pointer; the first tensor's pointer is passed in its place. Where the plan
    also returns the shapes of blocks, so many of the first tensors are passed as descriptors with these blocks.

    A second call with tensors of the same kind on the same device launches the compiled kernel directly. With hooks,
    debugging or a patched JITFunction.run, every launch goes through Triton.
    """

    def decorate(plan):
        ready = {}
        _kept.append(ready)

        def in_full(tensors, values):
            grid, numbers, constants, *boxes = plan(*tensors, *values)
            args = [tensors[0] if t is None else t for t in tensors]
            for i, box in enumerate(boxes[0] if boxes else ()):
                args[i] = TensorDescriptor.from_tensor(tensors[i], list(box))
            like = [vars(t) for t in args if isinstance(t, TensorDescriptor)]
            return launch(kernel, grid, *args, *numbers, **constants), grid, numbers, constants, like

        def keep(kind, tensors, compiled, grid, numbers, constants, like):
            names = kernel.arg_names[len(tensors) :]
            named = {**constants, **dict(zip(names, numbers))}
            # Triton raises for tensors on different devices, so such a call must go through it every time.
            one_device = len({t.device for t in tensors if t is not None}) == 1
            if type(compiled) is CompiledKernel and one_device:
                if len(ready) >= MOST_KEPT:
                    ready.clear()
                rest = [named[name] for name in names]
                # The compiled kernel is kept too: Triton 3.9 unloads a kernel without references.
                function, metadata = compiled.function, compiled.packed_metadata
                # Without their tensors, which would stay in memory.
                like = [{**each, "base": None} for each in like]
                ready[kind] = compiled.run, (*grid, 1, 1)[:3], function, metadata, rest, like, compiled

        @functools.wraps(plan)
        def launch_planned(tensors, *values):
            if not _unobserved(kernel):
                in_full(tensors, values)
                return
            active = driver.active
            device = active.get_current_device()
            pointers, kind = _kind(tensors, device, values)
            found = ready.get(kind)
            if found is None:
                keep(kind, tensors, *in_full(tensors, values))
                return
            run, grid, function, metadata, rest, like, _ = found
            for i, each in enumerate(like):
                pointers[i] = _descriptor(each, tensors[i])
            run(*grid, active.get_current_stream(device), function, metadata, None, None, None, *pointers, *rest)

        return launch_planned

    return decorate
