"""Models that return only their last position, such as the last token's logits, with all positions as results.

x = layer(tokens)                               x = layer(tokens)
y = slice(x, axis=1, start=-1)          -->
logits = linear(y, w)       # B 1 V             logits = linear(x, w)       # B S V

A step computes what the model returns for each prefix of the tokens. If each op after the slice maps the axis, the
position n of the new result is the old result for the first n + 1 tokens. An op that reads positions, such as attention
from position S-1, reads them from 0.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treadle.ir.axes import Application, AxisDim, Role
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.naming import free_name
from treadle.ir.operation import Op
from treadle.ir.ops.axis_names import axis_letters, place
from treadle.ir.ops.call import Call
from treadle.ir.ops.parts import Slice
from treadle.ir.ops.shapes import Rearrange
from treadle.ir.sizing.sizes import ONE, Size
from treadle.ir.transforms.clone import clone_node, clone_value, copied_value

_AXES = re.compile(r"\([^()]*\)|\S+")
"""An axis in the pattern of a rearrange: a name, a number, or several of them in parentheses."""


def with_all_positions(graph: Graph, axis: str) -> Graph | None:
    """Return a graph that returns all positions along an axis of inputs where this graph returns the last one.

    A result [B, 1, V] or [B, V] of the last position becomes [B, S, V]. Returns None if no output is a function of the
    last position alone, or if some op after the slice does more with the axis than map it.
    """
    widening = _Widening(graph, Size.symbol(axis))
    try:
        main = widening.function(graph.main, {})
    except _NotWidenedError:
        return None
    if not any(main.axes):
        return None
    made = Graph(graph.name)
    made.symbols, made.initial, made.generated = dict(graph.symbols), dict(graph.initial), dict(graph.generated)
    made.entry_names = graph.entry_names
    made.functions = {**widening.functions, graph.main.name: main.function}
    return made


class _NotWidenedError(Exception):
    """The signal that some op does more with an axis than map it."""


@dataclass(frozen=True)
class _Wide:
    """A function whose results may have all positions.

    axes   for each result the dimension that has all positions in place of the last one; None: the result is unchanged
    """

    function: Function
    axes: tuple[int | None, ...]


@dataclass
class _Widening:
    """A builder of functions in which values of the last position have all positions.

    functions   the functions made so far, by name, callees first
    """

    graph: Graph
    size: Size
    functions: dict[str, Function] = field(default_factory=dict)
    copies: dict[tuple[str, tuple[tuple[int, int], ...]], _Wide] = field(default_factory=dict)

    def callee(self, whole: Function, arguments: Mapping[int, Value], axes: Mapping[int, int]) -> _Wide:
        """Return a function for a call whose operands at some places have all positions."""
        key = whole.name, tuple(sorted(axes.items()))
        if key not in self.copies:
            made = self.function(whole, {n: (v, axes[n]) for n, v in arguments.items()})
            if whole.name in self.functions:
                made.function.name = free_name(f"{whole.name}_all", self.functions)
            self.functions[made.function.name] = made.function
            self.copies[key] = made
        return self.copies[key]

    def function(self, whole: Function, arguments: Mapping[int, tuple[Value, int]]) -> _Wide:
        """Return a copy of a function.

        arguments   by the place of an argument: the operand of a call that has all positions, and its dimension
        """
        copy, body = Function(whole.name), _Body(self, whole)
        for at, value in enumerate(whole.arguments):
            made = clone_value(value)
            if at in arguments:
                operand, axis = arguments[at]
                made = Value(value.kind, operand.type, value.name)
                body.axes[value] = axis
            body.values[value] = made
        copy.inputs = [body.now(v) for v in whole.inputs]
        copy.parameters = {name: body.now(v) for name, v in whole.parameters.items()}
        copy.states = {name: body.now(v) for name, v in whole.states.items()}
        for node in whole.nodes:
            copy.nodes += body.copies(node)
        copy.outputs = {name: body.now(v) for name, v in whole.outputs.items()}
        copy.updated = {name: body.now(v) for name, v in whole.updated.items()}
        return _Wide(copy, tuple(body.axes.get(v) for v in whole.results))


@dataclass
class _Body:
    """The values of one function while it is copied.

    values   the copy of each value
    axes     the dimension of a copy that has all positions, for each value of the last position alone
    """

    widening: _Widening
    whole: Function
    values: dict[Value | None, Value | None] = field(default_factory=lambda: {None: None})
    axes: dict[Value, int] = field(default_factory=dict)

    def now(self, value: Value) -> Value:
        return copied_value(value, self.values, self.whole)

    def copies(self, node: Node) -> list[Node]:
        """Return the nodes that replace a node: none for a slice of the last position."""
        axis = _last_position(node, self.widening.size)
        if axis is not None and node.inputs[0] not in self.axes:
            self.values[node.result], self.axes[node.result] = self.now(node.inputs[0]), axis
            return []
        callee = self.widening.graph.callee(node)
        if callee is not None:
            return [self._call(node, callee)]
        wide = {n: self.axes[v] for n, v in enumerate(node.operands) if v is not None and v in self.axes}
        if not wide:
            return [clone_node(node, self.values, self.whole)]
        operands = [None if v is None else self.now(v) for v in node.operands]
        op, axes = _widened(node, operands, wide, self.widening.size)
        self.axes.update(zip(node.results, axes, strict=True))
        return [self._stand(node, Node(op, operands, op.infer_for(operands), None, node.scope, node.source))]

    def _call(self, node: Node, callee: Function) -> Node:
        operands = [None if v is None else self.now(v) for v in node.operands]
        pairs = list(enumerate(zip(node.operands, operands, strict=True)))
        wide = {n: (new, self.axes[old]) for n, (old, new) in pairs if old is not None and old in self.axes}
        arguments = {n: new for n, (new, _) in wide.items() if new is not None}
        made = self.widening.callee(callee, arguments, {n: axis for n, (_, axis) in wide.items()})
        self.axes.update((v, axis) for v, axis in zip(node.results, made.axes, strict=True) if axis is not None)
        op = Call.of(made.function)
        return self._stand(node, Node(op, operands, op.infer_for(operands), None, node.scope, node.source))

    def _stand(self, old: Node, new: Node) -> Node:
        for before, after in zip(old.results, new.results, strict=True):
            after.name = before.name
            self.values[before] = after
        return new


def _last_position(node: Node, size: Size) -> int | None:
    """Return the axis along which a node takes the last position, or None."""
    op = node.op
    if not isinstance(op, Slice) or op.stride != 1:
        return None
    x = node.inputs[0].type
    axis = place(op.axis, x.rank)
    return axis if x.shape[axis] == size and op.span(size) == (size - ONE, size) else None


def _widened(
    node: Node, operands: Sequence[Value | None], wide: Mapping[int, int], size: Size
) -> tuple[Op, tuple[int, ...]]:
    """Return the op of a node for all positions, and the dimension of each result that has them.

    wide   for the operands that have all positions: their dimension

    Raises _NotWidenedError if there is no such op.
    """
    types = [None if v is None else v.type for v in operands]
    old = node.op.apply([None if v is None else v.type for v in node.operands])
    for op in _candidates(node, wide, size):
        try:
            op.infer_for(operands)
            new = op.apply(types)
        except TreadleError:  # a shape that the op does not take
            continue
        factors = {dims[axis].factors for n, axis in wide.items() if (dims := new.operands[n]) is not None}
        if len(factors) != 1 or len(next(iter(factors))) != 1:
            continue
        ((factor,),) = factors
        if new.factors[factor].role is not Role.MAPPED:
            continue
        if factor in op.positional and op.on_part(factor, size - ONE) != node.op:
            continue
        axes = _result_axes(new, factor)
        if axes is not None and _is_same_otherwise(old, new, factor, wide, axes):
            return op, axes
    raise _NotWidenedError


def _candidates(node: Node, wide: Mapping[int, int], size: Size) -> Iterator[Op]:
    """Yield ops that may compute the results of a node for all positions."""
    op = node.op
    if isinstance(op, Rearrange):
        yield from (Rearrange(pattern=pattern) for pattern in _patterns(op.pattern, wide[0]))
    start = op.attributes.get("start")
    if op.positional and isinstance(start, Size):
        from_zero: Any = op
        yield dataclasses.replace(from_zero, start=start - (size - ONE))
    yield op
    types = [None if v is None else v.type for v in node.operands]
    dims = next((dims for n, dims in enumerate(op.apply(types).operands) if n in wide and dims is not None), ())
    for dim in dims:
        resized = op.resized(dict.fromkeys(dim.factors, size), types)
        if resized is not None and resized != op:
            yield resized


def _patterns(pattern: str, axis: int) -> Iterator[str]:
    """Yield patterns that map a dimension that was 1, or that the pattern dropped."""
    left, right = ([str(each) for each in _AXES.findall(side)] for side in pattern.split("->"))
    if axis >= len(left) or left[axis] != "1":
        return
    names = set(re.findall(r"\w+", pattern))
    letter = next(each for each in axis_letters(len(names) + 1, names) if each not in names)
    before = [*left[:axis], letter, *left[axis + 1 :]]
    ones = [n for n, each in enumerate(right) if each == "1"]
    for at in ones:
        yield f"{' '.join(before)} -> {' '.join([*right[:at], letter, *right[at + 1 :]])}"
    yield f"{' '.join(before)} -> {' '.join([*right[:axis], letter, *right[axis:]])}"


def _result_axes(new: Application, factor: str) -> tuple[int, ...] | None:
    """Return the dimension of each result that is the factor alone; None if a result has none, or two."""
    found = [[n for n, dim in enumerate(dims) if factor in dim.factors] for dims in new.results]
    if any(len(each) != 1 for each in found):
        return None
    axes = tuple(each[0] for each in found)
    alone = all(dims[axis].factors == (factor,) for dims, axis in zip(new.results, axes, strict=True))
    return axes if alone else None


def _is_same_otherwise(
    old: Application, new: Application, factor: str, wide: Mapping[int, int], axes: Sequence[int]
) -> bool:
    """Return True if two applications map all dimensions alike, except the dimension that has all positions."""
    pairs: list[tuple[AxisDim, AxisDim]] = []
    sides = [
        *(
            (before, after, wide.get(n))
            for n, (before, after) in enumerate(zip(old.operands, new.operands, strict=True))
        ),
        *zip(old.results, new.results, axes, strict=True),
    ]
    for before, after, axis in sides:
        if before is None or after is None:
            continue
        kept = len(before) == len(after)
        rest = [dim for n, dim in enumerate(after) if n != axis]
        if any(factor in dim.factors for dim in rest):
            return False
        others = [dim for n, dim in enumerate(before) if n != axis or not kept]
        if len(rest) != len(others):
            return False
        pairs += zip(others, rest, strict=True)
    names: dict[str, str] = {}
    for one, other in pairs:
        first = [f for f in one.factors if old.dims[f].size != ONE]
        second = [f for f in other.factors if new.dims[f].size != ONE]
        if len(first) != len(second) or one.size != other.size:
            return False
        for f, g in zip(first, second, strict=True):
            if names.setdefault(f, g) != g or old.dims[f].size != new.dims[g].size:
                return False
            if old.factors[f].role is not new.factors[g].role:
                return False
    return len(set(names.values())) == len(names)
