"""Numbers that are linear functions of positions: indices that select every element in order, and comparisons that are
the same at every position.

Exporters write mask[b, t] as a lookup with such indices, and transformers compares positions to find packed texts.

i = iota(B) * S + iota(S)                       [B, S], the numbers from 0 to B S - 1
gather(x as [(B S)], where(i < 0, i + B S, i))  x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from treadle.ir.builder import Builder
from treadle.ir.errors import SizeError
from treadle.ir.graph import Value
from treadle.ir.ops.arithmetic import Add, Mul, Sub
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.indexing import Iota
from treadle.ir.ops.logic import Equal, NotEqual
from treadle.ir.ops.parts import Concat, Slice
from treadle.ir.ops.reductions import CumSum, SizeOf
from treadle.ir.ops.shapes import Expand, Rearrange
from treadle.ir.sizing.sizes import ONE, ZERO, Size, product
from treadle.passes.cleanup.rearrange_forms import form_of
from treadle.passes.framework.pattern import Vocabulary
from treadle.passes.framework.rewrite import Match, Rewrite
from treadle.passes.fusion.attention.core import number_of

_MOST_VALUES = 256
"""The greatest number of values from which an index may be computed; indices with more are not analyzed."""


@dataclass(frozen=True)
class WhereNegative(Rewrite):
    """where(i < 0, y, i)   -->   i        for an i computed from positions and sizes, which are 0 or more"""

    def pattern(self, p: Vocabulary, i: Any, y: Any) -> Any:
        return p.where(p.shared(p.less(i, 0)), y, i)

    def fits(self, m: Match) -> bool:
        return bool(m.i.type == m.result.type) and _bits(m.i.value, {}) is not None

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.i


@dataclass(frozen=True)
class SliceOfConcat(Rewrite):
    """slice(concat(x, y), of x alone)   -->   x;   and of y alone   -->   y"""

    def pattern(self, p: Vocabulary, x: Any, y: Any, axis: Any, along: Any, start: Any, stop: Any) -> Any:
        joined = p.named("joined", p.shared(p.concat(x, y, axis=along)))
        return p.slice(joined, axis=axis, start=start, stop=stop, stride=1)

    def fits(self, m: Match) -> bool:
        return self._chosen(m) is not None

    def _chosen(self, m: Match) -> Any:
        rank = m.joined.rank
        axis = m.axis % rank
        if axis != m.along % rank:
            return None
        op: Any = m.root.op
        start, stop = op.span(m.joined.shape[axis])
        cut, end = m.x.shape[axis], m.joined.shape[axis]
        chosen = {(ZERO, cut): m.x, (cut, end): m.y}.get((start, stop))
        return chosen if chosen is not None and chosen.type == m.result.type else None

    def rewrite(self, b: Builder, m: Match) -> Any:
        return self._chosen(m)


@dataclass(frozen=True)
class GatherOfAll(Rewrite):
    """gather(x, i)   -->   reshape(x)        for an i that counts from 0 to the size of x's first axis, once each"""

    def pattern(self, p: Vocabulary, x: Any, i: Any) -> Any:
        return p.gather(x, i, axis=0)

    def fits(self, m: Match) -> bool:
        if not m.i.rank or not m.i.value.node or m.x.type.elements != m.result.type.elements:
            return False
        try:
            found = _linear(m.i.value, {})
            return found is not None and found == _counting(m.i.shape) and product(m.i.shape) == m.x.shape[0]
        except SizeError:  # a size that is out of bounds
            return False

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.reshape(m.x, shape=m.result.type.shape)


@dataclass(frozen=True)
class GatherOfOne(Rewrite):
    """gather(x, [n])   -->   slice(x, from n to n + 1)        for a position n computed from sizes, such as S-1"""

    def pattern(self, p: Vocabulary, x: Any, i: Any, axis: Any) -> Any:
        return p.gather(x, i, axis=axis)

    def fits(self, m: Match) -> bool:
        try:
            return _position(m) is not None
        except SizeError:  # a size that is out of bounds
            return False

    def rewrite(self, b: Builder, m: Match) -> Any:
        axis, position = m.axis % m.x.rank, _position(m)
        assert position is not None
        if position == m.x.shape[axis] - ONE:
            taken = b.slice(m.x, axis=axis, start=-1)
        else:
            taken = b.slice(m.x, axis=axis, start=position, stop=position + ONE)
        return b.reshape(taken, shape=m.result.type.shape)


def _position(m: Match) -> Size | None:
    """Return the only position that a lookup reads, computed from sizes; None for other indices, or for a position that
    may be outside."""
    if product(m.i.shape) != ONE or m.i.value.node is None or m.x.value.weight is not None:
        return None
    found = _linear(m.i.value, {})
    if found is None or any(factor != ZERO for factor in found.factors):
        return None
    size = m.x.shape[m.axis % m.x.rank]
    symbols = m.x.builder.graph.symbols
    inside = (found.constant.bounds(symbols).lower, (size - ONE - found.constant).bounds(symbols).lower)
    return found.constant if all(low is not None and low >= 0 for low in inside) else None


