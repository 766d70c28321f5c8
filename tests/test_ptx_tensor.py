"""The PTX machine: tensor memory, the products into it, and the mbarriers that they arrive at (sm_100)."""

import numpy as np
import pytest
import torch
from handwritten import run
from handwritten_tensor import (
    CODES,
    COMMIT,
    HOW,
    KINDS,
    around,
    instruction,
    lanes_of,
    load,
    of_threads,
    ones,
    operands,
    own_values,
    product,
    program,
    store,
    tf32_ones,
    to_result,
    wait,
)  # fmt: skip


@pytest.mark.parametrize("count", (4, 8, 16, 32, 64, 128))
def test_lanes(count):
    """32x32b: thread t of four warps has lane t, register k column k. 16x32bx2: half the lanes, twice the columns."""
    out = torch.zeros(count, 128, dtype=torch.int32)
    code = own_values(count) + store("32x32b", count) + load("32x32b", count) + to_result(count)
    run(program(code), out, **HOW)
    assert (out.numpy() == of_threads(count)).all()
    half = count // 2
    if half >= 4:
        for upper in (0, 16):
            code = own_values(count) + store("32x32b", count) + f"add.s32 %r14, %r12, {upper << 16};"
            run(program(code + load("16x32bx2", half, "%r14", half) + to_result(half)), out, **HOW)
            for t in range(128):
                lane, column = t // 32 * 32 + upper + t % 16, half * (t % 32 // 16)
                assert (out[:half, t].numpy() == 1000 * lane + column + np.arange(half)).all()


@pytest.mark.parametrize("count", (4, 8, 16, 32, 64, 128))
def test_half_lanes(count):
    """16x32bx2, twice: its lower 16 threads have columns from 0 on, its upper ones from the split on."""
    out = torch.zeros(count, 128, dtype=torch.int32)
    code = own_values(count) + store("16x32bx2", count, split=count) + load("16x32bx2", count, split=count)
    run(program(code + to_result(count)), out, **HOW)
    assert (out.numpy() == of_threads(count)).all()
    code = own_values(count) + store("16x32bx2", count, split=count) + load("32x32b", count) + to_result(count)
    run(program(code), out, **HOW)
    for t in range(128):
        if t % 32 < 16:
            assert (out[:, t].numpy() == 1000 * t + np.arange(count)).all()
        else:
            assert (out[:, t] == -1).all()  # never written
    code = own_values(count) + store("16x32bx2", count, split=count) + f"add.s32 %r12, %r12, {count};"
    run(program(code + load("32x32b", count) + to_result(count)), out, **HOW)
    assert (out[:, 3].numpy() == 19000 + np.arange(count)).all()


def test_programs_apart():
    """Programs, and warps that have not met, are at different positions in one loop."""
    out = torch.zeros(3, 4, 128, dtype=torch.int32)
    code = f"""
    mov.u32 %r30, %ctaid.x; mov.b32 %r31, 0; mul.wide.u32 %rd11, %r30, 2048; add.s64 %rd10, %rd10, %rd11;
    {own_values(4)}
$L1:
    {store("32x32b", 4)}
    {load("32x32b", 4)}
    {"".join(f"add.s32 %r{100 + k}, %r{100 + k}, 7;" for k in range(4))}
    add.s32 %r31, %r31, 1; setp.le.u32 %p9, %r31, %r30; @%p9 bra $L1;
    {to_result(4)}"""
    for apart in (False, True):
        run(program(code), out, programs=3, apart=apart, **HOW)
        assert (out.numpy() == of_threads(4) + 7 * np.arange(1, 4)[:, None, None]).all()


MAJORS = {"K, K": (False, False), "M, N": (True, True), "K, N": (False, True), "M, K": (True, False)}


@pytest.mark.parametrize("products", ("early", "late"))
@pytest.mark.parametrize("swizzle", CODES)
@pytest.mark.parametrize(
    ("dtype", "m", "major"),
    [(torch.bfloat16, m, major) for m in (64, 128) for major in MAJORS]
    # tf32 operands lie along K.
    + [(dtype, m, major) for m in (64, 128) for dtype, major in ((torch.float16, "K, N"), (torch.float32, "K, K"))],
    ids=str,
)
@pytest.mark.sampled(3)
def test_products(dtype, m, major, swizzle, products):
    """Both operands in shared memory, along K or across it; added to ones, and not."""
    kind, _, k = KINDS[dtype]
    torch.manual_seed(0)
    a, b = (torch.randint(-4, 5, (rows, k)).to(dtype) for rows in (m, 64))
    words, places = operands(list(zip((a, b), MAJORS[major])), dtype, swizzle)
    form, true = instruction(dtype, m, 64, *MAJORS[major]), (a.float() @ b.float().T).numpy()
    for lane in (0,) if m == 128 else (0, 16):
        for keep, expected in (("%p8", true + 1), ("%p7", true)):
            out = torch.zeros(64, 128)
            core = ones(64) + product(kind, keep=keep) + COMMIT + wait()
            code = around(core, len(words), *places, form, lane)
            run(code, out, words, products=products, **HOW)
            rows = lanes_of(m, lane)
            assert (out.numpy()[:, rows].T == expected).all()
            assert (np.delete(out.numpy(), rows, 1) == 1).all()  # nothing else has been touched


