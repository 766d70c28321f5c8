"""The results of a training as pictures: curves, confusion matrix, worst mistakes, first filters, and an overview."""

import io
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from ..data import MEAN, STD
from . import checkpoint

TRAIN, MEANS, TEST, GRID = "#9bb7d4", "#2b5c8a", "#c8472b", "#d9d9d9"


def draw(
    out: Path, metrics: dict[str, Any], images: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor,
    filters: torch.Tensor,
) -> list[str]:  # fmt: skip
    """Write the pictures into `out` and return their names.

    Args:
        metrics: the content of metrics.json.
        images, labels, logits: of the test set, (N, 1, 32, 32), (N,) and (N, classes).
        filters: weight of conv1, (OC, 1, KH, KW).
    """
    confusion = torch.tensor(metrics["confusion"])
    figures = {name: Figure(figsize=size, layout="constrained", dpi=110) for name, size in SIZES.items()}
    curves(figures["curves.png"], metrics["losses"], metrics["epochs"])
    confusion_matrix(figures["confusion.png"], confusion)
    worst_mistakes(figures["mistakes.png"], images, labels, logits, rows=4, columns=6)
    first_filters(figures["filters.png"], filters)
    whole = figures["overview.png"]
    accuracy = f"{metrics['test_accuracy']:.2%} of {len(labels):,} test digits right"
    whole.suptitle(f"LeNet, {accuracy}", fontsize=15, weight="bold")
    top, bottom = whole.subfigures(2, 1, height_ratios=(1, 1.15), hspace=0.04)  # type: ignore[misc]
    left, right = bottom.subfigures(1, 2, width_ratios=(1, 1.25), wspace=0.03)
    curves(top, metrics["losses"], metrics["epochs"])
    confusion_matrix(left, confusion)
    mistakes, conv1 = right.subfigures(2, 1, height_ratios=(2.3, 1))
    worst_mistakes(mistakes, images, labels, logits, rows=2, columns=6)
    first_filters(conv1, filters)
    for name, figure in figures.items():
        content = io.BytesIO()
        figure.savefig(content, format="png")
        checkpoint.write(out / name, content.getvalue())
    return list(figures)


SIZES = {
    "overview.png": (12, 9.5), "curves.png": (10, 4), "confusion.png": (6.2, 5.8), "mistakes.png": (9, 7.2),
    "filters.png": (8, 2),
}  # fmt: skip


def curves(figure: Figure | SubFigure, losses: list[float], epochs: list[dict[str, Any]]) -> None:
    """Training loss of every batch, test loss and test accuracy, over the epochs."""
    loss, accuracy = figure.subplots(1, 2)
    ends = [epoch["epoch"] for epoch in epochs]
    dots = dict(marker="o", ms=4, clip_on=False)
    steps = [(i + 1) * len(ends) / len(losses) for i in range(len(losses))]
    loss.plot(steps, losses, color=TRAIN, lw=0.8, label="train, each batch")
    # The mean over an epoch is drawn at its middle.
    means = [epoch["train_loss"] for epoch in epochs]
    loss.plot([end - 0.5 for end in ends], means, color=MEANS, label="train, mean of the epoch", **dots)
    loss.plot(ends, [epoch["test_loss"] for epoch in epochs], color=TEST, label="test", **dots)
    loss.set(title="Loss", xlabel="epoch", ylabel="cross entropy", yscale="log", xlim=(0, ends[-1]))
    loss.legend(frameon=False)
    percent = [100 * epoch["test_accuracy"] for epoch in epochs]
    accuracy.plot(ends, percent, color=TEST, **dots)
    accuracy.annotate(
        f"{percent[-1]:.2f} %", (ends[-1], percent[-1]), (-6, -16), textcoords="offset points", ha="right", color=TEST
    )
    accuracy.set(title="Accuracy on the test digits", xlabel="epoch", ylabel="% right", xlim=(0, ends[-1]))
    accuracy.set_ylim(top=min(accuracy.get_ylim()[1], 100.5))
    for axes in (loss, accuracy):
        axes.grid(color=GRID, lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def confusion_matrix(figure: Figure | SubFigure, confusion: torch.Tensor) -> None:
    """How often each digit (row) was read as each digit (column); only mistakes are coloured."""
    axes = figure.subplots()
    classes = range(len(confusion))
    mistakes = confusion.clone().fill_diagonal_(0)
    axes.imshow(mistakes.numpy(), cmap="Reds", vmin=0, vmax=max(1, 1.6 * mistakes.max().item()))
    for row in classes:
        for column in classes:
            count = int(confusion[row, column])
            if count:
                weight = "bold" if row == column else "normal"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=9, weight=weight)
    axes.set(title="Confusion matrix", xlabel="read as", ylabel="is", xticks=classes, yticks=classes)
    axes.tick_params(length=0)
    axes.set_xticks([i - 0.5 for i in classes], minor=True)
    axes.set_yticks([i - 0.5 for i in classes], minor=True)
    axes.grid(which="minor", color="white", lw=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_color(GRID)


def worst_mistakes(
    figure: Figure | SubFigure, images: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor, rows: int,
    columns: int,
) -> None:  # fmt: skip
    """The digits that were read wrong with the most confidence."""
    sure, read = logits.softmax(1).max(1)
    wrong = (read != labels).nonzero().flatten()
    worst = wrong[sure[wrong].argsort(descending=True, stable=True)][: rows * columns].tolist()
    figure.suptitle(f"The worst of {len(wrong)} mistakes" if worst else "No mistakes", fontsize=12)
    for index, axes in enumerate(figure.subplots(rows, columns).flat):
        axes.axis("off")
        if index < len(worst):
            i = worst[index]
            axes.imshow((images[i, 0, 2:-2, 2:-2] * STD + MEAN).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(f"is {labels[i]}, read {read[i]}\n{100 * sure[i]:.0f} % sure", fontsize=8.5)


def first_filters(figure: Figure | SubFigure, filters: torch.Tensor) -> None:
    """The filters of conv1 on one scale, red for weights above zero and blue for those below."""
    figure.suptitle(f"The {len(filters)} filters of conv1", fontsize=12)
    largest = filters.abs().max().item()
    row = figure.subplots(1, len(filters))
    for axes, weight in zip(row, filters[:, 0].numpy()):
        shown = axes.imshow(weight, cmap="RdBu_r", vmin=-largest, vmax=largest)
        axes.set(xticks=(), yticks=())
        axes.spines[:].set_color(GRID)
    figure.colorbar(shown, ax=row, shrink=0.7)
