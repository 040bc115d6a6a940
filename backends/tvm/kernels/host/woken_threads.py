"""Placement of threads that are woken for a run: on other cores than the calling thread.

In a virtual machine, Linux considers an idle core as taken away by the host, and wakes a thread on the core of the
thread that wakes it. For about 4 ms, both threads share a core, which is half of a small model's run. Therefore, during
the first run after a pause, each other thread may use any of its cores except the calling thread's. The system chooses
among them, since other processes may use some of them.
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
"""Length of a pause in seconds after which threads are assumed to sleep. After a shorter pause, Linux still uses idle
cores.
"""


def thread_numbers() -> set[int]:
    """Return Linux's ids of this process's threads; an empty set on other systems."""
    folder = Path("/proc/self/task")
    return {int(each.name) for each in folder.iterdir()} if sys.platform == "linux" and folder.exists() else set()


class WokenThreads:
    """The threads that work for one calling thread, which wakes them."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = tuple(numbers)
        self._rested = time.monotonic()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """A context for a run: threads that have slept start on other cores than the calling thread's."""
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
        """Exclude the calling thread's core for threads that may use other cores. Return the previous cores of these
        threads.
        """
        found: dict[int, set[int]] = {}
        here = _core()
        for number in self.numbers:
            with suppress(OSError):  # the thread has ended, or a sandbox forbids the call
                cores = os.sched_getaffinity(number)
                if others := cores - {here}:
                    os.sched_setaffinity(number, others)
                    found[number] = cores
        return found


def _core() -> int:
    """Return the core on which the calling thread runs."""
    return int(ctypes.CDLL(None).sched_getcpu())
