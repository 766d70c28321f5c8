"""Instructions of whole warps on matrices: ldmatrix, stmatrix and mma.sync.

Products of one block that share operands and sums are computed as one larger product: the terms of each sum are then
added in another order, which the ISA leaves open, in float32.

Sources: PTX ISA 9.0, sections "Warp Level Matrix Instructions: ldmatrix", "stmatrix", and "Matrix multiply-accumulate
operation using mma instruction", whose figures give the thread and the register of each element.
"""

from dataclasses import dataclass

import numpy as np

from .formats import F2, F4, F8, U2, U4, cut_tf32, widen_bf16
from .memory import READ
from .shared import Address, store
from .warp import whole


def row_addresses(b, address, offset, count, here):
    """(addresses of the 16-byte rows of 8 x 8 matrices, the warps of the rows): lane i has the address of row i."""
    whole(b, here)
    lanes = np.flatnonzero(b.lane[0] < 8 * count)
    value = address.value if address.value.shape[1] == 1 else address.value[:, lanes]
    rows = Address(np.broadcast_to(value + offset, (len(value), len(lanes))))
    return rows, b.warps[:, lanes]


def load_matrices(b, address, offset, count, transposed, here):
    """ldmatrix: a register gets two neighbours of a row, four threads share a row; transposed, of a column."""
    memory = b.batch.shared
    rows, warps = row_addresses(b, address, offset, count, here)
    rows, _ = memory.checked(b, rows, 0, 16, None, here)
    memory.touch(b, READ, rows, 0, 16, None, warps, here)
    raw = memory.bits(b, rows, 0, 16)
    if transposed:
        tiles = raw.view(U2).reshape(len(raw), -1, count, 8, 8).transpose(2, 0, 1, 4, 3)
        tiles = np.ascontiguousarray(tiles).view(U4)
    else:
        tiles = raw.view(U4).reshape(len(raw), -1, count, 8, 4).transpose(2, 0, 1, 3, 4)
    return tuple(np.ascontiguousarray(tiles).reshape(count, len(raw), -1))


def store_matrices(b, address, offset, values, transposed, here):
    """stmatrix, the opposite of ldmatrix."""
    count = len(values)
    rows, warps = row_addresses(b, address, offset, count, here)
    tiles = stacked(values, b.threads)  # (matrix, program, thread)
    programs = tiles.shape[1]
    if transposed:
        tiles = tiles.view(U2).reshape(count, programs, -1, 8, 8).transpose(1, 2, 0, 4, 3)
    else:
        tiles = tiles.reshape(count, programs, -1, 8, 4).transpose(1, 2, 0, 3, 4)
    data = np.ascontiguousarray(tiles).view(np.complex128).reshape(programs, -1)
    store(b, rows, 0, 16, data, None, here, warps)


def stacked(values, threads):
    """Registers as one array (register, program, thread)."""
    programs = max(len(value) for value in values)
    result = np.empty((len(values), programs, threads), values[0].dtype)
    for k, value in enumerate(values):
        result[k] = value
    return result


@dataclass(frozen=True)
class Fragments:
    """mma's operands in registers: M, N, K; elements per register; registers along M and K of A, along K of B."""

    m: int
    n: int
    k: int
    packed: int
    rows: int
    columns: int
    values: object
    bits: str


def bf16(bits):
    return widen_bf16(bits.view(U2))


def f16(bits):
    return bits.view(F2).astype(F4)


def same(bits):
    return bits.view(F8)


MMA = {
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": Fragments(16, 8, 16, 2, 2, 2, bf16, "u4"),
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32": Fragments(16, 8, 8, 2, 2, 1, bf16, "u4"),
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": Fragments(16, 8, 16, 2, 2, 2, f16, "u4"),
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32": Fragments(16, 8, 8, 2, 2, 1, f16, "u4"),
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": Fragments(16, 8, 8, 1, 2, 2, cut_tf32, "u4"),
    "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32": Fragments(16, 8, 4, 1, 2, 1, cut_tf32, "u4"),
    "mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64": Fragments(16, 8, 16, 1, 2, 4, same, "f8"),
    "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64": Fragments(16, 8, 8, 1, 2, 2, same, "f8"),
    "mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64": Fragments(16, 8, 4, 1, 2, 1, same, "f8"),
    "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64": Fragments(8, 8, 4, 1, 1, 1, same, "f8"),
}


