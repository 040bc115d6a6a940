"""Limits of passes at collectives: each rank relies on the others to run the same collectives in the same order."""

from __future__ import annotations

from treadle.ir.analysis.weight_only import weight_only_nodes
from treadle.ir.builder import Builder, Expr
from treadle.ir.encodings.encoding import parse_encoding
from treadle.ir.graph import Function, Graph
from treadle.ir.text.parser import parse_graph
from treadle.ir.types import parse_type
from treadle.passes.framework.facts import INITIAL, LEGAL
from treadle.passes.framework.manager import PassManager
from treadle.passes.lowering.decode_last import DecodeLast
from treadle.passes.lowering.hoist_weights import HoistWeights
from treadle.passes.memory.ordering import must_precede
from treadle.passes.memory.plan_storage import PlanStorage
from treadle.passes.pipelines import MERGING


def reduced(b: Builder, x: Expr) -> Expr:
    made: Expr = b.apply("all_reduce", x, over="tp", ways=2, because="it is tried")
    return made


def count(graph: Graph) -> int:
    return str(graph).count("= all_reduce(")


def test_unread_results_stay() -> None:
    b = Builder(Graph("unread"))
    x = b.input("x", "f32[8]")
    reduced(b, x)
    b.outputs(y=x * 2.0)
    assert count(PassManager(MERGING).run(b.graph).graph) == 1


def test_a_call_of_what_holds_it_stays() -> None:
    graph = Graph("unread")
    inner = Builder(graph, Function("block"))
    inner.outputs(z=reduced(inner, inner.input("y", "f32[8]")))
    graph.add_function(inner.function)
    b = Builder(graph)
    x = b.input("x", "f32[8]")
    b.call(inner.function, [x])
    b.outputs(y=x * 2.0)
    assert graph.main.nodes[0].op.meets_ranks
    left = PassManager(MERGING).run(graph).graph
    assert "block(x)" in str(left)
    assert count(left) == 1
    assert parse_graph(str(left)) == left


def test_two_alike_stay_two() -> None:
    b = Builder(Graph("twice"))
    x = b.input("x", "f32[8]")
    b.outputs(y=reduced(b, x) + reduced(b, x))
    assert count(PassManager(MERGING).run(b.graph).graph) == 2


def test_a_weight_that_is_gathered_is_not_gathered_once_for_all_calls() -> None:
    b = Builder(Graph("gathered"))
    x = b.input("x", "f32[B, 8]")
    w = b.apply("all_gather", b.parameter("w", "f32[2, 8]"), over="dp", ways=4, axis=0, size=8)
    b.outputs(y=b.linear(x, b.tanh(w)))
    assert not weight_only_nodes(b.graph.main)
    assert PassManager([HoistWeights()]).run(b.graph).graph.bind is None


def test_steps_keep_their_order() -> None:
    b = Builder(Graph("order"))
    x = b.input("x", "f32[64]")
    first, second = reduced(b, b.tanh(x)), reduced(b, b.exp(x))
    b.outputs(y=second, z=b.reduce_sum(first, axes=(0,)))
    plan = PassManager([PlanStorage()]).run(b.graph).plan
    assert plan is not None
    steps = plan.functions["main"].steps
    collectives = [i for i, step in enumerate(steps) if step.nodes[0].op.meets_ranks]
    assert len(collectives) == 2
    assert collectives[0] in must_precede(plan.functions["main"].function, steps)[collectives[1]]


def test_weights_that_are_gathered_as_numbers_are_not_gathered_as_blocks() -> None:
    """The plan states the number of communicated bytes, and few backends can decode during a call."""
    b = Builder(Graph("gathered"))
    w = b.apply("decode", b.parameter("w", parse_type("f32[4, 32] as q8_0")), of=parse_encoding("q8_0"))
    y = b.apply("all_gather", w, over="tp", ways=2, axis=0, size=8)
    b.outputs(y=b.linear(b.input("x", "f32[B, 32]"), y))
    text = str(PassManager([DecodeLast()]).run(b.graph, facts=INITIAL | {LEGAL}).graph)
    assert text.index("= decode(") < text.index("= all_gather(")


def test_work_stays_between_what_begins_and_what_waits_for_it() -> None:
    """Each step would need less memory elsewhere, but then a collective would be awaited immediately after its
    start.
    """
    b = Builder(Graph("between"))
    x = b.input("x", "f32[64]")
    given = b.tanh(x)
    met = {"over": "cp", "ways": 2, "axis": 0, "size": 64}
    b.apply("start_pass", given, **met)
    meanwhile = b.reduce_sum(b.exp(x), axes=(0,))
    got = b.apply("pass_on", given, **met, ahead=True)
    b.outputs(y=b.reduce_sum(got, axes=(0,)), z=meanwhile)
    plan = PassManager([PlanStorage()]).run(b.graph).plan
    assert plan is not None
    steps = plan.functions["main"].steps
    before = must_precede(plan.functions["main"].function, steps)
    at = {step.nodes[0].op.name: i for i, step in enumerate(steps)}
    assert at["start_pass"] in before[at["exp"]]
    assert at["exp"] in before[at["pass_on"]]
    assert at["start_pass"] < at["exp"] < at["pass_on"]
