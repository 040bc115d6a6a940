"""The entries of a derived step on every backend: the logits equal those of the whole sequence, for random chunks,
joins and mixes of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from tests.stepped_models import MODELS, optimized
from tests.test_derive_step import Schedule, drawn_inputs, drawn_weights, state_sizes
from treadle.backends.protocol import StatefulExecutable
from treadle.backends.registry import find_backend
from treadle.ir.analysis.tolerances import room, spacing_of
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.target import Target
from treadle.ir.types import f32
from treadle.passes.framework.manager import PassManager
from treadle.passes.products.narrow_attention import NarrowAttention
from treadle.passes.stages import MergeOps, Precision, Recognize, passes_of
from treadle.passes.stepping.derivation import DerivedStep, derive_step
from treadle.runtime.roundings import Moved, moved_by_rounding

Array = np.ndarray[Any, Any]
BACKENDS = ("numpy", "torch", "tvm")


class OnBackend:
    """A derived graph on a backend. States keep the contents of earlier rows."""

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


@dataclass(frozen=True)
class Whole:
    """A graph over all tokens: random weights and inputs, outputs in float64, and the effect of roundings on the
    outputs.
    """

    graph: Graph
    derived: DerivedStep
    weights: Mapping[str, Array]
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    moved: Mapping[str, Moved]

    @staticmethod
    def of(graph: Graph, rng: np.random.Generator) -> Whole:
        derived = derive_step(graph)
        weights = {n: x.astype(np.float32) for n, x in drawn_weights(graph, rng).items()}
        inputs = drawn_inputs(graph, derived.axis, rng)
        inputs = {n: x.astype(np.float32) if x.dtype.kind == "f" else x for n, x in inputs.items()}
        outputs = interpret(graph, inputs, weights, float64=True)
        return Whole(graph, derived, weights, inputs, outputs, moved_by_rounding(graph, inputs, weights, outputs))

    def hold(self, backend: str, rng: np.random.Generator, *, runs: int) -> None:
        """Compare the entries of the graph's step on a backend, over random schedules, with the graph over all
        tokens.
        """
        rounded = find_backend(backend).compile(self.graph, Target("cpu"), self.weights)(**self.inputs)
        off = {
            n: max(np.abs(np.asarray(rounded[n]) - x).max(), self.moved[n].by.max()) for n, x in self.outputs.items()
        }

        def check(output: str, found: Array, row: int, first: int, end: int) -> None:
            """Check results in float64: their error may be 3e-6 of the scale, or four times the larger of the whole
            model's error on this backend and the effect of roundings.

            Some models amplify roundings.
            """
            whole = self.outputs[output]
            wanted, scale = whole[row, first:end], max(1.0, float(np.abs(whole).max()))
            np.testing.assert_allclose(found, wanted, rtol=0, atol=max(3e-6 * scale, 4 * off[output]))

        run = OnBackend(self.derived, backend, self.weights)
        for _ in range(runs):
            Schedule(self.derived, self.inputs, rng).run(run.filled(rng), check)


@lru_cache(maxsize=2)
def whole(name: str) -> tuple[Whole, np.random.Generator]:
    """Return a model's graph over all tokens, for all backends, and the state of the generator after it was drawn."""
    rng = np.random.default_rng(5)
    return Whole.of(optimized(MODELS[name]), rng), rng


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_steps_give_what_the_whole_gives(name: str, backend: str) -> None:
    if reason := find_backend(backend).available():
        pytest.skip(reason)
    made, rng = whole(name)
    made.hold(backend, deepcopy(rng), runs=2)


SAME_BITS = [name for name in MODELS if name not in ("summed", "counted", "spread", "oddly_named", "repeated")]
"""Models whose steps on the TVM backend are bitwise identical to the whole model. Excluded are sums, which continue
from a rounded sum, and arithmetic on positions, which a step has per row and computes in other chains.
"""


@pytest.mark.parametrize("name", SAME_BITS)
def test_on_tvm_a_step_has_the_bits_of_the_whole(name: str) -> None:
    if reason := find_backend("tvm").available():
        pytest.skip(reason)
    graph = optimized(MODELS[name])
    derived = derive_step(graph)
    rng = np.random.default_rng(6)
    weights = {n: x.astype(np.float32) for n, x in drawn_weights(graph, rng).items()}
    inputs = drawn_inputs(graph, derived.axis, rng)
    inputs = {n: x.astype(np.float32) if x.dtype.kind == "f" else x for n, x in inputs.items()}
    outputs = find_backend("tvm").compile(graph, Target("cpu"), weights)(**inputs)

    def check(output: str, found: Array, row: int, first: int, end: int) -> None:
        np.testing.assert_array_equal(found, np.asarray(outputs[output])[row, first:end])

    run = OnBackend(derived, "tvm", weights)
    Schedule(derived, inputs, rng).run(run.filled(rng), check)


IN_BF16 = ["gpt2", "llama, windows", "windows", "captioned"]
"""Models whose attention is only to their own tokens. Inputs that are passed once for a row (a source text) would be
stored in bf16.
"""


@pytest.mark.parametrize("name", IN_BF16)
def test_on_tvm_a_step_of_a_model_in_bf16_has_the_bits_of_the_whole_with_products_in_bf16(name: str) -> None:
    """The attention of a step reads queries, keys and values before rounding; the whole model's attention in bf16 reads
    them rounded.

    So the step is bitwise identical to the whole model without attention in bf16. The model with attention in bf16
    agrees within rounding.
    """
    if reason := find_backend("tvm").available():
        pytest.skip(reason)
    passes = passes_of([Recognize(), MergeOps(), Precision("bf16")])
    narrow, products = (
        PassManager(each).run(MODELS[name].graph()).graph
        for each in (passes, [p for p in passes if not isinstance(p, NarrowAttention)])
    )
    derived = derive_step(narrow)
    rng = np.random.default_rng(6)
    weights = {n: x.astype(np.float32) for n, x in drawn_weights(narrow, rng).items()}
    inputs = drawn_inputs(narrow, derived.axis, rng)
    inputs = {n: x.astype(np.float32) if x.dtype.kind == "f" else x for n, x in inputs.items()}
    outputs = find_backend("tvm").compile(products, Target("cpu"), weights)(**inputs)
    rounded = find_backend("tvm").compile(narrow, Target("cpu"), weights)(**inputs)
    assert any((np.asarray(outputs[n]) != np.asarray(rounded[n])).any() for n in outputs)
    moved = moved_by_rounding(narrow, inputs, weights, interpret(narrow, inputs, weights, float64=True))

    def check(output: str, found: Array, row: int, first: int, end: int) -> None:
        np.testing.assert_array_equal(found, np.asarray(outputs[output])[row, first:end])
        whole = np.asarray(rounded[output])[row, first:end]
        off = room(spacing_of(f32), float(np.abs(whole).max()), float(moved[output].by[row].max()))
        np.testing.assert_allclose(found, whole, rtol=0, atol=off)

    run = OnBackend(derived, "tvm", weights)
    Schedule(derived, inputs, rng).run(run.filled(rng), check)
