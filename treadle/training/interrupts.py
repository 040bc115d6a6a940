"""Signals while work must not end midway: handlers that wait, and a Ctrl-C that ends a run after its current step."""

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
    """Run the handlers of signals that arrive in the block after it, in the order of arrival.

    So no handler of Python's can raise in the block: KeyboardInterrupt, or a timeout's exception. Handlers run in the
    main thread alone; in another thread nothing changes.
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
        finally:  # a handler that returned may have raised before the others ran
            _install(handlers)
        for number, frame in arrived:
            handlers[number](number, frame)


def _install(handlers: Mapping[int, _Handler]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextmanager
def noting_interrupts(message: str = "") -> Iterator[Callable[[], bool]]:
    """Record the first Ctrl-C in the block; the second one interrupts. Yields a function that returns True after the
    first.

    message  a line for standard error, the first time

    Only the main thread gets interrupts; in another one nothing changes.
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
    """Write a line below the output on a terminal. It does not use `sys.stderr`, which may be in the middle of a
    write.
    """
    with suppress(OSError):
        start = "\n" if os.isatty(_STANDARD_ERROR) else ""
        os.write(_STANDARD_ERROR, f"{start}{line}\n".encode())
