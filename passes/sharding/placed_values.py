"""The values of a function during planning: the placements in which each value is available, and the costs of other
placements.
"""

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
"""Cost in seconds of gathering a weight that the user requested to be split. It outweighs every other cost."""

Conversion = tuple[Value, MeshPlacement, MeshPlacement, tuple[PlacementStep, ...]]
"""A value, its placement, its new placement, and the steps between them."""


class PlacedValues:
    """The state of the values of one function.

    had      the placements in which each value is available, in the order in which they became available
    held     the placements of arguments, and of values derived from one weight, which keep the weight's placement
    called   for values derived from a weight, and for weights of a body: the weight's name
    origins  for partial values: the nodes that made them partial
    """

    def __init__(self, costs: Costs, wanted: Wanted) -> None:
        self.costs, self.wanted = costs, wanted
        self.had: dict[Value, list[MeshPlacement]] = {}
        self.held: dict[Value, HeldArgument] = {}
        self.called: dict[Value, str] = {}
        self.origins: dict[Value, TermsOrigin] = {}

    def versions(self, value: Value) -> list[MeshPlacement]:
        """Return the placements in which a value is available. A constant is available as a whole on every rank."""
        return self.had.setdefault(value, [MeshPlacement.whole(value.type.rank)])

    def conversion_to(self, value: Value, target: MeshPlacement) -> Conversion:
        """Return the cheapest conversion to a placement."""
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
        """Return the placement in which a partial value is combined at the least cost: split as requested, or whole."""
        now = self.versions(value)[0]
        targets = [MeshPlacement(now.dims)]
        for wish in self.wanted.of(value):
            if now.dims[wish.dim] is None and not set(wish.split.over).intersection(MeshPlacement(now.dims).used):
                targets.append(MeshPlacement((*now.dims[: wish.dim], wish.split, *now.dims[wish.dim + 1 :])))
        costs = [self.steps_cost(value, self.conversion_to(value, t)[3]) for t in targets]
        return targets[costs.index(min(costs))]

    def moved(self, wanted: Sequence[Conversion], reader: Node) -> Iterator[Move]:
        """Yield the moves for conversions. Each move is yielded once, since its target is available from then on."""
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
        """Return the weight that a node reads, if the node has no other input."""
        held = self.held.get(node.inputs[0]) if len(node.inputs) == 1 else None
        return node.inputs[0] if held is not None and held.is_weight else None

    def is_narrowing(self, node: Node) -> bool:
        """Return True if a node makes a weight smaller. Such a node runs on parts before they are gathered."""
        weight = self.weight_of(node)
        made = sum(v.type.bytes_at(self.costs.sizes) for v in node.results)
        return weight is not None and made < weight.type.bytes_at(self.costs.sizes)

    def to_come(self, value: Value, placed: MeshPlacement) -> float:
        """Return the cost in seconds of combining a partial value later."""
        if not placed.partial:
            return 0.0
        steps = conversion(value.type.shape, placed, MeshPlacement(placed.dims))
        return self.costs.seconds(value.type, steps)
