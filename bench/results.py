"""Writes the measured results into bench/README.md and README.md:  python -m bench.results

Reads every JSON file in bench/results, each the record of a run on a GPU or of the stages of --verify on one, and
replaces the text between the comments <!-- results --> and <!-- /results -->. bench/README.md gets all of it: times,
first calls, memory, what was proved there, and what was not measured. The project's README gets the times of a few
cases.
"""

import sys

from . import passes, stages, training, verify
from .case import BOTH, CALLS, FORWARD, GRAPH, HOST, INFERENCE, PACKED, TRAINING
from .keep import ROOT, read_json
from .lenet import Network
from .libraries import COMPILE
from .record import (
    INFERENCE_ENDING,
    OURS,
    PASSES_ENDING,
    QUICK_ENDING,
    TRAINING_ENDING,
    Record,
    file_name,
    same_but_date,
)
from .report import accuracy_table, memory
from .run import plan
from .table import markdown

START, END = "<!-- results -->", "<!-- /results -->"
NOTHING = "Nothing has been measured on a GPU yet."
# Operators are shown in one format, networks in all.
FORMAT = "bfloat16"
REPLAY = "its graph alone"
CONDITIONS = "each library in its faster layout, and in CUDA graphs where that is faster"
PEERS = "torch", "torch.compile"
# (case, batch) that the project's README shows, fixed here whatever their times: LeNet's training step at every batch,
# its inference at one, and the first case in operators.catalogue() of each operator other than relu and the fused ones.
# A case without a record is left out.
HEADLINES = (
    ("LeNet training step", 64), ("LeNet training step", 1024), ("LeNet training step", 65536),
    ("LeNet inference", 1024), (f"conv2d ResNet 3x3, 64, {BOTH}", 64), (f"linear 4096 x 4096 x 4096, {BOTH}", 4096),
    (f"max_pool2d ResNet 3x3 stride 2, {BOTH}", 64), (f"cross_entropy 1000 classes, {BOTH}", 8192),
)  # fmt: skip


def records(folder):
    """The Records in `folder`, one for each machine: the newest, or of two from the same day the full run.

    A run of the passes, of inference or of training is no such record; `section` adds it to that of its machine.

    Rows of a quick run that is no older replace the full run's own, if both had the same versions.
    """
    paths = [path for path in sorted(folder.glob("*.json")) if not path.stem.endswith(verify.ENDING)]
    of_machine = {}
    for record in (record for record in map(Record.read, paths) if record and not record.of_one_kind):
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
    """(header, rows): each library's best time, in either layout, in CUDA graphs or not.

    TrainStep's time is that of a whole call. Its graph alone, which like torch's graphs reads images that are already
    in place, has a row of its own. So has the forward of inference on weights packed before.
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
        name = name_of(subject, task)
        share = f"{ours.floor_ms(record.ceilings) / ours.ms:.0%}" if record.ceilings else "-"
        name = f"{name}, {way}" if way else name
        rows.append((name, batch, format, f"{ours.ms * 1e3:.4g}", *ratios, share))
    return ("", "batch", "format", "us", *(f"{name} takes" for name in peers), "of the floor"), rows


def compiled_without_graphs(record, cases=None):
    """[a line] naming the cases in which torch.compile has a time, but none in a CUDA graph of the bench or its own.

    Args:
        record: a Record.
        cases: (name, batch) of those to consider, None for all.
    """
    rows = [row for row in record.rows if row.library == "torch.compile" and row.ms]
    in_graphs = {row.key[:4] for row in rows if row.form == GRAPH or row.detail == COMPILE}
    names = [
        f"`{name_of(row.subject, row.task)}` at batch {row.batch} in {row.format} (mode {row.detail})"
        for row in rows
        if row.form == CALLS and row.key[:4] not in in_graphs
        and (cases is None or (name_of(row.subject, row.task), row.batch) in cases)
    ]  # fmt: skip
    return [f"torch.compile was timed only outside CUDA graphs: {', '.join(names)}."] if names else []


def name_of(subject, task):
    """The name of a case, with its task unless the subject names it."""
    return subject if task in subject else f"{subject}, {task}"


def unmeasured(record, state):
    """What a full run measures and this record has none of our times for, a few words each.

    Args:
        record: a Record.
        state: what the stages of --verify have kept, {} if there were none.
    """
    timed = {(row.subject, row.batch, row.format) for row in record.rows if row.ms and row.library in OURS}
    of_format, found = {}, []
    for case in plan(quick=False):
        name, batch = case.subject.name, case.subject.batch
        # Networks are measured at several batches.
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
    """The results in bench/README.md, for the Records `found` in `folder`."""
    if not found:
        return NOTHING
    parts = []
    for record in found:
        header, rows = summary(record)
        what = CONDITIONS if rows else "no times of ours"
        pages = f"[all of it](results/{record.name}.md)"
        if not record.quick and (folder / f"{record.name}{QUICK_ENDING}.json").exists():
            pages += f", [the quick run](results/{record.name}{QUICK_ENDING}.md)"
        parts.append(f"**{record.title}**, {what} ({pages}){':' if rows else '.'}")
        if rows:
            parts.append(markdown(header, rows).strip())
            parts += compiled_without_graphs(record)
        header, rows = memory(record) or ((), ())
        if rows := [row for row in rows if row[2] == FORMAT]:
            parts.append(
                f"Peak memory of a training step, beside its images and labels:\n\n{markdown(header, rows).strip()}"
            )
        parts += _inference(record, folder) + _training(record, folder) + _passes(record, folder)
        if record.accuracy:
            parts.append(accuracy_table(record.accuracy).strip())
        state = read_json(folder / f"{file_name(record.machine)}{verify.ENDING}.json")
        checked = "stages" in state and same_but_date(state["machine"], record.machine)
        checked = checked and state["sources"] == record.sources  # what was proved of other code says nothing
        parts += verify.in_words(state) if checked else []
        if lacking := unmeasured(record, state if checked else {}):
            parts.append(f"Not measured by `python -m bench`: {'; '.join(lacking)}.")
    return "\n\n".join(parts)


def _beside(record, folder, ending):
    """The Record with this ending of a record's machine and versions, or None."""
    path = folder / f"{file_name(record.machine)}{ending}.json"
    found = Record.read(path) if path.exists() else None
    return found if found and same_but_date(found.machine, record.machine) else None


