"""Patterns and the pass manager: matches, the log of a pipeline, and the behavior if a pass fails."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings

from tests.golden import Golden
from tests.pass_programs import LAYER_NORM, assert_same_numbers, numbers, optimize, program
from tests.random_graphs import random_graphs
from treadle.ir.builder import Builder
from treadle.ir.errors import PassError, TreadleError, UsageError
from treadle.ir.graph import Function, Graph, Node
from treadle.ir.source_lines import SourceLine
from treadle.ir.text.parser import parse_graph
from treadle.passes.cleanup.canonicalize import Canonicalize
from treadle.passes.cleanup.dead_code import DeadCode
from treadle.passes.cleanup.fold_constants import FoldConstants
from treadle.passes.framework.manager import BrokenPassError, Pass, PassManager
from treadle.passes.framework.pass_log import Event, PassLog, PassRecord
from treadle.passes.framework.pattern import Pattern
from treadle.passes.framework.rewrite import Match, Refusal, Rewrite
from treadle.passes.fusion.fuse_gelu import FuseGelu
from treadle.passes.pipelines import DEFAULT

# -- patterns -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Custom(Rewrite):
    """A rewrite with a test's own pattern and replacement op."""

    spelled: Any = None
    op: str = "relu"

    def pattern(self, p: Any, x: Any, y: Any) -> Any:
        return self.spelled(p, x, y)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.apply(self.op, m.x)


def applied(spelled: Any, *lines: str, takes: str = "x: f32[B]", gives: str = "y: f32[B]") -> bool:
    """Return True if a pattern matches some node of a program."""
    wrong = PassManager([Custom(spelled)], certify=False)  # certificates would reject all of these rewrites
    return bool(wrong.run(parse_graph(program(takes, gives, *lines))).log[0].matches)


def test_a_wildcard_is_one_value_wherever_it_stands() -> None:
    def twice(p: Any, x: Any, y: Any) -> Any:
        return p.exp(x) + x

    assert applied(twice, "a = exp(x)", "b = add(a, x)", "return y = b")
    assert applied(twice, "a = exp(x)", "b = add(x, a)", "return y = b")
    assert not applied(twice, "a = exp(x)", "b = neg(x)", "c = add(a, b)", "d = mul(c, b)", "return y = d")


def test_an_operand_and_an_attribute_are_never_one_wildcard() -> None:
    """They stay distinct even if both have the same number: `y` is a value, and an attribute is not a value."""

    def inner(p: Any, x: Any, y: Any) -> Any:
        return p.softmax(x + y, axis=y)

    def outer(p: Any, x: Any, y: Any) -> Any:
        return p.softmax(x, axis=y) + y

    plain = {"takes": "x: f32[B, S]", "gives": "y: f32[B, S]"}
    assert not applied(inner, "a = add(x, 1.0)", "b = softmax(a, axis=1)", "return y = b", **plain)
    assert not applied(inner, "a = add(x, x)", "b = softmax(a, axis=1)", "return y = b", **plain)
    assert not applied(outer, "a = softmax(x, axis=1)", "b = add(a, 1.0)", "return y = b", **plain)
    assert not applied(outer, "a = softmax(x, axis=1)", "b = add(a, x)", "return y = b", **plain)


def test_operands_of_other_ops_do_not_change_places() -> None:
    def difference(p: Any, x: Any, y: Any) -> Any:
        return p.exp(x) - x

    assert applied(difference, "a = exp(x)", "b = sub(a, x)", "return y = b")
    assert not applied(difference, "a = exp(x)", "b = sub(x, a)", "return y = b")


@pytest.mark.parametrize("number", [0.1, 0.1000001])
def test_constants_match_within_the_rounding_of_their_dtype(number: float) -> None:
    """0.1 is not a float32, so the nearest float32 must match; a float32 that is 13 units in the last place away must
    not.
    """
    lines = (f"a = mul(x, {number})", "return y = a")
    assert applied(lambda p, x, y: x * 0.1, *lines) == (number == 0.1)


def test_attributes_that_a_pattern_leaves_out_have_their_default() -> None:
    def last(p: Any, x: Any, y: Any) -> Any:
        return p.softmax(x)

    assert applied(last, "a = softmax(x)", "return y = a", takes="x: f32[B, S]", gives="y: f32[B, S]")
    assert not applied(last, "a = softmax(x, axis=0)", "return y = a", takes="x: f32[B, S]", gives="y: f32[B, S]")


def test_alternatives_may_leave_an_operand_out() -> None:
    def norm(p: Any, x: Any, y: Any) -> Any:
        return p.neg(p.rms_norm(x, p.either(None, y)))

    assert applied(norm, "a = rms_norm(x)", "b = neg(a)", "return y = b")
    assert applied(norm, "a = rms_norm(x, x)", "b = neg(a)", "return y = b", takes="x: f32[B]")


