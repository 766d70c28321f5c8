"""Products of tcgen05.mma in flight: which memory may not be touched, and which warps know that they are complete.

tcgen05.commit makes an mbarrier complete a phase once all earlier products of its thread are complete. A warp that has
waited for this phase knows it, and after a barrier of the program all warps do. Until then no warp may write the shared
or tensor memory that a product reads, or touch its sums.

A commit arrives at once, or as late as possible: when no thread can go on without it. Its products are computed then,
as a whole, so that their sums have the same bits in both cases.

Source: PTX ISA 9.0, section "TensorCore 5th Generation Family Instructions": "Memory Consistency Model" and
"tcgen05.commit".
"""

from dataclasses import dataclass, replace

import numpy as np

from .memory import WRITE, kept_rows
from .shared import PRODUCT, Address


@dataclass(frozen=True)
class Region:
    """Lanes of tensor memory, as a bit mask, and a half-open range of columns."""

    lanes: int
    first: int
    last: int

    def meets(self, other):
        return bool(self.lanes & other.lanes) and self.first < other.last and other.first < self.last


@dataclass(eq=False)
class Product:
    """One tcgen05.mma of the programs with these indices. a: an Address of chunks of shared memory, or a Region.

    lanes: of the rows of its sums, and of A if that is a Region. keep: whether it adds to the old sums.
    """

    batch: object
    form: object
    numbers: object
    issuer: int
    lanes: object
    d: Region
    a: object
    b: Address
    keep: object
    here: int

    @property
    def row(self):
        return self.numbers[:, None]

    @property
    def rows(self):
        return None if len(self.numbers) == len(self.batch.programs) else self.numbers

    def addresses(self):
        return [address for address in (self.a, self.b) if isinstance(address, Address)]

    def among(self, numbers):
        """The part of the product that belongs to the given programs, or None."""
        kept = np.isin(self.numbers, numbers)
        if kept.all() or not kept.any():
            return self if kept.all() else None
        a = self.a if isinstance(self.a, Region) else self.a.kept(kept)
        keep = kept_rows(self.keep, kept)
        return replace(self, numbers=self.numbers[kept], a=a, b=self.b.kept(kept), keep=keep)


@dataclass(eq=False)
class Commit:
    """known: by program and warp. phases: those of the mbarrier that it has arrived in, or None."""

    products: list
    numbers: object
    issuer: int
    place: int
    known: object
    here: int
    phases: object = None

    def among(self, numbers):
        kept = np.isin(self.numbers, numbers)
        products = [part for this in self.products if (part := this.among(numbers))]
        phases = None if self.phases is None else self.phases[kept]
        return replace(self, products=products, numbers=self.numbers[kept], phases=phases)


