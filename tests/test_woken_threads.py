"""The other threads of a run start on other cores than the calling thread if the run follows a pause. Afterwards they
may run on any core.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import treadle as t
from tests.backend_checks import needs_tvm
from treadle.backends.tvm.kernels.host import woken_threads
from treadle.backends.tvm.kernels.host.woken_threads import ASLEEP, WokenThreads, thread_numbers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can set the cores of a thread")


@pytest.fixture
def number() -> Iterator[int]:
    """Start a waiting thread and return its number."""
    report: list[int] = []
    end = threading.Event()
    thread = threading.Thread(target=lambda: (report.append(threading.get_native_id()), end.wait()))
    thread.start()
    while not report:
        time.sleep(0.001)
    yield report[0]
    end.set()
    thread.join()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, set[int]]]:
    """Return a list that records the cores set for threads. The machine has three cores, and the calling thread is on
    the first.
    """
    said: list[tuple[int, set[int]]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda number: {0, 1, 2})
    monkeypatch.setattr(os, "sched_setaffinity", lambda number, cores: said.append((number, set(cores))))
    monkeypatch.setattr(woken_threads, "_core", lambda: 0)
    return said


def test_a_thread_is_known_by_its_number(number: int) -> None:
    assert {number, threading.get_native_id()} <= thread_numbers()


def test_they_begin_on_other_cores_and_are_free_again(said: list[Any]) -> None:
    threads = WokenThreads([7, 8])
    time.sleep(2 * ASLEEP)
    with threads.apart():
        assert said == [(7, {1, 2}), (8, {1, 2})]
        said.clear()
    assert said == [(7, {0, 1, 2}), (8, {0, 1, 2})]


def test_on_a_single_core_they_are_told_nothing(said: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda number: {0})
    threads = WokenThreads([7])
    time.sleep(2 * ASLEEP)
    with threads.apart():
        pass
    assert said == []


def test_recent_processes_get_no_message(said: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    threads = WokenThreads([7])
    time.sleep(2 * ASLEEP)
    with threads.apart():
        pass
    assert said
    said.clear()
    monkeypatch.setattr(woken_threads, "ASLEEP", 60.0)  # the machine may be busy
    with threads.apart():
        assert said == []
    assert said == []


def test_a_run_that_fails_leaves_them_free(said: list[Any]) -> None:
    threads = WokenThreads([7])
    time.sleep(2 * ASLEEP)
    with pytest.raises(ZeroDivisionError), threads.apart():
        raise ZeroDivisionError
    assert said[-1] == (7, {0, 1, 2})


def test_threads_that_ended_and_systems_that_forbid_it_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise PermissionError

    for name in ("sched_getaffinity", "sched_setaffinity"):
        threads = WokenThreads([7])
        time.sleep(2 * ASLEEP)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, forbidden)
            with threads.apart():
                pass


def test_a_real_thread_is_told_and_freed(number: int) -> None:
    before = os.sched_getaffinity(number)
    if len(before) < 2:
        pytest.skip("one core alone")
    threads = WokenThreads([number])
    time.sleep(2 * ASLEEP)
    with threads.apart():
        assert len(os.sched_getaffinity(number)) == len(before) - 1
    assert os.sched_getaffinity(number) == before


@needs_tvm
def test_a_model_on_two_threads_runs_so(monkeypatch: pytest.MonkeyPatch) -> None:
    report: list[int] = []
    spread = WokenThreads._spread
    monkeypatch.setattr(WokenThreads, "_spread", lambda self: report.append(len(self.numbers)) or spread(self))
    x = np.ones((64, 256), np.float32)
    made: list[Any] = []

    def run() -> None:  # runs in a thread with its own thread pool
        for threads in (1, 2):
            model = t.compile(doubled, backend="tvm", target=t.Target("cpu", threads=threads))
            for _ in range(2):
                time.sleep(2 * ASLEEP)
                made.append(model(x=x).output)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(report) == 2
    assert report[0] >= 1
    assert all((each == 2 * x).all() for each in made)


@t.model
def doubled(x: t.f32["S 256"]) -> Any:
    return x + x
