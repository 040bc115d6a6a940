"""Rotary fusion: each form becomes the op. Near misses stay, with a reason. Numbers are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from tests.attention_numbers import assert_equal_everywhere, computed
from tests.attention_programs import graph_of
from tests.pass_programs import optimize, program
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.ops.rotary import Rotary
from treadle.ir.samples import Sample
from treadle.ir.text.parser import parse_graph
from treadle.passes.cleanup.canonicalize import Canonicalize
from treadle.passes.cleanup.dead_code import DeadCode
from treadle.passes.cleanup.decompose import Decompose
from treadle.passes.framework.manager import Optimized, PassManager
from treadle.passes.fusion.fuse_rotary import FuseRotary

Build = Callable[[Builder], Expr]
HALF = 3
FREQUENCIES = np.float32([1.0, 0.3, 0.05])


def fused(graph: Graph) -> Optimized:
    return PassManager([Canonicalize(), FuseRotary(), DeadCode()]).run(graph)


# -- pieces ----------------------------------------------------------------------------------------------------


def heads(b: Builder, size: int = 2 * HALF) -> Expr:
    return b.input("x", f"f32[B, 4, S, {size}]")


def positions(b: Builder) -> Expr:
    return b.input("positions", "i64[B, S]")


def angles(b: Builder, at: Expr | None = None) -> Expr:
    """Return angles [b, 1, s, f]."""
    at = b.rearrange(positions(b) if at is None else at, pattern="b s -> b 1 s 1")
    return at.cast("f32") * frequencies(b)


def frequencies(b: Builder) -> Expr:
    return b.constant(FREQUENCIES)


def doubled(b: Builder, x: Expr) -> Expr:
    return b.concat(x, x, axis=-1)


def halves(b: Builder, x: Expr) -> tuple[Expr, Expr]:
    return b.slice(x, axis=3, stop=HALF), b.slice(x, axis=3, start=HALF, stop=2 * HALF)


def rotate_half(b: Builder, x: Expr) -> Expr:
    first, second = halves(b, x)
    return b.concat(-second, first, axis=3)


def turned(b: Builder, x: Expr, a: Expr | None = None) -> Expr:
    a = doubled(b, angles(b)) if a is None else a
    return x * b.cos(a) + rotate_half(b, x) * b.sin(a)


def pairs(b: Builder, x: Expr) -> tuple[Expr, Expr]:
    return b.slice(x, axis=3, stride=2), b.slice(x, axis=3, start=1, stride=2)


def interleaved(b: Builder, first: Expr, second: Expr) -> Expr:
    both = b.concat(*(b.rearrange(x, pattern="b h s f -> b h s f 1") for x in (first, second)), axis=4)
    return b.rearrange(both, pattern="b h s f two -> b h s (f two)")


def repeated(b: Builder, x: Expr) -> Expr:
    """Each element twice in a row, as repeat_interleave returns it"""
    wide = b.expand(b.rearrange(x, pattern="b o s f -> b o s f 1"), shape=(None, None, None, None, 2))
    return b.rearrange(wide, pattern="b o s f two -> b o s (f two)")


# -- forms -----------------------------------------------------------------------------------------------------


def _rotated_half(b: Builder) -> Expr:
    return turned(b, heads(b))


def _in_two_halves(b: Builder) -> Expr:
    first, second = halves(b, heads(b))
    cos, sin = b.cos(angles(b)), b.sin(angles_again(b))
    return b.concat(first * cos - second * sin, second * cos + first * sin, axis=3)


def angles_again(b: Builder) -> Expr:
    """Return the angles that the graph already has: the operand of its last cosine."""
    node = next(n for n in reversed(b.function.nodes) if n.op.name == "cos")
    return b.expr(node.inputs[0])


def _partial(b: Builder) -> Expr:
    x = heads(b, 10)
    return b.concat(turned(b, b.slice(x, axis=3, stop=2 * HALF)), b.slice(x, axis=3, start=2 * HALF), axis=3)


def _interleaved(b: Builder) -> Expr:
    first, second = pairs(b, heads(b))
    cos = b.cos(angles(b))
    sin = b.sin(angles_again(b))
    return interleaved(b, first * cos - second * sin, first * sin + second * cos)


def _every_two(b: Builder) -> Expr:
    x = heads(b)
    first, second = pairs(b, x)
    a = angles(b)
    return x * repeated(b, b.cos(a)) + interleaved(b, -second, first) * repeated(b, b.sin(a))


def _interleaved_partial(b: Builder) -> Expr:
    x = heads(b, 8)
    part = b.slice(x, axis=3, stop=2 * HALF)
    first, second = pairs(b, part)
    a = angles(b)
    cos, sin = b.cos(a), b.sin(a)
    y = interleaved(b, first * cos - second * sin, second * cos + first * sin)
    return b.concat(y, b.slice(x, axis=3, start=2 * HALF), axis=3)


def _heads_after_positions(b: Builder) -> Expr:
    x = b.input("x", f"f32[B, S, 4, {2 * HALF}]")
    a = b.rearrange(doubled(b, angles(b)), pattern="b 1 s d -> b s 1 d")
    return turned(b, x, a)


def _one_row_of_positions(b: Builder) -> Expr:
    """The same positions for every row"""
    at = b.rearrange(b.iota(size="S"), pattern="s -> 1 s")
    return turned(b, heads(b), doubled(b, angles(b, at)))


def _angles_by_matmul(b: Builder) -> Expr:
    f = b.rearrange(frequencies(b), pattern="f -> 1 f 1")
    at = b.rearrange(positions(b).cast("f32"), pattern="b s -> b 1 s")
    a = b.rearrange(b.matmul(f, at), pattern="b f s -> b s f")
    return turned(b, heads(b), b.rearrange(doubled(b, a), pattern="b s d -> b 1 s d"))


def _angles_by_einsum(b: Builder) -> Expr:
    a = b.einsum(positions(b).cast("f32"), frequencies(b), equation="b s, f -> b s f")
    cos, sin = (b.rearrange(doubled(b, x), pattern="b s d -> b 1 s d") for x in (b.cos(a), b.sin(a)))
    x = heads(b)
    return x * cos + rotate_half(b, x) * sin


def _moved(b: Builder) -> Expr:
    """A rearrange of an input moves heads before positions, as after a normalization of heads"""
    x = b.input("x", f"f32[B, S, 4, {2 * HALF}]")
    return turned(b, b.rearrange(x, pattern="b s h d -> b h s d"))


def _one_head(b: Builder) -> Expr:
    x = b.input("x", f"f32[B, S, {2 * HALF}]")
    return turned(b, b.rearrange(x, pattern="b s d -> b 1 s d"))


def _moved_partial(b: Builder) -> Expr:
    x = b.rearrange(b.input("x", "f32[B, S, 4, 10]"), pattern="b s h d -> b h s d")
    return b.concat(turned(b, b.slice(x, axis=3, stop=2 * HALF)), b.slice(x, axis=3, start=2 * HALF), axis=3)


def _moved_in_pairs(b: Builder) -> Expr:
    x = b.rearrange(b.input("x", f"f32[B, S, 4, {2 * HALF}]"), pattern="b s h d -> b h s d")
    first, second = pairs(b, x)
    cos = b.cos(angles(b))
    sin = b.sin(angles_again(b))
    return interleaved(b, first * cos - second * sin, first * sin + second * cos)


# Layout [b, s, h, d], as in Llama's own code and in GPT-NeoX, which rotate heads before they transpose them.


def by_position(b: Builder, x: Expr) -> Expr:
    """Return angles [b, s, 1, f]."""
    return b.rearrange(x, pattern="b 1 s f -> b s 1 f")


def turned_pairs(b: Builder, x: Expr) -> Expr:
    """Return pairs along a new axis, before they are joined: [b, s, h, f, 2] for x [b, s, h, (f 2)]."""
    apart = b.rearrange(x, pattern=f"b s h (f={HALF} two) -> b s h f two")
    first, second = (b.slice(apart, axis=4, start=i, stop=i + 1) for i in range(2))
    one, two = (b.rearrange(y, pattern="b s h f 1 -> b s h f") for y in (first, second))
    cos = by_position(b, b.cos(angles(b)))
    sin = by_position(b, b.sin(angles_again(b)))
    both = (one * cos - two * sin, one * sin + two * cos)
    return b.concat(*(b.rearrange(y, pattern="b s h f -> b s h f 1") for y in both), axis=4)


def turned_halves(b: Builder, x: Expr) -> Expr:
    a = by_position(b, doubled(b, angles(b)))
    return x * b.cos(a) + rotate_half(b, x) * b.sin(a)


def row_heads(b: Builder, size: int = 2 * HALF) -> Expr:
    return b.input("x", f"f32[B, S, 4, {size}]")


def cut_heads(b: Builder, size: int = 2 * HALF, parts: int = 1) -> Expr:
    """Return a product's result as [b, s, h, parts d]."""
    width = 4 * size * parts
    x = b.linear(b.input("x", "f32[B, S, 5]"), b.parameter("w", f"f32[{width}, 5]"))
    return b.rearrange(x, pattern="b s (h=4 d) -> b s h d")


