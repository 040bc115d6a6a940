"""A product and its activation become one op. Near misses stay, with a reason. Numbers are the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import treadle
import treadle.frontends.language as t
from tests.pass_programs import GELU, assert_same_numbers, optimize, program
from treadle.backends.onnx.exporter import export_onnx
from treadle.explaining.fusion import explain_fusion
from treadle.ir.analysis.cost import node_cost
from treadle.ir.analysis.following import follow
from treadle.ir.graph import Graph
from treadle.ir.ops.activated_products import ACTIVATIONS
from treadle.ir.text.parser import parse_graph
from treadle.passes.cleanup.decompose import Decompose
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT
from treadle.passes.products.fuse_activated_linear import FuseActivatedLinear
from treadle.passes.sites.fusion_sites import find_sites

ALONG = ["w: f32[8, 4]", "b: f32[8]"]
ACROSS = ["w: f32[4, 8]", "b: f32[8]"]


def activated(*lines: str, weights: Sequence[str] = ALONG, more: str = "") -> str:
    return program(f"x: f32[B, S, 4]{more}", "y: f32[B, S, 8]", *lines, "return y = y", weights=weights)


FORMS = {
    "with-bias": (ALONG, ["a = linear(x, $w, $b)", "y = gelu(a)"], "y = activated_linear(x, $w, $b)"),
    "without-bias": (ALONG[:1], ["a = linear(x, $w)", "y = relu(a)"], 'y = activated_linear(x, $w, activation="relu")'),
    "of-matmul": (
        ACROSS,
        ["m = matmul(x, $w)", "a = add($b, m)", "y = gelu_tanh(a)"],
        'y = activated_linear(x, $w, $b, activation="gelu_tanh", weight_axes="k n")',
    ),
    "of-matmul-without-bias": (
        ACROSS[:1],
        ["m = matmul(x, $w)", "y = silu(m)"],
        'y = activated_linear(x, $w, activation="silu", weight_axes="k n")',
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_becomes_one_op(name: str) -> None:
    weights, before, after = FORMS[name]
    made = optimize(activated(*before, weights=weights), FuseActivatedLinear())
    assert made.graph == parse_graph(activated(after, weights=weights)), str(made.graph)
    assert_same_numbers(made.source, made.graph)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_taken_in(activation: str) -> None:
    made = optimize(activated("a = linear(x, $w, $b)", f"y = {activation}(a)"), FuseActivatedLinear())
    (node,) = made.graph.main.nodes
    assert (node.op.name, node.op.attributes["activation"]) == ("activated_linear", activation)
    assert_same_numbers(made.source, made.graph)


@pytest.mark.parametrize(
    ("lines", "weights", "reason"),
    [
        (
            ["a = linear(x, $w, $b)", "g = gelu(a)", "y = add(g, a)"],
            ALONG,
            "the linear is used elsewhere, by add",
        ),
        (
            ["m = matmul(x, $w)", "a = add(m, $b)", "g = tanh(a)", "y = mul(g, m)"],
            ACROSS,
            "the matmul is used elsewhere, by mul",
        ),
    ],
)
def test_a_product_that_is_used_elsewhere_stays(lines: list[str], weights: list[str], reason: str) -> None:
    made = optimize(activated(*lines, weights=weights), FuseActivatedLinear())
    assert made.graph == made.source
    assert [refusal.reason for event in made.log for refusal in event.refusals] == [reason]


@pytest.mark.parametrize(
    ("lines", "weights", "more"),
    [
        (["a = linear(x, $w, $b)", "y = exp(a)"], ALONG, ""),
        # z is not a weight: a product of queries and keys
        (["m = matmul(x, z)", "y = relu(m)"], [], ", z: f32[B, 4, 8]"),
        (["m = matmul(x, $w)", "a = add(m, z)", "y = relu(a)"], ACROSS[:1], ", z: f32[B, S, 8]"),  # no bias
    ],
)
def test_similar_programs_are_not_rewritten(lines: list[str], weights: list[str], more: str) -> None:
    made = optimize(activated(*lines, weights=weights, more=more), FuseActivatedLinear())
    assert made.graph == made.source
    assert "epilogue" not in [site.kind for site in find_sites(made.graph)]


def test_a_vector_that_stretches_the_product_is_no_bias() -> None:
    lines = ["m = matmul(x, $w)", "a = add(m, $b)", "y = relu(a)"]
    made = optimize(activated(*lines, weights=["w: f32[4, 1]", "b: f32[8]"]), FuseActivatedLinear())
    assert made.graph == made.source


def test_it_is_certified_and_a_body_becomes_the_op_again() -> None:
    weights, before, after = FORMS["with-bias"]
    once = PassManager(DEFAULT, certify=True).run(parse_graph(activated(*before, weights=weights)))
    assert once.graph == parse_graph(activated(after, weights=weights))
    assert "fuse-activated-linear" in {c.rule for record in once.log for c in record.certificates}
    again = PassManager([Decompose(), *DEFAULT]).run(once.graph)
    assert again.graph == once.graph
    assert "erf" in str(again.after("decompose"))


def test_the_inner_axis_may_not_be_added_up_in_parts() -> None:
    """A partial sum cannot be activated. So the body is followed, and the reported line is one of its nodes."""
    graph = parse_graph(activated(*FORMS["with-bias"][1]))
    fused = optimize(activated(FORMS["with-bias"][2]), FuseActivatedLinear()).graph
    for axis in ("w[0]", "w[1]"):
        assert bool(follow(fused, axis).split()) == bool(follow(graph, axis).split())
    (node,) = fused.main.nodes
    flops = [node_cost(n, {"B": 2, "S": 3}).flops for n in graph.main.nodes]
    assert node_cost(node, {"B": 2, "S": 3}).flops == sum(flops)


def fused_ops(graph: Graph) -> list[tuple[str, str]]:
    fused = [node.op for node in graph.main.nodes if node.op.name in ("activated_linear", "gated_linear")]
    return [(op.name, op.attributes["activation"]) for op in fused]


@t.model
def network(x: t.f32["B S 12"]):
    return t.mlp(t.gated_mlp(x, 20, name="gated"), 24)


def test_an_export_comes_back_as_the_same_fused_ops(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    made = treadle.compile(network)
    assert fused_ops(made.graph) == [("gated_linear", "silu"), ("activated_linear", "gelu")]
    export_onnx(made.graph, made.weights, tmp_path / "m.onnx")
    back = treadle.compile(tmp_path / "m.onnx")
    assert fused_ops(back.graph) == fused_ops(made.graph)
    x = np.random.default_rng(0).standard_normal((2, 3, 12)).astype(np.float32)
    (wanted,), (found,) = made(x=x).values(), back(x=x).values()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_tvm_runs_the_kernels_that_it_runs_without_the_passes() -> None:
    """The activation stays at the end of the product's kernel, and the gate at the end of the second product's
    kernel.
    """
    pytest.importorskip("tvm")
    passes = [each for each in DEFAULT if each.name != "merge-projections"]  # joins products that are not a gate
    without = [each for each in passes if each.name not in ("fuse-gated-linear", "fuse-activated-linear")]
    fused, plain = (treadle.compile(network, backend="tvm", passes=each) for each in (passes, without))
    assert fused_ops(fused.graph) != fused_ops(plain.graph) == []
    assert _kernels(fused.source) == _kernels(plain.source)
    assert len(_kernels(fused.source)) > 2


def _kernels(source: str) -> list[str]:
    return source.split("@T.prim_func")[1:]


# -- sites and counts ------------------------------------------------------------------------------------------------


def sites(graph: Graph) -> list[tuple[str, str | None]]:
    return [(site.kind, site.op) for site in find_sites(graph)]


def test_a_product_with_an_activation_is_a_site_and_the_activation_still_its_own() -> None:
    weights, before, after = FORMS["with-bias"]
    found = sites(parse_graph(activated(*before, weights=weights)))
    assert found == [("linear", "linear"), ("activation", "gelu"), ("epilogue", None)]
    assert sites(parse_graph(activated(after, weights=weights))) == [("epilogue", "activated_linear")]
    spelled = ["x1 = linear(x, $w, $b)", *[line.replace("(x,", "(x1,") for line in GELU[:-1]]]
    text = activated(*spelled, "y = mul(e, 1.0)")
    assert {("activation", None), ("epilogue", None)} <= set(sites(parse_graph(text)))


def test_a_spelled_out_gelu_is_fused_twice_and_both_are_told() -> None:
    spelled = ["x1 = linear(x, $w, $b)", *[line.replace("(x,", "(x1,") for line in GELU[:-1]]]
    graph = parse_graph(activated(*spelled, "y = neg(e)"))
    report = explain_fusion(graph, expect={"activated_linear": 1, "gelu": 1, "linear": 1, "relu": 0})
    verdicts = {v.kind: v for block in report.blocks for v in block.verdicts}
    assert (verdicts["activation"].status, verdicts["activation"].op) == ("fused", "gelu")
    assert (verdicts["epilogue"].status, verdicts["epilogue"].op) == ("fused", "activated_linear")
    assert report.counts["gelu"] == 0, "of its own"
    assert report.met
    assert "expected gelu=1: met, 1 within activated_linear" in str(report)
    assert "expected linear=1: met, 1 within activated_linear" in str(report)


def test_counts_inside_other_ops_are_lower_bounds() -> None:
    report = explain_fusion(parse_graph(activated(*FORMS["with-bias"][1])), expect={"gelu": 2})
    assert not report.met
    assert "expected gelu=2: NOT MET, there are 1, 1 within activated_linear" in str(report)
    assert report.as_dict()["expected"] == [{"op": "gelu", "expected": 2, "found": 1}]
