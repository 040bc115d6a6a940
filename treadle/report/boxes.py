"""The nested boxes of a program: functions, scopes and ops, with edges and positions, for every stage.

    boxes = boxes_of(stages, records)
    boxes.as_dict()

A function is a box. Inside, a scope with two ops or more is a box. If a box would have more than 400 ops or boxes,
these are put into inner boxes of 250. A repeated block is a function, which the page draws inside its calls:
consecutive calls of one function are one item with a count. An edge connects two items of one box. If it enters or
leaves a box, the box has a port. Weights, derived weights and constants have no items: the page lists them among the
operands of an op.

The content of a box at a stage is a `body`. Stages with equal content share it. Each item has two positions: one for
this body alone, and a `held` one. The held position is the same at all stages: it follows from the items and edges of
all stages together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

from treadle.ir.graph import Function, Graph, Node, Value
from treadle.report.layout import METRICS, place
from treadle.report.stages import ProgramStage

MOST_ITEMS, CHUNK = 400, 250
"""A box with more than MOST_ITEMS items is divided into boxes of CHUNK consecutive ops."""
FEWEST_MERGED = 4
"""If at least this many ports have the same ends, such as the weights of a trained layer, they are drawn as one;
likewise edges.
"""

Key = tuple[str, ...]
"""The path of a box: the function's name, then scopes."""

_NUMBERED = re.compile(r"\d+")


class _Body:
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


def boxes_of(stages: Sequence[ProgramStage], records: Sequence[Mapping[int, int]]) -> dict[str, Any]:
    """Return the boxes of every stage as data for the page.

    records   for each stage, the index of each node's facts, by the node's number

    bodies    the distinct contents of boxes:
        items   ["op", number, record], ["box", path], ["call", number, record, function, numbers of all calls],
                ["in", value, name, type] or ["out", value, name, type]; a port that stands for several has a list of
                [value, name, type]
        edges   [from, to, value, ...] by position in `items`
        at      [row, center, ...] of each item;  held   the same, in the positions for all stages
        bends   [edge, [x, ...], ...] for an edge that crosses rows;  held_bends  the same, for all stages
        bundles [edge, [value, ...], ...] for an edge that stands for several
    slots     for each box, [kind, row, center, ...] of the held items and bends of all stages
    stages    for each stage, the boxes whose bodies changed: {path: index of a body, or null}
    """
    return _Boxes(stages, records).as_dict()


