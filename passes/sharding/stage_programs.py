"""The program of a rank of a pipeline: the steps of its stage, for one micro-batch after another.

    x = hand_on(expand(0.0, ...), over="pp", ways=4, source=0, target=1, ...)     # of the rank before
    x = h(x, ...)
    y = hand_on(x, over="pp", ways=4, source=1, target=2, ...)                    # to the rank after

Scopes contain the number of the micro-batch: `micro.3.h.0.attn`. There is one function for each size of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from treadle.ir.analysis.axis_tracing import joined_scope
from treadle.ir.builder import Expr
from treadle.ir.graph import Function, Graph, Node
from treadle.ir.hashing import function_key
from treadle.ir.ops.collectives import HandOn
from treadle.ir.ops.shapes import zeros
from treadle.ir.placement.mesh import ways
from treadle.passes.sharding.plan import Item, PlannedFunction, PlannedPipeline, ShardingPlan, hand_on_reason
from treadle.passes.sharding.rank_building import RankProgram
from treadle.passes.sharding.stages import TURNS


class StageProgram(RankProgram):
    """A builder of `main` for a rank of a pipeline.

    turn  the index of the current micro-batch; -1 for steps that are not part of a micro-batch
    """

    def __init__(self, plan: ShardingPlan, rank: int, graph: Graph) -> None:
        super().__init__(plan, rank, graph, graph.main, {})
        assert plan.pipeline is not None
        self.pipeline: PlannedPipeline = plan.pipeline
        self.device, self.turn = rank, -1
        self.made: dict[tuple[str, int], Function] = {}
        self.keys: dict[tuple[str, str], Function] = {}

    def build(self, planned: PlannedFunction) -> None:
        plan, number = self.plan, self.plan.stage_at(self.device)
        stage = self.pipeline.stages[number]
        after = self.pipeline.stages[number + 1 : number + 2]
        arguments = self.declared(planned, set(stage.weights))
        steps = planned.steps
        given: dict[str, list[Expr]] = {name: [] for name in stage.outputs}
        kept: dict[Item, Expr] = dict(arguments)
        for turn in range(ways(plan.turns)):
            # A micro-batch is placed as if it were on a separate copy of the mesh: `turn` is the index of the copy.
            self.rank = self.device + turn * plan.devices.ranks
            self.exprs = dict(kept)
            for item in stage.receives:
                if self.is_next(turn, [item]):
                    self.exprs[item] = self.handed(item, number, None)
            for step in (steps[at] for at in stage.steps):
                if self.is_next(turn, [*step.needs, *step.makes]):
                    self.step(step)
            for item in after[0].receives if after else ():
                if self.is_next(turn, [item]):
                    self.handed(item, number + 1, self.read(*item))
            if turn == 0:
                kept = {item: x for item, x in self.exprs.items() if plan.times_of([item]) == 1}
            outputs = zip(planned.function.outputs.items(), planned.gives, strict=True)
            for (name, value), placed in outputs:
                if name in given and (turn == 0 or plan.times_of([(value, placed)]) > 1):
                    given[name].append(self.read(value, placed))
        self.b.function.outputs = {
            name: self.joined(given[name], at).value
            for at, name in enumerate(planned.function.outputs)
            if name in given
        }

    def is_next(self, turn: int, items: list[Item]) -> bool:
        """Return True if a step with these items runs in this turn. If so, set the builder's turn."""
        repeated = self.plan.times_of(items) > 1
        self.turn = turn if repeated else -1
        return repeated or turn == 0

    def declared(self, planned: PlannedFunction, weights: set[str]) -> dict[Item, Expr]:
        """Declare all inputs, and the weights of the stage. Return them by item."""
        inputs = set(planned.function.inputs)
        found: dict[Item, Expr] = {}
        for value, placed in zip(planned.function.arguments, planned.takes, strict=True):
            if value in inputs:
                found[value, placed] = self.b.input(value.name, value.type)
            elif value.name in weights:
                found[value, placed] = self.b.parameter(value.name, self.local(value.type, placed))
        return found

    def handed(self, item: Item, number: int, x: Expr | None) -> Expr:
        """Send an item to a stage from the previous stage, and return it. This rank is the sender or the receiver."""
        value, placed = item
        line = self.pipeline.over, len(self.pipeline.stages)
        met: dict[str, Any] = {"over": line[0], "ways": line[1], "because": hand_on_reason(number)}
        with self.placed_as(value.node):
            brought = zeros(self.b, self.local(value.type, placed)) if x is None else x
            made: Expr = self.b.apply(HandOn.name, brought, **met, source=number - 1, target=number, name=value.name)
        return made

    def joined(self, parts: list[Expr], at: int) -> Expr:
        """Return an output of all micro-batches, joined along the dimension that they split."""
        split = self.plan.main.gives[at].dims
        turns = set(self.plan.turns)
        axis = next((d for d, s in enumerate(split) if s is not None and turns.intersection(s.over)), None)
        if axis is None or len(parts) == 1:
            return parts[0]
        value, self.turn = list(self.plan.graph.main.outputs.values())[at], -1
        with self.placed_as(value.node):
            made: Expr = self.b.concat(*parts, axis=axis, name=value.name)
        return made

    def callee(self, planned: PlannedFunction) -> Function:
        """Return the function for this micro-batch. If a function for this size exists, return that function."""
        turn = max(self.turn, 0)
        found = self.made.get((planned.name, turn))
        if found is None:
            function = Function(planned.name if turn == 0 else f"{planned.name}_{TURNS}{turn}")
            inner = _Called(self, function)
            inner.build(planned)
            key = planned.name, function_key(function)
            found = self.keys.get(key)
            if found is None:
                found = self.keys[key] = function
                self.b.graph.add_function(function)
            self.made[planned.name, turn] = found
        return found

    @contextmanager
    def placed_as(self, node: Node | None) -> Iterator[None]:
        if self.inside or node is None:
            yield
            return
        with self.b.placed_as(node):
            self.b.scope = node.scope if self.turn < 0 else joined_scope(f"{TURNS}.{self.turn}", node.scope)
            yield


class _Called(RankProgram):
    """A function that `main` calls for a micro-batch."""

    def __init__(self, main: StageProgram, function: Function) -> None:
        super().__init__(main.plan, main.rank, main.b.graph, function, {})
        self.main = main

    def callee(self, planned: PlannedFunction) -> Function:
        return self.main.callee(planned)
