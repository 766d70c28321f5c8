"""Shared memory of the programs that run together, and the accesses that are forbidden.

Three checks:
- the words that a copy in flight will write, that a product in flight reads, or that hold an mbarrier are flagged, with
  a byte for each word of 4 bytes: no copy is smaller, and products read 16 bytes at a time. An access before the wait
  is a fault at once;
- all accesses since the last barrier are logged and checked at the next one: two warps at one byte, one of them
  writing, are a race, whatever order they came in here;
- what stores and copies have written is remembered until fence.proxy.async, and may not be read by a product before.

Programs that take the same branches have the same addresses, which are checked once for all of them.

Sources: PTX ISA 9.0, sections "State Spaces: Shared State Space", "Memory Consistency Model", "Parallel Synchronization
and Communication Instructions: bar, membar, fence" and "Asynchronous Operations".
"""

import numpy as np

from .memory import BY_SIZE, READ, SHIFT, WRITE, active, elements, joined, kept_rows

COPY, PRODUCT, BARRIER, BULK, OUT = 1, 2, 4, 8, 16
I8, U1 = np.int64, np.uint8
FLAGS = {size: np.dtype(f"u{max(size // 4, 1)}") for size in BY_SIZE}
# A flag for every word of an access.
EVERY = {size: int.from_bytes(bytes([1] * max(size // 4, 1)), "little") for size in BY_SIZE}


class Address:
    """Shared addresses: (1, threads), or (programs, threads) if they differ between programs."""

    __slots__ = ("value", "low", "top", "shifted")

    def __init__(self, value):
        self.value = value.astype(I8)
        self.low = int(np.bitwise_or.reduce(value, axis=None))
        self.top = int(value.max())
        self.shifted = {}

    def kept(self, kept):
        """The addresses of the kept programs."""
        return self if len(self.value) == 1 else Address(self.value[kept])

    def words(self, shift, offset):
        """The index of each element of 2**shift bytes, starting at an offset that is a multiple of it."""
        key = shift, offset
        if key not in self.shifted:
            self.shifted[key] = self.value + offset >> shift
        return self.shifted[key]


class Access:
    """An entry of the log: which threads access which bytes, and how. rows: the programs, or None for all."""

    __slots__ = ("kind", "address", "offset", "size", "mask", "rows", "warps", "here", "data", "settled")

    def __init__(self, kind, address, offset, size, mask, rows, warps, here, data=None):
        self.kind, self.address, self.offset, self.size, self.mask = kind, address, offset, size, mask
        self.rows, self.warps, self.here, self.data, self.settled = rows, warps, here, data, False

    def by_program(self):
        """Whether programs differ in it."""
        return self.rows is not None or max(len(self.address.value), 1 if self.mask is None else len(self.mask)) > 1

    def part(self, chosen):
        """The part of the access in the chosen programs, or None."""
        own = np.arange(len(chosen)) if self.rows is None else self.rows
        kept = chosen[own]
        if not kept.any():
            return None
        if kept.all() and self.rows is not None:
            return self
        mask, data = kept_rows(self.mask, kept), kept_rows(self.data, kept)
        address = self.address.kept(kept)
        part = Access(self.kind, address, self.offset, self.size, mask, own[kept], self.warps, self.here, data)
        part.settled = self.settled
        return part

    def units(self, unit, stride, programs):
        """(the touched units, numbered through all programs; their warps); one program's if all programs agree."""
        first = (self.address.value + self.offset) // unit
        if programs:
            own = np.arange(programs) if self.rows is None else self.rows
            first = first + own[:, None] * stride
        warps, mask = self.warps, self.mask
        shape = np.broadcast_shapes(first.shape, warps.shape, (1, 1) if mask is None else mask.shape)
        first, warps = np.broadcast_to(first, shape), np.broadcast_to(warps, shape)
        if mask is not None:
            mask = np.broadcast_to(mask, shape)
            first, warps = first[mask], warps[mask]
        count = max(self.size // unit, 1)
        return (first.reshape(-1, 1) + np.arange(count)).ravel(), np.repeat(warps.ravel(), count)

    def values(self, unit, stride, programs):
        """(the written units, numbered through all programs; their values)."""
        own = (np.arange(programs) if self.rows is None else self.rows)[:, None]
        mask = np.ones((1, 1), bool) if self.mask is None else self.mask
        arrays = (self.address.value + self.offset) // unit + own * stride, self.data, mask, self.warps
        first, data, mask, _ = np.broadcast_arrays(*arrays)
        data = np.ascontiguousarray(data).view(BY_SIZE[unit]).reshape(*first.shape, -1)
        return (first[mask][:, None] + np.arange(data.shape[2])).ravel(), data[mask].ravel()


class Shared:
    """size: bytes of each program. warps: how many it has."""

    def __init__(self, programs, size, warps, proxies):
        self.programs, self.size, self.many, self.proxies = programs, size, warps > 1, proxies
        padded = -(-max(size, 1) // 16) * 16
        self.stride = padded
        data = np.full((programs, padded), 0xFF, U1)  # NaN, as any floating type
        self.views = {n: data.view(kind) for n, kind in BY_SIZE.items()}
        self.flat = {n: view.reshape(-1) for n, view in self.views.items()}
        self.flags = np.zeros((1, padded // 4), U1)
        # How many words are flagged; and the products of tcgen05.mma and bulk copies, for which some warps may have
        # waited.
        self.in_flight, self.flight, self.bulk = 0, None, None
        self.log, self.unfenced = [], []

    # Addresses.

    def checked(self, b, address, offset, size, mask, here):
        """The address, with 0 for inactive threads; faults if it is outside the memory or misaligned."""
        if address.top + offset + size <= self.size and not (address.low | offset) & (size - 1) and offset >= 0:
            return address, offset
        value = address.value + offset & 0xFFFFFFFF
        judged = True if mask is None else mask
        outside = (value + size > self.size) & judged
        if outside.any():
            worst = int(np.broadcast_to(value, outside.shape)[outside].max())
            b.fault("outside", f"{size} bytes at {worst} of {self.size}", here, outside)
        wrong = (value & size - 1 != 0) & judged
        if wrong.any():
            at = int(np.broadcast_to(value, wrong.shape)[wrong][0])
            b.fault("misaligned", f"{size} bytes at {at} of shared memory", here, wrong)
        return Address(value if mask is None else np.where(mask, value, 0)), 0

    def index(self, b, words, size):
        """The indices of elements through all programs."""
        return words + b.row * (self.stride >> SHIFT[size])

    def bits(self, b, address, offset, size):
        """The bits there, as numpy's type of the size."""
        words = address.words(SHIFT[size], offset)
        if b.rows is None and len(words) == 1:
            return self.views[size].take(words[0], axis=1)
        return self.flat[size].take(self.index(b, words, size))

    def write(self, b, address, offset, size, data, mask):
        words = address.words(SHIFT[size], offset)
        if b.rows is None and len(words) == 1 and (mask is None or len(mask) == 1):
            columns = max(words.shape[1], data.shape[1], 1 if mask is None else mask.shape[1])
            words, data = np.broadcast_to(words[0], (columns,)), np.broadcast_to(data, (len(data), columns))
            if mask is not None:
                chosen = np.broadcast_to(mask[0], (columns,))
                words, data = words[chosen], data[:, chosen]
            self.views[size][:, words] = data
            return
        arrays = np.broadcast_arrays(self.index(b, words, size), data, True if mask is None else mask)
        index, data, mask = arrays
        self.flat[size][index[mask]] = data[mask]

    # Checks.

    def touch(self, b, kind, address, offset, size, mask, warps, here, data=None):
        """Checks and logs an access by an ordinary instruction, or by a copy at its start; data: what it writes."""
        if self.in_flight:
            self.judge_flags(b, kind, address, offset, size, mask, warps, here)
        if self.many:
            self.log.append(Access(kind, address, offset, size, mask, b.rows, warps, here, data))

    def cells(self, b, address, offset, size):
        """(flags, viewed as integers that each cover all words of an access; their indices)."""
        view = self.flags.view(FLAGS[size])
        words = address.words(max(SHIFT[size], 2), offset)
        if len(view) > 1:
            words = words + b.row * view.shape[1]
        return view.reshape(-1), words

    def judge_flags(self, b, kind, address, offset, size, mask, warps, here):
        view, words = self.cells(b, address, offset & ~3 if size < 4 else offset, size)
        forbidden = COPY | BARRIER | BULK | (PRODUCT | OUT if kind == WRITE else 0)
        found = view.take(words) & view.dtype.type(forbidden * EVERY[size])
        if not found.any():
            return
        bad = (found != 0) if mask is None else (found != 0) & mask
        if not bad.any():
            return
        found = np.broadcast_to(found, bad.shape)[bad]
        if (found & view.dtype.type(COPY * EVERY[size])).any():
            b.fault("undelivered", f"{kind} {size} bytes that a copy in flight has yet to write", here, bad)
        if (found & view.dtype.type(BARRIER * EVERY[size])).any():
            b.fault("mbarrier", f"{kind} {size} bytes where an mbarrier is", here, bad)
        if (found & view.dtype.type((BULK | OUT) * EVERY[size])).any():
            self.bulk.judge(kind, b, address, offset, size, mask, warps, here)
        if kind == READ or not (found & view.dtype.type(PRODUCT * EVERY[size])).any():
            return
        if self.flight is None:
            b.fault("overwritten", f"{kind} {size} bytes that a product in flight still reads", here, bad)
        self.flight.judge_shared(b, address, offset, size, mask, warps, here)

    def judge_race(self, part, kind, address, what, here):
        """Faults if another warp has touched chunks since the last barrier, and either of the two writes."""
        stride = self.stride // 16
        for access in self.log:
            if READ == kind == access.kind:
                continue
            apart = part.rows is not None or len(address.value) > 1 or access.by_program()
            cells, warps = access.units(16, stride, self.programs if apart else 0)
            mine = (address.value >> 4) + (part.row * stride if apart else 0)
            bad = np.isin(mine, cells[warps != part.warp])
            if bad.any():
                place = part.batch.describe(access.here)
                detail = f"{what} of warp {part.warp} {kind} what another warp {access.kind} at {place}"
                part.fault("race", f"{detail} without a barrier in between", here, bad)

    def mark(self, b, flag, address, offset, size, mask, on):
        """Sets or clears a flag of every word of an access."""
        if len(self.flags) == 1 and self.programs > 1:
            if b.rows is not None or len(address.value) > 1 or mask is not None and len(mask) > 1:
                self.flags = np.repeat(self.flags, self.programs, axis=0)
        view, words = self.cells(b, address, offset, size)
        if mask is not None:
            words, mask = np.broadcast_arrays(words, mask)
            words = words[mask]
        pattern = view.dtype.type(flag * EVERY[size])
        view[words] = view[words] | pattern if on else view[words] & ~pattern

    def divide(self, accesses, rows):
        """(the accesses of some programs, those of the others)."""
        if rows is None or not accesses:
            return accesses, []
        chosen = np.zeros(self.programs, bool)
        chosen[rows] = True
        parts = [[access.part(side) for access in accesses] for side in (chosen, ~chosen)]
        return [[access for access in part if access] for part in parts]

    def settle(self, rows, machine):
        """A barrier of some programs, or of all (None): checks their accesses since the last one."""
        log, self.log = self.divide(self.log, rows)
        fenced, others = self.divide(self.unfenced, rows)
        for access in fenced:
            access.settled = True
        self.unfenced = fenced + others
        if not any(access.kind == WRITE for access in log):
            return
        unit = min(8, *(access.size for access in log))
        stride = self.stride // unit
        programs = self.programs if any(access.by_program() for access in log) else 0
        parts = [access.units(unit, stride, programs) for access in log]
        units, warps = (np.concatenate(arrays) for arrays in zip(*parts))
        last = np.empty(stride * max(programs, 1), warps.dtype)
        last[units] = warps
        clash = last[units] != warps
        if not clash.any():
            return
        written, seen = np.zeros(len(last), bool), np.zeros(len(last), bool)
        for access, (where, _) in zip(log, parts):
            (written if access.kind == WRITE else seen)[where] = True
        several = np.zeros(len(last), bool)
        several[units[clash]] = True
        bad = np.flatnonzero(several & written & seen)
        if not len(bad) and (several & written).any():
            bad = self.contradictions(log, several & written, unit, stride, programs)
        if len(bad):
            self.race(machine, log, parts, int(bad[0]), unit, stride)

    def contradictions(self, log, cells, unit, stride, programs):
        """Units that several warps write with different values.

        All of them may write the same value, such as an element that a layout gives to several warps.
        """
        total = stride * self.programs
        known, bad = np.zeros(total, BY_SIZE[unit]), np.zeros(total, bool)
        writes = [access for access in log if access.kind == WRITE]
        written = [access.values(unit, stride, self.programs) for access in writes if access.data is not None]
        for units, values in written:
            known[units] = values
        for units, values in written:
            bad[units[known[units] != values]] = True
        for access in writes:
            if access.data is None:
                bad[access.units(unit, stride, self.programs)[0]] = True
        bad = bad.reshape(self.programs, stride) & cells.reshape(-1, stride)
        return np.flatnonzero(bad if programs else bad.any(axis=0))

    @staticmethod
    def race(machine, log, parts, cell, unit, stride):
        """Faults: two accesses of different warps to one unit, one of them a write."""
        there = [(access, int(warps[units == cell][0])) for access, (units, warps) in zip(log, parts) if cell in units]
        writer, warp = next(pair for pair in there if pair[0].kind == WRITE)
        others = [(access, other) for access, other in there if other != warp]
        other, second = others[0] if others else (writer, -1)
        place = machine.describe(writer.here)
        row = cell // stride
        second = f"warp {second}" if second >= 0 else "another warp"
        detail = f"warp {warp} {writer.kind} byte {cell % stride * unit} at {place}, {second} {other.kind} it"
        machine.fault("race", f"{detail} without a barrier in between", other.here, row)

    # Ordinary stores and products.

    def fence(self, b):
        """fence.proxy.async: products may read what these warps have written, and all before the last barrier."""
        if self.unfenced:
            own, others = self.divide(self.unfenced, b.rows)
            left = [access for access in own if not access.settled and not np.isin(access.warps, b.warps).all()]
            self.unfenced = left + others


def shared_load(b, address, offset, size, count, form, mask, old, here):
    mask, some = active(mask)
    if not some:
        return old
    size *= count
    memory = b.batch.shared
    address, offset = memory.checked(b, address, offset, size, mask, here)
    memory.touch(b, READ, address, offset, size, mask, b.warps, here)
    raw = memory.bits(b, address, offset, size)
    return elements(raw, count, form, mask, old)


def shared_store(b, address, offset, size, values, mask, here):
    mask, some = active(mask)
    if not some:
        return
    data = joined(values, size)
    size *= len(values)
    store(b, address, offset, size, data, mask, here)


def store(b, address, offset, size, data, mask, here, warps=None):
    """An ordinary store of vectors of bits, by warps (1, threads)."""
    memory, warps = b.batch.shared, b.warps if warps is None else warps
    address, offset = memory.checked(b, address, offset, size, mask, here)
    memory.touch(b, WRITE, address, offset, size, mask, warps, here, data)
    if memory.proxies:
        memory.unfenced.append(Access(WRITE, address, offset, size, mask, b.rows, warps, here))
    memory.write(b, address, offset, size, data, mask)


NAMES = {"shared_load": shared_load, "shared_store": shared_store, "Address": Address}