class _Boxes:
    def __init__(self, stages: Sequence[ProgramStage], records: Sequence[Mapping[int, int]]) -> None:
        self.stages, self.records = stages, records
        self.boxed = self._boxed_scopes()
        self.groups = self._grouped()
        self.chunks: dict[tuple[Key, int], int] = {}
        self.chunked = self._chunked()

    # -- the scopes that are boxes -------------------------------------------------------------------------------

    def _distinct(self) -> Iterator[tuple[ProgramStage, str, Function]]:
        """Yield each distinct function of all stages once."""
        seen: set[int] = set()
        for stage in self.stages:
            for name, function in stage.graph.functions.items():
                if id(function) not in seen:
                    seen.add(id(function))
                    yield stage, name, function

    def _boxed_scopes(self) -> set[Key]:
        boxed: set[Key] = set()
        for _, name, function in self._distinct():
            counts: dict[Key, int] = {}
            for node in function.nodes:
                path = _path(name, node)
                for depth in range(2, len(path) + 1):
                    counts[path[:depth]] = counts.get(path[:depth], 0) + 1
            boxed |= {key for key, count in counts.items() if count > 1}
        return boxed

    def _box_of(self, name: str, node: Node) -> Key:
        """Return the path of the innermost box that contains a node. Scopes that are not boxes are left out."""
        path = _path(name, node)
        while len(path) > 1 and path not in self.boxed:
            path = path[:-1]
        return path

    def _grouped(self) -> dict[Key, str]:
        """Name groups of boxes in a box that would have too many: `layer.0 to layer.249`. Return the group of each of
        them.
        """
        inside: dict[Key, dict[Key, None]] = {}
        for _, name, function in self._distinct():
            for node in function.nodes:
                key = self._box_of(name, node)
                for depth in range(2, len(key) + 1):
                    inside.setdefault(key[: depth - 1], {})[key[:depth]] = None
        names: dict[Key, str] = {}
        for boxes in inside.values():
            order = list(boxes)
            for first in range(0, len(order) if len(order) > MOST_ITEMS else 0, CHUNK):
                part = order[first : first + CHUNK]
                names |= dict.fromkeys(part, f"{part[0][-1]} to {part[-1][-1]}")
        return names

    def _chunked(self) -> set[Key]:
        """Return the boxes with too many ops. Assign each of their ops to a part, in `self.chunks`."""
        large: set[Key] = set()
        for _, name, function in self._distinct():
            counts: dict[Key, int] = {}
            for node in function.nodes:
                key = self._box_of(name, node)
                counts[key] = counts.get(key, 0) + 1
            large |= {key for key, count in counts.items() if count > MOST_ITEMS}
        last: dict[Key, int] = {}
        for stage, name, function in self._distinct() if large else ():
            at: dict[Key, int] = {}
            part: dict[Key, int] = {}
            for node, number in zip(function.nodes, stage.numbers[name], strict=True):
                key = self._box_of(name, node)
                if key not in large:
                    continue
                at[key] = at.get(key, 0) + 1
                known = self.chunks.get((key, number))
                if known is None:
                    known = part.get(key, 0) if key in last else (at[key] - 1) // CHUNK
                    self.chunks[key, number] = known
                part[key] = known
            last |= part
        return large

    def _places(self, name: str, node: Node, number: int) -> Key:
        key = self._box_of(name, node)
        path = key
        if self.groups:
            path = key[:1]
            for depth in range(2, len(key) + 1):
                group = self.groups.get(key[:depth])
                path = (*path, key[depth - 1]) if group is None else (*path, group, key[depth - 1])
        if key in self.chunked:
            first = self.chunks[key, number] * CHUNK
            return (*path, f"ops {first + 1} to {first + CHUNK}")
        return path

    # -- bodies --------------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        functions: dict[int, dict[Key, _Body]] = {}
        index: dict[tuple[Key, tuple[Any, ...]], int] = {}
        bodies: list[tuple[Key, _Body]] = []
        changes: list[dict[str, int | None]] = []
        before: dict[Key, int] = {}
        for stage, records in zip(self.stages, self.records, strict=True):
            now: dict[Key, int] = {}
            for name, function in stage.graph.functions.items():
                if id(function) not in functions:
                    functions[id(function)] = _FunctionBoxes(self, stage, name, function, records).bodies
                for key, body in functions[id(function)].items():
                    content = body.frozen()
                    if (key, content) not in index:
                        index[key, content] = len(bodies)
                        bodies.append((key, body))
                    now[key] = index[key, content]
            root = self._root(stage)
            content = root.frozen()
            if ((), content) not in index:
                index[(), content] = len(bodies)
                bodies.append(((), root))
            now[()] = index[(), content]
            delta: dict[str, int | None] = {text(key): at for key, at in now.items() if before.get(key) != at}
            delta |= {text(key): None for key in before if key not in now}
            changes.append(delta)
            before = now
        held = _held(bodies)
        return {
            "metrics": METRICS,
            "bodies": [_drawn(body, held[key]) for key, body in bodies],
            "slots": {text(key): each.slots() for key, each in held.items()},
            "stages": changes,
        }

    def _root(self, stage: ProgramStage) -> _Body:
        """Return the outermost box, which contains the entries. If there is only one entry, the page opens it in
        place.
        """
        body = _Body()
        for name in stage.graph.entry_names:
            body.items[f"b:{name}"] = ["box", name]
        return body


def result_name(value: Value, graph: Graph) -> str:
    """Return the name of a value. The result of a call has the name of the called function's output."""
    callee = None if value.node is None or value.node.op.callee is None else graph.functions.get(value.node.op.callee)
    outputs = [] if callee is None else list(callee.outputs)
    return outputs[value.index] if value.index < len(outputs) else value.name


def value_key(value: Value, numbers: Mapping[Node, int]) -> str:
    """Return the key of a value in a function: `12.0` for a result of node 12, `i:x` for an input."""
    return f"i:{value.name}" if value.node is None else f"{numbers[value.node]}.{value.index}"


def text(key: Key) -> str:
    """Return the path of a box as a string that is unique among all boxes of a program."""
    return "\x1f".join(key)


def _path(name: str, node: Node) -> Key:
    """Return the function and the scopes of a node. A name and its number are one scope: `layer.0`. The last scope of a
    call is left out.
    """
    found = [name]
    for part in node.scope.split("."):
        if part and _NUMBERED.fullmatch(part) and len(found) > 1:
            found[-1] += f".{part}"
        elif part:
            found.append(part)
    if node.op.callee is not None and len(found) > 1:
        found.pop()
    return tuple(found)


class _FunctionBoxes:
    """The bodies of the boxes of one function at one stage."""

    def __init__(
        self, boxes: _Boxes, stage: ProgramStage, name: str, function: Function, records: Mapping[int, int]
    ) -> None:
        self.bodies: dict[Key, _Body] = {(name,): _Body()}
        self.name, self.boxes, self.graph = name, boxes, stage.graph
        numbers = stage.numbers[name]
        self.where: dict[Node, tuple[Key, str]] = {}
        groups = _call_groups(function, {node: boxes._box_of(name, node) for node in function.nodes})
        number_of = dict(zip(function.nodes, numbers, strict=True))
        for value in function.inputs:
            self._port((name,), "in", f"i:{value.name}", value.name, value, f"i:{value.name}")
        for node, number in number_of.items():
            first = groups.get(node, node)
            if first is not node:
                key, item = self.where[node] = self.where[first]
                self.bodies[key].items[item][4].append(number)
                continue
            key = boxes._places(name, node, number)
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
        self.bodies[key] = _Body()
        self.bodies[key[:-1]].items[_box_item(key)] = ["box", text(key)]

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
    return f"b:{text(key)}"