def _inference(record, folder):
    """[what follows, table] of the networks timed on a record's machine with its versions, [] if there are none."""
    found = _beside(record, folder, INFERENCE_ENDING)
    header, rows = summary(found) if found else ((), ())
    pages = f"{found.machine['date']}, [all of it](results/{found.name}.md)" if found else ""
    return [f"Inference of whole networks, {CONDITIONS} ({pages}):", markdown(header, rows).strip()] if rows else []


def _training(record, folder):
    """[what follows, table] of the training steps of networks that belong to a record, [] if there are none."""
    found = _beside(record, folder, TRAINING_ENDING)
    header, rows = training.summary(found) if found else ((), ())
    pages = f"{found.machine['date']}, [all of it](results/{found.name}.md)" if found else ""
    return [f"{training.SUMMARY} ({pages}):", markdown(header, rows).strip()] if rows else []


def _passes(record, folder):
    """[what follows, table] of the passes timed on a record's machine with its versions, [] if there are none."""
    found = _beside(record, folder, PASSES_ENDING)
    if not found:
        return []
    (header, rows), _ = passes.summary(found)
    pages = f"{found.machine['date']}, [all of it, and the shapes below {passes.SLOWER}x](results/{found.name}.md)"
    return [f"{passes.SUMMARY} ({pages}):", markdown(header, rows).strip()] if rows else []


def headlines(found):
    """The results in the project's README, for the Records `found`."""
    if not found:
        return NOTHING
    parts = []
    for record in found:
        header, rows = summary(record)
        of_case = {row[:2]: dict(zip(header, row)) for row in rows if row[2] == FORMAT}
        lines = [
            (*case, FORMAT, of_case[case]["us"], *(of_case[case].get(f"{peer} takes", "-") for peer in PEERS))
            for case in HEADLINES if case in of_case
        ]  # fmt: skip
        parts.append(f"**{record.title}**, {CONDITIONS if lines else 'no times of ours'}{':' if lines else '.'}")
        if lines:
            columns = ("case", "batch", "format", "us", *(f"against {peer}" for peer in PEERS))
            parts.append(markdown(columns, lines).strip())
            parts += compiled_without_graphs(record, HEADLINES)
    parts.append(
        "Above 1x tritonnet is faster. [bench/README.md](bench/README.md) has all cases and how to measure them."
    )
    return "\n\n".join(parts)


def written(text, block):
    """A README's `text` with `block` between the comments.

    Raises:
        ValueError: the two comments are not both there, once and in order.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end) or START in rest or END in after:
        raise ValueError(f"the README needs {START} and {END} after it, each once")
    return f"{before}{START}\n{block}\n{END}{after}"


def main(root=ROOT):
    folder = root / "bench" / "results"
    found = records(folder)
    for readme, block in (
        (root / "bench" / "README.md", section(found, folder)),
        (root / "README.md", headlines(found)),
    ):
        readme.write_text(written(readme.read_text(encoding="utf-8"), block), encoding="utf-8")
        print(f"{readme}: {len(found)} machines", file=sys.stderr)


if __name__ == "__main__":
    main()
