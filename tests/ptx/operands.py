"""Operands of wgmma and tcgen05.mma: where their descriptors place them in shared memory, or in which registers they
are.

Sources: PTX ISA 9.0, sections "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions" (with "Register
Fragments", "Shared Memory Matrix Layout", "Strides" and "Matrix Descriptor Format") and "TensorCore 5th Generation
Family Instructions" ("Canonical Layouts", "Shared Memory Descriptor").
"""

from dataclasses import dataclass

import numpy as np

from .formats import F2, F4, U2, U4, U8, cut_tf32, widen_bf16
from .mbarrier import compact
from .shared import Address

I8 = np.int64
# By a descriptor's swizzle number: bytes of a row, and the 16-byte-unit bits that it exchanges.
SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}
CHUNKS = {}
# The bits of tcgen05.mma's descriptor between its offsets and its swizzle, and those between the offsets.
FIXED = 0x7FFF << 46 | 3 << 14 | 3 << 30


@dataclass(frozen=True)
class Form:
    """A kind of product: N, K, the operands' format, and whether A and B are MN-major."""

    n: int
    k: int
    format: str
    a_transposed: bool
    b_transposed: bool


def chunks(b, descriptor, rows, form, transposed, here):
    """The 16-byte chunks of an operand of `rows` rows along M or N: by row and K, or by K and row if transposed."""
    warpgroups = b.threads // 128
    descriptor = np.broadcast_to(descriptor, (len(descriptor), b.threads)).reshape(len(descriptor), warpgroups, 128)
    if (descriptor != descriptor[:, :, :1]).any():
        b.fault("divergence", "threads of a warpgroup with different descriptors", here)
    descriptor = descriptor[:, :, :1]
    layout = np.unique(descriptor & U8(0xFFFFFFFFFFFFC000))
    if len(layout) != 1 or int(layout[0]) >> 46 & 0xFFFF or int(layout[0]) >> 14 & 3 or int(layout[0]) >> 30 & 3:
        b.fault("instruction", f"matrix descriptor {int(descriptor.flat[0]):#x}", here)
    layout = int(layout[0])
    key = layout, rows, form.k, form.format, transposed
    if key not in CHUNKS:
        CHUNKS[key] = layout_of(layout, rows, form, transposed)
    relative, bits = CHUNKS[key]
    place = ((descriptor & U8(0x3FFF)).astype(I8) << 4) + relative
    place = place ^ ((place >> 7 & bits) << 4)
    return Address(place.reshape(len(place), -1))


def tensor_chunks(part, descriptor, rows, form, transposed, here):
    """The chunks of an operand of tcgen05.mma; its descriptor has wgmma's fields at other bits, and a swizzle."""
    layout = np.unique(descriptor & U8(0xFFFFFFFFFFFFC000))
    swizzle = int(layout[0]) >> 61
    if len(layout) != 1 or swizzle not in (2, 4, 6) or int(layout[0]) & FIXED != 1 << 46:
        part.fault("instruction", f"matrix descriptor {int(descriptor[0]):#x}", here)
    layout = int(layout[0]) & ~FIXED
    key = layout, rows, form.k, form.format, transposed
    if key not in CHUNKS:
        CHUNKS[key] = layout_of(layout, rows, form, transposed)
    relative, bits = CHUNKS[key]
    place = (compact(descriptor & U8(0x3FFF)).astype(I8) << 4) + relative
    return Address(place ^ ((place >> 7 & bits) << 4))


def layout_of(layout, rows, form, transposed):
    """(offsets of the chunks before the swizzle, the bits that it exchanges)."""
    leading, stride = (layout >> 16 & 0x3FFF) << 4, (layout >> 32 & 0x3FFF) << 4
    width, bits = SWIZZLES[layout >> 62]
    size = 4 if form.format == "tf32" else 2
    if transposed:
        line, along = np.arange(form.k)[:, None], 16 * np.arange(rows * size // 16)[None, :]
    else:
        line, along = np.arange(rows)[:, None], 16 * np.arange(form.k * size // 16)[None, :]
    if transposed and width == 16:
        leading, stride = stride, leading
    offsets = line // 8 * stride + line % 8 * width + along % width + along // width * leading
    return offsets.astype(I8).ravel(), bits


def numbers(bits, form):
    """The bits of chunks as float32."""
    if form.format == "tf32":
        return cut_tf32(bits.view(U4))
    return widen_bf16(bits.view(U2)) if form.format == "bf16" else bits.view(U2).view(F2).astype(F4)


def left_operand(b, this):
    """A as (program, warpgroup, 64, K)."""
    form, warpgroups = this.form, this.threads // 128
    if isinstance(this.a, Address):
        return from_chunks(b, this.a, 64, form, form.a_transposed, form.a_transposed, warpgroups)
    packed = 1 if form.format == "tf32" else 2
    bits = this.a.view(U2) if packed == 2 else this.a
    # A register has (half of K, half of the rows).
    bits = bits.reshape(2, 2, -1, warpgroups, 4, 8, 4, packed).transpose(2, 3, 4, 1, 5, 0, 6, 7)
    return numbers(np.ascontiguousarray(bits), form).reshape(-1, warpgroups, 64, form.k)


def right_operand(b, this):
    """B as (program, warpgroup, K, N)."""
    form = this.form
    return from_chunks(b, this.b, form.n, form, form.b_transposed, not form.b_transposed, this.threads // 128)


def from_chunks(b, address, rows, form, by_k, swapped, warpgroups):
    """An operand as (program, warpgroup, rows, K), or (..., K, rows) if it lies by K; the last two swapped if asked."""
    values = numbers(b.batch.shared.bits(b, address, 0, 16), form)
    shape = (form.k, rows) if by_k else (rows, form.k)
    values = values.reshape(len(values), warpgroups, *shape)
    return values.swapaxes(2, 3) if swapped else values
