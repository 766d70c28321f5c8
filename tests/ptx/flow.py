"""Basic blocks of a kernel, and which registers are live where."""

from dataclasses import dataclass, field

from .faults import Fault
from .parse import effects


@dataclass
class Block:
    """Instructions that run one after the other.

    last: the index of its last instruction. end: how control leaves it: "next", "jump", "branch" (to the target if the
    last instruction's guard holds, or else to the next block), "barrier" (and then to the next block) or "exit". alive:
    the registers that are read before they are written from the block's start on; alive_after: from its end on.
    """

    index: int
    instructions: list
    last: int
    end: str = "next"
    target: int | None = None
    barrier: int | None = None
    alive: set = field(default_factory=set)
    alive_after: set = field(default_factory=set)

    def successors(self):
        following = () if self.end in ("jump", "exit") else (self.index + 1,)
        return following if self.target is None else (*following, self.target)


def blocks(kernel):
    """The kernel's blocks; each barrier ends one."""
    code = kernel.code
    starts = {0, *kernel.labels.values()}
    starts |= {i + 1 for i, each in enumerate(code) if each.base in ("bra", "bar", "ret", "trap")}
    starts = sorted(i for i in starts if i < len(code))
    number = {start: k for k, start in enumerate(starts)}
    found = []
    for k, (start, stop) in enumerate(zip(starts, [*starts[1:], len(code)])):
        block = Block(k, code[start:stop], stop - 1)
        close(kernel, block, number)
        found.append(block)
    if found[-1].end in ("next", "branch", "barrier"):
        raise Fault("instruction", "a kernel that does not end in ret", kernel.name)
    live(found)
    return found


def close(kernel, block, number):
    """Takes the control instruction off the block's end."""
    last = block.instructions[-1]
    if last.opcode in ("bra", "bra.uni"):
        block.end = "branch" if last.guard else "jump"
        block.target = number[kernel.labels[last.operands[0]]]
    elif last.opcode == "bar.sync":
        if len(last.operands) != 1 or not last.operands[0].isdigit() or last.guard:
            raise Fault("instruction", "a barrier of a part of the threads", kernel.name, None, last.line, last.source)
        block.end, block.barrier = "barrier", int(last.operands[0])
    elif last.opcode == "ret" and not last.guard:
        block.end = "exit"


def live(found):
    """Fills in the live registers: read before they are written, in a block or after it."""
    summaries = []
    for block in found:
        first_read, written = set(), set()
        for each in block.instructions:
            reads, writes = effects(each)
            first_read.update(name for name in reads if name not in written)
            written.update(writes)
        summaries.append((first_read, written))
    changed = True
    while changed:
        changed = False
        for block, (first_read, written) in zip(reversed(found), reversed(summaries)):
            after = set().union(*(found[k].alive for k in block.successors()))
            before = first_read | (after - written)
            if before != block.alive or after != block.alive_after:
                block.alive, block.alive_after, changed = before, after, True
