"""Wrong rewrites and wrong passes are undone if certificates are enabled; right ones stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.attention_programs import LOW, q_k_v, rows, swapped, triangle
from tests.pass_programs import GELU, assert_same_numbers, numbers, program
from tests.planted_rewrites import ForgetsOneOp, Planted, certificates, certified, rolled_back
from treadle.ir.builder import Builder
from treadle.ir.graph import Function, Graph
from treadle.ir.op_registry import find_op
from treadle.ir.ops.call import Call
from treadle.ir.ops.elementwise import Neg
from treadle.ir.text.parser import parse_graph
from treadle.passes.cleanup.canonicalize import MulOne
from treadle.passes.framework.manager import Pass, PassManager
from treadle.passes.framework.pass_log import PassRecord
from treadle.passes.framework.rewrite import Match, Rewrite, RewriteSet
from treadle.passes.pipelines import DEFAULT

# -- wrong rewrites ---------------------------------------------------------------------------------------------------


def guarded(p: Any, x: Any) -> Any:
    """Return a softmax that is zero for rows that contain only -inf."""
    peak = p.reduce_max(x, axes=(-1,), keep=True)
    weights = p.exp(x - p.where(peak > -math.inf, peak, 0))
    total = p.reduce_sum(weights, axes=(-1,), keep=True)
    return weights / p.where(total > 0, total, 1)


GUARDED = [
    "h = where(k, x, -inf)",
    "m = reduce_max(h, axes=[-1], keep=true)",
    "f = greater(m, -inf)",
    "n = where(f, m, 0.0)",
    "c = sub(h, n)",
    "e = exp(c)",
    "s = reduce_sum(e, axes=[-1], keep=true)",
    "g = greater(s, 0.0)",
    "t = where(g, s, 1.0)",
    "w = div(e, t)",
    "return y = w",
]


@dataclass(frozen=True)
class Wrong:
    """A wrong rewrite, a program on which its result is wrong, and a part of its certificate's text."""

    name: str
    find: Callable[..., Any]
    put: Callable[..., Any]
    lines: Sequence[str]
    said: str = "the results differ by"
    takes: str = "x: f32[B, S, 768]"
    gives: str = "y: f32[B, S, 768]"


