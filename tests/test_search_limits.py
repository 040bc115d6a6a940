"""Search limits of passes: a match at the limit is found, a match just beyond the limit is not."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np
import pytest

from tests.attention_programs import LOW, products, scaled, triangle
from tests.pass_programs import optimize, program
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Function, Graph
from treadle.ir.types import f32, i64
from treadle.passes.cleanup.canonicalize import Canonicalize
from treadle.passes.cleanup.fold_constants import FoldConstants
from treadle.passes.cleanup.round_trips import round_trip_at, round_trip_from
from treadle.passes.framework.manager import PassManager
from treadle.passes.fusion.attention.fuse_attention import FuseAttention
from treadle.passes.fusion.fuse_embedding_sum import is_of_embeddings
from treadle.passes.fusion.fuse_rotary import FuseRotary
from treadle.passes.fusion.truth_values import is_of_truth
from treadle.passes.lowering.grouping import Chains
from treadle.passes.lowering.hoist_weights import HoistWeights
from treadle.passes.products.fold_scale import FoldScale
from treadle.passes.sites.fusion_sites import find_sites

Found = Callable[[int], bool]


def chain(x: Expr, step: Callable[[Expr], Expr], count: int) -> Expr:
    return reduce(lambda y, _: step(y), range(count), x)


def embeddings_beneath_scales(count: int) -> bool:
    b = Builder(Graph("g"))
    looked_up = b.embedding(b.parameter("w", "f32[9, 4]"), b.input("i", "i64[S]"))
    return is_of_embeddings(chain(looked_up, lambda y: y * 2.0, count).value)


def truths_beneath_products(count: int) -> bool:
    b = Builder(Graph("g"))
    return is_of_truth(chain(b.cast(b.input("m", "bool[S]"), to="f32"), lambda y: y * y, count - 1).value)


def rounded(count: int) -> Expr:
    """Round x, cast it to i8 and back, with `count` steps from the cast back to the rounding, both included."""
    b = Builder(Graph("g"))
    kept = chain(b.round(b.input("x", "f32[S]")), lambda y: b.minimum(y, 127.0), count - 2)
    return b.cast(b.cast(kept, to="i8"), to="f32")


def a_round_trip_upwards(count: int) -> bool:
    node = rounded(count).value.node
    assert node is not None
    return round_trip_at(node) is not None


def a_round_trip_downwards(count: int) -> bool:
    """Search from the rounding down to the cast back, in steps that include both."""
    y = rounded(count - 1)
    nodes = y.builder.function.nodes
    readers = {v: [n for n in nodes if v in n.inputs] for n in nodes for v in (*n.inputs, *n.results)}
    return round_trip_from(y.builder.function.inputs[0], lambda v: readers[v]) is not None


def a_table_that_is_cut(count: int) -> bool:
    """Slice a table of positions that takes `count` values to compute, the result included."""
    b = Builder(Graph("g"))
    table = chain(b.iota(size="T", dtype=i64), lambda y: b.abs(y), count - 1)
    b.outputs(y=b.slice(table, axis=0, stop="S") + b.input("x", "i64[S]"), t=b.input("z", "i64[T]"))
    record = PassManager([Canonicalize()], certify=False).run(b.graph).log[0]
    return any(event.rule == "slice-of-positions" for event in record.matches)


def an_index(count: int) -> list[str]:
    """Return the rules that match a lookup by an index computed from `count` values."""
    b = Builder(Graph("g"))
    x, i = b.input("x", "i64[S]"), chain(b.iota(size="S", dtype=i64), lambda y: b.expand(y, shape=("S",)), count - 1)
    b.outputs(y=b.gather(x, i, axis=0), z=b.where(i < 0, x, i))
    names = {"gather-of-all", "where-negative"}
    rules = [rule for rule in Canonicalize().rules if rule.name in names]
    return [event.rule for rule in rules for event in PassManager([rule], certify=False).run(b.graph).log[0].matches]


def a_lookup_of_all(count: int) -> bool:
    return "gather-of-all" in an_index(count)


def an_index_that_is_not_negative(count: int) -> bool:
    return "where-negative" in an_index(count)


def fused(b: Builder, y: Expr) -> list[str]:
    b.outputs(y=y)
    graph = PassManager([FuseAttention()], certify=False).run(b.graph).graph
    return [term.text for node in graph.main.nodes for term in getattr(node.op, "terms", ())]


def a_mask_by_positions(count: int) -> bool:
    """j <= i; computing j takes `count` ops"""
    b = Builder(Graph("g"))
    i, j = b.rearrange(b.iota(size="S"), pattern="s -> s 1"), b.iota(size="S")
    moved = chain(j, lambda y: b.expand(y, shape=("S",)), count - 1)
    return fused(b, scaled(b, lambda x: b.where(moved <= i, x, LOW))) == ["causal"]


def a_mask_beneath_moves(count: int) -> bool:
    """A mask j <= i that `count` expands follow"""
    b = Builder(Graph("g"))
    kept = chain(triangle(b), lambda y: b.expand(y, shape=("S", "S")), count)
    return fused(b, scaled(b, lambda x: b.where(kept, x, LOW))) == ["causal"]


def a_bias_by_distance(far: int) -> bool:
    """T5's buckets, up to this largest distance"""
    b = Builder(Graph("g"))
    i, j = b.rearrange(b.iota(size="S"), pattern="s -> s 1"), b.iota(size="S")
    distance = -b.minimum(j - i, 0)
    log = b.log(b.cast(distance, to="f32") / 16) / float(np.log(far / 16)) * 16
    grown = b.minimum(b.cast(log, to="i64") + 16, 31)
    table = b.embedding(b.parameter("table", "f32[32, 4]"), b.where(distance < 16, distance, grown))
    bias = b.rearrange(table, pattern="s t h -> 1 h s t")
    y = products(b, lambda x: b.where(triangle(b), x + bias, LOW))
    return fused(b, y) == ["causal", f"t5_relative(32, {far})"]


