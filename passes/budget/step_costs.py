"""The time of steps on a target, whole or in parts: from their operations, and the bytes that they read and write.

A step in n parts reads values that all parts share (weights, keys) n times, and split values once. Only the last node
of a step writes its result to memory. Memory access does not overlap with computation: a product of 16 rows with [768,
3072] takes a third longer per row than a product of 1,024 rows, as the sum of both times predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from treadle.ir.analysis.cost import Cost, node_cost
from treadle.ir.axes import Role
from treadle.ir.graph import Node, Value
from treadle.ir.target import Target
from treadle.passes.memory.storage_plan import FunctionPlan, How, Step

CALL = 2e-6
"""Approximate time of a kernel call in seconds."""


@dataclass(frozen=True, eq=False)
class StepCost:
    """The cost of one step.

    flops    floating-point operations of the step
    touched  the number of bytes of each value that the step reads or writes
    """

    flops: int
    touched: Mapping[Value, int]

    def seconds(self, target: Target, parts: int = 1, cut: Mapping[Value, int] | None = None) -> float:
        """Return the time of the step in seconds, computed in `parts` parts.

        cut  the values that are split; None: all but weights
        """
        if not self.touched:
            return 0.0
        whole = sum(n for v, n in self.touched.items() if (v.kind == "parameter" if cut is None else v not in cut))
        rest = sum(self.touched.values()) - whole
        return target.seconds(self.flops, 0) + target.seconds(0, parts * whole + rest) + parts * CALL


def step_cost(step: Step, plan: FunctionPlan, sizes: Mapping[str, int]) -> StepCost:
    """Return the cost of a step that is not a call. It is zero for a view, or if the result is in place already."""
    if not any(plan.places[v].is_written for v in step.root.results):
        return StepCost(0, {})
    total = sum((node_cost(node, sizes) for node in step.nodes), Cost())
    there = {v for v in step.inputs if plan.places[v].how is How.INTO and plan.places[v].of in step.root.results}
    if there and there == {*step.inputs}:
        return StepCost(0, {})
    written = {v: v.type.bytes_at(sizes) for v in step.root.results}
    most = sum(written.values())
    looked_up = {v for node in step.nodes for v in _looked_up(node)}
    read = {v: v.type.bytes_at(sizes) for v in step.inputs}
    return StepCost(total.flops, {v: min(n, most) if v in looked_up else n for v, n in read.items()} | written)


def _looked_up(node: Node) -> list[Value]:
    """Return the operands of a node that are read at indices."""
    application = node.op.apply([None if v is None else v.type for v in node.operands])
    return [
        v
        for v, dims in zip(node.operands, application.operands, strict=True)
        if v is not None
        and dims is not None
        and any(application.factors[n].role is Role.INDEXED for dim in dims for n in dim.factors)
    ]
