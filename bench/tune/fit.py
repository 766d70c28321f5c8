"""From times to the two numbers of each tile: the fit, the choices that follow from it, and the source that keeps it.

The model is that of kernels/tiles.py: a launch takes

    max(waves * (steps * step_us + fixed_us), floor_us) + added_us,    waves = ceil(programs / multiprocessors)

where floor_us, for memory, and added_us, for partial sums, do not depend on the two numbers. Nothing here needs a GPU.
"""

import ast
import json
import math
from typing import NamedTuple

# A choice that takes this much longer than the best tile is listed.
LOSS = 0.05
# A time within this of what memory takes says nothing of the tile.
NEAR_FLOOR = 0.05
# Below this determinant of a matrix whose diagonal is 1, the times do not tell a step from what is fixed.
DISTINCT = 1e-4


class Sample(NamedTuple):
    """What was measured of a tile on a problem.

    Attributes:
        family, row: where the tile is in the tables of tiles.py.
        tile: the tile as a plain tuple.
        problem: name of the problem.
        programs, steps: how many programs there are, and steps in each.
        floor_us, added_us: the model's microseconds that the programs take at least, and those after them.
        us: measured microseconds, None if it failed.
        error: why it failed.
    """

    family: str
    row: str
    tile: tuple
    problem: str
    programs: int = 0
    steps: int = 0
    floor_us: float = 0.0
    added_us: float = 0.0
    us: float | None = None
    error: str = ""

    @classmethod
    def of(cls, kept):
        """The Sample in an object of JSON, which has lists for tuples."""
        return cls(**{**kept, "tile": tuple(kept["tile"])})


def predicted(sample, numbers, multiprocessors):
    """The model's microseconds of a sample with the (step_us, fixed_us) of its tile."""
    step_us, fixed_us = numbers
    of_programs = math.ceil(sample.programs / multiprocessors) * (sample.steps * step_us + fixed_us)
    return max(of_programs, sample.floor_us) + sample.added_us


def fit(samples, computed, multiprocessors):
    """(step_us, fixed_us), neither below 0, with the least squares of the relative errors of a tile's samples.

    Args:
        samples: of one tile, each with a time.
        computed: (step_us, fixed_us) without measurements. Where all samples have the same steps, so that they do not
            tell one from the other, the result is a multiple of these.
        multiprocessors: how many programs run at once in the model.
    """
    rows = []
    telling = [s for s in samples if s.us - s.added_us > (1 + NEAR_FLOOR) * s.floor_us]
    for sample in telling or samples:
        waves = math.ceil(sample.programs / multiprocessors)
        # An error in a time that is mostly added_us counts by the whole time.
        rows.append((waves * sample.steps / sample.us, waves / sample.us, 1 - sample.added_us / sample.us))
    ss, ff, sf = (math.fsum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (1, 1), (0, 1)))
    st, ft = (math.fsum(row[i] * row[2] for row in rows) for i in (0, 1))
    determinant = ss * ff - sf * sf
    if determinant < DISTINCT * ss * ff:
        both = [computed[0] * row[0] + computed[1] * row[1] for row in rows]
        scale = math.fsum(b * row[2] for b, row in zip(both, rows)) / math.fsum(b * b for b in both)
        return tuple(max(0.0, scale) * number for number in computed)
    step, fixed = (st * ff - ft * sf) / determinant, (ft * ss - st * sf) / determinant
    if step < 0:
        return 0.0, max(0.0, ft / ff)
    if fixed < 0:
        return max(0.0, st / ss), 0.0
    return step, fixed


def families(samples, computed, multiprocessors):
    """{family: {row: {tile: (step_us, fixed_us)}}} of all tiles that have a time; None for those that ever failed.

    Args:
        samples: all of them.
        computed: function of family, row and tile: the numbers without measurements.
        multiprocessors: how many programs run at once in the model.
    """
    failed, of_tile = {(s.family, s.row, s.tile) for s in samples if s.error}, {}
    for sample in samples:
        if sample.us:
            of_tile.setdefault((sample.family, sample.row, sample.tile), []).append(sample)
    found = {}
    for (family, row, tile), timed in of_tile.items():
        if (family, row, tile) not in failed:
            numbers = fit(timed, computed(family, row, tile), multiprocessors)
            found.setdefault(family, {}).setdefault(row, {})[tile] = numbers
    for family, row, tile in sorted(failed):
        found.setdefault(family, {}).setdefault(row, {})[tile] = None
    return found


class Choice(NamedTuple):
    """The tile that the model chooses for a problem, and the fastest, each with its measured microseconds."""

    problem: str
    family: str
    chosen: tuple
    chosen_us: float
    best: tuple
    best_us: float

    @property
    def loss(self):
        return self.chosen_us / self.best_us - 1


def choices(samples, found, multiprocessors):
    """The Choice of each problem, of the tiles that have numbers, and a time there.

    The model decides between launches as they were measured: with the numbers that were found, another count of
    programs may come to share a sum.

    Args:
        samples: all of them.
        found: what `families` returns.
        multiprocessors: how many programs run at once in the model.
    """

    def time(sample):
        return predicted(sample, found[sample.family][sample.row][sample.tile], multiprocessors)

    of_problem = {}
    for sample in samples:
        if sample.us and found.get(sample.family, {}).get(sample.row, {}).get(sample.tile):
            of_problem.setdefault((sample.problem, sample.family), []).append(sample)
    made = []
    for (problem, family), timed in of_problem.items():
        chosen, best = min(timed, key=time), min(timed, key=lambda sample: sample.us)
        made.append(Choice(problem, family, chosen.tile, chosen.us, best.tile, best.us))
    return made


def merged(old, new):
    """The entry of an architecture: `new`, and what only `old` has of the same card and version of Triton."""
    if any(old.get(name) != new[name] for name in ("card", "triton")):
        return new
    both = {family: {row: dict(of_row) for row, of_row in rows.items()} for family, rows in old["families"].items()}
    for family, rows in new["families"].items():
        for row, of_row in rows.items():
            both.setdefault(family, {}).setdefault(row, {}).update(of_row)
    return {**new, "families": both}


def source(text, architecture, entry):
    """The text of measured_tiles.py with the entry of an architecture; other architectures and comments stay.

    Raises:
        ValueError: the text does not end with the assignment of a literal to MEASURED.
    """
    module = ast.parse(text)
    last = module.body[-1] if module.body else None
    if not isinstance(last, (ast.AnnAssign, ast.Assign)) or "MEASURED" not in ast.unparse(last).partition(" = ")[0]:
        raise ValueError("measured_tiles.py has to end with MEASURED = {...}")
    measured = ast.literal_eval(last.value)
    measured[architecture] = merged(measured.get(architecture, {}), entry)
    before = "".join(text.splitlines(keepends=True)[: last.lineno - 1])
    return f"{before}MEASURED: dict = {_literal(measured)}\n"


def _literal(value, indent=0):
    """Python's text of nested dicts as `ruff format` has it, one entry a line; numbers have four digits."""
    if not isinstance(value, dict):
        return _plain(value)
    if not value:
        return "{}"
    space = " " * (indent + 4)
    lines = [f"{space}{_plain(key)}: {_literal(of_key, indent + 4)},\n" for key, of_key in value.items()]
    return "{\n" + "".join(lines) + " " * indent + "}"


def _plain(value):
    if isinstance(value, tuple):
        return f"({', '.join(map(_plain, value))})"
    if isinstance(value, float):
        return repr(float(f"{value:.4g}"))
    return json.dumps(value) if isinstance(value, str) else repr(value)
