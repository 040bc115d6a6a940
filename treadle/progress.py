"""Progress messages on standard error during long work. If standard error is not a terminal, nothing is printed.

    with working("compiling gpt2"):
        made = treadle.compile("gpt2")

Messages are erased when the work ends, so that only results remain on the terminal.
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

_PATIENCE = 0.5  # seconds before a message appears, so that short work does not flicker


@contextmanager
def working(what: str, *, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Show a description of the work and the elapsed time while the block runs. Quick work is not shown.

    Yields a function that prints a line to standard output meanwhile, above the progress line.
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
    """Show a progress bar of downloaded bytes. Yields a function that takes the number of bytes downloaded so far."""
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
    """Show a progress bar of finished items. Yields a function that takes the number of items finished so far. If
    `total` is 1, there is no bar.
    """
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
    """Return True if standard error is a terminal, and TREADLE_DEBUG does not write to it."""
    return sys.stderr.isatty() and os.environ.get("TREADLE_DEBUG", "") in ("", "0")


def _progress(*columns: ProgressColumn) -> Progress:
    from rich.progress import Progress

    from treadle.reporting.tables import console

    # The streams are not redirected: text printed meanwhile goes to its own stream.
    return Progress(
        *columns, console=console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )
