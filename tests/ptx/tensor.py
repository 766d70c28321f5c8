"""Tensor memory: 128 lanes of 512 columns of 32 bits for each program, and the accesses that are forbidden.

A program allocates columns. Each warp loads and stores in one quarter of the lanes, that of its index modulo 4. The
regions that each warp touches are logged until the next barrier: two warps at one place, one of them writing, are a
race.

A store is visible only after tcgen05.wait::st. Between that and a product of another warp, or between a product and a
load, PTX also asks for tcgen05.fence around the barrier. Triton emits none, and none is required here.

Source: PTX ISA 9.0, section "TensorCore 5th Generation Family Instructions": "Tensor Memory", "Data Movement Shape",
"Tensor Memory Allocation and Management Instructions", "Tensor Memory and Register Load/Store Instructions".
"""

from dataclasses import dataclass, replace

import numpy as np

from .bulk import Bulk
from .flight import Flight, Region
from .mbarrier import Barriers
from .memory import READ, WRITE, active
from .shared import Address
from .warp import whole

U4 = np.uint32
LANES, COLUMNS, UNIT = 128, 512, 32


def lanes_from(start, count):
    return (1 << count) - 1 << start


@dataclass
class Touch:
    """A warp's access to a region in some programs (a flag for each)."""

    kind: str
    region: Region
    rows: object
    warp: int
    here: int


def without(touches, rows):
    """The touches without those in the flagged programs."""
    parts = (replace(touch, rows=touch.rows & ~rows) for touch in touches)
    return [part for part in parts if part.rows.any()]


class Tensor:
    """Of programs that run together.

    owners: by program and unit of columns, the first unit of its allocation, or -1. stores: those not waited for yet.
    compute: see Flight.
    """

    def __init__(self, batch, compute):
        self.batch, self.programs = batch, len(batch.programs)
        self.owners = np.full((self.programs, COLUMNS // UNIT), -1)
        self.permit = np.ones(self.programs, bool)
        self.data, self.log, self.stores = None, [], []
        self.allocated_at = {}
        self.barriers, self.flight, self.bulk = Barriers(batch), Flight(batch, compute), Bulk(batch)
        self.leader = int(batch.machine.rng.integers(32))

    def storage(self):
        """(programs, bits of a column of a lane); only allocated columns have been written."""
        if self.data is None:
            self.data = np.empty((self.programs, LANES * COLUMNS), U4)
        return self.data

    def flags(self, numbers):
        rows = np.zeros(self.programs, bool)
        rows[numbers] = True
        return rows

    def allocated(self, rows, region, here):
        """Faults unless a region is allocated."""
        wrong = rows & (region.last > COLUMNS)
        if not wrong.any():
            units = slice(region.first // UNIT, (region.last - 1) // UNIT + 1)
            wrong = rows & (self.owners[:, units] < 0).any(axis=1)
        if wrong.any():
            detail = f"columns {region.first} to {region.last - 1} of tensor memory, which are not all allocated"
            self.batch.fault("outside", detail, here, int(wrong.argmax()))

    def judge(self, kind, rows, warp, region, here):
        """Faults if a warp may not load from a region, or store to it; logs the access."""
        self.allocated(rows, region, here)
        self.landed(rows, region, here)
        self.flight.judge(kind, rows, warp, region, here)
        self.alone(kind, rows, warp, region, here)
        self.log.append(Touch(kind, region, rows, warp, here))

    def landed(self, rows, region, here):
        for store in self.stores:
            wrong = rows & store.rows
            if store.region.meets(region) and wrong.any():
                place = self.batch.describe(store.here)
                detail = f"tensor memory that {place} stores to, without tcgen05.wait::st"
                self.batch.fault("undelivered", detail, here, int(wrong.argmax()))

    def alone(self, kind, rows, warp, region, here):
        """Faults if another warp has touched a region since the last barrier, and either of them writes."""
        for touch in self.log:
            if touch.warp == warp or READ == kind == touch.kind or not touch.region.meets(region):
                continue
            wrong = rows & touch.rows
            if wrong.any():
                place = self.batch.describe(touch.here)
                detail = f"warp {touch.warp} {touch.kind} tensor memory at {place}, "
                detail += f"warp {warp} {kind} it without a barrier in between"
                self.batch.fault("race", detail, here, int(wrong.argmax()))

    def settle(self, rows):
        """A barrier of some programs, or of all (None)."""
        free = np.ones(self.programs, bool) if rows is None else self.flags(rows)
        self.log = without(self.log, free)
        self.flight.together(free)
        self.bulk.together(free)

    def finish(self):
        """Faults if programs end with allocated tensor memory, or while something is in flight."""
        self.flight.finish()
        self.bulk.finish()
        for store in self.stores:
            self.batch.fault(
                "pending", "a store to tensor memory, without a wait", store.here, int(store.rows.argmax())
            )
        if (self.owners >= 0).any():
            row, unit = np.argwhere(self.owners >= 0)[0]
            here = self.allocated_at[int(row), int(self.owners[row, unit])]
            self.batch.fault("pending", "tensor memory that is not deallocated", here, int(row))


def one_warp(b, mask, what, here):
    """The index of the only active warp, and its threads here; (None, None) if none is active."""
    whole(b, here)
    if mask is not None and (len(mask) > 1 and (mask != mask[:1]).any()):
        b.fault("instruction", f"{what} by other warps in other programs", here)
    chosen = np.broadcast_to(True if mask is None else mask[0], b.threads).reshape(-1, 32)
    if (chosen != chosen[:, :1]).any():
        b.fault("divergence", f"{what} by some threads of a warp", here)
    warps = np.flatnonzero(chosen[:, 0])
    if len(warps) > 1:
        b.fault("instruction", f"{what} by several warps", here)
    if not len(warps):
        return None, None
    return int(b.warps[0, 32 * warps[0]]), slice(32 * warps[0], 32 * warps[0] + 32)


def tensor_alloc(b, address, offset, columns, mask, here):
    """tcgen05.alloc: any free columns; their address goes to shared memory."""
    warp, threads = one_warp(b, mask, "tcgen05.alloc", here)
    if warp is None:
        return
    tensor, shared, numbers = b.batch.tensor, b.batch.shared, b.row[:, 0]
    if not tensor.permit[numbers].all():
        b.fault("outside", "tcgen05.alloc after tcgen05.relinquish_alloc_permit", here)
    units = columns // UNIT
    free = (tensor.owners[numbers] < 0).all(axis=0)
    starts = [k for k in range(len(free) - units + 1) if free[k : k + units].all()]
    if not starts:
        b.fault("outside", f"no {columns} columns of tensor memory are free", here)
    start = int(b.batch.machine.rng.choice(starts))
    tensor.owners[numbers, start : start + units] = start
    new = tensor.storage().reshape(-1, LANES, COLUMNS)[:, :, start * UNIT : start * UNIT + columns]
    new[numbers] = U4(0xFFFFFFFF)  # NaN
    tensor.allocated_at |= {(int(number), start): here for number in numbers}
    value = address.value[:, threads if address.value.shape[1] > 1 else slice(None)]
    to, _ = shared.checked(b, Address(value[:, :1] + offset), 0, 4, None, here)
    data = np.full((1, 1), start * UNIT, U4)
    shared.touch(b, WRITE, to, 0, 4, None, b.warps[:, threads][:, :1], here, data)
    shared.write(b, to, 0, 4, data, None)


def tensor_relinquish(b, mask, here):
    warp, _ = one_warp(b, mask, "tcgen05.relinquish_alloc_permit", here)
    if warp is not None:
        b.batch.tensor.permit[b.row[:, 0]] = False


def tensor_dealloc(b, address, columns, mask, here):
    warp, threads = one_warp(b, mask, "tcgen05.dealloc", here)
    if warp is None:
        return
    tensor, numbers = b.batch.tensor, b.row[:, 0]
    value = np.broadcast_to(address[:, threads.start if address.shape[1] > 1 else 0], b.program_count)
    for one in np.unique(value):
        mine, start = numbers[value == one], int(one) // UNIT
        owned = tensor.owners[mine] == start
        if int(one) % UNIT or start >= COLUMNS // UNIT or (owned.sum(axis=1) != columns // UNIT).any():
            b.fault("outside", f"tcgen05.dealloc of {columns} columns at {int(one):#x}, which are no allocation", here)
        region = Region(lanes_from(0, LANES), int(one), int(one) + columns)
        tensor.judge(WRITE, tensor.flags(mine), warp, region, here)
        tensor.owners[mine, start : start + columns // UNIT] = -1


def places(b, kind, address, shape, count, split, mask, here):
    """The index of each thread's first element, (programs, threads), in a load or a store; checks it warp by warp.

    32x32b: each thread has a lane, and its registers are adjacent columns. 16x32bx2: the upper 16 threads have the same
    lanes as the lower ones, `split` columns further on.
    """
    whole(b, here)
    height = int(shape[:2])
    address = np.broadcast_to(address, (len(address), b.threads))
    warps = address.reshape(len(address), -1, 32)
    chosen = np.broadcast_to(True if mask is None else mask, (1 if mask is None else len(mask), b.threads))
    chosen = chosen.reshape(len(chosen), -1, 32)
    if (warps != warps[:, :, :1]).any() or (chosen != chosen[:, :, :1]).any():
        b.fault(
            "divergence", "threads of a warp with different addresses in tensor memory, or some threads of it", here
        )
    tensor = b.batch.tensor
    for k, warp in enumerate(b.warps[0, ::32]):
        values = np.broadcast_to(warps[:, k, 0], b.program_count)
        mine = np.broadcast_to(chosen[:, k, 0], b.program_count)
        for value in np.unique(values[mine]):
            lane, column = int(value) >> 16, int(value) & 0xFFFF
            rows = tensor.flags(b.row[mine & (values == value), 0])
            if lane not in range(warp % 4 * 32, warp % 4 * 32 + 32, height):
                detail = f"warp {warp} {kind} tensor memory from lane {lane} on, outside its quarter"
                b.batch.fault("outside", detail, here, int(rows.argmax()))
            for by in (0,) if height == 32 else (0, split):
                region = Region(lanes_from(lane, height), column + by, column + by + count)
                tensor.judge(kind, rows, int(warp), region, here)
    lane = (address >> U4(16)).astype(np.int64) + b.lane % height
    column = (address & U4(0xFFFF)).astype(np.int64) + np.where(b.lane < height, 0, split)
    return lane * COLUMNS + column


def tensor_load(b, address, shape, count, split, form, here):
    """tcgen05.ld: the registers."""
    first = places(b, READ, address, shape, count, split, None, here)
    data = b.batch.tensor.storage()
    if b.rows is None and len(first) == 1:
        found = data.take(np.arange(count)[:, None] + first, axis=1).transpose(1, 0, 2)
    else:
        index = first + b.row * (LANES * COLUMNS)
        found = data.reshape(-1).take(np.arange(count)[:, None, None] + index)
    return list(np.ascontiguousarray(found).view(form))


def tensor_store(b, address, shape, values, split, mask, here):
    """tcgen05.st."""
    mask, some = active(mask)
    if not some:
        return
    tensor = b.batch.tensor
    logged = len(tensor.log)
    first = places(b, WRITE, address, shape, len(values), split, mask, here)
    tensor.stores += tensor.log[logged:]
    index = first + b.row * (LANES * COLUMNS)
    flat = tensor.storage().reshape(-1)
    for k, value in enumerate(values):
        where, value, chosen = np.broadcast_arrays(index + k, value, True if mask is None else mask)
        flat[where[chosen]] = value[chosen]


def tensor_wait_store(b, here):
    """tcgen05.wait::st: the stores of these warps are visible."""
    whole(b, here)
    tensor = b.batch.tensor
    rows, warps = tensor.flags(b.row[:, 0]), set(b.warps[0, ::32].tolist())
    mine = [store for store in tensor.stores if store.warp in warps]
    others = [store for store in tensor.stores if store.warp not in warps]
    tensor.stores = others + without(mine, rows)


NAMES = {
    f.__name__: f
    for f in (tensor_alloc, tensor_relinquish, tensor_dealloc, tensor_load, tensor_store, tensor_wait_store)
}
