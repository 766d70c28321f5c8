"""Products of tensor descriptors as Triton compiles them, run on the PTX machine: values, and planted bugs.

    TRITONNET_TEST_DEVICE=sm_90 python -m pytest tests/compiled_descriptors.py

The variable keeps Triton's kernels from being interpreted; the tests are for all architectures. For sm_80 Triton
rewrites descriptors to pointers. test_ptx_bulk.py runs this file.
"""

import itertools

import ptx
import pytest
import torch
import triton
import triton.language as tl
from conftest import EMULATED
from exact import assert_exact
from planted import drop, edit
from triton.tools.tensor_descriptor import TensorDescriptor

if EMULATED is None:
    raise pytest.UsageError("TRITONNET_TEST_DEVICE has to be sm_80, sm_90 or sm_100")
# What is altered, and the buffers of operands, are in the code that this release of Triton generates.
of_this_release = pytest.mark.skipif(not triton.__version__.startswith("3.7."), reason=f"triton {triton.__version__}")
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@triton.jit
def product_kernel(
    a_desc, b_desc, y_ptr, sum_ptr,
    M, N, K,
    A_INNER: tl.constexpr, B_INNER: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = a @ b, and the sums of a's rows. a is (M, K), or (K, M) without A_INNER; b is (N, K) or (K, N)."""
    pid_m, pid_n = tl.program_id(0) // tl.cdiv(N, BLOCK_N), tl.program_id(0) % tl.cdiv(N, BLOCK_N)
    offs_m, offs_n = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_M, 16), tl.float32)

    tl.assume(K > 0)
    for k in range(0, K, BLOCK_K):
        a = a_desc.load([pid_m * BLOCK_M, k]) if A_INNER else a_desc.load([k, pid_m * BLOCK_M]).T
        b = b_desc.load([pid_n * BLOCK_N, k]).T if B_INNER else b_desc.load([k, pid_n * BLOCK_N])
        acc = tl.dot(a, b, acc)
        if SUMS:
            sums = tl.dot(a, tl.full((BLOCK_K, 16), 1, a.dtype), sums)

    tl.store(y_ptr + offs_m[:, None] * N + offs_n, acc, (offs_m[:, None] < M) & (offs_n < N))
    if SUMS and pid_n == 0:
        tl.store(sum_ptr + offs_m, tl.max(sums, 1), offs_m < M)


