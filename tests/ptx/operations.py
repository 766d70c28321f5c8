"""Translates instructions: arithmetic on registers, memory accesses, and the collective operations of warps.

What an instruction does is in arithmetic, memory, shared, warp, matrix, copies and products; here it becomes a call.
"""

import re

from . import products
from .arithmetic import TABLE
from .parse import MAP
from .values import NUMBER, SPECIAL, WIDTHS, Value, Values, bits_of

MEMORY_TYPES = {"b8": "u1", "b16": "u2", "b32": "u4", "b64": "u8", "u8": "u1", "s8": "i1", "u16": "u2", "s16": "i2"}
MEMORY_TYPES |= {"u32": "u4", "s32": "i4", "u64": "u8", "s64": "i8", "f32": "f4", "f64": "f8"}
MOVES = re.compile(r"mov\.(b|u|s|f)(16|32|64)$|mov\.pred$")


def address(text):
    """(base, offset) of [base + offset]."""
    base, _, offset = text[1:-1].partition("+")
    return base.strip(), int(offset.strip() or "0", 0)


class Computing(Values):
    """Arithmetic on registers."""

    def compute(self, row):
        each = self.instruction
        results, sources = each.operands[0], each.operands[1:]
        if len(sources) != len(row.operands):
            raise self.unknown("operands")
        if MOVES.match(each.opcode):
            self.move(row, results, sources[0])
            return
        forms = [self.aligned(form, sources) for form in row.operands]
        result = self.aligned(row.result, sources)
        short = self.shortcut(each, sources)
        if "|" in results:
            self.pairs(row, results.split("|"), sources)
        elif row.operands[0] in ("p2", "ph") and row.result == "b1":
            raise self.unknown("one predicate of a pair")
        else:
            expression = short or row.expression.format(*map(self.get, sources, forms))
            self.put(results, result, self.variable(expression))

    def aligned(self, form, sources):
        """The type of integers whose sign does not matter: signed if all registers have a signed form already."""
        if form[0] != "n":
            return form
        values = [self.value(token) for token in sources if token.startswith("%") and token not in SPECIAL]
        values = [value for value in values if value.form[0] != "b"]
        signed = values and all(f"i{form[1]}" in value.forms for value in values)
        return f"{'i' if signed else 'u'}{form[1]}"

    def move(self, row, register, token):
        if isinstance(token, tuple):
            self.pack(register, token)
            return
        if token.startswith("%") and token not in SPECIAL and self.instruction.guard is None:
            value = self.value(token)
            width = WIDTHS[self.kernel.type_of(register)]
            if width == (value.form if value.form == "b1" else int(value.form[1])):
                self.env[register] = value
                self.written.add(register)
                self.products.moved(register, value.name)
                return
        if NUMBER.match(token) and self.instruction.guard is None:
            width = WIDTHS[self.kernel.type_of(register)]
            form = width if width == "b1" else f"u{width}"
            bits = bits_of(token) & (1 << 8 * width) - 1 if width != "b1" else int(bits_of(token) != 0)
            self.env[register] = Value(form, self.number(token, form), bits)
            self.written.add(register)
            return
        form = self.aligned(row.result, (token,))
        self.put(register, form, self.get(token, form))

    def pack(self, register, parts):
        """mov of a vector into a register: the first element is lowest."""
        if len(parts) != 2:
            raise self.unknown()
        size = WIDTHS[self.kernel.type_of(register)] // 2
        low, high = (self.get(part, f"u{size}>u{2 * size}") for part in parts)
        self.put(register, f"u{2 * size}", self.variable(f"{low} | {high} << u{2 * size}({8 * size})"))

    def op_mov(self, kind):
        """mov of a register into a vector."""
        each = self.instruction
        if each.guard or len(each.operands[0]) != 2:
            raise self.unknown()
        size = int(kind[1:]) // 16
        value = self.value(each.operands[1])
        if "halves" not in value.forms:
            source = self.get(each.operands[1], f"u{2 * size}")
            self.count += 2
            low, high = f"v{self.count - 1}", f"v{self.count}"
            self.lines.append(f"{low}, {high} = halves({source})")
            value.forms["halves"] = low, high
        for register, name in zip(each.operands[0], value.forms["halves"]):
            self.put(register, f"u{size}", name)

    def pairs(self, row, registers, sources):
        """setp of both halves."""
        operands = [self.get(token, form) for token, form in zip(sources, row.operands)]
        for half, register in enumerate(registers):
            self.put(register, "b1", self.variable(row.expression.format(*(f"{name}[{half}]" for name in operands))))

    def shortcut(self, each, sources):
        """A cheaper expression where operands are literal numbers, or None."""
        base, kind = each.base, each.opcode.rsplit(".", 1)[1]
        numbers = [self.bits(token) for token in sources]
        if base in ("shl", "shr") and numbers[1] is not None and 0 <= numbers[1] < int(kind[1:]):
            form = TABLE[each.opcode].operands[0]
            return f"{self.get(sources[0], form)} {'<<' if base == 'shl' else '>>'} {self.get(sources[1], form)}"
        if base == "bfe" and kind[0] == "u" and None not in numbers[1:] and 0 <= sum(numbers[1:]) <= int(kind[1:]):
            form = f"u{int(kind[1:]) // 8}"
            shift, mask = self.parent.constant(numbers[1], form), self.parent.constant((1 << numbers[2]) - 1, form)
            return f"{self.get(sources[0], form)} >> {shift} & {mask}"
        if base == "prmt" and numbers[2] is not None and not numbers[2] & 0x8888:
            return self.permuted(sources, numbers[2])
        return None

    def permuted(self, sources, selector):
        """prmt by a literal number without sign bits: runs of bytes that stay together, shifted and masked."""
        terms = []
        for operand, token in enumerate(sources[:2]):
            if self.bits(token) == 0:
                continue
            shifts = {}
            for place in range(4):
                choice = selector >> 4 * place & 7
                if choice // 4 == operand:
                    shifts.setdefault(place - choice % 4, []).append(place)
            name = self.get(token, "u4")
            for by, places in shifts.items():
                mask = self.parent.constant(sum(0xFF << 8 * place for place in places), "u4")
                moved = name if by == 0 else f"({name} {'<<' if by > 0 else '>>'} u4({8 * abs(by)}))"
                terms.append(f"{moved} & {mask}")
        return " | ".join(f"({term})" for term in terms) or self.parent.constant(0, "u4")


