"""Reads Triton's GPU dialect for products on sm_90 whose operands are overwritten before they have been read.

A product there (`ttng.warp_group_dot`) reads its operands from shared memory while the program goes on, until a wait
leaves fewer products pending. In a pipelined loop the operands of the next iteration are copied meanwhile, into other
slots of their buffer. Where the buffer has one slot, the copy overwrites what the product still reads: no error, but
wrong values. The left operand may be in registers instead, of which there is one set: a product that is still in flight
in the next iteration may find them overwritten (https://github.com/triton-lang/triton/issues/9433).

Not checked: that several slots are used in turn, and sm_100's products, which end at barriers.
"""

import re
from typing import NamedTuple

_NAME = r"%[\w$-]+(?:#\d+)?"
_OP = re.compile(r"(?:(%[\w$-]+)(?::(\d+))? = )?\"?([a-z]\w*(?:\.\w+)+)\"?(.*)")
_SLOTS = re.compile(r"-> !ttg\.memdesc<(\d+)x\d+x\d+x")
# Operations whose result is part of the buffer of their first operand.
_VIEWS = tuple(f"memdesc_{view}" for view in ("index", "subview", "subslice", "trans", "reshape", "reinterpret"))
# Operations that write the buffer of an operand.
_WRITES = ("async_copy_global_to_local", "async_tma_copy_global_to_local", "local_store")


class _Buffer(NamedTuple):
    """A buffer in shared memory: the name of its allocation, and how many slots it has."""

    name: str
    slots: int


class _Line(NamedTuple):
    """An operation: the names of its results, its own name, the rest of its line and the lines of its regions."""

    results: list
    op: str
    rest: str
    inner: list


def _tree(lines):
    """The operations up to the end of a region, with those of inner regions nested in them."""
    found = []
    for line in lines:
        line = re.sub(r" loc\(.*\)$", "", line.strip())
        if line.startswith("}") and not line.endswith("{"):
            return found
        match = _OP.match(line)
        name, count, op, rest = match.groups() if match else (None, None, "", line)
        results = [name, *(f"{name}#{i}" for i in range(int(count or 0)))] if name else []
        if line.startswith("}"):  # `} else {` continues the region before
            found += _tree(lines)
            return found
        found.append(_Line(results, op.split(".")[-1], rest, _tree(lines) if line.endswith("{") else []))
    return found


class _Walk:
    """Walks through the operations in order, each loop twice, and tracks the products in flight."""

    def __init__(self):
        self.buffers, self.flight, self.found, self.products = {}, [], [], 0

    def _find(self, text):
        if text not in self.found:
            self.found.append(text)

    def _written(self, buffer, line):
        if any(buffer in operands for _, operands in self.flight) and buffer.slots == 1:
            self._find(f"{line.op} overwrites {buffer.name}, which a product in flight still reads")

    def _step(self, line):
        names = re.findall(_NAME, line.rest)
        buffers = [self.buffers[name] for name in names if name in self.buffers]
        for left, _ in self.flight:
            if left in line.results and left not in self.buffers:
                self._find(f"{line.op} writes the registers {left}, which a product in flight still reads")
        if line.op == "local_alloc":
            slots = _SLOTS.search(line.rest)
            # A buffer that is made from a value has no slots, and is written here.
            buffer = _Buffer(line.results[0], int(slots[1]) if slots and not names else 1)
            self.buffers[line.results[0]] = buffer
            if names:
                self._written(buffer, line)
        elif line.op in _VIEWS and buffers:
            self.buffers[line.results[0]] = buffers[0]
        elif line.op == "warp_group_dot":
            self.products += 1
            self.flight.append((names[0], buffers))
            if "isAsync = true" not in line.rest:
                self.flight.clear()
        elif line.op == "warp_group_dot_wait":
            pending = int(re.search(r"pendings = (\d+)", line.rest)[1])
            self.flight = self.flight[len(self.flight) - pending :] if pending else []
            results = line.results[1:] or line.results
            self.buffers.update({r: self.buffers[n] for r, n in zip(results, names) if n in self.buffers})
        elif line.op in _WRITES:
            for buffer in buffers:
                self._written(buffer, line)

    def go(self, lines):
        for line in lines:
            self._step(line)
            if line.op in ("for", "while"):
                carried = re.findall(rf"({_NAME}) = ({_NAME})", line.rest)
                self.buffers.update({a: self.buffers[b] for a, b in carried if b in self.buffers})
                self.go(line.inner)
            self.go(line.inner)


def overwritten(ttgir):
    """(a line for each operand that is overwritten while a product reads it, how many products were seen).

    Loops are walked twice, and their products count twice.
    """
    walk = _Walk()
    walk.go(_tree(iter(ttgir.splitlines())))
    return walk.found, walk.products
