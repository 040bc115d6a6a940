"""The nodes of one run of a graph, with calls expanded. Each node has its path of calls and its full scope.

A repeated block is one function, but two builds may outline different blocks. In a run, a node of layer 3 is a node of
layer 3 in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from treadle.ir.errors import GraphError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.hashing import literal_key

MOST_NODES = 200_000
_MOST_PARTS = 32

Read = tuple[str, str | int, int]
"""The origin of an operand: its kind, its name (for a result the number of its node), and the index of the result."""


@dataclass(frozen=True, eq=False)
class RunNode:
    """A node as a run executes it.

    number    its position in the run
    path      the scopes of the calls that lead to it, each with the number of earlier calls of the same scope
    function  the name of its function, and `index`, its position in that function
    scope     the scopes of the calls and the node's own scope, joined by dots
    reads     the origin of each operand
    """

    number: int
    path: tuple[str, ...]
    function: str
    index: int
    node: Node
    scope: str
    reads: tuple[Read, ...]

    @property
    def op(self) -> str:
        """The op's name."""
        return self.node.op.name

    @property
    def line(self) -> str:
        """The line of user code, or ""."""
        return str(self.node.source or "")


def parts_of(scope: str) -> tuple[str, ...]:
    """Return the parts of a scope: `h`, `0`, `attn`; () for the empty scope. Only the first 32 dots separate parts,
    since a name in a file may consist of dots.
    """
    return tuple(scope.split(".", _MOST_PARTS)) if scope else ()


@dataclass(frozen=True, eq=False)
class GraphRun:
    """All nodes of one run of a graph, one entry after the other."""

    nodes: tuple[RunNode, ...]

    def by_place(self) -> Mapping[tuple[tuple[str, ...], Node], RunNode]:
        """Each node of the run, by its path of calls and its node in the graph."""
        return {(each.path, each.node): each for each in self.nodes}


def run_of(graph: Graph) -> GraphRun:
    """Return the nodes of a run, with the calls of every entry expanded. Raises GraphError for more than 200,000
    nodes.
    """
    found: list[RunNode] = []
    derived: dict[str, Read] = {}
    for entry in graph.entries:
        arguments: dict[Value, Read] = {v: (v.kind, v.name, 0) for v in entry.inputs}
        arguments |= {v: derived.get(name, ("parameter", name, 0)) for name, v in entry.parameters.items()}
        arguments |= {v: ("state", name, 0) for name, v in entry.states.items()}
        _follow(graph, entry, (), "", arguments, found)
        if entry is graph.bind:
            derived = {name: _origin(v, arguments) for name, v in entry.outputs.items()}
    return GraphRun(tuple(found))


def _follow(
    graph: Graph,
    function: Function,
    path: tuple[str, ...],
    scope: str,
    origins: dict[Value, Read],
    nodes: list[RunNode],
) -> None:
    """Append the nodes of a call to `nodes`. `origins` has its arguments; the results are added to it."""
    calls: Counter[str] = Counter()
    for index, node in enumerate(function.nodes):
        reads = tuple([_origin(value, origins) for value in node.operands])
        inside = ".".join(filter(None, (scope, node.scope)))
        callee = graph.callee(node)
        if callee is None:
            if len(nodes) >= MOST_NODES:
                raise GraphError(f"a run of {graph.name} has too many nodes", hint=f"at most {MOST_NODES:,}")
            made = RunNode(len(nodes), path, function.name, index, node, inside, reads)
            nodes.append(made)
            origins.update({v: ("result", made.number, v.index) for v in node.results})
            continue
        key = f"{node.scope or callee.name}#{calls[node.scope]}"
        calls[node.scope] += 1
        inner = dict(zip(callee.arguments, reads, strict=True))
        _follow(graph, callee, (*path, key), inside, inner, nodes)
        origins.update(zip(node.results, [_origin(v, inner) for v in callee.results], strict=True))


def _origin(value: Value | None, origins: Mapping[Value, Read]) -> Read:
    if value is None:
        return ("absent", "", 0)
    found = origins.get(value)
    if found is not None:
        return found
    return ("constant", "" if value.literal is None else literal_key(value.literal), 0)
