"""The faults that stop a kernel."""

import numpy as np

KINDS = {
    "instruction": "an instruction, or a form of one, that is not known here",
    "descriptor": "a tensor descriptor that the hardware does not allow, or a copy without one",
    "stray": "an access to global memory outside every tensor",
    "misaligned": "an address that is not a multiple of the access's size",
    "outside": "an access past the end of shared memory, or to tensor memory that is not allocated or another warp's",
    "undelivered": "an access to shared memory that a copy in flight has yet to write, or to tensor memory, a store",
    "overwritten": "a write to shared or tensor memory that a product in flight still reads",
    "race": "two warps of a program at one address of memory, one of them writing, and no barrier in between",
    "proxy": "a product or a bulk copy of what stores or cp.async have written, without fence.proxy.async in between",
    "register": "a register or tensor memory of a product or load in flight, or one that no fence has ordered before",
    "mbarrier": "an operation where no mbarrier is, an ordinary access where one is, or what its phase does not expect",
    "barrier": "a barrier that not all threads of the program reach, or an mbarrier that nothing arrives at",
    "pending": "a program that ends without a wait for its copies or products, or keeps its tensor memory",
    "divergence": "an instruction of whole warps that some threads of a warp do not reach, or not with one operand",
    "trap": "trap",
}


def row_of(where):
    """The index of a program at fault: given directly, or the first with a flag in (programs, threads)."""
    if isinstance(where, np.ndarray):
        return int(np.flatnonzero(where.any(axis=1))[0]) if len(where) > 1 else 0
    return where


class Fault(Exception):
    """A kernel has done something that the machine forbids.

    kind: a key of KINDS. kernel: its name. program: its index (x, y, z), or None if the fault is not one program's.
    line, source: the line of the PTX, and the position in Python that it was compiled from.
    """

    def __init__(self, kind, detail, kernel=None, program=None, line=None, source=None):
        assert kind in KINDS, kind
        self.kind, self.detail, self.kernel = kind, detail, kernel
        self.program, self.line, self.source = program, line, source
        super().__init__(kind, detail)

    def __str__(self):
        return (
            f"{self.kind}: {self.detail} ({self.kernel}, program {self.program}, PTX line {self.line}, {self.source})"
        )
