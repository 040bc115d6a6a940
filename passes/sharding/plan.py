"""The plan of a sharded graph: where every value lies on a mesh, and which collectives that takes and why.

A plan is frozen. It belongs to a graph, whose functions it holds once for each way in which they are called:

    PlannedFunction   where its arguments lie, its nodes in order, where its results lie
    PlannedNode       which factors of its rule are split, what moves before it, how operands are read, results given
    Move              a value that is wanted in another placement: the steps, the reason, and who is the reason

`treadle.passes.sharding.planning` makes it, `checking` checks it, `rank_programs` applies it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from treadle.ir.analysis.axis_tracing import joined_scope
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.ops.collectives import PassOn
from treadle.ir.placement.machines import Machine
from treadle.ir.placement.mesh import Mesh, SubAxes, ways
from treadle.ir.placement.placements import MeshPlacement
from treadle.passes.sharding.conversions import (
    PlacementStep,
    bytes_of,
    payload_of,
    seconds_of,
    seconds_to_pass,
    sent_by,
)
from treadle.passes.sharding.factors import Share


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


@dataclass(frozen=True)
class PlannedCollective:
    """A collective as it runs.

    scope    where: the full scope of the reason
    times    how often in one run of `main`
    payload  bytes it is about, sent: bytes that a rank sends; seconds: at least; each of one time
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
    times: int = 1


@dataclass(frozen=True)
class ShardingPlan:
    """Where everything of a graph lies on a mesh.

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

    @property
    def main(self) -> PlannedFunction:
        """The planned `main`."""
        return self.functions[-1]

    def collectives(self) -> list[PlannedCollective]:
        """All that run, each as often as it does: once for each call."""
        return list(self._run(self.main, "", None))

    def _run(self, planned: PlannedFunction, scope: str, within: Node | None) -> Iterator[PlannedCollective]:
        """Those of a function; of a body they are the composite's."""
        for node in planned.nodes:
            yield from self._moved(node.moves, scope, within)
            if node.ring:
                yield from self._passed(node, scope, within or node.node)
            if node.body is not None:
                yield from self._run(node.body, scope, within or node.node)
            elif node.callee is not None:
                yield from self._run(node.callee, joined_scope(scope, node.node.scope), None)
        yield from self._moved(planned.moves, scope, within)

    def _moved(self, moves: tuple[Move, ...], scope: str, within: Node | None) -> Iterator[PlannedCollective]:
        for move in moves:
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
                    )

    def _passed(self, planned: PlannedNode, scope: str, at: Node) -> Iterator[PlannedCollective]:
        """Keys and values, which each rank passes to the next until all have had all."""
        node, count = planned.node, ways(planned.ring)
        for value, placed in zip(node.operands[1:3], planned.reads[1:3], strict=True):
            assert value is not None
            assert placed is not None
            sent = bytes_of(value.type, placed, self.sizes)
            each = PlannedCollective(
                PassOn.name,
                self.mesh.text_of(planned.ring),
                count,
                ring_reason(node),
                joined_scope(scope, at.scope),
                str(at.source or ""),
                value.name,
                sent,
                sent,
                seconds_to_pass(value.type, placed, self.sizes, planned.ring, self.mesh, self.machine),
            )
            yield from [each] * (count - 1)

    def __str__(self) -> str:
        from treadle.passes.sharding.plan_printing import plan_text

        return plan_text(self)

    def weight_part(self, name: str) -> float:
        """Bytes of a rank's part of a weight, on average."""
        return self.graph.parameters[name].type.bytes_at({}) / ways(self.weights[name].used)

    def weight_bytes(self) -> float:
        """Bytes of weights that one device holds, on average."""
        return sum(map(self.weight_part, self.weights))
