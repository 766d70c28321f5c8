"""Kernels written by hand in PTX, for the tests of the PTX machine (tests/ptx)."""

import numpy as np
import ptx
import torch
from ptx.descriptors import TensorMap

TEXT = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
    {params}
)
.reqntid {threads}
{{
    .reg .pred %p<40>;
    .reg .b16 %rs<100>;
    .reg .b32 %r<400>;
    .reg .b64 %rd<100>;
    .loc 1 1 0 // kernel.py:1:0
{loads}
    mov.u32 %r0, %tid.x;
{code}
    ret;
}}
"""


def run(code, *arguments, threads=32, programs=1, shared=4096, **choices):
    """Runs a program with its arguments in %rd0, %rd1, ... and the thread index in %r0; returns the machine.

    The argument in a register is an address: of a tensor or a tensor map.
    """
    params, loads = [], []
    for k, argument in enumerate(arguments):
        name = f"kernel_param_{k}"
        if isinstance(argument, TensorMap):
            params.append(f".param .align 64 .b8 {name}[128]")
            loads.append(f"mov.b64 %rd{k}, {name}; cvta.param.u64 %rd{k}, %rd{k};")
        else:
            params.append(f".param .u64 {name}")
            loads.append(f"ld.param.b64 %rd{k}, [{name}];")
    params, loads = ",\n".join(params), "\n".join(loads)
    text = TEXT.format(params=params, loads=loads, threads=threads, code=code)
    machine = ptx.Emulator("sm_90", **choices)
    machine.run(text, shared, (programs, 1, 1), arguments)
    return machine


REGISTERS = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}


def compute(code, result, *operands):
    """Runs code for threads that sets {d} from operands {a}, {b}, {c}; returns the results in numpy's type `result`."""
    count = max(len(operand) for operand in operands)
    arrays = [np.resize(operand, -(-count // 32) * 32) for operand in operands]
    tensors = [torch.from_numpy(array.view(np.uint8).copy()) for array in arrays]
    size = np.dtype(result).itemsize
    out = torch.zeros(len(arrays[0]) * size, dtype=torch.uint8)
    lines, names = [], {}
    for k, array in enumerate(arrays):
        width = array.dtype.itemsize
        names["abc"[k]] = f"{REGISTERS[width]}{50 + k}"
        lines.append(f"mul.wide.u32 %rd60, %r0, {width}; add.s64 %rd60, %rd60, %rd{k + 1};")
        lines.append(f"ld.global.b{8 * width} {names['abc'[k]]}, [%rd60];")
    names["d"] = f"{REGISTERS[size]}{60}"
    lines.append(code.format(**names))
    lines.append(f"mul.wide.u32 %rd61, %r0, {size}; add.s64 %rd61, %rd61, %rd0;")
    lines.append(f"st.global.b{8 * size} [%rd61], {names['d']};")
    run("\n".join(lines), out, *tensors, threads=len(arrays[0]))
    return out.numpy().view(result)[:count]


# Addresses of each thread's 4 bytes in shared memory and in the result.
SLOTS = """
    shl.b32 %r1, %r0, 2; mov.b32 %r2, memory; add.s32 %r1, %r1, %r2;
    mul.wide.u32 %rd10, %r0, 4; add.s64 %rd10, %rd10, %rd0;"""


COPY = """
    mul.wide.u32 %rd11, %r0, 4; add.s64 %rd12, %rd11, %rd1; add.s64 %rd10, %rd11, %rd0; shl.b32 %r1, %r0, 2;
    {copy}
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r2, [%r1];
    st.global.b32 [%rd10], %r2;"""
WAIT = "cp.async.wait_group 0;"


EXCHANGE = (
    SLOTS
    + """
    st.shared.b32 [%r1], %r0;
    {barrier}
    xor.b32 %r5, %r1, 128;
    ld.shared.b32 %r6, [%r5];
    st.global.b32 [%rd10], %r6;"""
)


def vectors_of(count, prefix, first):
    return "{" + ", ".join(f"{prefix}{first + k}" for k in range(count)) + "}"


def wgmma(form, a, b, keep=0, n=16, flags="1, 1", before="", after="", wait="wgmma.wait_group.sync.aligned 0;"):
    """A product of operands in %rd20.. or in registers; its sums go to the result."""
    registers = vectors_of(n // 2, "%r", 100)
    lines = [f"mov.b32 %r{100 + k}, 0f3F800000;" for k in range(n // 2)]
    lines += ["wgmma.fence.sync.aligned;", before]
    lines.append(f"mov.pred %p9, {-keep};")
    lines.append(f"wgmma.mma_async.sync.aligned.{form} {registers}, {a}, {b}, %p9, {flags};")
    lines += ["wgmma.commit_group.sync.aligned;", after, wait]
    lines.append("mul.wide.u32 %rd10, %r0, 4; add.s64 %rd10, %rd10, %rd0;")
    lines += [f"st.global.b32 [%rd10+{512 * k}], %r{100 + k};" for k in range(n // 2)]
    return "\n".join(lines)


def fill(words, source="%rd1", fence="fence.proxy.async.shared::cta;"):
    """128 threads fill words of shared memory from a tensor."""
    lines = [f"mul.wide.u32 %rd11, %r0, 4; add.s64 %rd11, %rd11, {source}; shl.b32 %r1, %r0, 2;"]
    for k in range(words // 128):
        lines.append(f"ld.global.b32 %r2, [%rd11+{512 * k}]; st.shared.b32 [%r1+{512 * k}], %r2;")
    return "\n".join([*lines, fence, "bar.sync 0;"])


# By name: the swizzle's number in a wgmma descriptor, the bytes of a row, and the 16-byte-unit bits that it exchanges.
SWIZZLES = {"none": (0, 16, 0), "32 bytes": (3, 32, 1), "64 bytes": (2, 64, 3), "128 bytes": (1, 128, 7)}


def lay_out(matrix, swizzle, by_k, bytes_each):
    """(bytes in shared memory, leading and stride byte offsets) of an operand (rows, K), by the ISA's figures.

    A core matrix has 8 lines of 16 bytes. Within rows of the swizzle's width, the address bits above 128 bytes permute
    the 16-byte units.
    """
    _, width, bits = SWIZZLES[swizzle]
    lines = matrix.T if by_k else matrix  # the dimension along a line is contiguous
    count, length = lines.shape
    across = length * bytes_each
    stripes = max(across // width, 1)
    stripe = count * width
    leading, stride = (stripe, 8 * width)
    memory = np.zeros(stripes * stripe, np.uint8)
    for line in range(count):
        for element in range(length):
            byte = element * bytes_each
            place = byte // width * leading + line // 8 * stride + line % 8 * width + byte % width
            place ^= (place >> 7 & bits) << 4
            memory[place : place + bytes_each] = np.frombuffer(lines[line, element].tobytes(), np.uint8)
    if by_k and width == 16:
        leading, stride = stride, leading  # the ISA swaps the two names for MN-major operands without swizzle
    return memory, leading, stride


def bits_of(values):
    return values.contiguous().view({2: torch.int16, 4: torch.int32}[values.element_size()]).numpy()
