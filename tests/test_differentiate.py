"""Differentiation of whole functions: small models, compared with finite differences and with PyTorch's autograd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import treadle.frontends.language as t
from treadle.ir.builder import Builder, Expr
from treadle.ir.composites import body_of
from treadle.ir.errors import GraphError
from treadle.ir.graph import Graph, Value
from treadle.ir.interpreter import interpret
from treadle.ir.op_registry import OPS, op
from treadle.ir.operation import Composite, Operand, Primitive
from treadle.ir.transforms.differentiate import backward, body_gradient
from treadle.ir.transforms.gradients import gradient_graph
from treadle.ir.transforms.inline import inline_calls
from treadle.ir.types import boolean
from treadle.ir.verifier import verify
from treadle.models.bert import bert
from treadle.models.gpt2 import gpt2

Array = np.ndarray[Any, Any]
SIZES = {"B": 2, "S": 5}


def with_gradients(graph: Graph) -> Graph:
    """Return the graph without calls, with inputs d.OUTPUT for the float outputs, and outputs d.NAME for the float
    arguments.

    d.NAME is the gradient of the sum over outputs of output * d.OUTPUT. Arguments without a gradient have no output.
    """
    flat = inline_calls(graph)
    b = Builder(flat)
    main, nodes = flat.main, list(flat.main.nodes)
    given: dict[Value, Expr] = {}
    for name, value in main.outputs.items():
        if value.type.dtype.is_float:
            seed = b.input(f"d.{name}", value.type)
            given[value] = given[value] + seed if value in given else seed
    arguments = [v for v in main.arguments if not v.name.startswith("d.")]
    found = backward(b, nodes, given)
    main.outputs |= {f"d.{v.name}": found[v].value for v in arguments if v in found}
    verify(flat)
    return flat


def drawn(graph: Graph, seed: int = 0) -> tuple[dict[str, Array], dict[str, Array]]:
    """Draw inputs and weights in float64; integers are from 1 to 4, and serve as rows of a table and as lengths of up
    to S = 5.
    """
    rng = np.random.default_rng(seed)

    def draw(value: Value) -> Array:
        shape = value.type.evaluate(SIZES)
        if value.type.dtype is boolean:
            return rng.random(shape) < 0.5
        return rng.standard_normal(shape) if value.type.dtype.is_float else rng.integers(1, 5, shape)

    return {v.name: draw(v) for v in graph.main.inputs}, {n: draw(v) for n, v in graph.parameters.items()}


def check_by_differences(graph: Graph) -> Graph:
    """Compare each gradient, along a random direction, with central differences of the outputs."""
    made = with_gradients(graph)
    inputs, weights = drawn(made)
    results = interpret(made, inputs, weights, float64=True)
    rng = np.random.default_rng(1)
    step = 1e-5

    def loss(at: Mapping[str, Array]) -> float:
        given = {n: at.get(n, a) for n, a in inputs.items() if not n.startswith("d.")}
        found = interpret(graph, given, {n: at.get(n, a) for n, a in weights.items()}, float64=True)
        return sum(float((a * inputs[f"d.{n}"]).sum()) for n, a in found.items() if f"d.{n}" in inputs)

    floats = [v.name for v in graph.main.arguments if v.type.dtype.is_float]
    for name in floats:
        value = {**inputs, **weights}[name]
        direction = rng.standard_normal(value.shape)
        ahead, behind = (loss({name: value + s * direction}) for s in (step, -step))
        gradient = float((results[f"d.{name}"] * direction).sum()) if f"d.{name}" in results else 0.0
        # The difference is off by step^2 f''' / 6, about 1e-10 here, and by the rounding of the loss divided by the
        # step: 2^-53 * 100 / 1e-5, about 1e-9. Gradients are of the order of 1, small ones near 0.
        np.testing.assert_allclose((ahead - behind) / (2 * step), gradient, rtol=1e-6, atol=1e-6, err_msg=name)
    return made


# -- models --------------------------------------------------------------------------------------------------------

SMALL = {"vocab": 7, "context": 6, "dim": 12, "heads": 3, "layers": 2, "hidden": 10}


def test_gpt2() -> None:
    made = check_by_differences(gpt2.configure(**SMALL).graph())
    names = [n.removeprefix("d.") for n in made.main.outputs if n.startswith("d.")]
    assert names == list(made.parameters), "every weight learns; the table is used twice and has one gradient"


@pytest.mark.parametrize("head", ["pooler", "masked_lm"])
def test_bert(head: str) -> None:
    made = check_by_differences(bert.configure(**SMALL, head=head, inputs=("lengths", "token_types"), types=5).graph())
    assert {n.removeprefix("d.") for n in made.main.outputs if n.startswith("d.")} == set(made.parameters)


@t.model
def grouped(x: t.f32["B S 8"]):
    """A model with rotary positions, grouped heads, a window, a soft-cap, a gated network, and norms without means."""
    y = t.rms_norm(x, name="n1")
    y = t.multi_head_attention(
        y, y, 4, kv_heads=2, mask=t.causal & t.window(3), softcap=2.0, rotate=lambda v: v * 0.5 + t.sin(v), name="attn"
    )
    return x + y + t.gated_mlp(t.rms_norm(x + y, name="n2"), 6)


def test_parts_of_newer_models() -> None:
    check_by_differences(grouped.graph())


@t.model
def mixture(x: t.f32["B S 6"], mask: t.boolean["B S"]):
    """A model whose values have many uses: several results, a choice, a lookup, a split and a join, a convolution,
    scans.
    """
    best, where = t.top_k(x, k=2)
    chosen = t.where(t.rearrange(mask, pattern="b s -> b s 1"), t.tanh(x), x * x)
    table = t.parameter("table", 6, 3)
    looked = t.embedding(table, where)
    joined = t.concat(t.slice(chosen, axis=2, start=1, stop=5), best, t.reduce_max(looked, axes=(2,)), axis=2)
    scanned = t.rearrange(t.cumsum(joined, axis=1), pattern="b s c -> b c s")
    mixed = t.convolution(scanned, 4, (3,), padding=(2, 0), name="conv")
    return {"mixed": mixed, "norm": t.reduce_sum(x * x, axes=(2,)) ** 0.5}


def test_values_that_go_many_ways() -> None:
    check_by_differences(mixture.graph())


def test_a_block_against_torch() -> None:
    """A block written in Treadle and in PyTorch, both in float64."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    heads, dim = 2, 8

    @t.model
    def model(tokens: t.i64["B S"]):
        x = t.embed(tokens, 7, dim, name="wte")
        for _ in t.stack("h", 2):
            x += t.self_attention(t.layer_norm(x, name="ln_1"), heads, causal=True, name="attn")
            x += t.mlp(t.layer_norm(x, name="ln_2"), 12, name="mlp")
        return t.unembed(x, tied="wte")

    made = with_gradients(model.graph())
    inputs, weights = drawn(made)
    found = interpret(made, inputs, weights, float64=True)

    w = {name: torch.tensor(array, requires_grad=True) for name, array in weights.items()}

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Any, name: str) -> Any:
        return F.layer_norm(x, (dim,), w[f"{name}.weight"], w[f"{name}.bias"])

    x = F.embedding(torch.tensor(inputs["tokens"]), w["wte.weight"])
    for i in range(2):
        y = norm(x, f"h.{i}.ln_1")
        q, k, v = (linear(y, f"h.{i}.attn.{p}").unflatten(-1, (heads, -1)).transpose(1, 2) for p in "qkv")
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(y, f"h.{i}.attn.out")
        x = x + linear(F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.up")), f"h.{i}.mlp.down")
    logits = x @ w["wte.weight"].T
    logits.backward(torch.tensor(inputs["d.logits"]))

    np.testing.assert_allclose(found["logits"], logits.detach().numpy(), rtol=1e-10, atol=1e-10)
    for name, tensor in w.items():
        # Constants in gradients, such as GELU's 1/sqrt(2 pi), are float32, with a relative error of up to 2^-25. (The
        # bias of keys shifts all scores of a query equally, so its gradient is 0 except for rounding.)
        wanted = tensor.grad.numpy()
        within = 2.0**-23 * max(abs(wanted).max(), 1.0)
        np.testing.assert_allclose(found[f"d.{name}"], wanted, rtol=0, atol=within, err_msg=name)


# -- sums of gradients ---------------------------------------------------------------------------------------------


def gradient_of(make: Any, **arrays: Array) -> dict[str, Array]:
    """Return the gradients of sum(value) by the inputs, where `make` builds the value from inputs with these
    numbers.
    """
    b = Builder(Graph("g"))
    inputs = {n: b.input(n, f"f64[{', '.join(map(str, a.shape))}]") for n, a in arrays.items()}
    result = make(b, *inputs.values())
    ones = b.expand(b.constant(1.0, result.dtype), shape=result.shape) if result.rank else b.constant(1.0, result.dtype)
    found = backward(b, list(b.function.nodes), {result.value: ones})
    gradients = {n: found[x.value] for n, x in inputs.items() if x.value in found}
    assert all(g.type == inputs[n].type for n, g in gradients.items())
    b.outputs(**gradients)
    verify(b.graph)
    return interpret(b.graph, arrays)


X = np.array([0.5, -1.0, 2.0])


def test_a_value_used_in_several_places_has_the_sum() -> None:
    assert gradient_of(lambda b, x: x * x, x=X)["x"].tolist() == (2 * X).tolist()
    assert gradient_of(lambda b, x: x + x + x, x=X)["x"].tolist() == [3.0, 3.0, 3.0]
    np.testing.assert_allclose(gradient_of(lambda b, x: b.exp(x) * x, x=X)["x"], np.exp(X) * (1 + X), rtol=1e-14)
    assert gradient_of(lambda b, x: b.concat(x, x * 2.0, x, axis=0), x=X)["x"].tolist() == [4.0, 4.0, 4.0]
    same = gradient_of(lambda b, x: b.einsum(x, x, equation="i, i ->"), x=X)
    assert same["x"].tolist() == (2 * X).tolist()


def test_a_value_that_is_several_operands_of_a_composite() -> None:
    x = np.random.default_rng(0).standard_normal((1, 1, 4, 3))
    apart = gradient_of(lambda b, q, k, v: b.attention(q, k, v), q=x, k=x, v=x)
    at_once = gradient_of(lambda b, x: b.attention(x, x, x), x=x)
    np.testing.assert_allclose(at_once["x"], apart["q"] + apart["k"] + apart["v"], rtol=1e-12, atol=1e-13)


def test_weights_that_do_not_reach_the_output_have_no_gradient() -> None:
    def make(b: Builder, x: Expr, y: Expr) -> Expr:
        b.exp(y)
        return x * 2.0

    assert set(gradient_of(make, x=X, y=X)) == {"x"}


def test_no_gradient_passes_what_is_constant_between_steps() -> None:
    assert gradient_of(lambda b, x: x + b.floor_divide(x, 2.0), x=X)["x"].tolist() == [1.0, 1.0, 1.0]
    assert gradient_of(lambda b, x: b.where(x > 0.0, x * 3.0, 0.0), x=X)["x"].tolist() == [3.0, 0.0, 3.0]
    by_index = gradient_of(lambda b, x: b.gather(x, b.argmax(x, axis=0), axis=0), x=X)
    assert by_index["x"].tolist() == [0.0, 0.0, 1.0]


def test_an_op_without_a_gradient_is_refused_with_the_users_line() -> None:
    """The error occurs in main and within a body, but not if the gradient is not needed."""
    try:

        @op("test_bare", axes="... -> ...", dtypes="f -> f")
        class Bare(Primitive):
            """y = 3 x, with no gradient defined"""

            x = Operand()

            def reference(self, x: Any) -> Any:
                return 3 * x

        @op("test_around", axes="..., i -> ...", dtypes="f, i -> f")
        class Around(Composite):
            """y = 3 x + 3 i, where i is an integer"""

            x = Operand()
            i = Operand()
            inside: bool = True

            def body(self, b: Builder, x: Expr, i: Expr) -> Any:
                shift = b.reduce_sum(b.apply("test_bare", i.cast(x.dtype)), axes=(0,))
                return (b.apply("test_bare", x) if self.inside else x * 3.0) + shift

        report = r"op test_bare has no gradient: its class does not define `gradient`\n  from      .*test_differentiate"
        with pytest.raises(GraphError, match=report):
            gradient_of(lambda b, x: b.apply("test_bare", x), x=X)
        with pytest.raises(GraphError, match=report):
            gradient_of(lambda b, x: b.apply("test_around", x, b.iota(size=2)), x=X)
        found = gradient_of(lambda b, x: b.apply("test_around", x, b.iota(size=2), inside=False), x=X)
        assert found["x"].tolist() == [3.0, 3.0, 3.0]

        @t.model
        def model(x: t.f32["B 4"]):
            return {"loss": t.reduce_sum(t.test_bare(t.linear(x, 2, name="w")), axes=(0, 1))}

        graph = model.graph()
        with pytest.raises(GraphError, match=report):
            gradient_graph(graph, "loss", list(graph.parameters))
    finally:
        for name in ("test_bare", "test_around"):
            OPS.pop(name, None)


def test_broadcasting_sums() -> None:
    found = gradient_of(lambda b, x, y: x * y, x=np.ones((2, 1)), y=X)
    assert found["x"].tolist() == [[1.5], [1.5]]
    assert found["y"].tolist() == [2.0, 2.0, 2.0]


def test_one_of_several_results() -> None:
    found = gradient_of(lambda b, x: b.top_k(x, k=2)[0], x=X)
    assert found["x"].tolist() == [1.0, 0.0, 1.0]


def test_a_given_gradient_and_one_that_is_found_add() -> None:
    """y is an output, and another node reads y, too."""
    b = Builder(Graph("g"))
    x = b.input("x", "f64[3]")
    y = x * 2.0
    z = y * 3.0
    ones = b.constant(np.ones(3))
    found = backward(b, list(b.function.nodes), {y.value: ones, z.value: ones})
    b.outputs(dx=found[x.value], dy=found[y.value])
    results = interpret(b.graph, {"x": X})
    assert (results["dx"].tolist(), results["dy"].tolist()) == ([8.0] * 3, [4.0] * 3)


def test_gradients_of_gradients() -> None:
    """d/dx of d/dx x^4 / 12 is x^2; of tanh, -2 tanh (1 - tanh^2)."""

    def twice(f: Any) -> Any:
        def make(b: Builder, x: Expr) -> Expr:
            y = f(b, x)
            ones = b.constant(np.ones(3))
            return backward(b, list(b.function.nodes), {y.value: ones})[x.value]

        return make

    fourth = gradient_of(twice(lambda b, x: x * x * x * x * (1 / 12)), x=X)["x"]
    np.testing.assert_allclose(fourth, X * X, rtol=1e-14)
    tanh = np.tanh(X)
    curved = gradient_of(twice(lambda b, x: b.tanh(x)), x=X)["x"]
    np.testing.assert_allclose(curved, -2 * tanh * (1 - tanh**2), rtol=1e-13)


def test_a_value_that_is_two_results_at_once() -> None:
    try:  # registered here, not on import, because the suites run all ops that are registered when tests are collected

        @op("test_twins", axes="... -> ..., ...", dtypes="f -> f, f")
        class Twins(Composite):
            """y, z = 2 x, 2 x: one value of the body is returned as both results."""

            x = Operand()

            def body(self, b: Builder, x: Expr) -> tuple[Expr, Expr]:
                y = x * 2.0
                return y, y

        b = Builder(Graph("g"))
        x = b.input("x", "f64[3]")
        seeds = [b.constant(np.full(3, s)) for s in (1.0, 10.0)]
        (gradient,) = body_gradient(Twins(), b, seeds, [x])
        assert gradient is not None
        b.outputs(dx=gradient)
        assert interpret(b.graph, {"x": X})["dx"].tolist() == [22.0, 22.0, 22.0]
        assert len(body_of(Twins(), [x.type]).outputs) == 2
    finally:
        OPS.pop("test_twins", None)


def test_a_gradient_of_another_type_than_its_operand_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPS["neg"], "gradient", lambda op, b, grads, inputs, outputs: [b.cast(grads[0], to="f16")])
    b = Builder(Graph("g"))
    y = -b.input("x", "f32[B, 3]")
    with pytest.raises(GraphError, match="neg: the gradient of an operand has another type than the operand") as caught:
        backward(b, list(b.function.nodes), {y.value: b.input("g", y.type)})
    assert caught.value.received == "f16[B, 3] for f32[B, 3]"


def test_gradient_nodes_say_where_they_come_from() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[3]")
    with b.scoped("h.0"):
        y = b.tanh(x)
    count = len(b.function.nodes)
    backward(b, list(b.function.nodes), {y.value: b.constant(np.ones(3, np.float32))})
    added = b.function.nodes[count:]
    assert added
    forward = b.function.nodes[0]
    assert {(n.scope, n.source) for n in added} == {("h.0", forward.source)}
    assert b.scope == ""


def test_a_call_is_refused() -> None:
    graph = gpt2.configure(**SMALL).graph()
    b = Builder(graph)
    logits = graph.main.outputs["logits"]
    with pytest.raises(GraphError, match="cannot differentiate a call of h") as caught:
        backward(b, list(graph.main.nodes), {logits: b.input("d", logits.type)})
    assert "inline_calls(graph)" in (caught.value.hint or "")
