"""Reads machine code: registers, widths of memory accesses, matrix instructions, loops, and what they cost on sm_90.

The costs are lower bounds, in cycles of one SM: instructions over the four that it issues a cycle, bytes over the 128
that its L1 and shared memory move, products over the rate of its matrix units. Waits, conflicts and misses come on
top.

Sources: rates are those of NVIDIA's H100 whitepaper (2022) and of the CUDA C++ Programming Guide, "Throughput of
Native Arithmetic Instructions"; that mma.sync reaches about half the rate of wgmma on sm_90 is from Luo et al. 2024,
https://arxiv.org/abs/2402.13499.
"""

import functools
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from typing import NamedTuple

import triton

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
# The name under which nvdisasm knows an architecture.
NVDISASM = {"sm_80": "SM80", "sm_90": "SM90a", "sm_100": "SM100a"}

# NVIDIA H200: streaming multiprocessors, boost clock in Hz, bytes a second of device memory (data sheet).
SMS, CLOCK, MEMORY = 132, 1.98e9, 4.8e12
# Floating-point operations a cycle and SM.
RATES = {"bfloat16": 4096, "float16": 4096, "tf32": 2048, "float32": 256, "float64": 256}


class Instruction(NamedTuple):
    address: int
    opcode: str  # with its modifiers: "LDG.E.128"
    operands: str


def _run(tool, *arguments):
    return subprocess.run([os.path.join(TOOLS, tool), *arguments], capture_output=True, text=True, check=True).stdout


def resources(cubin):
    """(registers, bytes of stack, which is what was spilled) of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = _run("cuobjdump", "-res-usage", f.name)
    return tuple(int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", text).groups())


def _code(cubin):
    """The bytes of the .text sections of an ELF file."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HHH", cubin, 0x3A)
    sections = []
    for i in range(count):
        name, _, _, _, offset, length = struct.unpack_from("<IIQQQQ", cubin, table + i * size)
        sections.append((name, cubin[offset : offset + length]))
    strings = sections[names][1]
    return b"".join(code for name, code in sections if strings[name:].startswith(b".text."))


def disassemble(cubins, arch):
    """The instructions of each kernel, in one run, because starting the disassembler takes longer than its work."""
    codes = [_code(cubin) for cubin in cubins]
    if not codes:
        return []
    with tempfile.NamedTemporaryFile(suffix=".bin") as f:
        f.write(b"".join(codes))
        f.flush()
        text = _run("nvdisasm", "--binary", NVDISASM[arch], f.name)
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
    instructions = [Instruction(int(m[1], 16), m[2], m[3]) for m in line.finditer(text)]
    found, start, i = [], 0, 0
    for code in codes:
        end, first = start + len(code), i
        while i < len(instructions) and instructions[i].address < end:
            i += 1
        found.append(instructions[first:i])
        start = end
    return found


def loops(instructions):
    """(first, last) positions of each loop: the target of a backward branch, and the branch.

    Behind the program's end stand waits that are repeated, and from there a branch only goes on with the program.
    """
    end = max((i for i, instruction in enumerate(instructions) if instruction.opcode == "EXIT"), default=0)
    at = {instruction.address: i for i, instruction in enumerate(instructions)}
    found = []
    for i, instruction in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)$", instruction.operands) if instruction.opcode.startswith("BRA") else None
        first = at.get(int(target[1], 16)) if target else None
        if first is not None and first < i and not first <= end < i:
            found.append((first, i))
    return found


# Shapes (M, N, K) of the mma.sync instructions by the second part of their names.
_MMA = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4), "884": (8, 8, 4)}


@functools.cache
def is_matrix(opcode):
    """Whether it is an instruction of the matrix units (wgmma is HGMMA there, tcgen05.mma UTCHMMA)."""
    return bool(re.match(r"([HDI]|HG|IG|QG|UTC[A-Z])MMA", opcode))


def products(instruction):
    """Multiply-adds of an instruction: a warpgroup's for HGMMA, a warp's for HMMA, DMMA and the scalar FMA."""
    op = instruction.opcode
    if re.match(r"[FD]FMA", op):
        return 32
    if m := re.match(r"HGMMA\.64x(\d+)x(\d+)", op):
        return 64 * int(m[1]) * int(m[2])
    if m := re.match(r"[HD]MMA\.(\w+)", op):
        M, N, K = _MMA.get(m[1]) or map(int, m[1].split("x"))
        return M * N * K
    return 0


