"""Addends of the scores of attention in primitives. They are read as biases, or as masks if they mask.

where(c, 0, -inf), (1 - c) * -1e9, a constant of zeros and -inf    -->   masks
table[bucket(iota(T) - iota(S))]                                   -->   t5_relative
slopes[h] * (iota(T) - iota(S)), slopes[h] * iota(T)               -->   alibi
any other addend                                                   -->   bias(axes)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.attention.attention_terms import Alibi, BooleanMask, TensorBias
from treadle.ir.composites import holds_contraction
from treadle.ir.graph import Value
from treadle.ir.ops.arithmetic import Add, Div, Mul, Sub
from treadle.ir.ops.call import Call
from treadle.ir.ops.elementwise import Cast, Cos, Erf, Log, Reciprocal, Sigmoid, Sin, Tanh
from treadle.ir.ops.logic import Where
from treadle.ir.ops.normalization import LayerNorm, RMSNorm, Softmax
from treadle.ir.ops.shapes import Expand, Rearrange
from treadle.passes.fusion.attention.buckets import t5_relative
from treadle.passes.fusion.attention.core import LEAST_FILL, Added, Chosen, Placed, number_of
from treadle.passes.fusion.attention.masks import band_terms
from treadle.passes.fusion.attention.positions import (
    MOST_PARTS,
    affine,
    band_of,
    beneath,
    constant_over,
    offset_table,
)
from treadle.passes.fusion.attention.roles import Fused, PlacedOperand, Roles
from treadle.passes.fusion.axis_tracking import Axes, narrowed
from treadle.passes.fusion.truth_values import is_of_truth

ABSORBING = 1e30
"""A number of this magnitude absorbs every score by rounding: adding the number masks as replacing the score by it
does.
"""


def as_mask(axes: Axes, added: Added) -> Chosen | None:
    """Return the condition of an addend that is 0 if the condition holds and a large negative number otherwise. Return
    None for any other addend.

    where(c, 0, -inf), (1 - c) * -1e9 for a condition c
    """
    value, layout, factor = added.placed.value, added.placed.layout, added.factor
    for _ in range(MOST_PARTS):
        node = value.node
        if node is None:
            break
        match node.op:
            case Rearrange() | Expand():
                above = axes.above(node, layout)
                if above is None:
                    return None
                value, layout = node.inputs[0], above
            case Cast() if node.inputs[0].type.dtype.is_float:
                value = node.inputs[0]
            case Mul():
                scaled = next(
                    ((x, n) for x, y in (node.inputs, node.inputs[::-1]) if (n := number_of(y)) is not None), None
                )
                if scaled is None:
                    return None
                factor, value = factor * scaled[1], scaled[0]
                layout = narrowed(value, layout)
                if -math.inf < factor <= -LEAST_FILL and (truth := _complement(value)) is not None:
                    return Chosen(Placed(truth[0], narrowed(truth[0], layout)), truth[1], factor, added.node)
            case Where():
                condition, x, y = node.inputs
                numbers = number_of(x), number_of(y)
                for keep, (kept, fill) in ((True, numbers), (False, numbers[::-1])):
                    if kept == 0 and fill is not None and fill * factor <= -LEAST_FILL:
                        return Chosen(Placed(condition, narrowed(condition, layout)), keep, fill * factor, added.node)
                return None
            case _:
                return None
    return None


def _complement(value: Value) -> tuple[Value, bool] | None:
    """Return a condition, and the truth value that it has where the value is 0: (c, True) for 1 - c, (c, False) for c
    cast to a number. Return None for any other value.
    """
    node = value.node
    if node is not None and isinstance(node.op, Sub) and number_of(node.inputs[0]) == 1 and is_of_truth(node.inputs[1]):
        return node.inputs[1], True
    return (value, False) if is_of_truth(value) else None


@dataclass(frozen=True, eq=False)
class Table:
    """A constant addend that is 0 where `kept`, and `fill` elsewhere."""

    placed: Placed
    kept: Any
    axes: tuple[str, ...]
    fill: float


def table_mask(roles: Roles, added: Added) -> Table | None:
    """Return a constant addend of zeros and one large negative number as a table, or None for any other addend."""
    if not added.placed.value.type.dtype.is_float:
        return None
    table = constant_over(added.placed.value, roles.axes.resolved(added.placed.layout), roles)
    if table is None:
        return None
    array, axes = table
    others = np.unique(array[array != 0])
    if len(others) != 1 or not (fill := float(others[0]) * added.factor) <= -LEAST_FILL:
        return None
    return Table(added.placed, array == 0, tuple(axes), fill)


def table_terms(table: Table) -> list[Fused]:
    """Return the mask of a constant addend: as terms by position, or as one boolean mask with the facts known about
    it.
    """
    whole = Fused(BooleanMask("t"))
    if len(table.axes) != 2:
        return [whole]
    kept = table.kept if table.axes == ("s", "t") else table.kept.T
    band = band_of(kept)
    terms = None if band is None else band_terms(*band)
    if terms is not None:
        return terms
    return [dataclasses.replace(whole, first=bool(kept[:, 0].all()), diagonal=bool(np.diagonal(kept).all()))]


def addends_of(axes: Axes, added: Added, exactly: bool, trained: bool = False) -> Iterator[Added | Chosen]:
    """Yield the parts of an addend. A sum is split if each term has fewer axes than the sum, or if one term is a mask.
    A `where` with a masking number is split into an addend and a mask. Any other addend is yielded unchanged.

    s + where(c, x, -inf)   -->   s + x, masked by c

    exactly   True if results must be equal even if every key is masked: do not split if x may be so large that it
              changes the sum with the masking number
    trained   with `exactly`: do not split if x would then get a gradient that `where` stops
    """
    placed = beneath(axes, added.placed)
    node = placed.value.node
    if node is not None and isinstance(node.op, (Add, Sub)):
        signs = (1.0, 1.0 if isinstance(node.op, Add) else -1.0)
        parts = [
            Added(Placed(v, narrowed(v, placed.layout)), added.factor * sign, added.node)
            for v, sign in zip(node.inputs, signs, strict=True)
        ]
        count = _count(axes, placed)
        if all(_count(axes, p.placed) < count for p in parts) or any(as_mask(axes, p) for p in parts):
            for part in parts:
                yield from addends_of(axes, part, exactly, trained)
            return
    if node is not None and isinstance(node.op, Where) and as_mask(axes, added) is None:
        condition, *sides = node.inputs
        for keep, (x, fill) in ((True, sides), (False, sides[::-1])):
            number = number_of(fill)
            if number is not None and number * added.factor <= -ABSORBING and _may_add(x, number, exactly, trained):
                inner = Added(Placed(x, narrowed(x, placed.layout)), added.factor, added.node)
                yield from addends_of(axes, inner, exactly, trained)
                held = Placed(condition, narrowed(condition, placed.layout))
                yield Chosen(held, keep, number * added.factor, added.node)
                return
    yield added


def _may_add(x: Value, fill: float, exactly: bool, trained: bool) -> bool:
    """Return True if x may be added to the number that masks it. That number absorbs x unless x is infinite or
    large.
    """
    if not math.isfinite(fill):
        return True
    hazards = hazards_of(x)
    return not (hazards or trained) if exactly else "infinite" not in hazards


def _count(axes: Axes, placed: Placed) -> int:
    return sum(map(len, axes.resolved(placed.layout)))


def read_bias(roles: Roles, added: Added) -> list[Fused]:
    """Return an addend as a bias: a positional term if the addend equals one, else a tensor."""
    placed = beneath(roles.axes, added.placed)
    node = placed.value.node
    if node is not None:
        structural = _alibi(roles, placed, added.factor)
        if structural is None and added.factor == 1.0:
            structural = t5_relative(roles, placed)
        if structural is not None:
            return [structural]
    axes = roles.held(placed.layout) or "t"
    return [Fused(TensorBias(axes), (PlacedOperand(placed, axes, factor=added.factor),))]


def _alibi(roles: Roles, placed: Placed, factor: float) -> Fused | None:
    """Return slopes[h] * (j - i), times a factor, as alibi, or None for any other addend."""
    node = placed.value.node
    assert node is not None
    if not isinstance(node.op, Mul):
        return None
    for slopes, offset in (node.inputs, node.inputs[::-1]):
        own = beneath(roles.axes, Placed(slopes, narrowed(slopes, placed.layout)))
        sign = _offset_sign(roles, Placed(offset, narrowed(offset, placed.layout)))
        if roles.held(own.layout) in ("h", "") and sign is not None:
            return Fused(Alibi(), (PlacedOperand(own, "h", factor=sign * factor),))
    return None


def _offset_sign(roles: Roles, placed: Placed) -> int | None:
    """Return 1 if the value is j - i, as a float, plus a number that is the same for all keys of a query, which does
    not change probabilities; -1 if it is i - j; None for any other value.
    """
    offsets = offset_table(roles, placed)
    if offsets is not None:
        array, exact = (x - x[:, :1] for x in offsets)
        return next((sign for sign in (1, -1) if np.array_equal(array, sign * exact)), None)
    under = beneath(roles.axes, placed)
    node = under.value.node
    is_cast = node is not None and isinstance(node.op, Cast) and node.inputs[0].type.dtype.is_int
    found = affine(roles, Placed(node.inputs[0], under.layout) if is_cast and node is not None else under)
    if found is None or found.t not in (1, -1) or any("t" in roles.held(x.layout) for _, x in found.tensors):
        return None
    return found.t


# -- possible values of addends --------------------------------------------------------------------------------

_BOUNDED = (Softmax, LayerNorm, RMSNorm, Tanh, Sigmoid, Erf, Sin, Cos)
_MOST_LOOKED_AT = 256


def hazards_of(value: Value) -> frozenset[str]:
    """Return the kinds of special numbers that an addend may hold, judged by its constants: "large" (numbers that mask)
    and "infinite".

    If these may include inf, not only -inf, the addend is also "rising".

    Weights, and results that layers compute from finite numbers, are neither; a float input may be large.
    """
    found: set[str] = set()
    pending, seen = [value], {value}
    while pending:
        x = pending.pop()
        node = x.node
        if len(seen) > _MOST_LOOKED_AT:
            return frozenset(("large", "infinite"))
        if x.literal is not None and x.type.dtype.is_float:
            magnitudes = np.abs(x.literal.array)
            found |= {"infinite"} if not np.isfinite(magnitudes).all() else set()
            found |= {"rising"} if np.isposinf(x.literal.array).any() else set()
            found |= {"large"} if (magnitudes >= LEAST_FILL).any() else set()
        elif x.kind == "input" and x.type.dtype.is_float:
            found.add("large")
        if node is None or not x.type.dtype.is_float:
            continue
        if isinstance(node.op, _BOUNDED) or holds_contraction(node.op, node.operands):
            continue
        if isinstance(node.op, (Log, Div, Reciprocal, Call)):
            found |= {"large", "infinite"} if isinstance(node.op, Log) else {"large"}
        pending += [v for v in node.inputs if v not in seen]
        seen.update(node.inputs)
    return frozenset(found)
