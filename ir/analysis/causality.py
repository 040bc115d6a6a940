"""`is_causal`: whether an output of a model depends on later tokens, also for models that have no decoding step.

A decoding step needs more: each op on the way must keep a state (`treadle.ir.analysis.following.Following.step`). A
token shift, as in RWKV, or a causal convolution is causal, but has no step.

The analysis carries, for each value, the dimensions that extend along the axis, each with its **lookahead** n: position
p reads the tokens up to p + n. Ops that move an axis say their lookahead (`Op.lookahead`), so shifting back by one
position and then reading one position ahead is causal again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treadle.ir.analysis.following import follow
from treadle.ir.axes import Application, Role
from treadle.ir.composites import body_of
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Composite, Op
from treadle.ir.ops.axis_names import place
from treadle.ir.text.attributes import attribute_symbols

Reads = Mapping[int, int]
"""The lookahead of a value, for each dimension along the axis: an element reads the tokens up to the greatest position
plus lookahead. If it is empty, the value depends on no token.
"""

_UNKNOWN = None
"""The value may depend on any token."""


def is_causal(graph: Graph, axis: str, output: str) -> bool:
    """Return True if each position of an output along an axis depends only on the inputs' positions up to its own.

    axis    the symbol of the axis, such as "S"
    output  the output's name

    False does not mean that later positions are read: the analysis may not find that an op is causal.
    """
    if follow(graph, axis).step():
        return True
    main = graph.main
    reads: dict[Value, Reads | None] = {}
    for value in main.inputs:
        reads[value] = {dim: 0 for dim, size in enumerate(value.type.shape) if size.as_symbol == axis}
    _Causality(graph, axis).run(main, reads)
    result = main.outputs[output]
    found = reads.get(result, {})
    if found is None or len(found) > 1:  # a pair of positions reads up to the later one
        return False
    return all(ahead <= 0 and result.type.shape[dim].as_symbol == axis for dim, ahead in found.items())


class _Causality:
    """The analysis of the functions of a graph."""

    def __init__(self, graph: Graph, axis: str) -> None:
        self._graph, self._axis = graph, axis

    def run(self, function: Function, reads: dict[Value, Reads | None]) -> None:
        """Add the values that the nodes of a function compute. `reads` has the function's arguments."""
        for node in function.nodes:
            operands = [{} if value is None else reads.get(value, {}) for value in node.operands]
            reads.update(zip(node.results, self._results(node, operands), strict=True))

    def _results(self, node: Node, operands: Sequence[Reads | None]) -> Sequence[Reads | None]:
        """Return what a node's results read, from what its operands read."""
        unknown: list[Reads | None] = [_UNKNOWN] * len(node.results)
        known = [each for each in operands if each is not None]
        if len(known) < len(operands):
            return unknown
        if (callee := self._graph.callee(node)) is not None:
            return self._inside(callee, callee.arguments, known)
        types = [None if value is None else value.type for value in node.operands]
        if not any(known):
            return unknown if self._reads_length(node.op, node.op.apply(types)) else [{}] * len(node.results)
        found = _moved(node, known) if node.op.lookahead(types) is not None else _mapped(node.op.apply(types), known)
        if found is None and isinstance(node.op, Composite) and node.op.pairs is None:
            body = body_of(node.op, types)
            present = [each for each, value in zip(known, node.operands, strict=True) if value is not None]
            return self._inside(body, body.inputs, present)
        return unknown if found is None else found

    def _reads_length(self, op: Op, application: Application) -> bool:
        """Return True if an op without the axis in its operands computes with the axis's length, which later tokens
        change: the number S, not the positions up to S.
        """
        generated = [name for name, factor in application.factors.items() if factor.role is Role.GENERATED]
        along = any(application.dims[name].size.as_symbol == self._axis for name in generated)
        return self._axis in attribute_symbols(op) and not along

    def _inside(
        self, function: Function, arguments: Sequence[Value], operands: Sequence[Reads]
    ) -> Sequence[Reads | None]:
        reads: dict[Value, Reads | None] = dict(zip(arguments, operands, strict=True))
        self.run(function, reads)
        return [reads.get(value, {}) for value in function.results]


def _moved(node: Node, operands: Sequence[Reads]) -> list[Reads] | None:
    """Return what the result of an op reads that moves the positions of its attribute `axis`."""
    types = [None if value is None else value.type for value in node.operands]
    found: dict[int, int] = {}
    for value, reads, ahead in zip(node.operands, operands, node.op.lookahead(types) or (), strict=True):
        assert value is not None
        along = place(node.op.axis, value.type.rank)  # type: ignore[attr-defined]
        for dim, known in reads.items():
            if dim == along and ahead is None:
                return None
            moved = known + (ahead or 0) if dim == along else known
            found[dim] = max(moved, found.get(dim, moved))
    return [found]


def _mapped(application: Application, operands: Sequence[Reads]) -> list[Reads] | None:
    """Return what the results of an op read by its axis rule; None if a result may read any position."""
    ahead: dict[str, int] = {}
    for dims, reads in zip(application.operands, operands, strict=True):
        for dim, known in reads.items():
            assert dims is not None
            if len(dims[dim].factors) != 1:
                return None
            (name,) = dims[dim].factors
            factor = application.factors[name]
            match factor.role:
                case Role.MAPPED | Role.SCANNED:
                    reader = name
                case Role.WHOLE if factor.limit is not None:
                    reader = factor.limit
                    if application.dims[reader].size != application.dims[name].size:
                        return None
                case _:
                    return None
            ahead[reader] = max(known, ahead.get(reader, known))
    results: list[Reads] = []
    for dims in application.results:
        held = {name: dim for dim, each in enumerate(dims) for name in each.factors}
        if any(name not in held or dims[held[name]].factors != (name,) for name in ahead):
            return None
        results.append({held[name]: known for name, known in ahead.items()})
    return results
