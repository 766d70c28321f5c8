"""The model's time of ResNet-50's convolutions, forward and backward, over the least time that the card allows.

    python -m bench.machine_code.network [--format bfloat16] [--batch 128]

Each launch takes as long as the slowest of: its instructions, shared memory and products in whole waves of programs,
operands from L2, and device memory, all at the rates of an H200 under load. That is optimistic: nothing waits, and a
launch itself costs nothing. Copies by torch, such as those of NCHW tensors, are no launches of ours. The floor of a
pass is the larger of its arithmetic and its compulsory traffic. Nothing here is measured.
"""

import argparse
import math
import sys
from collections import defaultdict

import torch
from triton.backends.compiler import GPUTarget

from tritonnet.kernels import launchers

from .. import FORMATS, TARGETS, resnet
from ..case import FORWARD, INPUT_GRAD, WEIGHT_GRAD
from ..passes import PASSES, convolution
from . import sass
from .bounds import L2, bounds
from .budgets import BUDGETS, BY_CODE
from .cases import Calls
from .compile import compile_instead

# An H200 under load: cycles a second, and bytes a second of a copy in device memory.
CLOCK, MEMORY = 1.755e9, 4.3e12
# Bytes of its L2, from the data sheet.
L2_SIZE = 50e6


def microseconds(kernel, found, unread):
    """The model's time of a launch with these `bounds`, of whose operands so many bytes are not read."""
    by_code = max(found[name] for name in BY_CODE) * sass.CLOCK / CLOCK * found["waves"]
    memory = found["memory_us"] * sass.MEMORY - unread * 1e6
    # What the launch before it has written and L2 holds is read from there.
    rate = L2 if kernel == "sum_partials_kernel" and memory / 1e6 < L2_SIZE / 2 else MEMORY
    return max(by_code, found["l2_us"], memory / rate)


def unread(layer, which, format):
    """Bytes of x that a 1x1 convolution with a stride leaves out; its gradient is written as a whole."""
    works = convolution(layer).works
    return (max(work.elements for work in works.values()) - works[which].elements) * FORMATS[format][0].itemsize


def floor(layer, which, format):
    """The least microseconds of one pass over a layer."""
    work = convolution(layer).works[which]
    arithmetic = work.flops / (sass.RATES[format] * sass.SMS * CLOCK)
    return max(arithmetic, work.bytes(FORMATS[format][0]) / MEMORY) * 1e6


def calls(layer, format):
    """{pass: call} of a layer in channels_last."""
    c, geometry = Calls(FORMATS[format][0]), ((layer.stride,) * 2, (layer.K // 2,) * 4, (1, 1), 1, "zeros")
    x = c.tensor(layer.N, layer.C, layer.H, layer.H, last=True)
    dy = c.tensor(layer.N, layer.OC, layer.OH, layer.OH, last=True)
    w = c.tensor(layer.OC, layer.C, layer.K, layer.K, last=True)
    found = {
        FORWARD: lambda: launchers.conv2d(x, w, None, *geometry),
        INPUT_GRAD: lambda: launchers.conv2d_input_grad(dy, w, x.shape, *geometry),
        WEIGHT_GRAD: lambda: launchers.conv2d_weight_grad(dy, x, w.shape, *geometry, False),
    }
    return {which: found[which] for which in convolution(layer).works}


def times(batch, format, arch="sm_90"):
    """{(layer, pass): (microseconds by the model, floor)}."""
    precision = FORMATS[format][1]
    torch.backends.cudnn.conv.fp32_precision = precision
    launched = []

    def report(name, launch, kernel):
        if isinstance(kernel, Exception):
            raise kernel
        launched.append((label, name, launch, kernel))

    compile_instead(GPUTarget(*TARGETS[arch]), report)
    floors = {}
    for layer in resnet.layers(batch):
        for which, call in calls(layer, format).items():
            label = layer, which
            floors[label] = floor(layer, which, format)
            call()
    codes = sass.disassemble([kernel.asm["cubin"] for *_, kernel in launched], arch)
    found = defaultdict(float)
    for (label, name, launch, _), code in zip(launched, codes):
        left = 0 if name == "sum_partials_kernel" else unread(*label, format)
        found[label] += microseconds(name, bounds(name, launch, code, format), left)
    return {label: (found[label], floors[label]) for label in floors}


def totals(times):
    """{pass, and "all": (microseconds, floor)} over the whole network."""
    found = {
        which: [sum(layer.count * each[i] for (layer, p), each in times.items() if p == which) for i in (0, 1)]
        for which in PASSES
    }
    return {**found, "all": [math.fsum(each[i] for each in found.values()) for i in (0, 1)]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--format", choices=("bfloat16", "float16", "tf32"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    found = times(arguments.batch, arguments.format)
    for (layer, which), (time, least) in found.items():
        print(f"{layer.count} x {layer.name:32s} {which:16s} {time:8.1f} us, floor {least:6.1f}, {time / least:.2f}")
    for which, (time, least) in totals(found).items():
        print(f"{which:16s} {time:8.0f} us, floor {least:6.0f}, {time / least:.3f}")
    most = BUDGETS["network"]["most"]
    if time > most * least:
        return f"The network takes {time / least:.3f} times its floor by the model; {most} is allowed in bfloat16."


if __name__ == "__main__":
    sys.exit(main())
