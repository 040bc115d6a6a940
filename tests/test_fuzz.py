"""The short form of tests/fuzz/graphs.py: a few of its graphs, and a check that planted errors are noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.fuzz.graphs import BACKENDS, LONG, Judge, draw, main, verdicts
from treadle.backends.numpy import backend as numpy_backend
from treadle.backends.numpy.destinations import NUMPY
from treadle.ir.types import bf16, f16, f64

GRAPHS = 80


@pytest.mark.parametrize("start", range(0, GRAPHS, 20))
def test_graphs_give_what_they_mean(start: int) -> None:
    for seed in range(start, start + 20):
        backends = BACKENDS if seed % 10 == 0 else BACKENDS[:2]
        wrong = {name: report for name, report in verdicts(draw(seed), backends) if report}
        assert not wrong, f"seed {seed}: {wrong}"


def test_the_graphs_are_of_many_kinds() -> None:
    cases = [draw(seed) for seed in range(GRAPHS)]
    dtypes = {v.type.dtype for case in cases for _, node in case.graph.walk() for v in node.results}
    assert {f16, bf16, f64} <= dtypes
    assert any(LONG in array.shape for case in cases for array in case.inputs.values())
    assert any(case.seed % 3 == 0 and len(case.graph.functions) > 1 for case in cases)


def test_a_seed_gives_one_case() -> None:
    one, other = draw(5), draw(5)
    assert str(one.graph) == str(other.graph)
    assert all(np.array_equal(one.inputs[name], other.inputs[name]) for name in one.inputs)


def test_graphs_are_poisoned_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An array is filled with NaN once its storage is dead, so that a later read would return NaN."""
    filled: list[int] = []
    monkeypatch.setenv("TREADLE_POISON", "0")  # restore the variable after the test
    monkeypatch.setattr(numpy_backend, "_poison", lambda *arrays: filled.append(len(arrays)))
    for options, happens in (([], False), (["--poison"], True)):
        monkeypatch.setattr("sys.argv", ["graphs", "--count", "2", "--backend", "numpy", *options])
        assert main() == 0 and bool(filled) == happens


def test_a_wrong_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one part in a hundred thousand, in a tanh of f64 and f32."""
    assert NUMPY.into is not None
    wrong = "np.multiply(np.tanh({x}), type({x}.flat[0])(1.00001){out_args})"
    monkeypatch.setitem(NUMPY.into, "tanh", wrong)
    found = [dict(verdicts(draw(seed), ["numpy"])).get("numpy") for seed in range(0, 60, 3)]
    assert any(found)


@pytest.mark.parametrize(
    "change", [lambda y: y * 1.001, lambda y: y + 1e-2, lambda y: np.where(y == y.max(), np.nan, y)]
)
def test_wrong_results_are_told_from_right_ones(change: Any) -> None:
    """Rounding may move the results of a few programs as far, such as those that compare almost equal numbers."""
    noticed = []
    for seed in range(0, 45, 3):
        case = draw(seed)
        judge = Judge(case)
        if judge.spacing > 1e-6:
            continue
        right = {name: array.astype(np.float64) for name, array in judge.wide.items()}
        assert judge.failure(right) is None
        noticed.append(judge.failure({name: change(array) for name, array in right.items()}) is not None)
    assert sum(noticed) >= len(noticed) - 1 >= 5
