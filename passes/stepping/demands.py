"""The values that a step computes, and the tokens for which they are computed: all new tokens, or only each row's last
token.

Prefill needs only the logits of each row's last token. Backwards from the logits, up to the last op that mixes tokens,
values are computed for that token only. At this attention, only the last token's query is computed, but all keys are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from treadle.ir.analysis.encounters import SelfAttention
from treadle.ir.axes import AxisDim
from treadle.ir.graph import Node, Value
from treadle.passes.stepping.survey import Context, Kind


class Extent(Enum):
    """The tokens for which a value is computed."""

    ALL = "all"
    LAST = "last"


Extents = frozenset[Extent]
ALL, LAST = frozenset({Extent.ALL}), frozenset({Extent.LAST})
_NONE: Extents = frozenset()


@dataclass(frozen=True)
class Demands:
    """The values that one function of a step computes.

    values     the extents in which each value is needed
    last_only  the nodes that are computed only for the last tokens, with the positions of the operands of which the
               last tokens suffice
    """

    values: Mapping[Value, Extents]
    last_only: Mapping[Node, frozenset[int]]

    def of(self, value: Value) -> Extents:
        """Return the extents in which a value is computed. If all tokens are needed, this is the only extent, since it
        includes the last tokens.
        """
        extents = self.values.get(value, _NONE)
        return ALL if Extent.ALL in extents else extents


class Demanding:
    """A search for the values that functions must compute, once for each combination of extents of the outputs."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, tuple[Extents, ...]], Demands] = {}

    def of(self, context: Context, outputs: tuple[Extents, ...]) -> Demands:
        """Return the demands of a function for the extents in which each output is needed."""
        key = (id(context), outputs)  # contexts live as long as the survey
        if key not in self._known:
            self._known[key] = self._found(context, outputs)
        return self._known[key]

    def _found(self, context: Context, outputs: tuple[Extents, ...]) -> Demands:
        wanted: dict[Value, Extents] = {}
        last_only: dict[Node, frozenset[int]] = {}

        def want(value: Value | None, extents: Extents) -> None:
            if value is not None and value.literal is None and extents:
                wanted[value] = wanted.get(value, frozenset()) | (extents if pickable(context, value) else ALL)

        for value, extents in zip(context.function.outputs.values(), outputs, strict=True):
            want(value, extents)
        for node in reversed(context.function.nodes):
            results = [wanted.get(v, _NONE) if context.kind(v) is not Kind.KEPT else _NONE for v in node.results]
            if not any(results):  # the results are unused, or computed by the prologue
                continue
            inner = context.callees.get(node)
            if inner is not None:
                demands = self.of(inner, tuple(results))
                for actual, formal in zip(node.operands, inner.function.arguments, strict=True):
                    if context.kind(actual) is not Kind.KEPT:  # the callee itself stores the values that it reads
                        want(actual, demands.of(formal))
                continue
            queries: frozenset[int] = frozenset()
            if frozenset().union(*results) == LAST and _may_be_last(context, node):
                queries = last_only[node] = _queries(context, node)
            for position, operand in enumerate(node.operands):
                want(operand, LAST if position in queries else ALL)
        return Demands(wanted, last_only)


def pickable(context: Context, value: Value) -> bool:
    """Return True if the last token of each row can be selected: the axis and the rows are each one dimension of the
    value.
    """
    return context.whole_dim(value) is not None and context.row_dim(value) is not None


def _may_be_last(context: Context, node: Node) -> bool:
    """Return True if the last token's results need only the operands' last tokens, apart from the keys that the last
    token attends to.
    """
    values = [*node.results, *(v for v in node.inputs if context.dims(v))]
    if not all(pickable(context, v) for v in values):
        return False
    met = context.encounters.get(node, ())
    if not met:
        return True
    return node.op.pairs is not None and all(isinstance(e.kind, SelfAttention) for e in met)


def _queries(context: Context, node: Node) -> frozenset[int]:
    """Return the positions of the operands of which the last token suffices."""
    held = [i for i, v in enumerate(node.operands) if v is not None and context.dims(v)]
    if node not in context.encounters:
        return frozenset(held)
    assert node.op.pairs is not None
    queries, _ = node.op.pairs
    found = node.op.apply([None if v is None else v.type for v in node.operands])

    def is_query(position: int, dims: tuple[AxisDim, ...] | None) -> bool:
        value = node.operands[position]
        assert value is not None
        assert dims is not None
        return {dims[n].factors for n in context.dims(value)} == {(queries,)}

    return frozenset(i for i in held if is_query(i, found.operands[i]))
