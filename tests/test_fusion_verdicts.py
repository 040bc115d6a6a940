"""The report of `treadle explain` is consistent: it counts each site once, as fused exactly if a fused op was built
from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest

import treadle.frontends.language as t
from tests.attention_programs import FORMS as ATTENTION_FORMS
from tests.attention_programs import Form, graph_of
from tests.pass_programs import program
from tests.random_programs import random_program
from tests.test_fuse_rotary import FORMS as ROTARY_FORMS
from tests.test_fuse_rotary import Case
from tests.test_models import ZOO
from treadle.explaining.fusion import Explanation, explain_fusion
from treadle.explaining.fusion_verdicts import judge
from treadle.ir.analysis.run_counts import count_calls
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.text.parser import parse_graph
from treadle.passes.cleanup.common_subexpressions import CommonSubexpressions
from treadle.passes.cleanup.dead_code import DeadCode
from treadle.passes.cleanup.decompose import Decompose
from treadle.passes.framework.manager import Pass, PassManager
from treadle.passes.framework.pass_log import count_ops
from treadle.passes.sites.fusion_sites import KINDS, find_sites

SPELLED = ("attention", "rotary")
"""Kinds whose rules build one op from a single site."""


def named_apart(graph: Graph) -> Graph:
    """Give each node a separate name and remove its source line, as in an ONNX file."""
    for number, (_, node) in enumerate(graph.walk()):
        node.scope, node.source = f"/{node.op.name}_{number}", None
    return graph


def tidied(graph: Graph, *passes: Pass) -> Graph:
    """Remove duplicates and unused values, so that each site has its own ops."""
    return PassManager([*passes, CommonSubexpressions(), DeadCode()], certify=False).run(graph).graph


def explained(graph: Graph) -> Explanation:
    """Return the explanation, after a check that its numbers add up."""
    explanation = explain_fusion(graph, certify=False)
    optimized = explanation.optimized
    judged = judge(optimized)
    names = Counter((site.function, site.kind, site.anchor) for site, _ in judged)
    assert set(names.values()) <= {1}
    assert {(s.function, s.kind, s.anchor) for s in find_sites(optimized.source)} <= set(names)
    calls = count_calls(optimized.source)
    report = Counter(verdict.status for site, verdict in judged for _ in range(calls[site.function]))
    assert {status: count for status, count in explanation.sites.items() if count} == report
    places = sum(block.calls * len(v.places) for block in explanation.blocks for v in block.verdicts)
    assert sum(explanation.sites.values()) == places
    for kind in SPELLED:
        name, ops = KINDS[kind]
        made = count_ops(optimized.after(name)) - count_ops(optimized.source)
        fused = [site for site, verdict in judged if (site.kind, verdict.status) == (kind, "fused")]
        assert len(fused) == sum(made[op] for op in ops), str(explanation)
    return explanation


def statuses(explanation: Explanation, *kinds: str) -> Counter[str]:
    found = [v for block in explanation.blocks for v in block.verdicts if v.kind in kinds]
    return Counter(verdict.status for verdict in found for _ in verdict.places)


# -- the sums ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ROTARY_FORMS, ids=[case.name for case in ROTARY_FORMS])
@pytest.mark.parametrize("name", [named_apart, tidied])
def test_a_turn_that_became_rotary_is_told_as_that(case: Case, name: Callable[[Graph], Graph]) -> None:
    """Some rotations end in a concat after the sum: with dimensions that are not rotated, or of the pairs."""
    assert set(statuses(explained(name(tidied(graph_of(case.build)))), "rotary")) == {"fused"}


@pytest.mark.parametrize("form", ATTENTION_FORMS, ids=[form.name for form in ATTENTION_FORMS])
def test_every_form_of_attention_is_told_as_fused(form: Form) -> None:
    assert statuses(explained(named_apart(tidied(graph_of(form.build)))), "attention") == {"fused": 1}


@pytest.mark.parametrize("seed", range(80))
def test_random_programs_add_up(seed: int) -> None:
    graph = tidied(random_program(seed))
    explained(graph)
    explained(named_apart(graph))


@pytest.mark.parametrize("name", ZOO)
def test_models_of_the_zoo_add_up(name: str) -> None:
    """Models as declared, and decomposed; the number of fused ops equals the number of declared ones."""
    declared = ZOO[name][0].graph()
    ops = count_ops(declared)
    explained(declared)
    again = explained(named_apart(tidied(declared, Decompose())))
    for kind in SPELLED:
        assert statuses(again, kind) == {"fused": n} if (n := ops[kind]) else not statuses(again, kind), str(again)


# -- sites inside other sites ------------------------------------------------------------------------------------------


def merged_gate(b: Builder) -> Expr:
    """Return a gate in Phi-3's form, with the activation decomposed."""
    x = b.input("x", "f32[B, S, 8]")
    y = b.linear(x, b.parameter("w", "f32[12, 8]"))
    gate, up = b.slice(y, axis=2, stop=6), b.slice(y, axis=2, start=6)
    return gate * b.sigmoid(gate) * up


