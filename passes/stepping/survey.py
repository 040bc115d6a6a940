"""The kind of each value of a model at a generation step: fixed, kept from the prologue, or computed at every step.

    FIXED     it depends on weights and constants only
    KEPT      it depends on an input, but not on the tokens: an encoder's output, the keys of cross-attention
    STEPPED   it depends on the tokens along the axis, or on their positions

A function is surveyed once per context: the kinds of its arguments, and the arguments' dimensions that are the axis or
the rows (`treadle.ir.analysis.axis_tracing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from treadle.ir.analysis.axis_places import Place, moved, visit
from treadle.ir.analysis.axis_tracing import Tracer
from treadle.ir.analysis.encounters import Encounter, Resized
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.text.attributes import attribute_symbols


class Kind(IntEnum):
    """The kind of a value at a step. A value that is computed from several values has the greatest of their kinds."""

    FIXED = 0
    KEPT = 1
    STEPPED = 2


@dataclass(frozen=True)
class Context:
    """A function whose arguments have known kinds.

    kinds       the kind of each value
    axis, rows  the dimensions of the axis and the rows of the batch, for each value that has them
    encounters  the encounters of each node with the axis (`treadle.ir.analysis.encounters`); calls have none
    callees     the context of each call
    """

    function: Function
    kinds: dict[Value, Kind]
    axis: Mapping[Value, Sequence[Place]]
    rows: Mapping[Value, Sequence[Place]]
    encounters: dict[Node, Sequence[Encounter]] = field(default_factory=dict)
    callees: dict[Node, Context] = field(default_factory=dict)

    def kind(self, value: Value | None) -> Kind:
        """Return a value's kind; a constant is fixed."""
        return Kind.FIXED if value is None or value.literal is not None else self.kinds[value]

    def dims(self, value: Value) -> frozenset[int]:
        """Return the dimensions of a value that contain the axis."""
        return frozenset(place.dim for place in self.axis.get(value, ()))

    def whole_dim(self, value: Value) -> int | None:
        """Return the dimension of a value that consists of the axis alone, or None if there is none, or there are
        two.
        """
        return _whole(value, self.axis.get(value, ()))

    def reads_positions(self, node: Node) -> bool:
        """Return True if results depend on the operands' positions along the axis although the op maps the axis: for
        example a window over keys that do not extend along the axis.
        """
        if not node.op.reads_positions or not any(v is not None and self.dims(v) for v in node.operands):
            return False
        application = node.op.apply([None if v is None else v.type for v in node.operands])
        return any(
            not node.op.positional.isdisjoint(dims[n].factors)
            for value, dims in zip(node.operands, application.operands, strict=True)
            if value is not None and dims is not None
            for n in self.dims(value)
        )

    def row_dim(self, value: Value) -> int | None:
        """Return the dimension of a value that consists of the rows of the batch alone, or None if there is none."""
        return _whole(value, self.rows.get(value, ()))


def _whole(value: Value, places: Sequence[Place]) -> int | None:
    dims = {p.dim if p.inner == 1 and p.size == value.type.shape[p.dim] else None for p in places}
    return next(iter(dims)) if len(dims) == 1 else None


class Survey:
    """A survey of the functions of a graph, each context once.

    axis   the symbol along which tokens are added
    rows   the symbol of the batch
    """

    def __init__(self, graph: Graph, axis: str, rows: str) -> None:
        self.graph, self.axis, self.rows = graph, axis, rows
        self._axis, self._rows = Tracer(graph, axis), Tracer(graph, rows)
        self._known: dict[tuple[str, tuple[Kind, ...], frozenset[Place], frozenset[Place]], Context] = {}
        main = graph.main
        along = frozenset(self._axis.seeds())
        held = {p.value for p in along}
        kinds = [
            Kind.FIXED if v.kind == "parameter" else Kind.STEPPED if v in held else Kind.KEPT for v in main.arguments
        ]
        self.main = self._context(main, kinds, along, frozenset(self._rows.seeds()))

    def _context(
        self, function: Function, arguments: Sequence[Kind], axis: frozenset[Place], rows: frozenset[Place]
    ) -> Context:
        key = (function.name, tuple(arguments), axis, rows)
        if key not in self._known:
            self._known[key] = self._surveyed(function, arguments, axis, rows)
        return self._known[key]

    def _surveyed(
        self, function: Function, arguments: Sequence[Kind], axis: frozenset[Place], rows: frozenset[Place]
    ) -> Context:
        context = Context(
            function,
            dict(zip(function.arguments, arguments, strict=True)),
            _by_value(self._axis.close(function, axis).places),
            _by_value(self._rows.close(function, rows).places),
        )
        for node in function.nodes:
            callee = self.graph.callee(node)
            if callee is not None:
                inner = self._enter(context, node, callee)
                found = [inner.kind(v) for v in callee.results]
            else:
                here = [p for v in (*node.inputs, *node.results) for p in context.axis.get(v, ())]
                met = visit(node, here)[1] if here else []
                if self.axis in attribute_symbols(node.op) and not here:
                    met = [Encounter(node, Resized(), node.scope)]
                if met:
                    context.encounters[node] = met
                found = [self._kind(context, node)] * len(node.results)
            context.kinds.update(zip(node.results, found, strict=True))
        return context

    def _enter(self, context: Context, node: Node, callee: Function) -> Context:
        pairs = [*zip(node.operands, callee.arguments, strict=True)]
        pairs += zip(node.results, callee.results, strict=True)

        def inside(places: Mapping[Value, Sequence[Place]]) -> frozenset[Place]:
            return frozenset(
                moved(p, formal) for actual, formal in pairs if actual is not None for p in places.get(actual, ())
            )

        kinds = [context.kind(v) for v in node.operands]
        found = self._context(callee, kinds, inside(context.axis), inside(context.rows))
        context.callees[node] = found
        return found

    def _kind(self, context: Context, node: Node) -> Kind:
        symbols = attribute_symbols(node.op).union(*(v.type.symbols for v in node.results))
        if self.axis in symbols or any(v in context.axis for v in node.results):
            return Kind.STEPPED
        read = max((context.kind(v) for v in node.inputs), default=Kind.FIXED)
        return max(read, Kind.KEPT if symbols - {self.rows} else Kind.FIXED)


def _by_value(places: frozenset[Place]) -> dict[Value, list[Place]]:
    found: dict[Value, list[Place]] = {}
    for place in places:
        found.setdefault(place.value, []).append(place)
    return found
