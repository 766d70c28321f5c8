"""Measures the tiles of matrix products on a GPU and writes them into kernels/measured_tiles.py:

    python -m bench.tune                     # in less than five minutes
    python -m bench.tune --out FILE          # writes elsewhere
    python -m bench.tune --keep FILE         # keeps times as JSON, and does not take those again that are in it

Every candidate is compiled in parallel processes, compared with float64 on one shape, and timed on all; a tile that
fails is left out. The table is written after each shape, so that Ctrl-C, SIGTERM and the time limit lose nothing. At
the end each shape has a line with the tile that is now chosen and the fastest. The exit status is 1 if a tile failed
or there was not enough time for all, and 130 after an interrupt.
"""

import argparse
import datetime
import os
import sys
import time
from pathlib import Path

import torch
import triton

from ..keep import ROOT
from ..limit import interrupted_by_sigterm
from ..table import markdown
from . import fit
from .take import Taken, take

SOURCE = ROOT / "kernels" / "measured_tiles.py"
MINUTES = 4.5
# Shares of the time: compiling takes at most this one. Seconds that are left for the last report.
COMPILING, REPORT = 0.5, 5


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="M", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=SOURCE, metavar="FILE", help="default: kernels/measured_tiles.py")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="JSON file that keeps each time")
    args = parser.parse_args(argv)
    if not args.minutes > 0:  # nor NaN
        parser.error(f"--minutes has to be more than 0, got {args.minutes:g}")
    return args


def entry_of(samples, computed, multiprocessors, card):
    """The entry of measured_tiles.py for the samples of a card."""
    return {
        "card": card, "date": str(datetime.date.today()), "triton": triton.__version__,
        "families": fit.families(samples, computed, multiprocessors),
    }  # fmt: skip


def write(path, architecture, entry):
    """Put the entry into a copy of measured_tiles.py at `path`, atomically."""
    text = (path if path.exists() else SOURCE).read_text(encoding="utf-8")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(fit.source(text, architecture, entry), encoding="utf-8")
    os.replace(part, path)


def report(samples, entry, multiprocessors, missed):
    """What was found, in Markdown: choices, those that lose, failures, and what was not measured."""
    found = fit.choices(samples, entry["families"], multiprocessors)
    lines = [
        (c.problem, c.family, _name(c.chosen), f"{c.chosen_us:.1f}", _name(c.best), f"{c.best_us:.1f}", f"{c.loss:.1%}")
        for c in found
    ]
    header = "shape", "family", "chosen", "us", "fastest", "us", "loses"
    table = markdown(header, lines) if lines else "No tile was measured.\n"
    parts = [f"Tiles on {entry['card']}, {entry['date']}, triton {entry['triton']}:\n\n{table}"]

    def add(heading, lines):
        if lines:
            parts.append(f"{heading}:\n\n" + "".join(f"- {line}\n" for line in dict.fromkeys(lines)))

    losing = [c for c in found if c.loss > fit.LOSS]
    add(
        f"Choices that lose more than {fit.LOSS:.0%}",
        [f"{c.problem}: {_name(c.chosen)} takes {c.loss:.1%} longer than {_name(c.best)}" for c in losing],
    )
    failed = [f"{s.family}, {s.row}, {_name(s.tile)}, on {s.problem}: {s.error}" for s in samples if s.error]
    add("Left out, as they failed", failed)
    add("Not measured in full, as there was no time", [problem.name for problem in missed])
    return "\n".join(parts)


def _name(tile):
    M, N, K, warps, stages, *taps = tile
    return f"{M} x {N} x {K}, {warps} warps, {stages} stages" + (f", {taps[0]} taps" if taps and taps[0] > 1 else "")


def main(argv=None):
    begun, args = time.monotonic(), parse(argv)
    if not torch.cuda.is_available():
        sys.exit("no GPU: python -m bench.tune measures tiles on one")
    with interrupted_by_sigterm():
        return on_card(args, begun)


def on_card(args, begun):
    """Measure, and write and print what was measured; returns the exit status."""
    from tritonnet.kernels import tiles

    from . import card
    from .problems import problems

    architecture, name, to_do = card.architecture(), torch.cuda.get_device_name(), problems()
    multiprocessors = tiles.card().multiprocessors

    def entry():
        def computed(family, row, tile):
            return tiles.computed(row, tiles.Tile(*tile))

        return entry_of(taken.samples, computed, multiprocessors, name)

    taken = Taken(args.keep, changed=lambda: write(args.out, architecture, entry()))
    missed, status = to_do, 0
    try:
        compiling = COMPILING * 60 * args.minutes - (time.monotonic() - begun)
        for line in card.compile_all(os.cpu_count() or 1, max(1.0, compiling)):
            print(f"not compiled: {line}", flush=True)
        measured = card.Card().measured
        missed = take(to_do, taken, measured, begun + 60 * args.minutes - REPORT)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        status = 130
    finally:
        of_card = entry()
        print(report(taken.samples, of_card, multiprocessors, missed))
        if taken.samples:
            write(args.out, architecture, of_card)
            print(f"written: {args.out}")
    return status or int(bool(missed) or any(sample.error for sample in taken.samples))


if __name__ == "__main__":
    sys.exit(main())
