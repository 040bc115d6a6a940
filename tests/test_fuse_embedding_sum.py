"""Sums of embeddings become one op, however they are nested. Near misses stay, with reasons. Numbers are the same."""

from __future__ import annotations

import numpy as np
import pytest

import treadle as t
from tests.pass_programs import assert_same_numbers, numbers, optimize, program
from treadle.explaining.fusion import explain_fusion
from treadle.ir.analysis.cost import node_cost
from treadle.ir.analysis.following import follow
from treadle.ir.ops.embedding_sums import EmbeddingSum
from treadle.ir.text.parser import parse_graph
from treadle.passes.cleanup.decompose import Decompose
from treadle.passes.framework.manager import PassManager
from treadle.passes.fusion.fuse_embedding_sum import FuseEmbeddingSum

TAKES = "i: i64[B, S], j: i64[S], k: i32[B, S], x: f32[B, S, 8]"
WEIGHTS = ["word: f32[9, 8]", "place: f32[7, 8]", "kind: f32[6, 8]", "narrow: f32[7, 1]"]
A, P, K = "a = embedding($word, i)", "p = embedding($place, j)", "e = embedding($kind, k)"
THREE = "y = embedding_sum($word, $place, $kind, i, j, k, tables=3)"
RETURN = "return y = y"


def text(*lines: str) -> str:
    return program(TAKES, "y: f32[B, S, 8]", *lines, weights=WEIGHTS)


