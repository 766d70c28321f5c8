"""The PTX machine: each of its faults, by name, and a program that differs only in the bug and is silent."""

import re

import ptx
import pytest
import torch
from handwritten import COPY, EXCHANGE, SLOTS, TEXT, WAIT, fill, run, wgmma


def faulty(kind, code, *arguments, **how):
    """Runs code that must fault under every order that is left open; returns the last fault."""
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
    # An address in the next tensor is stray too; a pointer to a known tensor is not.
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
    silent(COPY.format(copy=two, wait="cp.async.wait_group 1;") + "cp.async.wait_group 0;", out, x)
    faulty("undelivered", COPY.format(copy=two, wait="cp.async.wait_group 2;"), out, x)
    # A store to the copy's destination; and a wait in another warp only.
    faulty("undelivered", COPY.format(copy=copy + "st.shared.b32 [%r1], %r0;", wait=WAIT), out, x)
    other = "xor.b32 %r1, %r1, 128;"
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    silent(COPY.format(copy=copy, wait=WAIT + "bar.sync 0;" + other), out, x, threads=64)
    with pytest.raises(ptx.Fault, match="race|undelivered"):
        run(COPY.format(copy=copy, wait=WAIT + other), out, x, threads=64, apart=False)


def test_undelivered_where_only_another_program_has_waited():
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    copy = """cp.async.ca.shared.global [%r1], [%rd12], 4; mov.u32 %r3, %ctaid.x; setp.eq.u32 %p1, %r3, {};
    @%p1 bra $L1; cp.async.wait_all;
$L1:
    mov.b32 %r4, 0;"""
    for first in (0, 1):
        faulty("undelivered", COPY.format(copy=copy.format(first), wait=""), out, x, programs=2)
        silent(COPY.format(copy=copy.format(first), wait=WAIT), out, x, programs=2)


def test_pending():
    """A program that ends before its copies have landed."""
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    copy = "cp.async.ca.shared.global [%r1], [%rd12], 4;"
    more = COPY.format(copy=copy, wait=WAIT) + "cp.async.ca.shared.global [%r1], [%rd12], 4; {}"
    silent(more.format("cp.async.commit_group; cp.async.wait_group 0;"), out, x)
    for left in ("", "cp.async.commit_group;", "cp.async.commit_group; cp.async.wait_group 1;"):
        assert "issued at PTX line" in faulty("pending", more.format(left), out, x).detail


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


def test_products_in_flight_at_a_branch_and_at_the_end():
    out, x, how = products_of()
    branch = "setp.lt.u32 %p1, %r0, {}; @%p1 bra $L9; bar.warp.sync 0xffffffff;\n$L9:\n"
    silent(product(after=branch.format(128)), out, x, **how)
    with pytest.raises(ptx.Fault, match="instruction: threads that diverge while a product is in flight"):
        run(product(after=branch.format(64)), out, x, **how)
    ends = product(before="setp.lt.u32 %p2, %r0, 128;", after="@%p2 bra $L9;").replace("ret;", "")
    faulty("pending", ends + "\n$L9:\n", out, x, **how)


def test_proxy():
    out, x, how = products_of()
    silent(product(), out, x, **how)
    faulty("proxy", product(fence=""), out, x, **how)
    silent(product(fence="", before="fence.proxy.async.shared::cta;"), out, x, **how)
    # Copies are of the generic proxy, as stores are.
    load, copied = r"ld\.global\.b32 %r2, (\S+); st\.shared\.b32 (\S+), %r2;", r"cp.async.ca.shared.global \2, \1, 4;"
    landed = "cp.async.commit_group;" + WAIT
    silent(re.sub(load, copied, product(fence=landed + "fence.proxy.async.shared::cta;")), out, x, **how)
    faulty("proxy", re.sub(load, copied, product(fence=landed)), out, x, **how)


def test_race():
    out = torch.zeros(64, dtype=torch.int32)
    fault = faulty("race", EXCHANGE.format(barrier=""), out, threads=64)
    assert "without a barrier in between" in fault.detail and "kernel.py:1:0" in fault.detail
    # Two warps may write the two halves of a word; both may write one value to one address, but not two.
    halves = """and.b32 %r1, %r0, 31; shl.b32 %r1, %r1, 2;
    shr.u32 %r2, %r0, 5; shl.b32 %r2, %r2, 1; add.s32 %r1, %r1, %r2;
    cvt.u16.u32 %rs1, %r0; st.shared.b16 [%r1], %rs1;"""
    silent(halves, out, threads=64)
    faulty("race", halves.replace("add.s32 %r1, %r1, %r2;", ""), out, threads=64)
    silent("mov.b32 %r1, 0; mov.b32 %r2, 5; st.shared.b32 [%r1], %r2;", out, threads=64)
    # A barrier before the next round of writes is needed as well.
    again = EXCHANGE.format(barrier="bar.sync 0;") + "{} st.shared.b32 [%r1], %r6;"
    silent(again.format("bar.sync 0;"), out, threads=64)
    faulty("race", again.format(""), out, threads=64)


