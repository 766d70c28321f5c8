"""How the elements of each channel are divided among programs, and which of them a block holds.

A dense tensor is (outer, C, inner) in memory, in whatever order its dimensions lie: inner is 1 in channels_last, and an
image's pixels in NCHW. A channel has count = outer * inner elements, m = 0, 1, ... A program has `rows` of them, or
what is left: those of a block of channels where inner is 1, else those of one channel. It visits them in blocks of
(BLOCK_M, BLOCK_N): elements and channels, or neighbours that a thread loads at once.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._common import INTERPRETED, acc_type, cdiv, divide, index_type, power_of_2, reciprocal
from ..launching import remembered
from ..tiles import clamped_power

# The elements of a block, eight for each thread of four warps.
BLOCK = 1024
# Programs that share a tensor, four on each multiprocessor of an H100 or H200, and the fewest steps of each.
PROGRAMS, LEAST_STEPS = (4, 2) if INTERPRETED else (4 * 132, 2)
# Bytes of all tensors that a thread loads at once: enough that four programs keep a multiprocessor's memory busy.
LOADED = 64


class Division(NamedTuple):
    """How a tensor is divided: `parts` programs share the elements of a channel, and have `rows` of them each."""

    C: int
    inner: int
    count: int
    block_m: int
    block_n: int
    unroll: int
    rows: int
    parts: int

    @classmethod
    def of(cls, x, loaded=1):
        """The division of a dense x, not empty, for a kernel that loads so many tensors of its size."""
        C = x.shape[1]
        return _division(C, x.stride(1) if C > 1 else x.numel(), x.numel() // C, x.element_size(), loaded)

    def launch(self, x):
        """(grid, numbers, constants) of a kernel over x; C and inner are in units that divide 16 bytes."""
        channels = self.inner == 1
        unit_c = math.gcd(16 // x.element_size(), self.C) if channels else 1
        unit_i = 1 if channels else self.block_n
        blocks = cdiv(self.C, self.block_n) if channels else self.C
        numbers = self.count, self.rows, self.C // unit_c, self.inner // unit_i, reciprocal(self.inner)
        return (blocks, self.parts), numbers, dict(
            C_UNIT=unit_c, INNER_UNIT=unit_i, CHANNELS=channels, INDEX=index_type(x), ACC=acc_type(x.dtype),
            BLOCK_M=self.block_m, BLOCK_N=self.block_n, UNROLL=self.unroll, num_warps=4,
        )  # fmt: skip

    def partials(self, x, results):
        """So many results of each program for each of its channels, uninitialised."""
        return x.new_empty(results, self.parts, self.C, dtype=torch.promote_types(x.dtype, torch.float32))


@remembered
def _division(C, inner, count, itemsize, loaded):
    vector = 16 // itemsize
    # Whole lines of memory of 128 bytes: a pixel's channels, or a channel's pixels, 16 bytes for each thread.
    block_n = min(power_of_2(C), 8 * vector) if inner == 1 else math.gcd(vector, inner)
    block = clamped_power(C * count // 16, BLOCK, 2**14) if INTERPRETED else BLOCK
    block_m, unroll = block // block_n, max(1, LOADED // (8 * itemsize * loaded))
    # Elements of a channel in a step.
    step = block_m * unroll * (1 if inner == 1 else block_n)
    blocks = cdiv(C, block_n) if inner == 1 else C
    parts = max(1, min(PROGRAMS // blocks, count // (LEAST_STEPS * step)))
    rows = cdiv(cdiv(count, parts), step) * step
    return Division(C, inner, count, block_m, block_n, unroll, rows, cdiv(count, rows))


@triton.jit
def channels_of(CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The program's channels: (1, BLOCK_N), or (1, 1) where it has one."""
    if CHANNELS:
        return tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    else:
        return tl.program_id(0) + tl.arange(0, 1)[None, :]


@triton.jit
def share_of(count, rows, INDEX: tl.constexpr):
    """(the program's first element, the one after its last)."""
    first = tl.program_id(1).to(INDEX) * rows
    return first, tl.minimum(first + rows, count)


@triton.jit
def block_at(
    m0, last, channel, sizes,
    CHANNELS: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(offsets, which of its elements are before `last`) of the block that begins at the element m0.

    sizes: (C, inner, the reciprocal of inner).
    """
    C, inner, inverse_inner = sizes
    rows = tl.arange(0, BLOCK_M)[:, None].to(INDEX)
    if CHANNELS:
        m = m0 + rows
        return m * C + channel, m < last
    else:
        m = m0 + rows * BLOCK_N
        n = divide(m, inner, inverse_inner)
        start = (n * C + channel - n) * inner + m
        return start + tl.arange(0, BLOCK_N)[None, :], m < last


@triton.jit
def sum_of(values, CHANNELS: tl.constexpr):
    """The sum over a block, for each of the program's channels, in the shape of `channels_of`."""
    total = tl.sum(values, axis=0, keep_dims=True)
    if not CHANNELS:
        total = tl.sum(total, axis=1, keep_dims=True)
    return total
