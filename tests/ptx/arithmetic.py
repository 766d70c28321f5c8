"""The instructions that compute registers from registers: what each is in numpy.

`TABLE` has a row for each opcode, written out with its modifiers and its type; any other opcode is unknown. A row has
the form of the result, the forms of the operands, and an expression of numpy in which {0}, {1}, ... are the operands. A
form is one of numpy's types: u2, i4, f8, ... or
    n2, n4, n8   an integer whose sign does not matter,
    b1           a predicate,
    bf           16 bits, read and written as bfloat16 through float32,
    p2, ph       32 bits, read as a pair of bfloat16 or float16 (see formats.both_halves),
    pf           64 bits, read and written as a pair of float32 along one more axis,
    w4, wf       float32, or a pair of it, as float64, for sums with one rounding,
    i4>i8        an integer, converted to a wider one.

Sources: PTX ISA 9.0, sections "Integer Arithmetic Instructions", "Floating Point Instructions", "Half Precision
Floating Point Instructions", "Comparison and Selection Instructions", "Logic and Shift Instructions" and "Data Movement
and Conversion Instructions".
"""

from dataclasses import dataclass

import numpy as np

from .formats import F2, F8, U2, U4, U8, fma_odd, halves, to_bf16

I2, I4, I8 = np.int16, np.int32, np.int64


@dataclass(frozen=True)
class Row:
    """The forms of result and operands, and an expression of the operands."""

    result: str
    operands: tuple
    expression: str


TABLE = {}


def row(opcode, result, operands, expression):
    TABLE[opcode] = Row(result, tuple(operands.split()), expression)


def row_of(instruction):
    """An instruction's row, or None. Opcodes such as max have a row of their own for three operands."""
    return TABLE.get(f"{instruction.opcode} of {len(instruction.operands) - 1}") or TABLE.get(instruction.opcode)


def quotient(a, b):
    """a / b rounded towards zero; all bits are set where b is 0 (the ISA leaves the result open)."""
    if a.dtype.itemsize < 8:
        result = (a / b).astype(I8)  # float64 holds both, and never rounds up past the quotient
        return np.where(b == 0, -1, result).astype(a.dtype)
    a, b = np.broadcast_arrays(a, b)
    divisor = np.where(b == 0, b.dtype.type(1), b)
    result = a // divisor
    if a.dtype.kind == "i":
        result = result + ((result < 0) & (result * divisor != a))
    return np.where(b == 0, ~np.zeros_like(a), result)


def remainder(a, b):
    """a - b * (a / b); a where b is 0 (the ISA leaves the result open)."""
    return np.where(b == 0, a, a - b * quotient(a, b)).astype(a.dtype)


def upper_product(a, b):
    """The upper half of the product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{bits // 4}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(bits)).astype(a.dtype)
    mask, half = U8(0xFFFFFFFF), U8(32)
    a0, a1, b0, b1 = a & mask, a >> half, b & mask, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    return a1 * b1 + (middle >> half) + ((middle & mask) + a0 * b1 >> half)


def shift_left(a, by):
    """shl: zero if the count reaches the type's width."""
    bits = a.dtype.itemsize * 8
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a, by):
    """shr: fills with the sign, or with zeros if the type has none; a count past the width counts as the width."""
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


def extract(a, position, length):
    """bfe: the bits from a position on, extended with the sign (that of the last existing bit) or with zeros."""
    bits = a.dtype.itemsize * 8
    position, length = (x.astype(I8) & 0xFF for x in (position, length))
    unsigned = a.view(np.dtype(f"u{bits // 8}"))
    inside = np.clip(np.minimum(length, bits - position), 0, bits)
    value = shift_right(shift_left(unsigned, bits - inside - np.minimum(position, bits - inside)), bits - inside)
    if a.dtype.kind == "u":
        return value
    last = np.minimum(position + length - 1, bits - 1)
    sign = np.where(length > 0, shift_right(unsigned, np.maximum(last, 0)) & unsigned.dtype.type(1), 0)
    filled = value | shift_left(~np.zeros_like(value), inside)
    return np.where(sign == 1, filled, value).astype(unsigned.dtype).view(a.dtype)


def insert(a, b, position, length):
    """bfi: b with `length` bits of a from a position on."""
    position, length = (x.astype(I8) & 0xFF for x in (position, length))
    ones = ~np.zeros((1, 1), a.dtype)
    mask = shift_left(~shift_left(ones, length), position)
    return (b & ~mask) | (shift_left(a, position) & mask)