def _pairs_then(pattern: str) -> Build:
    """The rearrange that joins pairs is merged with the following one"""
    return lambda b: b.rearrange(turned_pairs(b, row_heads(b)), pattern=pattern)


def _pairs_of_a_product(b: Builder) -> Expr:
    return b.rearrange(turned_pairs(b, cut_heads(b)), pattern="b s h f two -> b h s (f two)")


def _joined_pairs_of_a_product(b: Builder) -> Expr:
    return b.rearrange(turned_pairs(b, cut_heads(b)), pattern="b s h f two -> b s (h f two)")


def _halves_of_a_product(b: Builder) -> Expr:
    return turned_halves(b, cut_heads(b))


def _halves_of_a_part(b: Builder) -> Expr:
    """Keys of one product that computes queries, keys and values head by head, as in GPT-NeoX"""
    whole = cut_heads(b, parts=3)
    return turned_halves(b, b.slice(whole, axis=3, start=2 * HALF, stop=4 * HALF))


def _halves_of_a_block(b: Builder) -> Expr:
    """Keys that follow all queries, as in Phi-3"""
    x = b.linear(b.input("x", "f32[B, S, 5]"), b.parameter("w", f"f32[{3 * 8 * HALF}, 5]"))
    keys = b.slice(x, axis=2, start=8 * HALF, stop=16 * HALF)
    return turned_halves(b, b.rearrange(keys, pattern="b s (h=4 d) -> b s h d"))


