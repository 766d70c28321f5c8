"""What all commands share: how they read options, refuse, and show tables and progress (through rich, where it is)."""

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
    """What a user can put right: one line that names the cause and says what to do."""


class Parser(argparse.ArgumentParser):
    """argparse's parser that refuses in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` on."""

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
    """The text as `file` (None: stdout) can show it on one line: what it has no letter for, as escapes.

    File names may hold any character, or bytes that are no UTF-8, and a terminal may know ASCII alone.
    """
    text = "".join(c if c.isprintable() else _escape(c) for c in text)
    encoding = getattr(file or sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _escape(c: str) -> str:
    # What Python makes of a byte of a file's name that is none of its encoding.
    return f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c.encode("unicode_escape").decode()


def is_terminal(file: TextIO | None) -> bool:
    """Whether this is a terminal; it is None in a process that was started with the file closed."""
    return file is not None and file.isatty()


def say(line: str, error: bool = False) -> None:
    """Print a line at once, also into a pipe: on stdout, or an error on stderr; nowhere if that is closed."""
    file = sys.stderr if error else sys.stdout
    if file is not None:
        print(printable(line, file), file=file, flush=True)


@contextlib.contextmanager
def patience(line: str, seconds: float = 2.0) -> Iterator[Callable[[], None]]:
    """Says the line if what is waited for inside has not come after some seconds.

    Yields:
        there(): what was waited for has come; it is called as often as one likes, and at the end.
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
        columns: heads of the columns; all empty for none.
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
        # A file or a pipe has no width, and wrapped lines help nobody there.
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
        title: what stands before the bar.
        total, done: steps in all, and steps that lie behind already.

    Yields:
        update(images, loss): one more step, of so many images; the loss is a function, called a few times a second
        alone, because to ask a GPU for it is to wait for the GPU.
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
