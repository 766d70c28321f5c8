"""Bulk copies of boxes of tensors into shared memory and from it: cp.async.bulk.tensor.

A copy into shared memory, a load, belongs to a phase of its mbarrier, which completes once all bytes and arrivals that
it expects are there. A warp that has waited for this phase knows that the load is complete, and after a barrier of the
program all warps do. Until then no warp may touch its destination. A copy from shared memory, a store, belongs to a
bulk group of its thread. Until warps know that the thread has waited for it they may not write to its source.

A load reads the tensor when it starts. It arrives at once, or as late as possible: when no thread can go on without it,
and then in any order. A store is written at once, or at its wait. Copies are of the async proxy, as products are: what
ordinary stores have written to shared memory there needs a fence.proxy.async before them. PTX also asks for a fence
between mbarrier.init and the first load. Triton emits none, and none is required here. Whether a program reads from
global memory what a store has yet to write is not checked.

Sources: PTX ISA 9.0, sections "Data Movement and Conversion Instructions: Tensor copy", "cp.async.bulk.tensor",
"cp.async.bulk.commit_group", "cp.async.bulk.wait_group", "Swizzling Modes" and "Async Proxy".
"""

from dataclasses import dataclass, replace

import numpy as np

from .faults import row_of
from .mbarrier import compact, issuers, log
from .memory import BY_SIZE, READ, WRITE
from .products import judge_stores
from .shared import BULK, OUT, Address

U8 = np.uint64
# Boxes in shared memory start at multiples of this.
ALIGNED = 128


@dataclass(eq=False)
class Copy:
    """A thread's copy in the programs with these indices.

    tid: the thread. place: an Address of 16-byte chunks. known: by program and warp.
    """

    batch: object
    numbers: object
    tid: int
    place: Address
    known: object
    here: int

    @property
    def row(self):
        return self.numbers[:, None]

    @property
    def rows(self):
        return None if len(self.numbers) == len(self.batch.programs) else self.numbers

    @property
    def warp(self):
        return self.tid // 32

    @property
    def warps(self):
        return np.full((1, 1), self.warp)

    def fault(self, kind, detail, here, where=0):
        self.batch.fault(kind, detail, here, int(self.numbers[row_of(where)]))

    def among(self, chosen):
        """The part of the copy in the chosen ones of its programs."""
        own = {name: value[chosen] for name in self.BY_PROGRAM if (value := getattr(self, name)) is not None}
        return replace(self, place=self.place.kept(chosen), **own)


@dataclass(eq=False)
class Load(Copy):
    """mbarriers: their addresses. phases: those that it has arrived in, or None."""

    data: object
    mbarriers: object
    bytes: int
    phases: object = None
    FLAG, BY_PROGRAM = BULK, ("numbers", "data", "mbarriers", "phases")


@dataclass(eq=False)
class Store(Copy):
    """first: its coordinates. ages: how many groups the thread has committed since. written: whether it has been."""

    tensor_map: object
    first: object
    ages: object
    written: bool = False
    FLAG, BY_PROGRAM = OUT, ("numbers", "first", "ages")


