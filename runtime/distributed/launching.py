"""Launching: so many processes of one machine, each a rank, which end together.

Each process has what torchrun would give it: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Ranks notice each
other's end by themselves (`treadle.runtime.distributed.watching`); whoever has not ended soon after the first that
failed is ended here. Should this process itself be killed, they notice that, too.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from treadle.ir.errors import RankError, UsageError
from treadle.runtime.distributed.ranks import LAUNCHER

PATIENCE = 2.5
"""Seconds that ranks have to end by themselves, once one has failed: a second more than they need where they hang."""

_PAUSE = 0.02


def launch_ranks(command: Sequence[str], count: int, environment: Mapping[str, str] | None = None) -> int:
    """Run a command so many times at once, as ranks 0 and on; the greatest of their exit codes.

    Where others have told that a rank died, standard error says which signal ended it.

    environment  variables beside those of this process

    Raises UsageError for a count below 1, RankError where a signal has ended a rank and no other told of it.
    """
    if count < 1:
        raise UsageError(f"there is 1 rank or more, not {count}")
    shared = {
        **os.environ,
        **_alone_on_a_core(count),
        "PYTHONFAULTHANDLER": os.environ.get("PYTHONFAULTHANDLER", "1"),  # a crash says where
        **(environment or {}),
        **_meeting_point(count),
        LAUNCHER: str(os.getpid()),
    }
    ranks: list[subprocess.Popen[Any]] = []
    with _ended_with_us(ranks):
        for rank in range(count):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(list(command), env=own))
            _bind(ranks[-1].pid, rank, count)
        while all(code in (None, 0) for code in (rank.poll() for rank in ranks)):
            if all(rank.returncode == 0 for rank in ranks):
                return 0
            time.sleep(_PAUSE)
        until = time.monotonic() + PATIENCE
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < until:
            time.sleep(_PAUSE)
        codes = [rank.returncode or 0 for rank in ranks]
    told = [f"rank {i} was ended by {_signal_name(-code)}" for i, code in enumerate(codes) if code < 0]
    if max(codes) <= 0:
        raise RankError(told[0], received=f"{count} ranks")
    if told:
        print(told[0], file=sys.stderr, flush=True)
    return max(codes)


@contextmanager
def _ended_with_us(ranks: Sequence[subprocess.Popen[Any]]) -> Iterator[None]:
    """Ranks that are left at the end, by whatever way it comes, are asked to end, then killed; a stopped one, too."""

    def asked(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, asked)
    try:
        yield
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.terminate()
        until = time.monotonic() + _PAUSE * 10
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < until:
            time.sleep(_PAUSE)
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
        for rank in ranks:
            rank.wait()
        signal.signal(signal.SIGTERM, before)


def _meeting_point(count: int) -> dict[str, str]:
    """Where the ranks meet: a port of this machine that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _alone_on_a_core(count: int) -> dict[str, str]:
    """Where a rank has one core: idle threads of TVM's pool sleep at once."""
    name, cores = "TVM_THREAD_POOL_SPIN_COUNT", os.cpu_count() or 1
    return {name: "0"} if name not in os.environ and cores < 2 * count else {}


def _bind(process: int, rank: int, count: int) -> None:
    """Give a rank its share of the cores that this process may use, one at least, where the system does so.

    Libraries then take as many threads as there are cores in it. More threads than cores would wait for each other.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        first = rank * len(cores) // count
        share = cores[first : max(first + 1, (rank + 1) * len(cores) // count)]
        with suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(process, share)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
