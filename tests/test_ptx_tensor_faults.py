"""The faults of tensor memory and its products, by name, each with a program that differs only in the bug."""

import ptx
import pytest
import torch
from handwritten import run
from handwritten_tensor import (
    BARRIER,
    COMMIT,
    FIRST,
    HOW,
    PLAIN,
    SECOND,
    SLOT,
    START,
    UNMAKE,
    filled,
    instruction,
    load,
    matrix,
    ones,
    product,
    program,
    store,
    tf32_ones,
    to_result,
    wait,
)
from test_ptx_faults import faulty, silent

FENCE = "fence.proxy.async.shared::cta;"
COPY = "mov.b32 %r30, 0; @%p2 cp.async.ca.shared.global [%r30], [%rd1], 16; cp.async.commit_group;"
NOTHING = torch.zeros(128)
MADE = f"mov.b32 %r16, {FIRST};"


def test_register():
    """Sums may be touched once a product is complete, and only by warps that know it."""
    out, words, core = tf32_ones()
    silent(core(PLAIN + wait()), out, words, **HOW)
    assert (out == 8).all()
    issued = PLAIN + "bar.sync 0;"
    faulty("register", core(issued + load("32x32b", 4) + wait()), out, words, **HOW)
    faulty("register", core(issued + store("32x32b", 4) + wait()), out, words, **HOW)
    silent(core(issued + load("32x32b", 4, "%r12+64") + wait()), out, words, **HOW)
    # A wait for an earlier phase, which was complete before, is not enough.
    trivial = core(issued + wait(1) + load("32x32b", 4) + wait())
    faulty("register", trivial, out, words, products="late", **HOW)
    faulty("barrier", trivial, out, words, products="early", **HOW)
    # One warp waits; the others know of it after a barrier.
    one = "@!%p1 bra $L1;" + wait() + "\n$L1:\n HERE" + load("32x32b", 4)
    faulty("register", core(issued + filled(one, "")), out, words, **HOW)
    silent(core(issued + filled(one, "bar.sync 0;")), out, words, **HOW)


def test_register_of_another_product():
    out, words, core = tf32_ones()
    silent(core(product("tf32", keep="%p7") + PLAIN + wait()), out, words, **HOW)
    for other in ("%r11+32", "%r11+8"):
        faulty("register", core(product("tf32", d=other) + PLAIN + wait()), out, words, **HOW)
    silent(core(product("tf32", d="%r11+64") + PLAIN + wait()), out, words, **HOW)
    silent(core(ones(8, at="%r12+64") + product("tf32", "[%r11+64]", keep="%p7") + COMMIT + wait()), out, words, **HOW)
    chained = PLAIN + "HERE" + product("tf32", "[%r11+0]", "%r11+64") + COMMIT + wait(1)
    faulty("register", core(filled(chained, "")), out, words, **HOW)
    silent(core(filled(chained, wait())), out, words, **HOW)


def test_register_of_a_load():
    use = "add.f32 %r30, %r100, %r100;"
    early = load("32x32b", 4, wait=use + "tcgen05.wait::ld.sync.aligned;")
    silent(program(ones(4) + load("32x32b", 4) + use), NOTHING, **HOW)
    faulty("register", program(ones(4) + early), NOTHING, **HOW)
    faulty("register", program(ones(4) + early.replace("%r30, %r100, %r100", "%r103, %r30, %r30")), NOTHING, **HOW)
    other = "tcgen05.st.sync.aligned.32x32b.x4.b32 [%r12], {%r30, %r31, %r32, %r33};"
    waits = "tcgen05.wait::ld.sync.aligned; tcgen05.wait::st.sync.aligned;"
    faulty("instruction", program(load("32x32b", 4, wait=other + waits)), NOTHING, **HOW)
    with pytest.raises(ptx.Fault, match="instruction: .* in a block that ends before tcgen05.wait::ld"):
        run(program(load("32x32b", 4, wait="bar.sync 0; tcgen05.wait::ld.sync.aligned;")), NOTHING, **HOW)


