"""Where the other threads of a run begin once they have slept: on other cores than the calling one.

A virtual machine's Linux takes a core that has slept for one that the host took away, and wakes a thread beside the one
that wakes it: for some 4 ms both share a core, half of what a small model takes. So while a run after a pause goes on,
its other threads may use each core that they might use before but that one. Which of these, the system decides: others
may be at work there.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ASLEEP = 0.01
"""Seconds after which threads are taken to be asleep: cores that rested for less are found."""


def thread_numbers() -> set[int]:
    """Linux's numbers of this process's threads; none elsewhere."""
    folder = Path("/proc/self/task")
    return {int(each.name) for each in folder.iterdir()} if sys.platform == "linux" and folder.exists() else set()


class WokenThreads:
    """Threads that work for one other, which calls for them."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = tuple(numbers)
        self._rested = time.monotonic()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """While a run begins and works: if they have slept, they begin apart from the calling thread."""
        slept = bool(self.numbers) and time.monotonic() - self._rested > ASLEEP
        before = self._spread() if slept else {}
        try:
            yield
        finally:
            for number, cores in before.items():
                with suppress(OSError):
                    os.sched_setaffinity(number, cores)
            self._rested = time.monotonic()

    def _spread(self) -> dict[int, set[int]]:
        """Keep them from the calling thread's core; which each might use before, where that leaves it any."""
        found: dict[int, set[int]] = {}
        here = _core()
        for number in self.numbers:
            with suppress(OSError):  # it ended, or a sandbox forbids it
                cores = os.sched_getaffinity(number)
                if others := cores - {here}:
                    os.sched_setaffinity(number, others)
                    found[number] = cores
        return found


def _core() -> int:
    """The core that the calling thread is on."""
    return int(ctypes.CDLL(None).sched_getcpu())
