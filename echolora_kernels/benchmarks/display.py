"""The terminal: tables and progress by rich where it is installed, else plain text."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from .report import lines_of, remarks_of, title_of
from .run import Row


def show(rows: Sequence[Row], roofline: bool) -> None:
    """The table of one case on standard output, and what is to be said about it."""
    print(f"\n{title_of(rows[0])}")
    lines = lines_of(rows, roofline)
    if len(lines) > 1:
        _table(lines)
    for remark in remarks_of(rows):
        print(f"  {remark}")
    sys.stdout.flush()


def _table(lines: Sequence[Sequence[str]]) -> None:
    if importlib.util.find_spec("rich") is not None and sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for index, heading in enumerate(lines[0]):
            table.add_column(heading, justify="left" if index < 2 else "right")
        for line in lines[1:]:
            table.add_row(*line)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())


@contextmanager
def progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar on standard error; gives a function to call with how many cases are done, and the name of the next."""
    if importlib.util.find_spec("rich") is None or not sys.stderr.isatty():
        yield lambda done, name: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("benchmarks", total=total)
        yield lambda done, name: bar.update(task, completed=done, description=name)
