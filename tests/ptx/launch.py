"""Launches of Triton's kernels on CPU tensors: each kernel is compiled for a GPU, and its PTX is run here."""

import contextlib
import functools
import re
from collections import Counter
from unittest import mock

import numpy as np
import torch
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.machine_code.compile import NoDevice

from .descriptors import UTILS, expanded
from .faults import Fault
from .formats import Approximate
from .memory import Memory
from .parse import MAP, parse
from .schedule import Machine
from .translate import Translated

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
WHEN = ("early", "late")


@functools.lru_cache(maxsize=64)
def translate(text, worst, seed):
    """The functions of a kernel's blocks. Translating takes longer than a small launch; each takes some megabytes."""
    return Translated(parse(text), Approximate(worst, seed))


class AsFarAsPTX(CUDABackend):
    """Triton's compiler for NVIDIA's GPUs without its last stage, ptxas, which takes 40 % of a compilation's time."""

    def __init__(self, target):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages, options, language):
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self):
        # A key of its own in Triton's cache, apart from the kernels for a real GPU.
        return f"{super().hash()} without ptxas"


class NoGPU(NoDevice):
    """A driver with one device, whose index is its architecture: Triton caches compiled kernels by device."""

    utils = UTILS

    def get_current_device(self):
        return self.target.arch


class Emulator:
    """The machine of an `emulate`.

    memory: keep(tensor) allows kernels to access it by its real address. launches, programs, instructions: how many of
    each have run, by kernel; an instruction counts once for each warp. seen: the opcodes of the kernels that have run.
    """

    def __init__(self, arch, seed=0, copies=None, products=None, apart=None, worst=False, alter=None):
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch has to be one of {ARCHITECTURES}, got {arch!r}")
        for name, value in (("copies", copies), ("products", products)):
            if value not in (None, *WHEN):
                raise ValueError(f"{name} has to be None or one of {WHEN}, got {value!r}")
        self.arch, self.seed, self.copies, self.products = arch, seed, copies, products
        self.apart, self.worst, self.alter = apart, worst, alter
        self.rng = np.random.default_rng(seed)
        self.memory, self.seen = Memory(), set()
        self.launches, self.programs, self.instructions = Counter(), Counter(), Counter()

    def translated(self, text):
        """The translated kernel, from the altered text if `alter` is given."""
        text = self.alter(text) if self.alter else text
        return translate(text, self.worst, self.seed if self.worst else 0)

    def run(self, text, shared_bytes, grid, arguments):
        """Runs a grid of programs of a PTX text. arguments: tensors, tensor maps and numbers, one a parameter."""
        translated = self.translated(text)
        kernel = translated.kernel
        self.memory.forget_arguments()
        params = [self.bits(kind, value, kernel) for (_, kind), value in zip(kernel.params, arguments, strict=True)]
        copies, products = (
            WHEN[self.rng.integers(2)] if given is None else given for given in (self.copies, self.products)
        )
        apart = bool(self.rng.integers(2)) if self.apart is None else self.apart
        self.launches[kernel.name] += 1
        self.programs[kernel.name] += grid[0] * grid[1] * grid[2]
        self.seen |= {each.opcode for each in kernel.code}
        machine = Machine(
            translated, shared_bytes, self.memory, copies, products, apart, self.rng,
            lambda n: self.instructions.update({kernel.name: n}),
        )  # fmt: skip
        machine.launch(grid, params)

    def bits(self, kind, value, kernel):
        """The bits of an argument as a parameter's type; of a tensor map, its address."""
        if kind == MAP:
            if complaint := value.complaint():
                raise Fault(*complaint, kernel.name)
            kind, value = "u64", self.memory.place_map(value)
        size = int(re.search(r"\d+", kind)[0]) // 8
        if isinstance(value, torch.Tensor):
            value = self.memory.address(value)
        elif kind[0] == "f":
            value = int(np.array(value, f"f{size}").view(f"u{size}"))
        return np.array([[int(value) & (1 << 8 * size) - 1]], f"u{size}")


@contextlib.contextmanager
def emulate(arch, *, seed=0, copies=None, products=None, apart=None, worst=False, alter=None):
    """Kernels launched inside run as PTX for `arch`, on CPU tensors; yields the Emulator.

    seed: decides all that the ISA leaves open: orders and, where they are None, copies and products ("early" or "late")
    and apart (whether warps run one after the other instead of in step), drawn for each launch. worst: approximate
    functions have the largest errors that the ISA allows. alter: a function of a kernel's PTX that returns the text to
    run instead.

    Calls with warmup=True only compile, as always.
    """
    emulator = Emulator(arch, seed, copies, products, apart, worst, alter)
    original = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        if warmup:
            return kernel
        bound = dict(zip(self.arg_names, args)) | kwargs
        size = grid(bound) if callable(grid) else grid
        size = tuple(int(n) for n in (*size, 1, 1)[:3])
        kinds = {name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"}
        arguments = expanded([bound[name] for name in kinds], kinds.values(), kernel.metadata)
        text = kernel.asm["ptx"].decode()
        # The kernels that run here need no scratch memory, and so its two pointers are 0.
        emulator.run(text, kernel.metadata.shared, size, [*arguments, 0, 0])
        return kernel

    gpu, compiler = NoGPU(GPUTarget("cuda", int(arch[3:]), 32)), Backend(AsFarAsPTX, backends["nvidia"].driver)
    with (
        mock.patch.dict(backends, nvidia=compiler),
        mock.patch.object(driver, "_active", gpu),
        mock.patch.object(JITFunction, "run", run),
    ):
        yield emulator
