"""The differences between matched nodes, and the nodes that only one side has, grouped for reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from treadle.comparing.folded_names import few_names, fold_names
from treadle.comparing.matching import Matching, NodeMatch
from treadle.comparing.run_nodes import Read, RunNode, parts_of
from treadle.ir.graph import Node
from treadle.ir.hashing import attribute_key, op_key, type_key
from treadle.ir.text.attributes import attribute_fields, attribute_text
from treadle.reporting.counts import counted


@dataclass(frozen=True)
class NodeGroup:
    """Nodes that only one side has: all nodes of a scope that the other side lacks, or equal ops of several layers.

    scope  the scope that the other side lacks, such as `h.12`; empty for single ops
    ops    the number of nodes of each op
    scopes the scope of each node, and `lines`, the distinct lines of user code
    """

    scope: str
    ops: Mapping[str, int]
    scopes: tuple[str, ...]
    lines: tuple[str, ...]

    @property
    def is_layer(self) -> bool:
        """True for a layer of a stack: a complete scope whose last part is a number."""
        return bool(self.scope) and parts_of(self.scope)[-1].isdigit()

    def as_dict(self) -> dict[str, Any]:
        """Return the group as JSON."""
        whole = {"scope": self.scope, "layer": self.is_layer} if self.scope else {}
        return {**whole, "ops": dict(self.ops), "scopes": list(self.scopes), "lines": list(self.lines)}

    def __str__(self) -> str:
        ops = ", ".join(f"{count} {op}" for op, count in self.ops.items())
        lines = ", ".join(self.lines)
        if self.scope:
            (name,) = fold_names([self.scope])
            kind = "layer" if self.is_layer else "scope"
            return f"{kind} {name}, {counted(sum(self.ops.values()), 'op')}: {ops}  {lines}".rstrip()
        return f"{ops}  {lines}  {few_names(self.scopes)}".rstrip()


@dataclass(frozen=True)
class NodeChange:
    """Matched nodes that differ in the same way, in one or several layers.

    what    the difference: `softmax axis: -1 -> 2`, `attention -> matmul, softmax, matmul`
    kind    ops, attributes, types, constants, weights or operands
    scopes  the scope of each match in b, and `lines`, the distinct lines of user code
    """

    kind: str
    what: str
    scopes: tuple[str, ...]
    lines: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the change as JSON."""
        return {"kind": self.kind, "what": self.what, "scopes": list(self.scopes), "lines": list(self.lines)}

    def __str__(self) -> str:
        times = f"{len(self.scopes)} x " if len(self.scopes) > 1 else ""
        places = f"{', '.join(self.lines)}  {few_names(self.scopes)}"
        return f"{times}{self.what}  {places.strip()}".rstrip()


def node_groups(
    nodes: Iterable[RunNode], whole: Iterable[RunNode], other: Callable[[str], str | None]
) -> tuple[NodeGroup, ...]:
    """Group the nodes that only one side has.

    nodes  the nodes to group
    whole  all nodes of that side
    other  maps a scope to the corresponding scope of the other side; None if it is in a layer that the other side lacks
    """
    found, alone = list(nodes), Counter[tuple[str, ...]]()
    for each in found:
        alone.update(_heads(each))
    total: Counter[tuple[str, ...]] = Counter()
    for each in whole:
        total.update(_heads(each))
    groups: dict[tuple[object, ...], list[RunNode]] = {}
    for each in found:
        heads = _heads(each)
        new = next((head for head in heads if other(".".join(head)) is None), None)
        new = new or next((head for head in heads if alone[head] == total[head] > 1), None)
        if new is not None:
            groups.setdefault((".".join(new),), []).append(each)
        else:
            alike = tuple("#" if part.isdigit() else part for part in parts_of(each.scope))
            groups.setdefault(("", each.op, alike), []).append(each)
    return tuple(
        [
            NodeGroup(str(key[0]), Counter(e.op for e in of), tuple([e.scope for e in of]), _lines(of))
            for key, of in groups.items()
        ]
    )


