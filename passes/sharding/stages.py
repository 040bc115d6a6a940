"""Cut `main` into the stages of a pipeline, each on its own ranks (GPipe, Huang et al. 2019).

    plan = cut_in_stages(plan, "pp")     # of a plan whose batch is split over micro-batches, the last axis of its mesh

Stages are cut between nodes of `main` to minimize the time of the slowest stage. A stage's time is the time that it
computes for a micro-batch, by the costs of the planner, or the time in which it sends the values that the next stage
needs, whichever is longer. Among the cuts with the minimal time, the one that sends the least is selected. Both minima
are exact, by dynamic programming over the nodes.

Values derived from inputs alone, or from one stage's weights alone, are recomputed where they are needed. No stage
sends them, their cost is not counted, and they belong to no stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import inf

from treadle.ir.errors import PassError
from treadle.ir.placement.mesh import SubAxis
from treadle.ir.placement.placements import MeshPlacement, Split
from treadle.passes.sharding.conversions import seconds_to_pass
from treadle.passes.sharding.costs import Costs
from treadle.passes.sharding.plan import Item, Move, PlannedFunction, PlannedNode, PlannedPipeline, ShardingPlan, Stage
from treadle.passes.sharding.whole_outputs import with_outputs_in

TURNS = "micro"
"""The name of the mesh axis of micro-batches."""


def cut_in_stages(plan: ShardingPlan, over: str) -> ShardingPlan:
    """Return the plan with a pipeline over a mesh axis. The last axis of the plan's mesh is the axis of micro-batches.

    Raises PassError if micro-batches would need a collective, and if there are fewer nodes than stages.
    """
    pipeline = PlannedPipeline(over, TURNS, ())
    turns_last = partial(_with_turns_last, set(plan.mesh.parts_of(TURNS)))
    plan = with_outputs_in(plan, turns_last, "has its micro-batches in order")
    staged = replace(plan, pipeline=pipeline)
    _refuse_collectives(staged, pipeline)
    line = _Line(staged)
    count = dict(plan.mesh.axes)[over]
    if len(line.groups) < count:
        raise PassError(
            f"{len(line.groups)} steps cannot be cut into {count} stages",
            received=f"{plan.graph.name} over {plan.mesh}",
            hint=f"{over}={max(len(line.groups), 1)}",
        )
    ends = balanced_cut(line.seconds, line.handing, count)
    stages = [line.stage(first, last) for first, last in zip((0, *ends[:-1]), ends, strict=True)]
    return replace(plan, pipeline=replace(pipeline, stages=tuple(stages)))


def _with_turns_last(turns: set[SubAxis], placed: MeshPlacement) -> MeshPlacement:
    """Return the placement without the parts of the mesh that split a dimension inside a micro-batch.

    Each rank then has one range of positions of each dimension, in the order of its micro-batches.
    """
    dims: list[Split | None] = []
    for split in placed.dims:
        last = max((at for at, part in enumerate(split.over) if part in turns), default=None) if split else None
        dims.append(split if split is None or last is None else Split(split.over[: last + 1], split.grain))
    return MeshPlacement(tuple(dims), placed.partial, placed.monoid)


def _refuse_collectives(plan: ShardingPlan, pipeline: PlannedPipeline) -> None:
    """Raise PassError if a value is split over stages, or micro-batches need a collective."""
    turns, line = set(plan.turns), set(plan.mesh.parts_of(pipeline.over))

    def look(planned: PlannedFunction) -> None:
        for step in planned.steps:
            if isinstance(step, Move):
                reasons = iter(step.because)
                for each in step.steps:
                    because = next(reasons) if each.sends else ""
                    if each.sends and turns.intersection(each.over):
                        raise _needs_rows(because, step.at)
            elif turns.intersection(step.ring):
                raise _needs_rows(f"{step.node.op.name} needs all keys", step)
            if any(line.intersection(placed.used) for _, placed in (*step.needs, *step.makes)):
                raise PassError(f"values are split over {pipeline.over}, the axis of stages", hint="another mesh axis")
            if isinstance(step, PlannedNode) and step.body is not None:
                look(step.body)

    for planned in plan.functions:
        look(planned)


def _needs_rows(because: str, at: object) -> PassError:
    node = at.node if isinstance(at, PlannedNode) else at
    source, scope = getattr(node, "source", None), getattr(node, "scope", "")
    return PassError(
        f"micro-batches cannot be computed separately: {because}",
        received=scope or None,
        source=str(source or "") or None,
        hint="a recipe without stages: megatron, dp, fsdp",
    )


class _Line:
    """The steps of `main` that belong to one stage alone, grouped by node.

    groups   for each such node, the indices of its steps
    seconds  the time of each group for a micro-batch, in seconds
    handing  the time to send the values that are needed after a group, for each group but the last
    """

    def __init__(self, plan: ShardingPlan) -> None:
        self.plan, self.main = plan, plan.main
        self.steps = self.main.steps
        self.maker: dict[Item, int] = {item: at for at, step in enumerate(self.steps) for item in step.makes}
        arguments = zip(self.main.function.arguments, self.main.takes, strict=True)
        self.inputs = set(self.main.function.inputs)
        self.weights = {(v, p): v.name for v, p in arguments if v not in self.inputs}
        self.free = self._free()
        self.groups = list(self._groups())
        costs = Costs(plan.mesh, plan.machine, plan.sizes)
        self.seconds = [sum(costs.step(self.steps[at]) for at in group) for group in self.groups]
        self.crossing = [self._needed_after(number + 1) for number in range(len(self.groups) - 1)]
        over = plan.mesh.parts_of(plan.pipeline.over) if plan.pipeline is not None else ()
        self.handing = [
            sum(seconds_to_pass(v.type, p, plan.sizes, over, plan.mesh, plan.machine) for v, p in items)
            for items in self.crossing
        ]

    def _free(self) -> set[int]:
        """Return the steps that every stage may run itself: steps that read only inputs and constants, or only weights
        and constants, and are not calls.
        """
        kinds: dict[Item, str] = dict.fromkeys(self.weights, "weights")
        found: set[int] = set()
        for at, step in enumerate(self.steps):
            is_call = isinstance(step, PlannedNode) and step.callee is not None
            of = {"inputs" if v in self.inputs else kinds.get((v, p), "") for v, p in step.needs} - {"constants"}
            if not is_call and of in (set(), {"inputs"}, {"weights"}):
                found.add(at)
                kinds.update(dict.fromkeys(step.makes, next(iter(of), "constants")))
        return found

    def _groups(self) -> Iterator[list[int]]:
        """Yield the steps of each node that is not free. Steps after the last node belong to the last group."""
        group: list[int] = []
        groups: list[list[int]] = []
        for at, step in enumerate(self.steps):
            if at not in self.free:
                group.append(at)
                if isinstance(step, PlannedNode):
                    groups.append(group)
                    group = []
        if groups:
            groups[-1] += group
        yield from groups

    def _needed_after(self, number: int) -> list[Item]:
        """Return the items of earlier groups that the groups from this one on need, in the order in which they are
        produced.
        """
        before = {at for group in self.groups[:number] for at in group}
        needed = {item for group in self.groups[number:] for at in group for item in self.steps[at].needs}
        made = [(self.maker[item], item) for item in needed if self.maker.get(item) in before]
        return [item for _, item in sorted(made, key=lambda each: (each[0], self._place(each)))]

    def _place(self, made: tuple[int, Item]) -> int:
        return self.steps[made[0]].makes.index(made[1])

    def stage(self, first: int, last: int) -> Stage:
        """Return the stage with the groups from `first` up to `last`, and the free steps that it needs."""
        own = {at for group in self.groups[first:last] for at in group}
        outputs = []
        for (name, value), placed in zip(self.main.function.outputs.items(), self.main.gives, strict=True):
            at = self.maker.get((value, placed))
            if at in own or (first == 0 and (at is None or at in self.free)):
                outputs.append(name)
                own |= set() if at is None else {at}
        waiting = sorted(own)
        while waiting:  # find the free steps that these steps need
            for item in self.steps[waiting.pop()].needs:
                at = self.maker.get(item)
                if at in self.free and at not in own:
                    own.add(at)
                    waiting.append(at)
        read = {self.weights[item] for at in own for item in self.steps[at].needs if item in self.weights}
        given = zip(self.main.function.outputs.items(), self.main.gives, strict=True)
        read |= {self.weights[v, p] for (name, v), p in given if name in outputs and (v, p) in self.weights}
        receives = tuple(self.crossing[first - 1]) if first else ()
        weights = tuple(name for name in self.plan.weights if name in read)
        return Stage(tuple(sorted(own)), receives, weights, tuple(outputs))


def balanced_cut(seconds: Sequence[float], handing: Sequence[float], count: int) -> tuple[int, ...]:
    """Return the end of each of `count` stages. No stage is empty, and the slowest stage is as fast as possible.

    handing  the time to send the values that are needed after each step but the last, while the stage computes

    Among the cuts with the same slowest time, a cut that sends the least is selected. Raises PassError if there are
    fewer steps than stages.
    """
    if not 0 < count <= len(seconds):
        raise PassError(f"{len(seconds)} steps cannot be cut into {count} stages")
    slowest, _ = _best(seconds, handing, count, inf)
    return _best(seconds, handing, count, slowest * (1 + 1e-9))[1]


def _best(
    seconds: Sequence[float], handing: Sequence[float], count: int, limit: float
) -> tuple[float, tuple[int, ...]]:
    """Return the least time of the slowest stage or, under a finite limit on that time, the least time to send; and the
    ends of the stages.
    """
    places = len(seconds)
    best: list[tuple[float, tuple[int, ...]]] = [(0.0 if end == 0 else inf, ()) for end in range(places + 1)]
    for stage in range(1, count + 1):
        found: list[tuple[float, tuple[int, ...]]] = [(inf, ())] * (places + 1)
        for end in range(stage, places + 1 if stage == count else places):
            sent = handing[end - 1] if end < places else 0.0
            work = 0.0
            for first in range(end - 1, stage - 2, -1):
                work += seconds[first]
                own = max(work, sent)
                if own > limit or (limit == inf and own >= found[end][0]):
                    break
                before = best[first][0]
                cost = max(before, own) if limit == inf else before + sent
                if cost < found[end][0]:
                    found[end] = cost, (*best[first][1], end)
        best = found
    return best[places]
