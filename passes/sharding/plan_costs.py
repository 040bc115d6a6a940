"""What a plan takes of a device: seconds of work and of collectives, and which of these, or memory, is the limit."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.ir.analysis.cost import node_cost
from treadle.ir.placement.mesh import ways
from treadle.passes.sharding.plan import PlannedCollective, PlannedFunction, ShardingPlan
from treadle.passes.sharding.plan_printing import grouped_collectives


@dataclass(frozen=True)
class StepTime:
    """Seconds of one run of `main`, at least, at the plan's sizes: nothing overlaps.

    work         of the nodes, on one device
    collectives  of the meetings
    longest      the reason that takes the longest of these; None where ranks do not meet
    """

    work: float
    collectives: float
    longest: PlannedCollective | None

    def __str__(self) -> str:
        if self.longest is None:
            return f"{_milliseconds(self.work)} of work, and no collectives"
        each = self.longest
        took = _milliseconds(each.times * each.seconds)
        return (
            f"{_milliseconds(self.work)} of work and {_milliseconds(self.collectives)} of collectives; "
            f"the longest: {each.times} x {each.op} over {each.over}, {each.because}, {took}"
        )


def step_time(plan: ShardingPlan) -> StepTime:
    """How long a run takes at least: of the rooflines of nodes on parts, and of rings."""
    found = grouped_collectives(plan)
    longest = max(found, key=lambda c: c.times * c.seconds, default=None)
    known: dict[str, float] = {}
    for planned in plan.functions:
        known[planned.name] = _work(plan, planned, known)
    return StepTime(known[plan.main.name], sum(c.times * c.seconds for c in found), longest)


def _work(plan: ShardingPlan, planned: PlannedFunction, known: dict[str, float]) -> float:
    """Seconds of one call of a function on one device."""
    total = 0.0
    for node in planned.nodes:
        if node.callee is not None:
            total += known[node.callee.name]
        elif node.body is not None:
            total += _work(plan, node.body, known)
        else:
            cost = node_cost(node.node, plan.sizes)
            parts = ways(part for share in node.shares.values() for part in share.over)
            total += plan.machine.seconds(cost.flops, cost.bytes) / parts
    return total


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
