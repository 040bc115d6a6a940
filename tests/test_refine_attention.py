"""Attention imported as one op: masks and biases become terms. Near misses stay, with a reason. Results stay the
same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from tests.attention_numbers import assert_equal_everywhere, draw
from tests.attention_programs import HEADS, LOW, SIZE, Array, Build, bias, graph_of, places, q_k_v, triangle
from tests.backend_checks import assert_near, compiled, each_backend
from tests.pass_programs import optimize, program
from treadle.ir.attention.attention_terms import (
    Alibi,
    BooleanMask,
    Causal,
    Padding,
    T5Relative,
    TensorBias,
    Term,
    Window,
)
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph, Node
from treadle.ir.interpreter import interpret
from treadle.ir.text.parser import parse_graph
from treadle.passes.framework.manager import Optimized, PassManager
from treadle.passes.fusion.attention.refine_attention import RefineAttention
from treadle.passes.fusion.attention.roles import Fused
from treadle.passes.pipelines import DEFAULT

# A scale is one float32 constant, off by half a spacing, and multiplies scores of about 20.
ROUNDING = 16 * float(np.finfo(np.float32).eps)


def refined(graph: Graph, *, certify: bool = True) -> Optimized:
    return PassManager(DEFAULT, certify=certify).run(graph)


def attention_of(graph: Graph) -> Node:
    (node,) = [n for _, n in graph.walk() if n.op.name.startswith("attention")]
    return node


def terms_of(node: Node) -> str:
    return ", ".join(term.text for term in node.op.terms)  # type: ignore[attr-defined]


@pytest.mark.parametrize("start", [0, 2])
def test_queries_that_begin_later_are_left_alone(start: int) -> None:
    b = Builder(Graph("later"))
    q, k, v = b.input("q", "f32[1, 2, 3, 4]"), b.input("k", "f32[1, 2, 6, 4]"), b.input("v", "f32[1, 2, 6, 4]")
    mask = b.iota(size=6) <= b.rearrange(b.iota(size=3), pattern="s -> s 1")
    b.outputs(y=b.attention(q, k, v, mask, terms=(BooleanMask("s t"), Window(2)), start=start))
    done = PassManager([RefineAttention()], certify=False).run(b.graph)
    assert terms_of(attention_of(done.graph)) == ("mask(s t), window(2)" if start else "window(2), causal")
    reasons = [refusal.reason for refusal in done.log[0].refusals]
    assert reasons == ["its queries do not begin at position 0"] * (start != 0)
    assert_equal_everywhere(b.graph, done.graph, ROUNDING)


# -- recognized tensors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """Attention as one op, and the expected refined form: terms, number of key heads, scale."""

    name: str
    build: Build
    terms: str
    heads: int = HEADS
    scale: float | None = None


Given = Callable[[Builder], tuple[Term, Expr]]


def attended(*given: Given, keys: str = "S") -> Build:
    def build(b: Builder) -> Expr:
        q, k, v = q_k_v(b, keys)
        made = [each(b) for each in given]
        return b.attention(q, k, v, *(x for _, x in made), terms=tuple(term for term, _ in made))  # type: ignore[no-any-return]

    return build


def mask(axes: str, keep: Callable[[Builder], Expr]) -> Given:
    return lambda b: (BooleanMask(axes), keep(b))


def added(axes: str, addend: Callable[[Builder], Expr]) -> Given:
    return lambda b: (TensorBias(axes), addend(b))


def rows(b: Builder, keys: str = "S") -> Expr:
    """A mask of keys, [b, 1, t]"""
    return b.rearrange(b.input("mask", f"bool[B, {keys}]"), pattern="b t -> b 1 t")


def near(b: Builder, size: int) -> Expr:
    i, j = places(b)
    return j > i - size


def reach(b: Builder) -> Expr:
    lengths = b.rearrange(b.input("lengths", "i64[B]"), pattern="b -> b 1")
    return b.iota(size="S") < lengths


def shifted(b: Builder, on_keys: int, on_queries: int) -> Expr:
    """Causal, with one number for each row added to the positions of queries and keys, the given number of times"""
    n = b.rearrange(b.input("n", "i64[B]"), pattern="b -> b 1 1")
    i, j = places(b)
    for _ in range(on_keys):
        j = j + n
    for _ in range(on_queries):
        i = i + n
    return j <= i


def by_ids(b: Builder) -> Expr:
    """Causal, with one number for each token added to its position"""
    ids = b.input("ids", "i64[B, S]")
    i, j = places(b)
    return j + b.rearrange(ids, pattern="b t -> b 1 t") <= i + b.rearrange(ids, pattern="b s -> b s 1")


def fill(b: Builder, keep: Expr, number: float) -> Expr:
    return b.where(keep, 0.0, b.constant(number))


def ones(b: Builder) -> Expr:
    return b.expand(1.0, shape=("S", "S"))


def lower(b: Builder) -> Expr:
    """torch.tril(torch.ones(S, S))"""
    return b.where(triangle(b), ones(b), 0.0)


def upper(b: Builder) -> Expr:
    """torch.triu(torch.ones(S, S), 1)"""
    i, j = places(b)
    return b.where(j >= i + 1, ones(b), 0.0)


def stored(b: Builder) -> Expr:
    """nanoGPT's buffer, sliced to the sequence"""
    table = b.constant(np.tri(24, dtype=np.float32))
    return b.slice(b.slice(table, axis=0, stop="S"), axis=1, stop="S")


