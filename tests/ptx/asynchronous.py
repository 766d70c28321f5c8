"""What runs beside the threads: copies into shared memory (cp.async) and products of shared memory (wgmma).

A copy lands at once, or at the last moment that a wait allows; a product is computed when it is issued, or at its wait.
Meanwhile the shared memory and the registers that they use are watched.

Sources: PTX ISA 9.0, sections "Data Movement and Conversion Instructions: cp.async" and "Asynchronous Warpgroup Level
Matrix Multiply-Accumulate Instructions" (with "Shared Memory Matrix Layout" and "Matrix Descriptor Format").
"""

from dataclasses import dataclass

import numpy as np

from .formats import F2, F4, U2, cut_tf32, widen_bf16
from .memory import active
from .shared import COPY, PRODUCT, READ, WRITE, Access, Address
from .warp import whole

U4, U8, I8 = np.uint32, np.uint64, np.int64
# By a descriptor's number of its swizzle: bytes of a row, and which bits of 16-byte units are exchanged.
SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}
# The thread number that products have in the log of shared memory: no warp's.
PRODUCTS = 1000


def kept_rows(array, kept):
    """The rows of an array that are kept, if it has any of its own."""
    return array if array is None or len(array) == 1 else array[kept]


@dataclass
class Copy:
    """One cp.async of some programs' threads. given: bytes that are read; the others of its size are zeros."""

    rows: object
    row: object
    warps: object
    threads: int
    to: Address
    offset: int
    source: object
    source_offset: int
    size: int
    given: object
    mask: object
    here: int

    def part(self, kept, columns, rows, row):
        """The copy of some of its programs and threads."""

        def cut(array):
            if array is None:
                return None
            array = array if len(array) == 1 else array[kept]
            return array if array.shape[1] == 1 else array[:, columns]

        to = Address(cut(self.to.value))
        threads = len(self.warps[0, columns])
        return Copy(
            rows, row, self.warps[:, columns], threads, to, self.offset, cut(self.source), self.source_offset,
            self.size, cut(self.given), cut(self.mask), self.here,
        )  # fmt: skip


def copy(b, to, offset, source, source_offset, size, given, mask, here):
    """cp.async."""
    mask, some = active(mask)
    if not some:
        return
    shared = b.batch.shared
    to, offset = shared.checked(b, to, offset, size, mask, here)
    this = Copy(b.rows, b.row, b.warps, b.threads, to, offset, source, source_offset, size, given, mask, here)
    shared.touch(b, WRITE, to, offset, size, mask, b.warps, here)
    if b.batch.copies_late:
        read(b, this)  # a stray address is one at once
    else:
        land(b, this)
    shared.mark(b, COPY, to, offset, size, mask, True)
    shared.in_flight += 1
    b.copies[-1].append(this)


def read(b, this):
    """The bits that a copy brings; addresses that it does not read may be any."""
    memory, size = b.batch.memory, this.size
    mask, given = this.mask, this.given
    if given is None or (given == U4(size)).all():
        return memory.load(b, this.source, this.source_offset, size, mask, this.here)
    if (given > U4(size)).any():
        b.fault("instruction", f"cp.async of {int(given.max())} of {size} bytes", this.here)
    shape = np.broadcast_shapes(given.shape, this.source.shape, (1, 1) if mask is None else mask.shape)
    result = np.zeros((*shape, size), np.uint8)
    for count in np.unique(given):
        chosen = given == count if mask is None else (given == count) & mask
        if not count or not chosen.any():
            continue
        chosen = np.broadcast_to(chosen, shape)
        if count == size:
            data = memory.load(b, this.source, this.source_offset, size, chosen, this.here)
            result[chosen] = np.broadcast_to(data, shape)[chosen][:, None].view(np.uint8)
            continue
        for k in range(int(count)):
            data = memory.load(b, this.source, this.source_offset + k, 1, chosen, this.here)
            result[chosen, k] = np.broadcast_to(data, shape)[chosen]
    return result.view(shared_type(size))[..., 0]


def shared_type(size):
    return np.complex128 if size == 16 else np.dtype(f"u{size}")


def land(b, this):
    """Writes what a copy brings; b has its rows and threads."""
    b.batch.shared.write(b, this.to, this.offset, this.size, read(b, this), this.mask)


def commit_copies(b):
    b.copies.append([])


def wait_copies(b, pending, here):
    """cp.async.wait_group: all groups but the last few have landed."""
    while len(b.copies) - 1 > pending:
        for this in b.copies.pop(0):
            shared = b.batch.shared
            shared.mark(this, COPY, this.to, this.offset, this.size, this.mask, False)
            shared.in_flight -= 1
            if b.batch.copies_late:
                land(Owner(b, this), this)
            if shared.many:
                shared.log.append(
                    Access(WRITE, this.to, this.offset, this.size, this.mask, this.rows, this.warps, this.here)
                )


