"""Kernels written by hand in PTX with tensor memory, for the tests of the PTX machine (tests/ptx)."""

import numpy as np
import torch
from handwritten import SWIZZLES, bits_of, fill, lay_out, vectors_of

# Shared memory past the operands: the slot for the tensor-memory address, and two mbarriers.
SLOT, FIRST, SECOND = 49152, 49160, 49168
SHARED = {"shared": 49176}

# %r11: the address in tensor memory; %r12: the address of the warp's quarter; %p1: warp 0; %p2: one of its threads.
START = f"""
    setp.lt.u32 %p1, %r0, 32;
    mov.b32 %r10, {SLOT};
    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r10], {{columns}};
    bar.sync 0;
    ld.shared.b32 %r11, [%r10];
    @%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    and.b32 %r12, %r0, 96; shl.b32 %r12, %r12, 16; add.s32 %r12, %r12, %r11;
    elect.sync %r13|%p2, -1; and.pred %p2, %p1, %p2;
    mul.wide.u32 %rd10, %r0, 4; add.s64 %rd10, %rd10, %rd0;"""
END = """
    bar.sync 0;
    @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r11, {columns};"""


def program(code, columns=256):
    return START.format(columns=columns) + code + END.format(columns=columns)


def filled(code, *parts):
    """Code with each HERE replaced by one of the parts."""
    for part in parts:
        code = code.replace("HERE", part, 1)
    return code


def numbered(count, first=100):
    return vectors_of(count, "%r", first)


def load(shape, count, at="%r12", split=None, wait="tcgen05.wait::ld.sync.aligned;"):
    half = "" if split is None else f", {split}"
    return f"tcgen05.ld.sync.aligned.{shape}.x{count}.b32 {numbered(count)}, [{at}]{half};{wait}"


def store(shape, count, at="%r12", split=None, guard="", wait="tcgen05.wait::st.sync.aligned;"):
    half = "" if split is None else f"{split}, "
    return f"{guard} tcgen05.st.sync.aligned.{shape}.x{count}.b32 [{at}], {half}{numbered(count)};{wait}"


def to_result(count):
    return "".join(f"st.global.b32 [%rd10+{512 * k}], %r{100 + k};" for k in range(count))


def own_values(count):
    """Registers with distinct values: 1000 times the thread index, plus the register's index."""
    lines = ["mul.lo.s32 %r20, %r0, 1000;"]
    return "".join([*lines, *(f"add.s32 %r{100 + k}, %r20, {k};" for k in range(count))])


def of_threads(count):
    return 1000 * np.arange(128)[None, :] + np.arange(count)[:, None]


KINDS = {torch.float16: ("f16", 0, 16), torch.bfloat16: ("f16", 1, 16), torch.float32: ("tf32", 2, 8)}
CODES = {"128 bytes": 2, "64 bytes": 4, "32 bytes": 6}


def matrix(address, leading, stride, swizzle):
    return address >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | CODES[swizzle] << 61


def instruction(dtype, m, n, a=False, b=False):
    form = KINDS[dtype][1]
    return 1 << 4 | form << 7 | form << 10 | a << 15 | b << 16 | n >> 3 << 17 | m >> 4 << 24


BARRIER = "@%p2 mbarrier.init.shared::cta.b64 [%r16], 1; bar.sync 0;"
COMMIT = "@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r16];"
UNMAKE = "bar.sync 0; @%p2 mbarrier.inval.shared::cta.b64 [%r16];"


def wait(parity=0, address="%r16"):
    return f"""
    {{
        .reg .pred complete;
    again:
        mbarrier.try_wait.parity.shared::cta.b64 complete, [{address}], {parity};
        @!complete bra.uni again;
    }}
    """


def product(kind, a="%rd20", d="%r11", keep="%p8", guard="@%p2"):
    return f"{guard} tcgen05.mma.cta_group::1.kind::{kind} [{d}], {a}, %rd21, %r17, {keep};"


def ones(count, shape="32x32b", at="%r12"):
    """Code that stores columns of ones; all threads meet after it."""
    lines = [f"mov.b32 %r{100 + k}, 0f3F800000;" for k in range(count)]
    return "".join([*lines, store(shape, count, at), "bar.sync 0;"])


def padded(x, wide):
    return torch.cat([x, torch.zeros(len(x), wide - x.shape[1], dtype=x.dtype)], 1)


def operands(parts, dtype, swizzle):
    """(words of shared memory, address and descriptor of each operand), from (rows by K, whether along the rows)."""
    memory, found = np.zeros(0, np.uint8), []
    for x, across in parts:
        # A swizzle's rows hold more of K than one product takes.
        x = x if across else padded(x, max(x.shape[1], SWIZZLES[swizzle][1] // dtype.itemsize))
        data, leading, stride = lay_out(bits_of(x), swizzle, across, dtype.itemsize)
        found.append(matrix(len(memory), leading, stride, swizzle))
        memory = np.concatenate([memory, np.resize(data, -(-len(data) // 1024) * 1024)])
    return torch.from_numpy(memory.view(np.int32).copy()), found


def lanes_of(m, lane=0):
    return np.arange(128) if m == 128 else lane + np.arange(64) // 16 * 32 + np.arange(64) % 16


def around(core, words, a=0, b=0, form=0, lane=0, before=""):
    """A program with operands in shared memory and one mbarrier; its result is the sums' 64 columns of all lanes."""
    code = (
        fill(words) + before + f"mov.b32 %r16, {FIRST}; mov.b64 %rd20, {a}; mov.b64 %rd21, {b}; mov.b32 %r17, {form};"
    )
    code += f"mov.pred %p8, -1; mov.pred %p7, 0; add.s32 %r11, %r11, {lane << 16};" + BARRIER + core + UNMAKE
    return program(code + f"sub.s32 %r11, %r11, {lane << 16};" + load("32x32b", 64) + to_result(64))


HOW = {"threads": 128, **SHARED}
PLAIN = product("tf32", keep="%p7") + COMMIT


def tf32_ones():
    """(result, words, function that makes a program of its core); operands are ones, so that a product's sums are 8."""
    words, places = operands([(torch.ones(128, 8), False), (torch.ones(64, 8), False)], torch.float32, "32 bytes")
    form = instruction(torch.float32, 128, 64)
    return torch.zeros(64, 128), words, lambda core: around(core, len(words), *places, form)