def test_the_activation_of_a_gate_is_no_gate_itself() -> None:
    """x sigmoid(x) of one half of a product is an activation. The product with the other half is the gate."""
    explanation = explained(named_apart(graph_of(merged_gate)))
    assert statuses(explanation, "gate") == {"fused": 1}
    assert statuses(explanation, "activation") == {"fused": 1}
    assert explanation.sites == {"fused": 2, "already": 1, "refused": 0, "nearly": 0, "missed": 0}


def test_folded_scales_are_reported_one_by_one() -> None:
    """Each line of the graph's text is a site with its own event, although all come from one line of the Python
    program.
    """
    b = Builder(Graph("g"))
    x, w = b.input("x", "f32[B, S, 8]"), b.parameter("w", "f32[8]")
    made = (b.rms_norm(x, w), b.matmul(x, b.parameter("m", "f32[8, 16]")), b.linear(x, b.parameter("n", "f32[16, 8]")))
    for number, y in enumerate(made):
        b.function.outputs[f"y{number}"] = (y * 0.5).value
    scales = [v for block in explained(b.graph).blocks for v in block.verdicts if v.kind == "scale"]
    assert [(v.status, v.op, v.rules) for v in scales] == [
        ("fused", "rms_norm", ("scale-in-rms-norm",)),
        ("fused", "matmul", ("scale-before-matmul",)),
        ("fused", "linear", ("scale-before-linear",)),
    ]


@pytest.mark.parametrize("axes", ["[-1]", "[2]", "[1]", "[1, 2]"])
@pytest.mark.parametrize("centered", [False, True])
def test_a_sum_before_a_norm_that_is_spelled_is_a_residual_site(axes: str, centered: bool) -> None:
    """The mean must be over the last axis, counted from either end. Any other mean does not give a norm of rows."""
    text = program(
        "x: f32[B, S, 8], r: f32[B, S, 8]",
        "y: f32[B, S, 8]",
        "s = add(x, r)",
        *([f"m = reduce_mean(s, axes={axes}, keep=true)", "c = sub(s, m)"] if centered else []),
        "q = mul(%s, %s)" % (("c", "c") if centered else ("s", "s")),
        f"v = reduce_mean(q, axes={axes}, keep=true)",
        "e = add(v, 1e-05)",
        "d = sqrt(e)",
        "n = div(%s, d)" % ("c" if centered else "s"),
        "return y = n",
    )
    found = [site for site in find_sites(parse_graph(text)) if site.kind == "residual"]
    assert [site.anchor.op.name for site in found] == (["add"] if axes in ("[-1]", "[2]") else [])


def test_sites_that_were_one_and_the_same_are_both_told_as_fused() -> None:
    lines = ["h = mul(x, 0.5)", "a = mul(x, 0.7071067811865476)", "e = erf(a)", "p = add(e, 1.0)", "g = mul(h, p)"]
    again = [line.replace(" = ", "2 = ").replace("(a)", "(a2)").replace("(e,", "(e2,") for line in lines]
    again[-1] = "g2 = mul(h2, p2)"
    text = program("x: f32[B, S, 8]", "y: f32[B, S, 8]", *lines, *again, "z = sub(g, g2)", "return y = z")
    explanation = explain_fusion(named_apart(parse_graph(text)))
    assert statuses(explanation, "activation") == {"fused": 2}