def a_turn_of_moved_tables(count: int) -> bool:
    """`count` ops from the sum to the halves of angles: a product, the ops between, a cosine or a sine, a concat"""
    b = Builder(Graph("g"))
    x = b.input("x", "f32[B, 2, S, 4]")
    half = b.rearrange(b.cast(b.input("p", "i64[S]"), to="f32"), pattern="s -> s 1") * b.parameter("f", "f32[2]")
    angles = b.concat(half, half, axis=1)
    cos, sin = (chain(wave(angles), lambda y: b.expand(y, shape=("S", 4)), count - 4) for wave in (b.cos, b.sin))
    turned = b.concat(-b.slice(x, axis=3, start=2), b.slice(x, axis=3, stop=2), axis=3)
    b.outputs(y=x * cos + turned * sin)
    return bool(PassManager([FuseRotary()], certify=False).run(b.graph).log[0].matches)


def sites(b: Builder, y: Expr) -> set[str]:
    b.outputs(y=y)
    return {site.kind for site in find_sites(b.graph)}


def attention_with_steps_between(count: int) -> bool:
    """`count` ops between the product and the softmax, and `count` ops after the softmax"""
    b = Builder(Graph("g"))
    q, k, v = (b.input(name, "f32[S, 4]") for name in "qkv")
    scores = chain(q @ b.rearrange(k, pattern="t d -> d t"), b.abs, count)
    return "attention" in sites(b, chain(b.softmax(scores), b.abs, count) @ v)


def a_norm_with_steps_before_its_root(count: int) -> bool:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[B, 8]")
    mean = b.reduce_mean(x * x, axes=(-1,), keep=True)
    return "normalization" in sites(b, x * b.rsqrt(chain(mean, lambda y: y + 1.0, count)))


def an_activation_of_what_was_scaled(count: int) -> bool:
    """`count` ops between the gated value and the gate"""
    b = Builder(Graph("g"))
    x = b.input("x", "f32[B, 8]")
    return "activation" in sites(b, x * b.sigmoid(chain(x, lambda y: y * 2.0, count)))


def an_epilogue_beneath_moves(count: int) -> bool:
    """An activation of a product, with `count` rearranges between them"""
    b = Builder(Graph("g"))
    y = b.linear(b.input("x", "f32[B, 8]"), b.parameter("w", "f32[8, 8]"))
    return "epilogue" in sites(b, b.relu(chain(y, lambda y: b.expand(y, shape=("B", 8)), count)))


def a_turn_by_tables_of_many_makings(count: int) -> bool:
    """A cosine and a sine, each followed by `count` ops"""
    b = Builder(Graph("g"))
    angles = b.input("a", "f32[S, 8]")
    cos, sin = (chain(wave(angles), lambda y: b.expand(y, shape=("S", 8)), count) for wave in (b.cos, b.sin))
    return "rotary" in sites(b, b.input("x", "f32[S, 8]") * cos + b.input("z", "f32[S, 8]") * sin)


def a_fold_of_many_bytes(count: int) -> bool:
    b = Builder(Graph("g"))
    b.outputs(y=b.input("x", f32[count]) + -b.constant(np.ones(count, np.float32)))
    return bool(PassManager([FoldConstants()], certify=False).run(b.graph).log[0].matches)


def a_fold_that_grows(count: int) -> bool:
    text = program(f"x: i64[{count}]", f"y: i64[{count}]", f"a = iota(size={count})", "y = add(x, a)", "return y = y")
    return bool(optimize(text, FoldConstants()).log[0].matches)


