"""Ctrl-C where work should end as a whole: the first time it is noted, the second time it interrupts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_STANDARD_ERROR = 2


@contextmanager
def noting_interrupts(told: str = "") -> Iterator[Callable[[], bool]]:
    """Gives what tells whether Ctrl-C was pressed since the block began.

    told  a line for standard error, the first time

    Only the main thread is sent interrupts; in another one nothing changes.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()
        if told:
            _say(told)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _say(line: str) -> None:
    """Write a line below what a terminal shows. Not by `sys.stderr`, which may be in the middle of a write."""
    with suppress(OSError):
        start = "\n" if os.isatty(_STANDARD_ERROR) else ""
        os.write(_STANDARD_ERROR, f"{start}{line}\n".encode())
