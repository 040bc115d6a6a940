"""The values of a function while it is planned: in which placements each can be had, and what another one costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from treadle.ir.graph import Node, Value
from treadle.ir.placement.placements import MeshPlacement
from treadle.passes.sharding.conversions import PlacementStep, conversion, is_possible
from treadle.passes.sharding.costs import Costs, HeldArgument
from treadle.passes.sharding.plan import Move
from treadle.passes.sharding.reasons import TermsOrigin, reason_for
from treadle.passes.sharding.wanted import Wanted

GATHERED_WEIGHT = 1e6
"""Seconds that it counts to gather a weight that was asked to be split: no other cost outweighs it."""

Conversion = tuple[Value, MeshPlacement, MeshPlacement, tuple[PlacementStep, ...]]
"""A value, where it lies, where it is to lie, and the steps between."""


class PlacedValues:
    """What is known of the values of one function.

    had      the placements in which each value can be had, in the order in which it got there
    held     how arguments come, and what is made of one weight alone, which is held as it is
    called   of what is made of a weight, and of a body's weights: what the weight is called
    origins  of values that are terms of a sum: who made them so
    """

    def __init__(self, costs: Costs, wanted: Wanted) -> None:
        self.costs, self.wanted = costs, wanted
        self.had: dict[Value, list[MeshPlacement]] = {}
        self.held: dict[Value, HeldArgument] = {}
        self.called: dict[Value, str] = {}
        self.origins: dict[Value, TermsOrigin] = {}

    def versions(self, value: Value) -> list[MeshPlacement]:
        """The placements in which a value can be had; a constant is everywhere whole."""
        return self.had.setdefault(value, [MeshPlacement.whole(value.type.rank)])

    def conversion_to(self, value: Value, target: MeshPlacement) -> Conversion:
        """The cheapest way to a placement."""
        found: list[tuple[float, int, MeshPlacement, tuple[PlacementStep, ...]]] = []
        for source in self.versions(value):
            steps = conversion(value.type.shape, source, target)
            cost = self.steps_cost(value, steps) if is_possible(value.type, steps) else float("inf")
            found.append((cost, len(found), source, steps))
        _, _, source, steps = min(found, key=lambda f: f[:2])
        return value, source, target, steps

    def steps_cost(self, value: Value, steps: Sequence[PlacementStep]) -> float:
        cost = self.costs.seconds(value.type, steps)
        held = self.held.get(value)
        if held is not None and held.is_weight:
            gathered = [s for s in steps if s.sends and not set(s.over) <= set(held.stored)]
            cost += GATHERED_WEIGHT * len(gathered)
        return cost

    def combined(self, value: Value) -> MeshPlacement:
        """Where terms of a sum go when they must be combined: split as wished, or whole."""
        now = self.versions(value)[0]
        targets = [MeshPlacement(now.dims)]
        for wish in self.wanted.of(value):
            if now.dims[wish.dim] is None and not set(wish.split.over).intersection(MeshPlacement(now.dims).used):
                targets.append(MeshPlacement((*now.dims[: wish.dim], wish.split, *now.dims[wish.dim + 1 :])))
        costs = [self.steps_cost(value, self.conversion_to(value, t)[3]) for t in targets]
        return targets[costs.index(min(costs))]

    def moved(self, wanted: Sequence[Conversion], reader: Node) -> Iterator[Move]:
        """Do conversions: each is said once, and what it gives can be had from then on."""
        for value, source, target, steps in wanted:
            if target in self.versions(value):
                continue
            self.versions(value).append(target)
            reasons, at = [], reader
            for step in steps:
                if step.sends:
                    origin = self.origins.get(value)
                    because, at = reason_for(step, value, reader, origin, self.wanted, self.held, self.called)
                    reasons.append(because)
            yield Move(value, source, target, steps, tuple(reasons), at)

    def weight_of(self, node: Node) -> Value | None:
        """The weight that a node reads and nothing else."""
        held = self.held.get(node.inputs[0]) if len(node.inputs) == 1 else None
        return node.inputs[0] if held is not None and held.is_weight else None

    def is_narrowing(self, node: Node) -> bool:
        """Whether a node makes fewer bytes of one weight, so that it does that with parts before they are gathered."""
        weight = self.weight_of(node)
        made = sum(v.type.bytes_at(self.costs.sizes) for v in node.results)
        return weight is not None and made < weight.type.bytes_at(self.costs.sizes)

    def to_come(self, value: Value, placed: MeshPlacement) -> float:
        """What it will cost to combine terms."""
        if not placed.partial:
            return 0.0
        steps = conversion(value.type.shape, placed, MeshPlacement(placed.dims))
        return self.costs.seconds(value.type, steps)
