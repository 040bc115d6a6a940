"""Origins of queries, keys and values: the values before moves, casts and constant factors, found upwards from a
product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from treadle.ir.graph import Node, Value
from treadle.ir.ops.arithmetic import Div, Mul
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.shapes import Expand, Rearrange
from treadle.passes.cleanup.canonicalize import is_lossless
from treadle.passes.fusion.attention.core import Placed, number_of
from treadle.passes.fusion.axis_tracking import Axes, narrowed


@dataclass(frozen=True)
class Origin:
    """A value, and its origin: the value before moves, lossless casts and constant factors.

    path     the values from the value itself up to the origin, each with the product of the factors in between
    """

    path: tuple[tuple[Placed, float], ...]

    @property
    def placed(self) -> Placed:
        return self.path[-1][0]

    @property
    def factor(self) -> float:
        return self.path[-1][1]

    def as_laid_out(self, axes: Axes, wanted: Sequence[Sequence[int]]) -> Placed:
        """Return the value on the path that already has this layout and the full factor. Return the origin if there is
        no such value.
        """
        goal = tuple(map(axes.flat, wanted))
        fitting = [p for p, factor in self.path if factor == self.factor and axes.resolved(p.layout) == goal]
        return fitting[-1] if fitting else self.placed


def origin_of(axes: Axes, placed: Placed, batch: Callable[[int], bool]) -> Origin:
    """Return the origin of a value. An expand is skipped only if it repeats `batch` axes alone: one key head for
    several heads of the queries.
    """
    value, layout, factor = placed.value, placed.layout, 1.0
    path = [(placed, factor)]
    while (node := value.node) is not None:
        operand = node.inputs[0] if node.inputs else None
        match node.op:
            case Rearrange():
                above = axes.above(node, layout)
            case Expand():
                above = axes.above(node, layout)
                assert above is not None
                kept = {atom for dim in axes.resolved(above) for atom in dim}
                if not all(batch(a) for dim in axes.resolved(layout) for a in dim if a not in kept):
                    above = None
            case Mul() | Div():
                scaled = _scaled(node)
                above = narrowed(scaled[0], layout) if scaled is not None else None
                if scaled is not None and above is not None:
                    operand, factor = scaled[0], factor * scaled[1]
            case Cast():
                lossless = operand is not None and is_lossless(operand.type.dtype, value.type.dtype)
                above = layout if lossless and operand is not None and operand.type.dtype.is_float else None
            case _:
                above = None
        if above is None or operand is None:
            break
        value, layout = operand, above
        path.append((Placed(value, layout), factor))
    return Origin(tuple(path))


def is_weight(value: Value) -> bool:
    """Return True if a value is a weight or a constant, possibly moved or cast."""
    while value.node is not None and (value.node.op.is_view or isinstance(value.node.op, Cast)):
        value = value.node.inputs[0]
    return value.weight is not None or value.kind == "constant"


def _scaled(node: Node) -> tuple[Value, float] | None:
    """Return (x, c) for x * c, or (x, 1 / c) for x / c, if c is a constant that is neither 0 nor infinite, and x has
    the result's shape. Otherwise return None.
    """
    x, y = node.inputs
    for value, other in ((x, y), (y, x)) if isinstance(node.op, Mul) else ((x, y),):
        number = number_of(other)
        if number is not None and math.isfinite(number) and number != 0 and value.literal is None:
            same = value.type.shape == node.results[0].type.shape
            return (value, number if isinstance(node.op, Mul) else 1 / number) if same else None
    return None
