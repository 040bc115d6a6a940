"""The plan of a sharded graph: where every value lies on a mesh, and which collectives that takes and why.

A plan is frozen. It belongs to a graph, whose functions it holds once for each way in which they are called:

    PlannedFunction   where its arguments lie, its nodes in order, where its results lie
    PlannedNode       which factors of its rule are split, what moves before it, how operands are read, results given
    Move              a value that is wanted in another placement: the steps, the reason, and who is the reason
    PlannedPipeline   which ranks do which steps of `main`, where its layers lie on ranks in turn

`treadle.passes.sharding.planning` makes it, `checking` checks it, `rank_programs` applies it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from treadle.ir.analysis.axis_tracing import joined_scope
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.ops.collectives import HandOn, PassOn
from treadle.ir.placement.machines import Machine
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
"""A value as it lies."""


def is_everywhere(item: Item) -> bool:
    """Return True for a whole constant, which every rank has; a part of one is taken by a move."""
    value, placed = item
    return value.literal is not None and not placed.used


@dataclass(frozen=True)
class Move:
    """A value in another placement than it has.

    because  the reason, for each step that sends
    at       the node whose place in the model is the reason's: the one that makes the value, or that reads it
    """

    value: Value
    source: MeshPlacement
    target: MeshPlacement
    steps: tuple[PlacementStep, ...]
    because: tuple[str, ...]
    at: Node

    @property
    def needs(self) -> tuple[Item, ...]:
        """What it reads, but for whole constants."""
        item = self.value, self.source
        return () if is_everywhere(item) else (item,)

    @property
    def makes(self) -> tuple[Item, ...]:
        """What it gives."""
        return ((self.value, self.target),)


def ring_reason(node: Node) -> str:
    """Why keys and values pass around."""
    return f"{node.op.name} sees all keys, which ranks have in parts"


@dataclass(frozen=True)
class PlannedNode:
    """One node.

    shares  the factors of its axis rule that are split
    moves   what is done before it
    reads   how each operand lies that it reads; None where it is absent
    gives   how each result lies
    ring    parts of mesh axes around which keys pass, of attention whose queries and keys are split over them
    body    of a composite that works on parts of an axis which it needs whole: its body, planned
    callee  of a call: its function, planned
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
        """What it reads, each once, but for whole constants."""
        held = [v for v in self.node.operands if v is not None] if self.callee is not None else self.node.operands
        pairs = zip(held, self.reads, strict=True)
        found = [(v, p) for v, p in pairs if v is not None and p is not None]
        return tuple(dict.fromkeys(item for item in found if not is_everywhere(item)))

    @property
    def makes(self) -> tuple[Item, ...]:
        """What it gives."""
        return tuple(zip(self.node.results, self.gives, strict=True))


@dataclass(frozen=True)
class PlannedFunction:
    """A function, as it is called with arguments that lie so.

    name   its name in the programs of ranks: its own, numbered where it is called in several ways
    moves  what is done at the end, with its results
    """

    name: str
    function: Function
    takes: tuple[MeshPlacement, ...]
    nodes: tuple[PlannedNode, ...]
    moves: tuple[Move, ...]
    gives: tuple[MeshPlacement, ...]

    @property
    def steps(self) -> tuple[Move | PlannedNode, ...]:
        """All that it does, in order: the moves before a node, the node, ..., the moves at the end."""
        found: list[Move | PlannedNode] = []
        for node in self.nodes:
            found += [*node.moves, node]
        return (*found, *self.moves)


def made_items(planned: PlannedFunction) -> list[Item]:
    """All that its steps give, each once, in order."""
    return list(dict.fromkeys(item for step in planned.steps for item in step.makes))


