"""Translates each basic block of a kernel into one Python function of numpy calls.

Between blocks registers are in a list, each in the numpy type in which it is used most. Arrays broadcast to (programs,
threads): a uniform value has one row, one column or both, and stays cheap.
"""

from collections import Counter
from types import SimpleNamespace

import numpy as np

from . import (
    arithmetic,
    bulk,
    copies,
    flow,
    formats,
    matrix,
    mbarrier,
    memory,
    products,
    shared,
    tensor,
    tensor_products,
    warp,
)
from .arithmetic import row_of
from .faults import Fault
from .parse import effects
from .tensor_operations import TensorOperations
from .values import FORMS, WIDTHS

GUARDED = {"ld", "st", "cp", "bra", "tcgen05", "mbarrier"}


class Translated:
    """A kernel's blocks with their functions, and the form of each register between blocks.

    forms: the type of each register in the list; index: its index there.
    """

    def __init__(self, kernel, approximate=None):
        self.kernel, self.blocks = kernel, flow.blocks(kernel)
        self.index, self.forms = {}, []
        self.accumulators = {
            name for each in kernel.code if each.opcode.startswith("wgmma.mma") for name in each.operands[0]
        }
        self.asynchronous = bool(self.accumulators)
        self.tensor = any(
            each.base in ("tcgen05", "mbarrier", "elect") or "bulk" in each.opcode for each in kernel.code
        )
        votes = usage(kernel)
        for name in sorted(set().union(*(set().union(*effects(each)) for each in kernel.code))):
            self.index[name] = len(self.forms)
            width = WIDTHS[kernel.type_of(name)]
            likely = [(n, form) for form, n in votes.get(name, {}).items() if width != "b1" and form[1:] == str(width)]
            form = max(likely, default=(0, width if width == "b1" else f"u{width}"))[1]
            self.forms.append("f4" if name in self.accumulators else form)
        self.constants, self.segments = {}, []
        self.names = namespace(approximate or formats.Approximate())
        numbers = iter(range(len(kernel.code)))
        source = "\n".join(BlockTranslator(self, block, numbers).source() for block in self.blocks)
        self.names |= {name: constant for name, constant in self.constants.values()}
        exec(compile(source, f"<{kernel.name}>", "exec"), self.names)
        self.functions = [self.names[f"block_{block.index}"] for block in self.blocks]
        self.alive = [[self.index[name] for name in sorted(block.alive)] for block in self.blocks]

    def constant(self, value, form):
        """The name of an array of one element."""
        key = FORMS[form].type(value).tobytes(), form
        if key not in self.constants:
            self.constants[key] = f"c{len(self.constants)}", np.full((1, 1), value, FORMS[form])
        return self.constants[key][0]


def namespace(approximate):
    """The names that translated code may use."""
    names = {form: dtype.type for form, dtype in FORMS.items()} | arithmetic.NAMES
    names |= {name: getattr(np, name) for name in ("where", "minimum", "maximum", "fmin", "fmax", "isnan", "sqrt")}
    names |= {name: getattr(np, name) for name in ("trunc", "rint", "floor", "ceil", "abs")}
    names |= {name: getattr(formats, name) for name in ("widen_bf16", "to_bf16", "bf16_pair", "f16_pair", "halves")}
    names |= {name: getattr(formats, name) for name in ("f32_pair", "joined_f32")}
    names |= {name: getattr(formats, name) for name in ("pack_bf16", "pack_f16", "to_tf32", "flush", "fma32", "fma64")}
    for module in (memory, shared, warp, matrix, copies, products, mbarrier, bulk, tensor, tensor_products):
        names |= module.NAMES
    return names | {"approximate": approximate, "float64": np.float64}


def usage(kernel):
    """How often each register is read or written in each form."""
    votes = {}
    for each in kernel.code:
        row = row_of(each)
        if row is None:
            continue
        for part, form in zip(each.operands, (row.result, *row.operands)):
            form = {"w4": "f4"}.get(form, form.split(">")[0])
            if form in FORMS and isinstance(part, str):
                votes.setdefault(part, Counter())[form] += 1
    return votes


class BlockTranslator(TensorOperations):
    """Writes the function of one block."""

    def source(self):
        result = None
        for place, each in enumerate(self.block.instructions):
            self.place, self.instruction = place, each
            if self.parent.asynchronous:
                self.count_registers(each)
            self.judge_loads(each)
            if each.base == "bra":
                result = self.mask() if each.guard else None
            elif each.base in ("bar", "ret") and self.block.end in ("barrier", "exit"):
                pass
            elif (row := row_of(each)) and (each.base != "mov" or isinstance(each.operands[0], str)):
                self.compute(row)
            else:
                method = getattr(self, f"op_{each.base}", None)
                if method is None or each.guard and each.base not in GUARDED:
                    raise self.unknown()
                method(*each.opcode.split(".")[1:])
        self.place = len(self.block.instructions)
        if self.loading:
            raise self.unknown("in a block that ends before tcgen05.wait::ld of an earlier load")
        self.save(sorted(self.block.alive_after))
        self.products.flush()
        body = "\n    ".join([*self.lines, f"return {result}"])
        return f"def block_{self.block.index}(b, R):\n    {body}\n"

    def number_of(self, each):
        return self.numbers[id(each)]

    @property
    def here(self):
        return self.number_of(self.instruction)

    def judge_loads(self, each):
        """Faults if an instruction touches a register that tcgen05.ld has yet to load."""
        for name in self.loading.keys() & set().union(*effects(each)):
            place = f"PTX line {self.loading[name].line} ({self.loading[name].source})"
            detail = f"{name}, loaded at {place}, without tcgen05.wait::ld"
            raise Fault("register", detail, self.kernel.name, None, each.line, each.source)

    def count_registers(self, each):
        """Notes which registers are touched between two instructions of wgmma."""
        if each.base == "wgmma":
            self.segment = None
            return
        if self.segment is None:
            self.segment = SimpleNamespace(reads={}, writes={})
            self.lines.append(f"segment(b, {len(self.parent.segments)})")
            self.parent.segments.append(self.segment)
        reads, writes = effects(each)
        for name in reads:
            self.segment.reads.setdefault(name, self.number_of(each))
        for name in writes:
            self.segment.writes.setdefault(name, self.number_of(each))
