"""Outlining: repetitions that become calls of one function, with unchanged results."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import treadle.frontends.declarations as declarations
import treadle.frontends.language as t
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.text.parser import parse_graph
from treadle.ir.transforms.inline import inline_calls
from treadle.ir.verifier import verify


def spelled_out(model: t.Model) -> Graph:
    """Return the model's graph as traced, before any region becomes a function."""
    with patch.object(declarations, "outline_regions", lambda graph, regions: None):
        graph = model.graph()
    assert list(graph.functions) == ["main"]
    return graph


def calls(graph: Graph) -> dict[str, int]:
    """Return the number of calls of each function, counted in all functions together."""
    return dict(Counter(node.op.callee for _, node in graph.walk() if node.op.callee is not None))


def values_of(graph: Graph) -> dict[str, Any]:
    """Return the outputs in float64 on drawn inputs and weights; inputs of equal names have equal numbers."""

    def drawn(name: str, shape: tuple[int, ...]) -> Any:
        return np.random.default_rng(list(name.encode())).standard_normal(shape)

    sizes = dict.fromkeys(graph.symbols, 3)
    inputs = {v.name: drawn(v.name, v.type.evaluate(sizes)) for v in graph.main.inputs}
    weights = {name: drawn(name, v.type.evaluate({})) for name, v in graph.parameters.items()}
    return interpret(graph, inputs, weights, float64=True)


def check(model: t.Model, expected: dict[str, int]) -> Graph:
    """Check that the graph verifies, has these numbers of calls, prints and parses, and returns the results of the
    traced graph.
    """
    plain = values_of(spelled_out(model))
    graph = model.graph()
    verify(graph)
    assert calls(graph) == expected
    assert set(graph.functions) == {*expected, "main"}
    assert parse_graph(str(graph)) == graph
    flat = inline_calls(graph)
    verify(flat)
    for computed in (values_of(graph), values_of(flat)):
        assert list(computed) == list(plain)
        for name, array in computed.items():
            np.testing.assert_array_equal(array, plain[name])
    return graph


def scaled(x: t.Tensor, name: str = "w") -> t.Tensor:
    return x * t.parameter(name, 4)


def test_equal_blocks_are_one_function() -> None:
    @t.model
    def model(x: t.f32["B 4"], *, layers=5):
        for _ in t.stack("h", layers):
            x = t.tanh(t.linear(x, 4, name="up")) + x
        return x

    graph = check(model, {"h": 5})
    assert len(graph.functions["h"].nodes) == 3
    assert list(graph.functions["h"].parameters) == ["up.weight", "up.bias"]
    assert [n.scope for n in graph.main.nodes] == [f"h.{i}" for i in range(5)]
    check(model.configure(layers=1), {"h": 1})


def test_no_repetitions() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        for _ in t.stack("h", 0):
            x = scaled(x)
        return x + 1.0

    check(model, {})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda x: t.softmax(x, axis=-1), lambda x: t.softmax(x, axis=0)),
        (lambda x: x * 2.0, lambda x: x * 3.0),
        (lambda x: x + 0.0, lambda x: x + -0.0),
        (lambda x: x + t.constant(np.arange(4.0, dtype=np.float32)), lambda x: x + t.constant([0.0, 1.0, 2.0, 4.0])),
        (lambda x: x * t.parameter("w", 4), lambda x: x * t.parameter("w", 1)),
        (lambda x: x * t.parameter("w", 4), lambda x: x * t.parameter("v", 4)),
        (lambda x: t.exp(x), lambda x: t.tanh(x)),
        (lambda x: t.exp(t.tanh(x)), lambda x: t.tanh(t.exp(x))),
        (lambda x: x - t.tanh(x), lambda x: t.tanh(x) - x),
        (lambda x: x + x * t.parameter("w", 4), lambda x: t.parameter("w", 4) * x + x),
        (lambda x: t.linear(x, 4, name="f"), lambda x: t.linear(x, 4, bias=False, name="f")),
    ],
    ids=[
        "attribute",
        "constant",
        "sign of zero",
        "array",
        "shape",
        "name",
        "op",
        "order",
        "wiring",
        "operands",
        "absent",
    ],
)
def test_a_block_that_differs_has_its_own_function(first: Any, second: Any) -> None:
    @t.model
    def model(x: t.f32["B 4"], *, odd=2):
        for i in t.stack("h", 4):
            x = second(x) if i == odd else first(x)
        return x

    check(model, {"h": 3, "h_2": 1})
    check(model.configure(odd=9), {"h": 4})


