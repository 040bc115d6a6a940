"""Lowering rules of collectives: each becomes one host call on contiguous elements."""

from __future__ import annotations

from collections.abc import Mapping

from treadle.backends.tvm.kernels.meeting import Meet
from treadle.backends.tvm.lowering.routine_writer import Keeps, RoutineWriter, Rule
from treadle.ir.graph import Node
from treadle.ir.op_registry import OPS
from treadle.ir.ops.collectives import Collective
from treadle.ir.sizing.sizes import Size


def _meet(w: RoutineWriter, node: Node) -> None:
    (x,), op = node.inputs, node.op
    assert isinstance(op, Collective)
    given, to = w.contiguous(w.view(x)), w.view(node.result)
    made = to if to.is_contiguous else w.scratch(to.dtype, to.shape, op.name)
    symbols = tuple(sorted({s for v in op.attributes.values() if isinstance(v, Size) for s in v.symbols}))
    kernel = Meet(op, to.dtype, len(to.shape), symbols)
    w.step(kernel, [given, made], [*given.shape, *made.shape, *map(Size.symbol, symbols)], node)
    if made is not to:
        w.copy(made, to, node)


RULES: Mapping[str, Rule] = {name: _meet for name, op in OPS.items() if issubclass(op, Collective)}
KEEPS: Mapping[str, Keeps] = {}
