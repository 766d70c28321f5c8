"""The PTX machine: matrices in shared memory, products, copies, and diverging threads."""

import re

import numpy as np
import pytest
import torch
from handwritten import COPY, EXCHANGE, SLOTS, SWIZZLES, WAIT, bits_of, fill, lay_out, run, vectors_of, wgmma


def matrices(count, dtype=np.uint16):
    return np.arange(count * 64, dtype=dtype).reshape(count, 8, 8)


@pytest.mark.parametrize("count", (1, 2, 4))
@pytest.mark.parametrize("transposed", (False, True), ids=("rows", "transposed"))
def test_matrices_to_and_from_shared_memory(count, transposed):
    """Thread t has elements 2 (t % 4) and the next of row t / 4 of each matrix; lane i gives the address of row i."""
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
    """Fragments by the ISA's figures: each thread's row, column and elements of a register."""
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
    """A product uses 11 bits of a factor, rounded towards zero: 1 + 2^-10 + 2^-11 is taken as 1 + 2^-10."""
    out = torch.zeros(32)
    code = """
    mov.b32 %r1, 0f3F803000; mov.b32 %r2, 0f3F800000; mov.b32 %r3, 0f00000000;
    mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%r4, %r5, %r6, %r7}, {%r1, %r1}, {%r2}, {%r3, %r3, %r3, %r3};
    mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd1, %rd0; st.global.b32 [%rd1], %r4;"""
    run(code, out)
    assert (out == 4 * (1 + 2**-10)).all()


def test_chains_of_products():
    """Products that continue each other's sums, and one whose intermediate result is used."""
    out = torch.zeros(2, 32)
    step = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {d}, {{%r1, %r1, %r1, %r1}}, {{%r1, %r1}}, {c};"
    d = ["{%r10, %r11, %r12, %r13}", "{%r20, %r21, %r22, %r23}", "{%r30, %r31, %r32, %r33}"]
    lines = ["mov.b32 %r1, 0f3F800000; mov.b32 %r2, 0f00000000;", step.format(d=d[0], c="{%r2, %r2, %r2, %r2}")]
    lines += [step.format(d=d[1], c=d[0]), step.format(d=d[2], c=d[1])]
    lines.append("mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd1, %rd0;")
    lines.append("st.global.b32 [%rd1], %r20; st.global.b32 [%rd1+128], %r30;")
    run("\n".join(lines), out)
    assert (out[0] == 16).all() and (out[1] == 24).all()


def descriptor(address, leading, stride, swizzle):
    return address >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLES[swizzle][0] << 62


def sums_of(out, n):
    """(64, n) from the registers of 128 threads."""
    t = torch.arange(128)
    row, column = 16 * (t // 32) + t % 32 // 4, 2 * (t % 4)
    result = torch.zeros(64, n)
    for k in range(n // 2):
        result[row + 8 * (k % 4 // 2), 8 * (k // 4) + column + k % 2] = out[k]
    return result


@pytest.mark.parametrize("products", ("early", "late"))
@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize(
    ("dtype", "major"),
    [(dtype, major) for dtype in (torch.bfloat16, torch.float16) for major in ("K, K", "M, N", "K, N", "M, K")]
    + [(torch.float32, "K, K")],  # tf32 operands lie along K
    ids=str,
)
@pytest.mark.sampled(2)
def test_wgmma(dtype, swizzle, major, products):
    """Both operands in shared memory, along K or across it, in each swizzle."""
    kind = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "tf32"}[dtype]
    by_k = [part != "K" for part in major.split(", ")]
    k, n, size = (8 if dtype == torch.float32 else 16), 64, dtype.itemsize
    torch.manual_seed(0)
    a, b = (torch.randint(-4, 5, (rows, k)).to(dtype) for rows in (64, n))
    # A swizzle's rows hold more of K than one product takes.
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


def test_group_of_products_is_one_sum():
    """Early or late, its bits are the same, though its terms could be added in many orders."""
    torch.manual_seed(0)
    x, results = torch.randn(2048), []
    code = fill(2048) + "mov.b64 %rd20, 0x4000000000010000; mov.b64 %rd21, 0x4000000000010000;"
    code += wgmma("m64n16k8.f32.tf32.tf32", "%rd20", "%rd21", keep=1)
    product = re.search(r"wgmma\.mma_async.*;", code)[0]
    for products in ("early", "late"):
        results.append(torch.zeros(8, 128))
        run(code.replace(product, 8 * product), results[-1], x, threads=128, shared=8192, products=products)
    assert torch.equal(*results) and results[0].all()


@pytest.mark.parametrize("copies", ("early", "late"))
def test_copies(copies):
    """All bytes, none, which reads nothing at all, or some; the rest is filled with zeros."""
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
    run(COPY.format(copy=copy, wait="cp.async.wait_group 1;") + WAIT, out, x, copies="late")
    assert (out == x[:32]).all()


def test_copies_of_threads_that_meet_and_part():
    """Half of the threads copy, all meet, and diverge again before they wait."""
    x = torch.arange(64, dtype=torch.int32)
    copy = """setp.lt.u32 %p1, %r0, 32; @!%p1 bra $L1;
    cp.async.ca.shared.global [%r1], [%rd12], 4;
$L1:
    {} and.b32 %r3, %r0, 32; setp.eq.s32 %p2, %r3, {}; @%p2 bra $L2; add.s32 %r4, %r0, 1;
$L2:
    """
    for apart in (False, True):
        for between in ("", "bar.sync 0;"):
            for other in (0, 32):
                out = torch.zeros(64, dtype=torch.int32)
                code = COPY.format(copy=copy.format(between, other), wait=WAIT).replace("st.global", "@%p1 st.global")
                run(code.replace("ld.shared", "@%p1 ld.shared"), out, x, threads=64, apart=apart, copies="late")
                assert (out == torch.where(x < 32, x, 0)).all()


def test_threads_that_part():
    """A loop whose length differs by thread and by program."""
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
