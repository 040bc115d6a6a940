"""This process as one of several ranks, without the other ranks: joining, starting and leaving, with and without
errors.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch.distributed as dist

from treadle.ir.errors import RankError, UsageError
from treadle.ir.placement.mesh import Mesh
from treadle.runtime.distributed import ranks
from treadle.runtime.distributed.ranks import Ranks, join, refuse_other_mesh

PLACE = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "far", "MASTER_PORT": "7"}


class _Watch:
    """A watch that records its calls; `tells` is True if this rank prints messages to the user."""

    def __init__(self, tells: bool = True) -> None:
        self.tells, self.calls = tells, list[Any]()
        self.missing = [[1, 2], [2], list[int]()]

    @contextmanager
    def waiting(self, activity: str) -> Iterator[None]:
        self.calls.append(activity)
        yield

    def doing(self, activity: str) -> None:
        self.calls.append(activity)

    def explained(self, error: Exception, activity: str) -> Exception:
        return RankError(activity, received=str(error))

    def settle(self, what: str, received: str = "") -> bool:
        self.calls.append((what, received))
        return self.tells

    def check(self) -> None:
        self.calls.append("check")

    def leave(self) -> None:
        self.calls.append("leave")

    def close(self) -> None:
        self.calls.append("close")

    def listen(self, host: str) -> str:
        self.calls.append(f"listen at {host!r}")
        return "5 t"

    def connect(self, host: str, port_and_token: str) -> None:
        self.calls.append(f"connect to {host} by {port_and_token}")

    def absent(self) -> list[int]:
        return self.missing.pop(0)


class _Store(dict[str, Any]):
    """A store in which a key is found at the second lookup."""

    def __init__(self, **held: Any) -> None:
        super().__init__(held)
        self.looked = list[str]()

    def set(self, key: str, text: str) -> None:
        self[key] = text.encode()

    def check(self, keys: list[str]) -> bool:
        self.looked += keys
        return self.looked.count(keys[0]) > 1


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace functions of torch.distributed; return the list of recorded calls."""
    made: list[Any] = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: made.append((backend, how)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: made.append("destroy"))
    monkeypatch.setattr(ranks, "Communicator", lambda *given: given)
    return made


def made(watch: _Watch, **held: Any) -> Any:
    return Ranks(1, 3, 5.0, watch, _Store(**held))  # type: ignore[arg-type]


def test_torch_is_started_once_and_waits_longer_than_the_watch(calls: list[Any]) -> None:
    watch, plan = _Watch(), SimpleNamespace(devices=Mesh.of("tp=3"))
    own = made(watch)
    for _ in range(2):
        given = own.start(plan)
        assert (given[0], given[1], str(given[2]), given[3]) == (plan, 1, "cpu", 35.0)
        assert given[4:] == (watch.waiting, watch.explained)
    ((backend, how),) = calls
    assert how.pop("timeout").total_seconds() == 35.0
    assert (backend, how) == ("gloo", {"store": own.store, "rank": 1, "world_size": 3, "device_id": None})
    assert watch.calls == ["starting gloo"] * 2
    own.leave()
    own.leave()
    assert calls[1:] == ["destroy"], "once"
    own.start(plan)
    own.close()
    own.leave()
    assert "destroy" not in calls[2:], "it would block on the others"


def test_a_start_that_fails_is_explained(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **how: Any) -> None:
        raise RuntimeError("no route")

    monkeypatch.setattr(dist, "init_process_group", fails)
    with pytest.raises(RankError, match="starting gloo") as error:
        made(_Watch()).start(SimpleNamespace(devices=Mesh.of("tp=3")))
    assert error.value.received == "no route"


def test_a_mesh_of_other_ranks_is_refused() -> None:
    plan: Any = SimpleNamespace(devices=Mesh.of("tp=4"))
    refuse_other_mesh(plan, 4)
    with pytest.raises(UsageError, match="the mesh tp=4 has 4 ranks, and 3 processes were started") as error:
        refuse_other_mesh(plan, 3)
    assert error.value.hint == "-n 4, or a mesh of 3"


def test_facts_are_compared_as_soon_as_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(ranks, "time", SimpleNamespace(sleep=pauses.append))
    for rank in range(2):
        watch = _Watch()
        own = made(watch)
        own.rank = rank
        for number in (1, 2):
            for other in range(3):
                own.store.set(f"treadle/facts/{number}/{other}", '{"plan": "a", "version": "1"}')
                own.store.set(f"treadle/facts/{number}/{other}/read", "")
            own.agree({"plan": "a", "version": "1"})
        assert watch.calls == [*(["comparing plan, version"] + ["check"] * (3 if rank else 6)) * 2]
        looked = sorted(set(own.store.looked))
        reads = [f"treadle/facts/{n}/{other}{end}" for n in (1, 2) for other in range(3) for end in ("", "/read")]
        assert looked == (reads if rank == 0 else reads[::2])
    assert len(pauses) == 12 + 6


