"""The checker of sharding plans: graphs of one or two ops, with placements written by hand, and all errors that it
reports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.sharded_models import recognized
from treadle.ir import composites
from treadle.ir.builder import Builder
from treadle.ir.errors import PassError
from treadle.ir.expressions import Expr
from treadle.ir.graph import Graph
from treadle.ir.hardware import find_hardware
from treadle.ir.placement.mesh import Mesh
from treadle.ir.placement.placements import MeshPlacement, parse_placement
from treadle.ir.transforms.clone import clone_graph
from treadle.passes.sharding.checking import check_sharding
from treadle.passes.sharding.conversions import PlacementStep, StepKind
from treadle.passes.sharding.factors import Share
from treadle.passes.sharding.plan import Move, PlannedFunction, PlannedNode, ShardingPlan
from treadle.passes.sharding.recipes import shard

MESH = Mesh.of("tp=4,dp=2")
LARGER = Mesh.of("tp=4,dp=2,ep=2")
"""A mesh with an axis that the plans' mesh lacks."""


def placed(text: str) -> MeshPlacement:
    return parse_placement(text, LARGER if "ep" in text else MESH)


def all_placed(texts: str) -> tuple[MeshPlacement, ...]:
    return tuple([placed(text) for text in texts.split("; ")])


def laid(model: Callable[[Builder], Expr], takes: str, *nodes: str, gives: str | None = None) -> ShardingPlan:
    """Return the plan of a small graph, with the placements that these texts describe.

    takes  placement of each input
    nodes  placements of operands -> result | factors that are split
    gives  placement of the output; None: the placement of the last node's result
    """
    b = Builder(Graph("small"))
    b.outputs(y=model(b))
    planned = []
    for node, text in zip(b.graph.main.nodes, nodes, strict=True):
        places, _, factors = text.partition(" | ")
        reads, _, made = places.partition(" -> ")
        split = dict(each.split(": ") for each in factors.split(", ") if each)
        shares = {name: Share(MESH.parts_of(over)) for name, over in split.items()}
        lie = (*all_placed(reads), *[None for each in node.operands if each is None])
        planned.append(PlannedNode(node, shares, (), lie, (placed(made),)))
    outputs = planned[-1].gives if gives is None else (placed(gives),)
    main = PlannedFunction("main", b.graph.main, all_placed(takes), tuple(planned), (), outputs)
    return ShardingPlan(b.graph, MESH, "", {}, "", {}, (main,), (), {}, find_hardware("h100"))


def product(b: Builder) -> Expr:
    return b.linear(b.input("x", "f32[8, 16]"), b.input("w", "f32[8, 16]"))


def product_and_bias(b: Builder) -> Expr:
    return b.linear(b.input("x", "f32[8, 16]"), b.input("w", "f32[8, 16]"), b.input("bias", "f32[8]"))


def summed(b: Builder) -> Expr:
    return b.reduce_sum(b.input("x", "f32[8, 16]"), axes=(1,))


def largest(b: Builder) -> Expr:
    return b.reduce_max(b.input("x", "f32[8, 16]"), axes=(1,))


def looked_up_at_a_sum(b: Builder) -> Expr:
    return b.gather(b.input("table", "f32[8, 4]"), b.reduce_sum(b.input("at", "i64[3, 8]"), axes=(1,)), axis=0)


def added(b: Builder) -> Expr:
    return b.input("x", "f32[8, 16]") + b.input("y", "f32[8, 16]")


def folded(b: Builder) -> Expr:
    return b.rearrange(b.input("x", "f32[6]"), pattern="(a=3 b=2) -> a b")


def folded_in_fours(b: Builder) -> Expr:
    return b.rearrange(b.input("x", "f32[8]"), pattern="(a=2 b=4) -> a b")


