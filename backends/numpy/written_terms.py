"""NumPy code for attention's masks and biases that writes to workspace arrays. Masks are true where a key is hidden.

Example: `kernels.causal(memory.x_work.queries, memory.x_work.keys, memory.x_work.term_0)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treadle.ir.attention.attention_terms import (
    AXES,
    Alibi,
    BooleanMask,
    Causal,
    Padding,
    Segments,
    T5Relative,
    TensorBias,
    Term,
    Window,
)
from treadle.ir.attention.term_visitor import TermVisitor
from treadle.ir.sizing.sizes import ONE, Size
from treadle.ir.types import Type, boolean, i64


def written_term(term: Term, operands: Sequence[str], work: str, number: int) -> str:
    """Return a term as an expression. Raises GraphError for a term that is not standard."""
    return term.accept(_Written(work, number), *operands)


def needed_by_term(term: Term, operands: Sequence[Type], queries: Size, keys: Size, number: int) -> Mapping[str, Type]:
    """Return the workspace arrays of a term by name. Raises GraphError for a term that is not standard."""
    return term.accept(_Needed(queries, keys, number), *operands)


class _Written(TermVisitor[str, str]):
    """Visitor that returns the code of a term; operands are expressions as text."""

    def __init__(self, work: str, number: int) -> None:
        self.work, self.out = work, f"{work}.term_{number}"
        self.beside = f"{work}.beside_{number}"
        self.grid = f"{work}.queries, {work}.keys"

    def causal(self, term: Causal) -> str:
        return f"kernels.causal({self.grid}, {self.out})"

    def window(self, term: Window) -> str:
        return f"kernels.window({self.grid}, {term.size}, {self.beside}, {self.out})"

    def padding(self, term: Padding, lengths: str) -> str:
        return f"kernels.padding({lengths}, {self.work}.keys, {self.out})"

    def segments(self, term: Segments, of_queries: str, of_keys: str) -> str:
        return f"kernels.segments({of_queries}, {of_keys}, {self.out})"

    def boolean_mask(self, term: BooleanMask, mask: str) -> str:
        return f'kernels.hidden_by({mask}, "{term.axes}", {self.out})'

    def tensor_bias(self, term: TensorBias, bias: str) -> str:
        return f'kernels.laid_out({bias}, "{term.axes}")'

    def t5_relative(self, term: T5Relative, table: str) -> str:
        beside = f"{self.beside}, {self.beside}_bucket"
        return f'kernels.t5_relative("{term}", {table}, {self.grid}, {beside}, {self.out})'

    def alibi(self, term: Alibi, slopes: str) -> str:
        grid = f"{self.beside}_queries, {self.beside}_keys"
        return f"kernels.alibi({slopes}, {grid}, {self.beside}, {self.out})"


class _Needed(TermVisitor[Type, Mapping[str, Type]]):
    """Visitor that returns the workspace of a term as types by name; operands are types."""

    def __init__(self, queries: Size, keys: Size, number: int) -> None:
        self.grid, self.out, self.beside = (queries, keys), f"term_{number}", f"beside_{number}"
        self.positions = {"queries": i64[(queries,)], "keys": i64[(keys,)]}

    def causal(self, term: Causal) -> Mapping[str, Type]:
        return {**self.positions, self.out: boolean[self.grid]}

    def window(self, term: Window) -> Mapping[str, Type]:
        return {**self.positions, self.beside: boolean[self.grid], self.out: boolean[self.grid]}

    def padding(self, term: Padding, lengths: Type) -> Mapping[str, Type]:
        (rows,), keys = lengths.shape, self.grid[1]
        return {"keys": self.positions["keys"], self.out: boolean[(rows, ONE, ONE, keys)]}

    def segments(self, term: Segments, of_queries: Type, of_keys: Type) -> Mapping[str, Type]:
        return {self.out: boolean[(of_queries.shape[0], ONE, *self.grid)]}

    def boolean_mask(self, term: BooleanMask, mask: Type) -> Mapping[str, Type]:
        sizes = dict(zip(term.axes.split(), mask.shape, strict=True))
        return {self.out: boolean[tuple(sizes.get(axis, ONE) for axis in AXES)]}

    def tensor_bias(self, term: TensorBias, bias: Type) -> Mapping[str, Type]:
        return {}

    def t5_relative(self, term: T5Relative, table: Type) -> Mapping[str, Type]:
        between = i64[self.grid]
        held = table.dtype[(*self.grid, table.shape[1])]
        return {**self.positions, self.beside: between, f"{self.beside}_bucket": between, self.out: held}

    def alibi(self, term: Alibi, slopes: Type) -> Mapping[str, Type]:
        dtype, (queries, keys) = slopes.dtype, self.grid
        counts = {f"{self.beside}_queries": dtype[(queries,)], f"{self.beside}_keys": dtype[(keys,)]}
        return {**counts, self.beside: dtype[self.grid], self.out: dtype[(ONE, slopes.shape[0], *self.grid)]}
