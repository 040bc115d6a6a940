"""The ranks' watch over each other, in one process: what strangers say to it, and how much a rank says."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from treadle.runtime.distributed.watching import Failure, Watch

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
    until = time.monotonic() + 10
    while first.absent():
        assert time.monotonic() < until
        time.sleep(0.01)
    second.leave()
    leaving = threading.Thread(target=first.leave, daemon=True)
    leaving.start()
    leaving.join(10)
    assert not leaving.is_alive()
    assert (first.failure, second.failure) == (None, None)


def test_of_a_long_failure_the_beginning_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "_end_process", lambda self: None)
    first, second = Watch(0, 2, 30.0), Watch(1, 2, 30.0)
    second.connect("127.0.0.1", first.listen("127.0.0.1"))
    try:
        assert second.settle("w" * 99_999, "r" * 99_999), "who has failed tells the user"
        assert first.failure == second.failure == Failure("w" * 2000, "r" * 2000, teller=1)
    finally:
        second._end()
        first._end()
