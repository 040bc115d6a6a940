"""Progress on standard error while work lasts. Nothing of it where standard error is no terminal.

    with working("compiling gpt2"):
        made = treadle.compile("gpt2")

What is shown is taken away when the work ends, so that a terminal keeps results alone.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

_PATIENCE = 0.5  # seconds that work may last unseen: a line that flickers tells nothing


@contextmanager
def working(what: str, *, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Say what is being done, and for how long, while the block runs; quick work is not told.

    Gives what prints a line to standard output meanwhile: what is shown makes way for it.
    """
    if not shown or not _is_watched():
        yield partial(print, flush=True)
        return
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    progress = _progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    progress.add_task(what, total=None)
    turn, is_begun, is_over = threading.Lock(), threading.Event(), threading.Event()

    def begin() -> None:
        with turn:
            if not is_over.is_set():
                is_begun.set()
                progress.start()

    def tell(line: str) -> None:
        with turn:
            progress.stop()
            print(line, flush=True)
            if is_begun.is_set():
                progress.start()

    timer = threading.Timer(_PATIENCE, begin)
    timer.daemon = True
    timer.start()
    try:
        yield tell
    finally:
        timer.cancel()
        with turn:
            is_over.set()
            progress.stop()


@contextmanager
def downloading(what: str, size: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar of what was downloaded; gives what to call with the number of bytes that are there."""
    if not shown or not _is_watched():
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn(), TimeRemainingColumn()
    progress = _progress(*columns)
    task = progress.add_task(what, total=size)
    with progress:
        yield lambda count: progress.update(task, completed=min(count, size))


@contextmanager
def counting(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar of how many of some things are done; gives what to call with their number. A single one has none."""
    if not shown or total < 2 or not _is_watched():
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn()
    progress = _progress(*columns)
    task = progress.add_task(what, total=total)
    with progress:
        yield lambda count: progress.update(task, completed=min(count, total))


def _is_watched() -> bool:
    """Whether someone sees standard error, and TREADLE_DEBUG writes nothing else to it meanwhile."""
    return sys.stderr.isatty() and os.environ.get("TREADLE_DEBUG", "") in ("", "0")


def _progress(*columns: ProgressColumn) -> Progress:
    from rich.progress import Progress

    from treadle.reporting.tables import console

    # The streams stay as they are: what is printed meanwhile goes where it is sent.
    return Progress(
        *columns, console=console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )
