"""Barriers in shared memory that products and bulk copies arrive at: mbarrier, and elect.sync, which elects the thread
that issues them.

An mbarrier completes a phase once the arrivals and the bytes that the phase expects are there. A thread waits for the
phase of a parity: while that phase is the current one the wait fails, and the bundle pauses until some mbarrier
completes a phase. tcgen05.commit arrives (see flight), and mbarrier.arrive.expect_tx, which also says how many bytes
bulk copies will bring (see bulk). Threads do not synchronize with each other by arrivals here.

Sources: PTX ISA 9.0, sections "Parallel Synchronization and Communication Instructions: mbarrier" (with "Tracking
asynchronous operations by the mbarrier object: Expect-tx operation, Complete-tx operation") and "elect.sync".
"""

import numpy as np

from .faults import row_of
from .memory import READ, WRITE
from .shared import BARRIER, Access, Address
from .warp import members

U4, U8 = np.uint32, np.uint64
SIZE = 8
# Above the counts of arrivals and of bytes.
LIMIT = 1 << 20


class Part:
    """One thread in some of a bundle's programs. numbers: the programs' indices; kept: their indices in the bundle."""

    def __init__(self, b, kept, thread):
        self.batch, self.kept, self.thread, self.program_count = b.batch, kept, thread, len(kept)
        self.row = b.row[kept]
        self.numbers = self.row[:, 0]
        self.rows = None if len(kept) == len(b.batch.programs) else self.numbers
        self.warps = b.warps[:, thread : thread + 1]
        self.warp, self.tid = int(self.warps[0, 0]), int(b.tid[0, thread])

    def of(self, value):
        """A register's value in each program."""
        value = value[:, self.thread if value.shape[1] > 1 else 0]
        return np.broadcast_to(value, self.program_count) if len(value) == 1 else value[self.kept]

    def fault(self, kind, detail, here, where=0):
        self.batch.fault(kind, detail, here, int(self.numbers[row_of(where)]))


def single(b, mask, what, here):
    """The Part of a bundle that executes a single-thread instruction; None if there is none."""
    chosen = np.broadcast_to(True if mask is None else mask, (1 if mask is None else len(mask), b.threads))
    count = chosen.sum(axis=1)
    if (count > 1).any():
        b.fault("instruction", f"{what} by several threads", here, chosen)
    kept = np.flatnonzero(np.broadcast_to(count, b.program_count))
    if not len(kept):
        return None
    threads = np.unique(chosen.argmax(axis=1)[count > 0])
    if len(threads) > 1:
        b.fault("instruction", f"{what} by another thread in another program", here)
    return Part(b, kept, int(threads[0]))


def issuers(b, mask):
    """A Part of a bundle for each thread that executes an instruction, in any program."""
    chosen = np.broadcast_to(True if mask is None else mask, (1 if mask is None else len(mask), b.threads))
    for thread in np.flatnonzero(chosen.any(axis=0)):
        kept = np.flatnonzero(np.broadcast_to(chosen[:, thread], b.program_count))
        yield Part(b, kept, int(thread))


def compact(values):
    """A value for each program as a column; one row if all are the same."""
    return values[:1, None] if (values == values[0]).all() else values[:, None]


class State:
    """Of the mbarriers at one address in all programs.

    phases: how many each has completed; -1 where there is none. count: arrivals that each phase expects. arrivals,
    bytes: those that the current phase still expects; more bytes than expected may come before the thread that says so.
    """

    def __init__(self, programs):
        self.phases = np.full(programs, -1)
        self.count, self.arrivals, self.bytes = np.zeros((3, programs), int)


class Barriers:
    """Of programs that run together: the State at each address."""

    def __init__(self, batch):
        self.batch, self.programs, self.states = batch, len(batch.programs), {}

    def of(self, b, place, what, here):
        """The completed phases of the mbarrier at each program's address."""
        result = np.empty(len(place), int)
        for one in np.unique(place):
            chosen = place == one
            result[chosen] = self.states[one].phases[b.row[chosen, 0]] if one in self.states else -1
        if (result < 0).any():
            row = int(np.flatnonzero(result < 0)[0])
            b.fault("mbarrier", f"{what} of shared memory at {int(place[row])}, which is no mbarrier", here, row)
        return result

    def make(self, place, numbers, count):
        for one in np.unique(place):
            state, chosen = self.states.setdefault(one, State(self.programs)), place == one
            rows = numbers[chosen]
            state.phases[rows] = state.bytes[rows] = 0
            state.count[rows] = state.arrivals[rows] = count[chosen]

    def unmake(self, place, numbers):
        for one in np.unique(place):
            self.states[one].phases[numbers[place == one]] = -1

    def change(self, place, numbers, here, arrivals=0, expected=0, brought=0):
        """Arrivals, expected bytes and brought bytes; returns the index of the phase to which they belong."""
        phases, added = np.empty(len(numbers), int), np.broadcast_to(expected - brought, len(numbers))
        for one in np.unique(place):
            state, chosen = self.states[one], place == one
            rows = numbers[chosen]
            phases[chosen] = state.phases[rows]
            state.arrivals[rows] -= arrivals
            state.bytes[rows] += added[chosen]
            last, left = state.arrivals[rows] == 0, state.bytes[rows]
            self.judge(state.arrivals[rows] < 0, "an arrival that the current phase does not expect", rows, here)
            self.judge(last & (left < 0) | (abs(left) >= LIMIT), "other bytes than the phase expects", rows, here)
            complete = rows[last & (left == 0)]
            state.phases[complete] += 1
            state.arrivals[complete] = state.count[complete]
            if len(complete):
                self.batch.wake()
        return phases

    def judge(self, wrong, detail, rows, here):
        if wrong.any():
            self.batch.fault("mbarrier", detail, here, int(rows[wrong.argmax()]))