SOUND = {
    "parts within a unit": laid(folded_in_fours, "[tp]", "[tp] -> [tp:(1)2, tp:(2)2] | a: tp:(1)2, b: tp:(2)2"),
    "rows": laid(product_and_bias, "[tp, -]; [-, -]; [-]", "[tp, -]; [-, -]; [-] -> [tp, -] | ...1: tp"),
    "columns": laid(product_and_bias, "[-, -]; [tp, -]; [tp]", "[-, -]; [tp, -]; [tp] -> [-, tp] | n: tp"),
    "both": laid(product, "[dp, -]; [tp, -]", "[dp, -]; [tp, -] -> [dp, tp] | ...1: dp, n: tp"),
    "pairs": laid(folded, "[dp*2]", "[dp*2] -> [dp, -] | a: dp"),
}
WRONG: dict[str, tuple[ShardingPlan, str]] = {
    "an argument that is terms": (
        laid(product, "[-, -] sum(tp); [-, -]", "[-, -] sum(tp); [-, -] -> [-, -] sum(tp)"),
        "argument x is partial",
    ),
    "a result that is terms": (
        laid(product, "[-, tp]; [-, tp]", "[-, tp]; [-, tp] -> [-, -] sum(tp) | k: tp"),
        "result linear is partial",
    ),
    "a result that is not had": (
        laid(product, "[-, -]; [-, -]", "[-, -]; [-, -] -> [-, -]", gives="[tp, -]"),
        r"has no copy with placement \[tp, -\]",
    ),
    "an axis that there is not": (
        laid(product, "[ep, -]; [-, -]", "[ep, -]; [-, -] -> [ep, -] | ...1: tp"),
        "x is split over an axis that is not in the mesh",
    ),
    "a grain that does not divide": (
        laid(product, "[dp*3, -]; [-, -]", "[dp*3, -]; [-, -] -> [dp*3, -] | ...1: dp"),
        "8 is not a multiple of 3",
    ),
    "fewer units than ranks": (
        laid(product, "[tp*4, -]; [-, -]", "[tp*4, -]; [-, -] -> [tp*4, -] | ...1: tp"),
        "x: a rank has no part of 8",
    ),
    "one operand in parts": (
        laid(added, "[tp, -]; [-, -]", "[tp, -]; [-, -] -> [tp, -] | ...2: tp"),
        r"rank 0 has different parts of \S+ in y",
    ),
    "a part between pairs": (laid(folded, "[dp]", "[dp] -> [dp, -]"), "a part cuts through factor a"),
    "a sum that is said to be whole": (
        laid(product, "[-, tp]; [-, tp]", "[-, tp]; [-, tp] -> [-, -] | k: tp"),
        "a partial result along tp is marked as whole",
    ),
    "a bias that every rank adds": (
        laid(product_and_bias, "[-, tp]; [-, tp]; [-]", "[-, tp]; [-, tp]; [-] -> [-, -] sum(tp) | k: tp"),
        "the value that is added to the sum over k is not added exactly once",
    ),
    "a maximum that is said to be a sum": (
        laid(largest, "[-, tp]", "[-, tp] -> [-] sum(tp) | a1: tp"),
        r"partial values \(max\) are marked as sum",
    ),
    "a curve of terms": (
        laid(lambda b: b.tanh(summed(b)), "[-, tp]", "[-, tp] -> [-] sum(tp) | a1: tp", "[-] sum(tp) -> [-] sum(tp)"),
        "partial sums along tp pass through operands in which the op is not linear",
    ),
    "a product of terms and terms": (
        laid(
            lambda b: (lambda y: y * y)(summed(b)),
            "[-, tp]",
            "[-, tp] -> [-] sum(tp) | a1: tp",
            "[-] sum(tp); [-] sum(tp) -> [-] sum(tp)",
        ),
        "partial sums along tp pass through operands in which the op is not linear",
    ),
    "a sign of a maximum": (
        laid(lambda b: -largest(b), "[-, tp]", "[-, tp] -> [-] max(tp) | a1: tp", "[-] max(tp) -> [-] max(tp)"),
        "an op reads partial values that are not partial sums",
    ),
    "a look-up at terms": (
        laid(
            looked_up_at_a_sum,
            "[tp, -]; [-, tp]",
            "[-, tp] -> [-] sum(tp) | a1: tp",
            "[tp, -]; [-] sum(tp) -> [-, -] sum(tp) | a: tp",
        ),
        "partial values are read by an op that combines a",
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_inputs_with_the_expected_strides_are_accepted(name: str) -> None:
    check_sharding(SOUND[name])


@pytest.mark.parametrize("name", WRONG)
def test_inputs_with_other_strides_are_refused(name: str) -> None:
    plan, expected = WRONG[name]
    with pytest.raises(PassError, match=expected):
        check_sharding(plan)


# -- moves ---------------------------------------------------------------------------------------------------------


def moved(plan: ShardingPlan, kind: StepKind, over: str, after: str, dim: int | None = None) -> ShardingPlan:
    """Return the plan in which the last result is converted by one step before it is output."""
    last = plan.main.nodes[-1]
    step = PlacementStep(kind, MESH.parts_of(over), last.gives[0], placed(after), dim)
    because = ("said",) if step.sends else ()
    move = Move(last.node.results[0], step.before, step.after, (step,), because, last.node)
    return replace(plan, functions=(replace(plan.main, moves=(move,), gives=(step.after,)),))


SUM = laid(summed, "[-, tp]", "[-, tp] -> [-] sum(tp) | a1: tp")
MAXIMUM = laid(largest, "[-, tp]", "[-, tp] -> [-] max(tp) | a1: tp")
ROWS = laid(product, "[tp, -]; [-, -]", "[tp, -]; [-, -] -> [tp, -] | ...1: tp")
WHOLE = laid(product, "[-, -]; [-, -]", "[-, -]; [-, -] -> [-, -]")
STEPS: dict[str, tuple[ShardingPlan, str | None]] = {
    "a sum, combined": (moved(SUM, StepKind.ALL_REDUCE, "tp", "[-]"), None),
    "a sum, combined and split": (moved(SUM, StepKind.REDUCE_SCATTER, "tp", "[tp]", 0), None),
    "a maximum, combined": (moved(MAXIMUM, StepKind.ALL_REDUCE, "tp", "[-]"), None),
    "a maximum, combined and split": (
        moved(MAXIMUM, StepKind.REDUCE_SCATTER, "tp", "[tp]", 0),
        r"reduce_scatter cannot combine partial values \(max\)",
    ),
    "terms of a maximum as those of a sum": (
        moved(MAXIMUM, StepKind.TAKE, "dp", "[dp] sum(tp)", 0),
        "partial values change from max to sum",
    ),
    "a part as a term": (
        moved(ROWS, StepKind.KEEP_FIRST, "tp", "[-, -] sum(tp)"),
        "is split along an axis over which it becomes partial",
    ),
    "over nothing": (
        moved(WHOLE, StepKind.TAKE, "", "[-, -]"),
        "take a part of .* does not change its partial axes as it must",
    ),
    "parts, gathered": (moved(ROWS, StepKind.ALL_GATHER, "tp", "[-, -]", 0), None),
    "parts, gathered along what is whole": (
        moved(ROWS, StepKind.ALL_GATHER, "tp", "[-, -]", 1),
        "all_gather does not give each of ranks 0 to 3 its part",
    ),
    "parts, gathered over other ranks": (
        moved(ROWS, StepKind.ALL_GATHER, "dp", "[-, -]", 0),
        "all_gather does not give each of ranks 0 to 4 its part",
    ),
    "a part, taken": (moved(WHOLE, StepKind.TAKE, "tp", "[tp, -]", 0), None),
    "a part of another dimension": (
        moved(WHOLE, StepKind.TAKE, "tp", "[-, tp]", 0),
        "take a part does not give each of ranks 0 to 3 its part",
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_gives_ranks_what_it_says(name: str) -> None:
    plan, expected = STEPS[name]
    if expected is None:
        check_sharding(plan)
        return
    with pytest.raises(PassError, match=expected):
        check_sharding(plan)


def test_a_move_begins_where_the_value_lies() -> None:
    plan = moved(ROWS, StepKind.ALL_GATHER, "tp", "[-, -]", 0)
    (move,) = plan.main.moves
    (step,) = move.steps
    for wrong, expected in (
        (replace(move, source=placed("[dp, -]")), r"has no copy with placement \[dp, -\]"),
        (
            replace(move, steps=(replace(step, before=placed("[dp, -]")),)),
            "a step of .* does not start where the step before it ends",
        ),
        (replace(move, target=placed("[dp, -]")), "the steps of .* do not end at its target"),
    ):
        with pytest.raises(PassError, match=expected):
            check_sharding(replace(plan, functions=(replace(plan.main, moves=(wrong,)),)))


# -- functions -----------------------------------------------------------------------------------------------------


def test_a_body_that_was_forgotten_and_made_anew_is_the_same() -> None:
    """The number of remembered bodies is limited. A long process may forget the bodies of a plan before the plan is
    checked.
    """
    plan = shard(recognized("gpt2"), "tp=2", recipe="megatron")
    assert any(node.body is not None for node in plan.functions[-1].nodes)
    composites._bodies.clear()
    check_sharding(plan)


def test_a_plan_holds_the_functions_of_its_graph() -> None:
    plan = shard(recognized("gpt2"), "tp=2", recipe="megatron")
    block, main = plan.functions
    called = next(i for i, node in enumerate(main.nodes) if node.callee is not None)
    opened = next(i for i, node in enumerate(main.nodes) if node.body is not None)

    def with_node(at: int, **changes: Any) -> ShardingPlan:
        nodes = [*main.nodes[:at], replace(main.nodes[at], **changes), *main.nodes[at + 1 :]]
        return replace(plan, functions=(block, replace(main, nodes=tuple(nodes))))

    lies = main.nodes[called].gives[0].text(plan.mesh)
    otherwise = parse_placement("[tp, -, -]" if lies == "[-, -, -]" else "[-, -, -]", plan.mesh)
    for wrong, expected in (
        (replace(plan, functions=(block,)), "the plan belongs to another graph"),
        (replace(plan, graph=clone_graph(plan.graph)), "the graph does not have this function"),
        (
            replace(plan, functions=(block, replace(main, nodes=main.nodes[:-1]))),
            "nodes differ from the nodes of the function",
        ),
        (with_node(called, callee=replace(block)), "it calls another function"),
        (with_node(called, callee=main), "it calls another function"),
        (with_node(called, gives=(otherwise,)), "do not have the placements that the function takes and returns"),
        (with_node(opened, body=block), "its body is not the body of the op"),
    ):
        with pytest.raises(PassError, match=expected):
            check_sharding(wrong)
