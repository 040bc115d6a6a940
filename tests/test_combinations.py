"""The short form of tests/fuzz/combinations.py: a few schemes with budgets, and planted errors that must be noticed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.fuzz.combinations import BACKENDS, BUDGETS, Combination, combinations, outcomes
from treadle.backends.registry import find_backend
from treadle.passes.budget import fitted_pipeline


@pytest.mark.parametrize("backend", BACKENDS)
def test_schemes_run_within_their_budgets(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheme that rounds activations, at 9 rows, and at 1 row, for which some parts are empty."""
    if (reason := find_backend(backend).available()) is not None:
        pytest.skip(f"backend {backend}: {reason}")
    monkeypatch.setattr(fitted_pipeline, "SECONDS", 0.0)  # accept the first budget that is found
    small = [c for c in combinations((backend,)) if c.model in ("gpt2", "bert") and c.rows > 1]
    drawn = random.Random(BACKENDS.index(backend)).choice([c for c in small if c.scheme in ("int8", "int4-int8")])
    made = list(outcomes(drawn, bits=True))
    assert [each for each in made if each.failure is not None or each.refused is not None] == []
    assert [each.budget for each in made] == ["none", *BUDGETS]


def test_other_numbers_and_a_call_that_fails_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Combination.compile

    def compiled(self: Combination, **options: Any) -> Any:
        if options.get("memory", 1) == 1:
            return real(self, **options)
        return real(replace(self, scheme="int4"), **options)

    monkeypatch.setattr(Combination, "compile", compiled)
    none, *budgets = outcomes(Combination("bert", None, "numpy", 9))
    assert none.failure is None
    assert all("Not equal to tolerance" in str(each.failure) for each in budgets)
    inputs = Combination.inputs
    monkeypatch.setattr(Combination, "inputs", lambda *given: {n: x[..., :0, :] for n, x in inputs(*given).items()})
    (failed,) = outcomes(Combination("vit", None, "numpy", 1))
    assert "pixels" in str(failed.failure)


def test_a_scheme_that_is_refused_is_told_with_its_reason() -> None:
    (refused,) = outcomes(Combination("bert", "int3", "numpy", 1))
    assert (refused.budget, refused.failure) == ("none", None)
    assert "quantization scheme" in str(refused.refused)


def test_inputs_have_the_rows_that_are_asked_for() -> None:
    for combination in combinations(("numpy",)):
        assert 9 in combination.sizes(9).values() and np.prod([*combination.sizes(1).values()]) == 1
