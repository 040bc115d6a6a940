"""Smoothed products: the norms that feed weights, the vector between them, and the results of a smoothed graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import treadle
from tests.golden import Golden
from treadle.ir.builder import Builder
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import PassError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.printer import print_graph
from treadle.ir.transforms.balances import Balance, balances_of, norm_of, vector_name
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.transforms.encoded_weights import encode_parameters, encode_weights, given_parameters, quantized_alike
from treadle.passes.framework.manager import PassManager
from treadle.passes.quantization.plan_checking import check_encoded_products, check_quantization
from treadle.passes.quantization.planning import plan_quantization
from treadle.passes.quantization.quantize import QuantizeWeights, encode_activations

Array = np.ndarray[Any, Any]

TEXT = """graph g {
  symbols B
  parameters {
    n.weight: f32[16]
    n.bias: f32[16]
    layer.{0..1}.a.weight: f32[16, 16]
    layer.{0..1}.b.weight: f32[16, 16]
    layer.{0..1}.n.weight: f32[16]
    out.weight: f32[16, 24]
    tied.weight: f32[32, 16]
    twice.weight: f32[8, 16]
  }
  block layer(x: f32[B, 16]) -> (y: f32[B, 16])
    weights a.weight: f32[16, 16], b.weight: f32[16, 16], n.weight: f32[16]
  {
    a = linear(x, $a.weight)
    b = linear(x, $b.weight)
    c = mul(a, b)
    y = rms_norm(c, $n.weight)
    return y = y
  }
  main(x: f32[B, 16], i: i64[B]) -> (y: f32[B, 24], z: f32[B, 32], t: f32[B, 8], u: f32[B, 8]) {
    n = layer_norm(x, $n.weight, $n.bias)
    h = layer(n) with layer.0
    g = layer(h) with layer.1
    y = matmul(g, $out.weight)
    e = gather($tied.weight, i, axis=0)
    z = linear(n, $tied.weight)
    t = linear(n, $twice.weight)
    u = linear(e, $twice.weight)
    return y = y, z = z, t = t, u = u
  }
}"""

WANTED = (
    Balance("layer.0.balance", "n.weight", "n.bias", *[("layer.0.a.weight", "layer.0.b.weight")] * 2),
    Balance("layer.1.balance", "layer.0.n.weight", None, *[("layer.1.a.weight", "layer.1.b.weight")] * 2),
    Balance("out.balance", "layer.1.n.weight", None, *[("out.weight",)] * 2),
)


@pytest.fixture(scope="module")
def declared() -> Graph:
    return parse_graph(TEXT)


@pytest.fixture(scope="module")
def weights(declared: Graph) -> dict[str, Array]:
    """Return weights whose channels have very different sizes, and one channel that is always 0."""
    rng = np.random.default_rng(3)
    made = {}
    for name, value in declared.parameters.items():
        made[name] = rng.standard_normal(value.type.static_shape).astype(np.float32)
        if name.endswith(("n.weight", "n.bias")):
            made[name] *= np.exp(1.5 * rng.standard_normal(16)).astype(np.float32)
            made[name][5] = 0
    return made


@pytest.fixture(scope="module")
def rounded(declared: Graph) -> Graph:
    return PassManager((QuantizeWeights("int8"),)).run(declared).graph


def test_each_norm_that_feeds_weights_of_its_own_is_balanced(declared: Graph, rounded: Graph) -> None:
    plan = plan_quantization(declared, "int8")
    check_quantization(plan, declared)
    assert plan.balances == WANTED
    report = {(a.function, a.name): a.reason.partition("; ")[2] for a in plan.activations}
    assert report == {
        ("layer", "x"): "smoothed",
        ("main", "g"): "smoothed",
        ("main", "n"): "not smoothed: rows of tied.weight are looked up",
        ("main", "e"): "not smoothed: no norm with a gain produces it",
    }
    assert "layer.0.balance, layer.1.balance" not in str(plan)
    assert balances_of(rounded) == WANTED
    assert set(given_parameters(rounded)) == set(declared.parameters)
    assert plan_quantization(declared, "int8-weights").balances == ()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"gain": "layer.1.n.weight"}, "linear reads it without the result of layer.1.n.weight"),
        ({"shift": None}, "linear reads it without the result of n.weight"),
        ({"weights": ("tied.weight",)}, "tied.weight is smoothed by layer.0.balance, but gather reads it"),
        ({"weights": ("n.weight",)}, "is not in 8-bit rows, or is smoothed twice"),
        ({"vector": "out.balance"}, "out.balance is already the name of another value"),
        ({"vector": "n.bias"}, "n.bias is already the name of another value"),
    ],
)
def test_a_wrong_balance_is_caught(declared: Graph, change: dict[str, Any], what: str) -> None:
    plan = plan_quantization(declared, "int8")
    first, *others = plan.balances
    with pytest.raises(PassError, match="the quantization plan is wrong") as error:
        check_quantization(replace(plan, balances=(replace(first, **change), *others)), declared)
    assert what in str(error.value)


def test_values_that_share_a_weight_with_an_unbalanced_value_are_not_balanced() -> None:
    lines = (
        "e = gather($tied.weight, i, axis=0)",
        "u = linear(e, $twice.weight)",
        "n = layer_norm(x, $n.weight, $n.bias)",
    )
    text = TEXT.replace("    z = linear(n, $tied.weight)\n", "").replace(", z: f32[B, 32]", "").replace("z = z, ", "")
    for line in lines:
        text = text.replace(f"    {line}\n", "")
    text = text.replace("    h = layer(n)", "".join(f"    {line}\n" for line in lines) + "    h = layer(n)")
    report = {a.name: a.reason.partition("; ")[2] for a in plan_quantization(parse_graph(text), "int8").activations}
    assert report["e"] == "not smoothed: no norm with a gain produces it"
    assert report["n"] == "not smoothed: other products read twice.weight"


def test_values_unbalanced_in_another_call_are_not_balanced() -> None:
    """Calls of `second` use `one.w` and `two.w`. In main, another product reads `two.w` with an operand that is not
    smoothed.
    """
    blocks = "".join(
        f"""
  block {name}(x: f32[B, 16]) -> (y: f32[B, 16])
    weights n: f32[16], w: f32[16, 16]
  {{
    n = rms_norm(x, $n)
    {op} = linear(n, $w)
    y = {op}({op})
    return y = y
  }}"""
        for name, op in (("first", "exp"), ("second", "tanh"))
    )
    text = f"""graph g {{
  symbols B
  parameters {{
    one.n: f32[16]
    one.w: f32[16, 16]
    two.n: f32[16]
    two.w: f32[16, 16]
  }}{blocks}
  main(x: f32[B, 16], e: f32[B, 16]) -> (y: f32[B, 16], z: f32[B, 16]) {{
    a = first(x) with one
    b = second(a) with one
    y = second(b) with two
    z = linear(e, $two.w)
    return y = y, z = z
  }}
}}"""
    report = [
        (a.function, a.reason.partition("; ")[2]) for a in plan_quantization(parse_graph(text), "int8").activations
    ]
    assert report == [
        ("first", "not smoothed: other products read one.w"),
        ("second", "not smoothed: other products read two.w"),
        ("main", "not smoothed: no norm with a gain produces it"),
    ]


@pytest.mark.parametrize("balances", [WANTED[1:], (replace(WANTED[0], vector="out.balance"), *WANTED[1:])])
def test_a_vector_that_meets_other_weights_is_caught(rounded: Graph, balances: tuple[Balance, ...]) -> None:
    check_encoded_products(rounded, WANTED)
    with pytest.raises(PassError, match=r"layer.0.a.weight, smoothed by .*, is multiplied with values"):
        check_encoded_products(rounded, balances)


def test_the_vector_and_the_blocks_are_computed_of_the_weights(rounded: Graph, weights: dict[str, Array]) -> None:
    held = encode_weights(rounded, weights)
    size = 3 * np.abs(weights["n.weight"]) + np.abs(weights["n.bias"])
    largest = np.maximum(*(np.abs(weights[f"layer.0.{n}.weight"]).max(axis=0) for n in "ab"))
    s = np.sqrt(size / largest)
    s[5] = 1  # the channel that is always 0
    np.testing.assert_allclose(held["layer.0.balance"], 1 / s, rtol=1e-6)
    near = Encoding("int8_rows").decode(held["layer.0.a.weight"]) / s
    step = np.abs(weights["layer.0.a.weight"] * s).max(axis=-1, keepdims=True) / 127
    assert (np.abs(near - weights["layer.0.a.weight"]) <= 0.501 * step / s).all()
    assert encode_weights(rounded, held).keys() == held.keys()
    np.testing.assert_array_equal(encode_weights(rounded, held)["layer.0.balance"], held["layer.0.balance"])


def test_a_balanced_graph_means_what_the_declared_one_does(
    declared: Graph, rounded: Graph, weights: dict[str, Array]
) -> None:
    """The numbers are near the results with decoded blocks, and nearer to the declared model than without smoothing."""
    held, x = encode_weights(rounded, weights), np.random.default_rng(5).standard_normal((40, 16)).astype(np.float32)
    inputs = {"x": x, "i": np.arange(40) % 32}
    wanted = interpret(declared, inputs, weights)
    alike = quantized_alike(declared, rounded)
    assert set(alike.parameters) == set(rounded.parameters)
    got, meant = interpret(rounded, inputs, held), interpret(alike, inputs, held)
    without = clone_graph(declared)
    encode_activations(without, plan_quantization(without, "int8").activations)
    without = encode_parameters(without, plan_quantization(declared, "int8").encodings)
    other = interpret(without, inputs, encode_weights(without, weights))
    for name in ("y", "z", "t", "u"):
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(got[name], meant[name], rtol=0, atol=0.05 * scale)
        np.testing.assert_allclose(meant[name], wanted[name], rtol=0, atol=0.05 * scale)
    assert _error(got["y"], wanted["y"]) < 0.7 * _error(other["y"], wanted["y"])


def _error(x: Array, y: Array) -> float:
    return float(np.sqrt(np.mean((x - y) ** 2)))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_model_takes_its_weights_without_vectors_and_gives_them_all(name: str) -> None:
    small = {"layers": 2, "dim": 64, "heads": 4, "vocab": 96}
    plain = treadle.compile(name, **small)
    made = treadle.compile(name, weights=plain.weights, quantize="int8", **small)
    plan = plan_quantization(plain.graph, "int8")
    assert set(balances_of(made.graph)) == set(plan.balances)
    first = plan.balances[0]
    assert len(first.weights) == 3
    assert [w for w in first.weights if ".v." in w] == list(first.by)  # but not queries and keys
    assert set(made.weights) - set(plain.weights) == {b.vector for b in balances_of(made.graph)}


NAMED = """graph g {
  symbols B
  parameters { h.w: f32[8, 16] h.m: f32[16, 4] g: f32[16] plain.w: f32[8, 16] }
  main(x: f32[B, 16]) -> (y: f32[B, 8], z: f32[B, 4], t: f32[B, 8]) {
    r = rms_norm(x, $g)      # f32[B, 16]  m.py:3  norm
    y = linear(r, $h.w)      # f32[B, 8]   m.py:4  h
    z = matmul(r, $h.m)      # f32[B, 4]   m.py:5  h
    t = linear(x, $plain.w)  # f32[B, 8]   m.py:6  plain
    return y = y, z = z, t = t
  }
}"""


def test_decodes_of_weights_name_their_source(golden: Golden) -> None:
    """Decoded weights have scopes and lines, too. Numbers times a vector have the weight's scope, and the line of its
    first reader.
    """
    graph = parse_graph(NAMED)
    encodings = {name: Encoding("int8_rows", axis=axis) for name, axis in (("h.w", -1), ("h.m", 0), ("plain.w", -1))}
    balance = Balance("h.balance", "g", None, ("h.w", "h.m"), ("h.w", "h.m"))
    golden("text_form/balanced.txt", print_graph(encode_parameters(graph, encodings, [balance])))


@pytest.mark.parametrize(
    ("weights", "taken", "name"),
    [
        (("attn.q.weight", "attn.k.weight"), (), "attn.balance"),
        (("attn.q.weight", "attn.k.weight"), ("attn.balance",), "attn.balance_2"),
        (("attn.q.weight", "attn.k.weight"), ("attn.balance", "attn.balance_2"), "attn.balance_3"),
        (("h.0.up.weight",), (), "h.0.up.balance"),
        (("h.0.up.weight", "h.1.up.weight"), (), "h.balance"),
        (("a.up.weight", "b.up.weight"), (), "balance"),
        (("h.up.weight", "h.weight"), (), "h.balance"),
        (("weight",), (), "balance"),
    ],
)
def test_the_name_of_a_vector(weights: tuple[str, ...], taken: tuple[str, ...], name: str) -> None:
    assert vector_name(weights, taken.__contains__) == name


def test_values_without_a_norm_have_no_gain() -> None:
    b = Builder(Graph("g"))
    x, gain, shift = b.input("x", "f32[2, 8]"), b.parameter("g", "f32[8]"), b.parameter("s", "f32[8]")
    y, total = b.add_layer_norm(x, x, gain, shift)
    both = {"layer_norm": b.layer_norm(x, gain, shift), "add": y}
    assert {name: norm_of(each.value) for name, each in both.items()} == dict.fromkeys(both, (gain.value, shift.value))
    assert norm_of(b.rms_norm(x, gain).value) == (gain.value, None)
    assert norm_of(b.layer_norm(x, None, None).value) == (None, None)
    assert [norm_of(v) for v in (None, x.value, total.value, b.exp(x).value)] == [None] * 4
    rows = b.gather(b.slice(both["add"], axis=0, stop=1), b.constant(0), axis=0)
    assert norm_of(rows.value) == (gain.value, shift.value)
    assert norm_of(b.slice(y, axis=1, stop=4).value) is None


def test_the_query_of_a_token_that_alone_is_read_is_balanced_by_itself() -> None:
    small = {"dim": 32, "heads": 2, "layers": 2, "hidden": 64, "vocab": 50, "head": "classifier"}
    exe, whole = treadle.compile("bert", quantize="int8", **small), treadle.compile("bert", **small)
    vectors = [name for name in exe.graph.parameters if name.startswith("layer.1.") and name.endswith(".balance")]
    assert vectors == ["layer.1.attn.q.balance", "layer.1.attn.balance", "layer.1.mlp.up.balance"]
    tokens = np.arange(20).reshape(2, 10)
    got, wanted = exe(tokens=tokens)["logits"], whole(tokens=tokens)["logits"]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=0.05 * np.abs(wanted).max())


def test_a_vector_is_the_root_of_what_channels_come_to_over_what_weights_have(declared: Graph) -> None:
    """s[k] = sqrt((3 |gain[k]| + |shift[k]|) / max |w[n, k]|), with the maximum over the weights that count; 1 for a
    channel of zeros.
    """
    balance = Balance("v", "n.weight", "n.bias", ("tied.weight", "twice.weight"), ("twice.weight",))
    weights = {name: np.ones(declared.parameters[name].type.static_shape, np.float32) for name in balance.read}
    weights["n.weight"][:3], weights["n.bias"][:3] = (-4, 1, 0), (4, -5, 0)
    weights["twice.weight"][:, :3] = [[1, -2, 1]] * 8
    weights["tied.weight"] *= 100
    found = balance.factors(declared, weights)
    assert found is not None
    assert found.tolist() == [4.0, 2.0, 1.0, *[2.0] * 13]
    for wrong in ({"n.weight": None}, {"n.bias": np.ones(15)}, {"tied.weight": np.ones((32, 16), np.int8)}):
        assert balance.factors(declared, weights | wrong) is None
    assert balance.read == ("tied.weight", "twice.weight", "n.weight", "n.bias")