def later(b: Builder) -> Expr:
    i, j = places(b)
    return j > i


def table(b: Builder, kept: Array) -> Expr:
    """An added constant, sliced to the sequence: 0 where a key is visible, or drawn numbers"""
    made = b.constant((np.where(kept, 0.0, -math.inf) if kept.dtype == np.bool_ else kept).astype(np.float32))
    for axis in range(kept.ndim):
        made = b.slice(made, axis=axis, stop="S")
    return made


def half(b: Builder) -> Expr:
    """Causal, with numbers that float16 represents"""
    return b.cast(fill(b, triangle(b), -math.inf), to="f16")


DISTANCES = np.arange(24) - np.arange(24)[:, None]
BAND = abs(DISTANCES) < 3
PATTERN = (DISTANCES % 3 == 0) | (DISTANCES == -1)
"""A query sees itself, the preceding key, and each third key."""
STORED = {
    "a pattern": ("s t", PATTERN),
    "two numbers": ("s t", np.where(BAND, 0.0, np.where(DISTANCES < 0, -math.inf, LOW))),
    "keys": ("t", PATTERN[2]),
    "a corner": ("s t", DISTANCES > -2),
}


def repeated(b: Builder, x: Expr, heads: int) -> Expr:
    """Each head of [b, g, t, d] repeated, with the copies next to each other"""
    apart = b.expand(b.rearrange(x, pattern="b g t d -> b g 1 t d"), shape=(*x.shape[:2], HEADS // heads, *x.shape[2:]))
    return b.rearrange(apart, pattern="b g r t d -> b (g r) t d")


def grouped(heads: int) -> Build:
    def build(b: Builder) -> Expr:
        q, k, v = q_k_v(b, heads=heads)
        k, v = repeated(b, k, heads), repeated(b, v, heads)
        return b.attention(q, k, v, b.parameter("slopes", f"f32[{HEADS}]"), terms=(Alibi(), Causal()))  # type: ignore[no-any-return]

    return build


def scaled_on(on_q: float, on_k: float, *, scale: float | None = None) -> Build:
    def build(b: Builder) -> Expr:
        q, k, v = q_k_v(b)
        q, k = (x if by == 1.0 else x * by for x, by in ((q, on_q), (k, on_k)))
        return b.attention(q, k, v, scale=scale)  # type: ignore[no-any-return]

    return build


def cast_and_scaled(b: Builder) -> Expr:
    """Queries and keys in float16, which float32 holds exactly"""
    q, k = (b.cast(b.input(n, f"f16[B, {HEADS}, S, {SIZE}]"), to="f32") for n in "qk")
    v = b.input("v", f"f32[B, {HEADS}, S, {SIZE}]")
    return b.attention(q * 0.5, k, v, scale=1.0)  # type: ignore[no-any-return]


def t5(b: Builder) -> tuple[Term, Expr]:
    return T5Relative(6, 8), b.parameter("table", f"f32[6, {HEADS}]")


FORMS = [
    Form("causal", attended(mask("s t", triangle)), "causal"),
    Form("causal rows", attended(mask("b s t", lambda b: triangle(b) & rows(b))), "causal, mask(b t)"),
    Form(
        "of every head",
        attended(mask("b h s t", lambda b: b.expand(_by_head(b, triangle(b) & rows(b)), shape=("B", HEADS, "S", "S")))),
        "causal, mask(b t)",
    ),
    Form(
        "window",
        attended(mask("b s t", lambda b: near(b, 3) & triangle(b) & rows(b))),
        "causal, window(3), mask(b t)",
    ),
    Form("padding", attended(mask("b t", reach)), "padding"),
    Form("rows repeated", attended(mask("b s t", lambda b: _whole(b, rows(b)))), "mask(b t)"),
    Form("all positions", attended(mask("t", lambda b: b.iota(size="S") >= 0)), ""),
    Form("up to the last key", attended(mask("t", lambda b: b.iota(size="S") < b.size(value="S"))), ""),
    Form("negated", attended(mask("s t", lambda b: -places(b)[0] <= -places(b)[1])), "causal"),
    Form("moved alike", attended(mask("b s t", lambda b: shifted(b, 1, 1))), "causal"),
    Form("cross", attended(mask("b s t", lambda b: triangle(b, "T") & rows(b, "T")), keys="T"), "causal, mask(b t)"),
    Form("not triu(ones, 1)", attended(mask("s t", lambda b: b.logical_not(b.cast(upper(b), to="bool")))), "causal"),
    Form("tril(ones) not 0", attended(mask("s t", lambda b: b.not_equal(lower(b), 0.0))), "causal"),
    Form("tril(ones) == 1", attended(mask("s t", lambda b: b.equal(lower(b), 1.0))), "causal"),
    Form("1 - triu(ones, 1)", attended(mask("s t", lambda b: b.cast(1.0 - upper(b), to="bool"))), "causal"),
    Form("a stored triangle", attended(mask("s t", lambda b: b.greater(stored(b), 0.5))), "causal"),
    Form(
        "neither later nor left out",
        attended(mask("b s t", lambda b: b.logical_not(b.logical_or(later(b), b.logical_not(rows(b)))))),
        "causal, mask(b t)",
    ),
    Form(
        "a product of truths",
        attended(mask("b s t", lambda b: b.cast(b.cast(triangle(b), to="f32") * b.cast(rows(b), to="f32"), to="bool"))),
        "causal, mask(b t)",
    ),
    Form("a stored addend", attended(added("s t", lambda b: table(b, np.tri(24, dtype=np.bool_)))), "causal"),
    Form("a stored addend in f16", attended(added("s t", lambda b: b.cast(half(b), to="f32"))), "causal"),
    Form("a stored band", attended(added("s t", lambda b: table(b, BAND))), "window(3)"),
    Form("added -inf", attended(added("s t", lambda b: fill(b, triangle(b), -math.inf))), "causal"),
    Form("added lowest", attended(added("s t", lambda b: fill(b, triangle(b), LOW))), "causal"),
    Form("triu(ones, 1) * -1e9", attended(added("s t", lambda b: upper(b) * -1e9)), "causal"),
    Form("added -inf by rows", attended(added("b s t", lambda b: _whole(b, fill(b, rows(b), -math.inf)))), "mask(b t)"),
    Form(
        "a sum",
        attended(added("b h s t", lambda b: bias(b, f"f32[{HEADS}, S, S]") + _by_head(b, fill(b, rows(b), -math.inf)))),
        "mask(b t), bias(h s t)",
    ),
    Form(
        "beside other terms",
        attended(t5, mask("b s t", lambda b: triangle(b) & rows(b))),
        "causal, mask(b t), t5_relative(6, 8)",
    ),
    Form("grouped heads", grouped(2), "causal, alibi", heads=2),
    Form("one head", grouped(1), "causal, alibi", heads=1),
    Form("scale on q", scaled_on(0.25, 1.0, scale=1.0), "", scale=0.25),
    Form("scale on both", scaled_on(0.5, -0.5, scale=2.0), "", scale=-0.5),
    Form("scale by a root", scaled_on(SIZE**-0.25, SIZE**-0.25, scale=1.0), ""),
    Form("scale behind a cast", cast_and_scaled, "", scale=0.5),
]


def _whole(b: Builder, x: Expr) -> Expr:
    return b.expand(x, shape=("B", "S", "S"))


def _by_head(b: Builder, x: Expr) -> Expr:
    return b.rearrange(x, pattern="b s t -> b 1 s t")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_each_form_is_read(form: Form) -> None:
    before = graph_of(form.build)
    optimized = refined(before)
    node = attention_of(optimized.graph)
    assert terms_of(node) == form.terms, optimized.log.explain()
    assert node.inputs[1].type.shape[1].constant == node.inputs[2].type.shape[1].constant == form.heads
    assert node.op.scale == form.scale  # type: ignore[attr-defined]
    assert not {"less_equal", "greater", "iota", "where"} & {n.op.name for n in optimized.graph.main.nodes}
    assert not assert_equal_everywhere(before, optimized.graph, ROUNDING)
    record = next(r for r in optimized.log if r.name == "refine-attention")
    assert [c.cases > 0 for c in record.certificates] == [True]
    assert len(record.matches) == 1
    assert refined(optimized.graph).graph == optimized.graph


@each_backend
@pytest.mark.parametrize("name", ["causal rows", "window", "added lowest", "a sum", "grouped heads", "scale on both"])
def test_every_backend_gives_what_it_gave(name: str, backend: str) -> None:
    before = graph_of(next(f for f in FORMS if f.name == name).build)
    after = refined(before, certify=False).graph
    inputs, weights = (
        {n: x.astype(np.float32) if x.dtype == np.float64 else x for n, x in drawn.items()}
        for drawn in draw(before, {"B": 3, "S": 5}, 0)
    )
    wanted, got = (compiled(backend, graph, weights)(**inputs)["y"] for graph in (before, after))
    assert_near(got, np.asarray(wanted, np.float64))
    if "mask" in inputs:
        assert not inputs["mask"][0].any()
        np.testing.assert_array_equal(np.asarray(got)[0], 0)


# -- text --------------------------------------------------------------------------------------------------------------

TAKES = "q: f32[B, 4, S, 8], k: f32[B, 2, S, 8], v: f32[B, 2, S, 8], padding: i64[B, S]"
BEFORE = program(
    TAKES,
    "y: f32[B, 4, S, 8]",
    "j = iota(size=S)",
    'i = rearrange(j, pattern="s -> s 1")',
    "past = less_equal(j, i)",
    "real = cast(padding, to=bool)",
    'of_keys = rearrange(real, pattern="b t -> b 1 t")',
    "keep = logical_and(past, of_keys)",
    'k1 = rearrange(k, pattern="b g t d -> b g 1 t d")',
    "k2 = expand(k1, shape=[B, 2, 2, S, 8])",
    'k3 = rearrange(k2, pattern="b g r t d -> b (g r) t d")',
    'v1 = rearrange(v, pattern="b g t d -> b g 1 t d")',
    "v2 = expand(v1, shape=[B, 2, 2, S, 8])",
    'v3 = rearrange(v2, pattern="b g r t d -> b (g r) t d")',
    "scaled = mul(q, 0.5)",
    "out = attention(scaled, k3, v3, keep, terms=[mask(b s t)])",
    "return y = out",
)

EXPECTED = program(
    TAKES,
    "y: f32[B, 4, S, 8]",
    "real = cast(padding, to=bool)",
    "out = attention(q, k, v, real, terms=[causal, mask(b t)], scale=0.17677669)",
    "return y = out",
)


def test_before_and_after_as_text() -> None:
    optimized = optimize(BEFORE, RefineAttention())
    assert optimized.graph == parse_graph(EXPECTED)
    assert attention_of(optimized.graph).result.name == "out"
    (match,) = optimized.log[0].matches
    assert (match.rule, match.op) == ("refine-attention", "attention")
    assert match.reason == (
        "mask(b s t) read as causal, mask(b t); 2 heads of keys and values instead of 4; "
        "scale 0.176777, which includes the factors of queries and keys"
    )
    assert optimized.log[0].refusals == [] == optimized.log[0].near_misses


def test_masks_that_do_not_depend_on_positions_stay() -> None:
    text = program(
        "q: f32[B, 4, S, 6], k: f32[B, 2, S, 6], v: f32[B, 2, S, 6], m: bool[B, S, S], a: f32[4, S, S], n: i64[B]",
        "y: f32[B, 4, S, 6]",
        "y = attention(q, k, v, m, n, a, terms=[mask(b s t), padding, window(3), bias(h s t)], softcap=5.0, scale=0.3)",
        "return y = y",
    )
    optimized = optimize(text, *DEFAULT)
    assert optimized.graph == parse_graph(text)
    assert not any(r.refusals or r.near_misses for r in optimized.log if r.name == "refine-attention")


@pytest.mark.parametrize("name", STORED)
def test_a_stored_addend_that_is_no_band_stays(name: str) -> None:
    axes, numbers = STORED[name]
    before = graph_of(attended(added(axes, lambda b: table(b, numbers))))
    optimized = refined(before)
    assert terms_of(attention_of(optimized.graph)) == f"bias({axes})", optimized.log.explain()
    assert_equal_everywhere(before, optimized.graph, ROUNDING)


def test_probabilities_that_are_asked_for_stay_a_result() -> None:
    text = BEFORE.replace("out = attention(", "out, p = attention_with_probabilities(")
    text = text.replace("return y = out", "return y = out, p = p")
    text = text.replace("-> (y: f32[B, 4, S, 8])", "-> (y: f32[B, 4, S, 8], p: f32[B, 4, S, S])")
    node = attention_of(optimize(text, RefineAttention()).graph)
    assert (node.op.name, terms_of(node)) == ("attention_with_probabilities", "causal, mask(b t)")
    assert [v.name for v in node.results] == ["out", "p"]


def test_other_terms_keep_their_operands() -> None:
    """Terms may be in any order, and tensors before and after them may become terms that take no operands."""

    def build(b: Builder) -> Expr:
        q, k, v = q_k_v(b)
        operands = (triangle(b), b.input("lengths", "i64[B]"), rows(b), b.parameter("slopes", f"f32[{HEADS}]"))
        terms = (BooleanMask("s t"), Padding(), BooleanMask("b s t"), Alibi())
        whole = b.expand(operands[2], shape=("B", "S", "S"))
        return b.attention(q, k, v, *operands[:2], whole, operands[3], terms=terms)  # type: ignore[no-any-return]

    before = graph_of(build)
    after = refined(before).graph
    node = attention_of(after)
    assert terms_of(node) == "padding, causal, mask(b t), alibi"
    assert [v.name for v in node.inputs[3:]] == ["lengths", "mask", "slopes"]
    assert_equal_everywhere(before, after, ROUNDING)


# -- near misses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NearMiss:
    """A program in which a form is not recognized: the reason, and the resulting terms."""

    name: str
    build: Build
    reason: str
    terms: str


def _tiled(b: Builder) -> Expr:
    """Heads in the order 0 1 0 1, while attention shares them as 0 0 1 1"""
    q, k, v = q_k_v(b, heads=2)

    def tile(x: Expr) -> Expr:
        apart = b.expand(b.rearrange(x, pattern="b g t d -> b 1 g t d"), shape=(x.shape[0], 2, *x.shape[1:]))
        return b.rearrange(apart, pattern="b r g t d -> b (r g) t d")

    return b.attention(q, tile(k), tile(v), triangle(b), terms=(BooleanMask("s t"),))  # type: ignore[no-any-return]


NEAR_MISSES = [
    NearMiss(
        "one past the query",
        attended(mask("s t", lambda b: triangle(b, off=1))),
        "it keeps keys up to 1 after the query, but causal keeps keys up to the query itself",
        "mask(s t)",
    ),
    NearMiss(
        "before the query",
        attended(mask("s t", lambda b: triangle(b, off=-1))),
        "it keeps keys up to 1 before the query, but causal keeps keys up to the query itself",
        "mask(s t)",
    ),
    NearMiss(
        "triu(ones, 2)",
        attended(mask("s t", lambda b: b.equal(b.where(places(b)[1] >= places(b)[0] + 2, ones(b), 0.0), 0.0))),
        "it keeps keys up to 1 after the query",
        "mask(s t)",
    ),
    NearMiss(
        "a crooked window",
        attended(mask("s t", lambda b: near(b, 3) & (places(b)[1] <= places(b)[0] + 1))),
        "it keeps keys from 2 before the query to 1 after the query",
        "mask(s t)",
    ),
    NearMiss(
        "the past or what a row allows",
        attended(mask("b s t", lambda b: b.logical_or(triangle(b), rows(b)))),
        "logical_or is not causal, a window, padding or segments",
        "mask(b s t)",
    ),
    NearMiss(
        "rows that may have no key, by the lowest number",
        attended(added("b s t", lambda b: fill(b, triangle(b) & rows(b), LOW))),
        "the mask stays an addend: it is -3.40282e+38, and a row in which every key is masked is an average",
        "bias(b s t)",
    ),
    NearMiss(
        "what may rise to inf",
        attended(added("s t", lambda b: fill(b, triangle(b), -math.inf) - fill(b, places(b)[1] > 3, -math.inf))),
        "an addend of the scores may be inf",
        "bias(s t)",
    ),
    NearMiss(
        "a number of each row, once more for queries",
        attended(mask("b s t", lambda b: shifted(b, 1, 2))),
        "less_equal is not causal, a window, padding or segments",
        "mask(b s t)",
    ),
    NearMiss(
        "a number of each token",
        attended(mask("b s t", by_ids)),
        "less_equal is not causal, a window, padding or segments",
        "mask(b s t)",
    ),
    NearMiss(
        "queries behind those of the past",
        attended(mask("s t", lambda b: triangle(b) & (places(b)[1] <= places(b)[0] + b.size(value="B")))),
        "positions differ by B, but causal counts both from 0",
        "causal, mask(s t)",
    ),
]


@pytest.mark.parametrize("miss", NEAR_MISSES, ids=lambda miss: miss.name)
def test_each_near_miss_says_why(miss: NearMiss) -> None:
    before = graph_of(miss.build)
    optimized = refined(before)
    record = next(r for r in optimized.log if r.name == "refine-attention")
    report = [e for e in (*record.refusals, *record.near_misses) if miss.reason in e.reason]
    assert len(report) == 1, optimized.log.explain()
    assert report[0].source.startswith("tests/")
    assert terms_of(attention_of(optimized.graph)) == miss.terms
    assert_equal_everywhere(before, optimized.graph, ROUNDING)


def test_a_cast_that_changes_lengths_is_kept() -> None:
    """Lengths of 200 overflow signed eight bits."""

    def reached(b: Builder) -> Expr:
        lengths = b.cast(b.cast(b.input("lengths", "u8[B]"), to="i8"), to="i64")
        return b.iota(size="S") < b.rearrange(lengths, pattern="b -> b 1")

    before = graph_of(attended(mask("b t", reached)))
    after = refined(before, certify=False).graph
    assert terms_of(attention_of(after)) == "padding"
    inputs, weights = draw(before, {"B": 3, "S": 5}, 0)
    inputs["lengths"] = np.array([200, 3, 0], np.uint8)
    wanted, found = (interpret(graph, inputs, weights, float64=True)["y"] for graph in (before, after))
    assert not wanted[0].any() and wanted[1].any()
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_the_hint_of_a_mask_that_stays_an_addend_works() -> None:
    before = graph_of(attended(added("b s t", lambda b: fill(b, triangle(b) & rows(b), LOW))))
    (event,) = next(r for r in refined(before).log if r.name == "refine-attention").refusals
    assert event.hint == "-inf in place of that number, or RefineAttention(zero_empty_rows=True)"
    for passes, graph in (
        ([RefineAttention(zero_empty_rows=True)], before),
        ([RefineAttention()], graph_of(attended(added("b s t", lambda b: fill(b, triangle(b) & rows(b), -math.inf))))),
    ):
        after = PassManager(passes, certify=False).run(graph)
        assert terms_of(attention_of(after.graph)) == "causal, mask(b t)"
        assert after.log[0].refusals == []


def test_keys_in_another_order_stay_repeated() -> None:
    before = graph_of(_tiled)
    after = refined(before).graph
    node = attention_of(after)
    assert (terms_of(node), node.inputs[1].type.shape[1].constant) == ("causal", HEADS)
    assert_equal_everywhere(before, after, ROUNDING)


def test_a_scale_that_no_cast_holds_stays_before_it() -> None:
    """The cast from float32 to float16 rounds, so a scale after the cast would give another number."""
    text = BEFORE.replace("scaled = mul(q, 0.5)", "wide = mul(w, 0.5)\n    scaled = cast(wide, to=f16)")
    text = text.replace("f32", "f16").replace("padding: i64[B, S]", "padding: i64[B, S], w: f32[B, 4, S, 8]")
    node = attention_of(optimize(text, RefineAttention()).graph)
    assert (node.op.scale, terms_of(node)) == (None, "causal, mask(b t)")  # type: ignore[attr-defined]
    assert node.inputs[0].name == "scaled"


def test_a_split_that_is_no_gain_is_not_made() -> None:
    """If one mask of all axes were split in two, both would be read."""

    def build(b: Builder) -> Expr:
        q, k, v = q_k_v(b)
        one, other = (b.input(name, "bool[B, S, S]") for name in ("mask", "other"))
        return b.attention(q, k, v, one & other, terms=(BooleanMask("b s t"),))  # type: ignore[no-any-return]

    before = graph_of(build)
    assert refined(before).graph == before


def test_a_wrong_reading_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(low: int | None, high: int | None) -> list[Fused]:
        return [Fused(Window(2), diagonal=True)]

    monkeypatch.setattr("treadle.passes.fusion.attention.masks.band_terms", wrong)
    before = graph_of(attended(mask("s t", triangle)))
    (match,) = PassManager([RefineAttention()], certify=False).run(before).log[0].matches
    assert match.reason == "mask(s t) read as window(2)"
    optimized = PassManager([RefineAttention()], certify=True).run(before)
    assert terms_of(attention_of(optimized.graph)) == "mask(s t)"
    assert optimized.log[0].matches == []
    assert "rolled back, since its certificate failed" in optimized.log[0].refusals[0].reason
