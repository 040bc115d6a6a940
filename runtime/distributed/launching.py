"""Launching: start several processes on one machine, each a rank, and end them together.

Each process has the variables that torchrun would set: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Ranks
detect that another rank has ended (`treadle.runtime.distributed.watching`), and end themselves. If a rank has not ended
soon after the first failure, this module kills it. If this process itself is killed, the ranks detect that, too.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from treadle.ir.errors import RankError, UsageError
from treadle.runtime.distributed.rank_reports import REPORTS
from treadle.runtime.distributed.ranks import LAUNCHER

PATIENCE = 2.5
"""Seconds that ranks have to end by themselves after a failure. A rank that hangs is killed by its own watch one second
earlier.
"""

_PAUSE = 0.02


def launch_ranks(command: Sequence[str], count: int, environment: Mapping[str, str] | None = None) -> int:
    """Run a command in `count` processes, as ranks 0 to count - 1. Return the largest exit code.

    If a signal ended a rank and other ranks reported the rank's death, standard error names the signal.

    environment  variables in addition to the variables of this process

    Raises UsageError for a count below 1, RankError if a signal has ended a rank and no other rank reported it.
    """
    if count < 1:
        raise UsageError(f"the number of ranks must be 1 or more, not {count}")
    shared = {
        **os.environ,
        **_alone_on_a_core(count),
        "PYTHONFAULTHANDLER": os.environ.get("PYTHONFAULTHANDLER", "1"),  # a crash prints its Python stack
        **(environment or {}),
        **_meeting_point(count),
        LAUNCHER: str(os.getpid()),
    }
    ranks: list[subprocess.Popen[Any]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as reports, _ended_with_us(ranks):
        for rank in range(count):
            own = {**shared, REPORTS: reports, "RANK": str(rank), "LOCAL_RANK": str(rank)}
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
    messages = [f"rank {i} was ended by {_signal_name(-code)}" for i, code in enumerate(codes) if code < 0]
    if max(codes) <= 0:
        raise RankError(messages[0], received=f"{count} ranks")
    if messages:
        print(messages[0], file=sys.stderr, flush=True)
    return max(codes)


@contextmanager
def _ended_with_us(ranks: Sequence[subprocess.Popen[Any]]) -> Iterator[None]:
    """A context that ends the ranks that are left when the block ends for any reason: it terminates them, then kills
    them. Stopped processes are ended too.
    """

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
    """Return the variables with the address at which ranks connect: a free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _alone_on_a_core(count: int) -> dict[str, str]:
    """Return variables for ranks that have only one core each: idle threads of TVM's pool sleep immediately instead of
    spinning.
    """
    name, cores = "TVM_THREAD_POOL_SPIN_COUNT", os.cpu_count() or 1
    return {name: "0"} if name not in os.environ and cores < 2 * count else {}


def _bind(process: int, rank: int, count: int) -> None:
    """Assign a rank its share of this process's cores, at least one core. Do nothing if the system does not support
    this.

    Libraries then start one thread per assigned core. More threads than cores would wait for each other.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        first = rank * len(cores) // count
        share = cores[first : max(first + 1, (rank + 1) * len(cores) // count)]
        with suppress(ProcessLookupError):  # it has already ended
            os.sched_setaffinity(process, share)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