def what_is_made_of_a_weight(count: int) -> bool:
    """Derive `count` numbers from a weight of two numbers"""
    b = Builder(Graph("g"))
    made = b.exp(b.expand(b.parameter("w", "f32[1, 2]"), shape=(count // 2, 2)))
    b.outputs(y=b.input("x", f32[count // 2, 2]) + made)
    return bool(PassManager([HoistWeights()]).run(b.graph).graph.derived_weights)


def what_leaves_a_block(count: int) -> bool:
    """Derive `count` values from a weight in a block"""
    graph, block = Graph("g"), Function("block")
    b = Builder(graph, block)
    b.outputs(y=b.input("x", "f32[4]") + chain(b.parameter("w", "f32[4]"), b.exp, count))
    graph.add_function(block)
    b = Builder(graph)
    b.outputs(y=b.call(block, [b.input("x", "f32[4]"), b.parameter("w", "f32[4]")])[0])
    return len(PassManager([HoistWeights()]).run(graph).graph.functions) > 2


def steps_of(b: Builder) -> list[int]:
    """Return the sizes of steps in chains of at most three nodes and three inputs."""
    chains = Chains(lambda node: node.is_elementwise, lambda node: False, most_inputs=3, most_nodes=3)
    return [len(step.nodes) for step in chains(b.function)]


def test_nodes_and_inputs_of_a_chain() -> None:
    for count, sizes in ((2, [2]), (3, [3]), (4, [1, 3]), (6, [3, 3]), (7, [1, 3, 3])):
        b = Builder(Graph("g"))
        b.outputs(y=chain(b.input("x", "f32[S]"), b.exp, count))
        assert steps_of(b) == sizes
    for count, sizes in ((3, [2]), (4, [1, 1, 1])):
        b = Builder(Graph("g"))
        first, *others = [b.input(f"x{n}", "f32[S]") for n in range(count)]
        b.outputs(y=reduce(lambda y, x: y + x, others, first))
        assert steps_of(b) == sizes


@pytest.mark.parametrize(
    ("dtype", "numbers"),
    [("f32", (2.0**-10, -(2.0**-10), 2.0**10, -(2.0**10))), ("f16", (2.0**-10, 1.0)), ("bf16", (2.0**-10, -1.0))],
)
def test_scales_that_come_first(dtype: str, numbers: tuple[float, ...]) -> None:
    """Scales of logits that are applied before the product; a scale slightly further from 1 stays after the product."""

    def comes_first(number: float) -> bool:
        b = Builder(Graph("g"))
        y = b.linear(b.input("x", f"{dtype}[B, 4]"), b.parameter("w", f"{dtype}[96, 4]"))
        b.outputs(y=y * number)
        return bool(PassManager([FoldScale()], certify=False).run(b.graph).log[0].matches)

    for number in numbers:
        further = number * (1 + 2.0**-6) if abs(number) >= 1 else number * (1 - 2.0**-6)
        assert comes_first(number) and not comes_first(further)


LIMITS: dict[Found, int] = {
    embeddings_beneath_scales: 8,
    truths_beneath_products: 8,
    a_round_trip_upwards: 16,
    a_round_trip_downwards: 16,
    a_table_that_is_cut: 32,
    a_lookup_of_all: 255,
    an_index_that_is_not_negative: 255,
    a_mask_by_positions: 32,
    a_mask_beneath_moves: 32,
    a_bias_by_distance: 159,
    a_turn_of_moved_tables: 24,
    attention_with_steps_between: 24,
    a_norm_with_steps_before_its_root: 24,
    an_activation_of_what_was_scaled: 6,
    an_epilogue_beneath_moves: 32,
    a_turn_by_tables_of_many_makings: 31,
    a_fold_of_many_bytes: 1 << 18,
    a_fold_that_grows: 128,
    what_leaves_a_block: 1024,
}


@pytest.mark.parametrize("found", LIMITS, ids=lambda found: found.__name__)
def test_the_last_that_is_found(found: Found) -> None:
    assert found(LIMITS[found])
    assert not found(LIMITS[found] + 1)


def test_an_index_of_nothing_is_not_negative() -> None:
    b = Builder(Graph("g"))
    i = b.iota(size=0, dtype=i64)
    b.outputs(y=b.where(i < 0, b.input("x", "i64[0]"), i))
    record = PassManager([Canonicalize()]).run(b.graph).log[0]
    assert "where-negative" in [event.rule for event in record.matches]


def test_bytes_that_are_made_of_weights() -> None:
    """The limit is eight times the bytes of the weights, plus a megabyte."""
    assert what_is_made_of_a_weight((8 * 8 + (1 << 20)) // 4)
    assert not what_is_made_of_a_weight((8 * 8 + (1 << 20)) // 4 + 2)
