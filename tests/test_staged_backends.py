"""Third-party backends: a backend with a pipeline and a code generator, one that does everything in `compile`, and
invalid ones.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest

import treadle as t
from tests.backend_checks import block_model, message
from tests.stateful_graphs import counter
from tests.test_models import ZOO
from treadle.backends import registry
from treadle.backends.protocol import Executable, Outputs, ports
from treadle.backends.registry import find_backend
from treadle.backends.staged import StagedBackend, build
from treadle.ir.analysis.drawn_inputs import draw_inputs, small_sizes
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph, Node
from treadle.ir.interpreter import interpret
from treadle.ir.target import Target
from treadle.passes.framework.manager import Pass
from treadle.passes.lowering.hoist_weights import HoistWeights
from treadle.passes.lowering.legalize import Legalize
from treadle.passes.memory.plan_storage import PlanStorage
from treadle.passes.memory.storage_plan import StoragePlan
from treadle.passes.pipelines import DEFAULT


class Interpreted:
    """An executable that runs the graph after the passes, op by op, with the ops' references."""

    def __init__(self, graph: Graph, weights: Mapping[str, Any]) -> None:
        self.graph, self.weights = graph, {name: weights[name] for name in graph.parameters}
        inputs = {v.name: v for v in graph.main.inputs}
        self.inputs, self.outputs, self.source = ports(inputs), ports(graph.main.outputs), str(graph)

    def __call__(self, /, **arrays: Any) -> Outputs:
        return Outputs(interpret(self.graph, arrays, self.weights))


class Primitive(StagedBackend):
    """A code generator that supports only primitives."""

    name = "primitive"

    def pipeline(self, target: Target) -> Sequence[Pass]:
        return (Legalize(), HoistWeights(), PlanStorage())

    def emit(
        self,
        graph: Graph,
        target: Target,
        weights: Mapping[str, Any],
        declared: Graph,
        plan: StoragePlan | None,
    ) -> Executable:
        return Interpreted(graph, weights)


class Whole:
    """A backend in the original form: it does everything in `compile`."""

    name = "whole"

    def available(self) -> str | None:
        return None

    def supports(self, node: Node) -> str | None:
        return None

    def compile(self, graph: Graph, target: Target, weights: Mapping[str, Any]) -> Executable:
        return Interpreted(graph, weights)


class Noted(Whole):
    """A backend that adds notes to its executables."""

    def compile(self, graph: Graph, target: Target, weights: Mapping[str, Any]) -> Executable:
        made = Interpreted(graph, weights)
        made.notes = ["tanh is slow here"]  # type: ignore[attr-defined]
        return made


class Choosy(Primitive):
    """A backend that is not available on any machine, or that refuses an op."""

    why: str | None = None

    def available(self) -> str | None:
        return self.why

    def supports(self, node: Node) -> str | None:
        return "it has no softmax" if node.op.name in ("softmax", "attention") else None


class Absent(Choosy):
    why = "its device is not plugged in"


class WithoutEmit(StagedBackend):
    """A backend with an incomplete interface."""

    name = "half"

    def pipeline(self, target: Target) -> Sequence[Pass]:
        return ()


class Nothing:
    """A class that has only a backend's name."""

    name = "nothing"


CLASSES = {
    "primitive": Primitive,
    "whole": Whole,
    "noted": Noted,
    "choosy": Choosy,
    "absent": Absent,
    "half": WithoutEmit,
    "nothing": Nothing,
}


@pytest.fixture(autouse=True)
def third_parties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a_third_party", sys.modules[__name__])
    points = [EntryPoint(n, f"a_third_party:{c.__name__}", registry.GROUP) for n, c in CLASSES.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)