def test_a_replacement_of_another_type_is_refused() -> None:
    text = program("x: f32[B, S]", "y: f32[B]", "a = reduce_sum(x, axes=[1])", "return y = a")
    with pytest.raises(PassError, match="replaces reduce_sum by a value of another type"):
        optimize(text, Custom(lambda p, x, y: p.reduce_sum(x, axes=(1,))))


def test_rules_that_rewrite_their_own_output_forever_are_stopped() -> None:
    text = program("x: f32[B]", "y: f32[B]", "a = relu(x)", "return y = a")
    with pytest.raises(PassError, match="custom keeps rewriting its own output"):
        optimize(text, Custom(lambda p, x, y: p.relu(x)))


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        (lambda p, x: x, "root must be an op"),
        (lambda p, x: p.cast(x), "must state its attributes: to"),
        (lambda p, x: p.exp(x, axis=1), "axis is not one of them"),
        (lambda p, x: p.exp("x"), "must consist of terms and numbers"),
    ],
)
def test_invalid_patterns_are_refused_with_the_reason(spelled: Any, message: str) -> None:
    with pytest.raises(PassError) as caught:
        Pattern.trace(spelled)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("spelled", "size", "roots"),
    [
        (lambda p, x: p.exp(x), 1, ("exp",)),
        (lambda p, x: p.exp(-x) + 1.0, 3, ("add",)),
        (lambda p, x: p.either(p.exp(p.exp(x)), p.neg(x)), 1, ("exp", "neg")),
        (lambda p, x: p.exp(p.either(x, p.tanh(x))) * p.either(p.exp(-x), p.tanh(x)), 3, ("mul",)),
    ],
)
def test_a_pattern_counts_the_least_ops_that_it_has(spelled: Any, size: int, roots: tuple[str, ...]) -> None:
    traced = Pattern.trace(spelled)
    assert (traced.size, traced.root_ops) == (size, roots)


def test_check_sees_captures_and_refuses_with_the_users_line() -> None:
    @dataclass(frozen=True)
    class OnlyVectors(Rewrite):
        """exp(neg(x)) --> relu(x) for vectors: a wrong rewrite, which must be refused"""

        def pattern(self, p: Any, x: Any) -> Any:
            return p.exp(p.named("inner", -x))

        def check(self, m: Match) -> Refusal | None:
            return None if m.x.rank == 1 else Refusal(f"x has rank {m.x.rank}", m.inner)

    b = Builder(Graph("g"))
    x = b.input("x", "f32[B, S]")
    with b.scoped("h.0"):
        b.source = SourceLine("model.py", 7)
        negative = -x
        b.source = SourceLine("model.py", 8)
        b.outputs(y=b.exp(negative))
    (record,) = PassManager([OnlyVectors()]).run(b.graph).log
    (event,) = record.refusals
    assert str(event) == "only-vectors at neg: x has rank 2    model.py:7  h.0"


def test_a_replacement_stands_where_the_root_stood() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[B]")
    b.source, b.scope = SourceLine("model.py", 3), "mlp"
    gate = b.sigmoid(x)
    b.source, b.scope = SourceLine("model.py", 4), "mlp.act"
    y = x * gate
    y.value.name = "activated"
    b.source = SourceLine("model.py", 5)
    b.outputs(z=-y)
    silu, neg = PassManager([FuseGelu()]).run(b.graph).graph.main.nodes
    assert (silu.op.name, silu.scope, silu.source) == ("silu", "mlp.act", SourceLine("model.py", 4))
    assert silu.result.name == "activated"
    assert neg.operands == (silu.result,)


# -- functions, weights, the whole pipeline ------------------------------------------------------------------------


def blocks() -> Graph:
    """A block that is called twice, with an unused result, input and weight, and a function that is never called."""
    graph = Graph("g")
    forgotten, block = Function("forgotten"), Function("block")
    b = Builder(graph, forgotten)
    b.source = SourceLine("model.py", 1)
    b.outputs(y=b.exp(b.input("x", "f32[B, 8]")))
    b = Builder(graph, block)
    b.source = SourceLine("model.py", 2)
    x, mask = b.input("x", "f32[B, 8]"), b.input("mask", "f32[B, 8]")
    product = b.linear(x, b.parameter("w", "f32[8, 8]"))
    b.parameter("spare", "f32[8]")
    y = product * b.sigmoid(product)
    b.outputs(y=y, extra=y + mask)
    graph.add_function(forgotten)
    graph.add_function(block)
    b = Builder(graph)
    b.source = SourceLine("model.py", 3)
    x, mask = b.input("x", "f32[B, 8]"), b.input("mask", "f32[B, 8]")
    m = b.exp(mask)
    for name in ("a", "b"):
        weights = [b.parameter(f"{name}.w", "f32[8, 8]"), b.parameter(f"{name}.spare", "f32[8]")]
        x, _ = b.call(block, [x, m, *weights])
    b.parameter("left", "f32[3]")
    b.outputs(y=x)
    return graph


