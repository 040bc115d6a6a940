"""Random sessions return the logits of whole texts: a small sample of `tests/fuzz/steps.py --sessions`."""

from __future__ import annotations

import numpy as np
import pytest

from tests.random_sessions import backends, drawn_choice, drawn_sizes, play
from treadle.ir.analysis.axis_tracing import joined_scope
from treadle.passes.stepping.kept_values import StepStates
from treadle.runtime.slots import Slots

SEEDS = {"numpy": (0, 1, 2, 9, 27, 77), "torch": (1004, 1006), "tvm": (2002,)}
PLAYED = [(backend, seed) for backend, seeds in SEEDS.items() for seed in seeds]


@pytest.mark.parametrize(("backend", "seed"), PLAYED)
def test_sessions_give_the_logits_of_whole_texts(backend: str, seed: int) -> None:
    if backend not in backends():
        pytest.skip(f"{backend} is not installed")
    played = play(seed, backend, sessions=2)
    assert played.checked > 20 and played.sharp > 5


def test_the_sessions_are_of_many_kinds() -> None:
    chosen = [drawn_choice(np.random.default_rng(seed), "tvm", seed) for seed in range(60)]
    sizes = [drawn_sizes(np.random.default_rng(seed)) for seed in range(60)]
    assert sum(c.shared for c in chosen) == 18
    assert sum("quantize" in c.compiled for c in chosen) == 18
    assert {c.cache for c in chosen} == {None, "f16", "bf16"}
    assert any("dtype" in c.compiled for c in chosen)
    assert {s["full"] for s in sizes} == {"slide", "error"} and any(s["capacity"] > 128 for s in sizes)


def test_states_of_a_scope_in_place_of_a_repetition_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepStates, "name_of_call", lambda self, context, call, name: joined_scope(call.scope, name))
    with pytest.raises(AssertionError, match="times too far off"):
        play(1, "numpy", sessions=2)


def test_a_fork_that_copies_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slots, "_copy", lambda *_: None)
    with pytest.raises(AssertionError, match="times too far off"):
        play(9, "numpy", sessions=2)
