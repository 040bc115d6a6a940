"""The ranks' watch over each other, in one process: what strangers say to it, how much a rank says, and who hangs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from treadle.runtime.distributed import watching
from treadle.runtime.distributed.watching import FAILED, GRACE, PERIOD, Failure, RankStatus, Watch

STRANGERS = [b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"[1]\n", b"{}\n", b'{"rank": 1, "token": "guessed"}\n']


@pytest.mark.parametrize("said", STRANGERS)
def test_a_stranger_is_sent_away_and_the_ranks_go_on(said: bytes) -> None:
    first, second = Watch(0, 2, 30.0), Watch(1, 2, 30.0)
    told = first.listen("127.0.0.1")
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", int(told.split()[0])), timeout=10) as stranger:
            stranger.sendall(said)
            assert stranger.recv(1) == b""
    assert first.absent() == [1]
    second.connect("127.0.0.1", told)
    wait_for_all(first)
    second.leave()
    leaving = threading.Thread(target=first.leave, daemon=True)
    leaving.start()
    leaving.join(10)
    assert not leaving.is_alive()
    assert (first.failure, second.failure) == (None, None)


@pytest.mark.parametrize("failing", [0, 1])
def test_of_a_long_failure_the_beginning_is_told(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rank that fails, and by no other."""
    monkeypatch.setattr(Watch, "_end_process", lambda self: None)
    first, second = ranks = Watch(0, 2, 30.0), Watch(1, 2, 30.0)
    second.connect("127.0.0.1", first.listen("127.0.0.1"))
    try:
        wait_for_all(first)
        assert ranks[failing].settle("w" * 99_999, "r" * 99_999), "who has failed tells the user"
        for rank in ranks:
            assert rank._failed.wait(10)
            assert rank.failure == Failure("w" * 2000, "r" * 2000, teller=failing)
            assert not rank.settle("another's has ended it")
    finally:
        second._end()
        first._end()


def wait_for_all(first: Watch) -> None:
    until = time.monotonic() + 10
    while first.absent():
        assert time.monotonic() < until
        time.sleep(0.01)


NOW = 1000.0


def does(doing: str, since: float, silent: float = 0.0) -> RankStatus:
    return RankStatus(doing, since, heard=NOW - silent)


def waits(doing: str, since: float, silent: float = 0.0) -> RankStatus:
    return RankStatus(doing, since, waiting=True, heard=NOW - silent)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ([waits("a", 4), does("b", 9)], None),
        ([waits("a", 5), does("b", 3), does("c", 2)], "rank 1 does not come: rank 0 waits in a for 5.0 s; rank 1: b"),
        (
            [waits("a", 6), waits("a", 5), does("b", 2), does("c", 1)],
            "rank 2, 3 does not come: rank 0 waits in a for 6.0 s; rank 2: b; rank 3: c",
        ),
        (
            [waits("a", 5), waits("a", 0, silent=2.5)],
            "rank 1 does not come: rank 0 waits in a for 5.0 s; rank 1: in a, not heard of for 2.5 s",
        ),
        ([waits("a", 5), waits("b", 0)], "ranks wait for others that do not come: rank 0: in a; rank 1: in b"),
    ],
)
def test_who_does_not_come_is_told_after_the_timeout(
    said: list[RankStatus], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those who are behind, whoever has been for half the timeout of 4 s, or else all; never who has left."""
    monkeypatch.setattr(Watch, "_end_process", lambda self: None)
    monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: NOW))
    watch = Watch(0, len(said) + 1, timeout=4.0)
    watch._said = dict(enumerate([*said, does("left", 99)]))
    watch._left = {len(said)}
    watch._look_for_hung()
    assert (watch.failure and f"{watch.failure.what}: {watch.failure.received}") == told


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], float]:
    """Runs what ends the process, by a clock of its own, and gives the seconds until then."""
    clock = 0.0

    def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    def leave(code: int) -> None:
        raise SystemExit(code)

    def run(ends: Callable[[], None]) -> float:
        nonlocal clock
        clock = 0.0
        with pytest.raises(SystemExit, match=str(FAILED)):
            ends()
        return clock

    monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: clock, sleep=sleep))
    monkeypatch.setattr(watching, "os", SimpleNamespace(_exit=leave))
    return run


@pytest.mark.parametrize(("rank", "gone", "seconds"), [(0, {1}, 0), (0, set(), GRACE), (1, set(), 0)])
def test_rank_0_ends_after_the_others_or_a_moment(
    rank: int, gone: set[int], seconds: float, ending: Callable[[Callable[[], None]], float]
) -> None:
    watch = Watch(rank, 2, 30.0)
    watch._connections, watch._gone = dict.fromkeys([1 - rank]), gone  # type: ignore[assignment]
    assert ending(watch._end_at_once) == pytest.approx(seconds, abs=PERIOD / 10)


@pytest.mark.parametrize(("teller", "received", "told"), [(1, "r", "w\n  received  r\n"), (1, "", "w\n"), (0, "r", "")])
def test_the_watch_tells_once_where_the_main_thread_does_not_end(
    teller: int,
    received: str,
    told: str,
    ending: Callable[[Callable[[], None]], float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where that is about to end it tells by itself, and has a moment more."""
    watch, closing = Watch(1, 2, 30.0), Watch(1, 2, 30.0)
    watch.failure = closing.failure = Failure("w", received, teller)
    closing._closing.set()
    assert ending(closing._end_process) == 2 * GRACE
    assert ending(watch._end_process) == ending(watch._end_process) == GRACE
    assert capsys.readouterr().err == told
