"""Writes the measured results into the README:  python -m bench.results

Reads every JSON file in bench/results, each the record of a run on a GPU or of the stages of --verify on one, and
replaces what stands between the comments <!-- results --> and <!-- /results -->: times, first calls, memory, what was
proved there, and what was not measured.
"""

import sys

from . import stages, verify
from .case import BOTH, FORWARD, GRAPH, HOST, INFERENCE, PACKED, TRAINING
from .keep import ROOT, read_json
from .lenet import Network
from .record import OURS, QUICK_ENDING, Record, file_name, same_but_date
from .report import accuracy_table, memory
from .run import plan
from .table import markdown

START, END = "<!-- results -->", "<!-- /results -->"
NOTHING = "Nothing has been measured on a GPU yet."
# Operators are shown in one format, networks in all.
FORMAT = "bfloat16"
REPLAY = "its graph alone"


def records(folder):
    """The Records in `folder`, one of each machine: the newest, which of two from one day is the full run.

    Rows of a quick run that is no older stand in the place of the full run's own, if both had the same versions.
    """
    paths = [path for path in sorted(folder.glob("*.json")) if not path.stem.endswith(verify.ENDING)]
    of_machine = {}
    for record in filter(None, map(Record.read, paths)):
        of_machine.setdefault(file_name(record.machine), []).append(record)
    return [_one_of(runs) for runs in of_machine.values()]


def _one_of(runs):
    newest = max(runs, key=lambda record: (record.machine["date"], not record.quick))
    full, quick = (next((run for run in runs if run.quick is kind), None) for kind in (False, True))
    if not full or not quick or not same_but_date(full.machine, quick.machine):
        return newest
    if quick.machine["date"] >= full.machine["date"]:
        again = {row.key for row in quick.rows}
        full.rows = quick.rows + [row for row in full.rows if row.key not in again]
        full.sources = quick.sources
    return full


def summary(record):
    """(header, rows): everyone at their best, in whichever layout, in CUDA graphs or not.

    Of TrainStep that is the whole of its call; its graph alone, which reads its images where they lie as torch's graphs
    do, has a row of its own. So has the forward of inference on weights that were packed before.
    """
    best = {}
    for row in record.rows:
        shown = row.task in (TRAINING, INFERENCE, PACKED) or (row.task == BOTH and row.format == FORMAT)
        if not row.ms or not shown or row.form == HOST:
            continue
        whole_in_graph = row.library == "TrainStep" and row.form == GRAPH
        name = "ours" if row.library in OURS else row.library
        ways = [REPLAY] if whole_in_graph else ["", REPLAY] if row.form == GRAPH and name != "ours" else [""]
        for way in ways:
            of_case = best.setdefault((row.subject, row.task, row.batch, row.format, way), {})
            of_case[name] = min(row, of_case.get(name, row), key=lambda r: r.ms)
    best = {case: of_case for case, of_case in best.items() if "ours" in of_case}
    peers = list(dict.fromkeys(name for of_case in best.values() for name in of_case if name != "ours"))
    rows = []
    for (subject, task, batch, format, way), of_case in best.items():
        ours = of_case["ours"]
        ratios = [f"{of_case[name].ms / ours.ms:.2f}x" if name in of_case else "-" for name in peers]
        name = subject if task in subject else f"{subject}, {task}"
        share = f"{ours.floor_ms(record.ceilings) / ours.ms:.0%}" if record.ceilings else "-"
        name = f"{name}, {way}" if way else name
        rows.append((name, batch, format, f"{ours.ms * 1e3:.4g}", *ratios, share))
    return ("", "batch", "format", "us", *(f"{name} takes" for name in peers), "of the floor"), rows


def unmeasured(record, state):
    """What a full run measures and this record has no time of ours for, a few words each.

    Args:
        record: a Record.
        state: what the stages of --verify have kept, {} if there were none.
    """
    timed = {(row.subject, row.batch, row.format) for row in record.rows if row.ms and row.library in OURS}
    of_format, found = {}, []
    for case in plan(quick=False):
        name, batch = case.subject.name, case.subject.batch
        # The networks are there at several batches.
        shown = f"{name} at batch {batch}" if isinstance(case.subject, Network) else name
        of_format.setdefault(case.format, {})[shown] = (name, batch, case.format) in timed
    for format, names in of_format.items():
        lacking = [name for name, there in names.items() if not there]
        if len(lacking) == len(names):
            found.append(f"anything in {format}")
        elif lacking:
            found.append(f"in {format} " + ", ".join(f"`{name}`" for name in lacking))
    if not any(row.ms and row.library == "torch.compile" for row in record.rows):
        found.append("torch.compile")
    if not any(row.form == GRAPH and row.task in (FORWARD, BOTH) and row.ms for row in record.rows):
        found.append("operators in CUDA graphs")
    if not any(row.form == HOST for row in record.rows):
        found.append("the host's time of a call")
    if not any(row.peak_bytes for row in record.rows):
        found.append("memory")
    if not state.get("start"):
        found.append("the wait for a first step and a first image")
    lacking = [name for name in ("smoke", "tests") if not state.get(name)]
    lacking += [tool for tool in stages.SANITIZERS if tool not in state.get("stages", {})]
    return found + ([f"{', '.join(lacking)} by --verify"] if lacking else [])


def section(found, folder):
    """The text between the comments, for the Records `found` in `folder`."""
    if not found:
        return NOTHING
    parts = []
    for record in found:
        header, rows = summary(record)
        what = "everyone in the faster layout and in CUDA graphs where that is faster" if rows else "no times of ours"
        pages = f"[all of it](bench/results/{record.name}.md)"
        if not record.quick and (folder / f"{record.name}{QUICK_ENDING}.json").exists():
            pages += f", [the quick run](bench/results/{record.name}{QUICK_ENDING}.md)"
        parts.append(f"**{record.title}**, {what} ({pages}){':' if rows else '.'}")
        if rows:
            parts.append(markdown(header, rows).strip())
        header, rows = memory(record) or ((), ())
        if rows := [row for row in rows if row[2] == FORMAT]:
            parts.append(
                f"Peak memory of a training step, beside its images and labels:\n\n{markdown(header, rows).strip()}"
            )
        if record.accuracy:
            parts.append(accuracy_table(record.accuracy).strip())
        state = read_json(folder / f"{file_name(record.machine)}{verify.ENDING}.json")
        checked = "stages" in state and same_but_date(state["machine"], record.machine)
        checked = checked and state["sources"] == record.sources  # what was proved of other code says nothing
        parts += verify.in_words(state) if checked else []
        if lacking := unmeasured(record, state if checked else {}):
            parts.append(f"Not measured: {'; '.join(lacking)}.")
    return "\n\n".join(parts)


def written(text, found, folder):
    """The README's `text` with the results of the Records `found` in `folder`.

    Raises:
        ValueError: the two comments are not both there, once and in order.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end) or START in rest or END in after:
        raise ValueError(f"the README needs {START} and {END} after it, each once")
    return f"{before}{START}\n{section(found, folder)}\n{END}{after}"


def main(readme=ROOT / "README.md", folder=ROOT / "bench" / "results"):
    found = records(folder)
    readme.write_text(written(readme.read_text(encoding="utf-8"), found, folder), encoding="utf-8")
    print(f"{readme}: {len(found)} machines", file=sys.stderr)


if __name__ == "__main__":
    main()