def test_a_sign_of_zero_among_attributes_counts() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        found = []
        for i in t.stack("h", 2):
            found.append(t.pad(x, axis=1, after=1, value=(0.0, -0.0)[i]))
        return tuple(found)

    graph = check(model, {"h": 1, "h_2": 1})
    assert [np.signbit(array[0, -1]) for array in values_of(graph).values()] == [False, True]


def test_shapes_that_grow() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        for i in t.stack("h", 4):
            x = t.linear(x, 8 if i < 2 else 4, bias=False, name="f")
        return x

    check(model, {"h": 1, "h_2": 1, "h_3": 1, "h_4": 1})  # 4 -> 8, 8 -> 8, 8 -> 4, 4 -> 4


def test_weights_of_all_repetitions() -> None:
    """As in ALBERT, the weights are declared before the loop: each call passes the same weights."""

    @t.model
    def model(x: t.f32["B 4"]):
        w = t.parameter("w", 4)
        for _ in t.stack("h", 3):
            x = t.tanh(x * w)
        return x

    graph = check(model, {"h": 3})
    assert list(graph.parameters) == ["w"]
    assert {n.operands[1] for n in graph.main.nodes} == {graph.parameters["w"]}


def test_a_weight_from_outside_with_the_name_of_one_inside() -> None:
    @t.model
    def model(x: t.f32["B 4"], *, outside_first=False):
        shared = t.parameter("w", 4)
        for _ in t.stack("h", 2):
            x = t.tanh(x * shared) * t.parameter("w", 4) if outside_first else scaled(x) + shared
        return x

    for outside_first in (False, True):
        graph = check(model.configure(outside_first=outside_first), {"h": 2})
        assert set(graph.parameters) == {"w", "h.0.w", "h.1.w"}
        assert len(graph.functions["h"].parameters) == 2


def test_a_weight_used_twice_is_not_two_weights() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        for i in t.stack("h", 3):
            a = t.parameter("a", 4)
            x = x * a + (a if i == 1 else t.parameter("b", 4))
        return x

    check(model, {"h": 2, "h_2": 1})


def test_a_weight_of_the_layer_before() -> None:
    """If repetition i reads a weight of repetition i - 1, the weight has another name in the block, so the repetition
    gets a separate function.
    """

    @t.model
    def model(x: t.f32["B 4"]):
        for i in t.stack("h", 3):
            x = scaled(x) + (t.shared_parameter(f"h.{i - 1}.w") if i else 1.0)
        return x

    graph = check(model, {"h": 1, "h_2": 1, "h_3": 1})
    assert set(graph.parameters) == {"h.0.w", "h.1.w", "h.2.w"}


def test_stacks_in_stacks() -> None:
    @t.model
    def model(x: t.f32["B 4"], *, odd=None):
        with t.scope("body"):
            for i in t.stack("stage", 3):
                for j in t.stack("h", 2):
                    x = t.tanh(scaled(x) * (3.0 if (i, j) == odd else 2.0))
                x = scaled(x, "after")
        return x

    graph = check(model, {"body_stage_h": 2, "body_stage": 3})
    assert [n.scope for n in graph.functions["body_stage"].nodes] == ["h.0", "h.1", ""]
    assert list(graph.functions["body_stage"].parameters) == ["h.0.w", "h.1.w", "after"]
    # the repetition that differs makes its stage differ as well
    check(model.configure(odd=(1, 0)), {"body_stage_h": 5 - 2, "body_stage_h_2": 1, "body_stage": 2, "body_stage_2": 1})


def test_two_stacks_with_one_body_share_it() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        for side in ("left", "right"):
            with t.scope(side):
                for _ in t.stack("h", 2):
                    x = t.tanh(scaled(x))
        return x

    graph = check(model, {"left_h": 4})
    assert set(graph.parameters) == {f"{side}.h.{i}.w" for side in ("left", "right") for i in range(2)}


def test_a_stack_called_main() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        for _ in t.stack("main", 2):
            x = t.tanh(scaled(x))
        return x

    graph = check(model, {"main_2": 2})
    assert list(graph.parameters) == ["main.0.w", "main.1.w"]