def widths(instructions, names):
    """Bytes a thread of the loads or stores whose opcodes start with one of `names`, as a Counter."""
    found = Counter()
    for instruction in instructions:
        head, *modifiers = instruction.opcode.split(".")
        if head in names:
            sized = [m for m in modifiers if m in _BYTES]
            found[_BYTES[sized[0]] if sized else 4] += 1
    return found


_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def is_asynchronous(body, arch):
    """Whether the loop with the matrix instructions goes on loading while they run, or None where it has none.

    On sm_90, products of one iteration may run into the next only if no wait in the loop requires that none is pending.
    Elsewhere the sign is that the loop copies to shared memory without passing through registers.
    """
    if not any(is_matrix(i.opcode) for i in body):
        return None
    if any(i.opcode.startswith("HGMMA") for i in body):
        waits = [i.operands for i in body if i.opcode.startswith("WARPGROUP.DEPBAR")]
        return bool(waits) and not any(re.search(r"gsb0, 0x0$", operands) for operands in waits)
    return any(i.opcode.startswith(("LDGSTS", "UTMALDG")) for i in body)


def main_loop(instructions):
    """(first, last) of the innermost loop with the most products, or None."""
    found = [(first, last) for first, last in loops(instructions)]
    work = {loop: sum(map(products, instructions[loop[0] : loop[1] + 1])) for loop in found}
    matrix = {loop: sum(is_matrix(i.opcode) for i in instructions[loop[0] : loop[1] + 1]) for loop in found}
    return max(found, key=lambda loop: (matrix[loop], work[loop], loop[0] - loop[1]), default=None)


def read(cubin, instructions, arch):
    """What the report says of one kernel."""
    registers, spilled = resources(cubin)
    loop = main_loop(instructions)
    body = instructions[loop[0] : loop[1] + 1] if loop else []
    return {
        "registers": registers,
        "spilled": spilled,
        "loads": widths(instructions, ("LDG", "LDGSTS")),
        "stores": widths(instructions, ("STG",)),
        "matrix": Counter(i.opcode for i in instructions if is_matrix(i.opcode)),
        "loop": (len(body), sum(is_matrix(i.opcode) for i in body)),
        "asynchronous": is_asynchronous(body, arch),
    }


class Cost(NamedTuple):
    """Cycles of an SM that one program takes at the least."""

    issue: float
    l1: float
    matrix: float


def cost(instructions, weights, num_warps, rate, uncounted=()):
    """The Cost of a program that runs instruction i `weights[i]` times, with products at `rate` operations a cycle.

    uncounted: positions at which copies to shared memory do not count as bytes.
    """
    issue = l1 = matrix = 0.0
    for position, (instruction, weight) in enumerate(zip(instructions, weights)):
        head = instruction.opcode.split(".")[0]
        issue += weight * num_warps / 4
        if head == "LDGSTS" and position in uncounted:
            continue
        if head in ("LDG", "STG", "LDS", "STS", "LDGSTS", "STSM", "LDSM"):
            # A warp's threads at four bytes each fill the 128 bytes of a cycle.
            l1 += weight * num_warps * _lane_bytes(instruction.opcode) / 4
        elif head == "HGMMA":
            m = re.match(r"HGMMA\.64x(\d+)x(\d+)", instruction.opcode)
            n, k = int(m[1]), int(m[2])
            itemsize = 4 if "TF32" in instruction.opcode else 2
            operands = n * k + (64 * k if instruction.operands.split(",")[1].strip().startswith("gdesc") else 0)
            l1 += weight * num_warps / 4 * operands * itemsize / 128
            matrix += weight * num_warps / 4 * 2 * products(instruction) / rate
        elif is_matrix(head):
            half_rate = 1 if head == "DMMA" else 2
            matrix += weight * num_warps * 2 * products(instruction) / rate * half_rate
    return Cost(issue, l1, matrix)


def _lane_bytes(opcode):
    if opcode.startswith(("LDSM", "STSM")):
        return 4 * int(opcode[-1]) if opcode[-2:] in (".4", ".2") else 4
    return max(4, next(iter(widths([Instruction(0, opcode, "")], (opcode.split(".")[0],)))))
