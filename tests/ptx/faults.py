"""What a kernel is stopped for."""

KINDS = {
    "instruction": "an instruction, or a form of one, that is not known here",
    "stray": "an access to global memory outside every tensor",
    "misaligned": "an address that is no multiple of the access's size",
    "outside": "an access past the end of shared memory",
    "undelivered": "an access to shared memory that a copy in flight has yet to write",
    "overwritten": "a write to shared memory that a product in flight still reads",
    "race": "two warps of a program at one address of memory, one of them writing, and no barrier in between",
    "proxy": "a product that reads what stores or copies have written, without fence.proxy.async in between",
    "register": "a register of a product in flight, or one that wgmma.fence has not ordered before a product",
    "barrier": "a barrier that not all threads of the program reach",
    "pending": "a program that ends without a wait for its copies or products",
    "divergence": "an instruction of whole warps that some threads of a warp do not reach, or not with one operand",
    "trap": "trap",
}


class Fault(Exception):
    """A kernel does what the machine forbids.

    kind: a key of KINDS. kernel: its name. program: its index (x, y, z), or None if the fault is of no one program.
    line, source: the line of the PTX, and the place in Python that it was compiled from.
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