def _partial_of_a_product(b: Builder) -> Expr:
    x = cut_heads(b, 10)
    part = b.slice(x, axis=3, stop=2 * HALF)
    return b.concat(turned_halves(b, part), b.slice(x, axis=3, start=2 * HALF), axis=3)


def _cut_then_moved(b: Builder) -> Expr:
    """A rotation of dimensions that are sliced out first"""
    x = b.slice(b.input("x", f"f32[B, S, 4, {2 * HALF + 2}]"), axis=3, stop=2 * HALF)
    return turned(b, b.rearrange(x, pattern="b s h d -> b h s d"), doubled(b, angles(b)))


@dataclass(frozen=True)
class Case:
    name: str
    build: Build
    said: str


FORMS = [
    Case("rotate half", _rotated_half, "half"),
    Case("two halves", _in_two_halves, "half"),
    Case("partial", _partial, "half"),
    Case("interleaved", _interleaved, "interleaved"),
    Case("every two", _every_two, "interleaved"),
    Case("interleaved, partial", _interleaved_partial, "interleaved"),
    Case("heads after positions", _heads_after_positions, "half"),
    Case("moved by a rearrange", _moved, "half"),
    Case("one head", _one_head, "half"),
    Case("moved, partial", _moved_partial, "half"),
    Case("moved, interleaved", _moved_in_pairs, "interleaved"),
    Case("one row of positions", _one_row_of_positions, "half"),
    Case("angles by matmul", _angles_by_matmul, "half"),
    Case("angles by einsum", _angles_by_einsum, "half"),
    Case("pairs, then moved", _pairs_then("b s h f two -> b h s (f two)"), "interleaved"),
    Case("pairs, then transposed", _pairs_then("b s h f two -> b h (f two) s"), "interleaved"),
    Case("pairs, then heads joined", _pairs_then("b s h f two -> b s (h f two)"), "interleaved"),
    Case("pairs, then heads split", _pairs_then("b s (g=2 h) f two -> b s g h (f two)"), "interleaved"),
    Case("pairs of a product", _pairs_of_a_product, "interleaved"),
    Case("pairs of a product, joined", _joined_pairs_of_a_product, "interleaved"),
    Case("halves of a product", _halves_of_a_product, "half"),
    Case("halves of a part of each head", _halves_of_a_part, "half"),
    Case("halves of a block of heads", _halves_of_a_block, "half"),
    Case("partial, of a product", _partial_of_a_product, "half"),
]


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name)
def test_each_form_is_one_rotary(case: Case) -> None:
    before = graph_of(case.build)
    optimized = fused(before)
    ops = [node.op.name for node in optimized.graph.main.nodes]
    assert ops.count("rotary") == 1, f"{optimized.log.explain()}\n{optimized.graph}"
    assert not {"cos", "sin", "concat", "mul"}.intersection(ops)
    (op,) = [node.op for node in optimized.graph.main.nodes if isinstance(node.op, Rotary)]
    assert op.layout == case.said
    # The arithmetic is the same in another order. The tolerance allows some roundings of float64, for angles up to 4.
    assert_equal_everywhere(before, optimized.graph, 64 * 2.0**-52)


