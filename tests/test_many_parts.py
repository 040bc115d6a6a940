"""Joins of more parts than there are letters: the rule names all parts, and every stage of the compiler handles
them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.backend_checks import compiled, each_backend, graph_of
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.rules.axis_rule_text import parse_rule
from treadle.ir.sizing.sizes import Size, sum_of_symbols
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.printer import print_graph
from treadle.resolving import resolve

PARTS = 200


def _joined(b: Builder) -> Expr:
    parts = [b.input(f"x{i}", f"f32[B, {1 + i % 3}]") for i in range(PARTS)]
    made: Expr = b.concat(*parts, axis=1)
    return made


def _inputs(graph: Graph, batch: int) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    shapes = {v.name: (batch, v.type.shape[1].evaluate({})) for v in graph.main.inputs}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_names_go_on_after_the_letters() -> None:
    names = axis_letters(200, taken=("a", "a1"))
    assert names[0] == "b"
    assert names[50:54] == ["Z", "a0", "a2", "a3"]
    assert len(set(names)) == 200


def test_a_join_of_many_parts_is_typed_and_reads_back() -> None:
    graph = graph_of(_joined)
    (node,) = graph.main.nodes
    rule = node.op.axis_rule([2] * PARTS)
    assert rule.startswith("a [b], a [c], a [d], ")
    assert rule.endswith("+a146+a147+a148]")
    assert len(parse_rule(rule).factors) == PARTS + 1
    assert str(node.result.type) == f"f32[B, {sum(1 + i % 3 for i in range(PARTS))}]"
    assert parse_graph(print_graph(graph)) == graph


def test_sizes_of_many_parts_may_be_symbols() -> None:
    b = Builder(Graph("symbols"))
    parts = [b.input(f"x{i}", f"f32[S{i}]") for i in range(PARTS)]
    assert b.concat(*parts, axis=0).shape[0] == sum_of_symbols(f"S{i}" for i in range(PARTS))


def test_a_sum_made_at_once_is_the_sum() -> None:
    assert sum_of_symbols(["b", "a", "b"]) == Size.of("a + 2*b")
    assert str(sum_of_symbols(["b", "a", "b"])) == str(Size.of("a + 2*b"))


@each_backend
def test_backends_join_many_parts(backend: str) -> None:
    graph = graph_of(_joined)
    inputs = _inputs(graph, batch=2)
    expected = np.concatenate(list(inputs.values()), axis=1)
    np.testing.assert_array_equal(interpret(graph, inputs)["y"], expected)
    np.testing.assert_array_equal(np.asarray(compiled(backend, graph)(**inputs)["y"]), expected)


def test_many_parts_go_to_onnx_and_back(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from treadle.backends.onnx.exporter import export_onnx

    graph = graph_of(_joined)
    export_onnx(graph, {}, tmp_path / "many.onnx")
    again = resolve(tmp_path / "many.onnx").graph
    assert [node.op.name for node in again.main.nodes] == ["concat"]
    inputs = _inputs(graph, batch=3)
    np.testing.assert_array_equal(interpret(again, inputs)["y"], np.concatenate(list(inputs.values()), axis=1))
