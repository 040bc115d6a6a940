"""Values that gain the rows of the batch as a dimension at a step: positions, and values computed from positions.

Over a whole sequence all rows count from 0, and positions are [s]. At a step each row has its own start, and positions
are [b, s]. Values computed from positions are laid out so that they broadcast to values in which the rows are a
dimension of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from treadle.ir.axes import LeadingDims
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Node
from treadle.ir.operation import Op
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.indexing import Embedding, Gather
from treadle.ir.ops.parts import Concat, Slice
from treadle.ir.ops.shapes import Expand, Rearrange
from treadle.passes.stepping.errors import refusal


@dataclass(frozen=True)
class Stepped:
    """A value of a step. `by_row`: True if its first dimension is the rows, which the model's value lacks."""

    expr: Expr
    by_row: bool = False


def apply_by_row(
    b: Builder, node: Node, op: Op, operands: Sequence[Stepped | None], row_dim: int | None
) -> list[Stepped]:
    """Apply an op to operands some of which have the rows as an additional dimension. Return its results.

    row_dim   the dimension of the model's result that is the rows; None if it has no rows, and gains them

    Raises PassError if the op cannot be applied by row.
    """
    if isinstance(op, Rearrange):
        (x,) = operands
        assert x is not None
        left, _, right = op.pattern.partition("->")
        row = _free_letter(op.pattern)
        return [Stepped(b.rearrange(x.expr, pattern=f"{row} {left}-> {row} {right}"), True)]
    if isinstance(op, Gather | Embedding):
        x, indices = operands
        axis = op.axis if isinstance(op, Gather) else 0
        assert x is not None
        assert indices is not None
        if not x.by_row and axis == 0:
            return [Stepped(found.expr, True) for found in _emitted(b, op, operands)]
    if isinstance(op, Concat | Slice):
        axis = place(op.axis, node.results[0].type.rank) + 1
        return [Stepped(x.expr, True) for x in _emitted(b, replace(op, axis=axis), _all_by_row(b, operands))]
    if isinstance(op, Expand):
        return [_expanded(b, op, operands, row_dim)]
    ranks = [None if v is None else v.type.rank for v in node.operands]
    rule = op.rule(ranks)
    by_row = [pattern for pattern, x in zip(rule.operands, operands, strict=True) if x is not None and x.by_row]
    if len(node.results) != 1 or any(pattern[:1] != (LeadingDims(),) for pattern in (*by_row, *rule.results)):
        raise refusal(node, "reads the tokens' positions, but cannot be computed with other positions for each row")
    laid: list[Stepped | None] = []
    leading = node.results[0].type.rank - len(rule.results[0]) + 1  # the number of dimensions that `...` stands for
    for value, operand, pattern in zip(node.operands, operands, rule.operands, strict=True):
        if operand is None or not operand.by_row:
            laid.append(operand)
            continue
        assert value is not None
        lacking = leading - (value.type.rank - len(pattern) + 1)  # the number of dimensions that the value lacks
        if row_dim is not None and row_dim >= lacking:  # the value's dimension there has size 1
            laid.append(Stepped(_rows_inserted(b, operand.expr, row_dim - lacking)))
            continue
        at = 0 if row_dim is None else row_dim
        laid.append(Stepped(_spread(b, operand.expr, at, lacking - (row_dim is not None) - at)))
    return [Stepped(found.expr, row_dim is None) for found in _emitted(b, op, laid)]


def _expanded(b: Builder, op: Expand, operands: Sequence[Stepped | None], row_dim: int | None) -> Stepped:
    """Expand x [b, ...]. If the model's result has the rows as a dimension, the rows of x become that dimension."""
    (x,) = operands
    assert x is not None
    names = [f"x{n}" for n in range(x.expr.rank - 1)]
    laid = ["1"] * (len(op.shape) - len(names)) + names
    shape = list(op.shape)
    if row_dim is None:
        laid, shape = ["row", *laid], [None, *shape]
    else:
        laid[row_dim], shape[row_dim] = "row", None
    kept = [name if name in laid else "1" for name in names]  # size 1 in place of the rows
    found: Expr = b.rearrange(x.expr, pattern=f"row {' '.join(kept)} -> {' '.join(laid)}")
    return Stepped(b.expand(found, shape=tuple(shape)), row_dim is None)


def _all_by_row(b: Builder, operands: Sequence[Stepped | None]) -> list[Stepped | None]:
    """Return the operands, all with rows: operands that are the same in all rows are repeated for each row."""
    rows = next(x.expr.shape[0] for x in operands if x is not None and x.by_row)
    return [
        x if x is None or x.by_row else Stepped(b.expand(x.expr, shape=(rows, *x.expr.shape)), True) for x in operands
    ]


def _rows_inserted(b: Builder, x: Expr, at: int) -> Expr:
    """Move the rows of x [b, ...] to a dimension of the model's value, whose size is 1."""
    names = [f"x{n}" for n in range(x.rank - 1)]
    left = [name if n != at else "1" for n, name in enumerate(names)]
    right = [name if n != at else "row" for n, name in enumerate(names)]
    found: Expr = b.rearrange(x, pattern=f"row {' '.join(left)} -> {' '.join(right)}")
    return found


def _spread(b: Builder, x: Expr, before: int, between: int) -> Expr:
    """Insert dimensions of size 1 into x [b, ...] before its rows and after them."""
    if not before and not between:
        return x
    names = [f"x{n}" for n in range(x.rank)]
    right = [*["1"] * before, names[0], *["1"] * between, *names[1:]]
    found: Expr = b.rearrange(x, pattern=f"{' '.join(names)} -> {' '.join(right)}")
    return found


def _emitted(b: Builder, op: Op, operands: Sequence[Stepped | None]) -> list[Stepped]:
    node = b.emit(op, [None if x is None else x.expr.value for x in operands])
    return [Stepped(b.expr(v)) for v in node.results]


def _free_letter(pattern: str) -> str:
    name = "row"
    while name in pattern:
        name += "_"
    return name
