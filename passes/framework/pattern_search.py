"""The search for a pattern in a graph. It yields every match at a node, or records the nearest miss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from treadle.ir.errors import GraphError
from treadle.ir.graph import Node, Value
from treadle.ir.literals import Literal
from treadle.ir.types import DType
from treadle.passes.framework.pattern import (
    ConstantTerm,
    EitherTerm,
    Number,
    OpTerm,
    Pattern,
    PatternTerm,
    Wildcard,
)


@dataclass(frozen=True, slots=True)
class Edge:
    """A location in the graph that a part of the pattern must match: an operand or an attribute of a node."""

    node: Node
    where: int | str

    @property
    def found(self) -> Any:
        """The value or attribute at this edge."""
        return self.node.operands[self.where] if isinstance(self.where, int) else getattr(self.node.op, self.where)

    def __str__(self) -> str:
        kind = "operand" if isinstance(self.where, int) else "attribute"
        return f"{kind} {self.where} of {self.node.op.name}"


@dataclass(frozen=True, slots=True)
class Miss:
    """The point at which the furthest attempt stopped: the matched nodes, the number of matched leaves, and the
    mismatch.

    unfit   the number of operands of the node at the edge that do not fit, including the one at the edge
    """

    nodes: tuple[Node, ...]
    leaves: int
    edge: Edge
    wanted: Any
    unfit: int = 1

    @property
    def ops(self) -> int:
        return len(self.nodes)

    @property
    def progress(self) -> tuple[int, int]:
        """A key by which two misses are compared: the one with the greater key got further."""
        return self.ops, self.leaves

    @property
    def hint(self) -> str:
        """The change at the edge with which the search would continue, if it is a change of a number or an
        attribute.
        """
        if isinstance(self.edge.where, str) and not isinstance(self.wanted, Wildcard):
            return f"{self.edge.where}={self.wanted} in {self.edge.node.op.name}"
        if (
            isinstance(self.wanted, ConstantTerm)
            and self.wanted.value is not None
            and self.edge.found.literal is not None
        ):
            return f"{self.wanted.value!r} as {self.edge}"
        return ""

    @property
    def reason(self) -> str:
        return f"expected {_describe_wanted(self.wanted)}, found {_describe(self.edge.found)}"


@dataclass(frozen=True, slots=True)
class Found:
    """One match of a pattern: the captures, and the matched nodes with the root first."""

    captures: Mapping[str, Any]
    nodes: tuple[Node, ...]
    shared: frozenset[Node]


_BFLOAT16_EPS = 2.0**-7
_Goal = tuple[Any, Edge]
_Goals = tuple[_Goal, ...]


class Search:
    """The search for one pattern at one root. After `run` is exhausted, `miss` holds the reason that stopped the best
    attempt.

    Ops are matched first, from the root to the operands. Leaves (wildcards, constants, attributes) are matched after
    all ops, so that a miss with the right structure and a wrong constant is reported as such.
    """

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.miss: Miss | None = None
        self._bound: dict[str, Any] = {}
        self._values: dict[OpTerm, Value] = {}
        self._nodes: list[Node] = []
        self._leaves = 0
        self._unfit: dict[Node, int] = {}

    def run(self, root: Node) -> Iterator[Found]:
        """Yield every match of the pattern with its root at this node."""
        term = self.pattern.root
        for option in term.options if isinstance(term, EitherTerm) else (term,):
            if isinstance(option, OpTerm) and option.op == root.op.name:
                for _ in self._enter(option, root.results[0], (), ()):
                    shared = (v.node for t, v in self._values.items() if t.shared)
                    yield Found(dict(self._bound), tuple(dict.fromkeys(self._nodes)), frozenset(n for n in shared if n))

    def _solve(self, ops: _Goals, leaves: _Goals) -> Iterator[None]:
        if ops:
            (term, edge), rest = ops[0], ops[1:]
            if isinstance(term, EitherTerm):
                options = [o for o in term.options if self._plausible(o, edge.found)]
                if not options:
                    self._missed(edge, term)
                for option in options:
                    yield from self._solve(*_sorted([(option, edge)], rest, leaves))
            elif self._plausible(term, edge.found):
                if term in self._values:
                    yield from self._solve(rest, leaves)
                else:
                    yield from self._enter(term, edge.found, rest, leaves)
            else:
                self._missed(edge, term)
        elif leaves:
            yield from self._leaf(*leaves[0], leaves[1:])
        else:
            yield

    def _enter(self, term: OpTerm, value: Value, ops: _Goals, leaves: _Goals) -> Iterator[None]:
        """Match an op term against the node that computes a value: its operands and attributes become goals."""
        node = value.node
        assert node is not None
        if len(node.operands) != len(term.operands) or (term.name is not None and term.name in self._bound):
            return  # a repeated `either` matched in two ways, and its name is bound to another value
        self._nodes.append(node)
        self._values[term] = value
        attributes: list[_Goal] = [(wanted, Edge(node, name)) for name, wanted in term.attributes]
        if term.name is not None:
            self._bound[term.name] = value
        for order in self._orders(term, node):
            operands = [(t, Edge(node, i)) for t, i in zip(term.operands, order, strict=True)]
            yield from self._solve(*_sorted([*operands, *attributes], ops, leaves))
        if term.name is not None:
            del self._bound[term.name]
        del self._values[term]
        self._nodes.pop()

    def _orders(self, term: OpTerm, node: Node) -> Sequence[Sequence[int]]:
        """Return the orders of operands that are worth trying: the orders in which each operand is of the kind that the
        term requires.

        If there is none, one order in which only op terms lack a match is still tried: the operands that do match show
        how near the miss is.
        """
        both_ways = node.op.commutes and term.operands[0] is not term.operands[1]
        orders: Sequence[Sequence[int]] = ((0, 1), (1, 0)) if both_ways else (range(len(node.operands)),)
        unfit: list[list[int]] = []
        for order in orders:
            found = [node.operands[i] for i in order]
            unfit.append([i for i, t in enumerate(term.operands) if not self._plausible(t, found[i])])
        self._unfit[node] = min(map(len, unfit))
        fitting = [order for order, wrong in zip(orders, unfit, strict=True) if not wrong]
        if fitting:
            return fitting
        order, wrong = min(zip(orders, unfit, strict=True), key=lambda pair: len(pair[1]))
        leaf = next((i for i in wrong if not isinstance(term.operands[i], (OpTerm, EitherTerm))), None)
        if leaf is None:
            return (order,)
        self._missed(Edge(node, order[leaf]), term.operands[leaf])
        return ()

    def _plausible(self, term: PatternTerm | None, value: Value | None) -> bool:
        """Return True if a value matches the term's own kind. The operands of the term are not checked."""
        if term is None:
            return value is None
        if value is None:
            return isinstance(term, EitherTerm) and None in term.options
        if isinstance(term, OpTerm):
            if term in self._values:
                return self._values[term] is value
            return value.node is not None and value.index == 0 and value.node.op.name == term.op
        if isinstance(term, ConstantTerm):
            return value.literal is not None and value.literal.shape == ()
        if isinstance(term, EitherTerm):
            return any(self._plausible(o, value) for o in term.options)
        return True

    def _leaf(self, wanted: Any, edge: Edge, rest: _Goals) -> Iterator[None]:
        found = edge.found
        capture: str | None = None
        if isinstance(wanted, Wildcard):
            known = wanted.name in self._bound
            absent = found is None and isinstance(edge.where, int)
            if absent or (known and not _same(self._bound[wanted.name], found)):
                self._missed(edge, wanted)
                return
            capture = None if known else wanted.name
        elif isinstance(wanted, ConstantTerm):
            number = found.literal.scalar if self._plausible(wanted, found) else None
            if number is None or not (wanted.value is None or _is_wanted(number, wanted, found.type.dtype)):
                self._missed(edge, wanted)
                return
            capture, found = wanted.name, number
        elif isinstance(edge.where, str):
            if found != wanted and found != _coerced(edge.node, edge.where, wanted):
                self._missed(edge, wanted)
                return
        elif found is not wanted:  # the operand must be absent
            self._missed(edge, wanted)
            return
        if capture is not None:
            self._bound[capture] = found
        self._leaves += 1
        yield from self._solve((), rest)
        self._leaves -= 1
        if capture is not None:
            del self._bound[capture]

    def _missed(self, edge: Edge, wanted: Any) -> None:
        best = self.miss
        if best is None or (len(self._nodes), self._leaves) > best.progress:
            unfit = max(self._unfit.get(edge.node, 1), 1)
            self.miss = Miss(tuple(self._nodes), self._leaves, edge, wanted, unfit)