class Flight:
    """open: products without a commit. compute: a function of a list of products."""

    def __init__(self, batch, compute):
        self.batch, self.compute, self.programs = batch, compute, len(batch.programs)
        self.open, self.commits = [], []

    def in_flight(self):
        """(product, its commit or None) for each."""
        yield from ((this, commit) for commit in self.commits for this in commit.products)
        yield from ((this, None) for this in self.open)

    def unaware(self, rows, warp):
        """(product, the programs in which the warp does not know that it is complete), where there are any."""
        for this, commit in self.in_flight():
            flags = np.zeros(self.programs, bool)
            flags[this.numbers] = True if commit is None else ~commit.known[this.numbers, warp]
            flags &= rows
            if flags.any():
                yield this, flags

    # Changes of the products in flight.

    def issue(self, this):
        self.open.append(this)
        self.mark(this, True)

    def mark(self, this, on):
        for address in this.addresses():
            self.batch.shared.mark(this, PRODUCT, address, 0, 16, None, on)
        self.batch.shared.in_flight += (1 if on else -1) * len(this.addresses()) * len(this.numbers)

    def commit(self, part, issuer, place, here):
        """A thread's commit to the mbarrier at an address in each program."""
        mine = [this for this in self.open if this.issuer == issuer]
        others = np.setdiff1d(np.arange(self.programs), part.numbers)
        left = [rest for this in mine if (rest := this.among(others))]
        self.open = [this for this in self.open if this.issuer != issuer] + left
        for one in np.unique(place):
            numbers = part.numbers[place == one]
            products = [each for this in mine if (each := this.among(numbers))]
            known = np.zeros((self.programs, -(-self.batch.threads // 32)), bool)
            self.commits.append(Commit(products, numbers, issuer, int(one), known, here))
            if not self.batch.products_late:
                self.arrive(self.commits[-1])

    def arrive(self, commit):
        self.compute(commit.products)
        place = np.full(len(commit.numbers), commit.place)
        commit.phases = self.batch.tensor.barriers.change(place, commit.numbers, commit.here, arrivals=1)

    def deliver(self):
        """The oldest pending commit of each program arrives; returns whether there is any."""
        seen = np.zeros(self.programs, bool)
        for commit in [commit for commit in self.commits if commit.phases is None]:
            first = ~seen[commit.numbers]
            seen[commit.numbers] = True
            if first.all():
                self.arrive(commit)
            elif first.any():
                parts = [commit.among(commit.numbers[chosen]) for chosen in (first, ~first)]
                place = self.commits.index(commit)
                self.commits[place : place + 1] = parts
                self.arrive(parts[0])
        return bool(seen.any())

    # What warps know of completion.

    def observed(self, numbers, warps, places, phases):
        """Warps have seen that the mbarriers at these addresses have completed this many phases: they know of all
        commits that had arrived in those.

        They know of earlier commits of the same threads as well.
        """
        (at, seen), learned = np.full((2, self.programs), -1), {}
        at[numbers], seen[numbers] = places, phases
        for commit in reversed(self.commits):
            rows = learned.setdefault(commit.issuer, np.zeros(self.programs, bool))
            if commit.phases is not None:
                rows[commit.numbers] |= (at[commit.numbers] == commit.place) & (commit.phases < seen[commit.numbers])
            commit.known[np.ix_(commit.numbers[rows[commit.numbers]], np.unique(warps))] = True
        self.retire()

    def together(self, rows):
        """A barrier of the flagged programs: whatever one warp knows, all know."""
        for commit in self.commits:
            commit.known[rows] |= commit.known[rows].any(axis=1, keepdims=True)
        self.retire()

    def retire(self):
        """Products that all warps know to be complete are no longer in flight."""
        done, left = [], []
        for commit in self.commits:
            known = commit.known[commit.numbers].all(axis=1)
            parts = [commit.among(commit.numbers[chosen]) for chosen in (known, ~known) if chosen.any()]
            done += parts[0].products if known.any() else []
            left += [] if known.all() else parts[-1:]
        self.commits = left
        for this in done:
            self.mark(this, False)
        for this, _ in self.in_flight() if done else ():
            for address in this.addresses():
                self.batch.shared.mark(this, PRODUCT, address, 0, 16, None, True)

    # Faults.

    def fault(self, kind, detail, this, here, rows):
        detail = f"{detail} the product in flight of {self.batch.describe(this.here)}"
        self.batch.fault(kind, detail, here, int(rows.argmax()))

    def judge(self, kind, rows, warp, region, here):
        """Faults if a warp may not load from, or store to, a region of tensor memory."""
        for this, flags in self.unaware(rows, warp):
            if this.d.meets(region):
                self.fault("register", f"{kind} the sums of", this, here, flags)
            if kind == WRITE and isinstance(this.a, Region) and this.a.meets(region):
                self.fault("overwritten", "writes tensor memory that is read by", this, here, flags)

    def judge_shared(self, b, address, offset, size, mask, warps, here):
        """Faults if the warps of some threads may not write to shared memory."""
        shared = self.batch.shared
        stride = shared.stride // 16
        cells = (address.value + offset >> 4) + b.row * stride
        mask = np.broadcast_to(True if mask is None else mask, np.broadcast_shapes(cells.shape, warps.shape))
        for warp in np.unique(warps):
            rows = np.zeros(self.programs, bool)
            rows[b.row[:, 0]] = True
            for this, flags in self.unaware(rows, warp):
                chosen = flags[b.row] & mask & (warps == warp)
                for read in this.addresses():
                    bad = np.isin(cells, (read.value >> 4) + this.row * stride) & chosen
                    if bad.any():
                        row = np.zeros(self.programs, bool)
                        row[b.row[:, 0]] = bad.any(axis=1)
                        self.fault("overwritten", f"writes {size} bytes that are read by", this, here, row)

    def judge_product(self, new):
        """Faults unless the products in flight whose regions overlap a new one's are sure to complete before it."""
        rows = np.zeros(self.programs, bool)
        rows[new.numbers] = True
        for this, flags in self.unaware(rows, new.issuer // 32):
            same = (this.issuer, this.d, this.form.m) == (new.issuer, new.d, new.form.m)
            if this.d.meets(new.d) and not same:
                self.fault("register", "has sums in other places than", this, new.here, flags)
            if isinstance(new.a, Region) and this.d.meets(new.a):
                self.fault("register", "reads the sums of", this, new.here, flags)
            if isinstance(this.a, Region) and this.a.meets(new.d):
                self.fault("overwritten", "writes tensor memory that is read by", this, new.here, flags)

    def judge_inval(self, part, place, here):
        """Faults if a commit arrives at an mbarrier that a thread invalidates without having waited for it."""
        at = np.full(self.programs, -1)
        at[part.numbers] = place
        for commit in self.commits:
            wrong = (at[commit.numbers] == commit.place) & ~commit.known[commit.numbers, part.warp]
            if wrong.any():
                detail = f"mbarrier.inval without a wait for the commit of {self.batch.describe(commit.here)}"
                self.batch.fault("pending", detail, here, int(commit.numbers[wrong.argmax()]))

    def finish(self):
        """Faults if programs end before their products are complete."""
        for this in self.open:
            self.batch.fault("pending", "a product without tcgen05.commit", this.here, int(this.numbers[0]))
        for commit in self.commits:
            lost = ~commit.known[commit.numbers].any(axis=1)
            if lost.any():
                row = int(commit.numbers[lost.argmax()])
                self.batch.fault("pending", "a commit of products that no warp waits for", commit.here, row)
