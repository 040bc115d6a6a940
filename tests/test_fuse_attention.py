"""Attention fusion: every form becomes the right op. Near misses stay, with a reason. Numbers are the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.attention_near_misses import NEAR_MISSES, NearMiss, many_addends, many_casts
from tests.attention_numbers import assert_equal_everywhere, computed, draw
from tests.attention_programs import (
    FORMS,
    LOW,
    SCALE,
    Form,
    graph_of,
    masked,
    q_k_v,
    rows,
    scaled,
    swapped,
    triangle,
)
from tests.pass_programs import optimize, program
from tests.test_models import ZOO
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.ops.attention import Attention
from treadle.ir.samples import Sample
from treadle.ir.text.parser import parse_graph
from treadle.passes.cleanup.canonicalize import Canonicalize
from treadle.passes.cleanup.common_subexpressions import CommonSubexpressions
from treadle.passes.cleanup.dead_code import DeadCode
from treadle.passes.cleanup.decompose import FUSED, Decompose
from treadle.passes.cleanup.fold_constants import FoldConstants
from treadle.passes.framework.manager import Optimized, PassManager
from treadle.passes.fusion.attention.biases import hazards_of
from treadle.passes.fusion.attention.fuse_attention import FuseAttention
from treadle.passes.fusion.attention.positions import band_of
from treadle.passes.fusion.fuse_softmax import FuseSoftmax
from treadle.passes.pipelines import DEFAULT

PASSES = (
    FoldConstants(),
    Canonicalize(),
    CommonSubexpressions(),
    DeadCode(),
    FuseSoftmax(),
    FuseAttention(),
    DeadCode(),
)

# A scale consists of two float32 constants, each half a spacing off, and multiplies scores of about 20; the difference
# is of that size.
ROUNDING = 64 * float(np.finfo(np.float32).eps)


def fused(graph: Graph) -> Optimized:
    return PassManager(PASSES).run(graph)


def attentions(graph: Graph) -> list[Attention]:
    return [node.op for _, node in graph.walk() if isinstance(node.op, Attention)]


def terms_of(op: Attention) -> str:
    return ", ".join(term.text for term in op.terms)


# -- recognised forms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_each_form_is_one_attention(form: Form) -> None:
    before = graph_of(form.build)
    optimized = fused(before)
    ops = [node.op.name for node in optimized.graph.main.nodes]
    assert ops.count("attention") == 1, optimized.log.explain()
    assert not {"softmax", "exp", "matmul", "einsum"}.intersection(ops)
    (op,) = attentions(optimized.graph)
    assert terms_of(op) == form.terms
    assert (op.scale, op.softcap) == (form.scale, form.softcap)
    has_nan = assert_equal_everywhere(before, optimized.graph, ROUNDING)
    assert has_nan == form.keeps_nan


def test_heads_that_are_repeated_are_not_computed_for_each_query_head() -> None:
    for name, heads in (("grouped by repeating", 2), ("multi-query by repeating", 1), ("grouped product", 2)):
        form = next(f for f in FORMS if f.name == name)
        graph = fused(graph_of(form.build)).graph
        (node,) = [n for n in graph.main.nodes if n.op.name == "attention"]
        assert [v.type.shape[1].constant for v in node.inputs[:3]] == [4, heads, heads]
        assert not any(n.op.name == "expand" for n in graph.main.nodes)


def test_rows_and_heads_that_were_one_dimension_are_two_again() -> None:
    b = Builder(Graph("joined"))
    q, k, v = (b.rearrange(x, pattern="b h s d -> (b h) s d") for x in q_k_v(b))
    y = b.softmax(q @ swapped(b, k) * SCALE) @ v
    b.outputs(y=b.rearrange(y, pattern="(b h=4) s d -> b h s d"))
    (node,) = fused(b.graph).graph.main.nodes
    assert str(node.inputs[0].type) == "f32[B, 4, S, 6]"


def test_the_projections_form_is_left_with_what_it_needs() -> None:
    form = next(f for f in FORMS if f.name == "projections")
    ops = [n.op.name for n in fused(graph_of(form.build)).graph.main.nodes]
    assert ops == ["linear", "linear", "linear", "rearrange", "rearrange", "rearrange", "attention", "rearrange"]


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("boolean rows", "mask(b t)"),
        ("boolean rows, -1e9", "mask(b t)"),
        ("causal padding", "causal, padding"),
        ("two masks", "causal, mask(b t)"),
        ("a sum of two", "mask(b t), bias(h s t)"),
        ("rows and heads joined", "mask(b t)"),
    ],
)
def test_rows_without_keys_may_be_left_to_zeros(name: str, terms: str) -> None:
    """If rows without keys may return zeros, every mask becomes a mask term; rows that see a key are unchanged."""
    before = graph_of(next(f for f in FORMS if f.name == name).build)
    passes = [*PASSES[:-2], FuseAttention(zero_empty_rows=True), DeadCode()]
    after = PassManager(passes, certify=False).run(before).graph
    (op,) = attentions(after)
    assert terms_of(op) == terms
    inputs, weights = draw(before, {"B": 3, "S": 4, "T": 5}, 0)
    for mask in ("mask", "lengths"):
        if mask in inputs:
            inputs[mask][...] = 3 if mask == "lengths" else inputs[mask]
            inputs[mask][..., :1] = 1  # every row sees its first key
    wanted, got = (interpret(g, inputs, weights, float64=True)["y"] for g in (before, after))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=ROUNDING * (1 + np.abs(wanted).max()))


def test_zeros_may_be_asked_for_in_place_of_nan() -> None:
    before = graph_of(lambda b: masked(b, lambda: rows(b)))
    assert "where" in [n.op.name for n in fused(before).graph.main.nodes]
    zeros = (
        PassManager([*PASSES[:-2], FuseAttention(zero_empty_rows=True), DeadCode()], certify=False).run(before).graph
    )
    assert [n.op.name for n in zeros.main.nodes] == ["attention"]
    inputs, weights = draw(before, {"B": 2, "S": 3}, 0)
    with np.errstate(invalid="ignore"):
        wanted = interpret(before, inputs, weights, float64=True)["y"]
    got = interpret(zeros, inputs, weights, float64=True)["y"]
    assert np.isnan(wanted[0]).all()
    np.testing.assert_array_equal(got[0], 0)


def test_a_layer_built_attention_stays_as_it_is() -> None:
    text = program(
        "q: f32[B, 4, S, 6], k: f32[B, 2, S, 6], v: f32[B, 2, S, 6]",
        "y: f32[B, 4, S, 6]",
        "y = attention(q, k, v, terms=[causal], scale=0.5)",
        "return y = y",
    )
    assert optimize(text, *DEFAULT).graph == parse_graph(text)


# -- text ------------------------------------------------------------------------------------------------------

BEFORE = program(
    "q: f32[B, 4, S, 8], k: f32[B, 4, S, 8], v: f32[B, 4, S, 8]",
    "y: f32[B, S, 32]",
    'kt = rearrange(k, pattern="b h t d -> b h d t")',
    "scores = matmul(q, kt)",
    "scaled = mul(scores, 0.35355338)",
    "n = iota(size=S)",
    'i = rearrange(n, pattern="s -> s 1")',
    "keep = less_equal(n, i)",
    "masked = where(keep, scaled, -inf)",
    "p = softmax(masked)",
    "out = matmul(p, v)",
    'y = rearrange(out, pattern="b h s d -> b s (h d)")',
    "return y = y",
)

EXPECTED = program(
    "q: f32[B, 4, S, 8], k: f32[B, 4, S, 8], v: f32[B, 4, S, 8]",
    "y: f32[B, S, 32]",
    "out = attention(q, k, v, terms=[causal])",
    'y = rearrange(out, pattern="b h s d -> b s (h d)")',
    "return y = y",
)


def test_before_and_after_as_text() -> None:
    optimized = optimize(BEFORE, FuseAttention())
    assert optimized.graph == parse_graph(EXPECTED)
    (match,) = optimized.log[0].matches
    assert (match.rule, match.op) == ("fuse-attention", "matmul")
    assert optimized.log[0].refusals == []


def test_a_name_that_someone_gave_outlives_the_product() -> None:
    (node, _) = optimize(BEFORE, FuseAttention()).graph.main.nodes
    assert node.result.name == "out"


# -- near misses -----------------------------------------------------------------------------------------------


def test_there_are_thirty_near_misses() -> None:
    assert len(NEAR_MISSES) >= 30
    assert len({miss.reason for miss in NEAR_MISSES}) >= 25


@pytest.mark.parametrize("miss", NEAR_MISSES, ids=lambda miss: miss.name)
def test_each_near_miss_says_why(miss: NearMiss) -> None:
    before = graph_of(miss.build)
    optimized = fused(before)
    record = next(r for r in optimized.log if r.name == "fuse-attention")
    report = [event for event in record.refusals if miss.reason in event.reason]
    assert report, optimized.log.explain() or str(optimized.graph)
    assert all(event.source.startswith("tests/attention_") for event in report)
    if miss.terms is None:
        assert attentions(optimized.graph) == []
        assert all(event.matched and "; matched: " in str(event) for event in report)
    else:
        assert [terms_of(op) for op in attentions(optimized.graph)] == [miss.terms]
    assert_equal_everywhere(before, optimized.graph, ROUNDING)


@pytest.mark.parametrize("build", [many_addends, many_casts])
def test_the_longest_chain_is_looked_through(build: Callable[[Builder, int], Expr]) -> None:
    """A chain of 47 steps and the product is fused; a chain with one more step is a near miss."""
    graph = graph_of(lambda b: build(b, 47))
    assert len(attentions(PassManager(PASSES, certify=False).run(graph).graph)) == 1


def test_scores_that_are_an_output_too_are_left_alone() -> None:
    text = BEFORE.replace("-> (y: f32[B, S, 32])", "-> (y: f32[B, S, 32], z: f32[B, 4, S, S])")
    (event,) = optimize(text.replace("return y = y", "return y = y, z = scaled"), FuseAttention()).log[0].refusals
    assert event.reason == "the scores are an output as well, after mul"


def test_a_refusal_names_the_node_and_what_had_matched() -> None:
    text = BEFORE.replace("scaled = mul(scores, 0.35355338)", "top = minimum(scores, 9.0)").replace("scaled", "top")
    (event,) = optimize(text, FuseAttention()).log[0].refusals
    assert (event.op, event.rule) == ("minimum", "fuse-attention")
    assert (event.reason, event.matched) == ("the scores are clipped", ("softmax", "where"))
    assert "the scores are clipped; matched: softmax, where" in str(event)


def test_a_softmax_beside_no_product_is_nobodys_attention() -> None:
    text = program("x: f32[B, S]", "y: f32[B, S]", "a = softmax(x)", "b = mul(a, 2.0)", "return y = b")
    log = optimize(text, FuseAttention()).log
    assert log[0].refusals == [] == log[0].near_misses


@pytest.mark.parametrize("change", ["right", "left"])
def test_padding_on_either_side_is_what_it_is(change: str) -> None:
    """j < n is padding at the end. j >= n is padding at the start; no term expresses it by position, so it stays a
    tensor.
    """

    def keep(b: Builder) -> object:
        lengths = b.rearrange(b.input("lengths", "i64[B]"), pattern="b -> b 1 1 1")
        j = b.iota(size="S")
        return j < lengths if change == "right" else j >= lengths

    before = graph_of(lambda b: masked(b, lambda: keep(b)))  # type: ignore[arg-type, return-value]
    optimized = fused(before)
    (op,) = attentions(optimized.graph)
    assert terms_of(op) == ("padding" if change == "right" else "mask(b t)")
    assert_equal_everywhere(before, optimized.graph, ROUNDING)


def notes_on(masking: str) -> list[str]:
    """Return the notes on a mask j <= i and an input mask of each row, both filled in with a number."""
    kept = ["outer = cast(rows, to=bool)", "keep = logical_and(causal, outer)"]
    text = BEFORE.replace("keep =", "causal =").replace("    masked", f"    {kept[0]}\n    {kept[1]}\n    masked")
    text = text.replace("v: f32[B, 4, S, 8]", "v: f32[B, 4, S, 8], rows: i64[B, 1, 1, S]").replace("-inf", masking)
    assert masking in text
    assert "rows" in text
    optimized = optimize(text, FuseAttention())
    assert len(attentions(optimized.graph)) == 1
    return [f"{e.op}: {e.reason}" for e in optimized.log[0].refusals]


def test_a_mask_that_stays_an_addend_says_why() -> None:
    why = "the mask stays an addend: it is -1e+30, and a row in which every key is masked is an average"
    assert notes_on("-1e30") == [f"where: {why}"]
    assert notes_on("-inf") == []
    alone = optimize(BEFORE.replace("-inf", "-1e30"), FuseAttention())  # where every row keeps a key
    assert [terms_of(op) for op in attentions(alone.graph)] == ["causal"]
    assert alone.log[0].refusals == []


# -- round trips -----------------------------------------------------------------------------------------------


def applied(sample: Sample) -> Graph:
    b = Builder(Graph("sample"))
    operands = [None if t is None else b.input(f"x{i}", t) for i, t in enumerate(sample.types)]
    b.outputs(y=b.attention(*operands, **sample.attributes))
    return b.graph


@pytest.mark.parametrize(
    "sample", [s for s in Attention.samples if "to" not in s.attributes], ids=lambda sample: sample.text
)
def test_decomposed_attention_is_fused_again(sample: Sample) -> None:
    """With fixed sizes, positions are first folded to constants, which must be recognised as well. If queries begin
    later, terms become masks and biases. Probabilities that are rounded in between stay unfused.
    """
    graph = applied(sample)
    apart = PassManager([Decompose(("attention",))]).run(graph).graph
    assert attentions(apart) == []
    again = fused(apart).graph
    if sample.attributes.get("start"):
        assert len(attentions(again)) == 1
        assert_equal_everywhere(graph, again, ROUNDING)
    else:
        assert computed(again) == computed(graph)


# A softmax in ops has no result over an empty axis, which an image encoder of no patches has.
@pytest.mark.parametrize("name", [name for name in ZOO if not name.startswith("qwen2_vl")])
def test_decomposed_models_are_fused_again(name: str) -> None:
    """All ops that the default pipeline fuses, not only attention. The tests of each form check numbers."""
    graph = PassManager(DEFAULT).run(ZOO[name][0].graph()).graph
    assert attentions(graph)
    apart = PassManager([Decompose()], certify=True).run(graph)
    assert not {node.op.name for _, node in apart.graph.walk()}.intersection(FUSED)
    again = PassManager(DEFAULT, certify=True).run(apart.graph)
    assert not [e for record in (*apart.log, *again.log) for e in record.refusals if "rolled back" in e.reason]
    if name != "gpt_neox":  # both norms of one value share a part, which is computed once
        assert computed(again.graph) == computed(graph)
    assert [terms_of(op) for op in attentions(again.graph)] == [terms_of(op) for op in attentions(graph)]


def test_ops_without_a_body_are_not_decomposed() -> None:
    text = program("x: f32[B, 8], w: f32[8, 8]", "y: f32[B, 8]", "y = matmul(x, w)", "return y = y")
    with pytest.raises(UsageError, match="matmul has no body, so it cannot be decomposed"):
        Decompose(("matmul",))
    assert optimize(text, Decompose()).graph == parse_graph(text)


# -- masks and products of other passes ------------------------------------------------------------------------


def test_an_input_mask_is_taken_for_no_more_than_it_is() -> None:
    """A float mask input may hold the numbers that mask, so a triangle next to it cannot become a term by position."""

    def build(b: Builder) -> Expr:
        outside = b.input("outside", "f32[B, 1, 1, S]")
        return scaled(b, lambda x: b.where(triangle(b), x, LOW) + outside)

    before = graph_of(build)
    optimized = fused(before)
    (op,) = attentions(optimized.graph)
    assert terms_of(op) == "bias(s t), bias(b t)"
    (event,) = next(r for r in optimized.log if r.name == "fuse-attention").refusals
    assert event.reason.startswith("the mask stays an addend: it is -3.4")
    assert event.reason.endswith("another addend may outweigh it")
    inputs, weights = draw(before, {"B": 2, "S": 4}, 0)
    inputs["outside"][0, 0, 0, :3] = LOW  # the first three queries of that row see no key
    wanted, got = (interpret(g, inputs, weights, float64=True)["y"] for g in (before, optimized.graph))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=ROUNDING * (1 + np.abs(wanted).max()))


def test_scale_is_the_default_only_where_it_is_that_number() -> None:
    """The default is 1/sqrt(8) within the roundings of float32."""
    for number, scale in (("0.35355338", None), ("0.35355341", None), ("0.3535", 0.3535), ("0.125", 0.125)):
        (op,) = attentions(optimize(BEFORE.replace("0.35355338", number), FuseAttention()).graph)
        assert op.scale == scale


def test_a_scale_that_overflows_is_refused() -> None:
    twice = "big = mul(scores, 3e38)\n    scaled = mul(big, 3e38)"
    text = BEFORE.replace("scaled = mul(scores, 0.35355338)", twice)
    log = optimize(text, FuseAttention()).log
    assert "which f32 cannot hold" in log[0].refusals[0].reason


def test_results_of_fused_products_are_not_masks() -> None:
    """The fused product computes finite numbers from finite numbers, as the unfused product does; an input may be
    infinite.
    """
    b = Builder(Graph("g"))
    x, w = b.input("x", "f32[S, 8]"), b.parameter("w", "f32[4, 8]")
    assert hazards_of(x.value)
    assert not hazards_of(b.linear(x, w).value)
    assert not hazards_of(b.activated_linear(x, w, activation="gelu", weight_axes="n k").value)


def test_a_site_that_is_refused_leaves_the_next_one_to_be_fused() -> None:
    def both(b: Builder) -> Expr:
        q, k, v = q_k_v(b)
        over_queries = b.softmax(q @ swapped(b, v) * SCALE, axis=2) @ v
        return over_queries + b.softmax(q @ swapped(b, k) * SCALE) @ v

    assert len(attentions(fused(graph_of(both)).graph)) == 1


@pytest.mark.parametrize("rows", range(1, 6))
@pytest.mark.parametrize("columns", range(1, 6))
def test_a_band_is_said_by_limits_that_keep_the_same(rows: int, columns: int) -> None:
    offsets = np.arange(columns) - np.arange(rows)[:, None]
    for low in range(1 - rows, columns):
        for high in range(low, columns):
            kept = (offsets >= low) & (offsets <= high)
            found = band_of(kept)
            assert found is not None
            least, most = (-rows if found[0] is None else found[0]), (columns if found[1] is None else found[1])
            assert np.array_equal((offsets >= least) & (offsets <= most), kept), (low, high, found)
    assert band_of(np.zeros((rows, columns), np.bool_)) is None
    holed = np.ones((6, 6), np.bool_)
    holed[rows, columns] = False
    assert band_of(holed) is None


def test_ranges_of_an_addend_include_all_its_operands() -> None:
    b = Builder(Graph("g"))
    x, w = b.input("x", "f32[S]"), b.parameter("w", "f32[S]")
    for addend, held in (
        (x + 1.0, {"large"}),
        (x + b.tanh(w), {"large"}),
        (x + b.cast(b.input("i", "i64[S]"), to="f32"), {"large"}),
        (w + b.softmax(x), set()),
        (w + 1e9, {"large"}),
        (w + np.inf, {"large", "infinite", "rising"}),
        (w - b.constant(-np.inf), {"large", "infinite"}),
        (b.log(w), {"large", "infinite"}),
        (w / 3.0, {"large"}),
    ):
        assert hazards_of(addend.value) == held