def _sorted(goals: Sequence[_Goal], ops: _Goals, leaves: _Goals) -> tuple[_Goals, _Goals]:
    """Return the open goals with the new ones inserted at the front: terms that need a search in `ops`, and others in
    `leaves`.
    """
    structural = tuple(g for g in goals if isinstance(g[0], (OpTerm, EitherTerm)))
    return structural + ops, leaves + tuple(g for g in goals if not isinstance(g[0], (OpTerm, EitherTerm)))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Value) and isinstance(b, Value):
        return a is b or (a.literal is not None and a.literal == b.literal)
    return bool(a == b)


def _is_wanted(number: Number, term: ConstantTerm, dtype: DType) -> bool:
    """Return True if a constant equals the term's number, or for a `near` term, is at most one spacing of the dtype
    from it.
    """
    assert term.value is not None
    if not dtype.is_float:
        return number == term.value
    if not term.near:
        return number == _rounded(term.value, dtype)
    spacing = _BFLOAT16_EPS if dtype.numpy is None else float(np.finfo(dtype.numpy).eps)
    return bool(abs(number - term.value) <= spacing * abs(term.value))


@lru_cache(maxsize=1024)
def _rounded(wanted: Number, dtype: DType) -> Number | None:
    """Return the number rounded to a float dtype, or None if the number is out of the dtype's range."""
    try:
        return Literal.of(wanted, dtype).scalar
    except GraphError:
        return None


def _coerced(node: Node, attribute: str, wanted: Any) -> Any:
    """Return the attribute as the op itself would store it: "f32" as a dtype, 8 as a size."""
    return getattr(dataclasses.replace(node.op, **{attribute: wanted}), attribute)  # type: ignore[type-var]


def _describe_wanted(wanted: Any) -> str:
    return "no operand" if wanted is None else str(wanted)


def _describe(found: Any) -> str:
    if found is None:
        return "none"
    if not isinstance(found, Value):
        return str(found)
    if found.literal is not None:
        scalar = found.literal.scalar
        return f"constant {found.type}" if scalar is None else f"constant {scalar:g}"
    return found.node.op.name if found.node is not None else f"{found.kind} {found.name}"
