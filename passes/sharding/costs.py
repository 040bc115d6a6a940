"""Costs of plans in seconds, and the placements of a planned function's arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treadle.ir.analysis.cost import node_cost
from treadle.ir.graph import Node
from treadle.ir.hardware import Hardware
from treadle.ir.placement.mesh import Mesh, SubAxes, ways
from treadle.ir.placement.placements import MeshPlacement
from treadle.ir.types import Type
from treadle.passes.sharding.conversions import PlacementStep, seconds_of, seconds_to_pass
from treadle.passes.sharding.plan import Move, PlannedFunction, PlannedNode


@dataclass(frozen=True)
class HeldArgument:
    """An argument of a function, with its placement.

    placement  the placement
    stored     the parts of mesh axes over which the argument is stored in parts and gathered for use
    is_weight  True for a weight, which keeps its placement along all other mesh axes
    """

    placement: MeshPlacement
    stored: SubAxes = ()
    is_weight: bool = False


class Costs:
    """Costs in seconds, at a plan's sizes and on its machine."""

    def __init__(self, mesh: Mesh, machine: Hardware, sizes: Mapping[str, int]) -> None:
        self.mesh, self.machine, self.sizes = mesh, machine, sizes

    def of(self, planned: PlannedFunction) -> float:
        """Return the time of one call in seconds: work and moves."""
        return sum(map(self.step, planned.steps))

    def step(self, step: Move | PlannedNode) -> float:
        """Return the time of one step of a function in seconds."""
        if isinstance(step, Move):
            return self.seconds(step.value.type, step.steps)
        inner = step.callee or step.body
        if inner is not None:
            total = self.of(inner)
        else:
            total = self.work(step.node) / ways({p for s in step.shares.values() for p in s.over})
        return total + (self.ring(step.node, step.reads, step.ring) if step.ring else 0.0)

    def work(self, node: Node) -> float:
        """Return the time in seconds that a node takes on one device."""
        cost = node_cost(node, self.sizes)
        return self.machine.seconds(cost.flops, cost.bytes)

    def ring(self, node: Node, reads: Sequence[MeshPlacement | None], over: SubAxes) -> float:
        """Return the time in seconds of sending keys and values in ring attention, without overlap."""
        found = 0.0
        for value, placed in zip(node.operands[1:3], reads[1:3], strict=True):
            if value is not None and placed is not None:
                once = seconds_to_pass(value.type, placed, self.sizes, over, self.mesh, self.machine)
                found += (ways(over) - 1) * once
        return found

    def seconds(self, type: Type, steps: Sequence[PlacementStep]) -> float:
        """Return the time of steps in seconds."""
        return sum(seconds_of(type, step, self.sizes, self.mesh, self.machine) for step in steps)
