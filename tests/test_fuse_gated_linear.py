"""Gated feed-forward networks become one op. Near misses stay, with a reason. Numbers are the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

import treadle
import treadle.frontends.language as t
from tests.pass_programs import assert_same_numbers, optimize, program
from treadle.explaining.fusion import explain_fusion
from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.ir.ops.activated_products import ACTIVATIONS
from treadle.ir.text.parser import parse_graph
from treadle.passes.cleanup.decompose import Decompose
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT
from treadle.passes.products.fuse_gated_linear import FuseGatedLinear
from treadle.passes.sites.fusion_sites import find_sites

ALONG = ["g: f32[8, 4]", "u: f32[8, 4]", "b: f32[8]", "c: f32[8]"]
ACROSS = ["g: f32[4, 8]", "u: f32[4, 8]", "b: f32[8]", "c: f32[8]"]
MERGED = ["w: f32[16, 4]", "wb: f32[16]"]


def gated(*lines: str, weights: Sequence[str] = ALONG, more: str = "") -> str:
    return program(f"x: f32[B, S, 4]{more}", "y: f32[B, S, 8]", *lines, "return y = y", weights=weights)


FORMS = {
    "swiglu": (
        ALONG[:2],
        ["a = linear(x, $g)", "s = silu(a)", "v = linear(x, $u)", "y = mul(s, v)"],
        "y = gated_linear(x, $g, $u)",
    ),
    "gate-second": (
        ALONG[:2],
        ["v = linear(x, $u)", "a = linear(x, $g)", "s = gelu(a)", "y = mul(v, s)"],
        'y = gated_linear(x, $g, $u, activation="gelu")',
    ),
    "with-biases": (
        ALONG,
        ["a = linear(x, $g, $b)", "s = sigmoid(a)", "v = linear(x, $u, $c)", "y = mul(s, v)"],
        'y = gated_linear(x, $g, $u, $b, $c, activation="sigmoid")',
    ),
    "one-bias": (
        [*ALONG[:2], ALONG[3]],
        ["a = linear(x, $g)", "s = relu(a)", "v = linear(x, $u, $c)", "y = mul(s, v)"],
        'y = gated_linear(x, $g, $u, none, $c, activation="relu")',
    ),
    "bilinear": (
        ALONG[:2],
        ["a = linear(x, $g)", "v = linear(x, $u)", "y = mul(a, v)"],
        'y = gated_linear(x, $g, $u, activation="none")',
    ),
    "of-matmul": (
        ACROSS,
        [
            "d = matmul(x, $g)",
            "a = add(d, $b)",
            "s = gelu_tanh(a)",
            "e = matmul(x, $u)",
            "v = add($c, e)",
            "y = mul(s, v)",
        ],
        'y = gated_linear(x, $g, $u, $b, $c, activation="gelu_tanh", weight_axes="k n")',
    ),
    "of-matmul-without-bias": (
        ACROSS[:2],
        ["a = matmul(x, $g)", "s = tanh(a)", "v = matmul(x, $u)", "y = mul(s, v)"],
        'y = gated_linear(x, $g, $u, activation="tanh", weight_axes="k n")',
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_becomes_one_op(name: str) -> None:
    weights, before, after = FORMS[name]
    made = optimize(gated(*before, weights=weights), FuseGatedLinear())
    assert made.graph == parse_graph(gated(after, weights=weights)), str(made.graph)
    assert_same_numbers(made.source, made.graph)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_may_gate(activation: str) -> None:
    made = optimize(
        gated("a = linear(x, $g)", f"s = {activation}(a)", "v = linear(x, $u)", "y = mul(s, v)", weights=ALONG[:2]),
        FuseGatedLinear(),
    )
    (node,) = made.graph.main.nodes
    assert (node.op.name, node.op.attributes["activation"]) == ("gated_linear", activation)
    assert_same_numbers(made.source, made.graph)


@pytest.mark.parametrize(
    ("product", "weights", "axis", "axes"),
    [("linear(x, $w, $wb)", MERGED, 0, "n k"), ("matmul(x, $w)", ["w: f32[4, 16]"], 1, "k n")],
)
@pytest.mark.parametrize("gate_first", [True, False])
def test_halves_of_a_product_are_products_with_halves_of_its_weight(
    product: str, weights: list[str], axis: int, axes: str, gate_first: bool
) -> None:
    low, high = "slice(h, axis=2, stop=8)", "slice(h, axis=2, start=8)"
    first, second = (low, high) if gate_first else (high, low)
    text = gated(f"h = {product}", f"a = {first}", "s = silu(a)", f"v = {second}", "y = mul(v, s)", weights=weights)
    made = optimize(text, FuseGatedLinear())
    *cuts, node = made.graph.main.nodes
    assert node.op.name == "gated_linear" and node.op.attributes["weight_axes"] == axes
    assert [cut.op.name for cut in cuts] == ["slice"] * len(cuts)
    assert [cut.op.attributes["axis"] for cut in cuts] == [axis, axis, *[0] * (len(cuts) - 2)]
    assert all(cut.inputs[0].kind == "parameter" for cut in cuts), "the sliced value is a weight, sliced only once"
    assert_same_numbers(made.source, made.graph)


X, G, V = "a = linear(x, $g)", "s = silu(a)", "v = linear(x, $u)"
REFUSED = {
    "of-two-values": (
        [X, G, "z = neg(x)", "v = linear(z, $u)", "y = mul(s, v)"],
        ALONG[:2],
        "the gate is a product of input x, but the gated value is a product of a neg",
    ),
    "product-used-elsewhere": (
        [X, G, V, "m = mul(s, v)", "y = add(m, a)"],
        ALONG[:2],
        "the linear is used elsewhere, by add",
    ),
    "gate-used-elsewhere": (
        [X, G, V, "m = mul(s, v)", "y = sub(m, s)"],
        ALONG[:2],
        "the silu is used elsewhere, by sub",
    ),
    "weights-that-lie-in-two-ways": (
        [X, G, "v = matmul(x, $u)", "y = mul(s, v)"],
        [ALONG[0], ACROSS[1]],
        "one weight, the gated product's, has layout [in, out], but the other [out, in]",
    ),
    "halves-of-what-is-computed": (
        [
            *("t = add($w, 1.0)", "h = linear(x, t)", "a = slice(h, axis=2, stop=8)", G),
            *("v = slice(h, axis=2, start=8)", "y = mul(s, v)"),
        ],
        MERGED[:1],
        "gate and up are halves of one product, but its matrix is not a parameter",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_near_miss_is_refused_with_its_reason(name: str) -> None:
    lines, weights, reason = REFUSED[name]
    made = optimize(gated(*lines, weights=weights), FuseGatedLinear())
    assert made.graph == made.source
    assert [refusal.reason for event in made.log for refusal in event.refusals] == [reason]


@pytest.mark.parametrize(
    ("lines", "weights"),
    [
        (["a = linear(x, $g)", "v = relu(a)", "y = mul(v, a)"], ALONG[:1]),  # both factors come from one product
        ([X, "z = neg(x)", "v = linear(z, $u)", "y = mul(a, v)"], ALONG[:2]),  # two products without an activation
        # both factors are the same half
        (["h = linear(x, $w)", "a = slice(h, axis=2, stop=8)", G, "y = mul(a, s)"], MERGED[:1]),
        (
            ["m = matmul(x, $g)", "a = add(m, $b)", G, "v = matmul(x, $u)", "y = mul(s, v)"],
            ["g: f32[4, 1]", "u: f32[4, 8]", "b: f32[8]"],
        ),  # the bias broadcasts the product
    ],
)
def test_what_is_no_gate_is_left_alone(lines: list[str], weights: list[str]) -> None:
    made = optimize(gated(*lines, weights=weights), FuseGatedLinear())
    assert made.graph == made.source
    assert [refusal for event in made.log for refusal in event.refusals] == []


def test_it_is_certified_and_a_body_becomes_the_op_again() -> None:
    weights, before, after = FORMS["with-biases"]
    once = PassManager(DEFAULT, certify=True).run(parse_graph(gated(*before, weights=weights)))
    assert once.graph == parse_graph(gated(after, weights=weights))
    assert "gated-linear" in {c.rule for record in once.log for c in record.certificates}
    again = PassManager([Decompose(), *DEFAULT]).run(once.graph)
    assert again.graph == once.graph
    assert "gated_linear" not in str(again.after("decompose"))


@t.model
def network(x: t.f32["B S 12"]):
    return t.gated_mlp(x, 20, act=t.silu)


@pytest.mark.parametrize("backend", ["numpy", "torch", "tvm"])
def test_every_backend_computes_it(backend: str) -> None:
    if backend != "numpy":
        pytest.importorskip(backend)
    exe = treadle.compile(network, backend=backend, seed=3)
    assert [node.op.name for node in exe.graph.main.nodes] == ["gated_linear", "linear"]
    x = np.random.default_rng(0).standard_normal((2, 5, 12)).astype(np.float32)
    gate, up, down = (np.asarray(exe.weights[f"mlp.{n}.weight"], np.float64) for n in ("gate", "up", "down"))
    g = x @ gate.T
    wanted = (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T
    (found,) = exe(x=x).values()
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=0, atol=1e-6 * max(1, np.abs(wanted).max()))


# -- sites -----------------------------------------------------------------------------------------------------------


def sites(graph: Graph) -> list[str]:
    return [site.kind for site in find_sites(graph) if site.op is None]


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_a_site(name: str) -> None:
    weights, before, after = FORMS[name]
    assert sites(parse_graph(gated(*before, weights=weights))) == ["gate"]
    assert sites(parse_graph(gated(after, weights=weights))) == []


def test_a_gate_is_found_where_it_is_spelled_out_or_of_two_values() -> None:
    spelled = ["a = linear(x, $g)", "e = sigmoid(a)", "s = mul(a, e)", "v = linear(x, $u)", "y = mul(s, v)"]
    assert "gate" in sites(parse_graph(gated(*spelled, weights=ALONG[:2])))
    assert "gate" in sites(parse_graph(gated(*REFUSED["of-two-values"][0], weights=ALONG[:2])))
    assert "gate" not in sites(parse_graph(gated(*spelled[:3], "y = neg(s)", weights=ALONG[:1])))
    halves = REFUSED["halves-of-what-is-computed"]
    assert "gate" in sites(parse_graph(gated(*halves[0], weights=halves[1])))


def test_what_a_gate_that_is_refused_leaves_is_told() -> None:
    """If a gate is refused, the report names what is fused instead: the activation with its product, or both
    products. The report of a fused gate has neither.
    """

    def report(*lines: str) -> dict[str, str]:
        verdicts = explain_fusion(parse_graph(gated(*lines, weights=ALONG[:2]))).blocks[-1].verdicts
        return {v.kind: v.op or v.reason for v in verdicts if v.kind in ("gate", "epilogue", "projection")}

    lines, _, reason = REFUSED["of-two-values"]
    assert report(*lines) == {"gate": reason, "epilogue": "activated_linear"}
    made = report("a = linear(x, $g)", "s = exp(a)", "v = linear(x, $u)", "y = mul(s, v)")
    assert made.pop("gate").startswith("no rule of fuse-gated-linear matches in part")
    assert made == {"projection": "projections"}
    assert report(X, G, "v = linear(x, $u)", "y = mul(s, v)") == {"gate": "gated_linear"}


def test_a_gate_of_another_form_is_told_the_forms() -> None:
    lines = ["a = linear(x, $g)", "s = exp(a)", "v = linear(x, $u)", "y = mul(s, v)"]
    verdicts = explain_fusion(parse_graph(gated(*lines, weights=ALONG[:2]))).blocks[-1].verdicts
    (verdict,) = [v for v in verdicts if v.kind == "gate"]
    assert verdict.hint.startswith("act(x g) * (x u), both of one width, with gelu, gelu_tanh,")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_halves_of_one_product_keep_their_activation(activation: str) -> None:
    b = Builder(Graph("halves"))
    y = b.linear(b.input("x", "f32[B, 8]"), b.parameter("w", "f32[12, 8]"))
    b.outputs(y=getattr(b, activation)(b.slice(y, axis=1, stop=6)) * b.slice(y, axis=1, start=6))
    *_, node = PassManager([FuseGatedLinear()]).run(b.graph).graph.main.nodes
    assert (node.op.name, node.op.attributes["activation"]) == ("gated_linear", activation)


def test_parts_of_products_that_are_spelled_in_two_ways() -> None:
    """The parts would be halves of one product. A slice in another form is not taken for the other half."""
    weights = ["w: f32[16, 4]", "m: f32[4, 16]"]
    lines = ["a = linear(x, $w)", "b = matmul(x, $m)", "g = slice(a, axis=2, stop=8)", "s = relu(g)"]
    text = gated(*lines, "u = slice(b, axis=2, start=8)", "y = mul(s, u)", weights=weights)
    done = optimize(text, FuseGatedLinear())
    assert done.graph == parse_graph(text)
