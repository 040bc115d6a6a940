"""The engine of passes that find their own matches, and the work that it does for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.pass_programs import assert_same_numbers, optimize, program
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import PassError
from treadle.ir.graph import Graph, Node
from treadle.ir.source_lines import SourceLine
from treadle.ir.text.parser import parse_graph
from treadle.passes.cleanup.canonicalize import Canonicalize
from treadle.passes.cleanup.decompose import Decompose
from treadle.passes.framework.manager import Pass, PassManager
from treadle.passes.framework.pattern import Vocabulary
from treadle.passes.framework.rewrite import Match, Rewrite
from treadle.passes.framework.rewriting import NEAR_MISSES_KEPT, Refusal, Rewriting, Site, SiteRewrite


@dataclass(frozen=True)
class DoubleNegation(SiteRewrite[Site]):
    """-(-x)   -->   x, written as x * 1 so that a node is built"""

    def sites(self, work: Rewriting) -> Iterator[Site]:
        for node in work.walk():
            above = node.inputs[0].node if node.op.name == "neg" else None
            if above is not None and above.op.name == "neg":
                yield Site(node, (above,))

    def build(self, b: Builder, site: Site) -> Expr | Refusal:
        x = b.expr(site.nodes[0].inputs[0])
        if x.rank == 0:
            return Refusal("x is a number", hint="give it an axis")
        return x * 1.0


def lines(graph: Graph) -> list[str]:
    return [f"{node.op.name} -> {', '.join(v.name for v in node.results)}" for node in graph.main.nodes]


def test_a_site_is_replaced_where_it_stood_and_what_nobody_reads_goes() -> None:
    b = Builder(Graph("g"))
    b.source = SourceLine("model.py", 7)
    x = b.input("x", "f32[S]")
    with b.scoped("h.0"):
        y = b.neg(b.neg(x), name="twice")
    b.outputs(y=b.exp(y))
    optimized = PassManager([DoubleNegation()]).run(b.graph)
    made, _ = optimized.graph.main.nodes
    assert lines(optimized.graph) == ["mul -> twice", "exp -> exp"]
    assert (str(made.source), made.scope) == ("model.py:7", "h.0")
    (event,) = optimized.log[0].matches
    assert (event.rule, event.op, event.created_ops) == ("double-negation", "neg", ("mul",))
    assert {n.op.name for n in event.original_nodes} == {"neg"} and len(event.original_nodes) == 2
    assert_same_numbers(b.graph, optimized.graph)


def test_a_site_reads_what_came_in_the_place_of_another() -> None:
    chain = ["a = neg(x)", "b = neg(a)", "c = exp(b)", "d = neg(c)", "e = neg(d)", "return y = e"]
    text = program("x: f32[S]", "y: f32[S]", *chain)
    optimized = optimize(text, DoubleNegation())
    assert lines(optimized.graph) == ["mul -> b", "exp -> c", "mul -> e"]
    assert_same_numbers(parse_graph(text), optimized.graph)


def test_values_with_other_readers_stay() -> None:
    text = program("x: f32[S]", "y: f32[S], z: f32[S]", "a = neg(x)", "b = neg(a)", "return y = a, z = b")
    assert lines(optimize(text, DoubleNegation()).graph) == ["neg -> a", "mul -> b"]


def test_a_refusal_while_building_is_told_of_the_root_and_leaves_the_site() -> None:
    text = program("x: f32[]", "y: f32[]", "a = neg(x)", "b = neg(a)", "return y = b")
    optimized = optimize(text, DoubleNegation())
    (event,) = optimized.log[0].refusals
    assert (event.op, event.reason, event.hint) == ("neg", "x is a number", "give it an axis")
    assert lines(optimized.graph) == ["neg -> a", "neg -> b"]
    assert optimized.log[0].changes == 0


def test_a_replacement_of_another_type_is_a_fault_of_the_pass() -> None:
    @dataclass(frozen=True)
    class Narrows(DoubleNegation):
        def build(self, b: Builder, site: Site) -> Expr:
            x: Expr = b.reduce_sum(b.expr(site.nodes[0].inputs[0]), axes=(0,))
            return x

    text = program("x: f32[S]", "y: f32[S]", "a = neg(x)", "b = neg(a)  # f32[S]  m.py:7  h", "return y = b")
    with pytest.raises(PassError, match="rule narrows replaces neg by a value of another type") as caught:
        optimize(text, Narrows())
    assert caught.value.source == "m.py:7, scope h"


@dataclass(frozen=True)
class SumAndProduct(SiteRewrite[Site]):
    """a = x + y; b = x * y   -->   both built again, in place of b"""

    def sites(self, work: Rewriting) -> Iterator[Site]:
        by_op: dict[str, Node] = {node.op.name: node for node in work.function.nodes}
        total, product = by_op["add"], by_op["mul"]
        yield Site(product, (total,), replaced=(total.result, product.result), rule="both", reason="two at once")

    def build(self, b: Builder, site: Site) -> Any:
        x, y = map(b.expr, site.root.inputs)
        return (y + x, y * x)


def test_readers_of_an_earlier_value_wait_for_what_comes_in_its_place() -> None:
    text = program(
        *("x: f32[S], y: f32[S]", "u: f32[S], v: f32[S]"),
        *("total = add(x, y)", "e = exp(total)", "f = neg(e)", "z = tanh(x)", "b = mul(x, y)", "g = sub(b, z)"),
        "return u = f, v = g",
    )
    optimized = optimize(text, SumAndProduct())
    assert lines(optimized.graph) == ["tanh -> z", "add -> total", "mul -> b", "exp -> e", "neg -> f", "sub -> g"]
    (event,) = optimized.log[0].matches
    assert (event.rule, event.reason, event.created_ops) == ("both", "two at once", ("add", "mul"))
    assert_same_numbers(parse_graph(text), optimized.graph)


@dataclass(frozen=True)
class NearlyEverything(SiteRewrite[Site]):
    def sites(self, work: Rewriting) -> Iterator[Site]:
        for node in work.function.nodes:
            work.near_miss(self.name, node, node, "it is no attention")
        yield Site(work.function.nodes[0])

    def build(self, b: Builder, site: Site) -> Expr:
        return b.expr(site.root.inputs[0]) * 1.0


def test_near_misses_are_told_but_of_what_was_taken_and_of_too_many() -> None:
    count = NEAR_MISSES_KEPT + 5
    body = [f"x{n + 1} = neg(x{n})" for n in range(count)]
    optimized = optimize(program("x0: f32[S]", "y: f32[S]", *body, f"return y = x{count}"), NearlyEverything())
    record = optimized.log[0]
    assert len(record.near_misses) == NEAR_MISSES_KEPT
    assert record.notes == ["4 more near misses in main"]
    assert all(len(event.original_nodes) == 1 for event in record.near_misses)


def test_decomposed_ops_keep_their_name() -> None:
    text = program("x: f32[S, 4]", "y: f32[S, 4]", "h = softmax(x, axis=-1)", "y = exp(h)", "return y = y")
    optimized = optimize(text, Decompose())
    assert lines(optimized.graph)[-2:] == ["div -> h", "exp -> y"]
    assert_same_numbers(parse_graph(text), optimized.graph)


def test_a_name_outlives_its_op_where_the_replacement_is_arithmetic() -> None:
    text = program("x: f32[S]", "y: f32[S]", "square = pow(x, 2.0)", "y = exp(square)", "return y = y")
    assert lines(optimize(text, Canonicalize()).graph) == ["mul -> square", "exp -> y"]


# -- incomplete rewrites -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nothing(Rewrite):
    """A rewrite with neither a pattern nor a replacement."""


@dataclass(frozen=True)
class Half(Rewrite):
    """A rewrite that has only a pattern."""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        return p.neg(x)


@dataclass(frozen=True)
class Misspelt(Half):
    """A rewrite whose replacement uses a name that the pattern does not capture."""

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.y


@dataclass(frozen=True)
class Siteless(SiteRewrite[Site]):
    """A rewrite without sites."""


@dataclass(frozen=True)
class Unbuilt(Siteless):
    """A rewrite that has only sites."""

    def sites(self, work: Rewriting) -> Iterator[Site]:
        yield from (Site(node) for node in work.walk())


@pytest.mark.parametrize(
    ("made", "report"),
    [
        (Nothing(), "rewrite nothing has no pattern"),
        (Half(), "rewrite half has no replacement"),
        (Misspelt(), "the pattern captures no 'y'"),
        (Siteless(), "pass siteless finds no sites"),
        (Unbuilt(), "pass unbuilt has no replacement"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_pass_that_is_half_written_says_what_is_missing(made: Pass, report: str) -> None:
    b = Builder(Graph("g"))
    b.outputs(y=-b.input("x", "f32[4]"))
    with pytest.raises(PassError, match=report) as error:
        PassManager([made]).run(b.graph)
    assert (error.value.received == "captures x") == isinstance(made, Misspelt)
