"""The PTX machine (tests/ptx): the results of its instructions on registers, by hand or by numpy."""

import numpy as np
import ptx
import pytest
import torch
from handwritten import compute, run

SMALL = [0, 1, -1, 2, -2, 3, 7, -7, 12, -12, 100, 255, 256, -256, 32767, -32768]
BITS = {
    16: [x & 0xFFFF for x in SMALL],
    32: [x & 0xFFFFFFFF for x in [*SMALL, 2**31 - 1, -(2**31), 2**30 + 12345, -987654321, 0x12345678, 0x89ABCDEF]],
    64: [x & 2**64 - 1 for x in [*SMALL, 2**63 - 1, -(2**63), 2**40 + 7, -(2**40) - 7, 0x123456789ABCDEF0]],
}


def pairs(bits):
    """All pairs of some values of a width, as two arrays."""
    kind = f"u{bits // 8}"
    a, b = np.meshgrid(np.array(BITS[bits], kind), np.array(BITS[bits], kind))
    return a.ravel(), b.ravel()


def signed(x, bits):
    return x - (1 << bits) if x >> bits - 1 else x


def divided(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGERS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": divided,
    "rem": lambda a, b: a - b * divided(a, b),
}


@pytest.mark.parametrize("bits", (16, 32, 64))
@pytest.mark.parametrize("sign", "su")
def test_integers(bits, sign):
    a, b = pairs(bits)
    values = [tuple(signed(int(x), bits) if sign == "s" else int(x) for x in pair) for pair in zip(a, b)]
    for name, f in INTEGERS.items():
        found = compute(f"{name}.{sign}{bits} {{d}}, {{a}}, {{b}};", a.dtype, a, b)
        for (x, y), z in zip(values, found):
            if y or name not in ("div", "rem"):  # for division by zero the ISA leaves the result open
                assert int(z) == f(x, y) & (1 << bits) - 1, (name, x, y)
    names = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    for name, operator in names.items():
        code = f"setp.{name}.{sign}{bits} %p1, {{a}}, {{b}}; selp.b32 {{d}}, 7, 3, %p1;"
        expected = [7 if eval(f"x {operator} y", {"x": x, "y": y}) else 3 for x, y in values]
        assert compute(code, np.uint32, a, b).tolist() == expected, name


@pytest.mark.parametrize("bits", (16, 32))
@pytest.mark.parametrize("sign", "su")
def test_wide_products(bits, sign):
    a, b = pairs(bits)
    values = [tuple(signed(int(x), bits) if sign == "s" else int(x) for x in pair) for pair in zip(a, b)]
    wide = compute(f"mul.wide.{sign}{bits} {{d}}, {{a}}, {{b}};", f"u{bits // 4}", a, b)
    assert [int(z) for z in wide] == [x * y & (1 << 2 * bits) - 1 for x, y in values]
    upper = compute(f"mul.hi.{sign}{bits} {{d}}, {{a}}, {{b}};", a.dtype, a, b)
    assert [int(z) for z in upper] == [x * y >> bits & (1 << bits) - 1 for x, y in values]
    added = compute(f"mad.wide.{sign}{bits} {{d}}, {{a}}, {{b}}, 5;", f"u{bits // 4}", a, b)
    assert [int(z) for z in added] == [x * y + 5 & (1 << 2 * bits) - 1 for x, y in values]


def test_the_upper_half_of_64_bits():
    a, b = pairs(64)
    found = compute("mul.hi.u64 {d}, {a}, {b};", np.uint64, a, b)
    assert [int(z) for z in found] == [int(x) * int(y) >> 64 for x, y in zip(a, b)]


@pytest.mark.parametrize("bits", (16, 32, 64))
def test_shifts(bits):
    """A count past the width shifts everything out; it is not taken modulo the width."""
    counts = [0, 1, bits - 1, bits, bits + 1, 2**31, 2**32 - 1]
    a, n = np.meshgrid(np.array(BITS[bits], f"u{bits // 8}"), np.array(counts, np.uint32))
    a, n = a.ravel(), n.ravel()
    mask = (1 << bits) - 1
    cases = {
        f"shl.b{bits}": lambda x, k: x << min(k, bits) & mask,
        f"shr.u{bits}": lambda x, k: x >> min(k, bits),
        f"shr.s{bits}": lambda x, k: signed(x, bits) >> min(k, bits) & mask,
    }
    for name, f in cases.items():
        expected = [f(int(x), int(k)) for x, k in zip(a, n)]
        assert [int(z) for z in compute(f"{name} {{d}}, {{a}}, {{b}};", a.dtype, a, n)] == expected, name
        for k in counts:
            expected = [f(x, k) for x in BITS[bits]]
            found = compute(f"{name} {{d}}, {{a}}, {k};", a.dtype, np.array(BITS[bits], a.dtype))
            assert [int(z) for z in found] == expected, (name, k)


def bits_from(x, position, length, bits, sign):
    """The ISA's loop for bfe."""
    last = min(position + length - 1, bits - 1)
    fill = 0 if not sign or length == 0 else x >> last & 1
    result = 0
    for i in range(bits):
        bit = x >> position + i & 1 if i < length and position + i < bits else fill
        result |= bit << i
    return result