@dataclass(frozen=True)
class EqualPositions(Rewrite):
    """i == j   -->   true, or false        for i and j computed from positions, whose difference is a constant"""

    def pattern(self, p: Vocabulary, i: Any, j: Any) -> Any:
        return p.equal(i, j)

    def fits(self, m: Match) -> bool:
        try:
            return _always(m.result, {}) is not None
        except SizeError:  # a size that is out of bounds
            return False

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.expand(b.constant(_always(m.result, {})), shape=m.result.type.shape)


@dataclass(frozen=True)
class SumOfNumber(Rewrite):
    """cumsum(x)   -->   n * iota + n        for an integer x that is the number n everywhere"""

    def pattern(self, p: Vocabulary, x: Any, axis: Any) -> Any:
        return p.cumsum(x, axis=axis)

    def fits(self, m: Match) -> bool:
        return _sum_of_number(m) is not None

    def rewrite(self, b: Builder, m: Match) -> Any:
        shape, axis = m.result.type.shape, place(m.axis, m.result.type.rank)
        factor, first = _sum_of_number(m) or (0, 0)
        numbers = b.iota(size=shape[axis], dtype=m.x.dtype) * factor + first
        after = len(shape) - axis - 1
        return b.expand(b.rearrange(numbers, pattern=f"n -> n{' 1' * after}"), shape=shape)


def _sum_of_number(m: Match) -> tuple[int, int] | None:
    """Return the step of a running sum and its first number, if both are known."""
    found = _linear(m.result, {})
    if found is None or not m.result.type.rank:
        return None
    factor, first = found.factors[place(m.axis, m.result.type.rank)].constant, found.constant.constant
    others = [f for i, f in enumerate(found.factors) if i != place(m.axis, m.result.type.rank)]
    return None if factor is None or first is None or any(f != ZERO for f in others) else (factor, first)


@dataclass(frozen=True)
class _Linear:
    """A linear function of positions: constant + the sum over axes of factor * position. The factor of an axis of size
    1 is 0.
    """

    factors: tuple[Size, ...]
    constant: Size = ZERO


def _counting(shape: Sequence[Size]) -> _Linear:
    """Return the linear function that numbers the elements of a shape in row-major order, from 0."""
    factors: list[Size] = []
    stride = ONE
    for size in reversed(shape):
        factors.insert(0, ZERO if size == ONE else stride)
        stride = stride * size
    return _Linear(tuple(factors))


def _linear(value: Value, known: dict[Value, _Linear | None]) -> _Linear | None:
    """Return a value as a linear function of the positions along its own axes, with sizes as factors; None if it is not
    linear.

    known   results for other values, to which the result is added. Raises SizeError for a factor out of bounds.
    """
    if value not in known:
        known[value] = None  # stays None if there are too many values
        if len(known) < _MOST_VALUES:
            known[value] = _read(value, known)
    return known[value]


def _read(value: Value, known: dict[Value, _Linear | None]) -> _Linear | None:
    node, shape = value.node, value.type.shape
    if node is None:
        number = _number(value)
        return None if number is None else _Linear((ZERO,) * len(shape), Size.of(number))
    op: Any = node.op
    if not _is_index(value):
        return None
    if isinstance(op, Iota):
        return _Linear((ZERO if shape[0] == ONE else ONE,))
    if isinstance(op, SizeOf):
        return _Linear((), op.value)
    if isinstance(op, Cast) and node.inputs[0].type.dtype.kind == "bool":
        always = _always(node.inputs[0], known)
        return None if always is None else _Linear((ZERO,) * len(shape), Size.of(int(always)))
    if not isinstance(op, (Rearrange, Expand, Cast, Add, Sub, Mul, Concat, Slice, CumSum)):
        return None
    parts = [part for v in node.inputs if (part := _linear(v, known)) is not None]
    if len(parts) < len(node.inputs):
        return None
    if isinstance(op, Cast):
        return parts[0]
    if isinstance(op, Rearrange):
        return _rearranged(parts[0], op.pattern, node.inputs[0])
    if isinstance(op, CumSum):
        return _summed(parts[0], op, shape)
    if isinstance(op, Concat):
        return _join(parts, [v.type.shape for v in node.inputs], place(op.axis, len(shape)))
    if isinstance(op, Slice):
        return _slice(parts[0], op, node.inputs[0].type.shape, shape)
    x, *rest = (_Linear((*[ZERO] * (len(shape) - len(part.factors)), *part.factors), part.constant) for part in parts)
    if not rest:
        return x
    (y,) = rest
    if isinstance(op, Add):
        return _Linear(tuple(a + b for a, b in zip(x.factors, y.factors, strict=True)), x.constant + y.constant)
    if isinstance(op, Sub):
        return _Linear(tuple(a - b for a, b in zip(x.factors, y.factors, strict=True)), x.constant - y.constant)
    if any(factor != ZERO for factor in y.factors):
        x, y = y, x
    if any(factor != ZERO for factor in y.factors):
        return None
    return _Linear(tuple(a * y.constant for a in x.factors), x.constant * y.constant)