class Bulk:
    """copies: those that some warp does not know to be complete."""

    def __init__(self, batch):
        self.batch, self.programs, self.copies = batch, len(batch.programs), []

    def of(self, kind):
        return [this for this in self.copies if isinstance(this, kind)]

    def issue(self, this):
        # An earlier copy to or from the same place, which the issuing warp knows to be complete, no longer matters.
        for old in [old for old in self.of(type(this)) if np.array_equal(old.place.value, this.place.value)]:
            again = np.isin(old.numbers, this.numbers)
            if again.any() and old.known[old.numbers[again], this.warp].all():
                self.forget(old.among(again))
                self.replace(old, [] if again.all() else [old.among(~again)])
        self.copies.append(this)
        self.batch.shared.in_flight += len(this.numbers)
        self.batch.shared.mark(this, this.FLAG, this.place, 0, 16, None, True)

    def replace(self, old, parts):
        place = self.copies.index(old)
        self.copies[place : place + 1] = parts

    def forget(self, this):
        self.batch.shared.in_flight -= len(this.numbers)
        self.batch.shared.mark(this, this.FLAG, this.place, 0, 16, None, False)

    def land(self, this):
        self.batch.shared.write(this, this.place, 0, 16, this.data, None)
        barriers = self.batch.tensor.barriers
        this.phases = barriers.change(this.mbarriers, this.numbers, this.here, brought=this.bytes)
        this.data = None

    def deliver(self):
        """Any pending load arrives; returns whether there is one."""
        pending = [this for this in self.of(Load) if this.phases is None]
        if pending:
            self.land(pending[self.batch.machine.rng.integers(len(pending))])
        return bool(pending)

    def commit(self, b):
        """These threads commit a group each."""
        for this in self.of(Store):
            this.ages[self.issued_by(this, b)] += 1

    def wait(self, b, pending):
        """These threads wait for all their groups but the last few."""
        for this in self.of(Store):
            done = self.issued_by(this, b) & (this.ages > pending)
            if not done.any():
                continue
            mine = this if done.all() else this.among(done)
            self.replace(this, [mine] if done.all() else [mine, this.among(~done)])
            if not mine.written:
                write(mine)
            mine.known[mine.numbers, mine.warp] = True
        self.retire()

    def issued_by(self, this, b):
        return np.isin(this.numbers, b.row[:, 0]) & (this.tid in b.columns)

    # What warps know of completion.

    def observed(self, numbers, warps, places, phases):
        """Warps have seen that the mbarriers at these addresses have completed this many phases."""
        at, seen = np.full((2, self.programs), -1)
        at[numbers], seen[numbers] = places, phases
        for this in self.of(Load):
            if this.phases is not None:
                known = (at[this.numbers] == this.mbarriers) & (this.phases < seen[this.numbers])
                this.known[np.ix_(this.numbers[known], np.unique(warps))] = True
        self.retire()

    def together(self, rows):
        """A barrier of the flagged programs: whatever one warp knows, all know."""
        for this in self.copies:
            this.known[rows] |= this.known[rows].any(axis=1, keepdims=True)
        self.retire()

    def retire(self):
        done, left = [], []
        for this in self.copies:
            known = this.known[this.numbers].all(axis=1)
            done += [this.among(known)] if known.any() else []
            left += [] if known.all() else [this.among(~known) if known.any() else this]
        self.copies = left
        for this in done:
            self.forget(this)
        for this in left if done else ():
            self.batch.shared.mark(this, this.FLAG, this.place, 0, 16, None, True)

    # Faults.

    def judge(self, kind, b, address, offset, size, mask, warps, here):
        """Faults if warps may not access shared memory: where one does not know that a copy is complete."""
        stride = self.batch.shared.stride // 16
        cells = (address.value + offset >> 4) + b.row * stride
        mask = np.broadcast_to(True if mask is None else mask, np.broadcast_shapes(cells.shape, warps.shape))
        for this in self.copies if kind == WRITE else self.of(Load):
            touched = np.isin(cells, (this.place.value >> 4) + this.row * stride) & mask
            unaware = np.zeros((self.programs, this.known.shape[1]), bool)
            unaware[this.numbers] = ~this.known[this.numbers]
            bad = touched & unaware[b.row, warps]
            if bad.any():
                detail = (
                    f"{kind} {size} bytes of the bulk copy of {self.batch.describe(this.here)}, without a wait for it"
                )
                b.fault("undelivered" if isinstance(this, Load) else "overwritten", detail, here, bad)

    def judge_inval(self, part, places, here):
        """Faults if a thread invalidates the mbarrier of a copy without having waited for its phase."""
        at = np.full(self.programs, -1)
        at[part.numbers] = places
        for this in self.of(Load):
            wrong = (at[this.numbers] == this.mbarriers) & ~this.known[this.numbers, part.warp]
            if wrong.any():
                detail = f"mbarrier.inval without a wait for the bulk copy of {self.batch.describe(this.here)}"
                self.batch.fault("pending", detail, here, int(this.numbers[wrong.argmax()]))

    def finish(self):
        """Faults if programs end before their copies are complete."""
        for this in self.copies:
            lost = ~this.known[this.numbers].any(axis=1)
            if lost.any():
                row = int(this.numbers[lost.argmax()])
                self.batch.fault("pending", "a bulk copy that no warp waits for", this.here, row)