def test_values_that_leave_from_some_repetitions_only() -> None:
    """The function has all results that any call needs."""

    @t.model
    def model(x: t.f32["B 4"]):
        inner, kept = None, []
        for i in t.stack("h", 4):
            scores = t.softmax(scaled(x), name="scores")
            mixed = t.tanh(scores, name="mixed")
            x = mixed + x
            if i == 1:
                inner = mixed
            if i in (0, 3):
                kept.append(scores)
        return {"x": x, "inner": inner * 2.0, "first": kept[0], "last": kept[1]}

    graph = check(model, {"h": 4})
    assert len(graph.functions["h"].outputs) == 3


def test_results_of_one_name() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        found = []
        for _ in t.stack("h", 2):
            first = t.tanh(x, name="y")
            second = t.exp(first, name="y_2")
            x = t.sigmoid(second, name="y")
            found += [first, second, x]
        return tuple(found)

    graph = check(model, {"h": 2})
    assert list(graph.functions["h"].outputs) == ["y", "y_2", "y_3"]


def test_an_op_of_several_results() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        picked = None
        for _ in t.stack("h", 3):
            values, picked = t.top_k(scaled(x), k=4)
            x = x + values
        return {"x": x, "picked": picked}

    check(model, {"h": 3})


def test_inputs_that_some_repetitions_read_twice() -> None:
    @t.model
    def model(x: t.f32["B 4"], memory: t.f32["B 4"]):
        for i in t.stack("h", 3):
            x = x * (x if i == 1 else memory)
        return x

    check(model, {"h": 2, "h_2": 1})


def test_inputs_of_one_name() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        a, b = t.tanh(x, name="z"), t.exp(x, name="z")
        for _ in t.stack("h", 2):
            a, b = b * 2.0, a - b
        return {"a": a, "b": b}

    graph = check(model, {"h": 2})
    assert len({v.name for v in graph.functions["h"].inputs}) == 2


def test_blocks_without_weights_and_without_ops() -> None:
    @t.model
    def model(x: t.f32["B 4"], *, layers=3):
        for i in t.stack("h", layers):
            if i != 1:
                x = t.tanh(x)
        for _ in t.stack("nothing", 2):
            pass
        return x

    check(model, {"h": 2})


def test_a_repetition_that_makes_nothing_anyone_reads() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        for _ in t.stack("h", 2):
            scaled(x)
        return x + 1.0

    graph = check(model, {"h": 2})
    assert graph.functions["h"].outputs == {}


@pytest.mark.parametrize("leave", ["break", "return", "raise"])
def test_leaving_a_loop_early(leave: str) -> None:
    """The part of the last repetition before the exit becomes a separate block, and later ops stay outside."""

    class Done(Exception):
        pass

    def body(x: t.Tensor) -> t.Tensor:
        for i in t.stack("h", 5):
            x = scaled(x)
            if i == 2:
                if leave == "return":
                    return x
                if leave == "raise":
                    raise Done(x)
                break
            x = t.tanh(x)
        return x

    @t.model
    def model(x: t.f32["B 4"]):
        try:
            x = body(x)
        except Done as done:
            x = done.args[0]
        return scaled(x, "after")

    graph = check(model, {"h": 2, "h_2": 1})
    assert list(graph.parameters) == ["h.0.w", "h.1.w", "h.2.w", "after"]


def test_a_stack_beside_another_iterator() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        for _, name in zip(t.stack("h", 4), ("a", "a", "b"), strict=False):
            x = scaled(x, name)
        return x

    graph = check(model, {"h": 2, "h_2": 1})
    assert list(graph.parameters) == ["h.0.a", "h.1.a", "h.2.b"]


def test_an_input_and_a_weight_may_be_outputs() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        w = t.parameter("w", 4)
        y = x
        for _ in t.stack("h", 2):
            y = y * w
        return {"x": x, "w": w, "y": y, "c": t.constant(2.0)}

    check(model, {"h": 2})


def test_labels_tell_equal_types_apart() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        for i in t.stack("h", 2):
            x = t.linear(x, t.Dim.of(4, ("ffn", "model")[i]), bias=False, name="f")
        return x

    check(model, {"h": 1, "h_2": 1})


def test_lines_and_scopes_survive() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        for _ in t.stack("h", 2):
            with t.scope("inner"):
                x = t.tanh(x)
        return x

    graph = model.graph()
    plain = spelled_out(model)
    (node,) = graph.functions["h"].nodes
    assert node.scope == "inner"
    assert node.source == plain.main.nodes[0].source
    assert [n.scope for n in inline_calls(graph).main.nodes] == [n.scope for n in plain.main.nodes]
    assert {str(n.source) for n in graph.main.nodes} != {str(node.source)}, "a call's line is the loop's"