def test_dead_code_crosses_functions() -> None:
    optimized = PassManager([DeadCode()]).run(blocks())
    graph = optimized.graph
    assert list(graph.functions) == ["block", "main"]
    block = graph.functions["block"]
    assert [v.name for v in block.arguments] == ["x", "w"]
    assert list(block.outputs) == ["y"]
    assert [n.op.name for n in graph.main.nodes] == ["call", "call"]
    assert list(graph.parameters) == ["a.w", "b.w"]
    assert [v.name for v in graph.main.inputs] == ["x", "mask"]
    assert optimized.log[0].notes == [
        "removed unused weights: left",
        "removed function forgotten, which is never called",
        "removed unused weights: a.spare, b.spare",
    ]
    # a function, a result of another function with its node, two arguments, a node of main, and three weights
    assert optimized.log[0].changes == 9
    assert_same_numbers(optimized.source, graph)


def test_a_function_that_nobody_calls_is_all_that_changes() -> None:
    graph, forgotten = Graph("g"), Function("forgotten")
    for b in (Builder(graph, forgotten), Builder(graph)):
        b.outputs(y=b.exp(b.input("x", "f32[3]")))
    graph.add_function(forgotten)
    record = PassManager([DeadCode()]).run(graph).log[0]
    assert record.changes == 1 and list(record.graph.functions) == ["main"]


@pytest.mark.parametrize(
    ("count", "named"), [(5, "w0, w1, w2, w3, w4"), (6, "w0, w1, w2, w3, w4 and 1 more")], ids=["five", "six"]
)
def test_of_many_weights_that_are_removed_the_first_are_named(count: int, named: str) -> None:
    b = Builder(Graph("g"))
    for n in range(count):
        b.parameter(f"w{n}", "f32[3]")
    b.outputs(y=b.exp(b.input("x", "f32[3]")))
    assert PassManager([DeadCode()]).run(b.graph).log[0].notes == [f"removed unused weights: {named}"]


def test_a_repeated_block_is_rewritten_once() -> None:
    log = PassManager([FuseGelu()]).run(blocks()).log
    assert [(e.rule, e.function, e.source) for e in log[0].matches] == [("silu", "block", "model.py:2")]


EVERYTHING = program(
    "x: f32[B, S, 8]",
    "y: f32[B, S, 4], z: f32[B, S, 8]",
    *LAYER_NORM,
    *["r = rsqrt(e)", "n = mul(c, r)", "o = mul(n, $g)", 't = rearrange($w, pattern="o i -> i o")'],
    *["l = matmul(o, t)", "h = add(l, $bias)", "k = mul(0.25, 2.0)", "half = mul(h, k)"],
    *["q = div(h, 1.4142135)", "f = erf(q)", "u = add(f, 1.0)", "y = mul(half, u)"],
    *["a = mul(0.5, x)", "b = div(x, 1.5)", "d = erf(b)", "i = add(1.0, d)", "z = mul(a, i)", "return y = y, z = z"],
    weights=("w: f32[4, 8]", "bias: f32[4]", "g: f32[8]", "unused: f32[3]"),
)


def test_the_default_pipeline(golden: Golden) -> None:
    optimized = optimize(EVERYTHING, *DEFAULT)
    golden(
        "passes/default.txt",
        "\n\n".join([str(optimized.graph), optimized.log.table(times=False), optimized.log.explain()]),
    )
    assert_same_numbers(optimized.source, optimized.graph)


def test_a_table_tells_times_and_changes_of_ops() -> None:
    made = [
        PassRecord("first", "", Counter(exp=2, mul=1), Counter(exp=1, neg=3), seconds=0.01234),
        PassRecord("second", "", Counter(exp=1, neg=3), Counter(exp=1, neg=3), seconds=1.5),
    ]
    made[0].changes = 2
    made[1].refusals += [Event("rule", "main", "exp", "", "")] * 2
    made[1].near_misses += [Event("rule", "main", "exp", "", "")] * 3
    assert PassLog(made).table().splitlines() == [
        "pass    ops     change                  refused  nearly  ms",
        "first   3 -> 4  -1 exp, -1 mul, +3 neg                   12.3",
        "second  4                               2        3       1500.0",
    ]
    assert PassLog(made).table(times=False).splitlines()[1] == "first   3 -> 4  -1 exp, -1 mul, +3 neg"
    assert [each.summary for each in made] == [
        "after first: 3 -> 4 ops, 12.3 ms",
        "after second: 4 -> 4 ops, 1500.0 ms",
    ]
    assert repr(made[1]) == "<pass second: 4 -> 4 ops, 1500.0 ms, 2 refused, 3 nearly>"


