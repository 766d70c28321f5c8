"""Reads the assembler text that Triton compiles for AMD GPUs."""

import re
from collections import Counter

_BYTES = {
    "ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2,
    "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
}  # fmt: skip


def read(text):
    """What the report says of one kernel; the matrix instructions are MFMA."""
    registers = int(re.search(r"^\s*\.vgpr_count:\s*(\d+)", text, re.M)[1])
    # Scratch memory of a thread: what did not fit into registers.
    spilled = int(re.search(r"^\s*\.private_segment_fixed_size:\s*(\d+)", text, re.M)[1])
    opcodes = re.findall(r"^\t([a-z]\w+)", text, re.M)
    return {
        "registers": registers,
        "spilled": spilled,
        "loads": _widths(opcodes, "load"),
        "stores": _widths(opcodes, "store"),
        "matrix": Counter(op for op in opcodes if op.startswith("v_mfma")),
        "asynchronous": None,
    }


def _widths(opcodes, kind):
    found = Counter()
    for op in opcodes:
        if m := re.match(rf"(?:global|buffer|flat)_{kind}_(\w+)", op):
            found[next(_BYTES[part] for part in m[1].split("_") if part in _BYTES)] += 1
    return found
