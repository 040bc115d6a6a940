"""Products with concatenated weights become one product for each weight; near misses stay, with the reason."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random

import pytest

from tests.pass_programs import assert_same_numbers, optimize, program
from treadle.ir.analysis.cost import graph_cost
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.text.parser import parse_graph
from treadle.passes.framework.manager import PassManager
from treadle.passes.products.split_products import SplitProducts

WEIGHTS = ["v: f32[3, 8]", "w: f32[5, 8]", "a: f32[3]", "c: f32[5]", "n: f32[8]"]
ACROSS = ["v: f32[8, 3]", "w: f32[8, 5]", "a: f32[3]", "c: f32[5]", "n: f32[8]"]
JOINED = ["j = concat($v, $w, axis=0)", "m = concat($a, $c, axis=0)"]
SLICES = ["s = slice(y, axis=2, stop=3)", "u = slice(y, axis=2, start=3)", "return s = s, u = u"]
TAKES, GIVES = "x: f32[B, S, 8]", "s: f32[B, S, 3], u: f32[B, S, 5]"

AGAIN, TWICE = SLICES[1].replace("u", "o"), "u: f32[B, S, 5], o: f32[B, S, 5]"


def text(*lines: str, gives: str = GIVES, weights: Sequence[str] = WEIGHTS, takes: str = TAKES) -> str:
    return program(takes, gives, *lines, weights=weights)


FORMS = {
    "linear": (
        text(*JOINED, "y = linear(x, j, m)", *SLICES),
        text("s = linear(x, $v, $a)", "u = linear(x, $w, $c)", "return s = s, u = u"),
    ),
    "transposed": (
        text(JOINED[0], 'k = rearrange(j, pattern="a b -> b a")', "y = matmul(x, k)", *SLICES),
        text(
            'i = rearrange($v, pattern="a b -> b a")',
            "s = matmul(x, i)",
            'k = rearrange($w, pattern="a b -> b a")',
            "u = matmul(x, k)",
            "return s = s, u = u",
        ),
    ),
    "bias-added": (
        text("j = concat($v, $w, axis=1)", "p = matmul(x, j)", JOINED[1], "y = add(p, m)", *SLICES, weights=ACROSS),
        text(
            "p = matmul(x, $v)",
            "s = add(p, $a)",
            "q = matmul(x, $w)",
            "u = add(q, $c)",
            "return s = s, u = u",
            weights=ACROSS,
        ),
    ),
    "a-number-added": (
        text(JOINED[0], "p = linear(x, j)", "y = add(p, 2.0)", *SLICES),
        text("p = linear(x, $v)", "s = add(p, 2.0)", "q = linear(x, $w)", "u = add(q, 2.0)", "return s = s, u = u"),
    ),
    "a-constant-added": (
        text(JOINED[0], "y = linear(x, j, f32[8]{1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0})", *SLICES),
        text(
            "s = linear(x, $v, f32[3]{1.0, 1.0, 1.0})",
            "u = linear(x, $w, f32[5]{2.0, 2.0, 2.0, 2.0, 2.0})",
            "return s = s, u = u",
        ),
    ),
    "a-part-that-is-not-read": (
        text(JOINED[0], "y = linear(x, j)", SLICES[1], "return u = u", gives="u: f32[B, S, 5]"),
        text("u = linear(x, $w)", "return u = u", gives="u: f32[B, S, 5]"),
    ),
    "a-part-that-is-read-twice": (
        text(JOINED[0], "y = linear(x, j)", SLICES[1], AGAIN, "return u = u, o = o", gives=TWICE),
        text("u = linear(x, $w)", "return u = u, o = u", gives=TWICE),
    ),
}

STAYS = {
    "over-an-edge": (
        [JOINED[0], "y = linear(x, j)", "s = slice(y, axis=2, stop=4)", "return s = s"],
        "s: f32[B, S, 4]",
        "the slice is not exactly the columns of one weight",
    ),
    "two-parts": (
        ["j = concat($v, $w, $v, axis=0)", "y = linear(x, j)", "s = slice(y, axis=2, stop=8)", "return s = s"],
        "s: f32[B, S, 8]",
        "the slice is not exactly the columns of one weight",
    ),
    "rows": (
        [JOINED[0], "y = linear(x, j)", "s = slice(y, axis=1, stop=1)", "return s = s"],
        "s: f32[B, 1, 8]",
        "the slice is not exactly the columns of one weight",
    ),
    "read-as-a-whole": (
        [JOINED[0], "y = linear(x, j)", SLICES[0], "e = exp(y)", "return s = s, e = e"],
        "s: f32[B, S, 3], e: f32[B, S, 8]",
        "exp reads the product with all 2 weights",
    ),
    "an-output": (
        [JOINED[0], "y = linear(x, j)", SLICES[0], "return s = s, y = y"],
        "s: f32[B, S, 3], y: f32[B, S, 8]",
        "an output reads the product with all 2 weights",
    ),
    "one-bias": (
        [JOINED[0], "y = linear(x, j, $n)", *SLICES],
        GIVES,
        "the bias is not concatenated of one vector for each weight",
    ),
    "biases-of-other-sizes": (
        [JOINED[0], "m = concat($c, $a, axis=0)", "y = linear(x, j, m)", *SLICES],
        GIVES,
        "the bias is not concatenated of one vector for each weight",
    ),
    "a-computed-bias": (
        [
            JOINED[0],
            "e = reduce_sum(x, axes=[0, 1])",
            "f = slice(e, axis=0, stop=3)",
            "m = concat(f, $c, axis=0)",
            "y = linear(x, j, m)",
            *SLICES,
        ],
        GIVES,
        "a part of the bias is computed from inputs",
    ),
}

SKIPPED = {
    "nothing-slices-it": ([JOINED[0], "y = linear(x, j)", "return y = y"], "y: f32[B, S, 8]"),
    "along-the-sum": (
        ["j = concat($a, $b, axis=1)", "y = linear(x, j)", "s = slice(y, axis=2, stop=3)", "return s = s"],
        "s: f32[B, S, 3]",
    ),
    "computed-weights": (
        [
            "e = reduce_sum(x, axes=[0], keep=false)",
            "f = slice(e, axis=0, stop=1)",
            "j = concat(f, $w, axis=0)",
            "y = linear(x, j)",
            "s = slice(y, axis=2, stop=1)",
            "return s = s",
        ],
        "s: f32[B, S, 1]",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_product_for_each_weight_that_is_read(name: str) -> None:
    before, after = FORMS[name]
    done = PassManager([SplitProducts()], certify=True).run(parse_graph(before))
    assert done.graph == parse_graph(after), done.graph
    assert_same_numbers(done.source, done.graph)
    assert done.log[0].certificates
    assert not done.log[0].refusals


@pytest.mark.parametrize("name", STAYS)
def test_other_readers_and_biases_are_refused(name: str) -> None:
    lines, gives, reason = STAYS[name]
    done = optimize(text(*lines, gives=gives), SplitProducts())
    assert done.graph == done.source
    assert [each.reason for each in done.log[0].refusals] == [reason]


@pytest.mark.parametrize("name", SKIPPED)
def test_other_products_are_skipped(name: str) -> None:
    lines, gives = SKIPPED[name]
    weights = ["a: f32[5, 2]", "b: f32[5, 6]", *WEIGHTS[:2]]
    done = optimize(text(*lines, gives=gives, weights=weights), SplitProducts())
    assert done.graph == done.source
    assert not done.log[0].refusals


def drawn(seed: int) -> tuple[Graph, bool]:
    """Return a product with concatenated weights and readers of it, and True if all readers are slices of one part."""
    r = Random(seed)
    graph = Graph("drawn")
    b = Builder(graph)
    x = b.input("x", "f32[B, S, 8]")
    sizes = [r.randint(1, 4) for _ in range(r.randint(2, 4))]
    total = sum(sizes)

    def weights(kind: str, *shape: int | None) -> list[Expr]:
        return [
            b.parameter(f"{kind}{i}", "f32[" + ", ".join(str(s or n) for s in shape) + "]") for i, n in enumerate(sizes)
        ]

    form = r.randrange(3)
    bias = b.concat(*weights("b", None), axis=0)
    if form == 0:
        y = b.linear(x, b.concat(*weights("w", None, 8), axis=0), bias if r.random() < 0.5 else None)
    elif form == 1:
        y = b.matmul(x, b.rearrange(b.concat(*weights("w", None, 8), axis=0), pattern="a b -> b a"))
    else:
        y = b.matmul(x, b.concat(*weights("w", 8, None), axis=1))
    for _ in range(r.randrange(3)):
        y = y + r.choice((bias, 2.0))
    edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    outputs, fits = {}, True
    for i in range(r.randint(1, 5)):
        if r.random() < 0.85:
            part = r.randrange(len(sizes))
            start, stop = edges[part], edges[part + 1]
        else:
            start = r.randrange(total)
            stop = r.randint(start + 1, total)
        fits &= (start, stop) in itertools.pairwise(edges)
        outputs[f"y{i}"] = b.tanh(b.slice(y, axis=2, start=start, stop=stop))
    b.outputs(**outputs)
    return graph, fits


@pytest.mark.parametrize("seed", range(40))
def test_numbers_are_the_same_and_no_more_is_computed(seed: int) -> None:
    graph, fits = drawn(seed)
    done = PassManager([SplitProducts()]).run(graph)
    assert bool(done.log[0].matches) == fits
    assert_same_numbers(done.source, done.graph)
    sizes = {"B": 2, "S": 3}
    assert graph_cost(done.graph, sizes).flops <= graph_cost(done.source, sizes).flops
    again = PassManager([SplitProducts()]).run(done.graph)
    assert not again.log[0].matches
