"""Results of operators' handlers, converted to values of the file's own element types."""

from __future__ import annotations

from collections.abc import Sequence

from treadle.frontends.onnx_import.folding import Fold
from treadle.frontends.onnx_import.operators import Operator, Result
from treadle.frontends.onnx_import.rules.elements import Element, named
from treadle.frontends.onnx_import.values import MOST_KNOWN, Known
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import FrontendError


def as_known(b: Builder, made: Result, kind: Element | None, found: Operator) -> Known | None:
    """Convert a handler's result to a value of the file's own element type."""
    if made is None:
        return None
    if isinstance(made, Known):
        value = made
    elif isinstance(made, Expr):
        value = Known(kind or named(made.dtype.name), expr=made)
    else:
        return Known(kind or named("INT64"), content=made)
    expr = value.on_graph
    if expr is None or found.moves is not None:
        return value
    if expr.dtype is not value.type.carrier:
        raise FrontendError(f"{found.name} of {value.type} is not supported", received=f"its result is {expr.dtype}")
    if value.type.wraps is not None:
        return Known(value.type, expr=b.mod(expr, b.constant(value.type.wraps, expr.dtype)))
    if value.type.format is not None:
        return Known(value.type, expr=b.round_to(expr, format=value.type.format))
    return value


def keep_weights(
    b: Builder, found: Operator, inputs: Sequence[Known | None], results: Sequence[Known | None], run: Fold
) -> None:
    """If a node only moves the elements of weights, keep its result as moved weights: a small one does not become a
    constant.

    The elements are still known to nodes that need them.
    """
    if found.moves is None or len(results) != 1 or (made := results[0]) is None or made.content is None:
        return
    moving = inputs if found.moves == (-1,) else [inputs[i] for i in found.moves if i < len(inputs)]
    moved = [value for value in moving if value is not None and value.is_weight and value.content is not None]
    if len(moved) < len(moving) or made.content.size != sum(v.content.size for v in moved if v.content is not None):
        return
    scope, source = b.scope, b.source

    def build() -> Expr:
        before = b.scope, b.source
        b.scope, b.source = scope, source
        try:
            (value,) = run(inputs, b)
            assert value is not None
            return value.expr(b)
        finally:
            b.scope, b.source = before

    made.moved = build


def is_small(value: Known) -> bool:
    """Return True if a value could be a shape: a vector or a scalar, of a few numbers."""
    if value.rank > 1:
        return False
    count = value.shape[0].constant if value.rank else 1
    return count is None or count <= MOST_KNOWN
