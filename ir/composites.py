"""The bodies of composite ops, as functions of simpler ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import GraphError
from treadle.ir.graph import Function, Graph, Value
from treadle.ir.operation import Composite, Op
from treadle.ir.source_lines import SourceLine
from treadle.ir.types import Type

_BODY_SOURCE = SourceLine("body", 0)
_MOST_BODIES = 4096  # one for each op with its operand types, of which files may contain any number
_bodies: dict[tuple[Composite, tuple[str | None, ...], bool], Function] = {}


def body_of(op: Composite, types: Sequence[Type | None]) -> Function:
    """Return one level of a composite's body for these operand types. The function's inputs are the operands that are
    present, in order.

    The function is shared and cached; do not change it. Raises GraphError if the types of the body's results differ
    from the types that the op's rules infer.
    """
    return _remembered(op, types, lowered=False)


def lowering_of(op: Composite, types: Sequence[Type | None]) -> Function:
    """Return the function that a backend lowers in place of the op; otherwise like `body_of`."""
    return _remembered(op, types, lowered=type(op).lowering is not Composite.lowering)


def _remembered(op: Composite, types: Sequence[Type | None], *, lowered: bool) -> Function:
    key = (op, tuple(None if t is None else t.text for t in types), lowered)
    found = _bodies.get(key)
    if found is None:
        if len(_bodies) >= _MOST_BODIES:
            _bodies.clear()
        found = _bodies[key] = _build(op, types, op.lowering if lowered else op.body)
    return found


def _build(op: Composite, types: Sequence[Type | None], build: Callable[..., Any]) -> Function:
    b = Builder(Graph(op.name))
    b.source = _BODY_SOURCE
    names = op.operand_names(len(types))
    operands = [None if t is None else b.input(n, t) for n, t in zip(names, types, strict=True)]
    results = as_results(build(b, *operands))
    inferred = op.infer(types)
    if [r.type for r in results] != list(inferred):
        raise GraphError(
            f"{op.name}: the types of the body's results differ from the types that the op's rules infer",
            received=f"body: {', '.join(str(r.type) for r in results)}; rules: {', '.join(map(str, inferred))}",
        )
    return b.outputs(**{f"out{i}": r for i, r in enumerate(results)})


def holds_contraction(op: Op, operands: Sequence[Value | None]) -> bool:
    """Return True if an op on these operands is a contraction, or its body contains a contraction: attention, conv,
    gated_linear, ...
    """
    return _holds_contraction(op, tuple([None if v is None else v.type for v in operands]))


@lru_cache(maxsize=_MOST_BODIES)
def _holds_contraction(op: Op, types: tuple[Type | None, ...]) -> bool:
    if op.callee is not None:
        return False
    if op.is_contraction([None if t is None else t.rank for t in types]):
        return True
    return isinstance(op, Composite) and any(holds_contraction(n.op, n.operands) for n in body_of(op, types).nodes)


def as_results(results: Any) -> tuple[Expr, ...]:
    """Return the results of a body as a tuple."""
    return (results,) if isinstance(results, Expr) else tuple(results)


def inline(b: Builder, op: Composite, operands: Sequence[Value | None], *, lowered: bool = False) -> tuple[Value, ...]:
    """Add a composite's body, or a backend's lowering of it, to the builder's function. Return its results."""
    results = (op.lowering if lowered else op.body)(b, *[None if v is None else b.expr(v) for v in operands])
    return tuple(r.value for r in as_results(results))
