"""What is measured next, and how what was measured is kept: problem by problem, until all are done or time is up."""

import time

from ..keep import put, read_json
from .fit import Sample

# The section of a file of --keep.
SECTION = "tune"


class Taken:
    """The samples so far, also of an earlier run that kept them in the same file.

    Args:
        path: JSON file that keeps them, or None.
        changed: called after each problem.
    """

    def __init__(self, path=None, changed=lambda: None):
        self.path, self.changed = path, changed
        kept = read_json(path).get(SECTION, {}) if path else {}
        self.of_problem = {name: [Sample.of(each) for each in samples] for name, samples in kept.items()}

    @property
    def samples(self):
        return [sample for of_problem in self.of_problem.values() for sample in of_problem]

    def tiles(self, problem):
        """The tiles that need not be measured on a problem: those that were, and those that failed anywhere."""
        failed = {s.tile for s in self.samples if s.error and (s.family, s.row) == (problem.family, problem.row)}
        return failed | {sample.tile for sample in self.of_problem.get(problem.name, ())}

    def add(self, problem, sample):
        self.of_problem.setdefault(problem.name, []).append(sample)

    def keep(self, problem):
        """Keep the samples of a problem."""
        if self.path:
            put(self.path, SECTION, problem.name, [sample._asdict() for sample in self.of_problem[problem.name]])
        self.changed()


def take(problems, taken, measured, deadline, now=time.monotonic):
    """Measure every tile on every problem; returns the problems that there was no time for, wholly or in part.

    Args:
        problems: of problems.py.
        taken: Taken, which gets the samples; also if this is interrupted.
        measured: function of a problem and a tile: the Sample, with an error if the tile fails, or None if it is not
            for this problem. It raises only if nothing more can be measured; the tile then counts as failed.
        deadline: when to stop, by `now`.
    """
    missed = []
    for problem in problems:
        done = taken.tiles(problem)
        to_do = [tile for tile in problem.candidates if tuple(tile) not in done]
        before = len(taken.samples)
        try:
            while to_do and now() < deadline:
                tile = to_do.pop(0)
                try:
                    sample = measured(problem, tile)
                except Exception as error:
                    why = f"the device was lost: {type(error).__name__}: {error}"
                    taken.add(problem, Sample(problem.family, problem.row, tuple(tile), problem.name, error=why))
                    raise
                if sample:
                    taken.add(problem, sample)
        finally:
            if len(taken.samples) > before:
                taken.keep(problem)
        if to_do:
            missed.append(problem)
    return missed