def _heads(each: RunNode) -> list[tuple[str, ...]]:
    parts = parts_of(each.scope)
    return [parts[: length + 1] for length in range(len(parts))]


def _lines(nodes: Iterable[RunNode]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(each.line for each in nodes if each.line))


def node_changes(matching: Matching) -> tuple[NodeChange, ...]:
    """Return the differences between matched nodes, in the order of b. Equal differences of several layers share an
    entry.
    """
    numbered = list(enumerate(matching.matches))
    homes = (
        {node.number: at for at, match in numbered for node in match.a},
        {node.number: at for at, match in numbered for node in match.b},
    )
    groups: dict[tuple[str, str], list[NodeMatch]] = {}
    for match in matching.matches:
        for kind, what in _differences(match, matching, homes[0], homes[1]):
            groups.setdefault((kind, what), []).append(match)
    return tuple(
        [
            NodeChange(kind, what, tuple([m.b[0].scope for m in of]), _lines([m.b[0] for m in of]))
            for (kind, what), of in groups.items()
        ]
    )


def _differences(
    match: NodeMatch, matching: Matching, home_a: Mapping[int, int], home_b: Mapping[int, int]
) -> Iterator[tuple[str, str]]:
    """Yield each difference between the two sides of a match, as its kind and its text."""
    if len(match.a) != 1 or len(match.b) != 1 or match.a[0].op != match.b[0].op:
        ops = [Counter(each.op for each in side) for side in (match.a, match.b)]
        if ops[0] != ops[1]:
            yield "ops", " -> ".join(_ops_text(each) for each in ops)
        return
    (one,), (other,) = match.a, match.b
    if op_key(one.node.op) != op_key(other.node.op):
        yield from (("attributes", text) for text in _attributes(one.node, other.node))
    types = [" and ".join(map(type_key, [v.type for v in each.node.results])) for each in (one, other)]
    if types[0] != types[1]:
        yield "types", f"{other.op}: {types[0]} -> {types[1]}"
    names = one.node.op.operand_names(len(one.reads))
    for at, (before, after) in enumerate(zip(one.reads, other.reads, strict=False)):
        kind = _other_operand(before, after, matching, home_a, home_b)
        if kind:
            yield kind, f"{other.op} reads another {names[at]}" + ("" if kind == "operands" else f" ({kind[:-1]})")
    if len(one.reads) != len(other.reads):
        yield "operands", f"{other.op}: {len(one.reads)} -> {counted(len(other.reads), 'operand')}"


def _ops_text(ops: Mapping[str, int]) -> str:
    return ", ".join(op if count == 1 else f"{count} {op}" for op, count in ops.items())


def _attributes(one: Node, other: Node) -> Iterator[str]:
    for name in attribute_fields(type(other.op)):
        values = [getattr(node.op, name) for node in (one, other)]
        if attribute_key(values[0]) != attribute_key(values[1]):
            yield f"{other.op.name} {name}: {' -> '.join(map(_attribute_text, values))}"


def _attribute_text(value: Any) -> str:
    text = attribute_text(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _other_operand(
    before: Read, after: Read, matching: Matching, home_a: Mapping[int, int], home_b: Mapping[int, int]
) -> str:
    """Return the kind of difference between two operands, or "" if there is none. If only one side computes the
    operand, the difference belongs to the node that computes it, so the result is "".
    """
    if before[0] == after[0] == "result":
        homes = home_a.get(int(before[1])), home_b.get(int(after[1]))
        return "operands" if None not in homes and homes[0] != homes[1] else ""
    if before[0] != after[0]:
        return "" if "result" in (before[0], after[0]) else "operands"
    if before[0] == "parameter":
        return "" if matching.scopes.in_a(str(after[1])) in (before[1], None) else "weights"
    if before == after:
        return ""
    return "constants" if before[0] == "constant" else "operands"