class Owner:
    """A bundle as it was when it issued something: its programs and threads."""

    def __init__(self, b, this):
        self.batch, self.rows, self.row, self.threads = b.batch, this.rows, this.row, this.threads
        self.fault = b.fault


@dataclass(frozen=True)
class Form:
    """A kind of product: N, K, the operands' format, and whether A and B lie with M or N running fastest."""

    n: int
    k: int
    format: str
    a_transposed: bool
    b_transposed: bool


@dataclass
class Product:
    """One wgmma of some programs' warpgroups.

    a: the bits of registers (register, program, thread), or chunks as b: the numbers of the 16-byte chunks of shared
    memory, (program, warpgroup, chunk). registers: the places of the accumulators in a bundle's list.
    """

    form: Form
    registers: tuple
    names: tuple
    operands: tuple
    rows: object
    row: object
    threads: int
    a: object
    b: object
    keep: object
    here: int

    def part(self, kept, columns, rows, row):
        a = self.a
        if isinstance(a, Address):
            a = Address(kept_rows(a.value, kept))
        elif a.shape[1] > 1:
            a = a[:, kept]
        b = Address(kept_rows(self.b.value, kept))
        if len(columns) != self.threads:
            raise NotImplementedError("warpgroups that part while a product is in flight")
        return Product(
            self.form, self.registers, self.names, self.operands, rows, row, self.threads, a, b,
            kept_rows(self.keep, kept), self.here,
        )  # fmt: skip


CHUNKS = {}


def chunks(b, descriptor, rows, form, transposed, here):
    """The 16-byte chunks of an operand of `rows` rows along M or N, by row and K, if transposed by K and row."""
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


def layout_of(layout, rows, form, transposed):
    """(offsets of the chunks before the swizzle, bits that it exchanges)."""
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


def product(b, what, a, b_operand, scale, R, here):
    """wgmma.mma_async."""
    form, registers, names, operands = what
    whole(b, here)
    if b.threads % 128 or (b.first_warps % 4).any():
        b.fault("divergence", "a part of a warpgroup", here)
    shared, threads = b.batch.shared, b.threads
    judge_fences(b, form, names, operands, here)
    if scale.shape[1] > 1 and (scale != scale[:, :1]).any():
        b.fault("divergence", "threads of a warpgroup with different scales", here)
    if isinstance(a, tuple):
        bits = np.empty((len(a), max(map(len, a)), threads), U4)
        for k, value in enumerate(a):
            bits[k] = value
        a = bits
    else:
        a = chunks(b, a, 64, form, form.a_transposed, here)
    columns = chunks(b, b_operand, form.n, form, form.b_transposed, here)
    this = Product(form, registers, names, operands, b.rows, b.row, threads, a, columns, scale[:, :1], here)
    for address in regions(this):
        shared.checked(b, address, 0, 16, None, here)
        judge_stores(b, address, here)
        touch(b, this, address)
        shared.mark(b, PRODUCT, address, 0, 16, None, True)
    shared.in_flight += 1
    b.products[-1].append(this)
    if not b.batch.products_late:
        run(b, [this], R)


def regions(this):
    return [address for address in (this.a, this.b) if isinstance(address, Address)]


def touch(b, this, address):
    """Logs a product's reads, as those of nobody's warp: even its own must have met at a barrier after writing."""
    warps = np.full((1, 1), PRODUCTS)
    b.batch.shared.log.append(Access(READ, address, 0, 16, None, this.rows, warps, this.here))


