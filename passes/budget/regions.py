"""Runs of nodes that can be computed one part of an axis at a time, by their axis rules.

    region = find_region(graph, function, nodes, dim=0)
    region.dims[v]       the dimension of v along the axis; a value that is not in `dims` is the same for all parts

The axis is dimension `dim` of the nodes' results. It is traced through the nodes' rules, backwards and forwards, and
into calls. Every node must map the axis, so that a part of its results depends only on that part of its operands. In
each value, the axis must be one whole dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from treadle.ir.analysis.axis_places import Place
from treadle.ir.analysis.axis_tracing import Tracer
from treadle.ir.analysis.encounters import Encounter, Generated
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.sizing.sizes import ONE, Size


@dataclass(frozen=True, eq=False)
class CutRegion:
    """Consecutive nodes of a function, and an axis that they map.

    dims     the dimension along the axis, for each input, parameter and result that has the axis
    inputs   values from outside that the nodes read, in order; no constants
    outputs  values that other nodes read, or that are results of the function
    size     the size of the axis
    """

    function: Function
    nodes: tuple[Node, ...]
    dims: Mapping[Value, int]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    size: Size


def find_region(
    graph: Graph, function: Function, nodes: Sequence[Node], dim: int, tracer: Tracer | None = None
) -> CutRegion | None:
    """Return the nodes as a region along dimension `dim` of the first value that they return. Return None if they are
    not a region.

    tracer  a tracer of the graph, shared by several regions of the unchanged graph: it caches the effects of callees
    """
    inside = set(nodes)
    inputs = outside_values(nodes)
    outputs = given_values(function, inside, nodes)
    if not outputs or any(node.op.updates or any(v.kind == "state" for v in node.inputs) for node in nodes):
        return None
    if any(node.op.meets_ranks for node in nodes):  # a collective per part would not match the other ranks' calls
        return None
    first = outputs[0]
    if dim >= first.type.rank or first.type.shape[dim] == ONE:
        return None
    size = first.type.shape[dim]
    part = Function(f"{function.name} from {function.nodes.index(nodes[0])} to {function.nodes.index(nodes[-1])}")
    part.inputs, part.nodes = list(inputs), list(nodes)
    dims = dims_along(graph, part, [Place(first, dim, ONE, size)], tracer)
    if dims is None or any(v not in dims or v.layout is not None for v in outputs):
        return None
    if any(v in dims and (v.kind == "parameter" or v.layout is not None) for v in inputs):
        return None
    return CutRegion(function, tuple(nodes), dims, inputs, outputs, size)


def outside_values(nodes: Sequence[Node]) -> tuple[Value, ...]:
    """Return the values that nodes read and none of them computes, each once; no constants."""
    made = {v for node in nodes for v in node.results}
    return tuple(dict.fromkeys(v for n in nodes for v in n.inputs if v not in made and v.literal is None))


def given_values(function: Function, inside: set[Node], nodes: Iterable[Node]) -> tuple[Value, ...]:
    """Return the values computed by `nodes` that nodes outside of `inside` read, or that are results of the
    function.
    """
    read = {v for node in function.nodes if node not in inside for v in node.inputs} | {*function.results}
    return tuple([v for node in nodes for v in node.results if v in read])


def dims_along(
    graph: Graph, function: Function, seeds: Sequence[Place], tracer: Tracer | None = None
) -> dict[Value, int] | None:
    """Return the dimension along an axis, for each value of a function that has the axis. The axis starts at `seeds`.

    Return None if a node does more than map the axis, or if the axis is a part of a value's dimension, or occurs in it
    twice.
    """
    closure = (tracer or Tracer(graph, "")).close(function, frozenset(seeds))
    if not all(map(_is_harmless, closure.encounters)):
        return None
    dims: dict[Value, int] = {}
    for place in closure.places:
        whole = place.inner == ONE and place.size == place.value.type.shape[place.dim]
        if not whole or dims.setdefault(place.value, place.dim) != place.dim:
            return None
        if len(place.value.type.dims[place.dim].factors) > 1:
            return None
    return dims


def _is_harmless(met: Encounter) -> bool:
    """Return True if an op generates elements along the axis that are all equal. A smaller number of them is then a
    part.
    """
    if not isinstance(met.kind, Generated):
        return False
    node = met.node
    types = [None if v is None else v.type for v in node.operands]
    dims = node.op.apply(types).results[0]
    along = [axis for axis, dim in enumerate(dims) if met.kind.factor in dim.factors]
    return bool(along) and {*along} <= {*node.op.repeats(types)}