def permute(a, b, selector):
    """prmt: four of the eight bytes of a and b, or their signs."""
    both = a.astype(U8) | (b.astype(U8) << U8(32))
    result = np.zeros((1, 1), U4)
    for i in range(4):
        choice = selector >> U4(4 * i) & U4(15)
        byte = (both >> ((choice & U4(7)) * U4(8)).astype(U8)).astype(U4) & U4(0xFF)
        if (choice & U4(8)).any():
            byte = np.where(choice & U4(8) != 0, (byte >> U4(7)) * U4(0xFF), byte)
        result = result | byte << U4(8 * i)
    return result


def each_half(f):
    """f of both 16-bit halves of 32-bit words, packed again."""

    def both(*operands):
        low, high = (f(*parts) for parts in zip(*operands))
        return low.view(U2).astype(U4) | high.view(U2).astype(U4) << U4(16)

    return both


def bf16_halves(f):
    return each_half(lambda *operands: to_bf16(f(*operands)))


def signed_halves(bits):
    return tuple(half.view(I2) for half in halves(bits))


def to_integer(values, round, kind):
    """A float as an integer: rounded, clamped to the type, NaN as 0."""
    limits = np.iinfo(kind)
    rounded = round(values.astype(F8))
    top = rounded >= float(limits.max)
    inside = np.where(np.isnan(rounded) | top | (rounded <= float(limits.min)), 0, rounded).astype(kind)
    return np.where(top, kind(limits.max), np.where(rounded <= float(limits.min), kind(limits.min), inside))


NAMES = {
    f.__name__: f
    for f in (quotient, remainder, upper_product, shift_left, shift_right, extract, insert, permute, to_integer)
}
NAMES |= {
    "add_s16x2": lambda a, b: each_half(np.add)(signed_halves(a), signed_halves(b)),
    "sub_s16x2": lambda a, b: each_half(np.subtract)(signed_halves(a), signed_halves(b)),
    "add_bf16x2": bf16_halves(np.add),
    "sub_bf16x2": bf16_halves(np.subtract),
    "mul_bf16x2": bf16_halves(np.multiply),
    "add_f16x2": each_half(np.add),
    "sub_f16x2": each_half(np.subtract),
    "mul_f16x2": each_half(np.multiply),
    "fma_bf16x2": bf16_halves(fma_odd),
    "fma_f16x2": each_half(lambda *operands: fma_odd(*operands).astype(F2)),
    "fma_odd": fma_odd,
}


def integers():
    for bits in (16, 32, 64):
        size = bits // 8
        n, u = f"n{size}", f"u{size}"
        for sign in "su":
            t, form = f"{sign}{bits}", f"{'i' if sign == 's' else 'u'}{size}"
            wide = f"{form[0]}{2 * size}"
            row(f"add.{t}", n, f"{n} {n}", "{0} + {1}")
            row(f"sub.{t}", n, f"{n} {n}", "{0} - {1}")
            row(f"mul.lo.{t}", n, f"{n} {n}", "{0} * {1}")
            row(f"mad.lo.{t}", n, f"{n} {n} {n}", "{0} * {1} + {2}")
            if bits < 64:
                row(f"mul.wide.{t}", wide, f"{form}>{wide} {form}>{wide}", "{0} * {1}")
                row(f"mad.wide.{t}", wide, f"{form}>{wide} {form}>{wide} {wide}", "{0} * {1} + {2}")
            if bits < 64 or sign == "u":
                row(f"mul.hi.{t}", form, f"{form} {form}", "upper_product({0}, {1})")
            row(f"div.{t}", form, f"{form} {form}", "quotient({0}, {1})")
            row(f"rem.{t}", form, f"{form} {form}", "remainder({0}, {1})")
            row(f"min.{t}", form, f"{form} {form}", "minimum({0}, {1})")
            row(f"max.{t}", form, f"{form} {form}", "maximum({0}, {1})")
            row(f"shr.{t}", form, f"{form} u4", "shift_right({0}, {1})")
            if bits > 16:
                row(f"bfe.{t}", form, f"{form} u4 u4", "extract({0}, {1}, {2})")
        row(f"neg.s{bits}", f"i{size}", f"i{size}", "-{0}")
        row(f"abs.s{bits}", f"i{size}", f"i{size}", "abs({0})")
        row(f"shl.b{bits}", u, f"{u} u4", "shift_left({0}, {1})")
        row(f"not.b{bits}", n, n, "~{0}")
        for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
            row(f"{name}.b{bits}", n, f"{n} {n}", f"{{0}} {sign} {{1}}")
        if bits > 16:
            row(f"bfi.b{bits}", u, f"{u} {u} u4 u4", "insert({0}, {1}, {2}, {3})")
    row("prmt.b32", "u4", "u4 u4 u4", "permute({0}, {1}, {2})")
    for name in ("add", "sub"):
        row(f"{name}.s16x2", "u4", "u4 u4", f"{name}_s16x2({{0}}, {{1}})")
    for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        row(f"{name}.pred", "b1", "b1 b1", f"{{0}} {sign} {{1}}")
    row("not.pred", "b1", "b1", "~{0}")


def floats():
    for t, form in (("f32", "f4"), ("f64", "f8"), ("f16", "f2"), ("bf16", "bf")):
        for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
            for rounding in ("", ".rn"):
                row(f"{name}{rounding}.{t}", form, f"{form} {form}", f"{{0}} {sign} {{1}}")
        row(f"neg.{t}", form, form, "-{0}")
        row(f"abs.{t}", form, form, "abs({0})")
        for name in ("min", "max"):
            row(f"{name}.{t}", form, f"{form} {form}", f"f{name}({{0}}, {{1}})")
            if t != "f64":
                row(f"{name}.NaN.{t}", form, f"{form} {form}", f"{name}imum({{0}}, {{1}})")
        if t == "f32":
            for name in ("min", "max"):
                row(f"{name}.f32 of 3", form, "f4 f4 f4", f"f{name}(f{name}({{0}}, {{1}}), {{2}})")
                row(f"{name}.NaN.f32 of 3", form, "f4 f4 f4", f"{name}imum({name}imum({{0}}, {{1}}), {{2}})")
    for t in ("bf16x2", "f16x2"):
        form = "p2" if t == "bf16x2" else "ph"
        for name in ("add", "sub", "mul"):
            for rounding in ("", ".rn"):
                row(f"{name}{rounding}.{t}", "u4", f"{form} {form}", f"{name}_{t}({{0}}, {{1}})")
        row(f"fma.rn.{t}", "u4", f"{form} {form} {form}", f"fma_{t}({{0}}, {{1}}, {{2}})")
    for rounding in ("", ".rn"):
        for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
            row(f"{name}{rounding}.f32x2", "pf", "pf pf", f"{{0}} {sign} {{1}}")
        for t, form in (("f16", "f2"), ("bf16", "bf")):
            row(f"add{rounding}.f32.{t}", "f4", f"{form} f4", "{0} + {1}")
            row(f"sub{rounding}.f32.{t}", "f4", f"{form} f4", "{0} - {1}")
    row("fma.rn.f32x2", "pf", "wf wf wf", "fma32({0}, {1}, {2})")
    row("fma.rn.bf16", "bf", "bf bf bf", "fma_odd({0}, {1}, {2})")
    row("fma.rn.f16", "f2", "f2 f2 f2", "fma_odd({0}, {1}, {2}).astype(f2)")
    row("fma.rn.f32", "f4", "w4 w4 w4", "fma32({0}, {1}, {2})")
    # ISA, "Mixed Precision Floating Point Instructions: fma": one rounding.
    row("fma.rn.f32.bf16", "f4", "bf bf w4", "fma32({0}.astype(float64), {1}.astype(float64), {2})")
    row("fma.rn.f32.f16", "f4", "f2 f2 w4", "fma32({0}.astype(float64), {1}.astype(float64), {2})")
    row("fma.rn.ftz.f32", "f4", "f4 f4 f4", "flush(fma32(*(flush(x).astype(float64) for x in ({0}, {1}, {2}))))")
    row("fma.rn.f64", "f8", "f8 f8 f8", "fma64({0}, {1}, {2})")
    for t, form in (("f32", "f4"), ("f64", "f8")):
        row(f"div.rn.{t}", form, f"{form} {form}", "{0} / {1}")
        row(f"rcp.rn.{t}", form, form, f"{form}(1) / {{0}}")
        row(f"sqrt.rn.{t}", form, form, "sqrt({0})")
    row("abs.ftz.f32", "f4", "f4", "abs(flush({0}))")
    row("div.full.f32", "f4", "f4 f4", "approximate.div({0}, {1})")
    for name in ("ex2", "lg2", "rcp", "sqrt", "rsqrt"):
        row(f"{name}.approx.f32", "f4", "f4", f"approximate.{name}({{0}})")
        row(f"{name}.approx.ftz.f32", "f4", "f4", f"flush(approximate.{name}(flush({{0}})))")
    row("rcp.approx.ftz.f64", "f8", "f8", "approximate.rcp64({0})")


ORDERS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNEQUAL = "({0} < {1}) | ({0} > {1})"
OPPOSITE = {"eq": UNEQUAL, "ne": "{0} == {1}", "lt": "{0} >= {1}", "le": "{0} > {1}", "gt": "{0} <= {1}"}
OPPOSITE["ge"] = "{0} < {1}"
UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


def comparisons():
    """setp with one predicate. For bf16x2 and f16x2 it has two, of the lower and of the upper halves."""
    for bits in (16, 32, 64):
        size = bits // 8
        for name in ("eq", "ne"):
            row(f"setp.{name}.b{bits}", "b1", f"n{size} n{size}", f"{{0}} {ORDERS[name]} {{1}}")
        for name, sign in ORDERS.items():
            row(f"setp.{name}.s{bits}", "b1", f"i{size} i{size}", f"{{0}} {sign} {{1}}")
            row(f"setp.{name}.u{bits}", "b1", f"u{size} u{size}", f"{{0}} {sign} {{1}}")
        for name, sign in UNSIGNED.items():
            row(f"setp.{name}.u{bits}", "b1", f"u{size} u{size}", f"{{0}} {sign} {{1}}")
    for t, form in (("f32", "f4"), ("f64", "f8"), ("f16", "f2"), ("bf16", "bf"), ("bf16x2", "p2"), ("f16x2", "ph")):
        # numpy's comparisons with NaN are false, as PTX's ordered ones are, except for !=.
        for name, sign in ORDERS.items():
            row(f"setp.{name}.{t}", "b1", f"{form} {form}", UNEQUAL if name == "ne" else f"{{0}} {sign} {{1}}")
        for name, opposite in OPPOSITE.items():
            row(f"setp.{name}u.{t}", "b1", f"{form} {form}", f"~({opposite})")
        row(f"setp.num.{t}", "b1", f"{form} {form}", "~(isnan({0}) | isnan({1}))")
        row(f"setp.nan.{t}", "b1", f"{form} {form}", "isnan({0}) | isnan({1})")


def conversions():
    for bits in (16, 32, 64):
        row(f"mov.b{bits}", f"n{bits // 8}", f"n{bits // 8}", "{0}")
        row(f"mov.u{bits}", f"n{bits // 8}", f"n{bits // 8}", "{0}")
        row(f"selp.b{bits}", f"n{bits // 8}", f"n{bits // 8} n{bits // 8} b1", "where({2}, {0}, {1})")
    for t, form in (("f32", "f4"), ("f64", "f8")):
        row(f"mov.{t}", form, form, "{0}")
        row(f"selp.{t}", form, f"{form} {form} b1", "where({2}, {0}, {1})")
    row("mov.pred", "b1", "b1", "{0}")
    kinds = {f"{s}{8 * n}": f"{'i' if s == 's' else 'u'}{n}" for n in (1, 2, 4, 8) for s in "su"}
    for to, result in kinds.items():
        for source, form in kinds.items():
            row(f"cvt.{to}.{source}", result, form, f"{{0}}.astype({result})")
        for source, form in (("f16", "f2"), ("f32", "f4"), ("f64", "f8")):
            row(f"cvt.rn.{source}.{to}", form, result, f"{{0}}.astype({form})")
            for rounding, f in (("rzi", "trunc"), ("rni", "rint"), ("rmi", "floor"), ("rpi", "ceil")):
                row(f"cvt.{rounding}.{to}.{source}", result, form, f"to_integer({{0}}, {f}, {result})")
    for t, form in (("f32", "f4"), ("f64", "f8")):
        row(f"cvt.rni.{t}.{t}", form, form, "rint({0})")
    row("cvt.f32.bf16", "f4", "bf", "{0}")
    row("cvt.f32.f16", "f4", "f2", "{0}.astype(f4)")
    row("cvt.f64.f32", "f8", "f4", "{0}.astype(f8)")
    row("cvt.rn.f32.f64", "f4", "f8", "{0}.astype(f4)")
    row("cvt.rn.bf16.f32", "bf", "f4", "{0}")
    row("cvt.rn.f16.f32", "f2", "f4", "{0}.astype(f2)")
    row("cvt.rn.bf16x2.f32", "u4", "f4 f4", "pack_bf16({0}, {1})")
    row("cvt.rn.f16x2.f32", "u4", "f4 f4", "pack_f16({0}, {1})")
    row("cvt.rna.tf32.f32", "u4", "f4", "to_tf32({0})")


integers()
floats()
comparisons()
conversions()
