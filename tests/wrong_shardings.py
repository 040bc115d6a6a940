"""Plans that are wrong in one place, for tests of the plan checker and of the lab."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from treadle.ir.placement.mesh import SubAxes
from treadle.passes.sharding.conversions import PlacementStep, StepKind
from treadle.passes.sharding.plan import Move, PlannedFunction, PlannedNode, ShardingPlan

Change = Callable[[Move], Move | None]


def without_terms(move: Move) -> Move | None:
    """Omit the collective: partial sums are declared as reduced."""
    return _when(move, StepKind.ALL_REDUCE, lambda step: ())


def along_another_axis(over: SubAxes) -> Change:
    """Let ranks communicate along another mesh axis."""
    return lambda move: _when(move, StepKind.ALL_REDUCE, lambda step: (replace(step, over=over),))


def by_another_monoid(move: Move) -> Move | None:
    """Combine partial results by their maximum instead of their sum."""
    if any(step.before.partial and step.before.monoid != "sum" for step in move.steps):
        return None
    return _when(move, StepKind.ALL_REDUCE, lambda step: (replace(step, before=replace(step.before, monoid="max")),))


def added_everywhere(move: Move) -> Move | None:
    """Let every rank add a bias."""
    return _when(move, StepKind.KEEP_FIRST, lambda step: ())


def not_gathered(move: Move) -> Move | None:
    """Treat a part as the whole value."""
    return _when(move, StepKind.ALL_GATHER, lambda step: ())


def gathered_along_another_dimension(move: Move) -> Move | None:
    """Concatenate parts of one dimension along another dimension."""
    return _when(move, StepKind.ALL_GATHER, lambda step: (replace(step, dim=0 if step.dim else 1),))


def scattered_without_a_sum(move: Move) -> Move | None:
    """Let each rank keep its part of its own partial sum."""
    return _when(move, StepKind.REDUCE_SCATTER, lambda step: (replace(step, kind=StepKind.TAKE),))


def _when(move: Move, kind: StepKind, by: Callable[[PlacementStep], tuple[PlacementStep, ...]]) -> Move | None:
    """Return the move in which `steps` replace the first step of a kind, or None if it has no such step."""
    at = next((i for i, step in enumerate(move.steps) if step.kind is kind), None)
    if at is None:
        return None
    steps = (*move.steps[:at], *by(move.steps[at]), *move.steps[at + 1 :])
    return replace(move, steps=steps, because=move.because[: sum(step.sends for step in steps)])


def wrong_plans(plan: ShardingPlan, change: Change) -> Iterator[ShardingPlan]:
    """Yield wrong plans: for each move to which a change applies, the plan with that move changed."""
    count = 0
    while True:
        made = _Rebuilding(change, count).plan(plan)
        if made is None:
            return
        yield made
        count += 1


class _Rebuilding:
    """A copy of a plan in which one move, given by its number, is changed."""

    def __init__(self, change: Change, number: int) -> None:
        self.change, self.left, self.done = change, number, False
        self.known: dict[str, PlannedFunction] = {}

    def plan(self, plan: ShardingPlan) -> ShardingPlan | None:
        for planned in plan.functions:
            self.known[planned.name] = self.function(planned)
        return replace(plan, functions=tuple(self.known.values())) if self.done else None

    def function(self, planned: PlannedFunction) -> PlannedFunction:
        nodes = tuple([self.node(node) for node in planned.nodes])
        return replace(planned, nodes=nodes, moves=self.moves(planned.moves))

    def node(self, node: PlannedNode) -> PlannedNode:
        moves = self.moves(node.moves)
        body = None if node.body is None else self.function(node.body)
        callee = None if node.callee is None else self.known[node.callee.name]
        return replace(node, moves=moves, body=body, callee=callee)

    def moves(self, moves: Sequence[Move]) -> tuple[Move, ...]:
        return tuple([self.move(move) for move in moves])

    def move(self, move: Move) -> Move:
        changed = None if self.done else self.change(move)
        if changed is None:
            return move
        self.left -= 1
        self.done = self.left < 0
        return changed if self.done else move


def changed_node(plan: ShardingPlan, function: int, at: int, **changes: Any) -> ShardingPlan:
    """Return a plan in which one node of a function without calls is replaced."""
    functions = list(plan.functions)
    nodes = list(functions[function].nodes)
    nodes[at] = replace(nodes[at], **changes)
    functions[function] = replace(functions[function], nodes=tuple(nodes))
    return replace(plan, functions=tuple(functions))
