"""Compiles and times tiles on a card."""

import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from triton import knobs

from tritonnet.kernels import tiles
from tritonnet.kernels._common import compute_capability

from .. import TARGETS
from ..measure import Cuda, precision
from ..run import attempt
from ..warm.work import run_jobs
from .fit import Sample

REPETITIONS = 15
# What events resolve; nothing counts as faster.
LEAST_US = 0.5
# Writing this many bytes leaves nothing else in L2, and takes the GPU longer than the host takes for the next launch.
FLUSHED = 2**28


def architecture():
    """The current card's key in measured_tiles.py."""
    return f"sm_{compute_capability()}0"


def compile_all(processes, seconds):
    """Compile every candidate for every problem into Triton's cache, in processes; returns what failed, a line each.

    What is not compiled after so many seconds is compiled when it is measured.
    """
    if architecture() not in TARGETS:
        return []
    with tempfile.TemporaryDirectory() as folder:
        findings = run_jobs(Path(folder), knobs.cache.dir, architecture(), ["tune"], processes, seconds)
    return [f"{of['kernel']}, {of['job']}: {of['error']}" for of in findings if "error" in of]


class Work(NamedTuple):
    """What a launch is planned to do; programs and what follows are those of fit.Sample."""

    family: str
    tile: tuple
    programs: int
    steps: int
    floor_us: float
    added_us: float = 0.0


class TooWide(Exception):
    """A product has no registers for a tile with so many columns, and the chooser does not consider it."""


@contextlib.contextmanager
def planned_work():
    """Inside, where each family has one tile, every choice adds a Work to the list that this yields.

    This is all that `python -m bench.tune` takes from inside the chooser of tiles.py. It raises TooWide where the tile
    is not considered.
    """
    seen, time_of, split_of, no_wider = [], tiles.microseconds, tiles._best_split, tiles._no_wider

    def microseconds(family, row, tile, programs, steps, *rest):
        with mock.patch.object(tiles, "numbers", lambda *_: (0.0, 0.0)):
            floor_us = time_of(family, row, tile, programs, steps, *rest)  # what L2 takes
        seen.append(Work(family, tuple(tile), programs, steps, floor_us))
        return time_of(family, row, tile, programs, steps, *rest)

    def best_split(family, row, tile, of_one, steps, *rest):
        before = len(seen)
        us, splits = split_of(family, row, tile, of_one, steps, *rest)
        work = next(work for work in seen[before:] if work.programs == of_one * splits)
        # As in tiles.py: partial sums in float32, and the bytes that are read in any case.
        written = 4 * work.programs * tile.M * tile.N * tile.taps if splits > 1 else 0
        floor_us = max(work.floor_us, (rest[-1] + written) / tiles.MEMORY * 1e6)
        added_us = tiles.LAUNCH + written / tiles.MEMORY * 1e6 if written else 0.0
        seen[before:] = [work._replace(floor_us=floor_us, added_us=added_us)]
        return us, splits

    def not_too_wide(of_family, narrow):
        if min(tile.N for tile in of_family) > narrow:
            raise TooWide(f"more than {narrow} columns")
        return no_wider(of_family, narrow)

    with mock.patch.multiple(tiles, microseconds=microseconds, _best_split=best_split, _no_wider=not_too_wide):
        yield seen


class Card:
    """Measures tiles: `measured` is what take.take asks for.

    Args:
        device: measure.Cuda, or what stands in for it.
    """

    def __init__(self, device=None):
        self.device = device or Cuda()
        self.flushed = torch.empty(FLUSHED, dtype=torch.int8, device=self.device.torch_device)
        nothing = torch.empty(1, device=self.device.torch_device)
        # Not a part of the model, and the same for all tiles.
        self.launch_us = self.microseconds(nothing.zero_)
        self.problem = self.contestant = self.gate = None
        # The problem on which the tiles of a kind of product are compared with float64.
        self.compared_on = {}

    def microseconds(self, call):
        """The median time of a call that finds nothing in L2."""
        replay, _ = self.device.capture([call]) if self.device.capture else (call, None)
        replay()
        spans = []
        for _ in range(REPETITIONS):
            self.flushed.zero_()
            start = self.device.mark()
            replay()
            spans.append((start, self.device.mark()))
        self.device.synchronize()
        return 1e3 * statistics.median(self.device.milliseconds(*span) for span in spans)

    def measured(self, problem, tile):
        """The Sample of a tile on a problem, None if it is too wide for that.

        Raises:
            RuntimeError: the device itself has failed.
        """
        none = Sample(problem.family, problem.row, tuple(tile), problem.name)
        with precision(problem.format):
            found, error = attempt(lambda: self._measured(problem, tile, none), self.device)
        return none._replace(error=error) if error else found

    def _measured(self, problem, tile, none):
        kind = problem.family, problem.row, problem.task, len(problem.subject.result)
        compared = self.compared_on.setdefault(kind, problem.name) == problem.name
        if self.problem != problem:
            self.problem, self.contestant, self.gate = problem, problem.contestant(self.device.torch_device), None
        if compared and not self.gate:
            self.gate = problem.subject.gate(problem.format, self.device.torch_device)
        with tiles.only(problem.family, tile):
            try:
                with planned_work() as seen:
                    results = self.contestant.first(problem.task)
            except TooWide:
                return None
            works = {work for work in seen if (work.family, work.tile) == (problem.family, tuple(tile))}
            if len(works) != 1:
                return none._replace(error=f"{len(works)} kinds of launches with this tile, not one")
            if compared and (wrong := problem.complaint(self.gate, results)):
                return none._replace(error=wrong)
            us = max(LEAST_US, self.microseconds(self.contestant.steps[problem.task][0]) - self.launch_us)
        (work,) = works
        return none._replace(**work._asdict(), us=us)
