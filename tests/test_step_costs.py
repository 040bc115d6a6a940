"""Costs of steps that are computed in parts, compared with costs computed by hand; and the runs of nodes that can be
computed in parts.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph, Value
from treadle.ir.sizing.sizes import Size
from treadle.ir.target import Target
from treadle.ir.types import f32
from treadle.passes.budget.parts import cuts, part_type
from treadle.passes.budget.regions import find_region
from treadle.passes.budget.step_costs import StepCost, step_cost
from treadle.passes.framework.manager import PassManager
from treadle.passes.memory.plan_storage import PlanStorage
from treadle.passes.memory.storage_plan import FunctionPlan

SIZES = {"S": 16, "B": 4}


def test_each_part_reads_weights_again_and_calls_a_kernel() -> None:
    x, w = Value("input", f32[8], "x"), Value("parameter", f32[8], "w")
    cost, cpu = StepCost(60_000, {x: 2_000, w: 4_000}), Target("cpu", 1)
    assert cost.seconds(cpu) == pytest.approx(1e-6 + 0.3e-6 + 2e-6)
    assert cost.seconds(cpu, 3) == pytest.approx(1e-6 + 0.7e-6 + 6e-6), "the weight three times"
    assert cost.seconds(cpu, 3, {w: 0}) == pytest.approx(1e-6 + 0.5e-6 + 6e-6), "what is cut once"
    assert cost.seconds(cpu, 3, {}) == pytest.approx(1e-6 + 0.9e-6 + 6e-6)
    assert StepCost(60_000, {}).seconds(cpu, 3) == 0.0


def planned(b: Builder, *outputs: Expr) -> FunctionPlan:
    b.outputs(**{f"y{n}": y for n, y in enumerate(outputs)})
    found = PassManager((PlanStorage(strided=True),)).run(b.graph).plan
    assert found is not None
    return found.functions["main"]


def costs(plan: FunctionPlan) -> dict[str, tuple[int, int]]:
    found = [(step.root.op.name, step_cost(step, plan, SIZES)) for step in plan.steps]
    return {name: (cost.flops, sum(cost.touched.values())) for name, cost in found}


def test_a_step_costs_its_operations_and_what_it_reads_and_writes() -> None:
    b = Builder(Graph("g"))
    x, table, i = b.input("x", "f32[S, 8]"), b.parameter("t", "f32[1000, 8]"), b.input("i", "i64[B]")
    turned = b.rearrange(x, pattern="s d -> d s")
    joined = b.concat(b.exp(x), b.tanh(x), axis=1)
    found = costs(planned(b, b.reduce_sum(turned, axes=(1,)), b.softmax(joined), b.gather(table, i, axis=0)))
    assert found == {
        "rearrange": (0, 0),  # a view
        "exp": (128, 2 * 512),
        "tanh": (128, 2 * 512),
        "concat": (0, 0),  # of stored values
        "reduce_sum": (128, 512 + 32),
        "softmax": (5 * 256, 2 * 1024),
        "gather": (0, 2 * 128 + 32),  # only the written rows of the table
    }


def test_parts_of_an_axis_differ_by_one_element() -> None:
    size = Size.symbol("S")
    for count in (2, 3, 7):
        ends = [edge.evaluate({"S": 23}) for edge in cuts(size, count)]
        lengths = [b - a for a, b in pairwise(ends)]
        assert (ends[0], ends[-1], len(lengths)) == (0, 23, count)
        assert {*lengths} == {23 // count, 23 // count + 1}
    kept = f32["B (heads=2 4)"]
    assert part_type(kept, 0, size).text == "f32[S, (heads=2 4)]"
    assert part_type(f32["heads=B 4"], 0, size).text == "f32[heads=S, 4]"
    assert part_type(kept, None, size) is kept


def test_which_nodes_are_a_region() -> None:
    b = Builder(Graph("g"))
    x, w = b.input("x", "f32[B, S, 8]"), b.parameter("w", "f32[8, 8]")
    y = b.linear(x, w)
    merged = b.rearrange(y, pattern="b s d -> (b s) d")
    b.outputs(z=b.exp(merged), m=b.reduce_max(x, axes=(0,)))
    graph, (linear, rearrange, exp, most) = b.graph, b.function.nodes
    for nodes, dim, found in (
        ([linear], 0, True),
        ([linear], 1, True),
        ([linear], 2, False),  # the weight would be sliced
        ([linear], 3, False),  # there is no such axis
        ([linear, rearrange], 0, False),  # b is a part of the axis
        ([exp], 0, False),  # b and s in one dimension
        ([exp], 1, True),
        ([most], 0, True),  # s of the result
        ([most], 1, True),
    ):
        region = find_region(graph, graph.main, nodes, dim)
        assert (region is not None) == found, (nodes, dim)
    region = find_region(graph, graph.main, [linear], 1)
    assert region is not None and region.size == Size.symbol("S")
    assert {value.name: at for value, at in region.dims.items()} == {"x": 1, "linear": 1}
    assert [v.name for v in region.inputs] == ["x", "w"] and [v.name for v in region.outputs] == ["linear"]
