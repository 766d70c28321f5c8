"""A record as tables: times, how they compare with each peer, and how close they come to what the device can do."""

from . import passes, training
from .case import BOTH, FORWARD, HOST, INFERENCE, INPUT_GRAD, PACKED, TRAINING, WEIGHT_GRAD
from .record import OK, OURS, best_of_ours, groups
from .table import markdown

TASKS = {TRAINING: "Networks, training step", INFERENCE: "Networks, inference",
         PACKED: "LeNet, inference on weights packed before", FORWARD: "Operators, forward",
         BOTH: "Operators, forward + backward", INPUT_GRAD: "Operators, input gradient alone",
         WEIGHT_GRAD: "Operators, weight gradient alone"}  # fmt: skip


def ratio(group, library):
    """How many times as long as ours a library takes, as text."""
    row, ours = group.get(library), best_of_ours(group)
    if row is None:
        return "-"
    if row.status != OK:
        return row.status
    return f"{row.ms / ours.ms:.2f}x" if row.ms and ours else "-"


def _microseconds(row):
    if row is None:
        return "-"
    return f"{row.ms * 1e3:.4g}" if row.ms else row.status


def table(record, task):
    """(header, rows) for one task: a line for each group, with our times and the ratio of every peer's to our best."""
    found = {key: group for key, group in groups(record.rows).items() if key[3] == task}
    libraries = list(dict.fromkeys(row.library for row in record.rows if row.task == task))
    ours = [name for name in libraries if name in OURS]
    peers = [name for name in libraries if name not in OURS]
    lines = []
    for (subject, batch, format, _, layout, form), group in found.items():
        lines.append((
            subject, batch, format, layout, form,
            *(_microseconds(group.get(name)) for name in ours), *(ratio(group, name) for name in peers),
            *_rates(None if form == HOST else best_of_ours(group), record.ceilings),
        ))  # fmt: skip
    header = ("case", "batch", "format", "layout", "as", *(f"{name} us" for name in ours), *peers)
    return (*header, "floor us", "of it", "GB/s", "TFLOP/s") if record.ceilings else header, lines


def _rates(row, ceilings):
    """The floor of a Row in microseconds, the share of its time, bytes/s and FLOP/s; nothing without ceilings."""
    if not ceilings:
        return ()
    if row is None:
        return ("-",) * 4
    floor, seconds = row.floor_ms(ceilings), row.ms / 1e3
    return (
        f"{floor * 1e3:.3g}", f"{floor / row.ms:.0%}", f"{row.bytes / seconds / 1e9:.4g}",
        f"{row.flops / seconds / 1e12:.3g}",
    )  # fmt: skip


PAGE = """\
# {title}

Microseconds of one call, the median over many; beside them how many times as long each peer takes on the same inputs in
the same layout. Every result was checked against float64 before it was timed.
"""
# Added to the page where there are ceilings.
RATES = """\
"calls" are launched one by one; "graph" is one call of several in a CUDA graph; "host" is the time until a call
returns, without waiting for the GPU. TrainStep's "calls" are whole calls; its "graph" replays the launches alone, with
the images already in place. Inference on weights packed before is the forward launch alone: a whole call takes longer
by the packing in a graph, and in the other forms also by the time in which the host finds the weights. The floor is the
longer of two times: the least bytes that the work needs (counted in bench/operators.py and bench/lenet.py; of larger
networks what moves between the operators of the fused network, without an update, counted in bench/traffic.py) at the
rate of a large copy, and its FLOPs at the rate of a large matrix product. Both rates were measured in this run:

{ceilings}
"""


def _ceilings(ceilings):
    rates = [(f"product in {format}, TFLOP/s", rate / 1e12) for format, rate in ceilings["flops_per_s"].items()]
    return markdown(("at most", "measured"), [("copy, GB/s", ceilings["bytes_per_s"] / 1e9), *rates])


def page(record, plots=()):
    """The whole report in Markdown; `plots` are file names of pictures."""
    parts = [PAGE.format(title=record.title)]
    if record.ceilings:
        parts.append(RATES.format(ceilings=_ceilings(record.ceilings)))
    for task, heading in TASKS.items():
        header, lines = table(record, task)
        if lines:
            parts.append(f"## {heading}\n\n{markdown(header, lines)}")
    if text := passes.in_words(record):
        parts.append(f"## The passes together\n\n{text}")
    header, lines = training.summary(record) if record.training else ((), ())
    if lines:
        parts.append(f"## Images a second, and memory\n\n{markdown(header, lines)}")
    elif lines := memory(record):
        parts.append("## Peak memory of a training step, beside its images and labels\n\n" + markdown(*lines))
    if record.overhead:
        header = "operator", "task", "torch us", "tritonnet us", "more us"
        lines = [(*r.values(), r["tritonnet_us"] - r["torch_us"]) for r in record.overhead]
        parts.append("## Calls on tiny tensors: Python and dispatch\n\n" + markdown(header, lines))
    if record.launches:
        header = "operator", "task", "torch us", "tritonnet us"
        lines = [tuple("" if value is None else value for value in r.values()) for r in record.launches]
        parts.append("## The same on the kernels, without their launches\n\n" + markdown(header, lines))
    if record.steps:
        lines = [tuple(r.values()) for r in record.steps]
        parts.append(
            "## A call of TrainStep on the host, without its launches\n\n" + markdown(("optimizer", "us"), lines)
        )
    if record.accuracy:
        parts.append("## Time to a test accuracy on MNIST\n\n" + accuracy_table(record.accuracy))
    if faults := [row for row in record.rows if row.status != OK]:
        parts.append("## Not timed\n\n" + _bullets(dict.fromkeys(map(fault, faults))))
    if notes := [row for row in record.rows if row.status == OK and row.detail]:
        parts.append("## Paths taken\n\n" + _bullets(dict.fromkeys(map(fault, notes))))
    if record.missing:
        parts.append("## Missing\n\n" + _bullets(record.missing))
    if record.left_out:
        parts.append("## Left out\n\n" + _bullets(record.left_out))
    parts += [f"![{name}]({name})\n" for name in plots]
    return "\n".join(parts)


def memory(record):
    """(header, rows) of the memory of training steps beside their inputs, or None; each library in its best layout."""
    held = {}
    for row in record.rows:
        if row.peak_bytes is not None:
            of_case = held.setdefault((row.subject, row.batch, row.format), {})
            of_case[row.library] = min(row.peak_bytes, of_case.get(row.library, row.peak_bytes))
    if not held:
        return None
    libraries = list(dict.fromkeys(name for of_case in held.values() for name in of_case))
    return (
        ("case", "batch", "format", *(f"{name} MB" for name in libraries)),
        [
            (*case, *(f"{of_case[name] / 1e6:.4g}" if name in of_case else "-" for name in libraries))
            for case, of_case in held.items()
        ],
    )


def accuracy_table(results):
    header = "step", "format", "accuracy", "epochs", "seconds of training", "reached"
    return markdown(header, [[result[name] for name in ("library", "format", "accuracy", "epochs", "seconds")]
                             + ["yes" if result["reached"] else "no"] for result in results])  # fmt: skip


def fault(row):
    """What was wrong with a row, or which path it took, in a line."""
    how = f"{row.layout}, {row.format}, batch {row.batch}, {row.form}"
    return f"{row.library}, {row.subject}, {row.task} ({how}): {row.status}: {row.detail}"


def _bullets(lines):
    return "".join(f"- {line}\n" for line in lines)
