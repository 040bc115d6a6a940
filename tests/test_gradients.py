"""Gradients of whole graphs, with blocks as functions and activations saved or recomputed, compared with the same graph
without calls.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import treadle.frontends.language as t
from tests.sharded_models import small_options
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.builder import Builder
from treadle.ir.errors import GraphError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.text.parser import parse_graph
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.transforms.differentiate import backward
from treadle.ir.transforms.gradients import GRADIENT, gradient_graph
from treadle.ir.transforms.inline import inline_calls
from treadle.ir.transforms.training_losses import with_cross_entropy, with_distillation, with_own_loss
from treadle.ir.verifier import verify
from treadle.models.registry import family_names, find_family
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT
from treadle.program.weights import initial_weights

Array = np.ndarray[Any, Any]


def with_squares(graph: Graph) -> Graph:
    """Return the graph with an additional output `squares`: the sum of squares of all elements of its float outputs."""
    b = Builder(clone_graph(graph))
    found = None
    for value in list(b.graph.main.outputs.values()):
        if value.type.dtype.is_float:
            x = b.expr(value)
            squares = b.reduce_sum(x * x, axes=tuple(range(x.rank))) if x.rank else x * x
            found = squares if found is None else found + squares
    assert found is not None
    b.graph.main.outputs["squares"] = found.value
    return b.graph


def flat_gradients(graph: Graph, loss: str) -> Graph:
    """Return the graph without calls, with its weights as parameters, and with the gradients of all weights."""
    flat = inline_calls(graph)
    b, main = Builder(flat), flat.main
    found = backward(b, list(main.nodes), {main.outputs[loss]: b.constant(1, main.outputs[loss].type.dtype)})
    main.outputs |= {GRADIENT + n: found[v].value for n, v in main.parameters.items() if v in found}
    return flat


def drawn(graph: Graph, seed: int = 0) -> tuple[dict[str, Array], dict[str, Array]]:
    sizes = {symbol: max(bounds.lower, min(4, bounds.upper or 4)) for symbol, bounds in graph.symbols.items()}
    rng = np.random.default_rng(seed)
    weights = initial_weights(graph, seed)
    # weights that begin as zeros or ones would hide errors in gradients
    return draw_inputs(graph, sizes, [seed]), {
        n: a + rng.standard_normal(a.shape).astype(a.dtype) / 8 for n, a in weights.items()
    }


@pytest.mark.parametrize("family", family_names())
def test_every_family_has_the_gradients_of_its_graph_without_calls(family: str) -> None:
    model = find_family(family).model
    graph = with_squares(model.configure(**small_options(family)).graph())
    inputs, weights = drawn(graph)
    wanted = interpret(flat_gradients(graph, "squares"), inputs, weights, float64=True)
    calls = sum(node.op.callee is not None for node in graph.main.nodes)
    for recompute in (False, True):
        made = gradient_graph(graph, "squares", list(weights), recompute=recompute)
        verify(made)
        assert parse_graph(str(made)) == made
        assert not made.parameters
        # a block's gradient is a function, too; the number of nodes is the same at any depth
        assert sum(node.op.callee is not None for node in made.main.nodes) >= 2 * calls
        found = interpret(made, {**inputs, **weights}, {}, float64=True)
        assert set(found) == set(wanted)
        for name, array in wanted.items():
            scale = max(1.0, float(abs(array).max(initial=0)))
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-9 * scale, err_msg=f"{name}, {recompute}")


@t.model
def stacked(x: t.f32["B S 8"], *, layers: int = 4):
    for _ in t.stack("h", layers):
        x += t.mlp(t.rms_norm(x, name="norm"), 16, name="mlp")
    return {"y": x}


@pytest.mark.parametrize("layers", [2, 9])
def test_a_block_and_its_gradient_are_one_function_each_at_any_depth(layers: int) -> None:
    graph = with_squares(stacked.configure(layers=layers).graph())
    made = gradient_graph(graph, "squares", list(graph.parameters))
    # the first block's input depends on no weight, so the gradient by that input is not needed
    assert [n for n in made.functions if n != "main"] == ["h", "h_gradient", "h_2", "h_2_gradient"]
    again = gradient_graph(graph, "squares", list(graph.parameters), recompute=True)
    assert [len(again.functions[n].outputs) for n in ("h", "h_2")] == [1, 1]
    assert len(made.functions["h_2"].outputs) > 1


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_that_are_not_trained_stay_weights(recompute: bool) -> None:
    graph = with_squares(stacked.graph())
    inputs, weights = drawn(graph)
    trained = [n for n in weights if n.startswith("h.2.") and "up" in n]
    made = gradient_graph(graph, "squares", trained, recompute=recompute)
    verify(made)
    assert [v.name for v in made.main.inputs] == ["x", *trained]
    assert set(made.parameters) == set(weights) - set(trained)
    assert list(made.main.outputs) == ["y", "squares", *[GRADIENT + n for n in trained]]
    called = [node.op.callee for node in made.main.nodes if node.op.callee]
    assert sum("gradient" in name for name in called) == 2, (
        "nothing is asked of blocks before the first that is trained"
    )
    wanted = interpret(flat_gradients(graph, "squares"), inputs, weights, float64=True)
    held = {n: weights[n] for n in made.parameters}
    found = interpret(made, {**inputs, **{n: weights[n] for n in trained}}, held, float64=True)
    for name, array in found.items():
        np.testing.assert_allclose(array, wanted[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_views_are_not_saved() -> None:
    @t.model
    def model(x: t.f32["B S 8"]):
        for _ in t.stack("h", 2):
            y = t.rearrange(t.linear(x, 8, name="w"), pattern="b s (h=2 d) -> b h s d")
            x = x + t.rearrange(y * y, pattern="b h s d -> b s (h d)")
        return {"y": x}

    made = gradient_graph(with_squares(model.graph()), "squares", ["h.0.w.weight", "h.1.w.weight"])
    kept = list(made.functions["h_2"].outputs)
    assert kept == ["x", "w"], "the product, and not its heads"
    assert made.functions["h_2_gradient"].nodes[0].op.name == "rearrange"


def test_a_weight_that_the_loss_does_not_depend_on_has_no_gradient() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        return {"a": t.linear(x, 2, name="a"), "b": t.linear(x, 2, name="b")}

    b = Builder(model.graph())
    b.graph.main.outputs["loss"] = b.reduce_sum(b.expr(b.graph.main.outputs["a"]), axes=(0, 1)).value
    made = gradient_graph(b.graph, "loss", list(b.graph.parameters))
    assert [n for n in made.main.outputs if n.startswith(GRADIENT)] == ["gradient.a.weight", "gradient.a.bias"]
    assert {v.name for v in made.main.inputs} == {"x", "a.weight", "a.bias", "b.weight", "b.bias"}


@t.model
def crossed(x: t.f32["B 4"], *, layers: int = 3):
    """A model whose last block has an unused `side`, so the loss does not depend on the last `b`."""
    y = side = t.linear(x, 4, name="w")
    for _ in t.stack("h", layers):
        y, side = y + t.tanh(t.linear(side, 4, name="a")), t.tanh(t.linear(y, 4, name="b"))
    return {"loss": t.reduce_sum(y * y, axes=(0, 1)), "side": side}


@t.model
def crossed_within(x: t.f32["B 4"], *, layers: int = 2):
    """Nested blocks in which an output of the inner block is unused."""
    y = side = t.linear(x, 4, name="w")
    for _ in t.stack("g", 2):
        for _ in t.stack("h", layers):
            y, side = y + t.tanh(t.linear(side, 4, name="a")), t.tanh(t.linear(y, 4, name="b"))
    return {"loss": t.reduce_sum(y * y, axes=(0, 1)), "side": side}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("model", [crossed, crossed_within])
def test_a_weight_whose_only_way_to_the_loss_is_an_unread_result_has_no_gradient(model: Any, recompute: bool) -> None:
    """A gradient of zeros would still let weight decay change the weight."""
    graph = model.graph()
    made = gradient_graph(graph, "loss", list(graph.parameters), recompute=recompute)
    without = {name for name in graph.parameters if GRADIENT + name not in made.main.outputs}
    last = "h.2.b" if model is crossed else "g.1.h.1.b"
    assert without == {f"{last}.weight", f"{last}.bias"}
    assert model is crossed or made.functions["g"].nodes[0].op.callee == "g_h"
    inputs, weights = drawn(graph)
    found = interpret(made, {**inputs, **weights}, {}, float64=True)
    wanted = interpret(flat_gradients(graph, "loss"), inputs, weights, float64=True)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-9, atol=1e-12, err_msg=name)


def test_passes_leave_gradients_as_they_are() -> None:
    graph = with_cross_entropy(find_family("gpt2").model.configure(**small_options("gpt2")).graph(), "logits")
    inputs, weights = drawn(graph)
    made = gradient_graph(graph, "loss", list(weights))
    given = {**inputs, **weights}
    before, after = (interpret(g, given, {}, float64=True) for g in (made, PassManager(DEFAULT).run(made).graph))
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-6, atol=1e-7 * max(1, abs(array).max()), err_msg=name)


def with_scores(*shape: int) -> Graph:
    b = Builder(Graph("scores"))
    b.outputs(logits=b.input("x", f"f32[{', '.join(map(str, shape))}]") * 1.0)
    return b.graph


def test_losses_are_sums_over_what_counts() -> None:
    rng = np.random.default_rng(0)
    x, teacher = (rng.standard_normal((2, 3, 5)).astype(np.float32) for _ in range(2))
    targets = np.array([[1, -100, 4], [-100, -100, 0]])
    found = interpret(with_cross_entropy(with_scores(2, 3, 5), "logits"), {"x": x, "targets": targets}, {})
    logs = np.log(np.exp(x) / np.exp(x).sum(-1, keepdims=True))
    wanted = -(logs[0, 0, 1] + logs[0, 2, 4] + logs[1, 2, 0])
    assert (float(found["loss"]), float(found["counted"])) == (pytest.approx(wanted, rel=1e-5), 3)

    def softened(x: Array) -> Array:
        e = np.exp(x / 2)
        return e / e.sum(-1, keepdims=True)

    p, q = softened(teacher), softened(x)
    apart = (4 * p * np.log(p / q)).sum(-1)
    graph = with_distillation(with_scores(2, 3, 5), "logits", 2.0, 0.25)
    found = interpret(graph, {"x": x, "targets": targets, "teacher": teacher}, {})
    mixed = 0.75 * wanted + 0.25 * (apart[0, 0] + apart[0, 2] + apart[1, 2])
    assert (float(found["loss"]), float(found["counted"])) == (pytest.approx(mixed, rel=1e-5), 3)


def test_a_loss_of_the_models_own_counts_as_one() -> None:
    b = Builder(Graph("own"))
    x = b.input("x", "f32[3]")
    b.outputs(y=x, far=b.reduce_sum(x * x, axes=(0,)))
    found = interpret(with_own_loss(b.graph, "far"), {"x": np.arange(3, dtype=np.float32)}, {})
    assert {name: float(value) for name, value in found.items()} == {"loss": 5, "counted": 1}


@pytest.mark.parametrize(
    ("make", "error", "report"),
    [
        (lambda g: gradient_graph(g, "logits", []), GraphError, "must be an output that is a scalar"),
        (lambda g: gradient_graph(with_squares(g), "squares", ["w"]), GraphError, "the graph has no weight w"),
        (lambda g: with_cross_entropy(g, "logit"), UsageError, "the model has no output logit"),
        (lambda g: with_cross_entropy(with_squares(g), "squares"), UsageError, "has no classes along its last axis"),
        (lambda g: with_own_loss(g, "logits"), UsageError, "is not a scalar, so it cannot be a loss"),
        (lambda g: with_distillation(g, "logits", 1.0, 1.5), UsageError, "a teacher's share must be from 0 to 1"),
        (lambda g: with_distillation(g, "logits", 0.0, 0.5), UsageError, "a temperature must be above 0"),
        (lambda g: with_cross_entropy(with_cross_entropy(g, "logits"), "loss"), UsageError, "has no classes"),
    ],
)
def test_models_without_a_loss_or_gradient_are_refused(make: Any, error: type[Exception], report: str) -> None:
    with pytest.raises(error, match=report):
        make(with_scores(2, 3, 5))


def test_a_graph_with_states_or_encoded_weights_is_refused() -> None:
    b = Builder(Graph("states"))
    state, x = b.state("cache", "f32[4, 8]"), b.input("x", "f32[2, 2]")
    rows = b.input("rows", "i64[2]")
    b.append(state, x, rows, rows, axis=1)
    b.outputs(loss=b.reduce_sum(x, axes=(0, 1)))
    with pytest.raises(GraphError, match="only a graph with one entry and without states"):
        gradient_graph(b.graph, "loss", [])
    b = Builder(Graph("encoded"))
    w = b.parameter("w", "f32[32, 64] as q8_0")
    b.outputs(loss=b.reduce_sum(b.linear(b.input("x", "f32[2, 64]"), b.decode(w, of="q8_0")), axes=(0, 1)))
    with pytest.raises(GraphError, match="weight w has no gradient"):
        gradient_graph(b.graph, "loss", ["w"])
