"""Products that are sliced are divided before a model is split: a joined query, key and value, or a gated network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

import treadle as t
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.verifier import verify
from treadle.passes.sharding.divided_products import divide_products
from treadle.passes.stages import Recognize, run
from treadle.program.weights import initial_weights
from treadle.sharding import shard_model, try_in_lab
from treadle.sharding.rank_models import load_part
from treadle.sharding.sharded_models import load_sharded, sharded

Array = np.ndarray[Any, Any]
Tokens = Annotated[t.Tensor, t.i64["B S"]]
DIM, HEADS = 16, 4


def attended(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (t.rearrange(x, pattern=f"b s (h={HEADS} d) -> b h s d") for x in (q, k, v))
    return t.rearrange(t.attention(q, k, v, mask=t.causal), pattern="b h s d -> b s (h d)")


@t.model
def joined(tokens: Tokens, *, vocab: int = 20, layers: int = 3, shared: bool = False) -> t.Tensor:
    """A decoder whose blocks join queries, keys and values, and both halves of a gated network."""
    x = t.embed(tokens, vocab, DIM, name="wte")
    for _ in t.stack("h", layers, shared=shared):
        y = t.linear(t.rms_norm(x, name="n1"), 3 * DIM, name="qkv")
        x += t.linear(attended(y[..., :DIM], y[..., DIM : 2 * DIM], y[..., 2 * DIM :]), DIM, name="out")
        z = t.linear(t.rms_norm(x, name="n2"), 8 * DIM, bias=False, name="gate_up")
        x += t.linear(t.silu(z[..., : 4 * DIM]) * z[..., 4 * DIM :], DIM, bias=False, name="down")
    return t.unembed(x, tied="wte")


def recognized(model: Any) -> Graph:
    return run(model if isinstance(model, Graph) else model.graph(), [Recognize()]).graph


def assert_divided(graph: Graph, count: int, given: dict[str, Array], weights: Any = None) -> Graph:
    """Check that this number of weights is divided, and that the numbers stay equal."""
    made, divided = divide_products(graph)
    verify(made)
    assert len({part.whole for part in divided.parts.values()}) == count
    whole = initial_weights(graph) if weights is None else weights
    parts = divided.of(whole)
    assert set(parts) == set(made.parameters) if weights is None else set(parts) >= set(made.parameters)
    wanted, found = interpret(graph, given, whole), interpret(made, given, dict(parts))
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5)
    assert divide_products(made)[0] is made
    return made


@pytest.mark.parametrize("shared", [False, True])
def test_blocks_are_divided_with_their_calls(shared: bool) -> None:
    graph = recognized(joined.configure(shared=shared))
    made = assert_divided(graph, 3 if shared else 9, {"tokens": np.arange(10).reshape(2, 5)})
    assert [f for f in made.functions if f != "main"] == [f for f in graph.functions if f != "main"]
    assert sum(node.op.name == "linear" for _, node in made.walk()) > sum(
        node.op.name == "linear" for _, node in graph.walk()
    )


def of(body: Callable[[Any], Any]) -> Graph:
    def model(x: Any) -> Any:
        return body(x)

    model.__annotations__["x"] = t.f32["B S 6"]
    return recognized(t.model(model))


X = {"x": np.random.default_rng(0).standard_normal((2, 3, 6)).astype(np.float32)}


def halves(y: Any) -> tuple[Any, Any]:
    return y[..., :4], y[..., 4:]


def of_parts(x: Any) -> dict[str, Any]:
    y = t.rearrange(t.linear(x, 12, name="w"), pattern="b s (p=3 h=2 d) -> p b h s d")
    return {"q": y[0], "k": t.exp(y[1]), "v": y[2]}


def of_uneven_positions(x: Any) -> dict[str, Any]:
    y = t.rearrange(t.linear(x, 12, name="w"), pattern="b s (p=3 d) -> b p s d")
    return {"a": y[:, :1], "b": y[:, 1:]}


def twice(x: Any) -> dict[str, Any]:
    a, b = halves(t.linear(x, 8, name="w"))
    return {"a": a + a, "b": a * b}


@pytest.mark.parametrize("body", [of_parts, of_uneven_positions, twice])
def test_slices_of_all_columns_are_divided(body: Callable[[Any], Any]) -> None:
    assert_divided(of(body), 2, X)


def whole_too(x: Any) -> dict[str, Any]:
    y = t.linear(x, 8, name="w")
    return {"y": y, "a": y[..., :4], "b": y[..., 4:]}


def overlapping(x: Any) -> dict[str, Any]:
    y = t.linear(x, 8, name="w")
    return {"a": y[..., :5], "b": y[..., 3:]}


def with_a_gap(x: Any) -> dict[str, Any]:
    y = t.linear(x, 8, name="w")
    return {"a": y[..., :3], "b": y[..., 4:]}


def strided(x: Any) -> dict[str, Any]:
    y = t.linear(x, 8, name="w")
    return {"a": y[..., ::2], "b": y[..., 1::2]}


def weight_read_twice(x: Any) -> dict[str, Any]:
    w = t.parameter("w", 8, 6)
    a, b = halves(t.matmul(x, w.T))
    return {"a": a, "b": b, "norm": t.reduce_sum(w, axes=(0, 1))}


def heads_first(x: Any) -> dict[str, Any]:
    """Slices of each head need no division: heads are the first factor of the columns."""
    y = t.rearrange(t.linear(x, 12, name="w"), pattern="b s (h=2 d) -> b h s d")
    return {"a": y[..., :3], "b": y[..., 3:]}


@pytest.mark.parametrize("body", [whole_too, overlapping, with_a_gap, strided, weight_read_twice, heads_first])
def test_other_reads_leave_a_product_whole(body: Callable[[Any], Any]) -> None:
    graph = of(body)
    made, divided = divide_products(graph)
    assert made is graph and not divided.parts


def test_a_weight_that_the_model_returns_stays_whole() -> None:
    @t.model
    def mixed(tokens: Tokens) -> Any:
        x = t.embed(tokens, 20, DIM, name="wte")
        for _ in t.stack("h", 2, shared=True):
            y = t.linear(x, 3 * DIM, bias=False, name="qkv")
            x = attended(y[..., :DIM], y[..., DIM : 2 * DIM], y[..., 2 * DIM :])
        return x

    graph = recognized(mixed)
    weight = graph.main.parameters["h.qkv.weight"]
    graph.main.outputs["weight"] = weight  # a reader besides the calls
    made, divided = divide_products(graph)
    assert made is graph and not divided.parts


# -- plans and ranks ---------------------------------------------------------------------------------------------------


def test_a_plan_splits_heads_and_hidden_axes_of_joined_products() -> None:
    plan = shard_model(joined, "tp=2", recipe="megatron")
    placed = {name: placement.text(plan.mesh) for name, placement in plan.weights.items()}
    for part in range(3):
        assert placed[f"h.1.qkv.weight.{part}"] == "[tp, -]" and placed[f"h.1.qkv.bias.{part}"] == "[tp]"
    assert placed["h.1.gate_up.weight.0"] == placed["h.1.gate_up.weight.1"] == "[tp, -]"
    assert placed["h.1.out.weight"] == placed["h.1.down.weight"] == "[-, tp]"
    assert sum(each.op == "all_reduce" for each in plan.collectives()) == 1 + 2 * 3  # the lookup, and two a layer
    assert try_in_lab(plan).passed
    assert "h.0.qkv.weight" in shard_model(joined, "dp=2", recipe="fsdp").weights


@pytest.mark.parametrize("quantize", [None, "int8-weights"])
def test_parts_of_ranks_are_parts_of_the_whole_weights(quantize: str | None, tmp_path: Path) -> None:
    """Also if weights are drawn or quantized: a seed gives the numbers of the unsplit model."""
    unsplit = t.compile(joined, seed=3, backend="numpy", quantize=quantize)
    whole, kind = unsplit.weights["h.2.qkv.weight"], unsplit.graph.parameters["h.2.qkv.weight"].type.encoding
    whole = whole if kind is None else kind.decode(np.asarray(whole))
    made = sharded(joined, "tp=2", recipe="megatron", seed=3, quantize=quantize)
    made.save(tmp_path / "m.treadle")
    again = load_sharded(tmp_path / "m.treadle")
    for rank in range(2):
        for part in range(3):
            rows = whole[part * DIM : (part + 1) * DIM][rank * DIM // 2 : (rank + 1) * DIM // 2]
            for held in (made, again):
                found = held.parts(rank)[f"h.2.qkv.weight.{part}"]
                encoding = held.plan.graph.parameters[f"h.2.qkv.weight.{part}"].type.encoding
                np.testing.assert_array_equal(found if encoding is None else encoding.decode(np.asarray(found)), rows)
    assert load_part(made.plan, 1, None)[0].keys() >= {"h.2.qkv.weight.2"}


def test_given_weights_have_their_own_names() -> None:
    weights = dict(t.compile(joined, seed=5, backend="numpy").weights)
    made = sharded(joined, "tp=2", recipe="megatron", weights=weights)
    np.testing.assert_array_equal(
        np.concatenate([made.parts(rank)["h.0.qkv.bias.1"] for rank in range(2)]),
        weights["h.0.qkv.bias"][DIM : 2 * DIM],
    )


def test_modules_of_pytorch_are_split() -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional

    class Attention(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, form: str) -> None:
            super().__init__()
            self.form, self.qkv, self.out = form, torch.nn.Linear(DIM, 3 * DIM), torch.nn.Linear(DIM, DIM)

        def forward(self, x: Any) -> Any:
            rows, tokens, _ = x.shape
            y = self.qkv(x)
            if self.form == "reshape":
                q, k, v = y.reshape(rows, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
            else:
                parts = y.split(DIM, dim=2) if self.form == "split" else y.chunk(3, -1)
                q, k, v = (a.view(rows, tokens, HEADS, -1).transpose(1, 2) for a in parts)
            z = functional.scaled_dot_product_attention(q, k, v)
            return self.out(z.transpose(1, 2).reshape(rows, tokens, DIM))

    for form in ("split", "chunk", "reshape"):
        model = t.from_torch(Attention(form).eval(), (torch.zeros(2, 5, DIM),), dynamic={"x": "B S _"})
        assert_divided(recognized(model.graph), 2, {"x": np.ones((2, 5, DIM), np.float32)}, model.weights)
        plan = shard_model(model, "tp=2", recipe="megatron")
        assert {plan.weights[f"qkv.weight.{part}"].text(plan.mesh) for part in range(3)} == {"[tp, -]"}
        assert [each.op for each in plan.collectives()] == ["all_reduce"]
        assert try_in_lab(plan).passed
