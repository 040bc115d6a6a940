"""What a declaration may say of its inputs and its stacks."""

from __future__ import annotations

import numpy as np
import pytest

import treadle.frontends.language as t
from treadle.ir.errors import GraphError
from treadle.ir.interpreter import interpret
from treadle.ir.parser import parse_graph
from treadle.ir.printer import print_graph


@t.model
def rows(x: t.f32["B width"], y: t.f32["B 2*width"] | None, *, width=4, scale=2.0):
    return x * scale if y is None else y * scale


def test_an_axis_named_as_a_configured_integer_has_its_size() -> None:
    declared = rows.configure(width=3, inputs=("y",))
    assert [str(i.type) for i in declared.declared_inputs] == ["f32[B, 3]", "f32[B, 6]"]
    graph = declared.graph()
    assert [str(v.type) for v in graph.main.inputs] == ["f32[B, 3]", "f32[B, 6]"]
    assert set(graph.symbols) == {"B"}
    assert str(rows.declared_inputs[0].type) == "f32[B, 4]"


def test_an_option_that_is_no_integer_names_no_size() -> None:
    @t.model
    def scaled(x: t.f32["scale"], *, scale=2.0):
        return x * scale

    assert set(scaled.graph().symbols) == {"scale"}


@t.model
def repeated(x: t.f32["B 4"], *, depth=3, shared=True):
    with t.scope("encoder"):
        for _ in t.stack("layer", depth, shared=shared):
            x = t.tanh(t.linear(x, 4, name="step"))
    return {"y": x}


def test_a_shared_stack_has_the_weights_of_one_layer() -> None:
    graph = repeated.graph()
    assert list(graph.parameters) == ["encoder.layer.step.weight", "encoder.layer.step.bias"]
    assert len(repeated.configure(shared=False).graph().parameters) == 6
    calls = [node for node in graph.main.nodes if node.op.callee is not None]
    assert [call.op.callee for call in calls] == ["encoder_layer"] * 3
    assert parse_graph(print_graph(graph)) == graph

    rng = np.random.default_rng(0)
    weight, bias, x = rng.standard_normal((4, 4)), rng.standard_normal(4), rng.standard_normal((2, 4))
    weights = {"encoder.layer.step.weight": weight, "encoder.layer.step.bias": bias}
    found = interpret(graph, {"x": x.astype(np.float32)}, weights, float64=True)["y"]
    expected = x.astype(np.float32).astype(np.float64)
    for _ in range(3):
        expected = np.tanh(expected @ weight.T + bias)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_layers_of_a_shared_stack_must_agree() -> None:
    @t.model
    def tapered(x: t.f32["B 8"]):
        for i in t.stack("layer", 2, shared=True):
            x = t.linear(x, 8 // 2**i, name="step")
        return x

    with pytest.raises(GraphError, match=r"parameter layer.step.weight is used with two types"):
        tapered.graph()