@pytest.mark.parametrize("products", ("early", "late"))
@pytest.mark.parametrize(("m", "lane"), ((128, 0), (64, 0), (64, 16)))
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_products_of_tensor_memory(dtype, m, lane, products):
    """A in tensor memory, 32 bits of a row in each column; twice, so that the second product adds to the first."""
    kind, _, k = KINDS[dtype]
    torch.manual_seed(0)
    a, b = torch.randint(-4, 5, (m, k)).to(dtype), torch.randint(-4, 5, (64, k)).to(dtype)
    words, (place,) = operands([(b, False)], dtype, "32 bytes")
    image = np.full((8, 128), -1, np.int32)
    image[:, lanes_of(m, lane)] = a.view(torch.int32).numpy().T
    loads = "mul.wide.u32 %rd12, %r0, 4; add.s64 %rd12, %rd12, %rd2;"
    loads += "".join(f"ld.global.b32 %r{100 + c}, [%rd12+{512 * c}];" for c in range(8))
    core = loads + store("32x32b", 8, "%r12+80") + "bar.sync 0;"
    core += product(kind, "[%r11+80]", keep="%p7") + product(kind, "[ %r11 + 80 ]") + COMMIT + wait()
    out = torch.zeros(64, 128)
    code = around(core, len(words), 0, place, instruction(dtype, m, 64), lane)
    run(code, out, words, torch.from_numpy(image), products=products, **HOW)
    assert (out.numpy()[:, lanes_of(m, lane)].T == 2 * (a.float() @ b.float().T).numpy()).all()


def test_tf32_is_cut_off():
    """A product uses 11 bits of a factor, rounded towards zero."""
    a, b = torch.full((128, 8), 1 + 2**-10 + 2**-11), torch.ones(64, 8)
    words, places = operands([(a, False), (b, False)], torch.float32, "32 bytes")
    out = torch.zeros(64, 128)
    core = product("tf32", keep="%p7") + COMMIT + wait()
    run(around(core, len(words), *places, instruction(torch.float32, 128, 64)), out, words, **HOW)
    assert (out == 8 * (1 + 2**-10)).all()


@pytest.mark.parametrize("products", ("early", "late"))
@pytest.mark.parametrize("apart", (False, True), ids=("in step", "apart"))
def test_phases(apart, products):
    """A loop of products into the same sums, with waits for alternating phases; each adds 8 in three programs."""
    out, words, core = tf32_ones()
    loop = f"""
    mov.b32 %r30, 0; mov.pred %p6, %p7;
$L1:
    {product("tf32", keep="%p6")} {COMMIT} mov.pred %p6, %p8; and.b32 %r31, %r30, 1;
    {wait("%r31")}
    add.s32 %r30, %r30, 1; bar.sync 0; setp.lt.s32 %p5, %r30, 5; @%p5 bra $L1;"""
    run(core(loop), out, words, programs=3, apart=apart, products=products, **HOW)
    assert (out == 40).all()


@pytest.mark.parametrize("products", ("early", "late"))
def test_programs_with_other_products(products):
    """Programs run a loop of products as often as their indices say, each into its own part of the result."""
    out, words, core = tf32_ones()
    out = torch.zeros(3, 64, 128)
    loop = f"""
    mov.u32 %r32, %ctaid.x; mul.wide.u32 %rd30, %r32, 32768; add.s64 %rd10, %rd10, %rd30;
    mov.b32 %r30, 0; mov.pred %p6, %p7;
$L1:
    {product("tf32", keep="%p6")} {COMMIT} mov.pred %p6, %p8; and.b32 %r31, %r30, 1;
    {wait("%r31")}
    add.s32 %r30, %r30, 1; bar.sync 0; setp.le.u32 %p5, %r30, %r32; @%p5 bra $L1;"""
    for apart in (False, True):
        run(core(loop), out, words, programs=3, apart=apart, products=products, **HOW)
        assert (out == 8 * torch.arange(1, 4)[:, None, None]).all()