def judge_stores(b, address, here):
    """Faults if an operand has chunks that ordinary stores have written, and no fence.proxy.async since."""
    shared = b.batch.shared
    in_flight = shared.in_flight and shared.cells(b, address, 0, 16)
    if in_flight:
        view, words = in_flight
        undelivered = view.take(words) & U4(0x01010101 * COPY)
        if undelivered.any():
            b.fault("undelivered", "a product reads what a copy in flight has yet to write", here, undelivered != 0)
    if not shared.unfenced:
        return
    rows = np.arange(shared.programs) if b.rows is None else b.rows
    own, _ = shared.divide(shared.unfenced, rows)
    for access in own:
        cells, _ = access.units(16, shared.stride // 16, shared.programs)
        mine = (address.value >> 4) + rows[:, None] * (shared.stride // 16)
        found = np.isin(mine, cells)
        if found.any():
            place = b.batch.machine.describe(access.here)
            b.fault("proxy", f"the product reads what {place} has stored, without fence.proxy.async", here, found)


def judge_fences(b, form, names, operands, here):
    """Faults if registers have been written since the last commit and no wgmma.fence has come since, or none at all.

    The ISA asks for the fence behind the writes. LLVM moves copies of registers past it, as it takes it for a fence of
    memory only, and ptxas sees by the registers what depends on what: so it may be on either side here.
    """
    if not b.fenced:
        b.fault("register", "a product without any wgmma.fence before it", here)
    segments = b.batch.machine.translated.segments
    for k in () if b.ordered else b.since_fence:
        for name in {*names, *operands} & segments[k].writes.keys():
            place = b.batch.machine.describe(segments[k].writes[name])
            b.fault("register", f"{name}, written at {place}, without wgmma.fence before the product", here)
    for this in in_flight(b):
        if set(names) & {*this.names, *this.operands} and (this.names != names or this.form.n != form.n):
            b.fault("register", f"accumulators of the product at {b.batch.machine.describe(this.here)}", here)
        if set(operands) & set(this.names):
            b.fault("register", f"operands that the product at {b.batch.machine.describe(this.here)} writes", here)


def fence_registers(b):
    """wgmma.fence."""
    b.since_fence, b.fenced, b.ordered = set(), True, True


def in_flight(b):
    return [this for group in b.products for this in group]


def segment(b, number):
    """Instructions between one of wgmma and the next: which registers they may not touch."""
    b.since_fence.add(number)
    if len(b.products) == 1 and not b.products[0]:
        return
    touched = b.batch.machine.translated.segments[number]
    for this in in_flight(b):
        for name in this.names:
            if name in touched.reads or name in touched.writes:
                here = touched.reads.get(name, touched.writes.get(name))
                place = b.batch.machine.describe(this.here)
                b.fault("register", f"{name} is an accumulator of the product in flight of {place}", here)
        for name in this.operands:
            if name in touched.writes:
                place = b.batch.machine.describe(this.here)
                b.fault("register", f"{name} is read by the product in flight of {place}", touched.writes[name])


def commit_products(b):
    b.products.append([])
    b.ordered = False


def wait_products(b, pending, R, here):
    """wgmma.wait_group: all groups but the last few are complete."""
    finished = []
    while len(b.products) - 1 > pending:
        finished += b.products.pop(0)
    if not finished:
        return
    if b.batch.products_late:
        run(b, finished, R)
    shared = b.batch.shared
    for this in finished:
        for address in regions(this):
            shared.mark(this, PRODUCT, address, 0, 16, None, False)
            touch(b, this, address)
        shared.in_flight -= 1
    for this in in_flight(b):
        for address in regions(this):
            shared.mark(this, PRODUCT, address, 0, 16, None, True)


def run(b, products, R):
    """Computes products in their order; those that add to the same sums together."""
    chain = []
    for this in products:
        if chain and (this.registers != chain[0].registers or this.form != chain[0].form or not this.keep.all()):
            compute(b, chain, R)
            chain = []
        chain.append(this)
    compute(b, chain, R)


def compute(b, chain, R):
    """The sums of a chain of products, into the registers."""
    first = chain[0]
    owner, form, threads = Owner(b, first), first.form, first.threads
    left = np.concatenate([left_operand(owner, this) for this in chain], axis=3)
    right = np.concatenate([right_operand(owner, this) for this in chain], axis=2)
    sums = left @ right
    if first.keep.any():
        start = sums_of(b, first, R)
        sums = sums + (start if first.keep.all() else np.where(first.keep[:, :, None, None], start, F4(0)))
    shape = (-1, threads // 128, 4, 2, 8, form.n // 8, 4, 2)
    values = sums.reshape(shape).transpose(5, 3, 7, 0, 1, 2, 4, 6)
    values = np.ascontiguousarray(values).reshape(form.n // 2, -1, threads)
    parts = list(values)
    for register, value in zip(first.registers, parts):
        R[register] = value
    b.sums[first.registers] = sums, parts


def sums_of(b, this, R):
    """The accumulators as matrices: those of the last product, if no register has changed since."""
    known = b.sums.get(this.registers)
    if known and all(R[register] is value for register, value in zip(this.registers, known[1])):
        return known[0]
    values = [R[register] for register in this.registers]
    bits = np.empty((len(values), max(map(len, values)), this.threads), F4)
    for k, value in enumerate(values):
        bits[k] = value
    shape = (this.form.n // 8, 2, 2, -1, this.threads // 128, 4, 8, 4)
    return bits.reshape(shape).transpose(3, 4, 5, 1, 6, 0, 7, 2).reshape(-1, this.threads // 128, 64, this.form.n)


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
    """An operand in shared memory as (program, warpgroup, rows, K), or (..., K, rows) if by_k; swapped if asked."""
    values = numbers(b.batch.shared.bits(b, address, 0, 16), form)
    shape = (form.k, rows) if by_k else (rows, form.k)
    values = values.reshape(len(values), warpgroups, *shape)
    return values.swapaxes(2, 3) if swapped else values


NAMES = {f.__name__: f for f in (copy, commit_copies, wait_copies, product, fence_registers, segment)}
NAMES |= {"commit_products": commit_products, "wait_products": wait_products}
