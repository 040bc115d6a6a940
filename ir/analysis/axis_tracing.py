"""The closure of an axis's places under the rules of a function's nodes. Calls are entered, each in its own context.

A context is a function and its initial places: the positions of the axis in the call's operands and results.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from treadle.ir.analysis.axis_places import Place, moved, places_of, visit
from treadle.ir.analysis.encounters import Encounter, Resized
from treadle.ir.analysis.structural_axes import IMPLIED, implied_places
from treadle.ir.axes import Role
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.sizing.sizes import ONE
from treadle.ir.text.attributes import attribute_symbols


@dataclass(frozen=True)
class Closure:
    places: frozenset[Place]
    encounters: tuple[Encounter, ...]


class Tracer:
    """Computes closures of sets of places under the rules of a function's nodes; each call has its own context."""

    def __init__(self, graph: Graph, axis: str) -> None:
        self.graph = graph
        self.axis = axis
        self.symbol = axis if axis in graph.symbols else None
        self.memo: dict[tuple[str, frozenset[Place]], Closure] = {}

    def seeds(self) -> Iterator[Place]:
        """Yield places where the axis starts in `main`; labels start inside every function, see `label_seeds`."""
        main = self.graph.main
        match = re.fullmatch(r"(.+)\[(\d+)\]", self.axis)
        if match is not None:
            name, dim = match[1], int(match[2])
            for value in main.arguments:
                if value.name == name and dim < value.type.rank:
                    yield Place(value, dim, ONE, value.type.shape[dim])
        elif self.symbol is not None:
            for value in main.inputs:
                for dim, size in enumerate(value.type.shape):
                    if size.as_symbol == self.symbol:
                        yield Place(value, dim, ONE, size)

    @cached_property
    def is_label(self) -> bool:
        """True if a dimension of the graph has the axis as a label."""
        return self.axis in labels_of(self.graph)

    def label_seeds(self, function: Function) -> Iterator[Place]:
        """Yield the places in a function that have the axis as a label or, if no place of the graph has, that imply
        it.
        """
        if self.symbol is not None or not self.axis.isidentifier():
            return
        if not self.is_label:
            yield from implied_places(function, self.axis)
            return
        for value in ordered_values(function):
            for dim, d in enumerate(value.type.dims):
                inner = ONE
                for factor in reversed(d.factors):
                    if factor.label == self.axis:
                        yield Place(value, dim, inner, factor.size)
                    inner = inner * factor.size

    def generated_seeds(self, function: Function) -> Iterator[Place]:
        """Yield the places where a symbol's axis is generated: `iota(size=S)` counts along it."""
        for node in function.nodes if self.symbol is not None else ():
            if node.op.callee is not None or self.symbol not in attribute_symbols(node.op):
                continue
            application = node.op.apply([None if v is None else v.type for v in node.operands])
            for name, factor in application.factors.items():
                size = application.dims[name].size
                if factor.role is Role.GENERATED and size.as_symbol == self.symbol:
                    for value, dims in zip(node.results, application.results, strict=True):
                        yield from places_of(application, value, dims, name, ONE, size)

    def close(self, function: Function, seeds: frozenset[Place]) -> Closure:
        key = (function.name, seeds)
        found = self.memo.get(key)
        if found is None:
            found = self.memo[key] = self._close(function, seeds)
        return found

    def _close(self, function: Function, seeds: frozenset[Place]) -> Closure:
        places: dict[Value, set[Place]] = {}
        touching: dict[Value, list[Node]] = {}
        for node in function.nodes:
            for value in {*node.inputs, *node.results}:
                touching.setdefault(value, []).append(node)
        pending: dict[Node, None] = {}

        def add(found: Iterable[Place]) -> None:
            for place in found:
                held = places.setdefault(place.value, set())
                if place not in held and place.value.literal is None:
                    held.add(place)
                    pending.update(dict.fromkeys(touching.get(place.value, ())))

        add(seeds)
        add(self.label_seeds(function))
        add(self.generated_seeds(function))
        if self.symbol is not None or self.axis.isidentifier():  # the axis may start again in a callee
            pending.update(dict.fromkeys(n for n in function.nodes if n.op.callee is not None))
        met: dict[Node, list[Encounter]] = {}
        while pending:
            node = next(iter(pending))
            del pending[node]
            here = [p for v in (*node.inputs, *node.results) for p in places.get(v, ())]
            if node.op.callee is not None:
                reached, encounters = self.enter(node, here)
            else:
                reached, encounters = visit(node, here)
            met[node] = encounters
            add(reached)
        if self.symbol is not None:
            for node in function.nodes:
                if node not in met and node.op.callee is None and self.symbol in attribute_symbols(node.op):
                    # The node computes with the axis's length, not along the axis: it makes 2*S numbers, or the number
                    # S.
                    met[node] = [Encounter(node, Resized(), node.scope)]
        flat = tuple(e for node in function.nodes for e in met.get(node, ()))
        return Closure(frozenset(p for held in places.values() for p in held), flat)

    def enter(self, node: Node, here: Sequence[Place]) -> tuple[list[Place], list[Encounter]]:
        """Trace the axis through the callee, starting at the places in the call's operands and results."""
        callee = self.graph.callee(node)
        assert callee is not None
        pairs = [*zip(node.operands, callee.arguments, strict=True)]
        pairs += zip(node.results, callee.results, strict=True)
        inside = {moved(p, formal) for p in here for actual, formal in pairs if actual is p.value}
        closure = self.close(callee, frozenset(inside))
        reached = [
            moved(p, actual)
            for p in closure.places
            for actual, formal in pairs
            if formal is p.value and actual is not None
        ]
        scoped = [replace(e, scope=joined_scope(node.scope, e.scope)) for e in closure.encounters]
        return reached, scoped


def joined_scope(outer: str, inner: str) -> str:
    """Return the path of a scope within another scope."""
    return f"{outer}.{inner}" if outer and inner else outer or inner


def labels_of(graph: Graph) -> set[str]:
    """Return the labels of all dimensions of a graph."""
    values = (v for function in graph.functions.values() for v in ordered_values(function))
    return {f.label for v in values for d in v.type.dims for f in d.factors if f.label is not None}


def named_axes(graph: Graph) -> set[str]:
    """Return the labels of a graph, and the names of axes that its ops imply."""
    return labels_of(graph) | {
        name for name in IMPLIED if any(any(implied_places(f, name)) for f in graph.functions.values())
    }


def ordered_values(function: Function) -> Iterator[Value]:
    """Yield the arguments of a function, and all results of its nodes."""
    yield from function.arguments
    for node in function.nodes:
        yield from node.results
