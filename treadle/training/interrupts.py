"""Signals during work that must not end midway: deferred handlers, and a Ctrl-C that ends a run after the current
step.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_STANDARD_ERROR = 2
_SIGNALS = tuple(sorted(signal.valid_signals()))
_Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def deferring_signals() -> Iterator[None]:
    """Defer signals during the block. Their handlers run after the block, in the order of arrival.

    So no Python handler can raise inside the block, such as KeyboardInterrupt or the exception of a timeout. Python
    runs handlers only in the main thread, so in any other thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, _Handler] = {
        number: handler for number in _SIGNALS if callable(handler := signal.getsignal(number))
    }
    arrived: list[tuple[int, FrameType | None]] = []
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: arrived.append((number, frame)))
        yield
    finally:
        try:
            _install(handlers)
        finally:  # if a handler raises here, the remaining handlers must still be installed
            _install(handlers)
        for number, frame in arrived:
            handlers[number](number, frame)


def _install(handlers: Mapping[int, _Handler]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextmanager
def noting_interrupts(message: str = "") -> Iterator[Callable[[], bool]]:
    """Record the first Ctrl-C in the block. The second one raises KeyboardInterrupt. Yields a function that returns
    True after the first Ctrl-C.

    message  a line printed to standard error at the first Ctrl-C

    Python raises KeyboardInterrupt only in the main thread, so in any other thread this does nothing.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()
        if message:
            _say(message)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _say(line: str) -> None:
    """Write a line to standard error, on a new line of the terminal. This does not use `sys.stderr`, which may be in
    the middle of a write.
    """
    with suppress(OSError):
        start = "\n" if os.isatty(_STANDARD_ERROR) else ""
        os.write(_STANDARD_ERROR, f"{start}{line}\n".encode())