@pytest.mark.parametrize("bits", (32, 64))
def test_bit_fields(bits):
    fields = [(0, 1), (3, 5), (0, bits), (bits - 1, 1), (bits - 2, 9), (4, 0), (bits + 3, 4), (2, 255)]
    xs = BITS[bits]
    for position, length in fields:
        for sign in "su":
            array = np.array(xs, f"u{bits // 8}")
            expected = [bits_from(x, position, length, bits, sign == "s") for x in xs]
            found = compute(f"bfe.{sign}{bits} {{d}}, {{a}}, {position}, {length};", array.dtype, array)
            assert [int(z) for z in found] == expected, (position, length, sign)
        into = np.array(xs[::-1], array.dtype)
        mask = sum(1 << position + i for i in range(length) if position + i < bits)
        expected = [(y & ~mask) | (x << position & mask) for x, y in zip(xs, xs[::-1])]
        found = compute(f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {position}, {length};", array.dtype, array, into)
        assert [int(z) for z in found] == expected, (position, length)


@pytest.mark.parametrize("selector", (0x3210, 0x7654, 0x5410, 0x7632, 0x7770, 0x0123, 0x8888, 0xB3F4, 0x0C00))
def test_permute(selector):
    a, b = pairs(32)
    expected = []
    for x, y in zip(a, b):
        data, result = int(x) | int(y) << 32, 0
        for i in range(4):
            choice = selector >> 4 * i & 15
            byte = data >> 8 * (choice & 7) & 0xFF
            result |= (byte if choice < 8 else 0xFF * (byte >> 7)) << 8 * i
        expected.append(result)
    assert compute(f"prmt.b32 {{d}}, {{a}}, {{b}}, {selector:#x}U;", np.uint32, a, b).tolist() == expected
    chosen = np.full_like(a, selector)
    assert compute("prmt.b32 {d}, {a}, {b}, {c};", np.uint32, a, b, chosen).tolist() == expected


FLOATS = np.array(
    [
        0,
        -0.0,
        1,
        -1,
        0.1,
        1 / 3,
        1e-40,
        -1e-45,
        3e38,
        np.inf,
        -np.inf,
        np.nan,
        2.0**-126,
        65504,
        65520,
        1.00390625,
        7.5,
    ],
    np.float32,
)


def equal(found, expected):
    """Bit for bit, except for the bits of NaN."""
    nan = np.isnan(expected)
    assert (np.isnan(found) == nan).all()
    kind = f"u{found.dtype.itemsize}"
    assert (found.view(kind)[~nan] == expected.astype(found.dtype).view(kind)[~nan]).all()


def test_floats():
    a, b = (x.ravel() for x in np.meshgrid(FLOATS, FLOATS))
    with np.errstate(all="ignore"):
        equal(compute("add.f32 {d}, {a}, {b};", np.float32, a, b), a + b)
        equal(compute("mul.f32 {d}, {a}, {b};", np.float32, a, b), a * b)
        equal(compute("div.rn.f32 {d}, {a}, {b};", np.float32, a, b), a / b)
        equal(compute("max.f32 {d}, {a}, {b};", np.float32, a, b), np.fmax(a, b))
        equal(compute("max.NaN.f32 {d}, {a}, {b};", np.float32, a, b), np.maximum(a, b))
        equal(compute("sqrt.rn.f32 {d}, {a};", np.float32, a), np.sqrt(a))
        equal(compute("neg.f32 {d}, {a};", np.float32, a), -a)
        flushed = np.where(np.abs(a) < 2.0**-126, np.copysign(np.float32(0), a), a)
        equal(compute("abs.ftz.f32 {d}, {a};", np.float32, a), np.abs(flushed))


def test_fused():
    """One rounding: (1 + 2^-12)^2 - 1 - 2^-11 is 2^-24, which two roundings would lose."""
    a, c = np.float32([1 + 2**-12]), np.float32([-1 - 2**-11])
    assert compute("fma.rn.f32 {d}, {a}, {a}, {b};", np.float32, a, c)[0] == 2.0**-24
    a, c = np.array([1 + 2.0**-30]), np.array([-1 - 2.0**-29])
    assert compute("fma.rn.f64 {d}, {a}, {a}, {b};", np.float64, a, c)[0] == 2.0**-60
    # 1.5 (1 + 2^-7) is halfway between two bfloat16: the addend decides, though float32 would lose it.
    a, b, c = (
        torch.tensor(x).bfloat16().view(torch.int16).numpy().view(np.uint16) for x in ([1.5], [1.0078125], [2.0**-24])
    )
    assert compute("fma.rn.bf16 {d}, {a}, {b}, {c};", np.uint16, a, b, c)[0] == 0x3FC2
    assert compute("fma.rn.bf16 {d}, {a}, {b}, {c};", np.uint16, a, b, c ^ 0x8000)[0] == 0x3FC1
    third = np.float32([2.0**-24])
    assert compute("fma.rn.f32.bf16 {d}, {a}, {a}, {b};", np.float32, np.uint16([0x3F81]), third)[0] == 1.0078125**2
    tiny = np.float32([1e-40])
    assert compute("fma.rn.ftz.f32 {d}, {a}, {b}, {b};", np.float32, np.float32([1.0]), tiny)[0] == 0


def test_pairs_of_float32():
    """Each half separately, whether it comes from memory or from another instruction."""
    a, b = (x.ravel() for x in np.meshgrid(FLOATS[:16], FLOATS[:16]))
    pairs = a.view(np.uint64), b.view(np.uint64)
    with np.errstate(all="ignore"):
        for rounding in ("", ".rn"):
            for name, f in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
                code = f"{name}{rounding}.f32x2 {{d}}, {{a}}, {{b}};"
                equal(compute(code, np.uint64, *pairs).view(np.float32), f(a, b))
        code = "mul.f32x2 %rd80, {a}, {b}; fma.rn.f32x2 {d}, %rd80, {a}, %rd80;"
        product = a * b
        expected = (product.astype(np.float64) * a + product).astype(np.float32)
        equal(compute(code, np.uint64, *pairs).view(np.float32), expected)
    # One rounding; and the guard's other threads keep the old value.
    x, c = np.float32([1 + 2**-12, 3]).view(np.uint64), np.float32([-1 - 2**-11, 1]).view(np.uint64)
    assert (compute("fma.rn.f32x2 {d}, {a}, {a}, {b};", np.uint64, x, c).view(np.float32) == [2.0**-24, 10]).all()
    code = "setp.lt.u32 %p1, %r0, 1; mov.b64 {d}, {a}; @%p1 add.f32x2 {d}, {a}, {a}; add.f32x2 {d}, {d}, {a};"
    twice = compute(code, np.uint64, np.resize(x, 2)).view(np.float32).reshape(2, 2)
    assert (twice == np.outer([3, 2], np.float32([1 + 2**-12, 3]))).all()
    code = "mov.b32 %r70, 0f3F800000; mov.b64 %rd80, {{%r70, %r70}}; add.f32x2 {d}, {a}, %rd80;"
    assert (compute(code, np.uint64, c).view(np.float32) == [-(2.0**-11), 2]).all()


def test_sums_of_two_formats():
    x = np.float32([1e-40, 1.00390625, -3.1415927, 65504, -1e-5, np.inf])
    for kind, half in (("f16", x.astype(np.float16)), ("bf16", torch.from_numpy(x).bfloat16())):
        bits = half.view(np.uint16) if kind == "f16" else half.view(torch.int16).numpy().view(np.uint16)
        wide = half.astype(np.float32) if kind == "f16" else half.float().numpy()
        for rounding in ("", ".rn"):
            equal(compute(f"add{rounding}.f32.{kind} {{d}}, {{a}}, {{b}};", np.float32, bits, x[::-1]), wide + x[::-1])


def test_the_largest_of_three():
    a, b = (x.ravel() for x in np.meshgrid(FLOATS, FLOATS))
    for name, f, nan in (("max", np.fmax, np.maximum), ("min", np.fmin, np.minimum)):
        code = f"{name}{{}}.f32 {{{{d}}}}, {{{{a}}}}, {{{{b}}}}, 0f3F000000;"
        equal(compute(code.format(""), np.float32, a, b), f(f(a, b), np.float32(0.5)))
        equal(compute(code.format(".NaN"), np.float32, a, b), nan(nan(a, b), np.float32(0.5)))


def test_comparisons_with_nan():
    nan = float("nan")
    a, b = np.float32([1, 2, nan, nan, 1]), np.float32([2, 2, 1, nan, nan])
    expected = {
        "lt": [1, 0, 0, 0, 0], "le": [1, 1, 0, 0, 0], "eq": [0, 1, 0, 0, 0], "ne": [1, 0, 0, 0, 0],
        "ltu": [1, 0, 1, 1, 1], "geu": [0, 1, 1, 1, 1], "equ": [0, 1, 1, 1, 1], "neu": [1, 0, 1, 1, 1],
        "num": [1, 1, 0, 0, 0], "nan": [0, 0, 1, 1, 1], "gt": [0, 0, 0, 0, 0], "gtu": [0, 0, 1, 1, 1],
    }  # fmt: skip
    for name, values in expected.items():
        code = f"setp.{name}.f32 %p1, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, %p1;"
        assert compute(code, np.uint32, a, b).tolist() == values, name


def test_half_precision():
    x = np.float32([1, 1.00390625, 1.01171875, -3.1415927, 1e-41, 3.4e38, np.inf, np.nan])
    t = torch.from_numpy(x)
    bf16 = t.bfloat16().view(torch.int16).numpy().view(np.uint16)
    found = compute("cvt.rn.bf16.f32 {d}, {a};", np.uint16, x)
    assert (found[:-1] == bf16[:-1]).all() and found[-1] == 0x7FFF
    packed = compute("cvt.rn.bf16x2.f32 {d}, {a}, {b};", np.uint32, x, x[::-1].copy())
    assert (packed >> 16 == found).all() and (packed & 0xFFFF == found[::-1]).all()
    equal(compute("cvt.f32.bf16 {d}, {a};", np.float32, bf16), t.bfloat16().float().numpy())
    for name, sign in (("add", 1), ("sub", -1)):  # of two formats, from sm_100 on
        with np.errstate(invalid="ignore"):
            mixed = t.bfloat16().float().numpy() + np.float32(sign) * x[::-1]
        equal(compute(f"{name}.rn.f32.bf16 {{d}}, {{a}}, {{b}};", np.float32, bf16, x[::-1].copy()), mixed)
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    equal(compute("cvt.rn.f16.f32 {d}, {a};", np.float16, x), half)
    equal(compute("cvt.f32.f16 {d}, {a};", np.float32, half), half.astype(np.float32))
    a, b = torch.randn(32).bfloat16(), torch.randn(32).bfloat16()
    words = [torch.stack([v, v.flip(0)], 1).view(torch.int32).flatten().numpy().view(np.uint32) for v in (a, b)]
    found = compute("add.bf16x2 {d}, {a}, {b};", np.uint32, *words)
    assert (torch.from_numpy(found.view(np.int16)).view(torch.bfloat16).view(-1, 2)[:, 0] == a + b).all()
    code = "setp.gt.bf16x2 %p1|%p2, {a}, {b}; selp.b32 {d}, 2, 0, %p2; selp.b32 %r90, 1, 0, %p1; or.b32 {d}, {d}, %r90;"
    assert (compute(code, np.uint32, *words) == ((a > b).int() + 2 * (a.flip(0) > b.flip(0)).int()).numpy()).all()


def test_conversions():
    x = np.uint32([0, 1, 127, 128, 255, 0xFFFFFF80, 0x12345678])
    expected = (x & 0xFF).astype(np.int64)
    expected = np.where(expected > 127, expected - 256, expected)
    assert (compute("cvt.s32.s8 {d}, {a};", np.int32, x) == expected).all()
    assert (compute("cvt.s64.s32 {d}, {a};", np.int64, x) == x.view(np.int32)).all()
    assert (compute("cvt.u16.u32 {d}, {a};", np.uint16, x) == x.astype(np.uint16)).all()
    assert (compute("cvt.u32.u16 {d}, {a};", np.uint32, x.astype(np.uint16)) == (x & 0xFFFF)).all()
    halves = np.array([-2.5, -1.5, -0.25, 0.5, 1.5, 2.5, 3.75, 2**24 + 2], np.float32)
    nearest = np.array([-2, -2, -0.0, 0, 2, 2, 4, 2**24 + 2], np.float32)
    equal(compute("cvt.rni.f32.f32 {d}, {a};", np.float32, halves), nearest)
    assert (compute("cvt.rn.f32.s32 {d}, {a};", np.float32, x) == x.view(np.int32).astype(np.float32)).all()
    floats = np.float32([-1.5, 1.5, 2.5, 3e9, -3e9, np.nan])
    found = compute("cvt.rzi.s32.f32 {d}, {a};", np.int32, floats)
    assert found.tolist() == [-1, 1, 2, 2**31 - 1, -(2**31), 0]
    assert compute("cvt.rni.s32.f32 {d}, {a};", np.int32, floats).tolist()[:3] == [-2, 2, 2]
    halfway = np.uint32([0x3F801000, 0x3F800FFF, 0xBF801000])  # ties go away from zero
    assert compute("cvt.rna.tf32.f32 {d}, {a};", np.uint32, halfway).tolist() == [0x3F802000, 0x3F800000, 0xBF802000]


def test_vectors():
    x = np.uint32([0x12345678, 0xFFFF0001])
    code = "mov.b32 {{%rs1, %rs2}}, {a}; mov.b32 {d}, {{%rs2, %rs1}};"
    assert compute(code, np.uint32, x).tolist() == [0x56781234, 0x0001FFFF]
    wide = np.uint64([0x1122334455667788])
    code = "{{ .reg .b32 tmp; mov.b64 {{tmp, %r1}}, {a}; }}\nmov.b64 {d}, {{%r1, %r1}};"
    assert compute(code, np.uint64, wide).tolist() == [0x1122334411223344]


def test_approximations():
    """Rounded to nearest by default; at worst within the ISA's bounds, with errors of both signs."""
    x = np.random.default_rng(0).uniform(0.1, 30, 256).astype(np.float32)
    out = torch.zeros(256)
    for name, f in (("ex2.approx.f32", np.exp2), ("rcp.approx.f32", np.reciprocal), ("sqrt.approx.f32", np.sqrt)):
        code = f"""
        mul.wide.u32 %rd3, %r0, 4; add.s64 %rd4, %rd0, %rd3; add.s64 %rd5, %rd1, %rd3;
        ld.global.b32 %r1, [%rd4]; {name} %r2, %r1; st.global.b32 [%rd5], %r2;"""
        true = f(x.astype(np.float64))
        run(code, torch.from_numpy(x), out, threads=256)
        assert (out.numpy() == true.astype(np.float32)).all()
        run(code, torch.from_numpy(x), out, threads=256, worst=True)
        error = (out.numpy() - true) / true
        assert 2.0**-24 < np.abs(error).max() < 2.6 * 2.0**-23 and error.min() < 0 < error.max()


@pytest.mark.parametrize("mode", ("idx", "bfly", "up", "down"))
@pytest.mark.parametrize("clamp", (0x1F, 0x0, 0x181F, 0x1C03))
def test_shuffle(mode, clamp):
    """The ISA's pseudocode, thread by thread."""
    by = np.random.default_rng(clamp).integers(0, 32, 32).astype(np.uint32)
    value = np.arange(100, 132, dtype=np.uint32)
    expected = []
    for lane in range(32):
        segment, c = clamp >> 8 & 31, clamp & 31
        most, least, b = (lane & segment) | (c & ~segment), lane & segment, int(by[lane])
        if mode == "up":
            j, valid = lane - b, lane - b >= most
        else:
            j = {"down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[mode]
            valid = j <= most
        expected.append(100 + (j if valid else lane) + 1000 * valid)
    code = f"shfl.sync.{mode}.b32 {{d}}|%p1, {{a}}, {{b}}, {clamp}, -1; selp.b32 %r90, 1000, 0, %p1;"
    code += "add.s32 {d}, {d}, %r90;"
    assert compute(code, np.uint32, value, by).tolist() == expected


def test_reduction():
    value = np.arange(64, dtype=np.uint32)
    found = compute("mov.b32 %r90, -1; redux.sync.add.s32 {d}, {a}, %r90;", np.uint32, value)
    assert found.tolist() == [value[:32].sum()] * 32 + [value[32:].sum()] * 32
    value = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    value[3], value[32:] = np.nan, np.nan
    found = compute("mov.b32 %r90, -1; redux.sync.max.f32 {d}, {a}, %r90;", np.float32, value)
    assert (found[:32] == np.nanmax(value[:32])).all() and np.isnan(found[32:]).all()


def test_scopes():
    """A scope's registers and labels are its own, even if others have the same names."""
    loop = """
    {{{{
        .reg .pred more;
        .reg .b32 left;
        mov.b32 left, {};
    loop:
        add.s32 {{d}}, {{d}}, {};
        sub.s32 left, left, 1; setp.ne.s32 more, left, 0;
        @more bra.uni loop;
    }}}}
    """
    code = "mov.b32 {d}, {a};" + loop.format(3, 1) + loop.format(5, 10)
    assert compute(code, np.uint32, np.uint32([0, 7])).tolist() == [53, 60]
    with pytest.raises(ptx.Fault, match="two labels"):
        run("$L1:\n add.s32 %r1, %r0, 1;\n$L1:\n", torch.zeros(32))


@pytest.mark.parametrize(
    "code",
    [
        "add.sat.s32 %r1, %r0, 1;", "add.f32.ftz %r1, %r0, %r0;", "add.rz.f32 %r1, %r0, %r0;", "popc.b32 %r1, %r0;",
        "add.cc.s32 %r1, %r0, 1;", "atom.global.add.u32 %r1, [%rd0], 1;", "ld.volatile.global.b32 %r1, [%rd0];",
        "bar.sync 0, 32;", "mov.u32 %r1, %smid;", "setp.lt.and.s32 %p1, %r0, 1, %p2;", "cvt.rz.bf16.f32 %r1, %r0;",
        "mul.s32 %r1, %r0, 1;", "mbarrier.init.shared::cta.b64 [%r0], 1;", "ld.local.b32 %r1, [%r0];", "@%p1 ret;",
        "bar.arrive 0, 64;", "add.rz.f32x2 %rd1, %rd1, %rd1;", "add.rz.f32.bf16 %r1, %rs1, %r0;",
        "fma.f32x2 %rd1, %rd1, %rd1, %rd1;", "max.s32 %r1, %r0, %r0, 1;",
        "redux.sync.min.f32 %r1, %r0, -1;", "redux.sync.max.NaN.f32 %r1, %r0, -1;",
    ],
)  # fmt: skip
def test_what_is_not_known(code):
    with pytest.raises(ptx.Fault) as e:
        run(code, torch.zeros(32))
    assert e.value.kind == "instruction" and e.value.kernel == "kernel"


def test_directives_of_a_kernel():
    out = torch.zeros(32, dtype=torch.int32)
    code = "mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd1, %rd0; st.global.b32 [%rd1], %r0;"
    run(code, out, threads="32, 1, 1\n.maxnreg 255")
    assert (out == torch.arange(32)).all()
    for threads in ("32, 2", "32\n.maxnreg 255\n.minnctapersm 2"):
        with pytest.raises(ptx.Fault, match="instruction: threads of a program"):
            run(code, out, threads=threads)