def _merge_ports(body: _Body) -> None:
    """Merge ports that lead to the same items, or come from the same items, into one port with their values."""
    ends: dict[str, list[str]] = {item: [] for item in body.items if _rank(item) != 1}
    for a, b, _ in body.edges:
        for port, other in ((a, b), (b, a)):
            if port in ends:
                ends[port].append(other)
    alike: dict[tuple[Any, ...], list[str]] = {}
    for port, others in ends.items():
        alike.setdefault((_rank(port), *sorted(others)), []).append(port)
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


def _bundle_edges(body: _Body) -> None:
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


# -- positions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """The row and the center of each item of a box, and the bends of edges between the items, for all stages."""

    at: Mapping[str, tuple[int, float]]
    bends: Mapping[tuple[str, str], tuple[float, ...]]

    def slots(self) -> list[float]:
        """Return [kind, row, center, ...] of every item and bend. A stage that lacks an item leaves its slot empty.

        Kinds are 0 for an item, 1 for a port and 2 for a bend.
        """
        found: list[float] = []
        for item, (row, center) in self.at.items():
            found += [int(_rank(item) != 1), row, center]
        for (a, _), xs in self.bends.items():
            for step, x in enumerate(xs, 1):
                found += [2, self.at[a][0] + step, x]
        return found


def _held(bodies: Sequence[tuple[Key, _Body]]) -> dict[Key, _Held]:
    """Return positions for all stages: a box is laid out once, with the items and edges of all its bodies."""
    items: dict[Key, list[str]] = {}
    edges: dict[Key, dict[tuple[str, str], None]] = {}
    for key, body in bodies:
        order = items.setdefault(key, [])
        known, after = set(order), -1
        for item in body.items:
            if item in known:
                after = order.index(item)
            else:
                after += 1
                order.insert(after, item)
        edges.setdefault(key, {}).update(dict.fromkeys((a, b) for a, b, _ in body.edges))
    found = {}
    for key, order in items.items():
        order = sorted(_downwards(order, edges[key]), key=_rank)
        number = {item: at for at, item in enumerate(order)}
        placed = place(len(order), [(number[a], number[b]) for a, b in edges[key]])
        found[key] = _Held(
            {item: (placed.rows[at], placed.centers[at]) for item, at in number.items()},
            {(order[a], order[b]): xs for (a, b), xs in placed.bends.items()},
        )
    return found


def _downwards(items: Sequence[str], edges: Iterable[tuple[str, str]]) -> list[str]:
    """Return items in an order in which edges lead to later items; otherwise their order stays.

    The program's order is not enough: a box stands at its first op, which may be an early decoding of a weight. Edges
    of different stages, and edges of boxes, may form a cycle. Its first item then comes first.
    """
    place = {item: at for at, item in enumerate(items)}
    below: dict[str, list[str]] = {item: [] for item in items}
    above = dict.fromkeys(items, 0)
    for a, b in edges:
        below[a].append(b)
        above[b] += 1
    ready = [place[item] for item in items if not above[item]]
    rest = iter(items)
    found: dict[str, None] = {}
    while len(found) < len(items):
        item = items[heappop(ready)] if ready else next(each for each in rest if each not in found)
        if item in found:
            continue
        found[item] = None
        for each in below[item]:
            above[each] -= 1
            if not above[each] and each not in found:
                heappush(ready, place[each])
    return list(found)


def _rank(item: str) -> int:
    """Return the sort key of an item: inputs are first, outputs are last, and other items keep the program's order."""
    return {"i": 0, "o": 2, "r": 2}.get(item[0], 1)


def _drawn(body: _Body, positions: _Held) -> dict[str, Any]:
    order = sorted(_downwards(list(body.items), [(a, b) for a, b, _ in body.edges]), key=_rank)
    number = {item: at for at, item in enumerate(order)}
    edges = [(number[a], number[b], value) for a, b, value in body.edges]
    placed = place(len(order), [(a, b) for a, b, _ in edges])
    found = {
        "items": [body.items[item] for item in order],
        "edges": [each for edge in edges for each in edge],
        "at": [each for pair in zip(placed.rows, placed.centers, strict=True) for each in pair],
        "held": [each for item in order for each in positions.at[item]],
        "bends": _flat(placed.bends.get((a, b)) for a, b, _ in edges),
        "held_bends": _flat(positions.bends.get((order[a], order[b])) for a, b, _ in edges),
        "bundles": _flat(body.bundles.get((order[a], order[b])) for a, b, _ in edges),
    }
    return {name: value for name, value in found.items() if value}


def _flat(facts: Iterable[tuple[Any, ...] | None]) -> list[Any]:
    """Return [number of the edge, list, ...] for all edges that have facts."""
    return [part for at, held in enumerate(facts) if held for part in (at, list(held))]
