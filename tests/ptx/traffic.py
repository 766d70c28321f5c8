"""Races in global memory between the warps of one program: two at one address, one writing, no barrier in between.

Loads and stores of the programs that run together are logged, and checked at each of their barriers and at their end.
What several programs of a launch do to one address is not checked here: the interpreter watches that, and a barrier
does not order it.

Source: PTX ISA 9.0, sections "Memory Consistency Model" and "Parallel Synchronization and Communication Instructions:
bar".
"""

from dataclasses import dataclass

import numpy as np

from .memory import BY_SIZE, WRITE, kept_rows


@dataclass(slots=True)
class Touch:
    """An access of threads to elements of a segment of memory.

    index: the elements' numbers, which broadcast to (programs, threads) as mask and data do. rows: the programs, or
    None for all that run together.
    """

    kind: str
    index: object
    size: int
    mask: object
    rows: object
    warps: object
    here: int
    data: object

    def part(self, chosen):
        """The part of the touch in the chosen programs, or None."""
        own = np.arange(len(chosen)) if self.rows is None else self.rows
        kept = chosen[own]
        if kept.all():
            return self
        if not kept.any():
            return None
        index, mask, data = (kept_rows(array, kept) for array in (self.index, self.mask, self.data))
        return Touch(self.kind, index, self.size, mask, own[kept], self.warps, self.here, data)

    def elements(self, unit, programs):
        """(programs, units of the segment, warps, bytes written or zeros) of the touched units, one row for each."""
        own = (np.arange(programs) if self.rows is None else self.rows)[:, None]
        mask = np.ones((1, 1), bool) if self.mask is None else self.mask
        data = np.zeros((1, 1), BY_SIZE[self.size]) if self.data is None else self.data
        own, index, warps, mask, data = np.broadcast_arrays(own, self.index, self.warps, mask, data)
        own, index, warps, data = own[mask], index[mask], warps[mask], data[mask]
        count = self.size // unit
        units = (index[:, None] * count + np.arange(count)).ravel()
        values = np.ascontiguousarray(data).view(np.uint8).reshape(len(units), unit)
        return np.repeat(own, count), units, np.repeat(warps, count), values


class Traffic:
    """Of programs that run together. segments: the touches of each segment since the last barrier."""

    def __init__(self, programs):
        self.programs, self.segments = programs, {}

    def note(self, b, kind, segment, index, size, mask, here, data=None):
        self.segments.setdefault(segment, []).append(Touch(kind, index, size, mask, b.rows, b.warps, here, data))

    def settle(self, rows, machine):
        """A barrier of some programs, or of all (None): checks their touches since the last one."""
        chosen = np.zeros(self.programs, bool)
        chosen[slice(None) if rows is None else rows] = True
        segments, self.segments = self.segments, {}
        for segment, touches in segments.items():
            if left := [part for touch in touches if (part := touch.part(~chosen))]:
                self.segments[segment] = left
            mine = [part for touch in touches if (part := touch.part(chosen))]
            if any(touch.kind == WRITE for touch in mine):
                self.judge(segment, mine, machine)

    def judge(self, segment, touches, machine):
        """Faults if several warps of a program touch an element and one of them writes.

        Several may write the same value, such as an element that a layout gives to each of them.
        """
        unit = min(touch.size for touch in touches)
        found = [touch.elements(unit, self.programs) for touch in touches]
        program, units, warps, values = (np.concatenate(arrays) for arrays in zip(*found))
        number = np.repeat(np.arange(len(touches)), [len(each[1]) for each in found])
        kept = self.contested(program << 5 | warps, units, -(-segment.size // unit))
        if not len(kept):
            return
        kept = kept[np.lexsort((units[kept], program[kept]))]
        place = np.stack([program[kept], units[kept]])
        start = np.flatnonzero(np.append(True, (place[:, 1:] != place[:, :-1]).any(axis=0)))
        writes = np.array([touch.kind == WRITE for touch in touches])[number[kept]]
        sizes = np.diff(start, append=len(kept))
        differ = (values[kept] != np.repeat(values[kept[start]], sizes, axis=0)).any(axis=1)
        bad = np.minimum.reduceat(warps[kept], start) != np.maximum.reduceat(warps[kept], start)
        bad &= np.logical_or.reduceat(writes, start) & np.logical_or.reduceat(~writes | differ, start)
        for first, size in zip(start[bad], sizes[bad]):
            group = kept[first : first + size]
            writer = group[writes[first : first + size]][0]
            other = next(k for k in group if warps[k] != warps[writer])
            write, touch = touches[number[writer]], touches[number[other]]
            byte, place = units[writer] * unit, machine.describe(write.here)
            detail = f"warp {warps[writer]} {WRITE} byte {byte} of a tensor's storage at {place}, "
            detail += f"warp {warps[other]} {touch.kind} it without a barrier in between"
            machine.fault("race", detail, touch.here, int(program[writer]))

    @staticmethod
    def contested(owners, units, count):
        """The indices of the elements whose unit has another owner as well."""
        last = np.empty(count, owners.dtype)
        last[units] = owners
        several = last[units] != owners
        if not several.any():
            return np.zeros(0, int)
        shared = np.zeros(count, bool)
        shared[units[several]] = True
        return np.flatnonzero(shared[units])
