"""The entries of a derived step on every backend: the logits of the whole, over drawn chunkings, joins and mixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests.stepped_models import MODELS, optimized
from tests.test_derive_step import Schedule, drawn_inputs, drawn_weights, state_sizes
from treadle.backends.protocol import StatefulExecutable
from treadle.backends.registry import find_backend
from treadle.ir.interpreter import interpret
from treadle.ir.target import Target
from treadle.passes.stepping.derivation import DerivedStep, derive_step

Array = np.ndarray[Any, Any]
BACKENDS = ("numpy", "torch", "tvm")


class OnBackend:
    """A derived graph as a backend runs it. States hold what other rows left there."""

    def __init__(self, derived: DerivedStep, backend: str, weights: Mapping[str, Array]) -> None:
        made = find_backend(backend).compile(derived.graph, Target("cpu"), weights)
        assert isinstance(made, StatefulExecutable)
        self.exe, self.derived = made, derived

    def filled(self, rng: np.random.Generator) -> OnBackend:
        self.states = self.exe.new_states(**state_sizes(self.derived))
        for name in self.states:
            array = np.asarray(self.states[name])
            array[...] = rng.integers(-3, 3, array.shape)
        return self

    def __call__(self, entry: str, **inputs: Array) -> Mapping[str, Array]:
        return {name: np.asarray(x) for name, x in self.exe.entry(entry)(self.states, **inputs).items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_steps_give_what_the_whole_gives(name: str, backend: str) -> None:
    if reason := find_backend(backend).available():
        pytest.skip(reason)
    graph = optimized(MODELS[name])
    derived = derive_step(graph)
    rng = np.random.default_rng(5)
    weights = {n: x.astype(np.float32) for n, x in drawn_weights(graph, rng).items()}
    inputs = drawn_inputs(graph, derived.axis, rng)
    inputs = {n: x.astype(np.float32) if x.dtype.kind == "f" else x for n, x in inputs.items()}
    whole = interpret(graph, inputs, weights, float64=True)

    def check(output: str, found: Array, row: int, first: int, end: int) -> None:
        wanted = whole[output][row, first:end]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-6 * np.abs(whole[output]).max())

    run = OnBackend(derived, backend, weights)
    for _ in range(2):
        Schedule(derived, inputs, rng).run(run.filled(rng), check)
