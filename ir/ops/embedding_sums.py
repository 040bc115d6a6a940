"""The sum of several embeddings: of token, position and segment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Composite, Operand
from treadle.ir.samples import S
from treadle.ir.types import Type

MOST_TABLES = 8


@op("embedding_sum")
class EmbeddingSum(Composite):
    """y[..., d] = sum_n table_n[indices_n[...], d]        (BERT, Devlin et al. 2019: token, position and segment)

    The operands are the tables [v_n, d], then the indices into each table, in the same order. Indices broadcast:
    positions have the shape [s], and tokens [b, s]. The sum is taken in the order of the tables.

    tables  the number of tables, 2 to 8
    """

    operand = Operand(variadic=True)
    tables: int = 2

    def operand_names(self, count: int) -> list[str]:
        names = [f"{name}{n}" for name in ("table", "indices") for n in range(self.tables)]
        return [*names, *(f"operand{n}" for n in range(len(names), count))][:count]

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        return ", ".join([*(f"@v{n} d" for n in range(self.tables)), *["..."] * self.tables]) + " -> ... d"

    def dtypes(self) -> str:
        indices = [f"i{n or ''}" for n in range(self.tables)]
        return ", ".join([*["n"] * self.tables, *indices]) + " -> n"

    @property
    def linear(self) -> tuple[frozenset[str], ...]:
        """The op is linear in all tables together."""
        return (frozenset(self.operand_names(self.tables)),)

    def check(self, types: Sequence[Type | None]) -> None:
        if not 2 <= self.tables <= MOST_TABLES:
            raise RuleError(f"adds 2 to {MOST_TABLES} tables, not {self.tables}")
        if len(types) != 2 * self.tables:
            raise RuleError(f"takes {self.tables} tables and as many index tensors, received {len(types)} operands")

    def body(self, b: Builder, *operands: Expr) -> Any:
        pairs = zip(operands[: self.tables], operands[self.tables :], strict=True)
        return reduce(add, [b.embedding(table, indices) for table, indices in pairs])

    samples = [
        S("f32[5,3]", "f32[4,3]", "i64[2,4] < 5", "i64[2,4] < 4"),
        S("f32[5,3]", "f32[4,3]", "f32[2,3]", "i64[2,4] < 5", "i32[4] < 4", "i64[] < 2", tables=3),
        S("f32[5,3]", "f32[4,3]", "i64[1,4] < 5", "i64[2,1] < 4"),
        S("i64[5,3]", "i64[4,3]", "i64[2] < 5", "i64[2] < 4"),
    ]
    errors = [
        (S("f32[5,3]", "f32[4,2]", "i64[2]", "i64[2]"), "axis d sizes disagree: 3 in table0, 2 in table1"),
        (S("f32[5,3]", "f16[4,3]", "i64[2]", "i64[2]"), "dtypes disagree: table0 is f32, table1 is f16"),
        (S("f32[5,3]", "f32[4,3]", "i64[2]", "f32[2]"), "indices1 must be an integer"),
        (S("f32[5,3]", "f32[4,3]", "i64[2]", "i64[3]"), "sizes disagree: 2 in indices0, 3 in indices1"),
        (S("f32[5,3]", "f32[4]", "i64[2]", "i64[2]"), "table1 must have rank 2"),
        (S("f32[5,3]", "f32[4,3]", "i64[2]"), "takes 2 tables and as many index tensors, received 3 operands"),
        (S("f32[5,3]", "i64[2]", tables=1), "adds 2 to 8 tables, not 1"),
    ]
