"""Regions: the results of a rewrite or a pass before and after, extracted from the function, over the same free values.

A `Claim` states that values of the function before the change equal values of the function after it. Its two sides are
cut at the values that both sides have, which are then free: a claim that holds for all free values holds for the values
that occur in the function. A claim that does not hold for all free values may still hold for the values that occur. For
example, a mask that was replaced by its meaning is free on one side only, and whether a row of it keeps a key does not
depend on one number. So a claim can be cut at four depths:

    0   around the changed nodes
    1   up to the values that one side reads and the other does not, and through all values that are computed from
        truth values, integers and constants alone: masks, positions, facts about their rows
    2   also through everything but products (matmul, linear, ...) and calls: a product with something else can be any
        number, whatever else its operands are used for, so that its free values are independent
    3   up to the function's arguments

Depths 1 and 3 stop at `MOST_NODES`, so free values may depend on other values; `Claim.tied` returns such a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from treadle.ir.composites import holds_contraction
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Op

Definition = tuple[Op, tuple[Value | None, ...]]
"""An op and its operands."""

DEPTHS = 4
MOST_NODES = 160
"""The number of nodes above which a side is not extended for values that only one side reads."""
_MOST_TIED = 1024
"""The number of nodes above which a side is not extended for values on which its free values depend."""


@dataclass(frozen=True)
class RegionNode:
    """A node with its op and operands, as they were before or are after the change."""

    node: Node
    op: Op
    operands: tuple[Value | None, ...]


@dataclass(frozen=True)
class Region:
    """Two sides of a claim over the same free values, in program order."""

    free: tuple[Value, ...]
    before: tuple[RegionNode, ...]
    after: tuple[RegionNode, ...]


@dataclass(frozen=True)
class Claim:
    """The statement that the values `before` equal the values `after`.

    defined_before, defined_after   return a value's definition on either side; None for arguments and constants
    changed_before, changed_after   return True if a value changed, and so belongs to the innermost cut
    at                              the node at which an error is reported
    """

    before: tuple[Value, ...]
    after: tuple[Value, ...]
    defined_before: Callable[[Value], Definition | None]
    defined_after: Callable[[Value], Definition | None]
    changed_before: Callable[[Value], bool]
    changed_after: Callable[[Value], bool]
    at: Node

    def cut(self, depth: int) -> Region:
        """Return the claim's sides at one of the depths 0 to 3."""
        above: set[Node] = set()
        masks: dict[Value, bool] = {}
        while True:
            before, free_before = self._side(self.before, self.defined_before, self.changed_before, above)
            after, free_after = self._side(self.after, self.defined_after, self.changed_after, above)
            region = Region(tuple({**free_before, **free_after}), tuple(before), tuple(after))
            tied: list[Value] = []
            if depth >= 1:
                tied += [v for v in region.free if self._is_mask(v, masks)]
            if depth == 2:
                tied += self._tied(region)
            wanted: list[Value] = list(free_before.keys() ^ free_after.keys()) if depth in (1, 2) else []
            wanted += region.free if depth == 3 else []
            for values, most in ((wanted + tied, MOST_NODES), (tied, _MOST_TIED)):
                more = {v.node for v in values if v.node is not None and v.node.op.callee is None} - above
                if more and len(before) + len(after) + len(more) <= most:
                    above |= more
                    break
            else:
                return Region(tuple(v for v in region.free if v.literal is None), tuple(before), tuple(after))

    def tied(self, region: Region) -> Value | None:
        """Return a free value that may not have its drawn values in the function, since it is computed from other
        values. Return None if there is none.
        """
        return next(iter(self._tied(region)), None)

    def _tied(self, region: Region) -> list[Value]:
        inside = {*region.free, *(v for step in (*region.before, *region.after) for v in step.node.results)}
        found = []
        for value in region.free:
            definition = self._definition(value)
            if definition is None:
                continue
            op, operands = definition
            read = [v for v in operands if v is not None and v.literal is None]
            of_its_own = value.type.dtype.is_float and (op.callee is not None or _is_product(op, operands, read))
            if not of_its_own or (op.callee is None and inside.issuperset(read)):
                found.append(value)
        return found

    def _definition(self, value: Value) -> Definition | None:
        return self.defined_before(value) or self.defined_after(value)

    def _is_mask(self, value: Value, known: dict[Value, bool]) -> bool:
        """Return True if a value is computed, and holds truth values, integers, or floats computed from truth values
        and integers alone.
        """
        stack = [value]
        while stack:
            each = stack[-1]
            definition = self._definition(each)
            if each in known:
                stack.pop()
            elif definition is None or definition[0].callee is not None:
                known[each] = False
            elif not each.type.dtype.is_float:
                known[each] = True
            else:
                floats = [v for v in definition[1] if v is not None and v.literal is None and v.type.dtype.is_float]
                if unknown := [v for v in floats if v not in known]:
                    stack += unknown
                else:
                    known[each] = all(known[v] for v in floats)
        return known[value]

    @staticmethod
    def _side(
        results: Sequence[Value],
        defined: Callable[[Value], Definition | None],
        changed: Callable[[Value], bool],
        above: set[Node],
    ) -> tuple[list[RegionNode], dict[Value, None]]:
        """Return the nodes that lead to the results, and the values from which these nodes start."""
        steps: dict[Node, RegionNode] = {}
        free: dict[Value, None] = {}
        stack: list[tuple[Value, bool]] = [(v, False) for v in reversed(results)]
        while stack:
            value, through = stack.pop()
            node = value.node
            if node is None or not (changed(value) or node in above) or (definition := defined(value)) is None:
                free[value] = None
            elif through:
                steps.setdefault(node, RegionNode(node, *definition))
            elif node not in steps:
                stack.append((value, True))
                stack += [(v, False) for v in reversed(definition[1]) if v is not None]
        return list(steps.values()), free