def test_a_store_that_ends_is_explained() -> None:
    def ends(keys: list[str]) -> bool:
        raise RuntimeError("closed")

    own = made(_Watch())
    own.store.check = ends
    with pytest.raises(RankError, match="comparing facts between ranks") as error:
        own.agree({"plan": "a"})
    assert error.value.received == "closed"


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("received", ["no space", None])
def test_an_error_of_ours_is_told_by_one_rank(tells: bool, received: str | None) -> None:
    watch, error = _Watch(tells), UsageError("disk", received=received)
    with pytest.raises(UsageError) as caught, made(watch):
        raise error
    assert caught.value.is_reported is not tells
    assert watch.calls == [("rank 1 has failed: disk", received or ""), "close"]


def test_another_error_is_told_and_all_is_well_otherwise() -> None:
    watch = _Watch()
    with pytest.raises(ZeroDivisionError), made(watch):
        _ = 1 // 0
    assert watch.calls == [("rank 1 has failed: ZeroDivisionError: integer division or modulo by zero", ""), "close"]
    watch = _Watch()
    with made(watch) as own:
        own.doing("loading")
    assert watch.calls == ["loading", "leave"]


# -- joining -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    for name in (ranks.LAUNCHER, "TORCHELASTIC_RUN_ID", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    return PLACE


@pytest.mark.parametrize("lacks", PLACE)
def test_a_rank_has_four_variables(lacks: str, place: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(lacks)
    with pytest.raises(UsageError, match="this process was not started as a rank") as error:
        join()
    assert error.value.received == f"no {lacks}"
    monkeypatch.setenv(lacks, "")
    with pytest.raises(UsageError, match="this process was not started as a rank"):
        join()


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "3"), ("RANK", "-1"), ("RANK", "a"), ("WORLD_SIZE", "1"), ("MASTER_PORT", "7.0")]
)
def test_a_rank_is_a_number_below_the_others(
    name: str, value: str, place: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="RANK must be a number below WORLD_SIZE, and MASTER_PORT a number") as error:
        join()
    environment = {**place, name: value}
    assert error.value.received == ", ".join(f"{each}={text!r}" for each, text in environment.items())


@pytest.mark.parametrize(
    ("rank", "host", "timeout", "start", "expected"),
    [
        (1, "far", 61.0, 61.0, ["connect to far by 5 t"]),
        (2, "far", None, 60.0, ["connect to far by 5 t"]),
        (0, "far", 3.0, 60.0, ["listen at ''"]),
        (0, "localhost", 3.0, 60.0, ["listen at '127.0.0.1'"]),
        (0, "127.0.0.1", 3.0, 60.0, ["listen at '127.0.0.1'"]),
    ],
)
def test_ranks_join_by_a_store(
    rank: int, host: str, timeout: float | None, start: float, expected: list[str],
    place: dict[str, str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The other ranks have at least a minute to arrive; rank 0 publishes its address."""
    watch, given, store = _Watch(), list[Any](), _Store(**{"treadle/watch": b"5 t"})
    monkeypatch.setenv("RANK", f"{rank}")
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setattr(ranks, "Watch", lambda *how: given.append(how) or watch)
    monkeypatch.setattr(ranks, "time", SimpleNamespace(monotonic=lambda: 9.0, sleep=lambda pause: None))

    def meets(url: str, own: int, size: int, timeout: Any) -> Iterator[Any]:
        assert (url, own, size, timeout.total_seconds()) == ("env://", rank, 3, start)
        yield store, own, size

    monkeypatch.setattr(importlib.import_module("torch.distributed.rendezvous"), "rendezvous", meets)
    joined = join() if timeout is None else join(timeout)
    later = timeout or 60.0
    assert (joined.rank, joined.size, joined.timeout, joined.store) == (rank, 3, later, store)
    assert watch.calls == expected
    assert watch.missing == ([] if rank == 0 else [[1, 2], [2], []])
    ((own, size, seconds, is_orphan),) = given
    assert (own, size, seconds, is_orphan()) == (rank, 3, later, False)
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"


def test_a_rank_of_torchrun_ends_with_it(place: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setattr(ranks, "_end_with_parent", lambda: pytest.fail("it is not our launcher"))
    is_orphan = ranks._orphaned()
    assert not is_orphan()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert is_orphan()


def test_the_system_is_asked_to_kill_a_rank_without_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    library = SimpleNamespace(prctl=lambda *given: asked.append(given))
    monkeypatch.setattr(ranks, "ctypes", SimpleNamespace(CDLL=lambda name: library))
    for platform in ("linux", "darwin"):
        monkeypatch.setattr(ranks, "sys", SimpleNamespace(platform=platform))
        ranks._end_with_parent()
    assert asked == [(1, 9)], "PR_SET_PDEATHSIG, and SIGKILL"
    monkeypatch.setattr(ranks, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr(ranks, "ctypes", SimpleNamespace(CDLL=lambda name: SimpleNamespace()))
    ranks._end_with_parent()  # a system without that function
