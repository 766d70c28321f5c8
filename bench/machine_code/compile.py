"""Compiles every kernel for a GPU that need not be there, as its launcher would launch it.

    python -m bench.machine_code.compile sm_90 bfloat16 float64 [--brief] [--once] [--only CASE ...]

Runs the launchers over CPU tensors with each launch replaced by its compilation, and prints one JSON object a line for
each kernel compiled, or one with an "error" where that failed. TRITON_INTERPRET must not be set. Compiled kernels are
kept in Triton's cache, so that a second run takes seconds. What is compiled is in cases.py.
"""

import argparse
import gc
import json
import sys

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .. import FORMATS, TARGETS
from . import amdgcn, cases, sass, ttgir
from .bounds import Launch, bounds


class NoDevice:
    """The part of Triton's driver that compiling calls."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_instead(target, report, left_out=lambda kernel: False):
    """From now on, compile every launch for the target and pass it to report(name, launch, kernel) without running it.

    Where compilation fails, `kernel` is the exception. Launches of kernels that are left out do nothing.
    """
    # Compiling makes many objects and little garbage: at its usual rate, garbage collection takes 8 % of the time.
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    driver.set_active(NoDevice(target))
    run = JITFunction.run

    def compile(self, *args, grid, warmup, **kwargs):
        if left_out(self):
            return
        launch = Launch(**dict(zip(self.arg_names, args)), **kwargs, grid=grid)
        # An error in LLVM may end the process; this line then names the kernel.
        print(f"compiling {self.fn.__name__}", file=sys.stderr, flush=True)
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as e:
            kernel = e
        report(self.fn.__name__, launch, kernel)

    JITFunction.run = compile


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("arch", choices=TARGETS)
    parser.add_argument("format", choices=FORMATS, nargs="+")
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--once", action="store_true", help="the first launch of each kernel, and cases.MAIN")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="cases with these names (default: all)")
    arguments = parser.parse_args()
    arch = arguments.arch
    target, compiled, label, seen = GPUTarget(*TARGETS[arch]), [], {}, set()
    named = {name for name, _ in cases.shapes(None)}

    def report(name, launch, kernel):
        record = {"arch": arch, "kernel": name, **label}
        if isinstance(kernel, Exception):
            print(json.dumps({**record, "error": f"{type(kernel).__name__}: {kernel}"}), flush=True)
            return
        # The same machine code has another bound in another launch.
        bounded = arch == cases.BOUNDED[0] and label["case"] in named
        key = kernel.hash, label["format"], bounded and (label["case"], launch.programs)
        if key not in seen:
            seen.add(key)
            compiled.append((record, launch, kernel, bounded))

    launched = set()

    def again(kernel):
        if arguments.once and kernel in launched and (label["format"], label["case"]) not in cases.MAIN:
            return True
        launched.add(kernel)
        return False

    compile_instead(target, report, again)
    for format in arguments.format:
        for case, call in cases.calls(arch, format, arguments.brief):
            if arguments.only and case not in arguments.only:
                continue
            label.update(format=format, case=case)
            print(f"{arch}, {format}, {case}:", file=sys.stderr)
            call()

    assembler = [kernel.asm["amdgcn"] for _, _, kernel, _ in compiled] if target.backend == "hip" else []
    listings = [amdgcn.read(text) for text in assembler]
    if target.backend == "cuda":
        cubins = [kernel.asm["cubin"] for _, _, kernel, _ in compiled]
        instructions = sass.disassemble(cubins, arch)
        listings = [sass.read(cubin, code, arch) for cubin, code in zip(cubins, instructions)]
    for i, (record, launch, kernel, bounded) in enumerate(compiled):
        blocks = [str(getattr(launch, name)) for name in launch.__dict__ if name.startswith("BLOCK")]
        record["tile"] = "x".join(blocks)
        record.update(num_warps=kernel.metadata.num_warps, num_stages=kernel.metadata.num_stages)
        record.update(shared=kernel.metadata.shared, dot="tt.dot" in kernel.asm["ttir"], **listings[i])
        record["overwritten"], record["products"] = ttgir.overwritten(kernel.asm["ttgir"])
        if bounded:
            record["bounds"] = bounds(record["kernel"], launch, instructions[i], record["format"])
        print(json.dumps(record))


if __name__ == "__main__":
    main()