CASES = {
    "two": ([A, P, "y = add(a, p)", RETURN], ["y = embedding_sum($word, $place, i, j)", RETURN]),
    "two of which the first broadcasts": (
        [A, P, "y = add(p, a)", RETURN],
        ["y = embedding_sum($place, $word, j, i)", RETURN],
    ),
    "three": ([A, P, K, "s = add(a, p)", "y = add(s, e)", RETURN], [THREE, RETURN]),
    "three, the sum on the right": ([A, P, K, "s = add(a, p)", "y = add(e, s)", RETURN], [THREE, RETURN]),
    "four in pairs": (
        [A, P, K, "s = add(a, p)", "b = embedding($kind, i)", "u = add(e, b)", "y = add(s, u)", RETURN],
        ["y = embedding_sum($word, $place, $kind, $kind, i, j, k, i, tables=4)", RETURN],
    ),
    "gathers of weights, and a number for the index": (
        ["a = gather($word, i, axis=0)", "p = gather($place, 2, axis=0)", "y = add(a, p)", RETURN],
        ["y = embedding_sum($word, $place, i, 2)", RETURN],
    ),
    "one that is a sum already": (
        ["s = embedding_sum($word, $place, i, j)", K, "y = add(s, e)", RETURN],
        [THREE, RETURN],
    ),
    "what is added after it": (
        [A, P, "s = add(a, p)", "y = add(s, x)", "z = tanh(y)", "return y = z"],
        ["s = embedding_sum($word, $place, i, j)", "y = add(s, x)", "z = tanh(y)", "return y = z"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_before_and_after(name: str) -> None:
    before, after = (text(*lines) for lines in CASES[name])
    optimized = optimize(before, FuseEmbeddingSum())
    assert optimized.graph == parse_graph(after)
    assert parse_graph(str(optimized.graph)) == optimized.graph
    assert_same_numbers(optimized.source, optimized.graph)
    certified = PassManager([FuseEmbeddingSum()], certify=True).run(parse_graph(before)).log[0]
    assert certified.changes == 1
    assert certified.certificates
    assert not any("not certified" in c.note for c in certified.certificates)


@pytest.mark.parametrize("name", [name for name in CASES if name != "four in pairs"])
def test_a_chain_keeps_its_bits(name: str) -> None:
    optimized = optimize(text(*CASES[name][0]), FuseEmbeddingSum())
    apart = PassManager([Decompose(("embedding_sum",))]).run(optimized.graph).graph
    np.testing.assert_array_equal(numbers(apart)["y"], numbers(optimized.source)["y"])


REFUSED = {
    "scaled": (
        [A, P, "s = mul(a, 2.0)", "y = add(s, p)", RETURN],
        "a term is mul of an embedding, not the embedding itself",
    ),
    "another term between them": (
        [A, P, "s = add(a, x)", "y = add(s, p)", RETURN],
        "a term is x, not an embedding",
    ),
    "computed, between them": (
        [A, P, "n = tanh(x)", "s = add(a, n)", "y = add(s, p)", RETURN],
        "a term is tanh, not an embedding",
    ),
    "used elsewhere": (
        [A, P, "s = add(a, p)", "y = mul(s, a)", RETURN],
        "the embedding is used elsewhere, by mul",
    ),
    "of another width": (
        [A, "n = embedding($narrow, j)", "y = add(n, a)", RETURN],
        "tables are of different widths: f32[7, 1] and f32[9, 8]",
    ),
    "in two sums": (
        [A, P, K, "s = add(a, p)", "u = add(a, e)", "y = mul(s, u)", RETURN],
        "the embedding is used elsewhere",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_near_miss_says_why(name: str) -> None:
    lines, reason = REFUSED[name]
    optimized = optimize(text(*lines), FuseEmbeddingSum())
    assert optimized.graph == parse_graph(text(*lines))
    assert [event.reason for event in optimized.log[0].refusals] == [reason]


def test_a_scaled_term_is_left_out_of_the_others() -> None:
    lines = [A, P, K, "s = add(a, p)", "m = mul(e, 2.0)", "y = add(s, m)", RETURN]
    after = [K, "s = embedding_sum($word, $place, i, j)", "m = mul(e, 2.0)", "y = add(s, m)", RETURN]
    optimized = optimize(text(*lines), FuseEmbeddingSum())
    assert optimized.graph == parse_graph(text(*after))
    assert [event.op for event in optimized.log[0].refusals] == ["mul"]


def test_a_sum_that_is_used_elsewhere_is_one_of_its_own() -> None:
    lines = [A, P, K, "s = add(a, p)", "u = add(s, e)", "y = mul(s, u)", RETURN]
    optimized = optimize(text(*lines), FuseEmbeddingSum())
    after = [K, "s = embedding_sum($word, $place, i, j)", "u = add(s, e)", "y = mul(s, u)", RETURN]
    assert optimized.graph == parse_graph(text(*after))
    assert [event.reason for event in optimized.log[0].refusals] == ["the add is used elsewhere, by mul"]


def test_an_embedding_that_is_an_output_stays() -> None:
    lines = [A, P, "y = add(a, p)", "return y = y, a = a"]
    both = program(TAKES, "y: f32[B, S, 8], a: f32[B, S, 8]", *lines, weights=WEIGHTS)
    optimized = optimize(both, FuseEmbeddingSum())
    assert optimized.graph == optimized.source
    assert [event.reason for event in optimized.log[0].refusals] == ["the embedding is an output as well"]


def test_more_tables_than_it_takes() -> None:
    lines = [f"e{n} = embedding($word, i)" for n in range(9)]
    sums = ["s0 = add(e0, e1)", *(f"s{n} = add(s{n - 1}, e{n + 1})" for n in range(1, 8)), "return y = s7"]
    (refusal, *_) = optimize(text(*lines, *sums), FuseEmbeddingSum()).log[0].refusals
    assert refusal.reason == "9 embeddings are added, but embedding_sum takes at most 8"


# -- passes and costs of the op ----------------------------------------------------------------------------------------


def test_bert_has_one_and_gpt2_too() -> None:
    """BERT and GPT-2 have one embedding sum each. It is fused before the following norm, which would else fuse the last
    addition.
    """
    for model, tables in (("bert", 3), ("gpt2", 2)):
        graph = t.compile(model, layers=1, dim=16, heads=2, vocab=20).graph
        found = [node.op for _, node in graph.walk() if isinstance(node.op, EmbeddingSum)]
        assert [op.tables for op in found] == [tables]
        assert not any(node.op.name == "embedding" for _, node in graph.walk())


@t.model
def with_a_layer_between(tokens: t.i64["B S"], features: t.f32["B S 4"]):
    x = t.embed(tokens, 20, 8, name="word") + t.linear(features, 8, name="features")
    return x + t.embed(t.positions(tokens), 16, 8, name="place")


def test_explain_lists_each_site() -> None:
    verdicts = explain_fusion("bert", layers=1).blocks[-1].verdicts
    (verdict,) = [v for v in verdicts if v.kind == "embedding"]
    assert (verdict.status, verdict.op) == ("fused", "embedding_sum")
    between = parse_graph(text(*REFUSED["another term between them"][0]))
    (verdict,) = [v for v in explain_fusion(between).blocks[0].verdicts if v.kind == "embedding"]
    assert (verdict.status, verdict.reason) == ("refused", "a term is x, not an embedding")
    (verdict,) = [v for v in explain_fusion(with_a_layer_between).blocks[0].verdicts if v.kind == "embedding"]
    assert (verdict.status, verdict.reason) == ("refused", "a term is linear, not an embedding")
    assert verdict.hint == "add the embeddings to each other first"
    scaled = parse_graph(text(*REFUSED["scaled"][0]))
    assert [v for v in explain_fusion(scaled).blocks[0].verdicts if v.kind == "embedding"] == []


def test_its_cost_is_that_of_rows_and_sums() -> None:
    graph = parse_graph(text(*CASES["three"][1]))
    (node,) = graph.main.nodes
    cost = node_cost(node, {"B": 2, "S": 3})
    assert cost.flops == 2 * (2 * 3 * 8)
    rows, indices = 4 * 8 * (2 * 3), 8 * (2 * 3) + 8 * 3 + 4 * (2 * 3)
    assert cost.bytes == 4 * rows + indices  # for three tables and the result


def test_a_divided_table_leaves_a_sum_to_combine() -> None:
    graph = parse_graph(text(*CASES["two"][1]))
    followed = follow(graph, "word[0]")
    assert followed.split()
    assert [c.by for c in followed.split().combine] == ["sum"]
    assert follow(graph, "S").step()
