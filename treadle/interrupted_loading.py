"""Ctrl-C while a command of Treadle is loaded: the process ends with exit code 130 and prints nothing.

`treadle/__init__.py` calls `end_on_interrupt` before it imports anything else, since its imports take most of the time
before a command starts. A Ctrl-C during them would print a traceback of imports. Other programs that import Treadle
keep their handler.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import FrameType

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells report it."""
_COMMANDS = ("treadle", "treadle.demo")  # as in `python -m treadle`


def end_on_interrupt() -> None:
    """End this process on Ctrl-C, if it is a command of Treadle and handles Ctrl-C as Python does by default."""
    try:
        if is_command(sys.argv, sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _end)
    except (AttributeError, ValueError):  # embedded Python has no arguments; other threads cannot set handlers
        return


def is_command(words: list[str], python: list[str]) -> bool:
    """Return True if a process runs `treadle` or `python -m treadle`.

    words   sys.argv, whose first word is -m while the package of a module is imported
    python  sys.orig_argv
    """
    if words[:1] == ["-m"]:
        return any(f"-m{name}" in python or ("-m", name) in pairwise(python) for name in _COMMANDS)
    return bool(words) and os.path.basename(words[0]).removesuffix(".exe").removesuffix("-script.py") == "treadle"


@contextmanager
def interruptible() -> Iterator[None]:
    """A context in which Ctrl-C raises KeyboardInterrupt, so that work can clean up. One that leaves the block, and a
    later one, end the process with 130.
    """
    is_ours = signal.getsignal(signal.SIGINT) is _end
    try:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)  # sys.exit would raise an exception inside an import, which may be caught or printed