@pytest.mark.parametrize("name", list(ZOO)[::3])
def test_a_pipeline_and_a_speller_run_models(name: str) -> None:
    """Both backends compute in float32, in different orders: attention in parts, a norm in one step.

    A model of four layers has about 30 products in a row, of at most 60 terms each. Roundings of one sum behave like a
    random walk, so about 8 of them count. 30 times 8, with a safety factor of four, is about 1000.
    """
    model, _ = ZOO[name]
    made, wanted = (t.compile(model, backend=backend, seed=3) for backend in ("primitive", "numpy"))
    assert [(p.name, p.type) for p in made.inputs] == [(p.name, p.type) for p in wanted.inputs]
    inputs = draw_inputs(made.optimized.source, small_sizes(made.optimized.source)[-1], [1])
    got, expected = made(**inputs), wanted(**inputs)
    assert list(got) == list(expected)
    for output, array in expected.items():
        assert got[output].dtype == array.dtype
        bound = 1000 * 2.0**-23 * max(1.0, float(np.max(np.abs(array), initial=0)))
        np.testing.assert_allclose(got[output], array, rtol=0, atol=bound, err_msg=output)


def test_its_passes_are_recorded_after_ours() -> None:
    graph, weights = block_model()
    exe = t.compile(graph, backend="primitive", weights=weights)
    names = [record.name for record in exe.log]
    assert names == [*(each.name for each in DEFAULT), "legalize", "hoist-weights", "plan-storage"]
    legal = exe.optimized.after("legalize")
    assert "layer_norm" in {n.op.name for _, n in exe.graph.walk()} and legal is not exe.graph
    assert "layer_norm" not in {n.op.name for _, n in legal.walk()}
    assert exe.source == str(exe.optimized.after("hoist-weights"))
    rows = exe.log.table().splitlines()[-3:]
    assert [line.split()[0] for line in rows] == ["legalize", "hoist-weights", "plan-storage"]


def test_a_backend_with_compile_alone_still_works() -> None:
    graph, weights = block_model()
    exe, numpy = (t.compile(graph, backend=backend, weights=weights) for backend in ("whole", "numpy"))
    assert [record.name for record in exe.log] == [each.name for each in DEFAULT]
    assert exe.optimized.graph == numpy.optimized.graph and exe.source == str(exe.graph)
    assert exe.optimized.lowered is not None and exe.optimized.lowered.graph is exe.graph
    assert exe.optimized.after("dead-code") == exe.graph
    tokens = np.array([[1, 2, 3]])
    for name, array in numpy(tokens=tokens).items():  # two layers: see backend_checks.TOLERANCE
        np.testing.assert_allclose(exe(tokens=tokens)[name], array, rtol=0, atol=64 * 2.0**-23)


def test_notes_are_the_last_record() -> None:
    graph, weights = block_model()
    exe = t.compile(graph, backend="noted", weights=weights)
    assert [record.name for record in exe.log][-1] == "lower-to-whole"
    assert exe.log[-1].notes == ["tanh is slow here"]
    assert exe.optimized.after("lower-to-whole") is exe.graph


def test_unsupported_nodes_are_refused_before_lowering() -> None:
    graph, weights = block_model()
    text = message(lambda: t.compile(graph, backend="choosy", weights=weights))
    assert "the primitive backend cannot run tiny" in text and "it has no softmax" in text
    text = message(lambda: t.compile(graph, backend="absent", weights=weights))
    assert "backend primitive is not available" in text and "its device is not plugged in" in text


def test_invalid_backends_are_refused_with_a_hint() -> None:
    text = message(lambda: find_backend("half"))
    assert "backend 'half' is not complete" in text and "a class without emit" in text
    assert "name, pipeline(target), and emit(graph, target, weights), as treadle.backends.staged says" in text
    assert "entry point half = a_third_party:WithoutEmit" in text
    text = message(lambda: t.compile(block_model()[0], backend="nothing"))
    assert "backend 'nothing' is not a backend" in text
    assert "it needs name, available, supports and compile" in text
    assert "treadle.backends.staged.StagedBackend with name, pipeline and emit" in text


@pytest.mark.parametrize("backend", [Primitive(), Whole()])
def test_a_backend_without_entries_runs_no_states(backend: Any) -> None:
    graph = counter()
    with pytest.raises(
        BackendError, match=f"the {backend.name} backend supports no states, and only one entry"
    ) as caught:
        build(backend, graph, Target("cpu"), {})
    assert caught.value.received == "counter: entries main; 1 states"
    if isinstance(backend, StagedBackend):
        with pytest.raises(BackendError, match="supports no states"):
            backend.compile(graph, Target("cpu"), {})
