"""Relayout: the same elements in another order in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.layouts import Layout
from treadle.ir.op_registry import op
from treadle.ir.operation import Grads, Operand, Primitive
from treadle.ir.types import Type


@op("relayout", axes="... -> ...", dtypes="t -> t", linear="x", flops=0)
class Relayout(Primitive):
    """y = x, in another order in memory

    to  the layout of the result (`treadle.ir.layouts`)

    Passes insert the op before a product that reads its weight in a layout. Consumers of the result must read that
    layout.
    """

    is_word = False
    moves_blocks = True
    x = Operand()
    to: Layout

    def check(self, types: Sequence[Type | None]) -> None:
        (x,) = types
        if x is not None and x.rank != 2:
            raise RuleError(f"relayout: only a matrix can have a layout, and x has rank {x.rank}", received=str(x))

    def result_layout(self, index: int) -> Layout | None:
        return self.to

    def reference(self, x: Any) -> Any:
        return x

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        return [grads[0]]
