"""`graphviz_text`: a graph in the DOT language, with a cluster for each function and each scope.

    dot -Tsvg gpt2.dot -o gpt2.svg

A function is drawn once. A call points to the function's cluster. Node identifiers are numbers. The user's names occur
only in labels, escaped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from treadle.comparing.run_nodes import parts_of
from treadle.exporting.node_facts import NodeFacts
from treadle.files.shown_names import printable
from treadle.ir.analysis.run_counts import count_calls
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.reporting.counts import counted, human


@dataclass(frozen=True, eq=False)
class _Scope:
    """A scope of a function: lines for its nodes, and its inner scopes by name."""

    lines: list[str] = field(default_factory=list)
    parts: dict[str, _Scope] = field(default_factory=dict)

    def within(self, scope: str) -> _Scope:
        """Return the inner scope with this path below this scope; create it if needed."""
        found = self
        for part in parts_of(scope):
            found = found.parts.setdefault(part, _Scope())
        return found


def dot_string(text: str) -> str:
    """Return a double-quoted string of the DOT language that is displayed as this text. Control characters are escaped,
    long text is truncated, and backslashes and HTML entities are not interpreted.
    """
    shown = printable(text) if text else ""
    return '"' + shown.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"') + '"'


def graphviz_text(graph: Graph, facts: NodeFacts) -> str:
    """Return the graph in the DOT language.

    facts  the facts of this graph's nodes
    """
    return "\n".join(["digraph {", *(f"  {line}" for line in _Drawing(graph, facts).lines()), "}", ""])


class _Drawing:
    def __init__(self, graph: Graph, facts: NodeFacts) -> None:
        self.graph, self.facts = graph, facts
        self.calls = count_calls(graph)
        nodes = [node for _, node in graph.walk()]
        self.ids: dict[Node | Value, str] = {node: f"n{number}" for number, node in enumerate(nodes)}
        self.clusters = self.outputs = 0
        self.edges: list[str] = []

    def lines(self) -> Iterator[str]:
        yield f"label={dot_string(self.graph.name)}; labelloc=t; compound=true; fontname=Helvetica;"
        yield 'node [shape=box, style="rounded,filled", fillcolor=white, fontname=Helvetica, fontsize=10];'
        yield "edge [fontname=Helvetica, fontsize=8];"
        functions = list(self.graph.functions.values())
        self.heads = {f.name: (number, self._first(f)) for number, f in enumerate(functions)}
        for number, function in enumerate(functions):
            yield from self._function(function, number)
        yield from self.edges

    def _first(self, function: Function) -> str | None:
        return self.ids[function.nodes[0]] if function.nodes else None

    def _function(self, function: Function, number: int) -> Iterator[str]:
        times = "" if function in self.graph.entries else f", called {counted(self.calls[function.name], 'time')}"
        yield f"subgraph cluster_f{number} {{"
        yield f"  label={dot_string(function.name + times)}; style=rounded; color=gray40;"
        for value in (*function.inputs, *function.states.values()):
            self.ids[value] = f"v{len(self.ids)}"
            label = dot_string(f"{value.name}: {value.type}")
            yield f"  {self.ids[value]} [label={label}, shape=ellipse, fillcolor=lightblue];"
        root = _Scope()
        for node in function.nodes:
            root.within(node.scope).lines.append(self._node(node))
        yield from (f"  {line}" for line in self._scope(root))
        for name, value in (*function.outputs.items(), *function.updated.items()):
            self.outputs += 1
            output = f"o{self.outputs}"
            yield f"  {output} [label={dot_string(name)}, shape=ellipse, fillcolor=lightyellow];"
            self._edge(value, output)
        yield "}"

    def _scope(self, scope: _Scope) -> Iterator[str]:
        yield from scope.lines
        for name, part in scope.parts.items():
            self.clusters += 1
            yield f"subgraph cluster_s{self.clusters} {{"
            yield f"  label={dot_string(name)}; style=rounded; color=gray70;"
            yield from (f"  {line}" for line in self._scope(part))
            yield "}"

    def _node(self, node: Node) -> str:
        own = self.ids[node]
        for value in node.inputs:
            if value.literal is None:
                self._edge(value, own)
        weights = [v.name for v in node.inputs if v.kind == "parameter"]
        if node.op.callee is not None:
            number, head = self.heads.get(node.op.callee, (0, None))
            if head is not None:
                self.edges.append(f"{own} -> {head} [style=dashed, color=gray60, lhead=cluster_f{number}];")
            return f"{own} [label={dot_string(f'call {node.op.callee}')}, fillcolor=gray90];"
        attributes = [f"{name}={text}" for name, text in self.facts.attributes(node).items()]
        cost = self.facts.cost(node)
        tooltip = [str(node.source or ""), node.scope, ", ".join(attributes), ", ".join(weights)]
        tooltip.append(f"{human(cost.flops, 'FLOPs')}, {human(cost.bytes, 'B')}")
        label = dot_string(node.op.name)
        kernel = self.facts.kernel(node)
        return f"{own} [label={label}, tooltip={dot_string('  '.join(filter(None, [*tooltip, kernel])))}];"

    def _edge(self, value: Value, to: str) -> None:
        origin = self.ids.get(value.node if value.node is not None else value)
        if origin is not None:
            self.edges.append(f"{origin} -> {to} [label={dot_string(str(value.type))}];")
