"""Asynchronous copies into shared memory: cp.async.

A copy lands at once, or at the last moment that a wait allows. Until the wait no thread may touch its destination. To
products it is then like an ordinary store: only bulk copies are of the async proxy, as products are.

Source: PTX ISA 9.0, sections "Data Movement and Conversion Instructions: cp.async" and "Async Proxy".
"""

from dataclasses import dataclass

import numpy as np

from .memory import BY_SIZE, WRITE, active, kept_rows
from .shared import COPY, Access, Address

U4 = np.uint32


@dataclass
class Copy:
    """One cp.async of some programs' threads. given: bytes that are read; the rest of its size is filled with zeros."""

    rows: object
    row: object
    columns: object
    to: Address
    offset: int
    source: object
    source_offset: int
    size: int
    given: object
    mask: object
    here: int

    @property
    def threads(self):
        return len(self.columns)

    @property
    def warps(self):
        return self.columns[None, :] // 32

    @property
    def count(self):
        return len(self.row) * len(self.columns)

    def part(self, b):
        """The part of the copy that belongs to a bundle's programs and threads, or None."""
        kept, columns = np.isin(self.row[:, 0], b.row[:, 0]), np.isin(self.columns, b.columns)
        if not kept.any() or not columns.any():
            return None

        def cut(array):
            array = kept_rows(array, kept)
            return array if array is None or array.shape[1] == 1 else array[:, columns]

        to, row = Address(cut(self.to.value)), self.row[kept]
        rows = None if len(row) == len(b.batch.programs) else row[:, 0]
        return Copy(
            rows, row, self.columns[columns], to, self.offset, cut(self.source), self.source_offset,
            self.size, cut(self.given), cut(self.mask), self.here,
        )  # fmt: skip


def copy(b, to, offset, source, source_offset, size, given, mask, here):
    """cp.async."""
    mask, some = active(mask)
    if not some:
        return
    shared = b.batch.shared
    to, offset = shared.checked(b, to, offset, size, mask, here)
    this = Copy(b.rows, b.row, b.columns, to, offset, source, source_offset, size, given, mask, here)
    shared.touch(b, WRITE, to, offset, size, mask, b.warps, here)
    if b.batch.copies_late:
        read(b, this)  # a stray address is a fault at once
    else:
        land(b, this)
    shared.mark(b, COPY, to, offset, size, mask, True)
    shared.in_flight += this.count
    b.copies[-1].append(this)


def read(b, this):
    """The bits that a copy brings; addresses that it does not read may be anything."""
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
    return result.view(BY_SIZE[size])[..., 0]


def land(b, this):
    """Writes what a copy brings; b has the copy's rows and threads."""
    b.batch.shared.write(b, this.to, this.offset, this.size, read(b, this), this.mask)


def commit_copies(b):
    b.copies.append([])


def wait_copies(b, pending, here):
    """cp.async.wait_group: all groups except the last few have landed."""
    while len(b.copies) - 1 > pending:
        for this in b.copies.pop(0):
            shared = b.batch.shared
            shared.mark(this, COPY, this.to, this.offset, this.size, this.mask, False)
            shared.in_flight -= this.count
            if b.batch.copies_late:
                land(Owner(b, this, this.warps), this)
            written = Access(WRITE, this.to, this.offset, this.size, this.mask, this.rows, this.warps, this.here)
            if shared.many:
                shared.log.append(written)
            if shared.proxies:
                shared.unfenced.append(written)


class Owner:
    """A bundle when it issued something: its programs and threads."""

    def __init__(self, b, this, warps=None):
        self.batch, self.rows, self.row, self.threads = b.batch, this.rows, this.row, this.threads
        self.warps = warps
        self.fault = b.fault


NAMES = {f.__name__: f for f in (copy, commit_copies, wait_copies)}
