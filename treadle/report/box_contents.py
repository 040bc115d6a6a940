"""The content of each box of a function: its items, its edges and its ports.

A repeated block is a function, which the page draws inside its calls: consecutive calls of one function are one item
with a count. An edge connects two items of one box. If it enters or leaves a box, the box has a port. Weights, derived
weights and constants have no items: the page lists them among the operands of an op.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from treadle.ir.graph import Function, Graph, Node, Value
from treadle.report.box_scopes import BoxScopes, Key, path_text
from treadle.report.stages import ProgramStage

FEWEST_MERGED = 4
"""If at least this many ports have the same ends, such as the weights of a trained layer, they are drawn as one;
likewise edges.
"""


class BoxContent:
    """The items and edges of a box at one stage: item keys with their facts, and edges with values."""

    def __init__(self) -> None:
        self.items: dict[str, list[Any]] = {}
        self.edges: dict[tuple[str, str, str], None] = {}
        self.bundles: dict[tuple[str, str], tuple[str, ...]] = {}

    def frozen(self) -> tuple[Any, ...]:
        items = tuple([(key, *_frozen(facts)) for key, facts in self.items.items()])
        return items, tuple(self.edges), tuple(self.bundles.items())


def _frozen(facts: list[Any]) -> Iterator[Any]:
    return (tuple(each) if isinstance(each, list) else each for each in facts)


class FunctionBoxes:
    """The bodies of the boxes of one function at one stage."""

    def __init__(
        self, scopes: BoxScopes, stage: ProgramStage, name: str, function: Function, records: Mapping[int, int]
    ) -> None:
        self.bodies: dict[Key, BoxContent] = {(name,): BoxContent()}
        self.name, self.graph = name, stage.graph
        numbers = stage.numbers[name]
        self.where: dict[Node, tuple[Key, str]] = {}
        groups = _call_groups(function, {node: scopes.box_of(name, node) for node in function.nodes})
        number_of = dict(zip(function.nodes, numbers, strict=True))
        for value in function.inputs:
            self._port((name,), "in", f"i:{value.name}", value.name, value, f"i:{value.name}")
        for node, number in number_of.items():
            first = groups.get(node, node)
            if first is not node:
                key, item = self.where[node] = self.where[first]
                self.bodies[key].items[item][4].append(number)
                continue
            key = scopes.part_of(name, node, number)
            item = f"n:{number}"
            self._open(key)
            facts: list[Any] = ["op", number, records[number]]
            if node.op.callee is not None:
                facts = ["call", number, records[number], node.op.callee, [number]]
            self.bodies[key].items[item] = facts
            self.where[node] = key, item
        for node in function.nodes:
            for value in node.inputs:
                self._edge(value, node)
        for output, value in function.outputs.items() if function is not stage.graph.bind else ():
            self._output(output, value)
        for body in self.bodies.values():
            _merge_ports(body)
            _bundle_edges(body)

    def _open(self, key: Key) -> None:
        """Add a box, as an item of the box that contains it."""
        if key in self.bodies:
            return
        self._open(key[:-1])
        self.bodies[key] = BoxContent()
        self.bodies[key[:-1]].items[_box_item(key)] = ["box", path_text(key)]

    def _port(self, key: Key, kind: str, item: str, label: str, value: Value, name: str) -> str:
        self.bodies[key].items.setdefault(item, [kind, name, label, value.type.text])
        return item

    def _value(self, value: Value) -> str:
        return value_key(value, {} if value.node is None else {value.node: int(self.where[value.node][1][2:])})

    def _edge(self, value: Value, node: Node) -> None:
        if value.kind in ("parameter", "constant", "state"):
            return
        to_box, to_item = self.where[node]
        from_box, from_item = self.where[value.node] if value.node is not None else ((self.name,), f"i:{value.name}")
        if value.node is not None and self.where[value.node] == self.where[node]:
            return  # an edge from one call of a repeated block to the next
        named = self._value(value)
        shared = 0
        while shared < min(len(to_box), len(from_box)) and to_box[shared] == from_box[shared]:
            shared += 1
        for depth in range(len(from_box), shared, -1):
            port = self._port(from_box[:depth], "out", f"o:{named}", result_name(value, self.graph), value, named)
            self.bodies[from_box[:depth]].edges[from_item, port, named] = None
            from_item = _box_item(from_box[:depth])
        inside = to_item
        for depth in range(len(to_box), shared, -1):
            port = self._port(to_box[:depth], "in", f"i:{named}", result_name(value, self.graph), value, named)
            self.bodies[to_box[:depth]].edges[port, inside, named] = None
            inside = _box_item(to_box[:depth])
        self.bodies[to_box[:shared]].edges[from_item, inside, named] = None

    def _output(self, output: str, value: Value) -> None:
        if value.node is None and value.kind != "input":
            return
        named = self._value(value)
        root = (self.name,)
        item = f"i:{value.name}"
        if value.node is not None:
            box, item = self.where[value.node]
            for depth in range(len(box), 1, -1):
                port = self._port(box[:depth], "out", f"o:{named}", result_name(value, self.graph), value, named)
                self.bodies[box[:depth]].edges[item, port, named] = None
                item = _box_item(box[:depth])
        port = self._port(root, "out", f"r:{output}", output, value, named)
        self.bodies[root].edges[item, port, named] = None


def _box_item(key: Key) -> str:
    return f"b:{path_text(key)}"


def _merge_ports(body: BoxContent) -> None:
    """Merge ports that lead to the same items, or come from the same items, into one port with their values."""
    ends: dict[str, list[str]] = {item: [] for item in body.items if item_rank(item) != 1}
    for a, b, _ in body.edges:
        for port, other in ((a, b), (b, a)):
            if port in ends:
                ends[port].append(other)
    alike: dict[tuple[Any, ...], list[str]] = {}
    for port, others in ends.items():
        alike.setdefault((item_rank(port), *sorted(others)), []).append(port)
    merged: dict[str, str] = {}
    for ports in alike.values():
        if len(ports) >= FEWEST_MERGED:
            merged |= dict.fromkeys(ports, f"{ports[0]}+")
    if not merged:
        return
    items: dict[str, list[Any]] = {}
    for item, facts in body.items.items():
        if item not in merged:
            items[item] = facts
            continue
        kind, *value_facts = facts
        held = items.setdefault(merged[item], [kind, f"g:{value_facts[0]}", "", "", ()])
        held[4] = (*held[4], tuple(value_facts))
        held[2] = f"{len(held[4])} {'inputs' if kind == 'in' else 'outputs'}"
    edges: dict[tuple[str, str, str], None] = {}
    for a, b, value in body.edges:
        joined = merged.get(a) or merged.get(b)
        edges[merged.get(a, a), merged.get(b, b), value if joined is None else items[joined][1]] = None
    body.items, body.edges = items, edges


def _bundle_edges(body: BoxContent) -> None:
    """Merge edges between the same two items into one edge with their values."""
    values: dict[tuple[str, str], list[str]] = {}
    for a, b, value in body.edges:
        values.setdefault((a, b), []).append(value)
    if all(len(held) < FEWEST_MERGED for held in values.values()):
        return
    edges: dict[tuple[str, str, str], None] = {}
    for (a, b), held in values.items():
        if len(held) < FEWEST_MERGED:
            edges |= dict.fromkeys((a, b, value) for value in held)
        else:
            edges[a, b, f"g:{held[0]}"] = None
            body.bundles[a, b] = tuple(held)
    body.edges = edges


def _call_groups(function: Function, boxes: Mapping[Node, Key]) -> dict[Node, Node]:
    """Return, for each call, the first call of the group that is drawn as one item: calls of one function in one box.

    A call joins the earlier calls of its group unless it reads a value that another op computed from them. In that
    case, the item would be both above and below that op.
    """
    first: dict[tuple[Key, str], Node] = {}
    groups: dict[Node, Node] = {}
    after: dict[Node, set[tuple[Key, str]]] = {}
    """For each other node, the groups that it depends on."""
    for node in function.nodes:
        callee = node.op.callee
        key = (boxes[node], callee) if callee is not None else None
        held: set[tuple[Key, str]] = set()
        through: set[tuple[Key, str]] = set()
        for value in node.inputs:
            if value.node is None:
                continue
            above = after.get(value.node, _NO_GROUPS)
            held |= above
            if key is None or groups.get(value.node) is None or groups.get(value.node) is not first.get(key):
                through |= above
        if key is not None:
            if key not in first or key in through:
                first[key] = node
            groups[node] = first[key]
            held.add(key)
        if held:
            after[node] = held
    return groups


_NO_GROUPS: set[tuple[Key, str]] = set()


def item_rank(item: str) -> int:
    """Return the sort key of an item: inputs are first, outputs are last, and other items keep the program's order."""
    return {"i": 0, "o": 2, "r": 2}.get(item[0], 1)


def result_name(value: Value, graph: Graph) -> str:
    """Return the name of a value. The result of a call has the name of the called function's output."""
    callee = None if value.node is None or value.node.op.callee is None else graph.functions.get(value.node.op.callee)
    outputs = [] if callee is None else list(callee.outputs)
    return outputs[value.index] if value.index < len(outputs) else value.name


def value_key(value: Value, numbers: Mapping[Node, int]) -> str:
    """Return the key of a value in a function: `12.0` for a result of node 12, `i:x` for an input."""
    return f"i:{value.name}" if value.node is None else f"{numbers[value.node]}.{value.index}"
