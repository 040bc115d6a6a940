"""Certificates: the graphs before and after a rewrite or a pass are compared at small sizes, and differences are
reported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

import treadle
from tests.attention_programs import masked, q_k_v, swapped, triangle
from tests.pass_programs import GELU, LAYER_NORM, program
from tests.planted_rewrites import ForgetsOneOp, Planted, certificates, certified, rolled_back
from treadle.ir.builder import Builder
from treadle.ir.errors import UsageError
from treadle.ir.graph import Function, Graph, Value
from treadle.ir.literals import Literal
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.ir.verifier import verify
from treadle.passes.certificates.certificate import Certificate
from treadle.passes.certificates.region_graphs import KEPT, shrinkings_of
from treadle.passes.certificates.regions import claim_of_match
from treadle.passes.cleanup.canonicalize import PowTwo
from treadle.passes.cleanup.common_subexpressions import CommonSubexpressions
from treadle.passes.cleanup.dead_code import DeadCode
from treadle.passes.cleanup.fold_constants import FoldConstants
from treadle.passes.framework.manager import Pass, PassManager
from treadle.passes.framework.pass_log import PassRecord
from treadle.passes.framework.rewrite import Match, Refusal, Rewrite
from treadle.passes.fusion.fuse_gelu import FuseGelu
from treadle.passes.fusion.fuse_normalization import FuseNormalization
from treadle.passes.pipelines import DEFAULT

# -- contents of a certificate ----------------------------------------------------------------------------------------


def test_a_certificate_names_the_rule_the_cases_and_the_error() -> None:
    optimized = certified(program("x: f32[B, S, 8]", "y: f32[B, S, 8]", *GELU), FuseGelu())
    (found,) = certificates(optimized)
    assert (found.rule, found.seed, found.cases) == ("gelu-erf", 0, 7)
    assert [dict(sizes).keys() for sizes in found.sizes] == [{"B", "S"}] * 3
    # sqrt(1/2) in float32 is off by at most half a spacing, and is multiplied by numbers up to 30 in erf
    assert 0 < found.error < 30 * 2.0**-23
    assert found.error <= found.tolerance < 1e-4
    assert str(found) in optimized.log.certified()
    assert not rolled_back(optimized)
    (said,) = json.loads(json.dumps(optimized.log.as_dict()))["passes"][0]["certificates"]
    assert said["rule"] == "gelu-erf" and Certificate.read(said) == found


def test_equal_rewrites_have_one_certificate_and_equal_runs_equal_logs() -> None:
    twice = [*GELU[:-1], "a2 = mul(e, 0.5)", "b2 = mul(e, 0.70710678)", "c2 = erf(b2)", "d2 = add(c2, 1.0)"]
    text = program("x: f32[B, S, 8]", "y: f32[B, S, 8]", *twice, "e2 = mul(a2, d2)", "return y = e2")
    first, second = (certified(text, FuseGelu()) for _ in range(2))
    assert [len(record.matches) for record in first.log] == [2]
    assert len(certificates(first)) == 1
    assert first.log.as_dict() == second.log.as_dict()


def test_other_attributes_are_another_instance() -> None:
    texts = [
        program("x: f32[B, S, 8]", "y: f32[B, S, 8]", *[line.replace("1e-05", eps) for line in LAYER_NORM]).replace(
            "  }\n}", "    r = rsqrt(e)\n    y = mul(c, r)\n    return y = y\n  }\n}"
        )
        for eps in ("1e-05", "1e-06")
    ]
    found = [certificates(certified(text, FuseNormalization()))[0] for text in texts]
    assert found[0].rule == found[1].rule == "layer-norm"
    assert found[0].instance != found[1].instance


def test_without_certify_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    text = program("x: f32[B, S, 8]", "y: f32[B, S, 8]", *GELU)
    for said, wanted in (("0", 0), ("", 0), ("1", 1)):
        monkeypatch.setenv("TREADLE_CERTIFY", said)
        assert len(certificates(PassManager([FuseGelu()]).run(parse_graph(text)))) == wanted
        assert not certificates(PassManager([FuseGelu()], certify=False).run(parse_graph(text)))
    assert "certificates" not in json.dumps(
        PassManager([FuseGelu()], certify=False).run(parse_graph(text)).log.as_dict()
    )


def test_a_switch_is_zero_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_CERTIFY", "yes")
    with pytest.raises(UsageError, match="TREADLE_CERTIFY must be 0 or 1"):
        PassManager([])


def test_compile_takes_certify() -> None:
    graph = parse_graph(program("x: f32[B, S, 8]", "y: f32[B, S, 8]", *GELU))
    assert "gelu-erf" in treadle.compile(graph, certify=True).log.certified()
    assert treadle.compile(graph, certify=False).log.certified() == ""


# -- passes of the pipeline without patterns --------------------------------------------------------------------------


def test_folding_is_held_against_the_graphs_own_precision() -> None:
    text = program("x: f32[B]", "y: f32[B]", "a = sqrt(2.0)", "c = mul(a, 0.1)", "d = mul(x, c)", "return y = d")
    (found,) = certificates(certified(text, FoldConstants()))
    assert (found.rule, found.error, found.note) == ("fold-constants", 0.0, "equal in their own precision")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_constant_that_is_another_is_undone(dtype: str) -> None:
    text = program(f"x: {dtype}[B]", f"y: {dtype}[B]", f"a = sqrt(2.0:{dtype})", "d = mul(x, a)", "return y = d")
    for number, wrong in ((1.0, 1), (2**0.5, 0)):
        made = partial(Builder.constant, value=number)
        rule = Planted(
            lambda p, x, y: p.sqrt(p.constant("two")), lambda b, m, made=made: made(b, dtype=m.result.type.dtype)
        )
        assert len(rolled_back(certified(text, rule))) == wrong


def test_constants_that_cannot_be_computed_are_not_called_equal() -> None:
    b = Builder(Graph("g"))
    b.outputs(y=b.input("x", "f32[3]") + b.gather(b.constant([1.0, 2.0]), b.constant(5), axis=0))
    rule = Planted(lambda p, x, y: p.gather(x, y, axis=0), lambda b, m: b.constant(1.0))
    (found,) = certificates(certified(b.graph, rule))
    assert found.note.startswith("not evaluated: ") and not found.cases


def test_a_wrong_fold_is_undone() -> None:
    @dataclass(frozen=True)
    class FoldsToOne(Pass):
        def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
            last = function.nodes[-1]
            last.operands = (last.operands[0], Value.constant(Literal.of(1.0, last.inputs[1].type.dtype)))
            function.nodes = [last]
            return 1

    text = program("x: f32[B]", "y: f32[B]", "a = sqrt(2.0)", "d = mul(x, a)", "return y = d")
    optimized = certified(text, FoldsToOne())
    assert optimized.graph == parse_graph(text)
    assert len(rolled_back(optimized)) == 1


def test_merging_equal_nodes_needs_no_numbers() -> None:
    text = program("x: f32[B]", "y: f32[B]", "a = exp(x)", "c = exp(x)", "d = add(a, c)", "return y = d")
    optimized = certified(text, CommonSubexpressions())
    assert len(optimized.graph.main.nodes) == 2
    assert not certificates(optimized) and not rolled_back(optimized)


def test_functions_that_take_less_are_what_they_were() -> None:
    """Dead code elimination removes an unused result and input of a function, and an operand of every call."""
    graph, block = Graph("g"), Function("block")
    b = Builder(graph, block)
    x, unread = b.input("x", "f32[B, 8]"), b.input("unread", "f32[B, 8]")
    b.outputs(y=b.exp(x), other=unread * 2.0)
    graph.add_function(block)
    b = Builder(graph)
    x = b.input("x", "f32[B, 8]")
    y, _ = b.call(block, [x, -x])
    z, _ = b.call(block, [y, x])
    b.outputs(z=z)
    optimized = certified(graph, DeadCode())
    assert [len(n.operands) for n in optimized.graph.main.nodes] == [1, 1]
    assert not rolled_back(optimized)
    verify(optimized.graph)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_large_axes_are_made_small_and_products_stay_products() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[B, S, 768]")
    heads = b.rearrange(x, pattern="b s (h=12 d) -> b h s d")
    y = b.rearrange(heads, pattern="b h s d -> b s (h d)")
    nodes = b.graph.main.nodes
    shrinking = next(shrinkings_of(claim_of_match(nodes, [], nodes[-1], [y.value]).cut(0)))
    assert shrinking[768] == 12 * shrinking[64] < 768


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("count", range(1, 9))
def test_small_sizes_are_apart_and_even_where_the_large_ones_are(odd: bool, count: int) -> None:
    """If there are more large sizes than small sizes to replace them, the last large ones stay."""
    primes = (53, 59, 61, 67, 71, 73, 79, 83)[:count]
    sizes = [p if odd else 2 * p for p in primes]
    b = Builder(Graph("g"))
    x = b.input("x", f"f32[B, {', '.join(map(str, sizes))}]")
    y = -x
    nodes = b.graph.main.nodes
    shrinking = next(shrinkings_of(claim_of_match(nodes, [], nodes[-1], [y.value]).cut(0)))
    made = [shrinking.get(size, size) for size in sizes]
    assert len(set(made)) == count
    assert all(small % 2 == size % 2 for small, size in zip(made, sizes, strict=True))
    assert sum(small < KEPT + 16 for small in made) == min(count, 6)


def test_a_rewrite_that_depends_on_a_size_is_tried_at_that_size() -> None:
    """sum(x) / 96 is the mean only for 96 numbers."""
    rule = Planted(lambda p, x, y: p.reduce_sum(x, axes=(-1,)) / 96.0, lambda b, m: b.reduce_mean(m.x, axes=(-1,)))
    text = program("x: f32[B, 96]", "y: f32[B]", "a = reduce_sum(x, axes=[-1])", "c = div(a, 96.0)", "return y = c")
    (found,) = certificates(certified(text, rule))
    assert found.note == ""  # large axes were not made small
    wrong = certified(text.replace("f32[B, 96]", "f32[B, 95]"), rule)
    assert not wrong.log[0].matches and len(rolled_back(wrong)) == 1


def test_the_other_axes_are_made_small_all_the_same() -> None:
    rule = Planted(lambda p, x, y: p.reduce_sum(x, axes=(-1,)) / 96.0, lambda b, m: b.reduce_mean(m.x, axes=(-1,)))
    lines = ["a = reduce_sum(x, axes=[-1])", "c = div(a, 96.0)", "return y = c"]
    text = program("x: f32[B, 65537, 96]", "y: f32[B, 65537]", *lines)
    (found,) = certificates(certified(text, rule))
    assert found.cases > 0 and found.note == "large axes made small"
    wrong = certified(text.replace("f32[B, 65537, 96]", "f32[B, 65537, 95]"), rule)
    assert not wrong.log[0].matches and len(rolled_back(wrong)) == 1


def test_a_claim_does_not_grow_with_what_was_rewritten_before_it() -> None:
    """Each layer reads a result of the rewrite in the preceding layer."""
    graph = Graph("g")
    b = Builder(graph)
    x = b.input("x", "f32[B]")
    for _ in range(30):
        x = b.tanh(b.abs(-b.exp(x)))
    b.outputs(y=x)
    optimized = certified(graph, ForgetsOneOp())
    assert [n.op.name for n in optimized.graph.main.nodes].count("neg") == 0
    assert len(certificates(optimized)) == 1  # all thirty layers share it


def test_models_too_large_to_run_are_named() -> None:
    graph = parse_graph(program("x: f32[B, S]", "y: f32[B, S]", "a = pow(x, 2.0)", "return y = a"))
    graph.bound("S", Bounds(1 << 26))
    (found,) = certificates(certified(graph, PowTwo()))
    assert (found.cases, found.note) == (0, "not evaluated: too large")
    assert "too large" in str(found)


def test_rewrites_that_fail_at_small_sizes_are_undone() -> None:
    rule = Planted(lambda p, x, y: p.tanh(x), lambda b, m: b.sigmoid(m.x))
    graph = parse_graph(program("x: f32[B, 33554432]", "y: f32[B, 33554432]", "a = tanh(x)", "return y = a"))
    optimized = certified(graph, rule)
    assert not optimized.log[0].matches
    assert "with large axes made small, and otherwise not evaluated: too large" in rolled_back(optimized)[0]


def test_masks_that_are_added_are_tried_with_rows_masked() -> None:
    """A rule that drops an additive mask of 0 and -1e9 gives wrong results only if a row is masked."""
    b = Builder(Graph("g"))
    q, k, v = q_k_v(b)
    mask = b.input("mask", "f32[B, 1, 1, S]")
    b.outputs(y=b.softmax(q @ swapped(b, k) + mask) @ v)
    rule = Planted(lambda p, x, y: p.softmax(x + y), lambda b, m: b.softmax(b.maximum(m.x + m.y, -50.0)))
    optimized = certified(b.graph, rule)
    assert "case masked" in rolled_back(optimized)[0]


def test_attention_in_the_default_pipeline_is_certified() -> None:
    b = Builder(Graph("g"))
    b.outputs(y=masked(b, lambda: triangle(b)))
    optimized = certified(b.graph, *DEFAULT)
    assert "attention" in [n.op.name for n in optimized.graph.main.nodes]
    assert [c.cases > 0 for c in certificates(optimized) if c.rule == "fuse-attention"] == [True]
    assert not rolled_back(optimized)


# -- the cost gate ----------------------------------------------------------------------------------------------------


def test_a_rewrite_that_is_slower_on_the_target_is_refused() -> None:
    @dataclass(frozen=True)
    class Square(Rewrite):
        """x^2 --> x * x, but not on a GPU"""

        def pattern(self, p: Any, x: Any) -> Any:
            return x**2

        def slower(self, m: Match, target: Target) -> Refusal | None:
            return Refusal(f"slower on {target}") if target.kind == "cuda" else None

        def rewrite(self, b: Builder, m: Match) -> Any:
            return m.x * m.x

    graph = parse_graph(program("x: f32[B]", "y: f32[B]", "a = pow(x, 2.0)", "return y = a"))
    for target, ops in (("cpu", ["mul"]), ("cuda", ["pow"])):
        optimized = PassManager([Square()], target=Target(target)).run(graph)
        assert [n.op.name for n in optimized.graph.main.nodes] == ops
    assert optimized.log[0].refusals[0].reason == "slower on cuda"


def test_a_case_in_which_roundings_decide_is_no_evidence() -> None:
    """sin(1e16 x + 1e16) changes with the rounding of 1e16. So the certificate cannot decide if adding 2 changes it."""
    text = program("x: f32[B, S]", "y: f32[B, S]", "a = mul(x, 1e16)", "b = add(a, 1e16)", "c = sin(b)", "return y = c")
    rule = Planted(lambda p, x, y: p.sin(x * 1e16 + 1e16), lambda b, m: b.sin(m.x * 1e16 + 1e16 + 2.0))
    found = certified(text, rule)
    (note,) = certificates(found)
    assert not rolled_back(found) and note.cases == 0 and note.undecided > 0
    assert "not certified: roundings alone may change the results by as much" in str(note)