def test_a_turn_of_what_a_sine_was_in_is_a_site() -> None:
    b = Builder(Graph("g"))
    x, angles = b.sin(b.input("x", "f32[B, 4, S, 6]")) + 1.0, b.input("angles", "f32[S, 3]")
    cos, sin = b.cos(angles), b.sin(angles)
    one, two = b.slice(x, axis=3, stop=3), b.slice(x, axis=3, start=3)
    b.outputs(y=b.concat(one * cos - two * sin, two * cos + one * sin, axis=3))
    (site,) = find_sites(b.graph)
    assert (site.kind, site.anchor.op.name) == ("rotary", "add")


# -- sites that no rule recognized -------------------------------------------------------------------------------------


def heads(x: t.Tensor) -> Iterator[t.Tensor]:
    return (t.split_heads(t.linear(x, 16, name=name), 2) for name in "qkv")


def relu_of_heads(x: t.Tensor) -> t.Tensor:
    return t.relu(t.split_heads(t.linear(x, 16, name="q"), 2))


def rms_with_eps_outside(x: t.Tensor) -> t.Tensor:
    return x / ((x * x).mean(-1, keepdim=True).sqrt() + 1e-6) * t.parameter("w", 16)


def layer_norm_with_eps_outside(x: t.Tensor) -> t.Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / ((centered * centered).mean(-1, keepdim=True).sqrt() + 1e-6)


def rms_with_a_maximum(x: t.Tensor) -> t.Tensor:
    return x * (x * x).mean(-1, keepdim=True).maximum(1e-6).rsqrt()


def talking_heads(x: t.Tensor) -> t.Tensor:
    """Attention whose scores and probabilities are mixed over the heads (Shazeer et al. 2020)."""
    q, k, v = heads(x)
    scores = t.einsum(q @ k.mT, t.parameter("before", 2, 2), equation="b h s t, h g -> b g s t")
    mixed = t.einsum(scores.softmax(-1), t.parameter("after", 2, 2), equation="b h s t, h g -> b g s t")
    return t.merge_heads(mixed @ v)


def probabilities_divided_again(x: t.Tensor) -> t.Tensor:
    q, k, v = heads(x)
    scores = t.einsum(q @ k.mT, t.parameter("before", 2, 2), equation="b h s t, h g -> b g s t")
    p = scores.softmax(-1)
    return t.merge_heads((p / (p.sum(-1, keepdim=True) + 1e-6)) @ v)


def softmax_plus_one(x: t.Tensor) -> t.Tensor:
    q, k, v = heads(x)
    scores = q @ k.mT
    e = (scores - scores.amax(-1, keepdim=True)).exp()
    return t.merge_heads((e / (e.sum(-1, keepdim=True) + 1.0)) @ v)


MIXED = "einsum b h s t, h g -> b g s t, which sums over h, not over t, the axis of the softmax"


@pytest.mark.parametrize(
    ("body", "kind", "rule", "matched", "edge", "reason"),
    [
        (relu_of_heads, "epilogue", "fuse-activated-linear", 1, "operand 0 of relu", ", found rearrange"),
        (rms_with_eps_outside, "normalization", "rms-norm", 1, "operand 1 of div", "expected sqrt, found add"),
        (layer_norm_with_eps_outside, "normalization", "layer-norm", 3, "operand 1 of div", "expected sqrt, found add"),
        (rms_with_a_maximum, "normalization", "rms-norm", 2, "operand 0 of rsqrt", "expected add, found maximum"),
        (talking_heads, "attention", "fuse-attention", 2, MIXED, "does not sum over the axis of the softmax"),
        (probabilities_divided_again, "attention", "fuse-attention", 3, "softmax", "used elsewhere, by reduce_sum"),
        (softmax_plus_one, "attention", "fuse-softmax", 4, "operand 1 of div", "expected reduce_sum, found add"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_site_that_no_rule_recognized_names_the_edge_of_the_nearest_pattern(
    body: Callable[[t.Tensor], t.Tensor], kind: str, rule: str, matched: int, edge: str, reason: str
) -> None:
    def model(x: t.Tensor) -> t.Tensor:
        return body(x)

    model.__annotations__["x"] = t.f32["B S 16"]
    explanation = explained(t.model(model).graph())
    (verdict,) = (v for block in explanation.blocks for v in block.verdicts if v.kind == kind)
    assert (verdict.rules, verdict.edge) == ((rule,), edge)
    assert len(verdict.matched) == matched
    assert reason in verdict.reason
    assert verdict.hint or kind == "attention"
    assert all(place.startswith("tests/test_fusion_verdicts.py:") for place in verdict.places)
