"""Runs the programs of a launch: which run together, in which order, and where their threads diverge and meet.

A `Batch` is a number of programs. A `Bundle` is the threads of a batch that are at one instruction: the same warps of
some of its programs. It splits at branches that not all of its threads take; of the pieces the one furthest behind runs
first, and two at one instruction are joined again.

Source: PTX ISA 9.0, sections "Programming Model: Thread Hierarchy" and "Parallel Synchronization and Communication
Instructions: bar".
"""

import numpy as np

from . import tensor_products
from .faults import Fault, row_of
from .memory import kept_rows
from .shared import Shared
from .tensor import Tensor
from .traffic import Traffic

# Threads that run together: enough that numpy's overhead is small even where programs diverge, and bytes of their
# shared memory, which should fit a cache.
ELEMENTS, BYTES = 32768, 1 << 23


def uniform(value, kind):
    return np.array([[value]], kind)


class Machine:
    """A kernel with what it is launched with.

    copies, products: "early" or "late". apart: whether each warp (or warpgroup, if there are products) runs on its own.
    count(instructions) is called with the number of instructions that warps have run.
    """

    def __init__(self, translated, shared_bytes, memory, copies, products, apart, rng, count):
        self.translated, self.kernel, self.shared_bytes = translated, translated.kernel, shared_bytes
        self.memory, self.rng, self.count = memory, rng, count
        self.copies_late, self.products_late, self.apart = copies == "late", products == "late", apart
        self.garbage = [garbage(form) for form in translated.forms]

    def describe(self, here):
        each = self.kernel.code[here]
        return f"PTX line {each.line} ({each.source})"

    def launch(self, grid, params):
        """Runs a grid. params: each parameter's bits, as an unsigned array of one element."""
        programs = grid[0] * grid[1] * grid[2]
        threads = self.kernel.threads
        size = max(1, min(ELEMENTS // threads, BYTES // max(self.shared_bytes, 1), programs))
        order = self.rng.permutation(programs)
        with np.errstate(all="ignore"):
            for first in range(0, programs, size):
                Batch(self, order[first : first + size], grid, params).run()


def garbage(form):
    """What a register holds before it is written: all bits set, NaN as a float."""
    if form == "b1":
        return uniform(True, bool)
    size = int(form[1])
    return uniform((1 << 8 * size) - 1, f"u{size}").view(form)


class Batch:
    """Programs that run together."""

    def __init__(self, machine, programs, grid, params):
        self.machine, self.programs, self.params = machine, programs, params
        kernel, translated = machine.kernel, machine.translated
        self.grid, self.memory = grid, machine.memory
        warps = -(-kernel.threads // 32)
        proxies = translated.asynchronous or translated.tensor
        self.shared = Shared(len(programs), machine.shared_bytes, warps, proxies)
        self.traffic = Traffic(len(programs)) if warps > 1 else None
        self.copies_late, self.products_late = machine.copies_late, machine.products_late
        self.tensor = Tensor(self, tensor_products.compute) if translated.tensor else None
        if self.tensor:
            self.shared.bulk = self.tensor.bulk
            self.shared.flight = None if translated.asynchronous else self.tensor.flight
        self.ntid = uniform(kernel.threads, np.uint32)
        self.nctaid = [uniform(n, np.uint32) for n in grid]
        self.threads = kernel.threads
        step = kernel.threads
        if machine.apart:
            step = 128 if translated.asynchronous else 32
        self.bundles = [
            Bundle(self, key, None, np.arange(first, min(first + step, kernel.threads)), list(machine.garbage))
            for key, first in enumerate(range(0, kernel.threads, step))
        ]

    def index(self, row):
        """The index of a program."""
        k = int(self.programs[row])
        x, y, _ = self.grid
        return k % x, k // x % y, k // x // y

    def fault(self, kind, detail, here, row=None):
        each = None if here is None else self.machine.kernel.code[here]
        place = (None, None) if each is None else (each.line, each.source)
        raise Fault(kind, detail, self.machine.kernel.name, None if row is None else self.index(row), *place)

    def describe(self, here):
        return self.machine.describe(here)

    def run(self):
        key = None
        while self.bundles:
            ready = [b for b in self.bundles if b.barrier is None and b.waits is None]
            if not ready:
                self.go_on()
                continue
            # From barrier to barrier, in any order of the warps.
            if not any(b.key == key for b in ready):
                key = ready[self.machine.rng.integers(len(ready))].key
            mine = [b for b in ready if b.key == key]
            b = min(mine, key=lambda b: b.pc)
            if len(mine) > 1:
                b = self.meet(b, mine)
            self.step(b, len(mine) == 1)
        self.settle(None)
        if self.tensor:
            self.tensor.finish()

    def wake(self):
        """An mbarrier has completed a phase: bundles that wait for one check again."""
        for b in self.bundles:
            b.waits = None

    def go_on(self):
        """All threads wait. Releases complete barriers, or delivers pending copies or commits; faults if there are
        none.
        """
        if not self.release() and not (self.tensor and (self.tensor.bulk.deliver() or self.tensor.flight.deliver())):
            self.incomplete()

    def settle(self, rows):
        """Checks the memory accesses of some programs, or of all (None), since their last barrier."""
        self.shared.settle(rows, self)
        if self.traffic:
            self.traffic.settle(rows, self)
        if self.tensor:
            self.tensor.settle(rows)

    def step(self, b, alone):
        """Runs a bundle: one block if other bundles have the same warps, or else until it splits or waits."""
        translated, count = self.machine.translated, self.machine.count
        while True:
            block = translated.blocks[b.pc]
            condition = translated.functions[b.pc](b, b.registers)
            count(len(block.instructions) * b.warp_count * b.program_count)
            b.pc += 1
            if block.end == "jump":
                b.pc = block.target
            elif block.end == "branch":
                if condition.all():
                    b.pc = block.target
                elif condition.any():
                    self.part(b, condition, block.target)
                    return
            elif block.end == "barrier":
                if not b.whole:
                    b.fault("barrier", "threads that have diverged from others of their warp", block.last)
                b.barrier = block.barrier, block.last
                return
            elif block.end == "exit":
                for this in (this for group in (*b.copies, *b.products) for this in group):
                    b.fault("pending", f"what is issued at {self.describe(this.here)}", block.last)
                self.bundles.remove(b)
                return
            if not alone or b.waits is not None:
                return

    def part(self, b, condition, target):
        """Splits a bundle into threads that take a branch and threads that do not: one or more pieces of each."""
        self.bundles.remove(b)
        condition = np.broadcast_to(condition, (len(condition), b.threads))
        patterns, which = np.unique(condition, axis=0, return_inverse=True)
        which = which.ravel()
        everyone = np.arange(b.threads)
        sides = {}
        for k, pattern in enumerate(patterns):
            rows = np.arange(b.program_count) if len(condition) == 1 else np.flatnonzero(which == k)
            if pattern.all() or not pattern.any():
                sides.setdefault(bool(pattern[0]), []).append(rows)
                continue
            for taken in (False, True):
                piece = b.piece(rows, np.flatnonzero(pattern == taken), target if taken else b.pc)
                self.bundles.append(piece)
        for taken, rows in sides.items():
            self.bundles.append(b.piece(np.sort(np.concatenate(rows)), everyone, target if taken else b.pc))

    def meet(self, b, others):
        """Joins a bundle with those that are at the same instruction and may join it."""
        for other in others:
            if other is not b and other.pc == b.pc and (joined := b.join(other)):
                self.bundles.remove(b)
                self.bundles.remove(other)
                self.bundles.append(joined)
                return self.meet(joined, [x for x in others if x not in (b, other)])
        return b

    def release(self):
        """All wait or have ended. Releases programs whose threads are all at one barrier; returns whether any are."""
        waiting = self.waiting()
        complete = np.zeros(len(self.programs), bool)
        for number, arrived in waiting.items():
            if number is not None:
                complete |= arrived == self.threads
        if not complete.any():
            return False
        going = sum(waiting.values())
        # Ended programs are checked with the others.
        everyone = bool(complete[going > 0].all())
        self.settle(None if everyone else np.flatnonzero(complete))
        for b in self.bundles:
            rows = np.arange(len(self.programs)) if b.rows is None else b.rows
            free = complete[rows]
            if free.all():
                b.barrier = None
            elif free.any():
                self.bundles.remove(b)
                columns = np.arange(b.threads)
                left, gone = (b.piece(np.flatnonzero(x), columns, b.pc) for x in (~free, free))
                left.barrier = b.barrier
                self.bundles += [left, gone]
                return True
        return True

    def waiting(self):
        """How many threads of each program wait at a barrier, by its index, or for an mbarrier (None)."""
        waiting = {}
        for b in self.bundles:
            arrived = waiting.setdefault(b.barrier and b.barrier[0], np.zeros(len(self.programs), int))
            arrived[slice(None) if b.rows is None else b.rows] += b.threads
        return waiting

    def incomplete(self):
        """Faults: some threads of a program wait, and the others never come."""
        b = self.bundles[0]
        row = 0 if b.rows is None else int(b.rows[0])
        arrived = {number: int(counts[row]) for number, counts in self.waiting().items() if counts[row]}
        places = {number: "for an mbarrier" if number is None else f"at barrier {number}" for number in arrived}
        threads = ", ".join(f"{n} threads {places[number]}" for number, n in arrived.items())
        here = b.waits if b.barrier is None else b.barrier[1]
        self.fault("barrier", f"{threads}; the program has {self.threads}", here, row)


class Bundle:
    """Threads at one instruction. rows: their programs in the batch, or None for all. columns: their indices in each.

    registers: arrays that broadcast to (programs, threads).
    """

    def __init__(self, batch, key, rows, columns, registers, pc=0):
        self.batch, self.key, self.rows, self.columns = batch, key, rows, columns
        self.registers, self.pc, self.barrier = registers, pc, None
        self.waits = None  # the instruction that found an mbarrier's phase incomplete
        own = np.arange(len(batch.programs)) if rows is None else rows
        self.row, self.program_count, self.threads = own[:, None], len(own), len(columns)
        self.tid = columns[None, :].astype(np.uint32)
        self.lane = self.tid & np.uint32(31)
        self.warps = columns[None, :] // 32
        numbers, counts = np.unique(self.warps, return_counts=True)
        self.warp_count = len(numbers)
        self.whole = bool((counts == 32).all())
        self.first_warps = self.warps[0, ::128]
        x, y, _ = batch.grid
        programs = batch.programs[own][:, None]
        index = programs % x, programs // x % y, programs // x // y
        self.ctaid = [each.astype(np.uint32) for each in index]
        self.copies, self.products, self.sums = [[]], [[]], {}
        # The segments run since the last wgmma.fence, whether there was a fence, and whether one since the last commit.
        self.since_fence, self.fenced, self.ordered = set(), False, False

    def fault(self, kind, detail, here, where=0):
        """where: which (programs, threads) are at fault, or the index of a program here."""
        self.batch.fault(kind, detail, here, int(self.row[row_of(where), 0]))

    def busy(self):
        return any(self.products)

    def piece(self, kept, columns, pc):
        """Some of the programs and threads, by their indices here, at an instruction."""
        everyone = len(columns) == self.threads
        if self.busy() and not everyone:
            here = self.batch.machine.translated.blocks[pc].last
            self.fault("instruction", "threads that diverge while a product is in flight", here)
        registers = list(self.batch.machine.garbage)
        for k in self.batch.machine.translated.alive[pc]:
            value = kept_rows(self.registers[k], kept)
            registers[k] = value if everyone or value.shape[1] == 1 else value[:, columns]
        rows = self.row[kept, 0]
        rows = None if len(rows) == len(self.batch.programs) else rows
        part = Bundle(self.batch, self.key, rows, self.columns[columns], registers, pc)
        part.since_fence, part.fenced, part.ordered = set(self.since_fence), self.fenced, self.ordered
        part.copies = [[each for this in group if (each := this.part(part))] for group in self.copies]
        part.products = [[this.part(kept, columns, part.rows, part.row) for this in group] for group in self.products]
        return part

    def join(self, other):
        """This bundle joined with another at the same instruction, or None."""
        if self.busy() or other.busy() or self.barrier != other.barrier:
            return None
        if np.array_equal(self.row, other.row):
            axis = 1
            columns = np.concatenate([self.columns, other.columns])
            order, rows = np.argsort(columns), self.rows
            columns = columns[order]
        elif np.array_equal(self.columns, other.columns):
            axis, columns = 0, self.columns
            rows = np.concatenate([self.row[:, 0], other.row[:, 0]])
            order = np.argsort(rows)
            rows = rows[order] if len(rows) < len(self.batch.programs) else None
        else:
            return None
        registers = list(self.batch.machine.garbage)
        for k in self.batch.machine.translated.alive[self.pc]:
            registers[k] = self.merged(self.registers[k], other.registers[k], other, axis, order)
        whole = Bundle(self.batch, self.key, rows, columns, registers, self.pc)
        whole.since_fence = self.since_fence | other.since_fence
        whole.fenced, whole.ordered = self.fenced and other.fenced, self.ordered and other.ordered
        whole.copies, whole.products = merged_groups(self.copies, other.copies), [[]]
        return whole

    def merged(self, a, b, other, axis, order):
        """A register of both, joined along programs (axis 0) or threads (1)."""
        if a is b or a.shape == b.shape and a.shape[axis] == 1 and a.tobytes() == b.tobytes():
            return a
        counts = (self.program_count, other.program_count) if axis == 0 else (self.threads, other.threads)
        across = max(a.shape[1 - axis], b.shape[1 - axis])
        shapes = [(n, across) if axis == 0 else (across, n) for n in counts]
        both = np.concatenate([np.broadcast_to(x, shape) for x, shape in zip((a, b), shapes)], axis=axis)
        return both.take(order, axis=axis)


def merged_groups(a, b):
    """The copy groups of two bundles, paired from the youngest on."""
    n = max(len(a), len(b))
    a, b = ([[]] * (n - len(groups)) + groups for groups in (a, b))
    return [[*x, *y] for x, y in zip(a, b)]