WRONG = [
    Wrong("other-op", lambda p, x, y: p.gelu(x), lambda b, m: b.gelu_tanh(m.x), ["a = gelu(x)", "return y = a"]),
    Wrong("half-for-two", lambda p, x, y: x / 2.0, lambda b, m: m.x * 2.0, ["a = div(x, 2.0)", "return y = a"]),
    Wrong(
        "eps-forgotten",
        lambda p, x, y: p.rms_norm(x, eps=0.1),
        lambda b, m: b.rms_norm(m.x, eps=0.0),
        ["a = rms_norm(x, eps=0.1)", "return y = a"],
    ),
    Wrong(
        "other-axis",
        lambda p, x, y: p.softmax(x),
        lambda b, m: b.softmax(m.x, axis=-2),
        ["a = softmax(x)", "return y = a"],
    ),
    Wrong(
        "fill-of-the-other-sign",
        lambda p, x, y: p.where(y, x, -math.inf),
        lambda b, m: b.where(m.y, m.x, math.inf),
        ["a = where(k, x, -inf)", "return y = a"],
        "a number above 1e30 has changed",
        "x: f32[B, S, 768], k: bool[B, S, 768]",
    ),
    Wrong(
        "fill-that-hides-nothing",
        lambda p, x, y: p.where(y, x, -math.inf),
        lambda b, m: b.where(m.y, m.x, -1e9),
        ["a = where(k, x, -inf)", "return y = a"],
        "a number above 1e30 has changed",
        "x: f32[B, S, 768], k: bool[B, S, 768]",
    ),
    Wrong(
        "wrong-for-large-numbers",
        lambda p, x, y: p.tanh(x),
        lambda b, m: 1 - 2 / (b.exp(m.x * 2.0) + 1) + b.relu(b.abs(m.x) - 10.0),
        ["a = tanh(x)", "return y = a"],
    ),
    Wrong(
        "exp-overflows",
        lambda p, x, y: p.sigmoid(x),
        lambda b, m: b.exp(m.x * 64.0) / (b.exp(m.x * 64.0) + b.exp(m.x * 63.0)),
        ["a = sigmoid(x)", "return y = a"],
        said="an element is NaN that was not NaN before",
    ),
    Wrong(
        "rows-without-a-key",
        lambda p, x, y: guarded(p, x),
        lambda b, m: b.softmax(m.x),
        GUARDED,
        said="an element is NaN that was not NaN before",
        takes="x: f32[B, S, 768], k: bool[B, S, 768]",
    ),
    Wrong(
        "other-truth",
        lambda p, x, y: p.less(x, y),
        lambda b, m: m.x <= m.y,
        ["a = less(x, 2)", "return y = a"],
        said="results are different",
        takes="x: i64[B, S]",
        gives="y: bool[B, S]",
    ),
    Wrong(
        "logarithms",
        lambda p, x, y: p.softmax(x) @ y,
        lambda b, m: b.log_softmax(m.x) @ m.y,
        ["a = softmax(x)", "c = matmul(a, v)", "return y = c"],
        takes="x: f32[B, S, 768], v: f32[B, 768, 64]",
        gives="y: f32[B, S, 64]",
    ),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_a_wrong_rewrite_is_undone_and_the_right_ones_stay(wrong: Wrong) -> None:
    """The same set of rewrites also contains a right rewrite, which stays."""

    @dataclass(frozen=True)
    class Both(RewriteSet):
        rules: ClassVar[tuple[Rewrite, ...]] = (Planted(wrong.find, wrong.put), MulOne())

    given, result = wrong.lines[-1].split(" = ")
    lines = [*wrong.lines[:-1], f"one = mul({result}, 1.0)", f"{given} = one"]
    boolean = "bool" in wrong.gives
    text = program(wrong.takes, wrong.gives, *(wrong.lines if boolean else lines))
    optimized = certified(text, Both())
    assert optimized.graph == parse_graph(program(wrong.takes, wrong.gives, *wrong.lines))
    (event,) = optimized.log[0].refusals
    assert event.rule == "planted"
    assert event.reason.startswith("rolled back, since its certificate failed: ") and wrong.said in event.reason
    assert "seed 0)" in event.reason  # the seed lets a user draw the case again
    assert [e.rule for e in optimized.log[0].matches] == ([] if boolean else ["mul-one"])
    unchecked = PassManager([Both()], certify=False).run(parse_graph(text))
    assert "planted" in [e.rule for e in unchecked.log[0].matches]


def test_a_replacement_that_cannot_run_is_undone() -> None:
    """The replacement has the type of the value that it replaces, but it only runs for eight or more rows."""

    def put(b: Builder, m: Match) -> Any:
        return b.pad(b.slice(m.x, axis=0, start=8, stop="B"), axis=0, before=8, after=0, value=0.0) + m.x * 0.0

    text = program("x: f32[B]", "y: f32[B]", "a = exp(x)", "return y = a")
    optimized = certified(text, Planted(lambda p, x, y: p.exp(x), put))
    assert not optimized.log[0].matches
    assert "the replacement fails: " in rolled_back(optimized)[0]


def attention(keep: Callable[[Builder], Any]) -> Graph:
    b = Builder(Graph("attention"))
    q, k, v = q_k_v(b)
    scores = q @ swapped(b, k) * 0.5
    b.outputs(y=b.softmax(b.where(keep(b), scores, -math.inf)) @ v)
    return b.graph


@dataclass(frozen=True)
class BlindlyCausal(Rewrite):
    """A rewrite that treats every mask as causal."""

    def pattern(self, p: Any, q: Any, k: Any, v: Any, mask: Any, t: Any) -> Any:
        return p.softmax(p.where(mask, q @ p.rearrange(k, pattern=t) * 0.5, -math.inf)) @ v

    def rewrite(self, b: Builder, m: Match) -> Any:
        from treadle.ir.attention.attention_terms import Causal

        return b.attention(m.q, m.k, m.v, terms=(Causal(),), scale=0.5)


def test_ops_above_a_match_count_if_a_side_no_longer_reads_them() -> None:
    """At first the mask is a free value. Followed up to its positions, it is a triangle, or is off by one."""
    right = certified(attention(lambda b: triangle(b)), BlindlyCausal())
    assert [e.rule for e in right.log[0].matches] == ["blindly-causal"]
    assert certificates(right)[0].cases >= 6
    off = certified(attention(lambda b: triangle(b, off=1)), BlindlyCausal())
    assert not off.log[0].matches and len(rolled_back(off)) == 1
    some_input = certified(attention(lambda b: b.input("mask", "bool[S, S]")), BlindlyCausal())
    assert not some_input.log[0].matches and len(rolled_back(some_input)) == 1


# -- wrong passes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SwapsDifferences(Pass):
    """a - b --> b - a, in place"""

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        found = [n for n in function.nodes if n.op.name == "sub"]
        for node in found:
            node.operands = node.operands[::-1]
        return len(found)


@dataclass(frozen=True)
class SwapsSums(Pass):
    """a + b --> b + a, in place, which is a right rewrite"""

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        found = [n for n in function.nodes if n.op.name == "add"]
        for node in found:
            node.operands = node.operands[::-1]
        return len(found)


@dataclass(frozen=True)
class NegatesAnOutput(Pass):
    """Replace the first output by its negative."""

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        name, value = next(iter(function.outputs.items()))
        function.outputs[name] = Builder(graph, function).apply(Neg.name, Builder(graph, function).expr(value)).value
        return 1


@dataclass(frozen=True)
class AddsDifferences(Pass):
    """a - b --> a + b, in place"""

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        found = [n for n in function.nodes if n.op.name == "sub"]
        for node in found:
            node.op = find_op("add")()
        return len(found)


@dataclass(frozen=True)
class CallsTheOther(Pass):
    """f(x) --> g(x), in place"""

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        found = [n for n in function.nodes if n.op.callee == "f"]
        for node in found:
            node.op = Call.of(graph.functions["g"])
        return len(found)


MIXED = program(
    "x: f32[B, S, 8], w: f32[8]",
    "y: f32[B, S, 8], z: f32[B, S, 8]",
    "a = sub(x, w)",
    "n = neg(a)",
    "p = abs(n)",
    "m = neg(p)",
    "q = abs(m)",
    "r = add(n, q)",
    "return y = r, z = p",
)


@pytest.mark.parametrize("each", [SwapsDifferences(), AddsDifferences(), NegatesAnOutput()], ids=lambda each: each.name)
def test_a_wrong_pass_is_undone(each: Pass) -> None:
    optimized = certified(MIXED, each)
    assert optimized.graph == parse_graph(MIXED)
    assert len(rolled_back(optimized)) == 1
    assert PassManager([each], certify=False).run(parse_graph(MIXED)).graph != parse_graph(MIXED)


def test_rewrites_with_several_results_are_undone_together() -> None:
    @dataclass(frozen=True)
    class SwapsQueriesAndKeys(Pass):
        def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
            (node,) = function.nodes
            q, k, v = node.operands
            node.operands = k, q, v
            return 1

    b = Builder(Graph("g"))
    y, p = b.attention_with_probabilities(*[b.input(name, "f32[2, 2, 3, 4]") for name in "qkv"])
    b.outputs(y=y, p=p)
    optimized = certified(b.graph, SwapsQueriesAndKeys())
    assert optimized.graph == b.graph
    assert len(rolled_back(optimized)) == 1


def test_a_call_of_another_function_is_undone() -> None:
    graph = Graph("g")
    for name, op in (("f", "exp"), ("g", "abs")):
        b = Builder(graph, Function(name))
        b.outputs(y=getattr(b, op)(b.input("x", "f32[B]")))
        graph.add_function(b.function)
    b = Builder(graph)
    x = b.input("x", "f32[B]")
    (one,), (other,) = (b.call(graph.functions[name], [x]) for name in "fg")
    b.outputs(y=one, z=other)
    optimized = certified(graph, CallsTheOther())
    assert optimized.graph == graph
    assert len(rolled_back(optimized)) == 1
    assert PassManager([CallsTheOther()], certify=False).run(graph).graph != graph


def test_a_right_pass_is_certified_and_stays() -> None:
    optimized = certified(MIXED, SwapsSums())
    assert optimized.graph != parse_graph(MIXED)
    assert [c.rule for c in certificates(optimized)] == ["swaps-sums"]


def test_only_what_is_wrong_of_a_pass_is_undone() -> None:
    """abs(-x) equals abs(x), so a negation that only abs reads may be dropped. A negation that is added to something
    may not.
    """
    optimized = certified(MIXED, ForgetsOneOp())
    assert sorted(n.op.name for n in optimized.graph.main.nodes) == ["abs", "abs", "add", "neg", "sub"]
    assert_same_numbers(optimized.source, optimized.graph)
    assert optimized.log[0].changes == 1 and len(rolled_back(optimized)) == 1
    wrong = PassManager([ForgetsOneOp()], certify=False).run(parse_graph(MIXED))
    assert not np.allclose(numbers(wrong.graph)["y"], numbers(wrong.source)["y"])


def test_a_pass_that_cannot_be_undone_in_part_is_undone_as_a_whole() -> None:
    """The pass has dropped an argument that the old value may read."""

    @dataclass(frozen=True)
    class DropsAWeight(ForgetsOneOp):
        def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
            del function.parameters["unread"]
            return 1 + super().run(function, graph, log)

    graph = Graph("g")
    b = Builder(graph)
    b.parameter("unread", "f32[8]")
    b.outputs(y=b.exp(-b.input("x", "f32[B, 8]")))
    optimized = certified(graph, DropsAWeight())
    (record,) = optimized.log
    assert optimized.graph == graph
    assert record.notes == ["all changes of this pass were rolled back"]
    assert (record.changes, record.after) == (0, record.before)


def test_compilation_goes_on_without_the_pass_that_failed() -> None:
    text = program(
        "x: f32[B, S, 8]",
        "y: f32[B, S, 8]",
        "n = neg(x)",
        "x2 = mul(n, 1.0)",
        *[line.replace("(x,", "(x2,") for line in GELU],
    )
    optimized = certified(text, ForgetsOneOp(), *DEFAULT)
    assert [n.op.name for n in optimized.graph.main.nodes] == ["neg", "gelu"]


# -- rows in which every key is masked --------------------------------------------------------------------------------


def _two_masks(fill: float, dtype: str) -> Graph:
    """Return softmax(where(rows, where(causal, q k, fill), fill)) v, with the mask of rows as an input."""
    b = Builder(Graph("g"))
    q, k, v = (x.cast(dtype) for x in q_k_v(b))
    scores = b.where(triangle(b), q @ swapped(b, k), b.constant(fill, q.dtype))
    b.outputs(y=b.softmax(b.where(rows(b), scores, b.constant(fill, q.dtype))) @ v)
    return b.graph


def _added_for_filled() -> Planted:
    """Replace a fill over a fill by two added masks: then a key that both masks exclude is lower than a key that one
    mask excludes.
    """

    def put(b: Builder, m: Match) -> Any:
        x = m.x + b.where(m.y, b.constant(0, m.x.dtype), b.constant(m.inner, m.x.dtype))
        return b.softmax(x + b.where(m.outer, b.constant(0, m.x.dtype), b.constant(m.fill, m.x.dtype)))

    @dataclass(frozen=True)
    class AddedForFilled(Planted):
        def pattern(self, p: Any, x: Any, y: Any, outer: Any) -> Any:
            return p.softmax(p.where(outer, p.where(y, x, p.constant("inner")), p.constant("fill")))

    return AddedForFilled(put=put)


@pytest.mark.parametrize(
    ("fill", "dtype"), [(LOW, "f32"), (-1e30, "f32"), (-1e9, "f32"), (-1e4, "f32"), (-65504, "f16")]
)
def test_a_fill_is_no_addend_where_another_fill_masks(fill: float, dtype: str) -> None:
    optimized = certified(_two_masks(fill, dtype), _added_for_filled())
    (reason,) = rolled_back(optimized)
    assert "the results differ by" in reason or "is NaN that was not NaN before" in reason
    assert "case " in reason


def test_an_overflow_only_in_float32_is_detected() -> None:
    """A fully masked row: with float32's lowest number for all keys, the result is an average. Adding the number twice
    overflows in float32, but not in float64. So the check must also run in float32.
    """
    b = Builder(Graph("g"))
    x, row = b.input("x", "f32[B, S, S]"), b.input("row", "bool[B, S, 1]")
    b.outputs(y=b.softmax(b.where(row, x @ x, LOW)))

    def twice(b: Builder, m: Match) -> Any:
        low = b.where(m.y, 0.0, b.constant(LOW))
        return b.softmax(m.x + low + low)

    rule = Planted(lambda p, x, y: p.softmax(p.where(y, x, LOW)), twice)
    (reason,) = rolled_back(certified(b.graph, rule))
    assert "an element is NaN that was not NaN before (case masked, in its own precision" in reason
