"""Read a sharding plan of a graph from its record, which `plan_printing.plan_record` writes.

The record comes from an untrusted file. Its values and nodes must belong to this graph. Steps are derived again from
placements and must equal the steps in the record, and `checking` checks the whole plan. So every plan that passes these
checks can be run, independently of its author.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from treadle.ir.composites import body_of
from treadle.ir.errors import PassError, TreadleError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.hardware import Hardware
from treadle.ir.operation import Composite
from treadle.ir.placement.mesh import MOST_RANKS, Mesh
from treadle.ir.placement.placements import MeshPlacement, parse_placement
from treadle.passes.sharding.checking import check_sharding
from treadle.passes.sharding.conversions import conversion
from treadle.passes.sharding.factors import Share
from treadle.passes.sharding.plan import (
    Move,
    PlannedFunction,
    PlannedNode,
    PlannedPipeline,
    ShardingPlan,
    Stage,
    made_items,
)

_NAME = re.compile(r"[A-Za-z_]\w{0,99}")
_HARDWARE = re.compile(r"[\w.-]{1,100}")
_MOST_TEXT = 1000
"""Maximum length of one string in a record."""


def read_plan(record: Any, graph: Graph, *, most_ranks: int = MOST_RANKS) -> ShardingPlan:
    """Return the plan in a record, after checking it.

    most_ranks  the largest mesh that is accepted: the cost of checking a plan grows with the mesh

    Raises PassError if the plan does not belong to this graph, or is wrong.
    """
    try:
        plan = _Reader(record, graph, most_ranks).plan()
    except TreadleError as error:
        raise PassError("the sharding plan cannot be read", received=str(error.what), hint=error.hint) from error
    except (TypeError, KeyError, AttributeError, ValueError, IndexError, AssertionError, RecursionError) as error:
        raise PassError("the sharding plan is malformed", received=f"{type(error).__name__}: {error}"[:200]) from error
    try:
        check_sharding(plan)
    except PassError:
        raise
    except (TreadleError, ValueError, KeyError, AssertionError) as error:
        received = f"{type(error).__name__}: {error}"[:200]
        raise PassError("the sharding plan cannot be checked", received=received) from error
    return plan


class _Reader:
    def __init__(self, record: Any, graph: Graph, most_ranks: int) -> None:
        self.record, self.graph = record, graph
        self.mesh = Mesh.of(_text(record["mesh"]))
        if self.mesh.ranks > most_ranks:
            raise PassError(
                f"a mesh of {self.mesh.ranks:,} ranks is over the limit", hint=f"plan_ranks={self.mesh.ranks}"
            )
        self.placements: dict[str, MeshPlacement] = {}
        self.functions: dict[str, PlannedFunction] = {}

    def plan(self) -> ShardingPlan:
        record = self.record
        for said in _list(record["functions"]):
            name, of = _text(said["name"]), _text(said["of"])
            if not _NAME.fullmatch(name) or name in self.functions:
                raise ValueError(f"invalid or duplicate function name {name[:80]!r}")
            self.functions[name] = self.function(said, name, self.graph.functions[of])
        last = [*self.functions.values()][-1:]
        if not last or last[0].function is not self.graph.main or last[0].name != self.graph.main.name:
            raise ValueError("the last function is not main")
        sizes = {_text(name): _count(size) for name, size in record["sizes"].items()}
        if sizes.keys() != self.graph.symbols.keys() or any(n not in self.graph.symbols[s] for s, n in sizes.items()):
            raise ValueError("its sizes do not match the graph's symbols")
        weights = {_text(name): self.placed(text) for name, text in record["weights"].items()}
        if weights.keys() != self.graph.parameters.keys():
            raise ValueError("its weights do not match the graph's")
        axes = {
            _text(name): self.mesh.text_of(self.mesh.parts_of(_text(over))) for name, over in record["axes"].items()
        }
        return ShardingPlan(
            self.graph,
            self.mesh,
            _text(record["recipe"]),
            axes,
            self.mesh.text_of(self.mesh.parts_of(_text(record["stored"]))),
            {name: weights[name] for name in self.graph.parameters},
            tuple(self.functions.values()),
            tuple([_text(note) for note in _list(record["notes"])]),
            sizes,
            _machine(record["machine"]),
            self.pipeline(record["pipeline"], last[0]) if "pipeline" in record else None,
        )

    def pipeline(self, said: Mapping[str, Any], main: PlannedFunction) -> PlannedPipeline:
        made = made_items(main)
        stages = [
            Stage(
                tuple([_count(at, least=0) for at in _list(each["steps"])]),
                tuple([made[_count(at, least=0)] for at in _list(each["receives"])]),
                tuple([_text(name) for name in _list(each["weights"])]),
                tuple([_text(name) for name in _list(each["outputs"])]),
            )
            for each in _list(said["stages"])
        ]
        return PlannedPipeline(_text(said["over"]), _text(said["turns"]), tuple(stages))

    def placed(self, said: Any) -> MeshPlacement:
        text = _text(said)
        found = self.placements.get(text)
        if found is None:
            found = self.placements[text] = parse_placement(text, self.mesh)
        return found

    def function(self, said: Mapping[str, Any], name: str, function: Function) -> PlannedFunction:
        takes, gives = (tuple([self.placed(text) for text in _list(said[key])]) for key in ("takes", "gives"))
        if (len(takes), len(gives)) != (len(function.arguments), len(function.results)):
            raise ValueError(f"{name} takes {len(takes)} and returns {len(gives)} values")
        return self.content(said, name, function, takes, gives)

    def content(
        self,
        said: Mapping[str, Any],
        name: str,
        function: Function,
        takes: Sequence[MeshPlacement],
        gives: Sequence[MeshPlacement],
    ) -> PlannedFunction:
        nodes = _list(said["nodes"])
        if len(nodes) != len(function.nodes):
            raise ValueError(f"{name} has {len(function.nodes)} nodes, but the record has {len(nodes)}")
        made = tuple([self.node(each, node, function) for each, node in zip(nodes, function.nodes, strict=True)])
        moves = self.moves(said["moves"], function.results, function)
        return PlannedFunction(name, function, tuple(takes), made, moves, tuple(gives))

    def node(self, said: Mapping[str, Any], node: Node, function: Function) -> PlannedNode:
        if said["op"] != node.op.name:
            raise ValueError(f"{node.op.name} is recorded as {_text(said['op'])[:80]}")
        reads = tuple([None if text is None else self.placed(text) for text in _list(said["reads"])])
        gives = tuple([self.placed(text) for text in _list(said["gives"])])
        held = [v for v in node.operands if v is not None] if node.op.callee is not None else node.operands
        if (len(reads), len(gives)) != (len(held), len(node.results)):
            raise ValueError(
                f"the plan has {len(reads)} operands and {len(gives)} results for {node.op.name}, "
                f"which has {len(held)} and {len(node.results)}"
            )
        callee = body = None
        if node.op.callee is not None:
            callee = self.functions[_text(said["callee"])]
        elif "body" in said:
            types = [None if v is None else v.type for v in node.operands]
            if not isinstance(node.op, Composite):
                raise ValueError(f"{node.op.name} has no body")
            inner = body_of(node.op, types)
            body = self.content(said["body"], node.op.name, inner, [p for p in reads if p is not None], gives)
        ring = self.mesh.parts_of(_text(said.get("ring", "")))
        return PlannedNode(
            node,
            self.shares(said["shares"]),
            self.moves(said["moves"], node.operands, function),
            reads,
            gives,
            body,
            callee,
            ring,
        )

    def shares(self, said: Mapping[str, Any]) -> dict[str, Share]:
        found = {}
        for name, text in said.items():
            (split,) = self.placed(f"[{_text(text)}]").dims
            if split is None:
                raise ValueError(f"factor {name} is split over no mesh axis")
            found[_text(name)] = Share(split.over, split.grain)
        return found

    def moves(self, said: Any, among: Sequence[Value | None], function: Function) -> tuple[Move, ...]:
        return tuple([self.move(each, among, function) for each in _list(said)])

    def move(self, said: Mapping[str, Any], among: Sequence[Value | None], function: Function) -> Move:
        value = among[_count(said["operand"], least=0)]
        if value is None:
            raise ValueError("an absent operand has moves")
        source, target = self.placed(said["source"]), self.placed(said["target"])
        steps = conversion(value.type.shape, source, target)
        steps_read = [(s.kind.word, self.mesh.text_of(s.over), s.dim, s.onto) for s in steps]
        if steps_read != [(each["kind"], each["over"], each["dim"], each["onto"]) for each in _list(said["steps"])]:
            raise ValueError(f"the recorded steps do not lead {value.name} from {said['source']} to {said['target']}")
        because = tuple([_text(reason) for reason in _list(said["because"])])
        return Move(value, source, target, steps, because, function.nodes[_count(said["at"], least=0)])


def _machine(said: Mapping[str, Any]) -> Hardware:
    """Return the hardware in a record. It may be a row that this installation lacks."""
    name, capability = _text(said["name"]), said["capability"]
    if not _HARDWARE.fullmatch(name):
        raise ValueError(f"invalid name of hardware {name[:80]!r}")
    machine = Hardware(
        name,
        _text(said["kind"]),
        _text(said["description"]),
        _rate("bandwidth", said["bandwidth"]),
        {_text(name): _rate(f"the rate of {name}", rate) for name, rate in said["rates"].items()},
        memory=_rate("memory", said["memory"]),
        capability=None if capability is None else (_count(capability[0]), _count(capability[1], least=0)),
        shared_memory=_count(said["shared_memory"], least=0),
        cores=_count(said["cores"], least=0),
        node=_count(said["node"]),
        fast=_rate("fast", said["fast"]),
        slow=_rate("slow", said["slow"]),
        latency=_rate("latency", said["latency"]),
    )
    if min(*machine.rates.values(), machine.product_rate, machine.bandwidth, machine.fast, machine.slow) <= 0:
        raise ValueError("a rate is 0")
    return machine


def _rate(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
        raise ValueError(f"{name} is not a finite rate of 0 or more")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MOST_TEXT:
        raise TypeError(f"expected a string of at most {_MOST_TEXT} characters, not {str(value)[:40]!r}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, not {str(value)[:40]!r}")
    return value


def _count(value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise TypeError(f"expected a number of {least} or more, not {str(value)[:40]!r}")
    return value
