"""The ranks' watch over each other, tested in one process: messages from strangers, the length of messages, and hanging
ranks.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from treadle.ir.errors import RankError
from treadle.runtime.distributed import watching
from treadle.runtime.distributed.rank_connections import LONGEST, RankConnection
from treadle.runtime.distributed.watching import GRACE, PERIOD, Failure, RankStatus, Watch

STRANGERS = [b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"[1]\n", b"{}\n", b'{"rank": 1, "token": "guessed"}\n']


@pytest.mark.parametrize("said", STRANGERS)
def test_a_stranger_is_sent_away_and_the_ranks_go_on(said: bytes) -> None:
    first, second = Watch(0, 2, 30.0), Watch(1, 2, 30.0)
    report = first.listen("127.0.0.1")
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", int(report.split()[0])), timeout=10) as stranger:
            stranger.sendall(said)
            assert stranger.recv(1) == b""
    assert first.absent() == [1]
    second.connect("127.0.0.1", report)
    wait_for_all(first)
    second.leave()
    leaving = threading.Thread(target=first.leave, daemon=True)
    leaving.start()
    leaving.join(10)
    assert not leaving.is_alive()
    assert (first.failure, second.failure) == (None, None)


@pytest.mark.parametrize("failing", [0, 1])
def test_of_a_long_failure_the_beginning_is_told(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failing rank prints the whole message; the other ranks print none."""
    monkeypatch.setattr(Watch, "_end_process", lambda self: None)
    first, second = ranks = Watch(0, 2, 30.0), Watch(1, 2, 30.0)
    second.connect("127.0.0.1", first.listen("127.0.0.1"))
    try:
        wait_for_all(first)
        assert ranks[failing].settle("w" * 99_999, "r" * 99_999), "the failing rank reports to the user"
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
    ("said", "report"),
    [
        ([waits("a", 4), does("b", 9)], None),
        ([waits("a", 5), does("b", 3), does("c", 2)], "rank 1 does not arrive: rank 0 waits in a for 5.0 s; rank 1: b"),
        (
            [waits("a", 6), waits("a", 5), does("b", 2), does("c", 1)],
            "rank 2, 3 does not arrive: rank 0 waits in a for 6.0 s; rank 2: b; rank 3: c",
        ),
        (
            [waits("a", 5), waits("a", 0, silent=2.5)],
            "rank 1 does not arrive: rank 0 waits in a for 5.0 s; rank 1: in a, silent for 2.5 s",
        ),
        ([waits("a", 5), waits("b", 0)], "ranks wait for others that do not arrive: rank 0: in a; rank 1: in b"),
        (
            [waits("a", 5), waits("b", 0, silent=2)],
            "ranks wait for others that do not arrive: rank 0: in a; rank 1: in b",
        ),
    ],
)
def test_missing_ranks_are_reported_after_the_timeout(
    said: list[RankStatus], report: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the ranks that have been behind for half of the timeout of 4 s, or otherwise all ranks behind;
    never a rank that has left.
    """
    monkeypatch.setattr(Watch, "_end_process", lambda self: None)
    monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: NOW))
    watch = Watch(0, len(said) + 1, timeout=4.0)
    watch._said = dict(enumerate([*said, does("left", 99)]))
    watch._left = {len(said)}
    watch._look_for_hung()
    assert (watch.failure and f"{watch.failure.what}: {watch.failure.received}") == report


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], float]:
    """Return a function that runs a call which ends the process, on a simulated clock, and returns the seconds until
    then.
    """
    clock = 0.0

    def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    def leave(code: int) -> None:
        raise SystemExit(code)

    def run(ends: Callable[[], None]) -> float:
        nonlocal clock
        clock = 0.0
        with pytest.raises(SystemExit, match=r"^2$"):
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


@pytest.mark.parametrize(
    ("teller", "received", "report"), [(1, "r", "w\n  received  r\n"), (1, "", "w\n"), (0, "r", "")]
)
def test_the_watch_tells_once_where_the_main_thread_does_not_end(
    teller: int,
    received: str,
    report: str,
    ending: Callable[[Callable[[], None]], float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If the main thread is about to end, it prints the failure itself, and gets a little more time."""
    watch, closing = Watch(1, 2, 30.0), Watch(1, 2, 30.0)
    watch.failure = closing.failure = Failure("w", received, teller)
    closing._closing.set()
    assert ending(closing._end_process) == 2 * GRACE
    assert ending(watch._end_process) == ending(watch._end_process) == GRACE
    assert capsys.readouterr().err == report


def test_a_process_whose_launcher_has_ended_ends(ending: Callable[[Callable[[], None]], float]) -> None:
    Watch(1, 2, 30.0)._leave_orphan()  # without a launcher
    assert ending(Watch(1, 2, 30.0, lambda: True)._leave_orphan) == 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace the watch's clock by one that stands at `now`; the process is not ended."""
    made = SimpleNamespace(now=NOW)
    monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr(Watch, "_end_process", lambda self: None)
    return made


def test_a_rank_says_what_it_does_and_whether_it_waits(clock: SimpleNamespace) -> None:
    watch, said = Watch(1, 2, 30.0), []

    def tick(seconds: float) -> None:
        clock.now += seconds
        said.append(tuple(watch._own().message().values()))

    tick(0.5)
    watch.doing("loading")
    tick(2)
    with watch.waiting("all_reduce over tp"):
        tick(3)
    tick(4)
    assert said == [
        ("starting", 0.5, False),
        ("loading", 2, False),
        ("all_reduce over tp", 3, True),
        ("loading", 4, False),
    ]
    assert list(watch._own().message()) == ["doing", "since", "waiting"]
    assert RankStatus().message() == {"doing": "starting", "since": 0.0, "waiting": False}


@pytest.mark.parametrize(("silent", "report"), [(10 * PERIOD, "in a"), (2.5, "in a, silent for 2.5 s")])
def test_only_a_long_silence_is_reported(silent: float, report: str, clock: SimpleNamespace) -> None:
    assert str(waits("a", 0, silent)) == report


@pytest.mark.parametrize("received", ["no space left", ""])
def test_after_a_failure_all_that_a_rank_begins_ends_in_it(received: str, clock: SimpleNamespace) -> None:
    watch = Watch(1, 2, 30.0)
    watch.check()
    watch._fail(Failure("rank 0 has failed: disk", received, 0))
    watch._fail(Failure("rank 1 has died", "later", 0))
    for begins in (watch.check, lambda: watch.doing("a"), watch.waiting("b").__enter__):
        with pytest.raises(RankError, match="rank 0 has failed: disk") as error:
            begins()
        assert error.value.received == (received or None)
    assert watch.explained(RuntimeError("closed"), "meeting").what == "rank 0 has failed: disk"  # type: ignore[attr-defined]


def test_an_error_of_torch_that_no_rank_explains_is_told_by_its_first_line() -> None:
    watch, waited = Watch(1, 2, 30.0), []
    watch._failed = SimpleNamespace(wait=waited.append)  # type: ignore[assignment]
    error = watch.explained(RuntimeError("r" * 301 + "\nand\nmore"), "all_reduce over tp")
    assert isinstance(error, RankError)
    assert (error.what, error.received) == ("all_reduce over tp: the ranks could not communicate", "r" * 300)
    assert waited == [GRACE], "one may be about to be known"


class _Spoken:
    """A stand-in for a connection to a rank, with its incoming messages and the messages that were sent."""

    def __init__(self, *comes: list[dict[str, Any]] | None, rank: int | None = None) -> None:
        self.comes, self.rank = list(comes), rank
        self.sent: list[Any] = []
        self.closed = False

    def received(self) -> list[dict[str, Any]] | None:
        return self.comes.pop(0)

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    def close(self) -> None:
        self.closed = True


def test_rank_0_takes_what_ranks_say(clock: SimpleNamespace) -> None:
    """A rank's death is detected if its connection ends without a good-bye or a reported failure."""
    watch = Watch(0, 5, 30.0)
    watch._token = "t"
    says = {"doing": "loading", "since": 2.0, "waiting": True}
    dies, leaves, fails, again, comes = (
        _Spoken([{"rank": 1, "token": "t"}, says], None),
        _Spoken([{"rank": 2, "token": "t"}], [{"bye": True}], None),
        _Spoken([{"rank": 3, "token": "t"}], [{"failed": "w", "received": "r"}], None),
        _Spoken([{"rank": 1, "token": "t"}]),
        _Spoken([{"rank": 4, "token": "t"}]),
    )
    hear: Callable[[Any], bool] = watch._hear
    assert [hear(dies), hear(leaves), hear(fails), hear(again)] == [True, True, True, False]
    assert again.closed
    assert watch.absent() == [4]
    assert (watch._said[1].message(), watch._said[2].doing) == (says, "starting")
    assert [hear(leaves), hear(leaves)] == [True, False]
    assert watch.failure is None
    assert (watch._left, watch._gone) == ({2}, {2})
    assert not hear(dies)
    died = {"what": "rank 1 has died", "received": "in loading", "teller": 0}
    assert [hear(fails), hear(fails), hear(comes)] == [True, False, True]
    assert (watch._left, watch._gone) == ({1, 2, 3}, {1, 2, 3})
    for report in (dies, leaves, fails, comes):  # later ranks, too
        assert report.sent == [died]
        assert report.closed == (report is not comes), "who has left waits for that"
    stranger = _Spoken(None)
    assert not hear(stranger)
    assert stranger.closed


def test_failing_ranks_report_their_error(clock: SimpleNamespace) -> None:
    watch = Watch(0, 3, 30.0)
    assert watch._hear(_Spoken([{"failed": "w", "received": "r"}], rank=2))  # type: ignore[arg-type]
    assert watch.failure == Failure("w", "r", teller=2)
    assert watch._left == {2}


def test_rank_0_tells_the_others_what_it_does(clock: SimpleNamespace) -> None:
    watch, here, left = Watch(0, 3, 4.0), _Spoken(), _Spoken()
    watch._connections, watch._left = {1: here, 2: left}, {2}  # type: ignore[dict-item]
    watch.doing("loading")
    clock.now += 3
    watch._said[1] = RankStatus("a", 5, waiting=True, heard=clock.now)
    watch._look()
    assert here.sent[-1] == {"doing": "loading", "since": 3, "waiting": False}
    assert left.sent == [
        {"what": "rank 0 does not arrive", "received": watch.failure and watch.failure.received, "teller": 0}
    ]


@pytest.mark.parametrize(
    ("comes", "failure"),
    [
        ([{"doing": "loading", "since": 1.0, "waiting": False}], None),
        ([{"what": "w", "received": "r", "teller": 3}], Failure("w", "r", 3)),
        (None, Failure("rank 0 has died", "in compiling", 1)),
    ],
)
def test_another_rank_takes_what_rank_0_says(
    comes: list[dict[str, Any]] | None, failure: Failure | None, clock: SimpleNamespace
) -> None:
    watch = Watch(2, 4, 30.0)
    watch._said[0] = waits("compiling", 0)
    assert watch._obey(_Spoken(comes)) == (comes is not None)  # type: ignore[arg-type]
    assert watch.failure == failure
    if comes and not failure:
        assert watch._said[0].message() == comes[0]


def test_the_end_of_rank_0_after_the_end_of_all_is_no_death(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    watch = Watch(2, 4, 30.0)
    watch._said[0] = waits("compiling", 0)
    said = []

    def say(message: dict[str, Any]) -> None:
        said.append(message)
        assert not watch._obey(_Spoken(None)), "rank 0 may end before we go on"  # type: ignore[arg-type]

    monkeypatch.setattr(watch, "_say", say)
    monkeypatch.setattr(watch, "_end", lambda: said.append("end"))
    watch.leave()
    assert said == [{"bye": True}, "end"]
    assert not watch._obey(_Spoken(None))  # type: ignore[arg-type]
    assert watch.failure is None


@pytest.mark.parametrize(
    ("own", "silent", "received"),
    [
        (waits("a", 4.5), 2.5, "silent for 2.5 s"),
        (waits("a", 4), 2.5, None),
        (waits("a", 4.5), 2, None),
        (does("a", 4.5), 2.5, None),
    ],
)
def test_rank_0_hangs_where_others_wait_and_hear_nothing(
    own: RankStatus, silent: float, received: str | None, clock: SimpleNamespace
) -> None:
    watch = Watch(1, 2, timeout=4.0)
    watch._said[0] = does("b", 0, silent)
    watch._look_for_silence(own)
    assert watch.failure == (received and Failure("rank 0 does not arrive", received, 1))


def test_rank_0_is_reached_where_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(place: tuple[str, int], timeout: float) -> None:
        raise ConnectionRefusedError(f"{place} within {timeout:g} s")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(RankError, match="rank 0 cannot be reached") as error:
        Watch(1, 2, 30.0).connect("far", "99 t")
    assert error.value.received == "far:99: ('far', 99) within 30 s"


def test_rank_0_leaves_after_all_others(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> None:
    watch, came = Watch(0, 3, 30.0), []

    def sleep(seconds: float) -> None:
        came.append(watch._own().message()["doing"])
        watch._left.add(len(came))

    monkeypatch.setattr(watch, "_end", lambda: came.append("end"))
    watching.time.sleep = sleep  # type: ignore[assignment]
    watch.leave()
    assert came == ["waiting for other ranks to end"] * 2 + ["end"]


def test_the_end_of_a_process_that_failed_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Any] = []
    monkeypatch.setattr(watching, "atexit", SimpleNamespace(register=prepared.append))
    watch = Watch(1, 2, 30.0)
    for _ in range(2):
        watch.close()
    assert prepared == [watch._end_at_once]


def test_threads_of_the_watch_keep_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    thread = SimpleNamespace(start=lambda: None)
    monkeypatch.setattr(threading, "Thread", lambda **how: made.append(how) or thread)
    watch = Watch(1, 2, 30.0)
    watch._start(watch._attend)
    watch._fail(Failure("w", "r", 1))
    assert made == [
        {"target": watch._attend, "name": "treadle watch", "daemon": True},
        {"target": watch._end_process, "name": "treadle end", "daemon": True},
    ]


@pytest.fixture
def line() -> Iterator[tuple[RankConnection, socket.socket]]:
    """Yield a connection, and the socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname(), timeout=10)
        other, _ = server.accept()
    with ours, other:
        yield RankConnection(ours, PERIOD), other


def test_a_line_is_as_long_as_what_one_rank_says(line: tuple[RankConnection, socket.socket]) -> None:
    """A failure message is truncated to 2000 characters of up to 6 bytes each, and so are received values."""
    assert LONGEST == 65536 > 2 * 2000 * 6
    own, other = line
    assert own.received() == [], "nothing has come yet"
    own._begun = b" " * (LONGEST - 1)
    for begun in (LONGEST, LONGEST + 1):
        other.sendall(b" ")
        assert own.received() == []
        assert len(own._begun) == begun
    other.sendall(b" ")
    assert own.received() is None


def test_a_line_brings_whole_messages(line: tuple[RankConnection, socket.socket]) -> None:
    own, other = line
    other.sendall(b'{"a": 1}\n{"b": 2}\n{"c"')
    assert own.received() == [{"a": 1}, {"b": 2}]
    other.sendall(b": 3}\n")
    assert own.received() == [{"c": 3}]
    own.send({"d": "e"})
    assert other.recv(99) == b'{"d": "e"}\n'
    other.close()
    assert own.received() is None
    own.send({"d": "e"})  # without a receiver, sending raises no error
    own.close()
    assert own.received() is None


def test_last_messages_arrive_despite_unread_data(line: tuple[RankConnection, socket.socket]) -> None:
    """The last message arrives even if the other side has not acknowledged earlier data, which can take tens of
    milliseconds.
    """
    own, socket_of_other = line
    other = RankConnection(socket_of_other, PERIOD)
    for teller, hearer in [(own, other), (other, own)] * 5:  # after this, data is no longer acknowledged immediately
        teller.send({"doing": "loading"})
        assert hearer.received() == [{"doing": "loading"}]
    own.send({"doing": "a"})
    other.send({"doing": "c"})
    own.send({"doing": "b"})
    own.send({"bye": True})
    own.close()
    heard: list[Any] = []
    while (came := other.received()) is not None:
        heard += came
    assert heard == [{"doing": "a"}, {"doing": "b"}, {"bye": True}]


@pytest.mark.parametrize("ends", [True, False])
def test_a_line_ends_when_the_other_side_has_heard_all_or_in_time(
    ends: bool, line: tuple[RankConnection, socket.socket]
) -> None:
    own, other = line
    other.sendall(b"unread")
    own.send({"bye": True})
    within = 60.0 if ends else 0.1
    ending = threading.Thread(target=own.end, args=[within], daemon=True)
    ending.start()
    assert other.recv(99) == b'{"bye": true}\n'
    assert other.recv(99) == b"", "nothing more is said"
    assert own.socket.fileno() >= 0 or not ends, "it waits"
    if ends:
        other.close()
    ending.join(10)
    assert not ending.is_alive()
    assert own.socket.fileno() == -1
