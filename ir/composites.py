"""The bodies of composite ops, as functions of simpler ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import GraphError
from treadle.ir.graph import Function, Graph, Source, Value
from treadle.ir.operation import Composite
from treadle.ir.types import Type

_BODY_SOURCE = Source("body", 0)
_bodies: dict[tuple[Composite, tuple[str | None, ...]], Function] = {}


def body_of(op: Composite, types: Sequence[Type | None]) -> Function:
    """One level of a composite's body for these operand types: inputs are the operands that are present, in order.

    Shared and cached; do not change it. Raises GraphError where the body's results do not have the types that the op's
    rules infer.
    """
    key = (op, tuple(None if t is None else t.text for t in types))
    found = _bodies.get(key)
    if found is None:
        found = _bodies[key] = _build(op, types)
    return found


def _build(op: Composite, types: Sequence[Type | None]) -> Function:
    b = Builder(Graph(op.name))
    b.source = _BODY_SOURCE
    names = op.operand_names(len(types))
    operands = [None if t is None else b.input(n, t) for n, t in zip(names, types, strict=True)]
    results = as_results(op.body(b, *operands))
    inferred = op.infer(types)
    if [r.type for r in results] != list(inferred):
        raise GraphError(
            f"{op.name}: its body gives other types than its rules",
            received=f"body: {', '.join(str(r.type) for r in results)}; rules: {', '.join(map(str, inferred))}",
        )
    return b.outputs(**{f"out{i}": r for i, r in enumerate(results)})


def as_results(results: Any) -> tuple[Expr, ...]:
    """What a body returns, as a tuple."""
    return (results,) if isinstance(results, Expr) else tuple(results)


def inline(b: Builder, op: Composite, operands: Sequence[Value | None]) -> tuple[Value, ...]:
    """Add a composite's body to the builder's function in place of the op; returns its results."""
    results = op.body(b, *[None if v is None else b.expr(v) for v in operands])
    return tuple(r.value for r in as_results(results))
