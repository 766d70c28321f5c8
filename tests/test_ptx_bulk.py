"""The PTX machine: bulk copies of boxes of tensors, and the mbarriers that they arrive at."""

from dataclasses import replace

import ptx
import pytest
import torch
from conftest import run_python
from handwritten import SWIZZLES, bits_of, fill, lay_out, run, wgmma
from handwritten_bulk import (
    BARRIER,
    BYTES,
    FENCE,
    HOW_BULK,
    MADE,
    MAP,
    OUT,
    SIZE,
    SOUND,
    SPANS,
    TYPES,
    UNMAKE,
    X,
    boxed,
    copy,
    expect,
    map_of,
    numbers,
    read,
    store,
    wait,
    whole,
)
from handwritten_tensor import HOW, PLAIN, filled, tf32_ones
from handwritten_tensor import wait as wait_at
from test_compiled import fenced
from test_ptx_faults import faulty, silent


@pytest.mark.parametrize("when", ("early", "late"))
@pytest.mark.parametrize("swizzle", SPANS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_boxes(dtype, swizzle, when):
    """Inside the tensor, past its edges on each side, and where rows end within 16 bytes; the swizzle by lay_out."""
    inner = SWIZZLES[swizzle][1] // dtype.itemsize if swizzle != "none" else 48 // dtype.itemsize
    x = torch.randn(45, 3 * inner + 8).to(dtype)[:, : 3 * inner + 1]
    box = 32, inner
    for first in ((8, inner), (0, 0), (-5, -3), (30, 2 * inner + 8), (20, 2 * inner + 3), (50, 0), (3, -inner)):
        expected = bits_of(boxed(x, box, first))
        if swizzle == "none":
            memory = expected.tobytes()
        else:
            memory = lay_out(expected, swizzle, False, dtype.itemsize)[0].tobytes()
        out = torch.zeros(len(memory), dtype=torch.uint8)
        place = f"mov.b32 %r6, {first[1]}; mov.b32 %r7, {first[0]};"
        code = whole(expect(len(memory)) + copy() + wait() + read(len(memory) // 512), place)
        run(code, out, map_of(x, box, swizzle), copies=when, **HOW_BULK)
        assert out.numpy().tobytes() == memory


def test_dimensions():
    """One to five, with a box of several elements in each."""
    for sizes in ((40,), (3, 24), (2, 5, 8), (2, 3, 3, 8), (2, 2, 3, 2, 8)):
        x = torch.randn(sizes)
        box = tuple(max(n - 1, 1) for n in sizes[:-1]) + (8,)
        first = tuple(1 for _ in sizes)
        expected = bits_of(boxed(x, box, first)).ravel()
        out = torch.zeros(128, dtype=torch.int32)
        core = expect(4 * len(expected)) + copy(where=", ".join(["1"] * len(sizes))) + wait() + read()
        run(whole(core), out, map_of(x, box), **HOW_BULK)
        assert (out[: len(expected)].numpy() == expected[:128]).all()


def test_nan_outside():
    out = torch.zeros(1024)
    silent(whole(SOUND, "mov.b32 %r7, 24;"), out, replace(MAP, nan=True), **HOW_BULK)
    assert (out.view(32, 32)[:16] == X[24:]).all() and out.view(32, 32)[16:].isnan().all()


@pytest.mark.parametrize("when", ("early", "late"))
@pytest.mark.parametrize("apart", (False, True), ids=("in step", "apart"))
def test_phases(apart, when):
    """Programs copy their own rows, as often as their indices say, from alternating phases of an mbarrier."""
    x, out = torch.randn(12, 32), torch.zeros(4, 128)
    code = f"""
    mov.u32 %r30, %ctaid.x; mul.wide.u32 %rd11, %r30, 512; add.s64 %rd10, %rd10, %rd11; mov.b32 %r31, 0;
    add.s32 %r7, %r30, 0;
$L1:
    {expect(512)} {copy(space="cluster")} and.b32 %r32, %r31, 1;
    {wait("%r32")}
    {read()}
    bar.sync 0; add.s32 %r7, %r7, 1; add.s32 %r31, %r31, 1;
    setp.le.u32 %p5, %r31, %r30; @%p5 bra $L1;"""
    for seed in range(3):
        run(whole(code), out, map_of(x, (4, 32)), programs=4, apart=apart, copies=when, seed=seed, **HOW_BULK)
        for k in range(4):
            assert (out[k].view(4, 32) == x[2 * k : 2 * k + 4]).all()


def test_arrivals_and_bytes():
    """A phase is complete once all its arrivals and bytes are there, in any order."""
    core = MADE.replace("[%r9], 1", "[%r9], 2") + "HERE" + wait() + read(8) + UNMAKE
    two = expect(1024), expect(BYTES - 1024, "@%p2")
    for order in (two + (copy(),), (copy(),) + two, two[:1] + (copy(),) + two[1:]):
        out = torch.zeros(1024)
        silent(filled(core, "".join(order)), out, MAP, **HOW_BULK)
        assert (out.view(32, 32) == X[:32]).all()
    faulty("barrier", filled(core, two[0] + copy()), OUT, MAP, **HOW_BULK)
    # A thread of each of two warps copies a box.
    halves = "and.b32 %r30, %r0, 31; setp.eq.u32 %p5, %r30, 0; setp.lt.u32 %p6, %r0, 64; and.pred %p5, %p5, %p6;"
    halves += "shr.u32 %r31, %r0, 5; shl.b32 %r7, %r31, 4; shl.b32 %r8, %r31, 11;"
    out = torch.zeros(1024)
    half = map_of(X, (16, 32))
    silent(whole(expect(BYTES) + "bar.sync 0;" + halves + copy(guard="@%p5") + wait() + read(8)), out, half, **HOW_BULK)
    assert (out.view(32, 32) == X[:32]).all()


def test_undelivered():
    silent(whole(SOUND), OUT, MAP, **HOW_BULK)
    sent = expect(BYTES) + copy()
    faulty("undelivered", whole(sent + "bar.sync 0;" + read() + wait()), OUT, MAP, **HOW_BULK)
    silent(whole(sent + "bar.sync 0;" + read(first=4096) + wait()), OUT, MAP, **HOW_BULK)
    store = "bar.sync 0; st.shared.b32 [%r1+512], %r0;"
    faulty("undelivered", whole(sent + store + wait()), OUT, MAP, **HOW_BULK)
    silent(whole(sent + wait() + store), OUT, MAP, **HOW_BULK)
    # The phase before this one has long been complete.
    faulty("undelivered", whole(sent + "bar.sync 0;" + wait(1) + read()), OUT, MAP, copies="late", **HOW_BULK)
    # One warp waits; the others know of it after a barrier.
    one = sent + "bar.sync 0; setp.lt.u32 %p5, %r0, 32; @!%p5 bra $L1;" + wait() + "\n$L1:\n HERE" + read()
    faulty("undelivered", whole(filled(one, "")), OUT, MAP, **HOW_BULK)
    silent(whole(filled(one, "bar.sync 0;")), OUT, MAP, **HOW_BULK)
    # A copy to the same place.
    again = sent + "HERE" + expect(BYTES) + copy() + wait(1) + read()
    silent(whole(filled(again, wait() + "bar.sync 0;")), OUT, MAP, **HOW_BULK)
    doubled = whole(expect(2 * BYTES) + copy() + copy() + wait() + read())
    faulty("undelivered", doubled, OUT, MAP, **HOW_BULK)
    # A phase that does not expect the second copy's bytes is complete without it.
    second = expect("HERE") + copy() + copy("%r8+4096") + wait() + read(16) + "HERE"
    silent(whole(filled(second, str(2 * BYTES), "")), OUT, MAP, **HOW_BULK)
    faulty("undelivered", whole(filled(second, str(BYTES), "")), OUT, MAP, **HOW_BULK)


def test_race():
    silent(whole(read() + "bar.sync 0;" + SOUND), OUT, MAP, **HOW_BULK)
    for access in (read(), f"st.shared.b32 [%r1], %r0; {FENCE}"):
        for seed in range(4):
            with pytest.raises(ptx.Fault, match="race|undelivered"):
                run(whole(access + SOUND), OUT, MAP, seed=seed, **HOW_BULK)
    # The warp that reads last is the one that copies.
    own = "setp.lt.u32 %p5, %r0, 32; @%p5 ld.shared.b32 %r20, [%r1];"
    silent(whole(own + SOUND), OUT, MAP, **HOW_BULK)
    # Another warp uses the mbarrier before a barrier shows it that there is one.
    unseen = whole(SOUND).replace("bar.sync 0;", "", 1)
    for seed in range(4):
        with pytest.raises(ptx.Fault, match="race|mbarrier"):
            run(unseen, OUT, MAP, seed=seed, apart=True, **HOW_BULK)
    # A store to the tensor in global memory.
    write = "setp.eq.u32 %p5, %r0, 96; @%p5 st.global.b32 [%rd2], %r0;"
    x = X.clone()
    silent(whole(SOUND + "bar.sync 0;" + write), OUT, map_of(x, (32, 32)), x, **HOW_BULK)
    faulty("race", whole(SOUND + write), OUT, map_of(x, (32, 32)), x, **HOW_BULK)


def test_overwritten():
    """A copy over what a product in flight reads."""
    product = wgmma("m64n16k8.f32.tf32.tf32", "%rd20", "%rd20", after="HERE", wait="HERE")
    descriptors = "mov.b64 %rd20, 4611686293305294848;"
    done = "wgmma.wait_group.sync.aligned 0;"
    core = fill(2048, "%rd2") + expect(BYTES) + descriptors + product + wait()
    words = torch.zeros(2048, dtype=torch.int32)
    results = torch.zeros(8, 128)
    silent(whole(filled(core, "", done + "bar.sync 0;" + copy())), results, MAP, words, **HOW_BULK)
    faulty("overwritten", whole(filled(core, "bar.sync 0;" + copy(), done)), results, MAP, words, **HOW_BULK)
    faulty("race", whole(filled(core, "", done + copy())), results, MAP, words, **HOW_BULK)
    # Of tcgen05.
    out, words, make = tf32_ones()
    bulk = "mov.b32 %r8, 0; mov.b32 %r6, 0; mov.b32 %r7, 0; mov.b32 %r9, %r16; mov.b64 %rd1, %rd2;"
    start = "@%p2 mbarrier.init.shared::cta.b64 [%r16+8], 1; bar.sync 0;" + bulk + expect(BYTES, "@%p2", "%r16+8")
    end = wait_at(0, "%r16+8") + "bar.sync 0; @%p2 mbarrier.inval.shared::cta.b64 [%r16+8];"
    send = copy(at="%r16+8", guard="@%p2").replace("%rd1", "%rd2")
    silent(make(start + PLAIN + wait_at() + send + end), out, words, MAP, **HOW)
    faulty("overwritten", make(start + PLAIN + send + wait_at() + end), out, words, MAP, **HOW)


def test_products_of_what_is_copied():
    """Products need no fence after copies, but a wait."""
    a, b = torch.randint(-4, 5, (64, 8)).float(), torch.randint(-4, 5, (16, 8)).float()
    x = torch.cat([a, b])
    layout = 3 << 62 | 16 << 32  # rows of 32 bytes, groups of 8 rows are 256 bytes apart
    core = expect(2560) + copy() + f"HERE mov.b64 %rd20, {layout}; mov.b64 %rd21, {layout | 2048 >> 4};"
    core += wgmma("m64n16k8.f32.tf32.tf32", "%rd20", "%rd21") + wait()
    out = torch.zeros(8, 128)
    tensor_map = map_of(x, (80, 8), "32 bytes")
    silent(whole(filled(core, wait() + "bar.sync 0;")), out, tensor_map, **HOW_BULK)
    true = (a @ b.t()).view(4, 2, 8, 2, 4, 2)  # warp, half, group, half of the columns, thread, element
    assert (out.view(2, 2, 2, 4, 8, 4).permute(3, 1, 4, 0, 5, 2) == true).all()
    faulty("undelivered", whole(filled(core, "")), out, tensor_map, **HOW_BULK)


def test_proxy():
    store = "st.shared.b32 [%r1], %r0; HERE bar.sync 0;"
    silent(whole(filled(store, FENCE) + SOUND), OUT, MAP, **HOW_BULK)
    faulty("proxy", whole(filled(store, "") + SOUND), OUT, MAP, **HOW_BULK)
    silent(whole(filled(store.replace("[%r1]", "[%r1+4096]"), "") + SOUND), OUT, MAP, **HOW_BULK)


@pytest.mark.parametrize("when", ("early", "late"))
@pytest.mark.parametrize("swizzle", SPANS)
def test_stores(swizzle, when):
    """A box is loaded, and stored elsewhere, within another tensor or partly outside: the swizzle falls out."""
    inner = 32 if swizzle == "none" else SWIZZLES[swizzle][1] // 4
    x, box = torch.arange(64 * inner).view(64, inner).int().view(torch.float32), (24, inner)
    for first in ((3, 0), (50, 0), (-7, 4), (0, -1), (70, 0)):
        y = torch.full((60, inner), -1).int().view(torch.float32)
        core = expect(24 * inner * 4) + copy() + wait() + f"mov.b32 %r6, {first[1]}; mov.b32 %r7, {first[0]};"
        core += "mov.b64 %rd1, %rd2;" + store()
        run(whole(core), OUT, map_of(x, box, swizzle), map_of(y, box, swizzle), copies=when, **HOW_BULK)
        expected = torch.full((60, inner), -1).int()
        for row in range(max(first[0], 0), min(first[0] + 24, 60)):
            for column in range(max(first[1], 0), min(first[1] + inner, inner)):
                expected[row, column] = (row - first[0]) * inner + column - first[1]
        assert torch.equal(y.view(torch.int32), expected)


def test_groups():
    """A wait leaves the last few groups; a thread that has issued none may wait as well."""
    group = "cp.async.bulk.commit_group;"
    core = f"{numbers(0, 8)} {FENCE} bar.sync 0;" + store(done=group)
    core += "add.s32 %r8, %r8, 2048; mov.b32 %r7, 16;" + store(done=group + "HERE bar.sync 0; HERE")
    half, one, all_groups = (
        map_of(X.clone(), (16, 32)),
        "cp.async.bulk.wait_group.read 1;",
        "cp.async.bulk.wait_group 0;",
    )
    silent(whole(filled(core, all_groups, numbers(0, 8))), OUT, half, **HOW_BULK)
    silent(whole(filled(core, one, numbers(0, 4) + all_groups)), OUT, half, **HOW_BULK)
    faulty("overwritten", whole(filled(core, one, numbers(4, 8) + all_groups)), OUT, half, **HOW_BULK)


def test_faults_of_stores():
    x, wait_read = X.clone(), "cp.async.bulk.wait_group.read 0;"
    tensor_map = map_of(x, (32, 32))
    sound = numbers(0, 8) + FENCE + "bar.sync 0;" + store()
    silent(whole(sound + "bar.sync 0;" + numbers(0, 8)), OUT, tensor_map, **HOW_BULK)
    assert (x[:32].view(torch.int32).ravel() == torch.arange(1024)).all()
    faulty("proxy", whole(sound.replace(FENCE, "")), OUT, tensor_map, **HOW_BULK)
    unread = sound.replace(wait_read, "bar.sync 0;")
    faulty("overwritten", whole(unread + numbers(0, 1) + wait_read), OUT, tensor_map, **HOW_BULK)
    silent(whole(unread + read() + wait_read), OUT, tensor_map, **HOW_BULK)
    for unordered in (sound.replace("bar.sync 0;", ""), sound + numbers(0, 1)):
        for seed in range(4):
            with pytest.raises(ptx.Fault, match="race|overwritten|proxy"):
                run(whole(unordered), OUT, tensor_map, seed=seed, **HOW_BULK)
    for lost in (wait_read, "cp.async.bulk.commit_group;"):
        faulty("pending", whole(sound.replace(lost, "")), OUT, tensor_map, **HOW_BULK)
    # What a copy in flight brings.
    brought = expect(BYTES) + copy() + "HERE" + store() + "HERE"
    silent(whole(filled(brought, wait(), "")), OUT, tensor_map, **HOW_BULK)
    faulty("undelivered", whole(filled(brought, "", wait())), OUT, tensor_map, **HOW_BULK)
    # A load from the tensor by another warp.
    other = "setp.eq.u32 %p5, %r0, 96; @%p5 ld.global.b32 %r22, [%rd2];"
    silent(whole(sound + "bar.sync 0;" + other), OUT, tensor_map, x, **HOW_BULK)
    faulty("race", whole(sound + other), OUT, tensor_map, x, **HOW_BULK)


def test_mbarrier():
    faulty("mbarrier", whole(SOUND.replace("[%r9];", "[%r19];", 1)), OUT, MAP, **HOW_BULK)
    faulty("mbarrier", whole(SOUND.replace("_, [%r9]", "_, [%r19]")), OUT, MAP, **HOW_BULK)
    faulty("mbarrier", whole(expect(BYTES - 16) + copy() + wait()), OUT, MAP, **HOW_BULK)
    faulty("mbarrier", whole(expect(1 << 20) + copy() + wait()), OUT, MAP, **HOW_BULK)
    faulty("mbarrier", whole(expect(BYTES) + expect(BYTES) + copy() + wait()), OUT, MAP, **HOW_BULK)
    faulty("mbarrier", whole(f"mov.b32 %r8, {BARRIER - 128};" + SOUND), OUT, MAP, threads=128, shared=12288)


def test_barrier():
    """Bytes or an arrival that never come."""
    faulty("barrier", whole(expect(BYTES + 16) + copy() + wait()), OUT, MAP, **HOW_BULK)
    faulty("barrier", whole(copy() + wait()), OUT, MAP, **HOW_BULK)
    faulty("barrier", whole(expect(BYTES) + wait()), OUT, MAP, **HOW_BULK)


def test_pending():
    faulty("pending", whole(expect(BYTES) + copy()), OUT, MAP, **HOW_BULK)
    faulty("pending", MADE + expect(BYTES) + copy(), OUT, MAP, **HOW_BULK)


def test_addresses():
    faulty("misaligned", whole("mov.b32 %r8, 64;" + SOUND), OUT, MAP, **HOW_BULK)
    faulty("outside", whole("mov.b32 %r8, 4224;" + SOUND), OUT, MAP, threads=128, shared=SIZE - 16)
    faulty("stray", whole(SOUND, "mov.b32 %r7, 16;"), OUT, replace(MAP, sizes=(32, 48)), **HOW_BULK)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": 6}, {"sizes": (32,)}, {"base": X.view(-1)[1:]}, {"sizes": (0, 40)}, {"sizes": (32, (1 << 32) + 1)},
        {"strides": (136,)}, {"strides": (1 << 40,)}, {"box": (32, 257)}, {"box": (6, 32)},
        {"box": (64, 16), "swizzle": 3}, {"box": (16, 32), "swizzle": 1},
    ],
    ids=lambda change: str({name: "unaligned" if name == "base" else value for name, value in change.items()}),
)  # fmt: skip
def test_descriptor(change):
    with pytest.raises(ptx.Fault, match="descriptor: a tensor map with "):
        run(whole(SOUND), OUT, replace(MAP, **change), **HOW_BULK)


def test_descriptor_of_the_copy():
    faulty("descriptor", whole(SOUND.replace("2d", "1d").replace("{%r6, %r7}", "{%r6}")), OUT, MAP, **HOW_BULK)
    faulty("descriptor", whole("add.s64 %rd1, %rd1, 8;" + SOUND), OUT, MAP, **HOW_BULK)
    faulty("stray", whole("ld.global.b32 %r20, [%rd1];" + SOUND), OUT, MAP, **HOW_BULK)


def test_what_is_not_known():
    forms = (
        copy().replace("tensor.2d", "tensor.2d.im2col"), copy().replace("::bytes", "::bytes.multicast::cluster"),
        copy().replace("[%r9];", "[%r9], %rd5;"), copy().replace("{%r6, %r7}", "{%r6}"),
        copy().replace("global.mbarrier", "mbarrier"), expect(16).replace("_,", "%rd5,"),
        expect(16).replace("::cta", "::cluster"), "@%p1 mbarrier.init.shared::cta.b64 [%r19], 0;",
        "@%p1 mbarrier.init.shared::cta.b64 [%r19], 1048576;", "@%p1 cp.async.bulk.commit_group;",
        "@%p1 cp.async.bulk.wait_group 0;",
        store().replace("[%r8]", "[%r8], %rd5"), store().replace("tensor.2d", "reduce.tensor.2d"),
        copy().replace("bulk.tensor", "bulk.prefetch.tensor"),
        "cvta.shared.u64 %rd5, %rd1;", "ld.param.b64 %rd5, [kernel_param_1];",
    )  # fmt: skip
    for form in forms:
        faulty("instruction", whole(form), OUT, MAP, **HOW_BULK)
    for change in ({"kind": 11}, {"swizzle": 4}, {"swizzle": 3, "box": (8, 32)}):
        with pytest.raises(ptx.Fault, match="instruction: a tensor map of type"):
            run(whole(SOUND), OUT, replace(MAP, **change), **HOW_BULK)


@pytest.mark.thorough
@fenced
def test_compiled():
    """Triton's code, in a process of its own: in this one Triton's kernels may be interpreted."""
    command = "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/compiled_descriptors.py"
    result = run_python(*command, TRITONNET_TEST_DEVICE="sm_90", TRITON_INTERPRET=None, PYTEST_ADDOPTS=None)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr
    assert " passed" in result.stdout