def test_overwritten():
    out, words, core = tf32_ones()
    write = "mov.b32 %r30, 0; @%p2 st.shared.b32 [%r30], %r30;"
    silent(core(PLAIN + wait() + write), out, words, **HOW)
    faulty("overwritten", core(PLAIN + write + wait()), out, words, **HOW)
    silent(core(PLAIN + "ld.shared.b32 %r30, [%r1];" + wait()), out, words, **HOW)
    silent(core(PLAIN + write.replace("[%r30]", f"[%r30+{SECOND}]") + wait()), out, words, **HOW)
    # Another warp waits, and a barrier follows.
    other = PLAIN + "@%p1 bra $L1;" + wait() + "\n$L1:\n HERE" + write
    faulty("overwritten", core(filled(other, "") + wait()), out, words, **HOW)
    silent(core(filled(other, "bar.sync 0;")), out, words, **HOW)
    # Products that share operands: waiting for the first does not free what the second reads.
    second = PLAIN + f"mov.b32 %r18, {SECOND};" + BARRIER.replace("%r16", "%r18") + product("tf32", d="%r11+64")
    second += (
        COMMIT.replace("%r16", "%r18") + wait() + "HERE" + wait(0, "%r18") + "HERE" + UNMAKE.replace("%r16", "%r18")
    )
    faulty("overwritten", core(filled(second, write, "")), out, words, **HOW)
    silent(core(filled(second, "", write)), out, words, **HOW)


def test_overwritten_in_tensor_memory():
    out, words, core = tf32_ones()
    code = (
        ones(8, at="%r12+64") + product("tf32", "[%r11+64]", keep="%p7") + COMMIT + "bar.sync 0; HERE" + wait() + "HERE"
    )
    write, read = store("32x32b", 4, "%r12+68"), load("32x32b", 4, "%r12+68")
    silent(core(filled(code, "", write)), out, words, **HOW)
    silent(core(filled(code, read, "")), out, words, **HOW)
    faulty("overwritten", core(filled(code, write, "")), out, words, **HOW)


def test_undelivered():
    out, words, core = tf32_ones()
    arrived = "cp.async.wait_group 0;"
    silent(core(COPY + arrived + FENCE + PLAIN + wait()), out, words, **HOW)
    faulty("undelivered", core(COPY + PLAIN + wait() + arrived), out, words, **HOW)
    # A store to tensor memory is visible after its wait.
    stored = store("32x32b", 4, wait="HERE tcgen05.wait::st.sync.aligned;")
    silent(program(filled(stored, "")), NOTHING, **HOW)
    faulty("undelivered", program(filled(stored, load("32x32b", 4))), NOTHING, **HOW)
    silent(program(filled(stored, load("32x32b", 4, "%r12+4"))), NOTHING, **HOW)
    faulty("undelivered", core(store("32x32b", 4, wait="") + PLAIN + wait()), out, words, **HOW)


def test_proxy():
    out, words, core = tf32_ones()
    assert core(PLAIN).count(FENCE) == 1
    faulty("proxy", core(PLAIN + wait()).replace(FENCE, ""), out, words, **HOW)
    silent(core(FENCE + PLAIN + wait()).replace(FENCE, "", 1), out, words, **HOW)
    faulty("proxy", core(COPY + "cp.async.wait_group 0;" + PLAIN + wait()), out, words, **HOW)


def test_race_with_a_product():
    out, words, core = tf32_ones()
    write = "setp.eq.u32 %p5, %r0, 64; mov.b32 %r30, 0; @%p5 st.shared.b32 [%r30], %r30;"
    write += FENCE + "{}"
    silent(core(write.format("bar.sync 0;") + PLAIN + wait()), out, words, **HOW)
    for seed in range(4):
        with pytest.raises(ptx.Fault, match="race|overwritten|proxy"):
            run(core(write.format("") + PLAIN + wait()), out, words, seed=seed, **HOW)
    stored = store("32x32b", 4)
    silent(core(stored + "bar.sync 0;" + PLAIN + wait()), out, words, **HOW)
    for seed in range(4):
        with pytest.raises(ptx.Fault, match="race|register"):
            run(core(stored + PLAIN + wait()), out, words, seed=seed, **HOW)


def test_race_of_two_warps_of_a_quarter():
    how = HOW | {"threads": 256}
    split = "setp.lt.u32 %p5, %r0, 128; @%p5 bra $L1;" + store("32x32b", 4) + "\n$L1:\n HERE" + load("32x32b", 4)
    silent(program(filled(split, "bar.sync 0;")), NOTHING, **how)
    faulty("race", program(filled(split, "")), NOTHING, **how)
    silent(program(load("32x32b", 4)), NOTHING, **how)
    faulty("race", program(store("32x32b", 4)), NOTHING, **how)
    beside = "shr.u32 %r30, %r0, 7; shl.b32 %r30, %r30, 2; add.s32 %r12, %r12, %r30;"
    silent(program(beside + store("32x32b", 4)), NOTHING, **how)
    # All warps must be done with columns that are deallocated.
    last = program(load("32x32b", 4))
    at = last.rindex("bar.sync 0;")
    faulty("race", last[:at] + last[at + len("bar.sync 0;") :], NOTHING, **HOW)


