"""Asynchronous products of shared memory: wgmma.

A group of products is computed when it is committed, or at its wait: in both cases as a whole, so that its sums have
the same bits. From a product's issue to its wait no thread may write the shared memory that it reads, touch its
accumulators, or write the registers of its operands.

Source: PTX ISA 9.0, section "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
"""

from dataclasses import dataclass

import numpy as np

from .copies import Owner
from .formats import F4, U4
from .memory import READ, kept_rows
from .operands import Form, chunks, left_operand, right_operand
from .shared import BULK, COPY, PRODUCT, Access, Address
from .warp import whole

# The thread index of products in the log of shared memory, which belongs to no warp.
PRODUCTS = 1000


@dataclass
class Product:
    """One wgmma of some programs' warpgroups.

    a: the bits of registers (register, program, thread), or chunks as b: the numbers of the 16-byte chunks of shared
    memory, (program, warpgroup, chunk). registers: the indices of the accumulators in a bundle's list.
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
        """The product in some of its programs; its threads are together."""
        a = self.a
        if isinstance(a, Address):
            a = a.kept(kept)
        elif a.shape[1] > 1:
            a = a[:, kept]
        b = self.b.kept(kept)
        return Product(
            self.form, self.registers, self.names, self.operands, rows, row, self.threads, a, b,
            kept_rows(self.keep, kept), self.here,
        )  # fmt: skip


def product(b, what, a, b_operand, scale, here):
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
        judge_stores(b, address, f"the product {READ}", here)
        touch(b, this, address)
        shared.mark(b, PRODUCT, address, 0, 16, None, True)
    shared.in_flight += len(this.row)
    b.products[-1].append(this)


def regions(this):
    return [address for address in (this.a, this.b) if isinstance(address, Address)]


def touch(b, this, address):
    """Logs a product's reads as those of no warp: even its own must have met at a barrier after writing."""
    warps = np.full((1, 1), PRODUCTS)
    b.batch.shared.log.append(Access(READ, address, 0, 16, None, this.rows, warps, this.here))


def judge_stores(b, address, what, here):
    """Faults if a product or a bulk copy may not touch chunks: those that copies have yet to write, and those that
    stores or cp.async have written without a fence.proxy.async since.
    """
    shared = b.batch.shared
    in_flight = shared.in_flight and shared.cells(b, address, 0, 16)
    if in_flight:
        view, words = in_flight
        found = view.take(words)
        undelivered = found & U4(0x01010101 * COPY)
        if undelivered.any():
            b.fault("undelivered", "a product reads what a copy in flight has yet to write", here, undelivered != 0)
        for warp in np.unique(b.warps) if (found & U4(0x01010101 * BULK)).any() else ():
            shared.bulk.judge(READ, b, address, 0, 16, None, np.full((1, 1), warp), here)
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
            b.fault("proxy", f"{what} what {place} has stored, without fence.proxy.async", here, found)


def judge_fences(b, form, names, operands, here):
    """Faults if registers have been written since the last commit without a wgmma.fence since, or if there was no fence
    at all.

    The ISA asks for the fence after the writes. LLVM moves copies of registers past it, as it takes it for a memory
    fence only, and ptxas sees the dependencies by the registers: so either side is accepted here.
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
    """The instructions between two of wgmma, and which registers they may not touch."""
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


def commit_products(b, R):
    """wgmma.commit_group."""
    if not b.batch.products_late:
        run(b, b.products[-1], R)
    b.products.append([])
    b.ordered = False


def wait_products(b, pending, R, here):
    """wgmma.wait_group: all groups except the last few are complete."""
    finished = []
    while len(b.products) - 1 > pending:
        group = b.products.pop(0)
        if b.batch.products_late:
            run(b, group, R)
        finished += group
    if not finished:
        return
    shared = b.batch.shared
    for this in finished:
        for address in regions(this):
            shared.mark(this, PRODUCT, address, 0, 16, None, False)
            touch(b, this, address)
        shared.in_flight -= len(this.row)
    for this in in_flight(b):
        for address in regions(this):
            shared.mark(this, PRODUCT, address, 0, 16, None, True)


def run(b, products, R):
    """Computes products in order; those that add to the same sums are computed together."""
    chain = []
    for this in products:
        if chain and (this.registers != chain[0].registers or this.form != chain[0].form or not this.keep.all()):
            compute(b, chain, R)
            chain = []
        chain.append(this)
    if chain:
        compute(b, chain, R)


def compute(b, chain, R):
    """Computes a chain of products into its registers."""
    first = chain[0]
    owner, form, threads = Owner(b, first), first.form, first.threads
    left = side_by_side([left_operand(owner, this) for this in chain], axis=3)
    right = side_by_side([right_operand(owner, this) for this in chain], axis=2)
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


def side_by_side(operands, axis):
    """Operands joined along K; some may have one row for all programs."""
    programs = max(map(len, operands))
    return np.concatenate([np.broadcast_to(each, (programs, *each.shape[1:])) for each in operands], axis=axis)


def sums_of(b, this, R):
    """The accumulators as matrices: the last product's result, if no register has changed since."""
    known = b.sums.get(this.registers)
    if known and all(R[register] is value for register, value in zip(this.registers, known[1])):
        return known[0]
    values = [R[register] for register in this.registers]
    bits = np.empty((len(values), max(map(len, values)), this.threads), F4)
    for k, value in enumerate(values):
        bits[k] = value
    shape = (this.form.n // 8, 2, 2, -1, this.threads // 128, 4, 8, 4)
    return bits.reshape(shape).transpose(3, 4, 5, 1, 6, 0, 7, 2).reshape(-1, this.threads // 128, 64, this.form.n)


NAMES = {f.__name__: f for f in (product, fence_registers, segment, commit_products, wait_products)}