# Two warps of 32 threads access the same 32 words of the first argument; the result is the second.
SAME = """
    and.b32 %r1, %r0, 31; shr.u32 %r2, %r0, 5; mul.wide.u32 %rd10, %r1, 4; add.s64 %rd10, %rd10, %rd0;
    mul.wide.u32 %rd11, %r0, 4; add.s64 %rd11, %rd11, %rd1;
    cvt.u64.u32 %rd12, %r2; setp.eq.u32 %p1, %r2, 0;"""


def test_race_in_global_memory():
    """In place: both warps load an element that one of them stores. One seed in two gives a right result anyway."""
    x, out = torch.zeros(32, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    in_place = SAME + "ld.global.b32 %r3, [%rd10]; add.s32 %r3, %r3, 1; {} @%p1 st.global.b32 [%rd10], %r3;"
    silent(in_place.format("bar.sync 0;"), x, out, threads=64)
    fault = faulty("race", in_place.format(""), x, out, threads=64)
    assert "of a tensor's storage" in fault.detail and fault.detail.count("kernel.py:1:0") == 1
    assert fault.program == (0, 0, 0)
    # The same in several programs, each with a part of its own; the third strays into the second one's.
    parts = SAME.replace("add.s64 %rd10, %rd10, %rd0;", "add.s64 %rd10, %rd10, %rd0; {}")
    own = parts.format("mov.u32 %r4, %ctaid.x; {} mul.wide.u32 %rd13, %r4, 128; add.s64 %rd10, %rd10, %rd13;")
    x = torch.zeros(4, 32, dtype=torch.int32)
    each = own.format("") + "@%p1 st.global.b32 [%rd10], %r3; bar.sync 0; ld.global.b32 %r3, [%rd10];"
    silent(each, x, out, threads=64, programs=4)
    assert faulty("race", each.replace("bar.sync 0;", ""), x, out, threads=64, programs=4).program[0] in range(4)
    # A barrier in a loop clears what came before it, and only that.
    one = own.format("setp.eq.u32 %p2, %r4, 2; @%p2 bra $L1; bar.sync 0;\n $L1:\n")
    again = one + "@%p1 st.global.b32 [%rd10], %r0; bar.sync 0; ld.global.b32 %r3, [%rd10];"
    silent(again, x, out, threads=64, programs=4)


def test_one_value_of_several_warps():
    x, out = torch.zeros(33, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    silent(SAME + "st.global.b32 [%rd10], %r1;", x, out, threads=64)
    faulty("race", SAME + "st.global.b32 [%rd10], %r0;", x, out, threads=64)
    # Bytes of one word are different addresses, and a word is at each of its bytes.
    silent(SAME + "add.s64 %rd10, %rd10, %rd12; st.global.b8 [%rd10], %r0;", x, out, threads=64)
    mixed = SAME + "@%p1 st.global.b32 [%rd10], %r0; @!%p1 st.global.b8 [%rd10+{}], %r0;"
    faulty("race", mixed.format(3), x, out, threads=64)
    silent(SAME + "@%p1 st.global.b8 [%rd10+2], %r0; @!%p1 st.global.b8 [%rd10+3], %r0;", x, out, threads=64)


def test_race_with_a_copy():
    """A copy reads its source until its wait."""
    x, out = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    code = (
        SAME
        + """
    shl.b32 %r5, %r0, 2;
    @%p1 cp.async.ca.shared.global [%r5], [%rd10], 4;
    cp.async.commit_group;
    {}
    @!%p1 st.global.b32 [%rd10], %r0;
    cp.async.wait_group 0;"""
    )
    faulty("race", code.format(""), x, out, threads=64)
    faulty("race", code.format("bar.sync 0;"), x, out, threads=64, copies="late")
    silent(code.format("cp.async.wait_group 0; bar.sync 0;"), x, out, threads=64)


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