def described(x, inner, block):
    """The descriptor of x, (rows, K), as it is or transposed; rows in memory are padded to 16 bytes."""
    x, block = (x, block) if inner else (x.t(), block[::-1])
    wide = torch.full((x.shape[0], -(-x.shape[1] // 8) * 8), float("nan"), dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return TensorDescriptor(wide, list(x.shape), list(wide.stride()), list(block))


def run(arch, dtype, inner, tile, size, sums=False, warps=4, stages=3, seed=0, alter=None):
    """Launches the kernel; returns (machine, y, sums), checked against float64."""
    torch.manual_seed(0)
    (M, N, K), (block_m, block_n, block_k) = size, tile
    a, b = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    y, row_sums = torch.full((M, N), float("nan")), torch.full((M,), float("nan"))
    operands = described(a, inner[0], (block_m, block_k)), described(b, inner[1], (block_n, block_k))
    grid = (triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)
    with ptx.emulate(arch, seed=seed, alter=alter) as machine:
        product_kernel[grid](*operands, y, row_sums, M, N, K, *inner, sums, *tile, num_warps=warps, num_stages=stages)
    a, b, tf32 = a.double(), b.double(), dtype == FLOAT32
    assert_exact("y", y, a @ b.t(), a.abs() @ b.abs().t(), K, tf32)
    if sums:
        assert_exact("sums", row_sums, a.sum(1), a.abs().sum(1), K, tf32)
    return machine, y, row_sums


ALL = list(itertools.product((True, False), repeat=2))
SMALL, WIDE, DEEP, LARGE = (32, 32, 32), (64, 64, 64), (64, 128, 32), (128, 256, 64)
CASES = [
    *((BFLOAT16, inner, WIDE, (100, 72, 200), stages == 4, 4, stages) for inner, stages in zip(ALL, (2, 3, 4, 2))),
    *((FLOAT16, inner, DEEP, (130, 131, 99), False, 8, 3) for inner in ALL[:2]),
    (BFLOAT16, (True, False), SMALL, (70, 33, 65), True, 4, 3),
    (BFLOAT16, (True, True), LARGE, (130, 260, 150), False, 8, 4),
    (FLOAT32, (True, True), (64, 64, 32), (100, 72, 107), True, 4, 3),
    (FLOAT32, (True, True), SMALL, (33, 70, 65), False, 4, 2),
]
# Operands of tf32 that lie across K. On sm_100 Triton 3.7 stores each to a buffer that a product in flight still reads.
ACROSS = [(FLOAT32, inner, (64, 64, 32), (100, 72, 107), False, 4, 2) for inner in ALL[1:]]


@pytest.mark.parametrize(
    "case",
    [("sm_80", *case) for case in (CASES[3], CASES[6], CASES[8])]
    + [("sm_90", *case) for case in CASES + ACROSS]
    + [("sm_100", *case) for case in CASES],
    ids=str,
)
def test_products(case):
    """The same bits for any order of warps, programs, copies and products."""
    machine, *first = run(*case)
    found = {opcode.split(".global")[0] for opcode in machine.seen if opcode.startswith("cp.async.bulk")}
    assert found == (set() if case[0] == "sm_80" else {"cp.async.bulk.tensor.2d.shared::cta"})
    for seed in (1, 2):
        _, *again = run(*case, seed=seed)
        assert all(map(torch.equal, first[: 1 + case[5]], again))


@triton.jit
def doubling_kernel(x_desc, y_desc, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    for k in range(0, K, BLOCK_K):
        y_desc.store([tl.program_id(0) * BLOCK_M, k], x_desc.load([tl.program_id(0) * BLOCK_M, k]) * 2)


@pytest.mark.parametrize("arch", ptx.ARCHITECTURES)
@pytest.mark.parametrize("dtype", (BFLOAT16, FLOAT32), ids=str)
def test_stores(arch, dtype):
    x = torch.randn(100, 208).to(dtype)
    for seed in range(3):
        y = torch.full((100, 208), float("nan"), dtype=dtype)
        operands = (TensorDescriptor(t, [100, 200], [208, 1], [64, 32]) for t in (x, y))
        with ptx.emulate(arch, seed=seed):
            doubling_kernel[(2,)](*operands, 200, 64, 32)
        assert torch.equal(y[:, :200], 2 * x[:, :200]) and y[:, 200:].isnan().all()


@of_this_release
@pytest.mark.parametrize("case", ACROSS, ids=str)
def test_overwritten_operand(case):
    with pytest.raises(ptx.Fault, match="^overwritten: "):
        run("sm_100", *case)
    run("sm_100", *case[:-1], 1)  # without a pipeline


def no_wait(which):
    return edit(r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete.*;", "mov.pred complete, -1;", which)


# By name: the possible faults, how the code is altered, and for which architecture if not for both.
PLANTS = {
    "no wait for copies": ("undelivered", no_wait(0)),
    "fewer bytes expected": ("mbarrier", edit(r"(expect_tx.*), 16384;", r"\1, 16368;")),
    "bytes of one operand expected": ("undelivered", edit(r"(expect_tx.*), 16384;", r"\1, 8192;", None)),
    "more bytes expected": ("barrier", edit(r"(expect_tx.*), 16384;", r"\1, 16400;")),
    "a copy to another mbarrier": ("undelivered|barrier", edit(r"(bulk.*\[%r\d+)\];", r"\1+8];")),
    "a copy to another place": ("misaligned", edit(r"(bulk\S+) \[(%r\d+)\]", r"\1 [\2+16]")),
    "no copy": ("barrier", drop(r"cp\.async\.bulk", -1)),
    "no wait before mbarrier.inval": ("race|pending|register", no_wait(-1), "sm_100"),
    "no wait for a product before the next copies": ("overwritten", no_wait(1), "sm_100"),
    "no wait for products before the next copies": ("overwritten", drop(r"wgmma\.wait_group"), "sm_90"),
    "no barrier before the next copies": ("race", drop(r"bar\.sync", 6), "sm_90"),
}


@of_this_release
@pytest.mark.parametrize(
    "arch, name",
    [(arch, name) for name, (_, _, *only) in PLANTS.items() for arch in only or ("sm_90", "sm_100")],
)
def test_planted(arch, name):
    kinds, alter = PLANTS[name][:2]
    for seed in range(3):
        with pytest.raises(ptx.Fault, match=f"^({kinds}): ") as e:
            run(arch, BFLOAT16, (True, False), WIDE, (100, 72, 400), seed=seed, alter=alter)
        assert e.value.kernel == "product_kernel"