def test_the_log_is_the_same_every_time_and_goes_into_json() -> None:
    first, second = (optimize(EVERYTHING, *DEFAULT).log.as_dict() for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    assert "seconds" not in json.dumps(first)
    assert "seconds" in json.dumps(optimize(EVERYTHING, *DEFAULT).log.as_dict(times=True))


def test_the_given_graph_stays_as_it_was_and_stages_are_kept() -> None:
    source = parse_graph(EVERYTHING)
    optimized = PassManager(DEFAULT).run(source)
    assert source == parse_graph(EVERYTHING)
    assert optimized.source is source
    names = {n.op.name for n in optimized.after("fuse-normalization").main.nodes}
    assert "layer_norm" in names
    assert "linear" not in names
    assert optimized.after("dead-code") == optimized.graph
    with pytest.raises(UsageError, match="no pass 'fuse-gleu' was run"):
        optimized.after("fuse-gleu")


def test_optimizing_twice_changes_nothing_more() -> None:
    once = optimize(EVERYTHING, *DEFAULT).graph
    again = PassManager(DEFAULT).run(once)
    assert again.graph == once
    assert not any(record.changed for record in again.log)


# -- passes that fail ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Breaking(Pass):
    """Leave a use of a value that no node produces; if configured so, raise an error instead."""

    stumble: bool = False

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        removed: Node = function.nodes.pop(0)
        if self.stumble:
            raise KeyError(removed.op.name)
        return 1


@pytest.mark.parametrize("stumble", [False, True])
def test_a_broken_pass_is_named_and_the_graph_before_it_kept(stumble: bool) -> None:
    text = program("x: f32[B]", "y: f32[B]", "a = mul(x, 1.0)", "b = exp(a)", "c = neg(b)", "return y = c")
    with pytest.raises(BrokenPassError, match="pass breaking failed") as caught:
        optimize(text, Canonicalize(), Breaking(stumble))
    assert caught.value.graph == optimize(text, Canonicalize()).graph
    assert ("KeyError" in str(caught.value)) == stumble


def test_options_that_differ_from_their_defaults_are_in_the_record() -> None:
    assert FoldConstants().options == ""
    assert FoldConstants(limit_bytes=8).options == "limit_bytes=8"


@pytest.mark.parametrize(
    ("level", "shown", "hidden"),
    [
        ("1", "common-subexpressions", "# after"),
        ("2", "# after fuse-gelu: ", "nearly   "),
        ("3", "nearly   gelu-erf", "?"),
    ],
)
def test_debug_levels(
    level: str, shown: str, hidden: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TREADLE_DEBUG", level)
    optimize(EVERYTHING, *DEFAULT)
    printed = capsys.readouterr()
    assert shown in printed.err
    assert hidden not in printed.err
    assert printed.out == ""


def test_a_debug_level_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_DEBUG", "all")
    with pytest.raises(UsageError, match="TREADLE_DEBUG must be a number"):
        optimize(EVERYTHING)


# -- any graph -----------------------------------------------------------------------------------------------------


@given(random_graphs())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_graph_verifies_after_every_pass_and_keeps_its_signature(graph: Graph) -> None:
    optimized = PassManager(DEFAULT).run(graph)
    assert [v.type for v in optimized.graph.main.inputs] == [v.type for v in graph.main.inputs]
    assert {n: v.type for n, v in optimized.graph.main.outputs.items()} == {
        n: v.type for n, v in graph.main.outputs.items()
    }
    assert set(optimized.graph.parameters) <= set(graph.parameters)


@given(random_graphs())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_graph_that_can_be_run_keeps_its_numbers(graph: Graph) -> None:
    """Constant folding is left out: it rounds to the graph's own dtypes, and so differs from float64 by design."""
    optimized = PassManager([each for each in DEFAULT if not isinstance(each, FoldConstants)]).run(graph)
    try:
        wanted = numbers(graph)
    except (TreadleError, ArithmeticError, ValueError):  # an index out of range, NaN as an integer, ...
        reject()
    got = numbers(optimized.graph)
    for name, array in wanted.items():
        # The default tolerance of float32, because each op and its decomposed form round their constants once.
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_the_examples_in_the_docs_run_and_print_what_they_say() -> None:
    text = (Path(__file__).parent.parent / "docs" / "passes.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", text, re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, Any] = {}
    for code, printed in blocks:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            exec(compile(code, "docs/passes.md", "exec"), names)
        assert shown.getvalue() == printed