# -- near misses -----------------------------------------------------------------------------------------------

ORDER = "the pairs, signs or angles are in neither of rotary's layouts"


def _turned_back(b: Builder) -> Expr:
    x, a = heads(b), doubled(b, angles(b))
    return x * b.cos(a) - rotate_half(b, x) * b.sin(a)


def _no_sign(b: Builder) -> Expr:
    x, a = heads(b), doubled(b, angles(b))
    first, second = halves(b, x)
    return x * b.cos(a) + b.concat(second, first, axis=3) * b.sin(a)


def _mixed(b: Builder) -> Expr:
    """A rotation in halves, with angles repeated as for neighboring pairs"""
    return turned(b, heads(b), repeated(b, angles(b)))


def _sine_for_cosine(b: Builder) -> Expr:
    x, a = heads(b), doubled(b, angles(b))
    return x * b.sin(a) + rotate_half(b, x) * b.cos(a)


def _angles_reversed(b: Builder) -> Expr:
    a = angles(b)
    backwards = b.concat(*(b.slice(a, axis=3, start=i, stop=i + 1) for i in (2, 1, 0)), axis=3)
    return turned(b, heads(b), b.concat(a, backwards, axis=3))


def _float_positions(b: Builder) -> Expr:
    at = b.rearrange(b.input("times", "f32[B, S]"), pattern="b s -> b 1 s 1")
    return turned(b, heads(b), doubled(b, at * frequencies(b)))


def _shifted_angles(b: Builder) -> Expr:
    return turned(b, heads(b), doubled(b, angles(b) + 0.5))


def _angles_by_head(b: Builder) -> Expr:
    slopes = b.input("slopes", f"f32[4, 1, {HALF}]")
    at = b.rearrange(positions(b), pattern="b s -> b 1 s 1").cast("f32")
    return turned(b, heads(b), doubled(b, at * slopes))


def _two_tables(b: Builder) -> Expr:
    x, others = heads(b), b.input("others", "i64[B, S]")
    return x * b.cos(doubled(b, angles(b))) + rotate_half(b, x) * b.sin(doubled(b, angles(b, others)))


def _two_tensors(b: Builder) -> Expr:
    a, other = doubled(b, angles(b)), b.input("other", f"f32[B, 4, S, {2 * HALF}]")
    return heads(b) * b.cos(a) + rotate_half(b, other) * b.sin(a)


def _moved_apart(b: Builder) -> Expr:
    """The same elements, but heads and positions are exchanged in the operand of the sine"""
    x = b.input("x", f"f32[B, 4, 4, {2 * HALF}]")
    at = b.rearrange(b.input("positions", "i64[B, 4]"), pattern="b s -> b 1 s 1")
    a = doubled(b, at.cast("f32") * frequencies(b))
    return x * b.cos(a) + rotate_half(b, b.rearrange(x, pattern="b h s d -> b s h d")) * b.sin(a)


def _one_row_of_x(b: Builder) -> Expr:
    """One x rotated by the positions of every row"""
    return turned(b, b.input("x", f"f32[1, 4, S, {2 * HALF}]"), doubled(b, angles(b)))