def _join(parts: Sequence[_Linear], shapes: Sequence[Sequence[Size]], axis: int) -> _Linear | None:
    """Return parts that are joined along an axis, if each continues the one before it. Otherwise return None."""
    first, length = parts[0], shapes[0][axis]
    factor = first.factors[axis] if length != ONE or len(parts) == 1 else parts[1].constant - first.constant
    factors = (*first.factors[:axis], factor, *first.factors[axis + 1 :])
    for part, shape in zip(parts[1:], shapes[1:], strict=True):
        own = (*part.factors[:axis], factor if shape[axis] == ONE else part.factors[axis], *part.factors[axis + 1 :])
        if own != factors or part.constant - first.constant != factor * length:
            return None
        length = length + shape[axis]
    return _Linear(factors, first.constant)


def _slice(x: _Linear, op: Slice, shape: Sequence[Size], result: Sequence[Size]) -> _Linear:
    axis = place(op.axis, len(shape))
    start, _ = op.span(shape[axis])
    factor = ZERO if result[axis] == ONE else x.factors[axis] * op.stride
    return _Linear((*x.factors[:axis], factor, *x.factors[axis + 1 :]), x.constant + x.factors[axis] * start)


def _always(value: Value, functions: dict[Value, _Linear | None]) -> bool | None:
    """Return the truth value of a comparison that is the same at all positions; None if it is not known to be.

    functions  the linear functions of other values: see `_linear`
    """
    node = value.node
    if node is None or not isinstance(node.op, Equal | NotEqual):
        return None
    parts = [part for v in node.inputs if (part := _linear(v, functions)) is not None]
    if len(parts) < 2:
        return None
    rank = value.type.rank
    x, y = (_Linear((*[ZERO] * (rank - len(part.factors)), *part.factors), part.constant) for part in parts)
    difference = (x.constant - y.constant).constant
    if x.factors != y.factors or difference is None:
        return None
    return (difference == 0) == isinstance(node.op, Equal)


def _summed(x: _Linear, op: CumSum, shape: Sequence[Size]) -> _Linear | None:
    """Return the running sum of a number that is the same at all positions, or None for any other sum."""
    axis = place(op.axis, len(shape))
    if any(factor != ZERO for factor in x.factors) or (op.reverse and x.constant != ZERO):
        return None
    factor = ZERO if shape[axis] == ONE else x.constant
    return _Linear((*x.factors[:axis], factor, *x.factors[axis + 1 :]), ZERO if op.exclusive else x.constant)


def _is_index(value: Value) -> bool:
    return value.type.dtype.is_int and value.type.dtype.bytes >= 4


def _number(value: Value) -> int | None:
    """Return the integer that is the only element of a constant, or None."""
    number = number_of(value) if value.literal is not None and _is_index(value) else None
    return None if number is None else int(number)


def _rearranged(x: _Linear, pattern: str, operand: Value) -> _Linear | None:
    """Return a linear function with its axes moved, split or joined as in the pattern. Return None if two axes cannot
    be joined: a step of the outer axis must equal the whole inner axis.
    """
    form = form_of(pattern, operand.type)
    factors: dict[int, Size] = {}
    for dim, factor in zip(form.before, x.factors, strict=True):
        for atom in reversed(dim):
            factors[atom] = factor
            factor = factor * form.sizes[atom]
    joined: list[Size] = []
    for dim in form.after:
        for outer, inner in pairwise(dim):
            if factors[outer] != factors[inner] * form.sizes[inner]:
                return None
        joined.append(factors[dim[-1]] if dim else ZERO)
    return _Linear(tuple(joined), x.constant)


def _bits(value: Value, known: dict[Value, int | None]) -> int | None:
    """Return a bound on the number of bits of a nonnegative integer, with 31 bits for each axis. Return None for any
    other value.
    """
    if value not in known:
        known[value] = None  # stays None if there are too many values
        if len(known) < _MOST_VALUES and value.type.dtype.is_int:
            bits = _counted(value, known)
            known[value] = bits if bits is not None and bits < 8 * value.type.dtype.bytes else None
    return known[value]


def _counted(value: Value, known: dict[Value, int | None]) -> int | None:
    node = value.node
    if node is None:
        number = _number(value)
        return None if number is None or number < 0 else number.bit_length()
    op: Any = node.op
    if isinstance(op, (Iota, SizeOf)):
        return _bits_of(op.size if isinstance(op, Iota) else op.value)
    if not isinstance(op, (Rearrange, Expand, Slice, Concat, Cast, Add, Mul)):
        return None
    parts = [bits for v in node.inputs if (bits := _bits(v, known)) is not None]
    if len(parts) < len(node.inputs):
        return None
    return sum(parts) if isinstance(op, Mul) else max(parts) + (isinstance(op, Add))


def _bits_of(size: Size) -> int | None:
    """Return a bound on the number of bits of a size; each term of a sum after the first adds one bit."""
    if any(factor < 0 or any(not isinstance(atom, str) for atom in atoms) for atoms, factor in size.terms):
        return None
    each = [31 * len(atoms) + factor.bit_length() - (factor == 1 and bool(atoms)) for atoms, factor in size.terms]
    return max(each, default=1) + max(len(each) - 1, 0)