def test_outside():
    silent(program(load("32x32b", 32), 32), NOTHING, **HOW)
    faulty("outside", program(load("32x32b", 32, "%r12+1"), 32), NOTHING, **HOW)
    faulty("outside", program(load("16x32bx2", 16, split=17), 32), NOTHING, **HOW)
    silent(program(load("16x32bx2", 16, split=16), 32), NOTHING, **HOW)
    # Another warp's quarter, and lanes that are half in one.
    for lanes in (32, 16):
        faulty("outside", program(f"add.s32 %r12, %r12, {lanes << 16};" + load("32x32b", 4)), NOTHING, **HOW)
    faulty("outside", program(f"add.s32 %r12, %r12, {32 << 16};" + load("16x32bx2", 4, split=4)), NOTHING, **HOW)
    silent(program(f"add.s32 %r12, %r12, {16 << 16};" + load("16x32bx2", 4, split=4)), NOTHING, **HOW)
    out, words, core = tf32_ones()
    faulty("outside", core(product("tf32", d="%r11+224") + COMMIT + wait()), out, words, **HOW)
    faulty("outside", core(product("tf32", "[%r11+252]") + COMMIT + wait()), out, words, **HOW)
    past = f"mov.b64 %rd20, {matrix(SLOT, 0, 256, '32 bytes')};"
    faulty("outside", core(past + PLAIN + wait()), out, words, **HOW)


def test_allocation():
    again = f"@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r10+{FIRST - SLOT}], {{}}; bar.sync 0;"
    again += f"ld.shared.b32 %r20, [%r10+{FIRST - SLOT}];"
    again += "@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r20, {};"
    relinquish = "@%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"
    silent(program(again.format(128, 128)).replace(relinquish, ""), NOTHING, **HOW)
    faulty("outside", program(again.format(128, 128)), NOTHING, **HOW)
    faulty("outside", program(again.format(512, 512)).replace(relinquish, ""), NOTHING, **HOW)
    faulty("outside", program(again.format(128, 64)).replace(relinquish, ""), NOTHING, **HOW)
    faulty("outside", program("add.s32 %r11, %r11, 32;", 64), NOTHING, **HOW)
    faulty("pending", START.format(columns=64), NOTHING, **HOW)
    # Tensor memory is NaN when it is allocated.
    out = torch.zeros(4, 128)
    run(program(load("32x32b", 4) + to_result(4)), out, **HOW)
    assert out.isnan().all()


def test_pending():
    out, words, core = tf32_ones()
    head, tail = core("HERE").split("HERE")
    silent(head + PLAIN + wait() + tail, out, words, **HOW)
    cases = {
        "a commit of products that no warp waits for": head + PLAIN,
        "a product without tcgen05.commit": head + product("tf32", keep="%p7"),
        "tensor memory that is not deallocated": head + PLAIN + wait(),
        "mbarrier.inval without a wait for the commit": head + PLAIN + UNMAKE,
        "a store to tensor memory, without a wait": head + store("32x32b", 4, "%r12+64", wait=""),
    }
    for detail, code in cases.items():
        assert detail in faulty("pending", code, out, words, **HOW).detail


def test_barrier():
    """A wait that cannot end: nothing arrives, or one arrival is missing."""
    out, words, core = tf32_ones()
    silent(core(PLAIN + wait() + PLAIN + wait(1)), out, words, **HOW)
    faulty("barrier", core(wait()), out, words, **HOW)
    faulty("barrier", core(PLAIN + wait() + wait(1)), out, words, **HOW)
    faulty("barrier", core(PLAIN + wait() + wait(1)), out, words, programs=3, **HOW)
    part = "@%p1 bra $L1;" + wait() + "\n$L1:\n bar.sync 0;" + PLAIN + wait()
    assert "32 threads at barrier 0" in faulty("barrier", core(part), out, words, **HOW).detail


