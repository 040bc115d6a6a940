"""Outlining: repeated regions of a function become one function, called once for each repetition.

    x1 = ...; x2 = ...; x3 = ...        -->        x1 = h(x); x2 = h(x1); x3 = h(x2)

Regions whose nodes, attributes, constants, types and wiring agree share one function, whatever weights they use: a call
passes its own. A region that differs gets a function of its own.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from treadle.ir.graph import Function, Graph, Node, Source, Value
from treadle.ir.hashing import op_key
from treadle.ir.ops.call import Call


@dataclass
class Region:
    """One repetition: consecutive nodes of `main` under one scope, at a nesting depth (1 is outermost)."""

    name: str
    scope: str
    nodes: list[Node]
    source: Source | None = None
    depth: int = 1


def outline_regions(graph: Graph, regions: Sequence[Region]) -> None:
    """Replace regions of `main` by calls, innermost first."""
    for depth in sorted({r.depth for r in regions}, reverse=True):
        replaced = _outline_level(graph, [r for r in regions if r.depth == depth and r.nodes])
        for region in regions:
            if region.depth < depth:
                region.nodes = list(_follow_replacement(region.nodes, replaced))


def _follow_replacement(nodes: Sequence[Node], replaced: dict[Node, Node]) -> Iterator[Node]:
    last: Node | None = None
    for node in nodes:
        new = replaced.get(node, node)
        if new is not last:
            yield new
        last = new


@dataclass
class _Repetition:
    """A region read relative to itself: what it takes from outside, and its body in those terms."""

    region: Region
    inputs: list[Value] = field(default_factory=list)
    weights: list[Value] = field(default_factory=list)
    outs: list[Value] = field(default_factory=list)
    body: list[Any] = field(default_factory=list)

    def local_names(self) -> list[str]:
        """The weights' names, those under the region's scope without it; numbered where two would be alike."""
        prefix = self.region.scope + "."
        names: list[str] = []
        for weight in self.weights:
            names.append(_free_name(weight.name.removeprefix(prefix), names))
        return names

    def key(self) -> tuple[Any, ...]:
        types = [v.type.text for v in (*self.inputs, *self.weights)]  # text: labels tell equal types apart
        return self.region.name, len(self.inputs), tuple(types), tuple(self.local_names()), tuple(self.body)


def _outline_level(graph: Graph, regions: Sequence[Region]) -> dict[Node, Node]:
    main = graph.main
    inside = {node: region for region in regions for node in region.nodes}
    escaping = {v for v in main.outputs.values() if v.node is not None}
    for node in main.nodes:
        home = inside.get(node)
        for value in node.operands:
            if value is not None and value.node is not None and inside.get(value.node) is not home:
                escaping.add(value)

    groups: dict[tuple[Any, ...], list[_Repetition]] = {}
    for region in regions:
        repetition = _read(region, escaping)
        groups.setdefault(repetition.key(), []).append(repetition)

    renamed: dict[Value, Value] = {}
    replaced: dict[Node, Node] = {}
    for group in groups.values():
        outs = sorted({_position(r, v) for r in group for v in r.outs})
        function = _build(graph, group[0], outs)
        op = Call.of(function)
        for repetition in group:
            region = repetition.region
            call = Node(
                op,
                [*repetition.inputs, *repetition.weights],
                op.gives,
                name=function.name,
                scope=region.scope,
                source=region.source,
            )
            for (at, index), result in zip(outs, call.results, strict=True):
                inner = region.nodes[at].results[index]
                result.name = inner.name
                renamed[inner] = result
            replaced.update(dict.fromkeys(region.nodes, call))

    main.nodes = list(_follow_replacement(main.nodes, replaced))
    for node in main.nodes:
        node.operands = tuple(renamed.get(v, v) if v is not None else None for v in node.operands)
    main.outputs = {name: renamed.get(v, v) for name, v in main.outputs.items()}
    return replaced


def _read(region: Region, escaping: set[Value]) -> _Repetition:
    rep = _Repetition(region)
    places: dict[Value | None, Any] = {None: None}
    body, weights, inputs = rep.body, rep.weights, rep.inputs
    for at, node in enumerate(region.nodes):
        for value in node.operands:
            if value in places or value is None:
                continue
            if value.literal is not None:
                places[value] = value.literal
            elif value.kind == "parameter":
                places[value] = ("weight", len(weights), 0)
                weights.append(value)
            else:
                places[value] = ("input", len(inputs), 0)
                inputs.append(value)
        body.append((op_key(node.op), *[places[v] for v in node.operands]))
        for value in node.results:
            places[value] = ("node", at, value.index)
            if value in escaping:
                rep.outs.append(value)
    return rep


def _position(rep: _Repetition, value: Value) -> tuple[int, int]:
    assert value.node is not None
    return rep.region.nodes.index(value.node), value.index


def _free_name(wanted: str, taken: Container[str]) -> str:
    """The name, numbered if it is taken."""
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def _build(graph: Graph, rep: _Repetition, outs: Sequence[tuple[int, int]]) -> Function:
    region = rep.region
    # `encoder_block` for the scopes encoder.block.0, 1, ...; numbered if blocks differ
    scopes = re.sub(r"\.\d+(?=\.|$)", "", region.scope).replace(".", "_")
    function = Function(_free_name(scopes, graph.functions))
    formal: dict[Value, Value] = {}
    taken: set[str] = set()
    for value in rep.inputs:
        label = _free_name(value.name, taken)
        taken.add(label)
        formal[value] = Value("input", value.type, label)
    for value, local in zip(rep.weights, rep.local_names(), strict=True):
        formal[value] = function.parameters[local] = Value("parameter", value.type, local)
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
        function.outputs[_free_name(value.name, function.outputs)] = value
    graph.add_function(function)
    return function
