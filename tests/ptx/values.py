"""What registers hold while a block is translated: variables of its function, and their forms.

Every result is a new variable that is never written again, so that moves cost nothing, and reinterpretations and
conversions of one value are made once.
"""

import re
from bisect import bisect_right

import numpy as np

from .faults import Fault
from .matrix import Products
from .parse import MAP, effects

FORMS = {name: np.dtype(name) for name in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")}
FORMS["b1"] = np.dtype(bool)
WIDTHS = {"pred": "b1", "b16": 2, "b32": 4, "b64": 8, "u16": 2, "s16": 2, "u32": 4, "s32": 4, "u64": 8, "s64": 8}
WIDTHS |= {"f16": 2, "f32": 4, "f64": 8}
SPECIAL = {"%tid.x": "b.tid", "%laneid": "b.lane", "%ntid.x": "b.batch.ntid"}
SPECIAL |= {f"%ctaid.{x}": f"b.ctaid[{i}]" for i, x in enumerate("xyz")}
SPECIAL |= {f"%nctaid.{x}": f"b.batch.nctaid[{i}]" for i, x in enumerate("xyz")}
NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$|0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$")

# Forms without a numpy type: the function that reads them, and the form that it reads.
READ_BY = {"bf": ("widen_bf16", "u2"), "p2": ("bf16_pair", "u4"), "ph": ("f16_pair", "u4"), "pf": ("f32_pair", "u8")}


def bits_of(token):
    """The bits of a literal number."""
    if token[:2] in ("0f", "0F", "0d", "0D"):
        return int(token[2:], 16)
    return int(token.rstrip("U"), 0)


class Value:
    """What a register holds: the variable of each form that has been needed; its bits if it is a literal number."""

    def __init__(self, form, name, bits=None):
        self.form, self.forms, self.bits = form, {form: name}, bits

    @property
    def name(self):
        return self.forms[self.form]


class Values:
    """The variables of one block's function, and the lines that make them."""

    def __init__(self, parent, block, numbers):
        self.parent, self.kernel, self.block = parent, parent.kernel, block
        self.lines, self.count, self.env, self.written, self.specials = [], 0, {}, set(), {}
        self.numbers = {id(each): next(numbers) for each in block.instructions}
        self.products, self.segment = Products(self), None
        self.loading = {}  # the registers that tcgen05.ld has yet to load, and the instruction of each
        self.reads_at, self.writes_at = {}, {}
        for place, each in enumerate(block.instructions):
            reads, writes = effects(each)
            for name in reads:
                self.reads_at.setdefault(name, []).append(place)
            for name in writes:
                self.writes_at.setdefault(name, []).append(place)

    def variable(self, expression):
        self.count += 1
        name = f"v{self.count}"
        self.lines.append(f"{name} = {expression}")
        return name

    def unknown(self, what=""):
        each = self.instruction
        text = f"{each.opcode} {', '.join(map(str, each.operands))} {what}"
        return Fault("instruction", text.strip(), self.kernel.name, None, each.line, each.source)

    def wanted(self, register):
        """Whether a register's value is read after the current instruction."""
        reads, writes = self.reads_at.get(register, ()), self.writes_at.get(register, ())
        k, w = bisect_right(reads, self.place), bisect_right(writes, self.place)
        if k < len(reads) and (w == len(writes) or reads[k] <= writes[w]):
            return True
        return w == len(writes) and register in self.block.alive_after

    def value(self, register):
        if register not in self.env:
            index = self.parent.index[register]
            self.env[register] = Value(self.parent.forms[index], self.variable(f"R[{index}]"))
        return self.env[register]

    def get(self, token, form):
        """The variable of an operand in a form."""
        if NUMBER.match(token):
            return self.number(token, form)
        if token in SPECIAL:
            return self.convert(self.specials.setdefault(token, Value("u4", SPECIAL[token])), form)
        if token in self.kernel.symbols:
            return self.number("0", form)
        if (token, MAP) in self.kernel.params:
            return self.convert(Value("u8", f"b.batch.params[{self.kernel.params.index((token, MAP))}]"), form)
        if not token.startswith("%"):
            raise self.unknown(f"operand {token}")
        value = self.value(token)
        self.products.needed(value.name)
        return self.convert(value, form)

    def bits(self, token):
        """The bits of an operand that is a literal number, or None."""
        if NUMBER.match(token):
            return bits_of(token)
        return self.env[token].bits if token in self.env else None

    def number(self, token, form):
        kind, bits = form.split(">")[-1], bits_of(token)
        if kind == "b1":
            return self.parent.constant(bool(bits), "b1")
        kind = {"w4": "f4", "bf": "u2", "p2": "u4", "ph": "u4", "pf": "u8", "wf": "u8", "address": "u4"}.get(kind, kind)
        size = int((form if ">" in form else kind)[1])
        value = np.array(bits & (1 << 8 * size) - 1, f"u{size}").view(form.split(">")[0] if ">" in form else kind)[()]
        if form == "w4":
            return self.parent.constant(value, "f8")
        if form in (*READ_BY, "wf", "address"):
            return self.convert(Value(kind, self.parent.constant(value, kind)), form)
        return self.parent.constant(value, kind)

    def convert(self, value, form):
        """A value in another form: its bits reinterpreted, or converted; cached."""
        if form in value.forms:
            return value.forms[form]
        if value.bits is not None:
            return self.number(str(value.bits), form)
        if form in ("w4", "wf"):
            name = self.variable(f"{self.convert(value, 'f4' if form == 'w4' else 'pf')}.astype(f8)")
        elif ">" in form:
            source, wide = form.split(">")
            name = self.variable(f"{self.convert(value, source)}.astype({wide})")
        elif form in READ_BY:
            function, source = READ_BY[form]
            name = self.variable(f"{function}({self.convert(value, source)})")
        elif form == "address":
            name = self.variable(f"Address({self.convert(value, 'u4')})")
        elif value.form == "b1" or form == "b1":
            raise self.unknown(f"a predicate among {form}")
        elif value.form[1] == form[1]:
            name = self.variable(f"{value.name}.view({form})")
        elif value.form[1] < form[1]:
            raise self.unknown(f"{form} of a register of {value.form}")
        else:
            narrow = f"u{form[1]}"
            if form == narrow:
                name = self.variable(f"{value.name}.astype({narrow})")
            else:
                name = self.variable(f"{self.convert(value, narrow)}.view({form})")
        value.forms[form] = name
        return name

    def put(self, register, form, name, merged=False):
        """Sets a register's new value, extended to the register's width with the sign or with zeros.

        merged: the value already has the old one where the guard does not hold.
        """
        if register == "_":
            return
        width = WIDTHS[self.kernel.type_of(register)]
        pair = name if form == "pf" else None
        if form == "bf":
            form, name = "u2", self.variable(f"to_bf16({name})")
        elif pair:
            form, name = "u8", self.variable(f"joined_f32({name})")
        if (width == "b1") != (form == "b1"):
            raise self.unknown(f"{form} into {register}")
        if form != "b1" and int(form[1]) < width:
            wide = f"{form[0] if form[0] == 'i' else 'u'}{width}"
            form, name = wide, self.variable(f"{name}.astype({wide})")
        elif form != "b1" and int(form[1]) > width:
            raise self.unknown(f"{form} into {register}")
        mask = self.mask()
        if mask != "None" and not merged:
            name, pair = self.variable(f"where({mask}, {name}, {self.get(register, form)})"), None
        self.env[register] = Value(form, name)
        if pair:
            self.env[register].forms["pf"] = pair
        self.written.add(register)

    def mask(self):
        """The variable of the guard, or "None"."""
        guard = self.instruction.guard
        if guard is None:
            return "None"
        value = self.get(guard[0], "b1")
        if not guard[1]:
            return value
        forms = self.value(guard[0]).forms
        if "not" not in forms:
            forms["not"] = self.variable(f"~{value}")
        return forms["not"]

    def save(self, registers):
        """Stores those of the registers that have been written into the list."""
        for register in registers:
            if register in self.written:
                index = self.parent.index[register]
                self.lines.append(f"R[{index}] = {self.get(register, self.parent.forms[index])}")

    def release(self, registers):
        """From here on these registers' values are in the list, as calls change them there."""
        self.save(sorted(registers & self.written))
        for register in registers:
            self.env.pop(register, None)
        self.written -= registers
