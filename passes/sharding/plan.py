"""The plan of a sharded graph: the placement of every value on a mesh, and the collectives with their reasons.

A plan is frozen, and belongs to one graph. It has a planned function for each way in which a function is called:

    PlannedFunction   the placements of its arguments, its nodes in order, the placements of its results
    PlannedNode       the split factors of its rule, the moves before it, the placements of operands and results
    Move              a conversion of a value to another placement: the steps, their reasons, and the node to report
    PlannedPipeline   the assignment of steps of `main` to ranks, if its layers are stages

`treadle.passes.sharding.planning` builds it, `checking` checks it, and `rank_programs` applies it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from treadle.ir.analysis.axis_tracing import joined_scope
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.hardware import Hardware
from treadle.ir.ops.collectives import HandOn, PassOn
from treadle.ir.placement.mesh import Mesh, SubAxes, ways
from treadle.ir.placement.placements import MeshPlacement, Split
from treadle.passes.sharding.conversions import (
    PlacementStep,
    bytes_of,
    payload_of,
    seconds_of,
    seconds_to_pass,
    sent_by,
)
from treadle.passes.sharding.factors import Share

Item = tuple[Value, MeshPlacement]
"""A value in one placement."""


def is_everywhere(item: Item) -> bool:
    """Return True for a whole constant, which every rank has. A part of a constant must be taken by a move."""
    value, placed = item
    return value.literal is not None and not placed.used


@dataclass(frozen=True)
class Move:
    """A conversion of a value to another placement.

    because  the reason for each step that communicates
    at       the node that the reason is about: the node that computes the value, or the node that reads it
    """

    value: Value
    source: MeshPlacement
    target: MeshPlacement
    steps: tuple[PlacementStep, ...]
    because: tuple[str, ...]
    at: Node

    @property
    def needs(self) -> tuple[Item, ...]:
        """The items that the move reads; empty for a whole constant."""
        item = self.value, self.source
        return () if is_everywhere(item) else (item,)

    @property
    def makes(self) -> tuple[Item, ...]:
        """The items that the move produces."""
        return ((self.value, self.target),)


def ring_reason(node: Node) -> str:
    """Return the reason why an attention node needs ring attention."""
    return f"{node.op.name} needs all keys, but ranks have parts of them"


@dataclass(frozen=True)
class PlannedNode:
    """The plan of one node.

    shares  the split factors of its axis rule
    moves   the moves before it
    reads   the placement of each operand; None for an absent operand
    gives   the placement of each result
    ring    for attention with split queries and keys: the parts of mesh axes around which keys pass
    body    for a composite that works on parts of an axis although its rule needs the axis whole: its body, planned
    callee  for a call: its function, planned
    """

    node: Node
    shares: Mapping[str, Share]
    moves: tuple[Move, ...]
    reads: tuple[MeshPlacement | None, ...]
    gives: tuple[MeshPlacement, ...]
    body: PlannedFunction | None = None
    callee: PlannedFunction | None = None
    ring: SubAxes = ()

    @property
    def needs(self) -> tuple[Item, ...]:
        """The items that the node reads, each once, without whole constants."""
        held = [v for v in self.node.operands if v is not None] if self.callee is not None else self.node.operands
        pairs = zip(held, self.reads, strict=True)
        found = [(v, p) for v, p in pairs if v is not None and p is not None]
        return tuple(dict.fromkeys(item for item in found if not is_everywhere(item)))

    @property
    def makes(self) -> tuple[Item, ...]:
        """The items that the node produces."""
        return tuple(zip(self.node.results, self.gives, strict=True))


@dataclass(frozen=True)
class PlannedFunction:
    """A function, planned for arguments with these placements.

    name   its name in the programs of ranks: its own, with a number if it is called in several ways
    moves  the moves of its results, at the end
    """

    name: str
    function: Function
    takes: tuple[MeshPlacement, ...]
    nodes: tuple[PlannedNode, ...]
    moves: tuple[Move, ...]
    gives: tuple[MeshPlacement, ...]

    @property
    def steps(self) -> tuple[Move | PlannedNode, ...]:
        """All steps in order: for each node, its moves and then the node; at the end, the moves of results."""
        found: list[Move | PlannedNode] = []
        for node in self.nodes:
            found += [*node.moves, node]
        return (*found, *self.moves)


def made_items(planned: PlannedFunction) -> list[Item]:
    """Return all items that the steps of a function produce, each once, in order."""
    return list(dict.fromkeys(item for step in planned.steps for item in step.makes))


@dataclass(frozen=True)
class Stage:
    """The work of the ranks of one stage of a pipeline for each micro-batch.

    steps     the indices of the stage's steps in `main`, in order
    receives  the items that the previous stage sends
    weights   the names of the weights that the stage reads; its ranks hold no others
    outputs   the names of the outputs that the stage computes
    """

    steps: tuple[int, ...]
    receives: tuple[Item, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class PlannedPipeline:
    """`main` in stages, each on its own ranks. Micro-batches pass through the stages one after another.

    over   the mesh axis of stages; no value is split along it
    turns  the mesh axis of micro-batches, which is the last axis. It is an axis of time: each rank processes all of its
           positions in order
    """

    over: str
    turns: str
    stages: tuple[Stage, ...]


def hand_on_reason(number: int) -> str:
    """Return the reason why a value is sent to a stage."""
    return f"stage {number} reads results of stage {number - 1}"


@dataclass(frozen=True)
class PlannedCollective:
    """A collective of a run.

    scope    the full scope of the node that the collective belongs to
    times    the number of times that the collective runs in one run of `main`
    payload  bytes of the value; sent: bytes that a rank sends; seconds: minimum time; each for one execution
    ranks    the number of ranks that send these bytes
    """

    op: str
    over: str
    ways: int
    because: str
    scope: str
    line: str
    value: str
    payload: float
    sent: float
    seconds: float
    ranks: int
    times: int = 1


@dataclass(frozen=True)
class ShardingPlan:
    """The placement of every value of a graph on a mesh.

    mesh       the mesh of ranks; with a pipeline, its last axis is an axis of micro-batches
    axes       the request: axes by name, with the mesh axes that split them
    stored     mesh axes over which weights are stored in more parts than they are used in
    weights    the placement in which each weight is stored
    functions  the planned functions, callees first; the last is `main`
    notes      descriptions of requests that could not be met
    sizes      the sizes of the symbols at which costs are reported
    """

    graph: Graph = field(repr=False)
    mesh: Mesh
    recipe: str
    axes: Mapping[str, str]
    stored: str
    weights: Mapping[str, MeshPlacement]
    functions: tuple[PlannedFunction, ...]
    notes: tuple[str, ...]
    sizes: Mapping[str, int]
    machine: Hardware
    pipeline: PlannedPipeline | None = None

    @property
    def main(self) -> PlannedFunction:
        """The planned `main`."""
        return self.functions[-1]

    @property
    def devices(self) -> Mesh:
        """The mesh of ranks, without micro-batches."""
        return self.mesh if self.pipeline is None else Mesh(self.mesh.axes[:-1])

    @property
    def idle_axes(self) -> list[str]:
        """The names of mesh axes over which nothing is split: their ranks compute the same."""
        placed = [
            *self.weights.values(),
            *(p for f in self.functions for p in (*f.takes, *(q for _, q in made_items(f)))),
        ]
        used = {part.axis for each in placed for part in each.used}
        used |= set() if self.pipeline is None else {self.pipeline.over, self.pipeline.turns}
        return [name for name, size in self.mesh.axes if size > 1 and name not in used]

    @property
    def turns(self) -> SubAxes:
        """The parts of the mesh axis of micro-batches; empty without a pipeline."""
        return () if self.pipeline is None else self.mesh.parts_of(self.pipeline.turns)

    @property
    def gives(self) -> tuple[MeshPlacement, ...]:
        """The placements of outputs on the ranks that compute them, after all micro-batches."""
        turns = set(self.turns)
        found = []
        for placed in self.main.gives:
            dims = [None if d is None else tuple(p for p in d.over if p not in turns) for d in placed.dims]
            splits = [Split(over, d.grain) if d and over else None for d, over in zip(placed.dims, dims, strict=True)]
            found.append(MeshPlacement(tuple(splits), placed.partial, placed.monoid))
        return tuple(found)

    def stage_at(self, rank: int) -> int:
        """Return the index of a rank's stage; 0 without a pipeline."""
        if self.pipeline is None:
            return 0
        return self.devices.index(rank, self.devices.parts_of(self.pipeline.over))

    def holds_output(self, rank: int, name: str) -> bool:
        """Return True if a rank computes an output, or a part of it."""
        return self.pipeline is None or name in self.pipeline.stages[self.stage_at(rank)].outputs

    def weights_at(self, rank: int) -> tuple[str, ...]:
        """Return the names of the weights that a rank holds parts of."""
        return tuple(self.weights) if self.pipeline is None else self.pipeline.stages[self.stage_at(rank)].weights

    def times_of(self, items: Iterable[Item]) -> int:
        """Return the number of times that a step with these items runs in one run: once per micro-batch, or once."""
        turns = self.turns
        return ways(turns) if any(set(turns).intersection(placed.used) for _, placed in items) else 1

    def collectives(self) -> list[PlannedCollective]:
        """Return all collectives of a run, one entry for each call."""
        if self.pipeline is None:
            return list(self._run(self.main, "", None))
        found: list[PlannedCollective] = []
        steps = self.main.steps
        for number, stage in enumerate(self.pipeline.stages):
            for item in stage.receives:
                found += [self._handed(self.pipeline, number, item)] * self.times_of([item])
            for step in (steps[at] for at in stage.steps):
                found += [*self._stepped(step, "", None)] * self.times_of([*step.needs, *step.makes])
        return found

    def _run(self, planned: PlannedFunction, scope: str, within: Node | None) -> Iterator[PlannedCollective]:
        """Yield the collectives of a function. Collectives of a composite's body are reported at the composite."""
        for step in planned.steps:
            yield from self._stepped(step, scope, within)

    def _stepped(self, step: Move | PlannedNode, scope: str, within: Node | None) -> Iterator[PlannedCollective]:
        if isinstance(step, Move):
            yield from self._moved(step, scope, within)
            return
        if step.ring:
            yield from self._passed(step, scope, within or step.node)
        if step.body is not None:
            yield from self._run(step.body, scope, within or step.node)
        elif step.callee is not None:
            yield from self._run(step.callee, joined_scope(scope, step.node.scope), None)

    @property
    def _together(self) -> int:
        """The number of ranks that run the same steps."""
        return self.devices.ranks // (1 if self.pipeline is None else len(self.pipeline.stages))

    def _moved(self, move: Move, scope: str, within: Node | None) -> Iterator[PlannedCollective]:
        at = within or move.at
        reasons = iter(move.because)
        for step in move.steps:
            if step.sends:
                arguments = move.value.type, step, self.sizes
                yield PlannedCollective(
                    step.kind.word,
                    self.mesh.text_of(step.over),
                    ways(step.over),
                    next(reasons),
                    joined_scope(scope, at.scope),
                    str(at.source or ""),
                    move.value.name,
                    payload_of(*arguments),
                    sent_by(*arguments),
                    seconds_of(*arguments, self.mesh, self.machine),
                    self._together,
                )

    def _passed(self, planned: PlannedNode, scope: str, at: Node) -> Iterator[PlannedCollective]:
        """Yield the sends of keys and values: each rank passes them to the next rank until every rank has seen all of
        them.
        """
        node, count = planned.node, ways(planned.ring)
        for value, placed in zip(node.operands[1:3], planned.reads[1:3], strict=True):
            assert value is not None
            assert placed is not None
            met = PassOn.name, planned.ring, count, ring_reason(node)
            yield from [self._sent(met, (value, placed), joined_scope(scope, at.scope), at)] * (count - 1)

    def _handed(self, pipeline: PlannedPipeline, number: int, item: Item) -> PlannedCollective:
        """Return the collective that sends an item to a stage from the previous stage."""
        node = item[0].node
        over = self.mesh.parts_of(pipeline.over)
        met = HandOn.name, over, len(pipeline.stages), hand_on_reason(number)
        return self._sent(met, item, "" if node is None else node.scope, node)

    def _sent(self, met: tuple[str, SubAxes, int, str], item: Item, scope: str, at: Node | None) -> PlannedCollective:
        """Return the collective in which one rank sends its whole part to another rank."""
        (op, over, count, because), (value, placed) = met, item
        sent = bytes_of(value.type, placed, self.sizes)
        seconds = seconds_to_pass(value.type, placed, self.sizes, over, self.mesh, self.machine)
        line = "" if at is None else str(at.source or "")
        text = self.mesh.text_of(over)
        return PlannedCollective(op, text, count, because, scope, line, value.name, sent, sent, seconds, self._together)

    def __str__(self) -> str:
        from treadle.passes.sharding.plan_printing import plan_text

        return plan_text(self)

    def weight_part(self, name: str) -> float:
        """Return the average number of bytes of a rank's part of a weight."""
        return self.graph.parameters[name].type.bytes_at({}) / ways(self.weights[name].used)

    def weight_bytes(self) -> float:
        """Return the average number of bytes of weights that one device holds."""
        if self.pipeline is None:
            return sum(map(self.weight_part, self.weights))
        stages = self.pipeline.stages
        return sum(self.weight_part(name) for stage in stages for name in stage.weights) / len(stages)
