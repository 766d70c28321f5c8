"""Compiles and times tiles on a card."""

import contextlib
import statistics
import tempfile
from pathlib import Path
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


@contextlib.contextmanager
def planned_work():
    """Inside, each choice of a tile is added to the list that this yields: (family, tile, programs, steps, added_us).

    This is all that `python -m bench.tune` takes from inside the chooser of tiles.py.
    """
    seen, splitting = [], []
    time_of, split_of = tiles.microseconds, tiles._best_split

    def microseconds(family, row, tile, programs, steps):
        if not splitting:
            seen.append((family, tuple(tile), programs, steps, 0.0))
        return time_of(family, row, tile, programs, steps)

    def best_split(family, row, tile, of_one, steps):
        splitting.append(True)
        us, splits = split_of(family, row, tile, of_one, steps)
        splitting.pop()
        programs, share = of_one * splits, -(-steps // splits)
        seen.append((family, tuple(tile), programs, share, us - time_of(family, row, tile, programs, share)))
        return us, splits

    with mock.patch.multiple(tiles, microseconds=microseconds, _best_split=best_split):
        yield seen


def predicted(sample, entry):
    """The model's microseconds of a fit.Sample with the numbers of an entry of measured_tiles.py."""
    with mock.patch.dict(tiles.MEASURED, {architecture(): entry}):
        us = tiles.microseconds(sample.family, sample.row, tiles.Tile(*sample.tile), sample.programs, sample.steps)
    return us + sample.added_us


class Card:
    """Measures tiles: `measured` is what take.take asks for.

    Args:
        device: measure.Cuda, or what stands in for it.
    """

    def __init__(self, device=None):
        self.device = device or Cuda()
        self.flushed = torch.empty(FLUSHED, dtype=torch.int8, device=self.device.torch_device)
        nothing = torch.empty(1, device=self.device.torch_device)
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
        """The Sample of a tile on a problem.

        Raises:
            RuntimeError: the device itself has failed.
        """
        none = Sample(problem.family, problem.row, tuple(tile), problem.name)
        with precision(problem.format):
            found, error = attempt(lambda: self._measured(problem, tile, none), self.device)
        return found or none._replace(error=error)

    def _measured(self, problem, tile, none):
        kind = problem.family, problem.row, problem.task, len(problem.subject.result)
        compared = self.compared_on.setdefault(kind, problem.name) == problem.name
        if self.problem != problem:
            self.problem, self.contestant, self.gate = problem, problem.contestant(self.device.torch_device), None
        if compared and not self.gate:
            self.gate = problem.subject.gate(problem.format, self.device.torch_device)
        with tiles.only(problem.family, tile):
            with planned_work() as seen:
                results = self.contestant.first(problem.task)
            works = {work for work in seen if work[:2] == (problem.family, tuple(tile))}
            if len(works) != 1:
                return none._replace(error=f"{len(works)} kinds of launches with this tile, not one")
            if compared and (wrong := problem.complaint(self.gate, results)):
                return none._replace(error=wrong)
            us = self.microseconds(self.contestant.steps[problem.task][0]) - self.launch_us
        ((_, _, programs, steps, added_us),) = works
        return none._replace(programs=programs, steps=steps, added_us=added_us, us=us)