def boxes(b, to, offset, tensor_map, coordinates, mask, here):
    """For each thread that copies a box: (its Part, the TensorMap, each program's first element, the box's chunks)."""
    for part in issuers(b, mask):
        found = [b.batch.memory.maps.get(int(address)) for address in np.unique(part.of(tensor_map))]
        if len(found) > 1:
            part.fault("instruction", "bulk copies of other tensors in other programs", here)
        if found[0] is None or len(coordinates) != len(found[0].sizes):
            part.fault("descriptor", "a bulk copy without a tensor map of its number of dimensions", here)
        first = np.stack([part.of(value).astype(np.int64) for value in coordinates], axis=1)
        place = compact(part.of(to.value) + offset)
        wrong = place % ALIGNED != 0
        if wrong.any():
            part.fault("misaligned", f"a bulk copy of shared memory at {int(place[wrong][0])}", here, wrong)
        chunks, _ = b.batch.shared.checked(part, Address(found[0].chunks(place)), 0, 16, None, here)
        yield part, found[0], first, chunks


def judge(part, kind, chunks, here):
    """Faults if a thread may not start a copy that reads or writes these chunks; returns what warps know of it."""
    batch, shared = part.batch, part.batch.shared
    shared.judge_flags(part, kind, chunks, 0, 16, None, part.warps, here)
    shared.judge_race(part, kind, chunks, "the bulk copy", here)
    judge_stores(part, chunks, f"the bulk copy {kind}", here)
    return np.zeros((len(batch.programs), -(-batch.threads // 32)), bool)


def bulk_load(b, to, offset, tensor_map, coordinates, barrier, barrier_offset, mask, here):
    """cp.async.bulk.tensor into shared memory, by any threads; coordinates: from the innermost on."""
    batch = b.batch
    for part, source, first, chunks in boxes(b, to, offset, tensor_map, coordinates, mask, here):
        mbarriers = part.of(barrier.value) + barrier_offset
        batch.tensor.barriers.of(part, mbarriers, "a bulk copy", here)
        log(part, READ, Address(compact(mbarriers)), here)
        known = judge(part, WRITE, chunks, here)
        this = Load(
            batch, part.numbers, part.tid, chunks, known, here, read(part, source, first, here), mbarriers, source.bytes
        )
        batch.tensor.bulk.issue(this)
        if not batch.copies_late:
            batch.tensor.bulk.land(this)


def read(part, tensor_map, first, here):
    """The bits of boxes in 16-byte chunks, (programs, chunks)."""
    unit, address, inside = located(part, tensor_map, first)
    kind = np.dtype(BY_SIZE[unit])
    if not inside.any():
        data = np.zeros(inside.shape, kind)
    else:
        data = part.batch.memory.load(part, address, 0, unit, None if inside.all() else inside, here)
    data = np.broadcast_to(data, inside.shape).copy()
    data[~inside] = np.frombuffer((b"\xff" if tensor_map.nan else b"\0") * unit, kind)[0]
    return data.view(np.complex128)


def located(b, tensor_map, first):
    """(bytes of a unit, addresses of the units of boxes, whether they are in the tensor)."""
    unit, offset, inside = tensor_map.elements(first)
    return unit, U8(b.batch.memory.address(tensor_map.base)) + offset.astype(U8), inside


def bulk_store(b, source, offset, tensor_map, coordinates, mask, here):
    """cp.async.bulk.tensor from shared memory."""
    batch = b.batch
    for part, target, first, chunks in boxes(b, source, offset, tensor_map, coordinates, mask, here):
        known = judge(part, READ, chunks, here)
        this = Store(
            batch, part.numbers, part.tid, chunks, known, here, target, first, np.zeros(len(part.numbers), int)
        )
        batch.tensor.bulk.issue(this)
        if not batch.copies_late:
            write(this)


def write(this):
    unit, address, inside = located(this, this.tensor_map, this.first)
    if inside.any():
        data = this.batch.shared.bits(this, this.place, 0, 16)
        data = np.ascontiguousarray(np.broadcast_to(data, (len(inside), data.shape[1]))).view(BY_SIZE[unit])
        this.batch.memory.store(this, address, 0, unit, data, None if inside.all() else inside, this.here)
    this.written = True


def bulk_commit(b):
    """cp.async.bulk.commit_group."""
    b.batch.tensor.bulk.commit(b)


def bulk_wait(b, pending):
    """cp.async.bulk.wait_group, with or without .read."""
    b.batch.tensor.bulk.wait(b, pending)


NAMES = {f.__name__: f for f in (bulk_load, bulk_store, bulk_commit, bulk_wait)}
