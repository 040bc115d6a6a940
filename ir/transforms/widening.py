"""Widening: a copy of a graph in which bf16 or f16 values are f32, for backends that lack the narrow dtype or are slow
in it.

    y = matmul(x, $w)      # bf16[B, 8]   -->   y = matmul(x, $w)      # f32[B, 8]

Inputs, weights, constants and results of the narrow dtypes become f32, and so do target dtypes of casts. The elements
of a narrow weight are the same numbers in f32. Results are no longer rounded to the narrow dtype, so they differ from
the narrow model's results by that rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph, Value
from treadle.ir.literals import Literal
from treadle.ir.operation import Op
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.types import DType, bf16, f16, f32

WIDENED = {d.name: d for d in (bf16, f16)}
"""The dtypes that can be widened to f32."""


def narrow_dtypes(names: str | Iterable[str], also: Sequence[str] = ()) -> frozenset[DType]:
    """Return the dtypes of these names: "bf16", "f16", or both. Raises UsageError for any other name.

    also  other names that the caller accepts, which the error lists
    """
    given = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in given if name not in WIDENED]
    if unknown:
        raise UsageError(
            f"{unknown[0]!r} is not a dtype that can be widened to f32", hint="one of " + ", ".join([*WIDENED, *also])
        )
    return frozenset(WIDENED[name] for name in given)


def widen_graph(graph: Graph, narrow: frozenset[DType]) -> Graph:
    """Return a copy of a graph in which values of the dtypes `narrow` are f32."""
    copy = clone_graph(graph)
    constants: dict[Value, Value] = {}

    def widened(value: Value) -> Value:
        if value.literal is None or value.type.dtype not in narrow:
            return value
        if value not in constants:
            constants[value] = Value.constant(Literal.of(value.literal.array, f32))
        return constants[value]

    for function in copy.functions.values():
        for value in function.arguments:
            _retype(value, narrow)
        for node in function.nodes:
            node.op = _widened_op(node.op, narrow)
            node.operands = tuple([v if v is None else widened(v) for v in node.operands])
            for value in node.results:
                _retype(value, narrow)
        function.replace_results(widened)
    return copy


def _retype(value: Value, narrow: frozenset[DType]) -> None:
    if value.type.dtype in narrow:
        value.type = value.type.with_dtype(f32)


def _widened_op(op: Op, narrow: frozenset[DType]) -> Op:
    changed = {name: f32 for name, given in op.attributes.items() if isinstance(given, DType) and given in narrow}
    return type(op)(**{**op.attributes, **changed}) if changed else op
