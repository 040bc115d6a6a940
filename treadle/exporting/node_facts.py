"""Facts of a node that every export contains: attributes, axis rule and cost; and its storage and kernel if planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from treadle.comparing.builds import Build
from treadle.ir.analysis.cost import Cost, graph_cost, node_cost
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.text.attributes import attribute_fields, attribute_text
from treadle.passes.memory.storage_plan import StoragePlan, ValuePlace

Stage = tuple[str, Graph]


def stages_of(build: Build) -> Iterator[Stage]:
    """Yield the graph as declared, and the graph after every pass that changed it, with the name of the pass.

    The stages of an artifact are the graph as declared, the optimized graph, and then the backend's stages. If a pass
    changed the graph twice, its second name ends in a number.
    """
    yield "declared", build.source
    names: dict[str, int] = {}

    def named(name: str) -> str:
        names[name] = names.get(name, 0) + 1
        return name if names[name] == 1 else f"{name} ({names[name]})"

    if build.recorded:
        yield from ((named(r.name), r.graph) for r in build.optimized.log if r.changed and r.graph is not None)
    else:
        yield "optimized", build.optimized.graph
    if build.lowered is not None:
        records = [r for r in build.lowered.log if r.changed or r.products]
        for record in records:
            is_last = record is records[-1]
            graph = build.lowered.graph if is_last else record.graph  # the plan refers to values of this graph
            if graph is not None:
                yield named(record.name), graph


class NodeFacts:
    """Facts of the nodes of one graph at the given sizes of its symbols.

    build  the build that has the graph as a stage; its storage plan and kernels apply to its last stage
    """

    def __init__(self, graph: Graph, sizes: Mapping[str, int], build: Build | None = None) -> None:
        self.sizes = {name: sizes[name] for name in graph.symbols}
        self._costs: dict[str, Cost] = {f: graph_cost(graph, self.sizes, f) for f in graph.functions}
        self._plan: StoragePlan | None = None
        self._kernels: dict[Node, str] = {}
        if build is not None and build.lowered is not None and build.lowered.graph is graph:
            self._plan = build.lowered.plan
            self._kernels = {use.node: use.kernel for use in build.kernels or () if use.node is not None}
        self._places: dict[Value, ValuePlace] = {}
        for planned in self._plan.functions.values() if self._plan is not None else ():
            self._places.update(planned.places)

    def cost(self, node: Node) -> Cost:
        """Return the operations and bytes of a node. The cost of a call is the cost of its function."""
        return node_cost(node, self.sizes, self._costs)

    def attributes(self, node: Node) -> dict[str, str]:
        """Return the op's attributes as text, without those that have their default value."""
        fields = attribute_fields(type(node.op))
        values = {name: getattr(node.op, name) for name in fields}
        return {name: attribute_text(v) for name, v in values.items() if v != fields[name].default}

    def rule(self, node: Node) -> str:
        """Return the op's axis rule; empty for a call."""
        if node.op.callee is not None:
            return ""
        return node.op.axis_rule([None if v is None else v.type.rank for v in node.operands])

    def storage(self, value: Value) -> str:
        """Return the name of a value's storage and its form; empty if no storage is planned."""
        place = self._places.get(value)
        if place is None:
            return ""
        return "registers" if place.storage is None else f"{place.storage.name}, {place.form}".rstrip(", ")

    def kernel(self, node: Node) -> str:
        """Return the kernel that computes a node; empty if a library chooses it."""
        return self._kernels.get(node, "")
