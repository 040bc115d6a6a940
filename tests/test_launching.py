"""Launching ranks, tested with fake processes: the environment of each process, and the time when remaining ranks are
ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from treadle.ir.errors import RankError, UsageError
from treadle.runtime.distributed import launching
from treadle.runtime.distributed.launching import launch_ranks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are ended by signals")

Plan = tuple[float, int, int | None]
"""The time when a rank ends by itself, its exit code, and its exit code after a request to end (None: it continues)."""


class _Machine:
    """A clock, and the processes that were started on it."""

    def __init__(self) -> None:
        self.now, self.plans = 0.0, dict[int, Plan]()
        self.started: list[_Process] = []
        self.events: list[str] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class _Process:
    machine = _Machine()

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.command, self.env, self.pid = command, env, 1000 + int(env["RANK"])
        self.ends, self.code, self.obeys = self.machine.plans[int(env["RANK"])]
        self.returncode: int | None = None
        self.machine.started.append(self)

    def poll(self) -> int | None:
        if self.returncode is None and self.machine.now >= self.ends:
            self.returncode = self.code
        return self.returncode

    def terminate(self) -> None:
        self.machine.events.append(f"{self.pid} is asked at {self.machine.now:.1f}")
        if self.obeys is not None:
            self.returncode = self.obeys

    def kill(self) -> None:
        self.machine.events.append(f"{self.pid} is killed at {self.machine.now:.1f}")
        self.returncode = -signal.SIGKILL

    def wait(self) -> None:
        assert self.returncode is not None, "a running process is never waited for"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Machine]:
    made = _Process.machine = _Machine()
    monkeypatch.setattr(subprocess, "Popen", _Process)
    monkeypatch.setattr(launching, "_bind", lambda process, rank, count: None)
    monkeypatch.setattr(launching, "time", SimpleNamespace(monotonic=lambda: made.now, sleep=made.sleep))
    before = signal.getsignal(signal.SIGTERM)
    yield made
    assert signal.getsignal(signal.SIGTERM) is before


def test_each_rank_is_told_its_place(machine: _Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_HERE", "1")
    monkeypatch.setenv("WORLD_SIZE", "99")
    machine.plans = dict.fromkeys(range(3), (1.0, 0, None))
    assert launch_ranks(("a", "b"), 3, {"BESIDE": "2", "FROM_HERE": "3"}) == 0
    assert [each.command for each in machine.started] == [["a", "b"]] * 3
    for rank, each in enumerate(machine.started):
        wanted = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
        wanted |= {"BESIDE": "2", "FROM_HERE": "3", "TREADLE_LAUNCHER": str(os.getpid())}
        assert wanted.items() <= each.env.items()
    (port,) = {each.env["MASTER_PORT"] for each in machine.started}
    assert int(port) > 1023
    assert machine.events == []


def test_there_is_one_rank_or_more(machine: _Machine) -> None:
    machine.plans = {0: (0.0, 0, None)}
    assert launch_ranks(["a"], 1) == 0
    with pytest.raises(UsageError, match="the number of ranks must be 1 or more, not 0"):
        launch_ranks(["a"], 0)


@pytest.mark.parametrize(
    ("plans", "code", "ended", "expected"),
    [
        ([(0.5, 3, None), (1.0, 0, None)], 3, 1.0, []),
        ([(0.5, 1, None), (1.0, 4, None), (2.0, 0, None)], 4, 2.0, []),
        ([(0.0, 1, None), (2.4, 0, None)], 1, 2.4, []),
        ([(0.0, 1, None), (2.6, 5, -signal.SIGTERM)], 1, 2.5, ["1001 is asked at 2.5"]),
        ([(9.0, 0, None), (0.0, 2, None)], 2, 2.7, ["1000 is asked at 2.5", "1000 is killed at 2.7"]),
        ([(0.5, 2, None), (0.0, -signal.SIGKILL, None), (0.5, 3, None)], 3, 0.5, ["rank 1 was ended by SIGKILL"]),
    ],
)
def test_remaining_ranks_are_stopped_after_a_failure(
    plans: list[Plan],
    code: int,
    ended: float,
    expected: list[str],
    machine: _Machine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The remaining ranks have 2.5 s to end by themselves, and another 0.2 s after a request to end. If a rank was
    ended by a signal that the launcher did not send, the report names the signal.
    """
    machine.plans = dict(enumerate(plans))
    assert launch_ranks(["a"], len(plans)) == code
    assert machine.events + capsys.readouterr().err.splitlines() == expected
    assert machine.now == pytest.approx(ended, abs=0.05)


def test_the_first_rank_that_a_signal_ended_is_told(machine: _Machine) -> None:
    machine.plans = {
        0: (9.0, 0, -signal.SIGTERM),
        1: (0.5, -signal.SIGSEGV, None),
        2: (1.0, -signal.SIGKILL, None),
        3: (0.2, 0, None),
    }
    with pytest.raises(RankError, match=r"^rank 1 was ended by SIGSEGV\n") as error:
        launch_ranks(["a"], 4)
    assert error.value.received == "4 ranks"


def test_ranks_end_with_a_launcher_that_is_asked_to(machine: _Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.plans = dict.fromkeys(range(2), (9.0, 0, -signal.SIGTERM))

    def sleep(seconds: float) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(machine, "sleep", sleep)
    monkeypatch.setattr(launching.time, "sleep", sleep)
    with pytest.raises(SystemExit) as ended:
        launch_ranks(["a"], 2)
    assert ended.value.code == 143
    assert machine.events == ["1000 is asked at 0.0", "1001 is asked at 0.0"]


@pytest.mark.parametrize(
    ("cores", "count", "expected"), [(None, 1, "0"), (3, 2, "0"), (4, 2, None), (4, 3, "0"), (1, 1, "0"), (2, 1, None)]
)
def test_idle_threads_sleep_where_a_rank_has_one_core(
    cores: int | None, count: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TVM_THREAD_POOL_SPIN_COUNT"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert launching._alone_on_a_core(count).get(name) == expected
    monkeypatch.setenv(name, "7")
    assert launching._alone_on_a_core(count) == {}


@pytest.mark.parametrize(
    ("cores", "shares"),
    [
        ({2, 3, 5, 7}, [[2, 3], [5, 7]]),
        ({2, 3, 5, 7, 8}, [[2, 3], [5, 7, 8]]),
        ({4}, [[4], [4]]),
        ({1, 4, 6}, [[1], [1], [4], [6]]),
    ],
)
def test_ranks_share_the_cores_of_the_process(
    cores: set[int], shares: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: dict[int, Any] = {}
    ask: Callable[[int], set[int]] = {0: cores}.__getitem__
    monkeypatch.setattr(os, "sched_getaffinity", ask, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", bound.__setitem__, raising=False)
    for rank in range(len(shares)):
        launching._bind(1000 + rank, rank, len(shares))
    assert bound == {1000 + rank: share for rank, share in enumerate(shares)}


def test_a_rank_that_has_ended_already_is_bound_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(process: int, cores: list[int]) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(os, "sched_setaffinity", gone, raising=False)
    launching._bind(1000, 0, 1)
