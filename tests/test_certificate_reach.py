"""Counterexamples that count against a rewrite: only inputs that the function allows, at sizes that fit its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.pass_programs import program
from tests.planted_rewrites import Planted, certificates, certified, rolled_back
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Function, Graph
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import Size
from treadle.ir.text.parser import parse_graph
from treadle.ir.types import f32, f64
from treadle.passes.certificates.certificate import Certificate, Counterexample
from treadle.passes.certificates.certifying import certify
from treadle.passes.certificates.region_graphs import as_graphs, has_numbers, shrinkings_of
from treadle.passes.certificates.regions import MOST_NODES, Region, claim_of_match
from treadle.passes.framework.manager import Optimized
from treadle.passes.framework.rewrite import Match, Rewrite

# -- free and dependent inputs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowsFirst(Rewrite):
    """where(key, x, where(row, 2, 3)) --> where(row, where(key, x, 2), 3)

    The rewrite is right if `row` is true for every row with a key. Both sides read both masks.
    """

    def pattern(self, p: Any, key: Any, row: Any, x: Any) -> Any:
        return p.where(key, x, p.where(row, 2.0, 3.0))

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.where(m.row, b.where(m.key, m.x, 2.0), 3.0)


def rows_first(keys: Expr, rows: Expr, x: Expr) -> Optimized:
    b = keys.builder
    b.outputs(y=b.where(keys, x, b.where(rows, 2.0, 3.0)))
    return certified(b.graph, RowsFirst())


def rows_with(b: Builder, keys: Expr) -> Expr:
    found: Expr = b.reduce_max(keys.cast("i32"), axes=(-1,), keep=True) > 0
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["rows-of-these-keys", "rows-of-others"])
def test_facts_about_a_mask_hold_for_large_graphs(tied: bool) -> None:
    b = Builder(Graph("g"))
    keys, x = b.input("keys", "bool[B, S]"), b.input("x", "f32[B, S]")
    rows = keys if tied else b.input("others", "bool[B, S]")
    for _ in range(4):
        rows = b.logical_not(rows)
    rows = rows_with(b, rows)
    half = round(MOST_NODES**0.5) + 1
    wide = [b.concat(*[b.tanh(x * float(n)) for n in range(half)], axis=-1) * float(m) for m in range(half)]
    x = b.reduce_sum(b.concat(*wide, axis=-1), axes=(-1,), keep=True)
    found = rows_first(keys, rows, x)
    assert [e.rule for e in found.log[0].matches] == ["rows-first"] * tied
    assert len(rolled_back(found)) == (not tied)
    assert [c.cases > 0 for c in certificates(found)] == [True] * tied


def test_failures_on_unreachable_values_are_notes() -> None:
    """Both masks come from a call, and the claim's region does not extend into calls. So it is unknown if the masks are
    related.
    """
    graph, masks = Graph("g"), Function("masks")
    b = Builder(graph, masks)
    keys = b.input("keys", "bool[B, S]")
    b.outputs(keys=b.logical_not(keys), rows=rows_with(b, b.logical_not(keys)))
    graph.add_function(masks)
    b = Builder(graph)
    keys, rows = b.call(masks, [b.input("keys", "bool[B, S]")])
    found = rows_first(keys, rows, b.input("x", "f32[B, S]"))
    assert [e.rule for e in found.log[0].matches] == ["rows-first"] and not rolled_back(found)
    (note,) = certificates(found)
    assert note.cases == 0 and note.note.startswith("not certified: the results differ")
    assert note.note.endswith("but the result of call may never have the drawn values")
    assert note.note in found.log.certified()


@pytest.mark.parametrize("product", [True, False], ids=["of-a-product", "of-an-input"])
def test_a_product_is_any_number_but_no_mask(product: bool) -> None:
    """softmax(x) + (x - x) equals softmax(x) if all numbers are finite, but a mask that is an input may be infinite."""

    def spelled(b: Builder, m: Match) -> Any:
        e = b.exp(m.x - b.reduce_max(m.x, axes=(-1,), keep=True))
        return e / b.reduce_sum(e, axes=(-1,), keep=True) + (m.x - m.x)

    rule = Planted(lambda p, x, y: p.softmax(x), spelled)
    line = "s = matmul(x, x)" if product else "s = mul(x, 1.0)"
    text = program("x: f32[B, S, S]", "y: f32[B, S, S]", line, "a = softmax(s)", "return y = a")
    found = certified(text, rule)
    assert len(rolled_back(found)) == (not product)
    wrong = certified(text, Planted(lambda p, x, y: p.softmax(x), lambda b, m: b.sigmoid(m.x)))
    assert len(rolled_back(wrong)) == 1


# -- roundings and sizes ---------------------------------------------------------------------------------------------


def both_scaled(n: int, off: float) -> Certificate | Counterexample | None:
    """Return the result for the claim that scales of q and k together equal attention's own scale 1/sqrt(n), or `off`
    times that scale.
    """
    b = Builder(Graph("g"))
    q, k, v = (b.input(name, f"f32[B, 2, S, {n}]") for name in "qkv")
    keys = b.rearrange(k, pattern="b h s d -> b h d s")
    b.softmax((q * n**-0.25) @ (keys * n**-0.25)) @ v
    matched = list(b.graph.main.nodes)
    now = b.attention(q, k, v, scale=None if off == 1.0 else off * n**-0.5)
    made = b.graph.main.nodes[len(matched) :]
    return certify("twice", claim_of_match(matched, made, matched[-1], [now.value]), (b.graph, b.graph))


def test_roundings_of_two_scales_do_not_cancel() -> None:
    """n^(-1/4) is rounded in float32. If both scales were perturbed at random, the errors could cancel."""
    for n in range(5, 64, 3):
        assert isinstance(both_scaled(n, 1.0), Certificate), n
        assert isinstance(both_scaled(n, 1.0 + 1e-4), Counterexample), n


def test_sizes_that_numbers_are_tied_to_stay() -> None:
    def first(number: float) -> set[int]:
        b = Builder(Graph("g"))
        x = b.input("x", "f32[B, 60, 64]") * number
        nodes = b.graph.main.nodes
        return {*next(shrinkings_of(claim_of_match(nodes, [], nodes[-1], [x.value]).cut(0)))}

    assert first(0.3) == {60, 64}
    for number in (64.0, 1 / 64, 8.0, 0.125, 64**-0.25, float(63)):
        assert first(number) == {60}, number


def test_failures_at_unreachable_sizes_are_notes() -> None:
    wide = program("x: f32[B, 33554432]", "y: f32[B, 33554432]", "a = mul(x, 0.37)", "return y = a")
    rule = Planted(lambda p, x, y: x * 0.37, lambda b, m: m.x * 0.38)
    found = certified(wide, rule)
    (note,) = certificates(found)
    assert not rolled_back(found) and "not certified: " in note.note and "too large" in note.note
    narrow = certified(parse_graph(wide.replace("33554432", "768")), rule)
    assert len(rolled_back(narrow)) == 1


def test_sizes_that_are_refused_excuse_nothing() -> None:
    """A table of 40 positions, made smaller, is too short for every number of keys but one, and any softmax over one
    key is 1.
    """
    b = Builder(Graph("g"))
    x, table = b.input("x", "f32[B, S]"), b.input("table", "f32[40]")
    b.graph.bound("S", Bounds(1, 40))
    b.outputs(y=b.softmax(x * 1.5 + b.slice(table, axis=0, start=0, stop="S")))
    found = certified(b.graph, Planted(lambda p, x, y: p.softmax(x), lambda b, m: b.exp(b.log_softmax(m.x * 2.0))))
    assert len(rolled_back(found)) == 1 and not certificates(found)


# -- numbers that depend on sizes, and notes ---------------------------------------------------------------------------


def region_of(size: int, number: float) -> Region:
    b = Builder(Graph("g"))
    y = b.input("x", f"f32[B, {size}]") * b.constant(number, f64).cast("f32")
    nodes = b.graph.main.nodes
    return claim_of_match(nodes, [], nodes[-1], [y.value]).cut(0)


@pytest.mark.parametrize(("size", "of"), [(64, 64), (65, 64)])
@pytest.mark.parametrize("sign", [1, -1])
def test_powers_of_quarters_up_to_two_are_tied_to_their_size(size: int, of: int, sign: int) -> None:
    """The number may depend on the size, or on the size minus one, which is the divisor of a variance."""
    assert not [s for k in range(1, 9) for s in shrinkings_of(region_of(size, of ** (sign * k / 4)))]
    for number in (of ** (sign * 9 / 4), of ** (sign / 3), of ** (sign / 4) * (1 + 2.0**-19)):
        assert [size in s for s in shrinkings_of(region_of(size, number))] == [True]


def test_sizes_in_attributes_are_made_small_as_those_of_types_are() -> None:
    b = Builder(Graph("g"))
    x = b.slice(b.input("x", "f32[B, 768]"), axis=1, start=128, stop=192)
    y = b.expand(b.rearrange(x, pattern="b d -> b 1 d"), shape=("B", 96, 64))
    nodes = list(b.graph.main.nodes)
    claim = claim_of_match(nodes, [], nodes[-1], [y.value])
    region = claim.cut(0)
    small = next(shrinkings_of(region))
    assert small == {64: 4, 96: 6, 128: 8, 192: 12, 768: 48}
    made, _ = as_graphs(region, (claim.before, claim.after), (b.graph, b.graph), small)
    cut, _, repeated = [node.op.attributes for node in made.main.nodes]
    assert (cut["start"], cut["stop"], repeated["shape"]) == (8, 12, (Size.symbol("B"), 6, 4))
    assert made.main.results[0].type == f32["B", 6, 4]


@pytest.mark.parametrize("number", [1e-4, 1e-5, 0.5, 1.0, 2.0, 3.0, 0.0, math.inf])
def test_small_numbers_are_of_no_size(number: float) -> None:
    assert not has_numbers(region_of(8, number))
    assert has_numbers(region_of(8, 1.1e-4)) and has_numbers(region_of(8, 4.0)) and has_numbers(region_of(8, 2.5))


def test_text_of_a_certificate() -> None:
    made = Certificate("rule", "0123", 7, 3, ((("B", 2), ("S", 3)), ()), 1e-8, 2e-7)
    assert str(made) == "rule 0123: 3 cases, largest error 1e-08 (at most 2e-07), at B=2, S=3, seed 7"
    more = replace(made, sizes=(), refused="too short", undecided=2, note="large axes made small")
    assert str(more) == (
        "rule 0123: 3 cases, largest error 1e-08 (at most 2e-07), 2 more not certified: roundings alone may change "
        "the results by as much, other sizes refused (too short), large axes made small, seed 7"
    )
    assert str(Certificate("rule", "0123", 7, 0, (), note="not evaluated")) == "rule 0123: not evaluated"
    assert (made.is_whole, replace(made, refused="x").is_whole, replace(made, undecided=1).is_whole) == (
        True,
        False,
        False,
    )
    for each in (made, more):
        assert Certificate.read(each.as_dict()) == each
    said = made.as_dict()
    del said["refused"], said["undecided"]
    assert Certificate.read(said) == made


def test_text_of_a_counterexample() -> None:
    assert str(Counterexample("plain", (("B", 2), ("S", 3)), 7, "off")) == "off (case plain, at B=2, S=3, seed 7)"
    assert str(Counterexample("plain", (), 7, "off")) == "off (case plain, seed 7)"
