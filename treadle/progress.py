"""Progress messages on standard error during long work, only on a terminal; and notes, which are always printed.

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
from typing import TYPE_CHECKING

from treadle.runtime.distributed.rank_reports import is_launched_after_first

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

_PATIENCE = 0.5  # seconds before a message appears, so that short work does not flicker


class WorkLine:
    """The line about work in progress. If it is not shown, `describe` does nothing.

    Call it with a line to print it to standard output, above the work's own line.
    """

    def __call__(self, line: str) -> None:
        print(line, flush=True)

    def describe(self, what: str) -> None:
        """Replace the description of the work."""


class _ShownWork(WorkLine):
    """A spinner, the description and the elapsed time. It appears when the work has lasted for a while."""

    def __init__(self, what: str) -> None:
        from rich.progress import SpinnerColumn, TimeElapsedColumn

        self.progress = _progress(SpinnerColumn(), _description(), TimeElapsedColumn())
        self._task = self.progress.add_task(what, total=None)
        self._turn = threading.Lock()
        self._is_begun = self._is_over = False

    def __call__(self, line: str) -> None:
        with self._turn:
            self.progress.stop()
            super().__call__(line)
            if self._is_begun:
                self.progress.start()

    def describe(self, what: str) -> None:
        self.progress.update(self._task, description=what)

    def begin(self) -> None:
        """Show the line, unless the work is over."""
        with self._turn:
            if not self._is_over:
                self._is_begun = True
                self.progress.start()

    def end(self) -> None:
        """Remove the line."""
        with self._turn:
            self._is_over = True
            self.progress.stop()


@contextmanager
def working(what: str, *, shown: bool = True) -> Iterator[WorkLine]:
    """Show a description of the work and the elapsed time while the block runs. Quick work is not shown."""
    if not shown or not is_watched():
        yield WorkLine()
        return
    line = _ShownWork(what)
    _shown.append(line.progress)
    timer = threading.Timer(_PATIENCE, line.begin)
    timer.daemon = True
    timer.start()
    try:
        yield line
    finally:
        timer.cancel()
        _shown.remove(line.progress)
        line.end()


@contextmanager
def downloading(what: str, size: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a progress bar of downloaded bytes. Yields a function that takes the number of bytes downloaded so far."""
    if not shown or not is_watched():
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn

    columns = (
        _description(),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    progress = _progress(*columns)
    task = progress.add_task(what, total=size)
    with progress:
        yield lambda count: progress.update(task, completed=min(count, size))


@contextmanager
def counting(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a progress bar of finished items. Yields a function that takes the number of items finished so far. If
    `total` is 1, there is no bar.
    """
    if not shown or total < 2 or not is_watched():
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    columns = (
        _description(),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    progress = _progress(*columns)
    task = progress.add_task(what, total=total)
    with progress:
        yield lambda count: progress.update(task, completed=min(count, total))


def announce(line: str) -> None:
    """Show a line as `note` does, but only on a terminal."""
    if is_watched():
        note(line)


def note(line: str) -> None:
    """Show a line on standard error, above the progress message. Each line is shown once in a process, and by rank 0
    alone if `treadle launch` started several.
    """
    if line in _announced or is_launched_after_first():
        return
    _announced.add(line)
    from treadle.reporting.tables import console

    (_shown[-1].console if _shown else console(stderr=True)).print(line, soft_wrap=True)


_announced: set[str] = set()
_shown: list[Progress] = []
"""The progress messages that are shown now."""


def is_watched() -> bool:
    """Return True if standard error is a terminal, and neither TREADLE_DEBUG nor rank 0 of `treadle launch` writes to
    it.
    """
    is_debugged = os.environ.get("TREADLE_DEBUG", "") not in ("", "0")
    return sys.stderr.isatty() and not is_debugged and not is_launched_after_first()


def _description() -> ProgressColumn:
    from rich.progress import TextColumn

    return TextColumn("{task.description}", markup=False)  # a name may have brackets


def _progress(*columns: ProgressColumn) -> Progress:
    from rich.progress import Progress

    from treadle.reporting.tables import console

    # The streams are not redirected: text printed meanwhile goes to its own stream.
    return Progress(
        *columns, console=console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )
