"""Kernels written by hand in PTX with bulk copies of tensors' boxes, for the tests of the PTX machine (tests/ptx)."""

import torch
from handwritten_tensor import wait as wait_at
from ptx.descriptors import TensorMap

# Shared memory past the boxes: two mbarriers.
BARRIER, OTHER, SIZE = 8192, 8200, 8208
# %rd10, %r1: each thread's 4 bytes in the result and in shared memory. %r6, %r7: a box's first element. %r8: its place
# in shared memory. %r9: the mbarrier. %p1, %p2: a thread of warp 0, and one of warp 1.
MADE = f"""
    mov.b32 %r9, {BARRIER}; mov.b32 %r19, {OTHER}; mov.b32 %r8, 0; mov.b32 %r6, 0; mov.b32 %r7, 0;
    setp.eq.u32 %p1, %r0, 0; setp.eq.u32 %p2, %r0, 32;
    mul.wide.u32 %rd10, %r0, 4; add.s64 %rd10, %rd10, %rd0; shl.b32 %r1, %r0, 2;
    @%p1 mbarrier.init.shared::cta.b64 [%r9], 1;
    bar.sync 0;"""
UNMAKE = "bar.sync 0; @%p1 mbarrier.inval.shared::cta.b64 [%r9];"
FENCE = "fence.proxy.async.shared::cta;"
TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
SPANS = {"none": 0, "32 bytes": 1, "64 bytes": 2, "128 bytes": 3}


def expect(count, guard="@%p1", at="%r9"):
    return f"{guard} mbarrier.arrive.expect_tx.shared::cta.b64 _, [{at}], {count};"


def copy(to="%r8", at="%r9", where="%r6, %r7", guard="@%p1", space="cta"):
    dimensions = where.count(",") + 1
    opcode = f"cp.async.bulk.tensor.{dimensions}d.shared::{space}.global.mbarrier::complete_tx::bytes"
    return f"{guard} {opcode} [{to}], [%rd1, {{{where}}}], [{at}];"


def store(guard="@%p1", done="cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"):
    opcode = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"
    return f"{guard} {opcode} [%rd1, {{%r6, %r7}}], [%r8]; {done}"


def wait(parity=0):
    return wait_at(parity, "%r9")


def read(count=1, first=0):
    """128 threads read that many words each, and store them."""
    word = "ld.shared.b32 %r20, [%r1+{}]; st.global.b32 [%rd10+{}], %r20;"
    return "".join(word.format(first + 512 * k, 512 * k) for k in range(count))


def numbers(first, last):
    """128 threads store as many words each in shared memory, whose values are their indices."""
    word = "add.s32 %r21, %r0, {}; st.shared.b32 [%r1+{}], %r21;"
    return "".join(word.format(128 * k, 512 * k) for k in range(first, last))


def map_of(x, box, swizzle="none"):
    """The TensorMap of a tensor; box: from the outermost dimension on."""
    strides = tuple(n * x.itemsize for n in x.stride()[-2::-1])
    return TensorMap(x, TYPES[x.dtype], x.itemsize, tuple(x.shape[::-1]), strides, box[::-1], SPANS[swizzle], False)


def boxed(x, box, first):
    """The box of a tensor from an element on, both from the outermost dimension on."""
    result = torch.zeros(box, dtype=x.dtype)
    ranges = [(max(k, 0), max(min(k + n, size), 0)) for k, n, size in zip(first, box, x.shape)]
    inside = x[tuple(slice(low, high) for low, high in ranges)]
    result[tuple(slice(low - k, low - k + n) for (low, _), k, n in zip(ranges, first, inside.shape))] = inside
    return result


HOW_BULK = {"threads": 128, "shared": SIZE}
X = torch.randn(40, 32)
# 4,096 bytes: 32 rows of 128.
MAP, BYTES = map_of(X, (32, 32)), 4096
OUT = torch.zeros(2048, dtype=torch.int32)


def whole(core, before=""):
    return MADE + before + core + UNMAKE


SOUND = expect(BYTES) + copy() + wait() + read(8)
