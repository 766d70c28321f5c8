"""Writes the measured results into the README:  python -m bench.results

Reads every JSON file in bench/results, each the record of a run on a GPU, and replaces what stands between the comments
<!-- results --> and <!-- /results -->.
"""

import sys
from pathlib import Path

from .case import BOTH, INFERENCE, TRAINING
from .record import OURS, Record
from .report import accuracy_table
from .table import markdown

ROOT = Path(__file__).parents[1]
START, END = "<!-- results -->", "<!-- /results -->"
NOTHING = "Nothing has been measured on a GPU yet."
# Operators are shown in one format, networks in all.
FORMAT = "bfloat16"


def records(folder):
    """The Records in `folder`, of each machine the full run if there is one."""
    found = {path.stem: Record.read(path) for path in sorted(folder.glob("*.json"))}
    return [r for name, r in found.items() if not r.quick or name.removesuffix("-quick") not in found]


def summary(record):
    """(header, rows): everyone at their best, in whichever layout, in CUDA graphs or not."""
    best = {}
    for row in record.rows:
        shown = row.task in (TRAINING, INFERENCE) or (row.task == BOTH and row.format == FORMAT)
        if row.ms and shown:
            name = "ours" if row.library in OURS else row.library
            of_case = best.setdefault((row.subject, row.task, row.batch, row.format), {})
            of_case[name] = min(row, of_case.get(name, row), key=lambda r: r.ms)
    peers = list(dict.fromkeys(name for of_case in best.values() for name in of_case if name != "ours"))
    rows = []
    for (subject, task, batch, format), of_case in best.items():
        if ours := of_case.get("ours"):
            ratios = [f"{of_case[name].ms / ours.ms:.2f}x" if name in of_case else "-" for name in peers]
            name = subject if task in subject else f"{subject}, {task}"
            share = f"{ours.floor_ms(record.ceilings) / ours.ms:.0%}"
            rows.append((name, batch, format, f"{ours.ms * 1e3:.4g}", *ratios, share))
    return ("", "batch", "format", "us", *(f"{name} takes" for name in peers), "of the floor"), rows


def section(found):
    """The text between the comments, for the Records `found`."""
    if not found:
        return NOTHING
    parts = []
    for record in found:
        parts.append(f"**{record.title}**, everyone in the faster layout and in CUDA graphs where that is faster "
                     f"([all of it](bench/results/{record.name}.md)):")  # fmt: skip
        parts.append(markdown(*summary(record)).strip())
        if record.accuracy:
            parts.append(accuracy_table(record.accuracy).strip())
    return "\n\n".join(parts)


def written(text, found):
    """The README's `text` with the results of the Records `found`.

    Raises:
        ValueError: the two comments are not both there, once and in order.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end) or START in rest or END in after:
        raise ValueError(f"the README needs {START} and {END} after it, each once")
    return f"{before}{START}\n{section(found)}\n{END}{after}"


def main(readme=ROOT / "README.md", folder=ROOT / "bench" / "results"):
    found = records(folder)
    readme.write_text(written(readme.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"{readme}: {len(found)} machines", file=sys.stderr)


if __name__ == "__main__":
    main()
