"""The machine that runs PTX (tests/ptx): its instructions, by hand or by numpy, and each of its faults, by name."""

import numpy as np
import ptx
import pytest
import torch

TEXT = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
    {params}
)
.reqntid {threads}
{{
    .reg .pred %p<40>;
    .reg .b16 %rs<100>;
    .reg .b32 %r<400>;
    .reg .b64 %rd<100>;
    .loc 1 1 0 // kernel.py:1:0
{loads}
    mov.u32 %r0, %tid.x;
{code}
    ret;
}}
"""


def run(code, *arguments, threads=32, programs=1, shared=4096, **choices):
    """Runs a program whose arguments are in %rd0, %rd1, ..., the thread's number in %r0; gives the machine."""
    params = ",\n".join(f".param .u64 kernel_param_{k}" for k in range(len(arguments)))
    loads = "\n".join(f"ld.param.b64 %rd{k}, [kernel_param_{k}];" for k in range(len(arguments)))
    text = TEXT.format(params=params, loads=loads, threads=threads, code=code)
    machine = ptx.Emulator("sm_90", **choices)
    machine.run(text, shared, (programs, 1, 1), arguments)
    return machine


REGISTERS = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}


def compute(code, result, *operands):
    """The results, in numpy's type `result`, of code for threads with {a}, {b}, {c} from operands and {d} to be set."""
    count = max(len(operand) for operand in operands)
    arrays = [np.resize(operand, -(-count // 32) * 32) for operand in operands]
    tensors = [torch.from_numpy(array.view(np.uint8).copy()) for array in arrays]
    size = np.dtype(result).itemsize
    out = torch.zeros(len(arrays[0]) * size, dtype=torch.uint8)
    lines, names = [], {}
    for k, array in enumerate(arrays):
        width = array.dtype.itemsize
        names["abc"[k]] = f"{REGISTERS[width]}{50 + k}"
        lines.append(f"mul.wide.u32 %rd60, %r0, {width}; add.s64 %rd60, %rd60, %rd{k + 1};")
        lines.append(f"ld.global.b{8 * width} {names['abc'[k]]}, [%rd60];")
    names["d"] = f"{REGISTERS[size]}{60}"
    lines.append(code.format(**names))
    lines.append(f"mul.wide.u32 %rd61, %r0, {size}; add.s64 %rd61, %rd61, %rd0;")
    lines.append(f"st.global.b{8 * size} [%rd61], {names['d']};")
    run("\n".join(lines), out, *tensors, threads=len(arrays[0]))
    return out.numpy().view(result)[:count]


SMALL = [0, 1, -1, 2, -2, 3, 7, -7, 12, -12, 100, 255, 256, -256, 32767, -32768]
BITS = {
    16: [x & 0xFFFF for x in SMALL],
    32: [x & 0xFFFFFFFF for x in [*SMALL, 2**31 - 1, -(2**31), 2**30 + 12345, -987654321, 0x12345678, 0x89ABCDEF]],
    64: [x & 2**64 - 1 for x in [*SMALL, 2**63 - 1, -(2**63), 2**40 + 7, -(2**40) - 7, 0x123456789ABCDEF0]],
}


def pairs(bits):
    """All pairs of some numbers of a width, as two arrays."""
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
            if y or name not in ("div", "rem"):  # by zero the ISA leaves the result open
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
    """Bit for bit, but for the bits of NaN."""
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
    """One rounding: (1 + 2^-12)^2 - 1 - 2^-11 is 2^-24, which two roundings lose."""
    a, c = np.float32([1 + 2**-12]), np.float32([-1 - 2**-11])
    assert compute("fma.rn.f32 {d}, {a}, {a}, {b};", np.float32, a, c)[0] == 2.0**-24
    a, c = np.array([1 + 2.0**-30]), np.array([-1 - 2.0**-29])
    assert compute("fma.rn.f64 {d}, {a}, {a}, {b};", np.float64, a, c)[0] == 2.0**-60
    # 1.5 (1 + 2^-7) is in the middle between two bfloat16: what is added decides, though float32 would lose it.
    a, b, c = (
        torch.tensor(x).bfloat16().view(torch.int16).numpy().view(np.uint16) for x in ([1.5], [1.0078125], [2.0**-24])
    )
    assert compute("fma.rn.bf16 {d}, {a}, {b}, {c};", np.uint16, a, b, c)[0] == 0x3FC2
    assert compute("fma.rn.bf16 {d}, {a}, {b}, {c};", np.uint16, a, b, c ^ 0x8000)[0] == 0x3FC1
    tiny = np.float32([1e-40])
    assert compute("fma.rn.ftz.f32 {d}, {a}, {b}, {b};", np.float32, np.float32([1.0]), tiny)[0] == 0


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
    """To nearest by default, and within the ISA's bounds at worst, on both sides."""
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
    """As the ISA's pseudocode says, for each thread on its own."""
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
    code = f"shfl.sync.{mode}.b32 {{d}}|%p1, {{a}}, {{b}}, {clamp}, -1; "
    code += "selp.b32 %r90, 1000, 0, %p1; add.s32 {d}, {d}, %r90;"
    assert compute(code, np.uint32, value, by).tolist() == expected


def test_reduction():
    value = np.arange(64, dtype=np.uint32)
    found = compute("mov.b32 %r90, -1; redux.sync.add.s32 {d}, {a}, %r90;", np.uint32, value)
    assert found.tolist() == [value[:32].sum()] * 32 + [value[32:].sum()] * 32


# Each thread's slot of 4 bytes of shared memory, and of its result.
SLOTS = """
    shl.b32 %r1, %r0, 2; mov.b32 %r2, memory; add.s32 %r1, %r1, %r2;
    mul.wide.u32 %rd10, %r0, 4; add.s64 %rd10, %rd10, %rd0;"""


def matrices(count, dtype=np.uint16):
    return np.arange(count * 64, dtype=dtype).reshape(count, 8, 8)


@pytest.mark.parametrize("count", (1, 2, 4))
@pytest.mark.parametrize("transposed", (False, True), ids=("rows", "transposed"))
def test_matrices_to_and_from_shared_memory(count, transposed):
    """Thread t has elements 2 (t % 4) and the next of row t / 4 of each matrix, and lane i the address of row i."""
    tiles, out, back = (
        torch.from_numpy(matrices(count).view(np.int32).ravel()),
        torch.zeros(32 * count),
        torch.zeros(32 * count),
    )
    trans = ".trans" * transposed
    registers = ", ".join(f"%r{20 + k}" for k in range(count))
    copy = "\n".join(
        f"ld.global.b32 %r10, [%rd11+{128 * k}]; st.shared.b32 [%r1+{128 * k}], %r10;" for k in range(count)
    )
    store = "\n".join(f"st.global.b32 [%rd10+{128 * k}], %r{20 + k};" for k in range(count))
    code = f"""{SLOTS}
    mul.wide.u32 %rd11, %r0, 4; add.s64 %rd11, %rd11, %rd1;
    mul.wide.u32 %rd12, %r0, 4; add.s64 %rd12, %rd12, %rd2;
    {copy}
    bar.sync 0;
    shl.b32 %r3, %r0, 4; add.s32 %r3, %r3, %r2;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r3];
    {store}
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r3+1024], {{{registers}}};
    bar.sync 0;
    """ + "\n".join(
        f"ld.shared.b32 %r10, [%r1+{1024 + 128 * k}]; st.global.b32 [%rd12+{128 * k}], %r10;" for k in range(count)
    )
    run(code, out, tiles, back)
    halves = out.numpy().view(np.uint16).reshape(count, 32, 2)
    for k, tile in enumerate(matrices(count)):
        tile = tile.T if transposed else tile
        assert (halves[k] == [[tile[t // 4, 2 * (t % 4)], tile[t // 4, 2 * (t % 4) + 1]] for t in range(32)]).all()
    assert (back.numpy().view(np.int32) == tiles.numpy()).all()


def vectors_of(count, prefix, first):
    return "{" + ", ".join(f"{prefix}{first + k}" for k in range(count)) + "}"


MMA = {
    "m16n8k16.row.col.f32.bf16.bf16.f32": (16, 16, torch.bfloat16),
    "m16n8k8.row.col.f32.bf16.bf16.f32": (16, 8, torch.bfloat16),
    "m16n8k16.row.col.f32.f16.f16.f32": (16, 16, torch.float16),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (16, 8, torch.float32),
    "m16n8k4.row.col.f32.tf32.tf32.f32": (16, 4, torch.float32),
    "m16n8k16.row.col.f64.f64.f64.f64": (16, 16, torch.float64),
    "m16n8k8.row.col.f64.f64.f64.f64": (16, 8, torch.float64),
    "m8n8k4.row.col.f64.f64.f64.f64": (8, 4, torch.float64),
}


@pytest.mark.parametrize("form", MMA)
def test_mma(form):
    """Fragments by the ISA's figures: a register's row, column and elements for each thread."""
    m, k, dtype = MMA[form]
    packed = max(1, 4 // dtype.itemsize)
    torch.manual_seed(0)
    a, b, c = (torch.randint(-4, 5, size).to(dtype) for size in ((m, k), (k, 8), (m, 8)))
    expected = a.double() @ b.double() + c.double()
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    group, thread = torch.arange(32) // 4, torch.arange(32) % 4
    halves, steps = m // 8, k // (4 * packed)
    element = torch.arange(packed)
    fa = [
        a[(group + 8 * h)[:, None], (thread * packed)[:, None] + element + 4 * packed * s]
        for s in range(steps)
        for h in range(halves)
    ]
    fb = [b[(thread * packed)[:, None] + element + 4 * packed * s, group[:, None]] for s in range(steps)]
    fc = [c.to(sums)[group + 8 * h, 2 * thread + e][:, None] for h in range(halves) for e in range(2)]
    out = torch.zeros(len(fc), 32, dtype=sums)
    tensors = [torch.stack(f).contiguous() for f in (fa, fb, fc)]
    wide = dtype == torch.float64
    size, prefix = (8, "%rd") if wide else (4, "%r")
    lines, first = [], 20
    vectors = []
    for k_, f in enumerate((fa, fb, fc)):
        lines.append(f"mul.wide.u32 %rd10, %r0, {size}; add.s64 %rd10, %rd10, %rd{k_ + 1};")
        lines += [f"ld.global.b{8 * size} {prefix}{first + j}, [%rd10+{32 * size * j}];" for j in range(len(f))]
        vectors.append(vectors_of(len(f), prefix, first))
        first += len(f)
    d = vectors_of(len(fc), prefix, first)
    lines.append(f"mma.sync.aligned.{form} {d}, {', '.join(vectors)};")
    lines.append(f"mul.wide.u32 %rd10, %r0, {size}; add.s64 %rd10, %rd10, %rd0;")
    lines += [f"st.global.b{8 * size} [%rd10+{32 * size * j}], {prefix}{first + j};" for j in range(len(fc))]
    run("\n".join(lines), out, *tensors)
    found = torch.zeros(m, 8, dtype=torch.float64)
    for j in range(len(fc)):
        found[group + 8 * (j // 2), 2 * thread + j % 2] = out[j].double()
    assert (found == expected).all()


def test_tf32_is_cut_off():
    """A product sees 11 bits of a factor, rounded towards zero: 1 + 2^-10 + 2^-11 is taken for 1 + 2^-10."""
    out = torch.zeros(32)
    code = """
    mov.b32 %r1, 0f3F803000; mov.b32 %r2, 0f3F800000; mov.b32 %r3, 0f00000000;
    mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%r4, %r5, %r6, %r7}, {%r1, %r1}, {%r2}, {%r3, %r3, %r3, %r3};
    mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd1, %rd0; st.global.b32 [%rd1], %r4;"""
    run(code, out)
    assert (out == 4 * (1 + 2**-10)).all()


def test_chains_of_products():
    """Products that go on with each other's sums, and one whose result in between is used."""
    out = torch.zeros(2, 32)
    step = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {d}, {{%r1, %r1, %r1, %r1}}, {{%r1, %r1}}, {c};"
    d = ["{%r10, %r11, %r12, %r13}", "{%r20, %r21, %r22, %r23}", "{%r30, %r31, %r32, %r33}"]
    lines = ["mov.b32 %r1, 0f3F800000; mov.b32 %r2, 0f00000000;", step.format(d=d[0], c="{%r2, %r2, %r2, %r2}")]
    lines += [step.format(d=d[1], c=d[0]), step.format(d=d[2], c=d[1])]
    lines.append("mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd1, %rd0;")
    lines.append("st.global.b32 [%rd1], %r20; st.global.b32 [%rd1+128], %r30;")
    run("\n".join(lines), out)
    assert (out[0] == 16).all() and (out[1] == 24).all()


SWIZZLES = {"none": (0, 16, 0), "32 bytes": (3, 32, 1), "64 bytes": (2, 64, 3), "128 bytes": (1, 128, 7)}


def lay_out(matrix, swizzle, by_k, bytes_each):
    """(bytes of an operand in shared memory, leading and stride byte offsets), from (rows, K), as the ISA draws it.

    A core matrix has 8 lines of 16 bytes. In rows of the swizzle's width, 16-byte units are exchanged by the bits of
    the address above 128 bytes.
    """
    _, width, bits = SWIZZLES[swizzle]
    lines = matrix.T if by_k else matrix  # what runs along a line is contiguous
    count, length = lines.shape
    across = length * bytes_each
    stripes = max(across // width, 1)
    stripe = count * width
    leading, stride = (stripe, 8 * width)
    memory = np.zeros(stripes * stripe, np.uint8)
    for line in range(count):
        for element in range(length):
            byte = element * bytes_each
            place = byte // width * leading + line // 8 * stride + line % 8 * width + byte % width
            place ^= (place >> 7 & bits) << 4
            memory[place : place + bytes_each] = np.frombuffer(lines[line, element].tobytes(), np.uint8)
    if by_k and width == 16:
        leading, stride = stride, leading  # of MN-major operands without swizzle the ISA names them the other way round
    return memory, leading, stride


def descriptor(address, leading, stride, swizzle):
    return address >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLES[swizzle][0] << 62


def wgmma(form, a, b, keep=0, n=16, flags="1, 1", before="", after="", wait="wgmma.wait_group.sync.aligned 0;"):
    """A product of operands in %rd20.. or registers, its sums to the result."""
    registers = vectors_of(n // 2, "%r", 100)
    lines = [f"mov.b32 %r{100 + k}, 0f3F800000;" for k in range(n // 2)]
    lines += ["wgmma.fence.sync.aligned;", before]
    lines.append(f"mov.pred %p9, {-keep};")
    lines.append(f"wgmma.mma_async.sync.aligned.{form} {registers}, {a}, {b}, %p9, {flags};")
    lines += ["wgmma.commit_group.sync.aligned;", after, wait]
    lines.append("mul.wide.u32 %rd10, %r0, 4; add.s64 %rd10, %rd10, %rd0;")
    lines += [f"st.global.b32 [%rd10+{512 * k}], %r{100 + k};" for k in range(n // 2)]
    return "\n".join(lines)


def fill(words, source="%rd1", fence="fence.proxy.async.shared::cta;"):
    """Words of shared memory from a tensor, 128 threads together."""
    lines = [f"mul.wide.u32 %rd11, %r0, 4; add.s64 %rd11, %rd11, {source}; shl.b32 %r1, %r0, 2;"]
    for k in range(words // 128):
        lines.append(f"ld.global.b32 %r2, [%rd11+{512 * k}]; st.shared.b32 [%r1+{512 * k}], %r2;")
    return "\n".join([*lines, fence, "bar.sync 0;"])


def sums_of(out, n):
    """(64, n) from the registers of 128 threads."""
    t = torch.arange(128)
    row, column = 16 * (t // 32) + t % 32 // 4, 2 * (t % 4)
    result = torch.zeros(64, n)
    for k in range(n // 2):
        result[row + 8 * (k % 4 // 2), 8 * (k // 4) + column + k % 2] = out[k]
    return result


def bits_of(values):
    return values.contiguous().view({2: torch.int16, 4: torch.int32}[values.element_size()]).numpy()


@pytest.mark.parametrize("products", ("early", "late"))
@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize(
    ("dtype", "major"),
    [(dtype, major) for dtype in (torch.bfloat16, torch.float16) for major in ("K, K", "M, N", "K, N", "M, K")]
    + [(torch.float32, "K, K")],  # tf32 operands lie along K
    ids=str,
)
def test_wgmma(dtype, swizzle, major, products):
    """Both operands in shared memory, along K or across it, in each swizzle."""
    kind = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "tf32"}[dtype]
    by_k = [part != "K" for part in major.split(", ")]
    k, n, size = (8 if dtype == torch.float32 else 16), 64, dtype.itemsize
    torch.manual_seed(0)
    a, b = (torch.randint(-4, 5, (rows, k)).to(dtype) for rows in (64, n))
    # Rows of a swizzle hold more of K than one product takes.
    wide = max(k, SWIZZLES[swizzle][1] // size)
    padded = [
        x if across else torch.cat([x, torch.zeros(len(x), wide - k, dtype=dtype)], 1)
        for x, across in zip((a, b), by_k)
    ]
    parts = [lay_out(bits_of(x), swizzle, across, size) for x, across in zip(padded, by_k)]
    memory = np.concatenate([np.resize(part[0], -(-len(part[0]) // 1024) * 1024) for part in parts])
    second = -(-len(parts[0][0]) // 1024) * 1024
    a_, b_ = (descriptor(at, *part[1:], swizzle) for at, part in zip((0, second), parts))
    out = torch.zeros(n // 2, 128)
    flags = "1, 1" + f", {by_k[0]:d}, {by_k[1]:d}" * (dtype != torch.float32)
    form = f"m64n{n}k{k}.f32.{kind}.{kind}"
    code = fill(len(memory) // 4) + f"mov.b64 %rd20, {a_}; mov.b64 %rd21, {b_};"
    code += wgmma(form, "%rd20", "%rd21", keep=1, n=n, flags=flags)
    words = torch.from_numpy(memory.view(np.int32).copy())
    run(code, out, words, threads=128, shared=len(memory), products=products)
    assert (sums_of(out, n) == a.float() @ b.float().T + 1).all()
    plain = code.replace("mov.pred %p9, -1", "mov.pred %p9, 0")
    run(plain, out, words, threads=128, shared=len(memory), products=products)
    assert (sums_of(out, n) == a.float() @ b.float().T).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_wgmma_of_registers(dtype):
    kind, k, packed = ("bf16", 16, 2) if dtype == torch.bfloat16 else ("tf32", 8, 1)
    torch.manual_seed(0)
    a, b = torch.randint(-4, 5, (64, k)).to(dtype), torch.randint(-4, 5, (16, k)).to(dtype)
    memory, leading, stride = lay_out(bits_of(b), "32 bytes", False, dtype.itemsize)
    t = torch.arange(128)
    row, column = 16 * (t // 32) + t % 32 // 4, t % 4 * packed
    element = torch.arange(packed)
    fragments = torch.stack([
        a[(row + 8 * (j % 2))[:, None], column[:, None] + 4 * packed * (j // 2) + element] for j in range(4)
    ])  # fmt: skip
    loads = "mul.wide.u32 %rd12, %r0, 4; add.s64 %rd12, %rd12, %rd2;"
    loads += "".join(f"ld.global.b32 %r{50 + j}, [%rd12+{512 * j}];" for j in range(4))
    flags = "1, 1" + ", 0" * (dtype == torch.bfloat16)
    code = fill(128) + loads + f"mov.b64 %rd21, {descriptor(0, leading, stride, '32 bytes')};"
    code += wgmma(f"m64n16k{k}.f32.{kind}.{kind}", vectors_of(4, "%r", 50), "%rd21", flags=flags)
    out = torch.zeros(8, 128)
    run(code, out, torch.from_numpy(memory.view(np.int32)), fragments.contiguous(), threads=128)
    assert (sums_of(out, 16) == a.float() @ b.float().T).all()


COPY = """
    mul.wide.u32 %rd11, %r0, 4; add.s64 %rd12, %rd11, %rd1; add.s64 %rd10, %rd11, %rd0; shl.b32 %r1, %r0, 2;
    {copy}
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r2, [%r1];
    st.global.b32 [%rd10], %r2;"""
WAIT = "cp.async.wait_group 0;"


@pytest.mark.parametrize("copies", ("early", "late"))
def test_copies(copies):
    """All bytes, none, which reads nothing at all, or some; the others are zeros."""
    x, out = torch.arange(1, 33, dtype=torch.int32) * 0x01010101, torch.zeros(32, dtype=torch.int32)
    run(COPY.format(copy="cp.async.ca.shared.global [%r1], [%rd12], 4;", wait=WAIT), out, x, copies=copies)
    assert (out == x).all()
    copy = """setp.lt.u32 %p1, %r0, 8; selp.b32 %r3, 4, 0, %p1; mov.b64 %rd20, 64; selp.b64 %rd12, %rd12, %rd20, %p1;
    cp.async.ca.shared.global [%r1], [%rd12], 4, %r3;"""
    run(COPY.format(copy=copy, wait=WAIT), out, x, copies=copies)
    assert (out[:8] == x[:8]).all() and (out[8:] == 0).all()
    copy = "mov.b32 %r3, 2; cp.async.ca.shared.global [%r1], [%rd12], 4, %r3;"
    run(COPY.format(copy=copy, wait=WAIT), out, x, copies=copies)
    assert (out == x & 0xFFFF).all()


def test_groups_of_copies():
    """A wait leaves the youngest groups in flight."""
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    copy = """cp.async.ca.shared.global [%r1], [%rd12], 4; cp.async.commit_group;
    cp.async.ca.shared.global [%r1+128], [%rd12+128], 4;"""
    run(COPY.format(copy=copy, wait="cp.async.wait_group 1;"), out, x, copies="late")
    assert (out == x[:32]).all()


def test_threads_that_part():
    """A loop whose length is each thread's own, in each program another one."""
    out = torch.zeros(3, 64, dtype=torch.int32)
    code = """
    mov.u32 %r1, %ctaid.x; add.s32 %r2, %r0, %r1; rem.u32 %r2, %r2, 7;
    mov.b32 %r3, 0; mov.b32 %r4, 0;
$L1:
    setp.ge.u32 %p1, %r4, %r2;
    @%p1 bra $L2;
    add.s32 %r3, %r3, %r4; add.s32 %r4, %r4, 1;
    bra.uni $L1;
$L2:
    setp.eq.b32 %p2, %r2, 0;
    @!%p2 bra $L3;
    mov.b32 %r3, 1000;
$L3:
    bar.sync 0;
    mad.lo.s32 %r5, %r1, 64, %r0; mul.wide.u32 %rd1, %r5, 4; add.s64 %rd1, %rd1, %rd0;
    st.global.b32 [%rd1], %r3;"""
    for apart in (False, True):
        run(code, out, threads=64, programs=3, apart=apart)
        n = (torch.arange(64)[None, :] + torch.arange(3)[:, None]) % 7
        assert (out == torch.where(n == 0, 1000, n * (n - 1) // 2)).all()


def test_guards():
    x, out = torch.arange(32, dtype=torch.int32), torch.full((32,), -1, dtype=torch.int32)
    code = (
        SLOTS
        + """
    and.b32 %r5, %r0, 1; setp.ne.b32 %p1, %r5, 0;
    mov.b32 %r6, 77; mul.wide.u32 %rd11, %r0, 4; add.s64 %rd11, %rd11, %rd1;
    mov.b64 %rd12, 16; selp.b64 %rd11, %rd11, %rd12, %p1;
    @%p1 ld.global.b32 %r6, [%rd11];
    setp.lt.u32 %p2, %r0, 16;
    @!%p2 mov.u32 %r6, %r5;
    setp.lt.u32 %p3, %r0, 30;
    @%p3 st.global.b32 [%rd10], %r6;"""
    )
    run(code, out, x)
    t = torch.arange(32)
    expected = torch.where(t < 16, torch.where(t % 2 == 1, t, 77), t % 2)
    assert (out == torch.where(t < 30, expected, -1)).all()


EXCHANGE = (
    SLOTS
    + """
    st.shared.b32 [%r1], %r0;
    {barrier}
    xor.b32 %r5, %r1, 128;
    ld.shared.b32 %r6, [%r5];
    st.global.b32 [%rd10], %r6;"""
)


@pytest.mark.parametrize("apart", (False, True), ids=("in step", "apart"))
@pytest.mark.parametrize("seed", range(3))
def test_warps_meet_at_a_barrier(apart, seed):
    out = torch.zeros(64, dtype=torch.int32)
    machine = run(EXCHANGE.format(barrier="bar.sync 0;"), out, threads=64, apart=apart, seed=seed)
    assert (out == torch.arange(64) ^ 32).all()
    assert machine.launches["kernel"] == machine.programs["kernel"] == 1 and machine.instructions["kernel"] > 0


def test_unwritten():
    """Shared memory and registers are NaN before they are written."""
    out = torch.zeros(2, 32)
    run(SLOTS + "ld.shared.b32 %r5, [%r1]; st.global.b32 [%rd10], %r5; st.global.b32 [%rd10+128], %r99;", out)
    assert out.isnan().all()


# Faults: each kind, and beside it a program that differs by what is wrong and is silent.


@pytest.mark.parametrize(
    "code",
    [
        "add.sat.s32 %r1, %r0, 1;", "add.f32.ftz %r1, %r0, %r0;", "add.rz.f32 %r1, %r0, %r0;",
        "add.cc.s32 %r1, %r0, 1;",
        "atom.global.add.u32 %r1, [%rd0], 1;", "ld.volatile.global.b32 %r1, [%rd0];", "bar.sync 0, 32;",
        "popc.b32 %r1, %r0;",
        "mov.u32 %r1, %smid;", "setp.lt.and.s32 %p1, %r0, 1, %p2;", "cvt.rz.bf16.f32 %r1, %r0;", "mul.s32 %r1, %r0, 1;",
        "mbarrier.init.shared::cta.b64 [%r0], 1;", "ld.local.b32 %r1, [%r0];", "@%p1 ret;", "bar.arrive 0, 64;",
    ],
)  # fmt: skip
def test_what_is_not_known(code):
    with pytest.raises(ptx.Fault) as e:
        run(code, torch.zeros(32))
    assert e.value.kind == "instruction" and e.value.kernel == "kernel"


def faulty(kind, code, *arguments, **how):
    """Runs what has to fault, in every way that is left open; gives the last fault."""
    for seed in range(4):
        with pytest.raises(ptx.Fault) as e:
            run(code, *arguments, seed=seed, **how)
        assert e.value.kind == kind, str(e.value)
        assert e.value.kernel == "kernel" and e.value.source == "kernel.py:1:0" and e.value.line
    return e.value


def silent(code, *arguments, **how):
    for seed in range(4):
        run(code, *arguments, seed=seed, **how)


def test_stray():
    store = SLOTS + "st.global.b32 [%rd10+{}], %r0;"
    silent(store.format(4), torch.zeros(33))
    for offset in (4, -4):
        fault = faulty("stray", store.format(offset), torch.zeros(32))
        assert fault.program == (0, 0, 0)
    # The next tensor in memory is no better than nothing; a pointer to one that is known is.
    both = torch.zeros(64)
    silent(store.format(64), both[:48])
    load = "ld.global.b64 %rd2, [%rd0]; st.global.b32 [%rd2], %r0;"
    target = torch.zeros(4)
    pointer = torch.tensor([target.data_ptr()])
    faulty("stray", load, pointer)
    machine = ptx.Emulator("sm_90")
    machine.memory.keep(target)
    text = TEXT.format(params=".param .u64 p", loads="ld.param.b64 %rd0, [p];", threads=32, code=load)
    machine.run(text, 0, (1, 1, 1), [pointer])


def test_which_program():
    code = """
    mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd1, %r1, 128; add.s64 %rd1, %rd1, %rd0;
    mul.wide.u32 %rd2, %r0, 4; add.s64 %rd1, %rd1, %rd2; st.global.b32 [%rd1], %r0;"""
    silent(code, torch.zeros(5, 32), programs=5)
    assert faulty("stray", code, torch.zeros(4, 32), programs=5).program == (4, 0, 0)


def test_misaligned():
    silent(SLOTS + "ld.global.b32 %r5, [%rd10+4];", torch.zeros(64))
    faulty("misaligned", SLOTS + "ld.global.b32 %r5, [%rd10+2];", torch.zeros(64))
    faulty("misaligned", SLOTS + "ld.global.v2.b32 {%r5, %r6}, [%rd10];", torch.zeros(64))
    silent(SLOTS + "st.shared.b32 [%r1+4], %r0;", torch.zeros(32))
    faulty("misaligned", SLOTS + "st.shared.b32 [%r1+1], %r0;", torch.zeros(32))


def test_outside():
    silent(SLOTS + "st.shared.b32 [%r1+896], %r0;", torch.zeros(32), shared=1024)
    faulty("outside", SLOTS + "st.shared.b32 [%r1+900], %r0;", torch.zeros(32), shared=1024)
    masked = SLOTS + "setp.lt.u32 %p1, %r0, 31; @%p1 st.shared.b32 [%r1+900], %r0;"
    silent(masked, torch.zeros(32), shared=1024)


def test_undelivered():
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    copy = "cp.async.ca.shared.global [%r1], [%rd12], 4;"
    silent(COPY.format(copy=copy, wait=WAIT), out, x)
    faulty("undelivered", COPY.format(copy=copy, wait=""), out, x)
    two = copy + "cp.async.commit_group; cp.async.ca.shared.global [%r1+128], [%rd12], 4;"
    silent(COPY.format(copy=two, wait="cp.async.wait_group 1;"), out, x)
    faulty("undelivered", COPY.format(copy=two, wait="cp.async.wait_group 2;"), out, x)
    # Written under the copy; and a wait that is another warp's.
    faulty("undelivered", COPY.format(copy=copy + "st.shared.b32 [%r1], %r0;", wait=WAIT), out, x)
    other = "xor.b32 %r1, %r1, 128;"
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    silent(COPY.format(copy=copy, wait=WAIT + "bar.sync 0;" + other), out, x, threads=64)
    with pytest.raises(ptx.Fault, match="race|undelivered"):
        run(COPY.format(copy=copy, wait=WAIT + other), out, x, threads=64, apart=False)


PAIR = "mov.b64 %rd20, 0x4000000000010000; mov.b64 %rd21, 0x4000000000010000;"
FORM = "m64n16k8.f32.tf32.tf32"


def product(before="", after="", code=PAIR, fence="fence.proxy.async.shared::cta;", **how):
    return fill(2048, fence=fence) + code + wgmma(FORM, "%rd20", "%rd21", before=before, after=after, **how)


def products_of(**how):
    return torch.zeros(8, 128), torch.ones(2048), {"threads": 128, "shared": 8192}


@pytest.mark.parametrize("products", ("early", "late"))
def test_products_in_flight(products):
    out, x, how = products_of()
    how["products"] = products
    silent(product(), out, x, **how)
    faulty("overwritten", product(after="st.shared.b32 [%r1], %r0;"), out, x, **how)
    silent(product(after="ld.shared.b32 %r3, [%r1];"), out, x, **how)
    faulty("register", product(after="add.f32 %r3, %r101, %r101;"), out, x, **how)
    faulty("register", product(after="mov.b32 %r102, 0;"), out, x, **how)
    faulty("register", product(wait=""), out, x, **how)
    second = wgmma(FORM, "%rd20", "%rd21")
    silent(product() + second, out, x, **how)
    faulty("register", product() + second.replace("wgmma.fence.sync.aligned;", ""), out, x, **how)
    no_fence = product().replace("wgmma.fence.sync.aligned;", "")
    faulty("register", no_fence, out, x, **how)
    in_registers = product().replace("%rd20, %rd21", "{%r50, %r51, %r52, %r53}, %rd21")
    silent(in_registers, out, x, **how)
    late = product(after="mov.b32 %r51, 0;").replace("%rd20, %rd21", "{%r50, %r51, %r52, %r53}, %rd21")
    faulty("register", late, out, x, **how)


def test_proxy():
    out, x, how = products_of()
    silent(product(), out, x, **how)
    faulty("proxy", product(fence=""), out, x, **how)
    silent(product(fence="", before="fence.proxy.async.shared::cta;"), out, x, **how)


def test_race():
    out = torch.zeros(64, dtype=torch.int32)
    fault = faulty("race", EXCHANGE.format(barrier=""), out, threads=64)
    assert "without a barrier in between" in fault.detail and "kernel.py:1:0" in fault.detail
    # Two halves of a word are two warps'; one value may be written by both, two may not.
    halves = """and.b32 %r1, %r0, 31; shl.b32 %r1, %r1, 2; shr.u32 %r2, %r0, 5;
    shl.b32 %r2, %r2, 1; add.s32 %r1, %r1, %r2;
    cvt.u16.u32 %rs1, %r0; st.shared.b16 [%r1], %rs1;"""
    silent(halves, out, threads=64)
    faulty("race", halves.replace("add.s32 %r1, %r1, %r2;", ""), out, threads=64)
    silent("mov.b32 %r1, 0; mov.b32 %r2, 5; st.shared.b32 [%r1], %r2;", out, threads=64)
    # A barrier before the next round of writes is needed as well.
    again = EXCHANGE.format(barrier="bar.sync 0;") + "{} st.shared.b32 [%r1], %r6;"
    silent(again.format("bar.sync 0;"), out, threads=64)
    faulty("race", again.format(""), out, threads=64)


@pytest.mark.parametrize("apart", (False, True), ids=("in step", "apart"))
def test_barrier(apart):
    part = "setp.lt.u32 %p1, %r0, {}; @%p1 bra $L1; bar.sync 0; {} $L1:\n {}"
    out = torch.zeros(64)
    silent(part.format(64, "", "bar.sync 0;"), out, threads=64, apart=apart)
    faulty("barrier", part.format(32, "", ""), out, threads=64, apart=apart)
    faulty("barrier", part.format(32, "bra.uni $L2;", "bar.sync 1; $L2:\n"), out, threads=64, apart=apart)
    faulty("barrier", part.format(16, "", "bar.sync 0;"), out, threads=64, apart=apart)


def test_divergence():
    part = "setp.lt.u32 %p1, %r0, {}; @%p1 bra $L1; shfl.sync.bfly.b32 %r1, %r0, 1, 31, {};\n $L1:\n"
    silent(part.format(32, -1), torch.zeros(32), threads=64)
    faulty("divergence", part.format(16, -1), torch.zeros(32))
    faulty("divergence", part.format(0, 0xFFFF), torch.zeros(32))


def test_trap():
    code = "setp.ne.b32 %p1, %r0, {}; @%p1 bra $L1; trap;\n $L1:\n"
    silent(code.format(40), torch.zeros(32))
    faulty("trap", code.format(7), torch.zeros(32))


def test_altered():
    """A text may be altered before it runs."""
    out = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(ptx.Fault):
        run(EXCHANGE.format(barrier="bar.sync 0;"), out, threads=64, alter=lambda text: text.replace("bar.sync 0;", ""))


def test_choices():
    with pytest.raises(ValueError, match="arch has to be"):
        ptx.Emulator("sm_75")
    with pytest.raises(ValueError, match="copies has to be"):
        ptx.Emulator("sm_90", copies="sometimes")
