"""Inputs, parameters and stacks in a model declaration."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import treadle.frontends.language as t
from treadle.entry_functions import compile
from treadle.ir.errors import FrontendError, GraphError
from treadle.ir.interpreter import interpret
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.printer import print_graph


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


def test_a_shared_stack_in_a_shared_stack() -> None:
    @t.model
    def nested(x: t.f32["B 4"]):
        for _ in t.stack("outer", 2, shared=True):
            x = t.linear(x, 4, bias=False, name="first")
            for _ in t.stack("inner", 2, shared=True):
                x = t.linear(x, 4, bias=False, name="step")
        return x

    assert list(nested.graph().parameters) == ["outer.first.weight", "outer.inner.step.weight"]


def twice_in_a_row(x: t.Tensor) -> t.Tensor:
    return t.linear(t.linear(x, 4, name="step"), 4, name="step")


def two_stacks(x: t.Tensor) -> t.Tensor:
    for _ in range(2):
        for _ in t.stack("h", 2):
            x = t.linear(x, 4, name="step")
    return x


def twice_in_a_shared_stack(x: t.Tensor) -> t.Tensor:
    for _ in t.stack("h", 2, shared=True):
        x = twice_in_a_row(x)
    return x


def again_after_a_shared_stack(x: t.Tensor) -> t.Tensor:
    for i in t.stack("h", 2, shared=True):
        x = t.linear(x, 4, name=f"step{i}")
    return t.linear(x, 4, name="h.step0")


def one_model_twice(x: t.Tensor) -> t.Tensor:
    return repeated(repeated(x, depth=1)["y"], depth=1)["y"]


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (twice_in_a_row, "step.weight"),
        (two_stacks, "h.0.step.weight"),
        (twice_in_a_shared_stack, "h.step.weight"),
        (again_after_a_shared_stack, "h.step0.weight"),
        (one_model_twice, "encoder.layer.step.weight"),
    ],
)
def test_two_layers_of_one_name_are_refused(body: Callable[[t.Tensor], t.Tensor], name: str) -> None:
    @t.model
    def declared(x: t.f32["B 4"]):
        return body(x)

    with pytest.raises(FrontendError, match=f"parameter {name} is declared twice") as caught:
        declared.graph()
    assert f"t.shared_parameter('{name}')" in str(caught.value.hint)


def test_a_table_is_shared_by_asking_for_it() -> None:
    @t.model
    def translation(tokens: t.i64["B S"], answers: t.i64["B T"]):
        x, y = t.embed(tokens, 10, 4, name="shared"), t.embed(answers, tied="shared")
        return t.unembed(y + t.reduce_mean(x, axes=(1,), keep=True), tied="shared")

    assert list(translation.graph().parameters) == ["shared.weight"]

    @t.model
    def neither(tokens: t.i64["B S"]):
        return t.embed(tokens, 10, name="wte")

    with pytest.raises(FrontendError, match="embed needs count, dim and name=, or tied="):
        neither.graph()


@pytest.mark.parametrize("size", ["S", "2*S+1", -4])
def test_a_parameter_has_a_size_that_is_known(size: str | int) -> None:
    @t.model
    def biased(x: t.f32["B S"]):
        return x + t.parameter("offset", size)

    with pytest.raises(FrontendError, match="the shape of parameter offset must consist of numbers, 0 or more"):
        biased.graph()


def test_an_input_has_no_negative_size() -> None:
    assert str(rows.configure(width=0).declared_inputs[0].type) == "f32[B, 0]"
    with pytest.raises(FrontendError, match="input x of model rows has a negative size") as caught:
        rows.configure(width=-2).graph()
    assert caught.value.received == "f32[B, -2]"


def test_an_input_and_an_output_may_have_any_name() -> None:
    @t.model
    def named(self: t.f32["B"], given: t.f32["B"], arrays: t.f32["B"]):
        return {"self": self + given + arrays}

    ones = np.ones(3, np.float32)
    assert compile(named)(self=ones, given=ones, arrays=ones)["self"].tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("positions", "longest"),
    [
        (lambda p: p, 10),
        (lambda p: p + 2, 8),
        (lambda p: 2 + p, 8),
        (lambda p: 1 + p + 2, 7),
        (lambda p: p + p, None),
        (lambda p: p * 2, None),
    ],
)
def test_a_table_of_positions_bounds_their_axis(positions: Callable[[t.Tensor], t.Tensor], longest: int | None) -> None:
    @t.model
    def placed(tokens: t.i64["B S"]):
        return t.embed(positions(t.positions(tokens)), 10, 4, name="position")

    assert placed.graph().symbols["S"] == Bounds(upper=longest)


def test_positions_of_a_fixed_axis_must_fit_from_their_first() -> None:
    @t.model
    def placed(tokens: t.i64["B 8"], *, first=2):
        return t.embed(t.positions(tokens) + first, 10, 4, name="position")

    assert len(placed.graph().parameters) == 1
    with pytest.raises(FrontendError, match="there are 8 positions from 3 on, and 10 rows in the table position"):
        placed.configure(first=3).graph()


def test_a_bound_below_one_is_refused() -> None:
    @t.model
    def bounded(x: t.f32["B S"], *, lower=1):
        t.bound("S", lower=lower, upper=8)
        return x

    assert bounded.graph().symbols["S"] == Bounds(1, 8)
    with pytest.raises(GraphError, match="S cannot have a lower bound below 1"):
        bounded.configure(lower=0).graph()