def test_mbarrier():
    silent(program(MADE + BARRIER + wait(1) + UNMAKE), NOTHING, **HOW)
    faulty("mbarrier", program(MADE + wait(1)), NOTHING, **HOW)
    faulty("mbarrier", program(MADE + COMMIT), NOTHING, **HOW)
    faulty("mbarrier", program(MADE + UNMAKE), NOTHING, **HOW)
    faulty("mbarrier", program(MADE + BARRIER + UNMAKE + wait(1)), NOTHING, **HOW)
    faulty("mbarrier", program(MADE + BARRIER + BARRIER), NOTHING, **HOW)
    for access in ("ld.shared.b32 %r30, [%r16+4];", "@%p2 st.shared.b32 [%r16], %r0;"):
        faulty("mbarrier", program(MADE + BARRIER + access + UNMAKE), NOTHING, **HOW)
        silent(
            program(MADE + BARRIER + access.replace("%r16", "%r10") + UNMAKE + "bar.sync 0;" + access), NOTHING, **HOW
        )
    faulty("misaligned", program(MADE + BARRIER.replace("%r16", "%r16+4")), NOTHING, **HOW)
    faulty("outside", program(MADE + BARRIER.replace("%r16", "%r16+64")), NOTHING, **HOW)
    faulty("race", program(MADE + BARRIER.replace("bar.sync 0;", "") + wait(1) + UNMAKE), NOTHING, apart=False, **HOW)
    faulty("race", program(MADE + BARRIER + wait(1) + UNMAKE.replace("bar.sync 0;", "")), NOTHING, apart=False, **HOW)


def test_divergence():
    half = "setp.lt.u32 %p5, %r0, 16; "
    faulty("divergence", program(half + store("32x32b", 4, guard="@%p5")), NOTHING, **HOW)
    silent(program(half.replace("16", "32") + store("32x32b", 4, guard="@%p5")), NOTHING, **HOW)
    faulty("divergence", program("add.s32 %r12, %r12, %r0;" + load("32x32b", 4)), NOTHING, **HOW)
    faulty("divergence", program(half + "@%p5 bra $L1;" + load("32x32b", 4) + "\n$L1:\n"), NOTHING, **HOW)
    faulty("divergence", program("elect.sync %r30|%p5, 65535;"), NOTHING, **HOW)
    parity = "and.b32 %r30, %r0, 1;" + BARRIER
    faulty("divergence", program(MADE + parity + wait("%r30")), NOTHING, **HOW)


@pytest.mark.parametrize(
    "code",
    [
        "tcgen05.fence::after_thread_sync;", "tcgen05.shift.cta_group::1.down [%r11];",
        "@%p2 tcgen05.wait::ld.sync.aligned;",
        "tcgen05.ld.sync.aligned.16x64b.x4.b32 {%r30, %r31, %r32, %r33}, [%r12];",
        "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r30, %r31}, [%r12];",
        "tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r30, %r31}, [%r12];",
        "tcgen05.ld.sync.aligned.32x32b.x4.pack::16b.b32 {%r30, %r31, %r32, %r33}, [%r12];",
        "tcgen05.ld.sync.aligned.16x32bx2.x4.b32 {%r30, %r31, %r32, %r33}, [%r12];",
        "@%p1 tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%r10], 64;",
        "@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r10], 48;",
        "mbarrier.arrive.shared::cta.b64 %rd1, [%r16];", "mbarrier.test_wait.parity.shared::cta.b64 %p5, [%r16], 0;",
        "mbarrier.init.shared::cta.b64 [%r16], 1;",
    ],
)  # fmt: skip
def test_what_is_not_known(code):
    faulty("instruction", program(MADE + code), NOTHING, **HOW)


def test_what_is_not_known_of_products():
    out, words, core = tf32_ones()
    plain = product("tf32", keep="%p7")
    forms = (
        plain.replace("@%p2", ""), plain.replace("@%p2", "@%p1"), plain.replace("cta_group::1", "cta_group::2"),
        plain.replace("kind::tf32", "kind::i8"), plain.replace("kind::tf32", "kind::f16"),
        plain.replace("mma.", "mma.ws."), plain.replace("%p7;", "%p7, 0;"), f"add.s32 %r11, %r11, {16 << 16};" + plain,
        product("tf32", f"[%r11+{16 << 16}]", keep="%p7"),
    )  # fmt: skip
    for form in forms:
        faulty("instruction", core(form + COMMIT + wait()), out, words, **HOW)
    for bit in (0, 2, 3, 5, 6, 7, 10, 13, 14, 15, 16, 23, 29, 30, 31):
        changed = f"xor.b32 %r17, %r17, {1 << bit};" + PLAIN + wait()
        faulty("instruction", core(changed), out, words, **HOW)
    for m, n in ((32, 64), (256, 64), (128, 8), (128, 264), (64, 0)):
        changed = f"mov.b32 %r17, {instruction(torch.float32, m, n)};" + PLAIN + wait()
        faulty("instruction", core(changed), out, words, **HOW)
    for bit in (14, 15, 30, 31, 46, 47, 48, 49, 50, 51, 52, 53, 60, 61):
        for operand in ("%rd20", "%rd21"):
            changed = f"mov.b64 %rd30, {1 << bit}; xor.b64 {operand}, {operand}, %rd30;" + PLAIN + wait()
            faulty("instruction", core(changed), out, words, **HOW)