def log(b, kind, address, here):
    """Logs an mbarrier's use: for races with other warps init and inval are writes, and all other uses are reads."""
    shared = b.batch.shared
    if shared.many:
        shared.log.append(Access(kind, address, 0, SIZE, None, b.rows, b.warps, here))


def barrier_init(b, address, offset, count, mask, here):
    part = single(b, mask, "mbarrier.init", here)
    if part is None:
        return
    count = part.of(count).astype(int)
    if not ((count > 0) & (count < LIMIT)).all():
        part.fault("instruction", f"an mbarrier that expects {int(count.min())} to {int(count.max())} arrivals", here)
    shared, barriers = b.batch.shared, b.batch.tensor.barriers
    place = part.of(address.value) + offset
    address, _ = shared.checked(part, Address(compact(place)), 0, SIZE, None, here)
    shared.touch(part, WRITE, address, 0, SIZE, None, part.warps, here)
    shared.write(part, address, 0, SIZE, np.full((1, 1), ~U8(0)), None)
    shared.mark(part, BARRIER, address, 0, SIZE, None, True)
    shared.in_flight += part.program_count
    barriers.make(place, part.numbers, count)


def barrier_inval(b, address, offset, mask, here):
    part = single(b, mask, "mbarrier.inval", here)
    if part is None:
        return
    shared, tensor = b.batch.shared, b.batch.tensor
    place = part.of(address.value) + offset
    tensor.barriers.of(part, place, "mbarrier.inval", here)
    tensor.flight.judge_inval(part, place, here)
    tensor.bulk.judge_inval(part, place, here)
    address = Address(compact(place))
    shared.mark(part, BARRIER, address, 0, SIZE, None, False)
    shared.in_flight -= part.program_count
    log(part, WRITE, address, here)
    tensor.barriers.unmake(place, part.numbers)


def barrier_arrive(b, address, offset, expected, mask, here):
    """mbarrier.arrive.expect_tx, by any threads."""
    barriers = b.batch.tensor.barriers
    for part in issuers(b, mask):
        place = part.of(address.value) + offset
        barriers.of(part, place, "mbarrier.arrive", here)
        log(part, READ, Address(compact(place)), here)
        barriers.change(place, part.numbers, here, arrivals=1, expected=part.of(expected).astype(int))


def barrier_wait(b, address, offset, parity, here):
    """mbarrier.try_wait.parity: whether the phase is complete."""
    tensor = b.batch.tensor
    for value in (address.value, parity):
        if value.shape[1] > 1 and (value != value[:, :1]).any():
            b.fault("divergence", "threads that wait for different mbarriers or phases", here)
    if (parity > U4(1)).any():
        b.fault("instruction", f"parity {int(parity.max())}", here)
    place = np.broadcast_to(address.value[:, 0] + offset, b.program_count)
    phases = tensor.barriers.of(b, place, "mbarrier.try_wait", here)
    log(b, READ, Address(compact(place)), here)
    complete = phases & 1 != parity[:, 0]
    if not complete.all():
        b.waits = here
    if complete.any():
        seen = b.row[complete, 0], b.warps, place[complete], phases[complete]
        tensor.flight.observed(*seen)
        tensor.bulk.observed(*seen)
    return complete[:, None]


def elect(b, mask, here):
    """(the elected lane, whether a thread has it): any lane, but the same one throughout."""
    members(b, mask, here)
    leader = U4(b.batch.tensor.leader)
    return np.full((1, 1), leader), b.lane == leader


NAMES = {f.__name__: f for f in (barrier_init, barrier_inval, barrier_arrive, barrier_wait, elect)}