def mma(b, opcode, shape, a, b_operands, c, here):
    """Computes the sums of a grid of products.

    shape: products along M, along N, and steps along K. a: registers by (product along M, step, half of K, half of M).
    b_operands: by (product along N, step, half of K). c: by (along M, along N, half of M, element), or None for zeros.
    """
    whole(b, here)
    f, (m, n, steps) = MMA[opcode], shape
    left = stacked(a, b.threads)
    right = stacked(b_operands, b.threads)
    warps = b.threads // 32
    h = f.packed
    # Threads are (warp, group, thread in group) and bits (element): the parts of each row are brought together.
    left = left.view(U2) if h == 2 else left
    left = left.reshape(m, steps, f.columns, f.rows, -1, warps, 8, 4, h).transpose(4, 5, 0, 3, 6, 1, 2, 7, 8)
    left = f.values(np.ascontiguousarray(left)).reshape(-1, warps, m * f.m, steps * f.k)
    right = right.view(U2) if h == 2 else right
    right = right.reshape(n, steps, f.columns, -1, warps, 8, 4, h).transpose(3, 4, 1, 2, 6, 7, 0, 5)
    right = f.values(np.ascontiguousarray(right)).reshape(-1, warps, steps * f.k, n * f.n)
    sums = left @ right
    if c is not None:
        start = stacked(c, b.threads).reshape(m, n, f.rows, 2, -1, warps, 8, 4).transpose(4, 5, 0, 2, 6, 1, 7, 3)
        sums = sums + start.reshape(-1, warps, m * f.m, n * f.n)
    sums = sums.reshape(-1, warps, m, f.rows, 8, n, 4, 2).transpose(2, 5, 3, 7, 0, 1, 4, 6)
    return tuple(np.ascontiguousarray(sums).reshape(m * n * f.rows * 2, -1, b.threads))


class Products:
    """Collects the products of a block while it is translated, and emits them when a result is needed.

    A product whose sums start from another's results continues its chain. Chains that form a grid, each of some left
    operands with each of some right ones, are one call.
    """

    def __init__(self, translator):
        self.translator, self.chains = translator, []
        # Results that are yet to be computed: the chain of each, and the registers that hold it.
        self.waiting, self.holders = {}, {}

    def add(self, instruction):
        t = self.translator
        if instruction.opcode not in MMA or not all(isinstance(part, tuple) for part in instruction.operands):
            raise t.unknown()
        f = MMA[instruction.opcode]
        d, a, b, c = instruction.operands
        form = "f8" if f.bits == "f8" else "f4"
        left = tuple(t.get(token, f.bits) for token in a)
        right = tuple(t.get(token, f.bits) for token in b)
        if len(left) != f.columns * f.rows or len(right) != f.columns or len(c) != 2 * f.rows:
            raise t.unknown()
        chain = self.chain_of(c, form)
        if chain is None or chain["opcode"] != instruction.opcode:
            start = None if self.zeros(c) else tuple(t.get(token, form) for token in c)
            chain = {"opcode": instruction.opcode, "left": [], "right": [], "start": start, "here": t.here}
            self.chains.append(chain)
        else:
            for name in chain["results"]:
                del self.waiting[name]
        t.count += len(d)
        chain["results"] = tuple(f"v{t.count - k}" for k in range(len(d)))
        chain["left"].append(left)
        chain["right"].append(right)
        for register, name in zip(d, chain["results"]):
            self.waiting[name] = chain
            self.moved(register, name)
            t.put(register, form, name)

    def moved(self, register, name):
        """Notes that a register now holds a result."""
        if name in self.waiting:
            self.holders.setdefault(name, set()).add(register)

    def zeros(self, tokens):
        return all(self.translator.bits(token) == 0 for token in tokens)

    def chain_of(self, tokens, form):
        """The chain whose results are these registers, if no other instruction needs them."""
        t = self.translator
        if not all(token in t.env for token in tokens):
            return None
        names = tuple(t.env[token].name for token in tokens)
        chain = self.waiting.get(names[0])
        if chain is None or chain["results"] != names:
            return None
        written = set(t.instruction.operands[0])
        holders = [(register, name) for name in names for register in self.holders[name] - written]
        wanted = any(t.env[register].name == name and t.wanted(register) for register, name in holders)
        return None if wanted else chain

    def needed(self, name):
        if name in self.waiting:
            self.flush()

    def flush(self):
        """Emits the pending products."""
        grids = {}
        for chain in self.chains:
            rights = grids.setdefault((chain["opcode"], tuple(chain["left"]), chain["start"] is None), [])
            rights.append(chain)
        rows = {}
        for (opcode, left, zero), chains in grids.items():
            distinct = {tuple(chain["right"]): chain for chain in chains}
            if len(distinct) == len(chains):
                rows.setdefault((opcode, zero, tuple(distinct)), []).append((left, list(distinct.values())))
            else:
                for chain in chains:
                    key = opcode, zero, (tuple(chain["right"]),), id(chain)
                    rows[key] = [(left, [chain])]
        for key, grid in rows.items():
            self.write(key[0], key[2], grid, key[1])
        self.chains, self.waiting, self.holders = [], {}, {}

    def write(self, opcode, rights, grid, zero):
        t = self.translator
        steps = len(rights[0])
        a = [name for left, _ in grid for step in left for name in step]
        b = [name for right in rights for step in right for name in step]
        chains = [chain for _, row in grid for chain in row]
        c = None if zero else [name for chain in chains for name in chain["start"]]
        results = [name for chain in chains for name in chain["results"]]
        shape = len(grid), len(rights), steps
        operands = ", ".join("None" if x is None else f"({', '.join(x)},)" for x in (a, b, c))
        t.lines.append(f"{', '.join(results)} = mma(b, {opcode!r}, {shape}, {operands}, {chains[0]['here']})")


NAMES = {"load_matrices": load_matrices, "store_matrices": store_matrices, "mma": mma}