def _is_product(op: Op, operands: Sequence[Value | None], read: Sequence[Value]) -> bool:
    """Return True if an op multiplies rows of two or more values that it reads, none of which is a constant."""
    return len(read) > 1 and holds_contraction(op, operands)


def claim_of_match(matched: Sequence[Node], made: Sequence[Node], root: Node, results: Sequence[Value]) -> Claim:
    """Return the claim of a rewrite: the root's results equal the results of the new nodes."""
    inside, new = set(matched), {*matched, *made}
    return Claim(
        root.results,
        tuple(results),
        _live,
        _live,
        lambda v: v.node in inside,
        lambda v: v.node in new,
        root,
    )


def _live(value: Value) -> Definition | None:
    return None if value.node is None else (value.node.op, value.node.operands)


# -- a pass over a whole function ------------------------------------------------------------------------------------


@dataclass
class Recorded:
    """A function as it is before a pass, which will change the function's nodes in place."""

    function: Function
    nodes: list[Node] = field(default_factory=list)
    definitions: dict[Node, Definition] = field(default_factory=dict)
    outputs: dict[str, Value] = field(default_factory=dict)
    updated: dict[str, Value] = field(default_factory=dict)
    arguments: tuple[Value, ...] = ()
    _there: set[Node] = field(default_factory=set)

    @staticmethod
    def of(function: Function) -> Recorded:
        definitions = {node: (node.op, node.operands) for node in function.nodes}
        results = dict(function.outputs), dict(function.updated)
        return Recorded(function, list(function.nodes), definitions, *results, function.arguments)

    def claims(self, graph: Graph, formals: Mapping[str, Sequence[Value]]) -> Iterator[tuple[Claim, list[Reader]]]:
        """Yield the claims of the pass, derived from its changes to the function, each with the readers of the new
        values.

        formals   the arguments that each of the graph's functions had before the pass
        """
        there = set(self.function.nodes)
        self._there = there.intersection(self.definitions)
        places: dict[tuple[Value, Value], list[Reader]] = {}
        for node in self.function.nodes:
            if node not in self._there or self._is_unchanged(node, graph, formals):
                continue
            op, operands = self.definitions[node]
            pairs = [(i, u, v) for i, (u, v) in enumerate(zip(operands, node.operands, strict=False)) if u is not v]
            gone = [
                (i, u, v)
                for i, u, v in pairs
                if u is not None and v is not None and u.node is not None and u.node not in there
            ]
            if op == node.op and len(operands) == len(node.operands) and len(gone) == len(pairs):
                for position, was, now in gone:
                    places.setdefault((was, now), []).append(Reader(node, position))
            else:
                yield self.claim_of_reader(node), [Reader(node, None)]
        results = (self.outputs, self.function.outputs, False), (self.updated, self.function.updated, True)
        for known, given, is_state in results:
            for name, new in given.items():
                old = known.get(name)
                if old is not None and old is not new:
                    places.setdefault((old, new), []).append(Reader(None, name, is_state))
        for (was, now), edges in places.items():
            at = was.node or now.node or edges[0].node or next(iter(self.nodes), None)
            if at is not None:  # a function without nodes returns its arguments
                yield self._claim((was,), (now,), self._there, at), edges

    def claim_of_reader(self, node: Node) -> Claim:
        """Return the claim that a node computes the same as before, although its op or its operands changed."""
        return self._claim(node.results, node.results, self._there - {node}, node)

    def _claim(self, before: Sequence[Value], after: Sequence[Value], common: set[Node], at: Node) -> Claim:
        """Return a claim in which the results of common nodes are free. Each of these results is unchanged, or another
        claim states that it is equal.
        """
        return Claim(
            tuple(before),
            tuple(after),
            lambda v: None if v.node is None else self.definitions.get(v.node),
            _live,
            lambda v: v.node not in common,
            lambda v: v.node not in common,
            at,
        )

    def _is_unchanged(self, node: Node, graph: Graph, formals: Mapping[str, Sequence[Value]]) -> bool:
        found = self.definitions.get(node)
        if found is None:
            return False
        op, operands = found
        if op is node.op or op == node.op:
            return len(operands) == len(node.operands) and all(
                u is v for u, v in zip(operands, node.operands, strict=True)
            )
        # If a function takes fewer arguments, its calls pass fewer. Such a call is unchanged if the function is
        # unchanged.
        if op.callee is None or op.callee != node.op.callee or op.callee not in graph.functions:
            return False
        taken = graph.functions[op.callee].arguments
        passed = dict(zip(formals.get(op.callee, ()), operands, strict=False))
        return len(taken) == len(node.operands) and all(
            passed.get(formal) is given for formal, given in zip(taken, node.operands, strict=True)
        )

    def revert(self, edges: Sequence[Reader], before: Sequence[Value]) -> bool:
        """Restore the old values at these readers. Return False if this needs arguments that the function has lost."""
        if self.function.arguments != self.arguments:
            return False
        for edge in edges:
            if edge.node is None:
                results = self.function.updated if edge.is_state else self.function.outputs
                results[str(edge.where)] = before[0]
            elif edge.where is None:
                edge.node.op, edge.node.operands = self.definitions[edge.node]
            else:
                operands = list(edge.node.operands)
                operands[int(edge.where)] = before[0]
                edge.node.operands = tuple(operands)
        self.function.nodes = self._ordered()
        return True

    def _ordered(self) -> list[Node]:
        """Return the function's nodes, without new nodes that are no longer read, and with old nodes that are read
        again.

        Each node comes after the nodes that compute its operands.
        """
        there = set(self.function.nodes)
        done: dict[Node, None] = {}
        roots = [node for node in self.function.nodes if node in self.definitions]
        roots += [v.node for v in self.function.results if v.node is not None]
        for root in roots:
            stack = [(root, False)]
            while stack:
                node, through = stack.pop()
                if node in done:
                    continue
                if through:
                    done[node] = None
                    continue
                if node not in there and node in self.definitions:
                    node.op, node.operands = self.definitions[node]
                    there.add(node)
                stack.append((node, True))
                stack += [(v.node, False) for v in reversed(node.inputs) if v.node is not None and v.node not in done]
        return list(done)


@dataclass(frozen=True)
class Reader:
    """A reader of a replaced value: an operand of a node, a whole node (None), an output (no node), or the final value
    of a state (is_state).
    """

    node: Node | None
    where: int | str | None
    is_state: bool = False
