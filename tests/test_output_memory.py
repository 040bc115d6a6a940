"""Large outputs of the TVM backend reuse the memory of earlier ones, except memory that is still referenced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import treadle as t

pytest.importorskip("tvm")

ROWS = 1 << 11
"""Rows of an output that is large enough for its memory to be reused: 2,048 x 256 numbers, 2 MiB."""


@t.model
def doubled(x: t.f32["S 256"]) -> Any:
    return x + x


@t.model
def in_halves(x: t.f32["S 256"]) -> Any:
    return {"first": x + x, "second": x * x}


@pytest.fixture
def model() -> t.Compiled:
    return t.compile(doubled, backend="tvm")


def _given(first: float, rows: int = ROWS) -> Any:
    return np.full((rows, 256), first, np.float32)


def _run(model: t.Compiled, x: Any) -> Any:
    return model(x=x).output


def _place(array: Any) -> int:
    return int(array.ctypes.data)


def test_freed_slots_are_used_again(model: t.Compiled) -> None:
    places = {_place(_run(model, _given(n))) for n in range(8)}
    assert len(places) == 1


def test_a_loop_that_holds_a_result_until_the_next_has_two(model: t.Compiled) -> None:
    places, made = set(), None
    for n in range(8):
        before, made = made, _run(model, _given(n))
        assert before is None or (before == 2 * (n - 1)).all()
        places.add(_place(made))
        del before
    assert len(places) == 2


def test_results_that_are_held_stay_as_they_are(model: t.Compiled) -> None:
    made = [_run(model, _given(n)) for n in range(6)]
    assert len({_place(each) for each in made}) == 6
    for n, each in enumerate(made):
        assert (each == 2 * n).all()


def _row(made: Any) -> Any:
    return made[-1:, 3:]


def _row_of_views(made: Any) -> Any:
    return made.reshape(-1)[256:].view(np.uint8)[-256:].view(np.float32)


def _buffer(made: Any) -> Any:
    return memoryview(made[5])


def _tensor(made: Any) -> Any:
    torch = pytest.importorskip("torch")
    return torch.from_numpy(made)[5]


def _capsule(made: Any) -> Any:
    torch = pytest.importorskip("torch")
    return torch.from_dlpack(made[5:6])


@pytest.mark.parametrize("part", [_row, _row_of_views, _buffer, _tensor, _capsule])
def test_a_part_of_a_result_holds_all_of_it(model: t.Compiled, part: Any) -> None:
    held = part(_run(model, _given(1)))
    for n in range(2, 6):
        _run(model, _given(n))
    assert (np.asarray(held) == 2).all()


def test_a_result_outlives_the_model(model: t.Compiled) -> None:
    exe = t.compile(doubled, backend="tvm")
    made = _run(exe, _given(3))
    del exe
    assert (_run(model, _given(1)) == 2).all()
    assert (made == 6).all()


def test_a_result_can_be_written_to(model: t.Compiled) -> None:
    made = _run(model, _given(1))
    made += 1
    assert (_run(model, _given(5)) == 10).all()
    assert (made == 3).all()


def test_a_much_smaller_output_has_memory_of_its_own(model: t.Compiled) -> None:
    large = _run(model, _given(1, 4 * ROWS))
    place = _place(large)
    del large
    small = _run(model, _given(2))
    assert not place <= _place(small) < place + 4 * ROWS * 1024
    assert (small == 4).all()


def test_small_outputs_are_not_remembered(model: t.Compiled) -> None:
    made = _run(model, _given(1, 4))
    assert made.base is None or made.base.nbytes == made.nbytes
    assert (made == 2).all()


def test_outputs_of_one_call_lie_apart() -> None:
    model = t.compile(in_halves, backend="tvm")
    for n in range(1, 5):
        made = model(x=_given(n))
        assert (made.first == 2 * n).all()
        assert (made.second == n * n).all()


def test_tensors_are_given_the_same_way() -> None:
    torch = pytest.importorskip("torch")
    model = t.compile(doubled, backend="tvm")
    held = _run(model, torch.from_numpy(_given(1)))
    places = {_run(model, torch.from_numpy(_given(n))).data_ptr() for n in range(2, 6)}
    assert len(places) == 1
    assert held.data_ptr() not in places
    assert bool((held == 2).all())