@dataclass(frozen=True)
class Stage:
    """What the ranks at one place of a pipeline do with each micro-batch.

    steps     of `main`, by their numbers, in order
    receives  what the stage before hands on
    weights   the names of the weights that it reads, which these ranks hold and no others
    outputs   the names of the outputs that it gives
    """

    steps: tuple[int, ...]
    receives: tuple[Item, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class PlannedPipeline:
    """`main` in stages, each on ranks of its own, through which micro-batches go one after another.

    over   the mesh axis of stages, along which nothing else lies
    turns  the mesh axis of micro-batches: the last one, which is one of time. Each rank takes its positions in turn
    """

    over: str
    turns: str
    stages: tuple[Stage, ...]


def hand_on_reason(number: int) -> str:
    """Why a value is handed on to a stage."""
    return f"stage {number} goes on from what stage {number - 1} made"


@dataclass(frozen=True)
class PlannedCollective:
    """A collective as it runs.

    scope    where: the full scope of the reason
    times    how often in one run of `main`
    payload  bytes it is about, sent: bytes that a rank sends; seconds: at least; each of one time
    ranks    how many ranks send so
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
    """Where everything of a graph lies on a mesh.

    mesh       of ranks; where there is a pipeline, with an axis of micro-batches as its last
    axes       what was asked: axes by name, with the mesh axes that split them
    stored     weights that lie in more parts than they are used in, with the mesh axes of these
    weights    the placement in which each weight is stored
    functions  the planned functions, callees first; the last is `main`
    notes      what is not as asked, in words
    sizes      of the symbols, for which costs are told
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
    machine: Machine
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
    def turns(self) -> SubAxes:
        """The parts of the mesh axis of micro-batches; none without a pipeline."""
        return () if self.pipeline is None else self.mesh.parts_of(self.pipeline.turns)

    @property
    def gives(self) -> tuple[MeshPlacement, ...]:
        """How outputs lie on the ranks that give them, when all micro-batches are done."""
        turns = set(self.turns)
        found = []
        for placed in self.main.gives:
            dims = [None if d is None else tuple(p for p in d.over if p not in turns) for d in placed.dims]
            splits = [Split(over, d.grain) if d and over else None for d, over in zip(placed.dims, dims, strict=True)]
            found.append(MeshPlacement(tuple(splits), placed.partial, placed.monoid))
        return tuple(found)

    def stage_at(self, rank: int) -> int:
        """The number of the stage that a rank is of; 0 without a pipeline."""
        if self.pipeline is None:
            return 0
        return self.devices.index(rank, self.devices.parts_of(self.pipeline.over))

    def holds_output(self, rank: int, name: str) -> bool:
        """Whether a rank gives an output, or a part of it."""
        return self.pipeline is None or name in self.pipeline.stages[self.stage_at(rank)].outputs

    def weights_at(self, rank: int) -> tuple[str, ...]:
        """The names of the weights of which a rank holds parts."""
        return tuple(self.weights) if self.pipeline is None else self.pipeline.stages[self.stage_at(rank)].weights

    def times_of(self, items: Iterable[Item]) -> int:
        """How often is done what reads or gives these: for each micro-batch, or once."""
        turns = self.turns
        return ways(turns) if any(set(turns).intersection(placed.used) for _, placed in items) else 1

    def collectives(self) -> list[PlannedCollective]:
        """All that run, each as often as it does: once for each call."""
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
        """Those of a function; of a body they are the composite's."""
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
        """How many ranks do the same steps."""
        return self.devices.ranks // (1 if self.pipeline is None else len(self.pipeline.stages))

    def _moved(self, move: Move, scope: str, within: Node | None) -> Iterator[PlannedCollective]:
        at = within or move.at
        reasons = iter(move.because)
        for step in move.steps:
            if step.sends:
                told = move.value.type, step, self.sizes
                yield PlannedCollective(
                    step.kind.word,
                    self.mesh.text_of(step.over),
                    ways(step.over),
                    next(reasons),
                    joined_scope(scope, at.scope),
                    str(at.source or ""),
                    move.value.name,
                    payload_of(*told),
                    sent_by(*told),
                    seconds_of(*told, self.mesh, self.machine),
                    self._together,
                )

    def _passed(self, planned: PlannedNode, scope: str, at: Node) -> Iterator[PlannedCollective]:
        """Keys and values, which each rank passes to the next until all have had all."""
        node, count = planned.node, ways(planned.ring)
        for value, placed in zip(node.operands[1:3], planned.reads[1:3], strict=True):
            assert value is not None
            assert placed is not None
            met = PassOn.name, planned.ring, count, ring_reason(node)
            yield from [self._sent(met, (value, placed), joined_scope(scope, at.scope), at)] * (count - 1)

    def _handed(self, pipeline: PlannedPipeline, number: int, item: Item) -> PlannedCollective:
        """What a stage gets of the one before."""
        node = item[0].node
        over = self.mesh.parts_of(pipeline.over)
        met = HandOn.name, over, len(pipeline.stages), hand_on_reason(number)
        return self._sent(met, item, "" if node is None else node.scope, node)

    def _sent(self, met: tuple[str, SubAxes, int, str], item: Item, scope: str, at: Node | None) -> PlannedCollective:
        """All of a part, which one rank sends to another."""
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
        """Bytes of a rank's part of a weight, on average."""
        return self.graph.parameters[name].type.bytes_at({}) / ways(self.weights[name].used)

    def weight_bytes(self) -> float:
        """Bytes of weights that one device holds, on average."""
        if self.pipeline is None:
            return sum(map(self.weight_part, self.weights))
        stages = self.pipeline.stages
        return sum(self.weight_part(name) for stage in stages for name in stage.weights) / len(stages)
