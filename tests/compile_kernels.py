"""Compiles every kernel for a GPU that need not be there, as its launcher would launch it.

    python tests/compile_kernels.py cuda 90 32 [float32 bfloat16 ...]
    python tests/compile_kernels.py hip gfx942 64

Runs the launchers over CPU tensors with each launch replaced by its compilation, and prints a line for each compiled
kernel: kernel, case, dtype, bytes of shared memory, registers, bytes spilled (the last two for NVIDIA only).
TRITON_INTERPRET must not be set.
Without dtypes all four are compiled, float32 once with tf32 and once in full precision.
"""

import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import tritonnet  # noqa: F401  (tritonnet.kernels needs its parent)
from tritonnet.kernels import launchers as L


class NoDevice:
    """As much of a driver as compiling asks for."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def resources(cubin):
    """(registers, bytes spilled) of machine code."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", text).groups())


def calls(dtype):
    """Launcher calls that between them reach every kernel, both walks of K, every tile width and 64-bit offsets."""

    def t(*size, last=False):
        x = torch.empty(size, dtype=dtype)
        return x.to(memory_format=torch.channels_last) if last else x

    def conv(n, c, h, oc, k, stride=1, dilation=1, groups=1, mode="zeros", last=False, with_bias=True):
        pad = dilation * (k // 2)
        g = ((stride, stride), (pad,) * 4, (dilation, dilation), groups, mode)
        x, w = t(n, c, h, h, last=last), t(oc, c // groups, k, k, last=last)
        dy = L.conv2d(x, w, t(oc) if with_bias else None, *g)
        L.conv2d_input_grad(dy, w, x.shape, *g)
        L.conv2d_weight_grad(dy, x, w.shape, *g, with_bias)

    yield "lenet conv1", lambda: conv(64, 1, 32, 6, 5)
    yield "lenet conv2", lambda: conv(64, 6, 14, 16, 5)
    yield "resnet stem", lambda: conv(8, 3, 64, 64, 7, stride=2, last=True, with_bias=False)
    yield "resnet 3x3", lambda: conv(8, 128, 16, 128, 3, last=True, with_bias=False)
    yield "3x3 with bias, NCHW", lambda: conv(8, 64, 16, 64, 3)
    yield "5x5 strided", lambda: conv(8, 128, 16, 128, 5, stride=2, last=True)
    yield "1x1", lambda: conv(8, 256, 14, 64, 1, last=True)
    yield "dilated groups", lambda: conv(4, 64, 16, 64, 3, dilation=2, groups=2)
    yield "reflect", lambda: conv(4, 32, 16, 32, 3, mode="reflect")
    yield "depthwise", lambda: conv(4, 32, 16, 64, 3, stride=2, groups=32, last=True)
    yield "depthwise NCHW circular", lambda: conv(4, 32, 16, 32, 3, groups=32, mode="circular")

    def pool(last):
        window = ((3, 3), (2, 2), (1, 1), (1, 1))
        x = t(4, 8, 16, 16, last=last)
        y, code = L.max_pool2d(x, *window, False)
        L.max_pool2d_scatter(y, code, (16, 16), *window)
        L.max_pool2d_gather(x, code, *window)
        L.max_pool2d_indices(code, 16, *window)

    yield "pool", lambda: pool(False)
    yield "pool channels_last", lambda: pool(True)
    yield "relu", lambda: (L.relu(t(1000)), L.relu_(t(1000)), L.relu_grad(t(1000), t(1000)))

    def linear(m, k, n):
        x, w = t(m, k), t(n, k)
        dy = L.linear(x, w, t(n))
        L.linear(dy, w.t(), None)
        L.linear_weight_grad(dy, x, True)

    yield "linear 64 x 400 x 120", lambda: linear(64, 400, 120)
    yield "linear 4096 x 84 x 10", lambda: linear(4096, 84, 10)
    yield "linear 2048^3", lambda: linear(2048, 2048, 2048)
    # Virtual memory only: nothing is launched, so no page of it is touched.
    yield "relu past 2^31", lambda: L.relu(t(2**31 + 8))


def compile_instead(target, report):
    """From now on every launch compiles for the target only; report(name, kernel) hears of each new machine code."""
    driver.set_active(NoDevice(target))
    seen = set()
    run = JITFunction.run

    def compile(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            report(self.fn.__name__, kernel)
        return kernel

    JITFunction.run = compile


def main(backend, arch, warp_size, dtypes):
    label = []

    def report(name, kernel):
        usage = resources(kernel.asm["cubin"]) if "cubin" in kernel.asm else ()
        print(name, *label, kernel.metadata.shared, *usage, sep="\t", flush=True)

    compile_instead(GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size)), report)
    for dtype in dtypes:
        for precision in ("tf32", "ieee") if dtype == torch.float32 else ("ieee",):
            torch.backends.cudnn.conv.fp32_precision = precision
            torch.backends.cuda.matmul.fp32_precision = precision
            for case, call in calls(dtype):
                label[:] = case, "tf32" if precision == "tf32" else str(dtype).removeprefix("torch.")
                call()


if __name__ == "__main__":
    names = sys.argv[4:] or ["bfloat16", "float16", "float32", "float64"]
    main(*sys.argv[1:4], [getattr(torch, name) for name in names])
