"""Shared by all commands: reading options, reporting errors, tables and progress (with rich, if it is installed)."""

import argparse
import contextlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TextIO

HAS_RICH = importlib.util.find_spec("rich") is not None


class UserError(Exception):
    """An error that the user can fix: one line with the cause and what to do."""


class Parser(argparse.ArgumentParser):
    """argparse's parser, with errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that is an integer of at least `least`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
        if number >= 2**63:
            raise argparse.ArgumentTypeError(f"must be below 2^63, got {number}")
        return number

    return parse


def printable(text: str, file: TextIO | None = None) -> str:
    """The text as `file` (None: stdout) can show it on one line, with escapes for everything else.

    File names may contain any character, or bytes that are not UTF-8, and a terminal may only have ASCII.
    """
    text = "".join(c if c.isprintable() else _escape(c) for c in text)
    encoding = getattr(file or sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _escape(c: str) -> str:
    # Python's surrogate for a byte of a file name that its encoding does not have.
    return f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c.encode("unicode_escape").decode()


def is_terminal(file: TextIO | None) -> bool:
    """Whether `file` is a terminal; it is None if the process was started with it closed."""
    return file is not None and file.isatty()


def say(line: str, error: bool = False) -> None:
    """Print a line without buffering, to stdout, or to stderr if it is an error; nowhere if that is closed."""
    file = sys.stderr if error else sys.stdout
    if file is not None:
        print(printable(line, file), file=file, flush=True)


@contextlib.contextmanager
def patience(line: str, seconds: float = 2.0) -> Iterator[Callable[[], None]]:
    """Print the line if the wait inside the `with` block takes longer than `seconds`.

    Yields:
        there(): to be called when the wait is over; more calls do no harm, and leaving the block does the same.
    """
    timer = threading.Timer(seconds, say, [line])
    timer.daemon = True
    timer.start()
    try:
        yield timer.cancel
    finally:
        timer.cancel()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table.

    Args:
        title: the line above it.
        columns: headers of the columns; all empty for none.
        rows: cells as text.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    if HAS_RICH:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        grid = Table(title=title, title_justify="left", title_style="bold", box=box.ROUNDED, show_header=any(columns))
        for column in columns:
            grid.add_column(column, overflow="fold")
        for row in cells:
            grid.add_row(*map(Text, row))
        # A file or a pipe has no width, and lines should not be wrapped there.
        Console(width=None if is_terminal(sys.stdout) else 1000, highlight=False).print(grid)
        return
    lines = [list(columns), *cells] if any(columns) else cells
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    say(title)
    for line in lines:
        say("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


@contextlib.contextmanager
def progress(title: str, total: int, done: int, shown: bool) -> Iterator[Callable[[int, Callable[[], float]], None]]:
    """A bar with loss and images per second on stderr, if that is a terminal and `shown`.

    Args:
        title: the text before the bar.
        total, done: number of all steps, and of those already done.

    Yields:
        update(images, loss): counts one more step, of `images` images. loss is a function, which is called only a few
        times per second, as reading it waits for the GPU.
    """
    if not (shown and HAS_RICH and is_terminal(sys.stderr)):
        yield lambda images, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[rate]} images/s"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done, loss="-", rate="-")
        start = shown_at = time.perf_counter()
        seen = 0

        def update(images: int, loss: Callable[[], float]) -> None:
            nonlocal seen, shown_at
            seen += images
            bar.advance(task)
            now = time.perf_counter()
            if now - shown_at > 0.2:
                shown_at = now
                bar.update(task, loss=f"{loss():.4f}", rate=f"{seen / (now - start):,.0f}")

        yield update
