"""How far long work has come: a bar on standard error, where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minigpt.data.formats import watch_reads
from minigpt.terminal import printable

_bars: list[Callable[[float, float], None]] = []  # sets the bar that is shown; at most one


@contextmanager
def shown(what: str, printing: bool = False) -> Iterator[None]:
    """Show a bar while the work inside lasts, and leave no trace of it.

    Reading data files moves it by itself; other work calls `report`.

    Args:
        what: the work, in words.
        printing: whether the work prints as it goes; on a terminal that is progress enough.
    """
    if _bars or not sys.stderr.isatty() or (printing and sys.stdout.isatty()):
        yield
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # what is printed meanwhile may go into a file
        redirect_stderr=False,
    ) as bar:
        task = bar.add_task(printable(what), total=None)
        _bars.append(lambda done, total: bar.update(task, completed=done, total=total))
        try:
            with watch_reads(report):
                yield
        finally:
            _bars.pop()


def report(done: float, total: float) -> None:
    """Show how much of the work is done; nothing happens where no bar is shown."""
    if _bars:
        _bars[-1](done, total)