def _turned_back_of_a_product(b: Builder) -> Expr:
    x, a = cut_heads(b), by_position(b, doubled(b, angles(b)))
    return x * b.cos(a) - rotate_half(b, x) * b.sin(a)


def _other_heads(b: Builder) -> Expr:
    """The sine multiplies elements of the next head"""
    x, a = cut_heads(b), by_position(b, doubled(b, angles(b)))
    next_ = b.concat(b.slice(x, axis=2, start=1), b.slice(x, axis=2, stop=1), axis=2)
    return x * b.cos(a) + rotate_half(b, next_) * b.sin(a)


NEAR_MISSES = [
    Case("turned back", _turned_back, ORDER),
    Case("no sign", _no_sign, ORDER),
    Case("mixed orders", _mixed, ORDER),
    Case("sine for cosine", _sine_for_cosine, ORDER),
    Case("angles reversed", _angles_reversed, ORDER),
    Case("positions that are not integers", _float_positions, "not a product of integer positions and frequencies"),
    Case("shifted angles", _shifted_angles, "not a product of integer positions and frequencies"),
    Case("two tables", _two_tables, "the cosine and the sine have different angles"),
    Case("two tensors", _two_tensors, "are not multiplied with elements of one tensor"),
    Case("moved apart", _moved_apart, "are not multiplied with elements of one tensor"),
    Case("turned back, of a product", _turned_back_of_a_product, ORDER),
    Case("pairs of other heads", _other_heads, ORDER),
    Case("cut, then moved", _cut_then_moved, "are not multiplied with elements of one tensor"),
    Case("one row of x", _one_row_of_x, f"the factor of the cos, f32[1, 4, S, {2 * HALF}], is repeated along"),
    Case("angles by head", _angles_by_head, "the angles vary along 3 axes other than the axis of pairs"),
]


@pytest.mark.parametrize("case", NEAR_MISSES, ids=lambda case: case.name)
def test_each_near_miss_says_why(case: Case) -> None:
    before = graph_of(case.build)
    optimized = fused(before)
    assert not any(isinstance(node.op, Rotary) for node in optimized.graph.main.nodes)
    report = next(r for r in optimized.log if r.name == "fuse-rotary").refusals
    assert [event.reason for event in report if case.said in event.reason], optimized.log.explain()
    assert all(event.source.startswith("tests/test_fuse_rotary.py:") for event in report)
    assert_equal_everywhere(before, optimized.graph, 64 * 2.0**-52)


# -- text, and round trips -------------------------------------------------------------------------------------


def test_before_and_after_as_text() -> None:
    takes = "x: f32[B, 4, S, 8], positions: i64[B, S], f: f32[4]"
    before = program(
        takes,
        "y: f32[B, 4, S, 8]",
        'p = rearrange(positions, pattern="b s -> b 1 s 1")',
        "pf = cast(p, to=f32)",
        "a = mul(pf, f)",
        "cos = cos(a)",
        "sin = sin(a)",
        "one = slice(x, axis=3, stop=4)",
        "two = slice(x, axis=3, start=4)",
        "oc = mul(one, cos)",
        "ts = mul(two, sin)",
        "left = sub(oc, ts)",
        "tc = mul(two, cos)",
        "os = mul(one, sin)",
        "right = add(tc, os)",
        "y = concat(left, right, axis=3)",
        "return y = y",
    )
    after = program(takes, "y: f32[B, 4, S, 8]", "y = rotary(x, positions, f)", "return y = y")
    optimized = optimize(before, FuseRotary())
    assert optimized.graph == parse_graph(after)
    (match, *_) = optimized.log[0].matches
    assert (match.rule, match.op) == ("fuse-rotary", "concat")


@pytest.mark.parametrize("sample", Rotary.samples, ids=lambda sample: sample.text)
def test_decomposed_rotary_is_fused_again(sample: Sample) -> None:
    b = Builder(Graph("sample"))
    operands = [b.input(f"x{i}", t) for i, t in enumerate(sample.types) if t is not None]
    b.outputs(y=b.rotary(*operands, **sample.attributes))
    apart = PassManager([Decompose(("rotary",))]).run(b.graph).graph
    assert not any(isinstance(node.op, Rotary) for node in apart.main.nodes)
    assert computed(fused(apart).graph) == computed(b.graph)
