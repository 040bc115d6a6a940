"""Outlining: repeated regions of a function become one function, called once for each repetition.

    x1 = ...; x2 = ...; x3 = ...        -->        x1 = h(x); x2 = h(x1); x3 = h(x2)

Regions with equal nodes, attributes, constants, types and wiring share one function. Their weights and states may
differ: each call passes its own. A region that differs otherwise becomes a separate function.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.hashing import op_key
from treadle.ir.naming import free_name
from treadle.ir.ops.call import Call
from treadle.ir.source_lines import SourceLine


@dataclass
class RepeatedRegion:
    """One repetition: consecutive nodes of `main` under one scope, at a nesting depth (1 is outermost)."""

    name: str
    scope: str
    nodes: list[Node]
    source: SourceLine | None = None
    depth: int = 1


def outline_regions(graph: Graph, regions: Sequence[RepeatedRegion]) -> None:
    """Replace regions of `main` by calls, innermost first."""
    for depth in sorted({r.depth for r in regions}, reverse=True):
        outlined = _outline_level(graph, [r for r in regions if r.depth == depth and r.nodes])
        for region in regions:
            if region.depth < depth:
                region.nodes = _with_calls(region.nodes, outlined)


@dataclass
class _Repetition:
    """A region in relative form: its operands from outside, and its body in terms of these operands.

    states  versions of states at the start of the region
    outs    values read outside the region, each as the position of a node and of its result
    call    the call that replaces the region
    """

    region: RepeatedRegion
    inputs: list[Value] = field(default_factory=list)
    weights: list[Value] = field(default_factory=list)
    states: list[Value] = field(default_factory=list)
    body: list[Any] = field(default_factory=list)
    outs: list[tuple[int, int]] = field(default_factory=list)
    call: Node | None = None

    def local_names(self) -> list[str]:
        """Return names for the weights, then the states: their names without the region's scope, numbered if two would
        be equal.
        """
        prefix = self.region.scope + "."
        held = [*self.weights, *[state for v in self.states if (state := v.state) is not None]]
        wanted = [value.name.removeprefix(prefix) for value in held]
        if len(set(wanted)) == len(wanted):
            return wanted
        names: list[str] = []
        for name in wanted:
            names.append(free_name(name, names))
        return names

    def last_versions(self) -> dict[Value, Value]:
        """Return a dict from the version of a state at the start of the region to its last version, for each state that
        the region updates.
        """
        last: dict[Value, Value] = {}
        for node in self.region.nodes:
            for index in node.op.updates:
                value = first = node.results[index]
                while first not in self.states and first.before is not None:
                    first = first.before
                if first in self.states:
                    last[first] = value
        return last

    def key(self) -> tuple[Any, ...]:
        types = [v.type.text for v in (*self.inputs, *self.weights, *self.states)]  # labels distinguish equal types
        counts = len(self.inputs), len(self.weights)
        return self.region.name, counts, tuple(types), tuple(self.local_names()), tuple(self.body)


def _outline_level(graph: Graph, regions: Sequence[RepeatedRegion]) -> dict[Node, _Repetition]:
    """Replace disjoint regions by calls. Return a dict from each of their nodes to its repetition."""
    main = graph.main
    home: dict[Node, _Repetition] = {}
    groups: dict[tuple[Any, ...], list[_Repetition]] = {}
    read_outside: set[Value | None] = set(main.outputs.values())
    for region in regions:
        repetition = _read(region)
        home.update(dict.fromkeys(region.nodes, repetition))
        groups.setdefault(repetition.key(), []).append(repetition)
        read_outside.update(repetition.inputs)
    for node in main.nodes:
        if node not in home:
            read_outside.update(node.operands)
    for value in read_outside:
        if value is not None and value.node in home and value.state is None:
            made_in = home[value.node]
            made_in.outs.append((made_in.region.nodes.index(value.node), value.index))

    renamed: dict[Value, Value] = {}
    for group in groups.values():
        outs = sorted({out for repetition in group for out in repetition.outs})
        function = _build(graph, group[0], outs)
        op = Call.of(function)
        for repetition in group:
            region, operands = repetition.region, [*repetition.inputs, *repetition.weights, *repetition.states]
            call = Node(op, operands, op.gives, function.name, region.scope, region.source)
            last = repetition.last_versions()
            given = [region.nodes[at].results[index] for at, index in outs]
            given += [last[version] for version in repetition.states if version in last]
            for inner, result in zip(given, call.results, strict=True):
                result.name = inner.name
                renamed[inner] = result
            repetition.call = call

    main.nodes = _with_calls(main.nodes, home)
    for node in main.nodes:
        node.operands = tuple([renamed.get(v, v) for v in node.operands])  # type: ignore[arg-type]  # None stays
    main.replace_results(lambda v: renamed.get(v, v))
    return home


def _with_calls(nodes: Sequence[Node], home: dict[Node, _Repetition]) -> list[Node]:
    """Return the nodes, with the nodes of each repetition replaced by its call."""
    return list(dict.fromkeys([home[node].call or node if node in home else node for node in nodes]))


def _read(region: RepeatedRegion) -> _Repetition:
    """Read a region into relative form. The body is one flat list: for each node the key of its op, a string, then an
    entry for each operand.

    The entry is None, a constant's content, or a number: -1, -2, ... for the weights, %1, %2, ... for the states, else
    0, 1, ... for the inputs and results, all in the order of first use in the region.
    """
    rep = _Repetition(region)
    places: dict[Value | None, Any] = {None: None}
    body, weights, inputs = rep.body, rep.weights, rep.inputs
    met = 0
    for node in region.nodes:
        body.append(op_key(node.op))
        for value in node.operands:
            if value not in places:
                assert value is not None
                if value.literal is not None:
                    places[value] = value.literal
                elif value.kind == "parameter":
                    weights.append(value)
                    places[value] = -len(weights)
                elif value.state is not None:
                    rep.states.append(value)
                    places[value] = f"%{len(rep.states)}"
                else:
                    inputs.append(value)
                    places[value] = met
                    met += 1
            body.append(places[value])
        for value in node.results:
            places[value] = met
            met += 1
    return rep


def _build(graph: Graph, rep: _Repetition, outs: Sequence[tuple[int, int]]) -> Function:
    region = rep.region
    # The scopes encoder.block.0, 1, ... give the name `encoder_block`, which is numbered if blocks differ.
    scopes = re.sub(r"\.\d+(?=\.|$)", "", region.scope).replace(".", "_")
    function = Function(free_name(scopes, graph.functions))
    formal: dict[Value, Value] = {}
    taken: set[str] = set()
    for value in rep.inputs:
        label = free_name(value.name, taken)
        taken.add(label)
        formal[value] = Value("input", value.type, label)
    for value, local in zip((*rep.weights, *rep.states), rep.local_names(), strict=True):
        kind, held = ("state", function.states) if value in rep.states else ("parameter", function.parameters)
        formal[value] = held[local] = Value(kind, value.type, local)
    function.inputs = [formal[v] for v in rep.inputs]
    for node in region.nodes:
        scope = node.scope[len(region.scope) :].lstrip(".") if node.scope.startswith(region.scope) else node.scope
        inner = Node(
            node.op,
            [formal.get(v, v) if v is not None else None for v in node.operands],
            [v.type for v in node.results],
            scope=scope,
            source=node.source,
        )
        for old, new in zip(node.results, inner.results, strict=True):
            new.name, formal[old] = old.name, new
        function.nodes.append(inner)
    for at, index in outs:
        value = formal[region.nodes[at].results[index]]
        function.outputs[free_name(value.name, function.outputs)] = value
    for entering, version in rep.last_versions().items():
        function.updated[formal[entering].name] = formal[version]
    graph.add_function(function)
    return function
