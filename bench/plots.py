"""A record as pictures: rooflines, and LeNet's time against its batch."""

import importlib.util
import math

from .case import GRAPH, HOST, INFERENCE, TRAINING

# In the order of the legend: colour, marker, and whether it is filled in the rooflines.
STYLES = {
    "tritonnet": ("#d1495b", "o", True), "TrainStep": ("#8d1f5a", "D", True), "torch": ("#2e6f95", "s", False),
    "torch.compile": ("#3a9d6e", "^", False), "FlagGems": ("#b8860b", "v", False),
}  # fmt: skip
TASKS = INFERENCE, TRAINING


def missing():
    """Why there can be no pictures, or None."""
    return None if importlib.util.find_spec("matplotlib") else "no pictures, because matplotlib is not installed"


def draw(record, folder):
    """Write the pictures of a Record into `folder`; returns their file names."""
    drawn = {"roofline": _roofline(record), "batch": _against_batch(record)}
    names = []
    for kind, figure in drawn.items():
        if figure:
            names.append(f"{record.name}-{kind}.png")
            figure.savefig(folder / names[-1], dpi=150)
    return names


def _axes(rows, columns, title):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(8.5, 1.5 + 4 * columns), 1.8 + 3.2 * rows), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey="row")
    for ax in axes.flat:
        ax.grid(True, which="major", alpha=0.3)
    return figure, axes


def _legend(figure, axes):
    """One legend below all panels, each label once; axis labels at the outer edges only."""
    handles = {}
    for ax in axes.flat:
        ax.label_outer()
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels()) if label not in handles}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _roofline(record):
    """FLOP/s against FLOPs for each byte: a panel for each format, its roof as measured."""
    best = {}  # the faster of calls and graphs, as launching may take longer than the work
    for row in record.rows:
        if row.ms and row.form != HOST:
            *work, _, library = row.key
            best[*work, library] = min(row, best.get((*work, library), row), key=lambda row: row.ms)
    rows = list(best.values())
    roofs = record.ceilings.get("flops_per_s", {})  # none on the CPU, or if the run stopped before
    formats = [format for format in roofs if any(row.format == format for row in rows)]
    if not formats:
        return None
    columns = min(2, len(formats))
    figure, axes = _axes(-(-len(formats) // columns), columns, record.title)
    bandwidth = record.ceilings["bytes_per_s"]
    intensity = [row.flops / row.bytes for row in rows]
    left, right = min(intensity) / 2, max(intensity) * 2
    for ax in list(axes.flat)[len(formats) :]:
        ax.set_axis_off()
    for ax, format in zip(axes.flat, formats):
        peak = roofs[format]
        knee = min(max(peak / bandwidth, left), right)
        roof = [min(bandwidth * x, peak) / 1e12 for x in (left, knee, right)]
        ax.loglog([left, knee, right], roof, color="black", lw=1.2, label="measured roof")
        for library, (color, marker, filled) in STYLES.items():
            points = [row for row in rows if row.format == format and row.library == library]
            if points:
                ax.plot(
                    [row.flops / row.bytes for row in points], [row.flops / row.ms / 1e9 for row in points],
                    marker, color=color, ms=5, mew=1, mfc=color if filled else "none",
                    alpha=0.8, label=library,
                )  # fmt: skip
        ax.set_title(f"{format}: {bandwidth / 1e9:.0f} GB/s, {peak / 1e12:.0f} TFLOP/s", fontsize=9)
        ax.set_xlabel("FLOPs for each compulsory byte")
        ax.set_ylabel("TFLOP/s")
    _legend(figure, axes)
    return figure


def _against_batch(record):
    """Microseconds against batch: a row for each task, a panel for each format, in the faster layout."""
    lines = {}  # {(task, format): {(library, graph): {batch: microseconds}}}
    for row in record.rows:
        if row.ms and row.task in TASKS and row.form != HOST:
            times = lines.setdefault((row.task, row.format), {}).setdefault((row.library, row.form == GRAPH), {})
            times[row.batch] = min(row.ms * 1e3, times.get(row.batch, math.inf))
    if not lines:
        return None
    tasks = [task for task in TASKS if any(task == key[0] for key in lines)]
    formats = list(dict.fromkeys(format for _, format in lines))
    figure, axes = _axes(len(tasks), len(formats), record.title)
    for (task, format), of_panel in lines.items():
        ax = axes[tasks.index(task), formats.index(format)]
        for (library, graph), times in sorted(of_panel.items(), key=lambda item: (item[0][1], _order(item[0][0]))):
            color, marker, _ = STYLES[library]
            batches = sorted(times)
            ax.loglog(
                batches, [times[batch] for batch in batches], "--" if graph else "-", color=color, marker=marker, ms=5,
                mfc="white" if graph else color, lw=1.3, label=f"{library}, {'CUDA graph' if graph else 'calls'}",
            )  # fmt: skip
        ax.set_title(f"LeNet {task}, {format}", fontsize=9)
        ticks = sorted({batch for times in of_panel.values() for batch in times})
        ax.set_xticks(ticks, map(str, ticks))
        ax.minorticks_off()
        ax.set_xlabel("batch (images)")
        ax.set_ylabel("time (us)")
    _legend(figure, axes)
    return figure


def _order(library):
    return list(STYLES).index(library)