class Operations(Computing):
    """Memory, collective operations of warps, and asynchronous operations."""

    def access(self, kinds):
        """(space, form, count) from the modifiers of a load or a store."""
        space, *vector, kind = kinds
        if space not in ("global", "shared") or kind not in MEMORY_TYPES or vector not in ([], ["v2"], ["v4"]):
            raise self.unknown()
        return space, MEMORY_TYPES[kind], int(vector[0][1]) if vector else 1

    def op_ld(self, *kinds):
        each = self.instruction
        if kinds[0] == "param":
            self.parameter(kinds[1:])
            return
        space, form, count = self.access(kinds)
        registers = each.operands[0] if isinstance(each.operands[0], tuple) else (each.operands[0],)
        if len(registers) != count:
            raise self.unknown()
        base, offset = address(each.operands[1])
        size = int(form[1])
        index = self.parent.index.get(registers[0])
        if index is not None and self.parent.forms[index][1] == form[1] and kinds[-1][0] == "b":
            form = self.parent.forms[index]  # the form in which it will be used
        place = self.get(base, "u8" if space == "global" else "address")
        mask, old = self.mask(), "None"
        if mask != "None":
            old = f"({' '.join(self.before(register, form) + ',' for register in registers)})"
        call = f"{space}_load(b, {place}, {offset}, {size}, {count}, {form}, {mask}, {old}, {self.here})"
        self.count += count
        names = [f"v{self.count - k}" for k in range(count)]
        self.lines.append(f"{', '.join(names)}{',' * (count == 1)} = {call}")
        for register, name in zip(registers, names):
            self.put(register, form, name, merged=True)

    def before(self, register, form):
        """A register's value before a load, in the load's form."""
        if register == "_":
            return self.parent.constant(0, form)
        return self.get(register, form)

    def parameter(self, kinds):
        each = self.instruction
        name, form = each.operands[1][1:-1].strip(), MEMORY_TYPES[kinds[0]]
        index = next((k for k, param in enumerate(self.kernel.params) if param[0] == name and param[1] != MAP), None)
        if index is None or len(kinds) != 1:
            raise self.unknown()
        self.put(each.operands[0], form, self.variable(f"b.batch.params[{index}].astype(u{form[1]}).view({form})"))

    def op_st(self, *kinds):
        each = self.instruction
        space, form, count = self.access(kinds)
        tokens = each.operands[1] if isinstance(each.operands[1], tuple) else (each.operands[1],)
        if len(tokens) != count:
            raise self.unknown()
        base, offset = address(each.operands[0])
        place = self.get(base, "u8" if space == "global" else "address")
        values = " ".join(self.stored(token, form) + "," for token in tokens)
        size = int(form[1])
        self.lines.append(f"{space}_store(b, {place}, {offset}, {size}, ({values}), {self.mask()}, {self.here})")

    def stored(self, token, form):
        """The variable to store: any type of the size will do."""
        if token.startswith("%"):
            value = self.value(token)
            self.products.needed(value.name)
            if value.form[1] == form[1]:
                return value.name
        return self.get(token, f"u{form[1]}")

    def shared_address(self, token):
        base, offset = address(token)
        return self.get(base, "address"), offset

    def matrices(self, kinds):
        """(number of matrices, whether they are transposed) of ldmatrix and stmatrix."""
        text = ".".join(kinds)
        found = re.fullmatch(r"sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", text)
        if not found:
            raise self.unknown()
        return int(found[1]), bool(found[2])

    def op_ldmatrix(self, *kinds):
        count, transposed = self.matrices(kinds)
        registers = self.instruction.operands[0]
        place, offset = self.shared_address(self.instruction.operands[1])
        self.count += count
        names = [f"v{self.count - k}" for k in range(count)]
        call = f"load_matrices(b, {place}, {offset}, {count}, {transposed}, {self.here})"
        self.lines.append(f"{', '.join(names)}{',' * (count == 1)} = {call}")
        for register, name in zip(registers, names, strict=True):
            self.put(register, "u4", name)

    def op_stmatrix(self, *kinds):
        count, transposed = self.matrices(kinds)
        place, offset = self.shared_address(self.instruction.operands[0])
        values = " ".join(self.get(token, "u4") + "," for token in self.instruction.operands[1])
        self.lines.append(f"store_matrices(b, {place}, {offset}, ({values}), {transposed}, {self.here})")

    def op_mma(self, *kinds):
        self.products.add(self.instruction)

    def op_shfl(self, *kinds):
        each = self.instruction
        if kinds[0] != "sync" or kinds[1] not in ("bfly", "idx", "up", "down") or kinds[2:] != ("b32",):
            raise self.unknown()
        registers = [name.strip() for name in each.operands[0].split("|")]
        form = self.aligned("n4", each.operands[1:2])
        operands = [self.get(each.operands[1], form), *(self.get(token, "u4") for token in each.operands[2:])]
        self.count += 2
        names = f"v{self.count - 1}", f"v{self.count}"
        self.lines.append(f"{names[0]}, {names[1]} = shuffle(b, {kinds[1]!r}, {', '.join(operands)}, {self.here})")
        for register, name, kind in zip(registers, names, (form, "b1")):
            self.put(register, kind, name)

    def op_redux(self, *kinds):
        known = {("add", "s32"): ("add", "u4"), ("add", "u32"): ("add", "u4"), ("max", "f32"): ("fmax", "f4")}
        if kinds[0] != "sync" or kinds[1:] not in known:
            raise self.unknown()
        name, form = known[kinds[1:]]
        register, value, members = self.instruction.operands
        call = f"reduce(b, {name!r}, {self.get(value, form)}, {self.get(members, 'u4')}, {self.here})"
        self.put(register, form, self.variable(call))

    def op_bar(self, *kinds):
        """bar.warp.sync: warps run in step here."""
        if kinds != ("warp", "sync"):
            raise self.unknown()
        self.lines.append(f"warp_barrier(b, {self.get(self.instruction.operands[0], 'u4')}, {self.here})")

    def op_trap(self):
        self.lines.append(f"trap(b, {self.here})")

    def op_cp(self, *kinds):
        operands = self.instruction.operands
        if kinds == ("async", "commit_group") and not self.instruction.guard:
            self.lines.append("commit_copies(b)")
        elif kinds == ("async", "wait_group") and not self.instruction.guard:
            self.lines.append(f"wait_copies(b, {int(operands[0], 0)}, {self.here})")
        elif kinds == ("async", "wait_all") and not self.instruction.guard:
            self.lines.append(f"commit_copies(b); wait_copies(b, 0, {self.here})")
        elif kinds in (("async", "ca", "shared", "global"), ("async", "cg", "shared", "global")):
            place, offset = self.shared_address(operands[0])
            base, source_offset = address(operands[1])
            size = int(operands[2], 0)
            if size not in ((16,) if kinds[1] == "cg" else (4, 8, 16)) or len(operands) not in (3, 4):
                raise self.unknown()
            given = self.get(operands[3], "u4") if len(operands) == 4 else "None"
            source = f"{self.get(base, 'u8')}, {source_offset}"
            self.lines.append(f"copy(b, {place}, {offset}, {source}, {size}, {given}, {self.mask()}, {self.here})")
        else:
            raise self.unknown()

    def op_fence(self, *kinds):
        if kinds != ("proxy", "async", "shared::cta"):
            raise self.unknown()
        self.lines.append("b.batch.shared.fence(b)")

    def op_wgmma(self, *kinds):
        if kinds == ("fence", "sync", "aligned"):
            self.lines.append("fence_registers(b)")
        elif kinds == ("commit_group", "sync", "aligned"):
            self.release(self.parent.accumulators)
            self.lines.append("commit_products(b, R)")
        elif kinds == ("wait_group", "sync", "aligned"):
            self.release(self.parent.accumulators)
            self.lines.append(f"wait_products(b, {int(self.instruction.operands[0], 0)}, R, {self.here})")
        else:
            self.product(kinds)

    def product(self, kinds):
        operands = self.instruction.operands
        shape = re.fullmatch(r"mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(\w+)\.(\w+)", ".".join(kinds))
        bits16 = shape and shape[3] in ("bf16", "f16")
        in_registers = isinstance(operands[1], tuple)
        flags = tuple(map(int, operands[4:]))
        known = (
            shape and shape[3] == shape[4] and (shape[3], shape[2]) in (("bf16", "16"), ("f16", "16"), ("tf32", "8"))
        )
        if not known or len(operands[0]) != int(shape[1]) // 2 or flags[:2] != (1, 1):
            raise self.unknown()
        if len(flags) != 2 + (bits16 and (1 if in_registers else 2)):
            raise self.unknown()
        transposed = (False if in_registers else flags[2] == 1, flags[-1] == 1) if bits16 else (False, False)
        self.release(self.parent.accumulators)
        if in_registers:
            a = f"({', '.join(self.get(token, 'u4') for token in operands[1])})"
        else:
            a = self.get(operands[1], "u8")
        b, scale = self.get(operands[2], "u8"), self.get(operands[3], "b1")
        form = products.Form(int(shape[1]), int(shape[2]), shape[3], *transposed)
        registers = tuple(self.parent.index[name] for name in operands[0])
        name = f"product_{self.here}"
        self.parent.names[name] = form, registers, operands[0], operands[1] if in_registers else ()
        self.lines.append(f"product(b, {name}, {a}, {b}, {scale}, {self.here})")
