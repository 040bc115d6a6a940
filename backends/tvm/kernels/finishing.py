"""The epilogue of a product: a chain of elementwise ops that is applied to the sums before they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.pointwise import Chain
from treadle.ir.types import DTYPES, DType, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_LINE = 64
"""Number of bytes in a cache line."""
Shape = tuple[list["Expr"], "list[Expr] | None"]
"""Sizes and strides of a view. Strides of None mean row-major."""


@dataclass(frozen=True)
class Finishing:
    """c = chain(sums, x0, x1, ...)

    chain   a chain whose first input is the sum; None: the sum is stored unchanged
    extras  the form of each further input of the chain: `n` a vector over n, `m` one number for each row, `mn` a matrix
            like c, `1` one number
    whole   True if a full vector of columns is inside the matrix at every call
    """

    chain: Chain | None
    extras: tuple[str, ...]
    whole: bool = False

    @property
    def dtype(self) -> DType:
        """Dtype of the chain's result."""
        return self.chain.dtype if self.chain else f32

    @property
    def title(self) -> str:
        """Suffix of a kernel's name."""
        return f"_{self.chain.title}" if self.chain else ""

    def pointers(self, k: Emitter, stored: DType | None = None) -> list[Any]:
        """Declare the pointers of x0, x1, ... and c. c has the dtype `stored`, or by default the chain's dtype."""
        dtypes = [DTYPES[name] for name in self.chain.inputs[1:]] if self.chain else []
        return [*(k.pointer(f"x{i}", d) for i, d in enumerate(dtypes)), k.pointer("c", stored or self.dtype)]

    def strides(self, k: Emitter) -> dict[str, Expr]:
        """Declare the row strides of inputs with rows, and last the row stride of c. Return them by the pointer's
        name.
        """
        made = {f"x{i}": k.size(f"x{i}_stride") for i, how in enumerate(self.extras) if "m" in how}
        return made | {"c": k.size("c_stride")}

    def shapes(self, m: Expr, columns: Expr, rows: Mapping[str, Expr]) -> dict[str, Shape]:
        """Return the views of x0, x1, ... and c of a matrix, by pointer name. `rows`: the result of `strides`."""
        made: dict[str, Shape] = {"c": ([m, columns], [rows["c"], 1])}
        for i, how in enumerate(self.extras):
            shape: list[Expr] = {"n": [columns], "m": [m], "mn": [m, columns], "1": [1]}[how]
            made[f"x{i}"] = shape, [rows[f"x{i}"], 1][: len(how)] if "m" in how else None
        return made

    def bring(
        self, k: Emitter, views: Mapping[str, Any], at: Sequence[Expr], rows: int, column: Expr, wide: int
    ) -> None:
        """Prefetch the cache lines that the epilogue of a tile reads and writes, from row `at` on.

        Each row of a matrix like c has a few such lines, which the hardware prefetcher does not predict. If no input is
        such a matrix, prefetching has no benefit.
        """
        names = [f"x{number}" for number, how in enumerate(self.extras) if how == "mn"]
        for name in [*names, "c"] if names else []:
            line = _LINE // views[name].dtype.bytes
            for i, j in product(range(rows), range(0, wide, line)):
                k.prefetch(views[name], [*at[:-1], at[-1] + i, column + j])

    def store(
        self,
        k: Emitter,
        views: Mapping[str, Any],
        at: Sequence[Expr],
        column: Expr,
        value: Expr,
        columns: Expr,
        lanes: int,
    ) -> None:
        """Apply the epilogue to a vector of sums in row `at` from `column` on, and store the lanes that are inside the
        matrix.
        """

        def all_lanes() -> None:
            k.store(views["c"], [*at, column], self.finished(k, views, at, column, value, lanes), lanes)

        if self.whole:
            all_lanes()
            return
        value = k.let(value, "value")
        inside = k.let(k.index(columns) - column, "inside")
        with k.when(inside >= k.index(lanes)):
            all_lanes()
        with k.when(inside < k.index(lanes)):
            self._store_some(k, views, at, column, value, k.let(k.greatest(inside, k.index(0)), "some"), lanes)

    def finished(
        self, k: Emitter, views: Mapping[str, Any], at: Sequence[Expr], column: Expr, value: Expr, lanes: int
    ) -> Expr:
        """Return the chain's value for a vector in row `at` from `column` on. The whole vector must be inside the
        matrix.
        """
        if self.chain is None:
            return value
        extras = [self._extra(k, views, i, at, column, lanes) for i in range(len(self.extras))]
        return self.chain.emit(k, [value, *extras], lanes)

    def _extra(
        self, k: Emitter, views: Mapping[str, Any], number: int, at: Sequence[Expr], column: Expr, lanes: int
    ) -> Expr:
        how, view = self.extras[number], views[f"x{number}"]
        if how in ("1", "m"):
            return k.splat(k.load(view, [*at[:-1], 0] if how == "1" else at), lanes)
        return k.load(view, [*at[:-1], column] if how == "n" else [*at, column], lanes)

    def _store_some(
        self,
        k: Emitter,
        views: Mapping[str, Any],
        at: Sequence[Expr],
        column: Expr,
        value: Expr,
        count: Expr,
        lanes: int,
    ) -> None:
        """Apply the epilogue and store `count` lanes of a vector. Extras are read through copies that are padded with
        zeros.
        """
        extras = []
        for number, how in enumerate(self.extras):
            if "n" not in how:
                extras.append(self._extra(k, views, number, at, column, lanes))
                continue
            view = views[f"x{number}"]
            held = k.registers(lanes, view.dtype, "held")
            k.store(held, [0], k.number(0, view.dtype, lanes), lanes)
            self._copy(k, view, [*at[:-1], column] if how == "n" else [*at, column], held, [k.index(0)], count)
            extras.append(k.load(held, [0], lanes))
        made = k.registers(lanes, views["c"].dtype, "made")
        k.store(made, [0], self.chain.emit(k, [value, *extras], lanes) if self.chain else value, lanes)
        self._copy(k, made, [k.index(0)], views["c"], [*at, column], count)

    def _copy(
        self, k: Emitter, source: Any, read: Sequence[Expr], to: Any, written: Sequence[Expr], count: Expr
    ) -> None:
        with k.loop(count, "t") as t:
            k.store(to, [*written[:-1], written[-1] + t], k.load(source, [*read[:-1], read[-1] + t]))


class FinishedProduct(Kernel):
    """Base class of kernels of products [m, k] by [n, k] with an epilogue.

    epilogue, extras, whole  fields of each subclass: see `Finishing`
    """

    epilogue: Chain | None
    extras: tuple[str, ...]
    whole: bool

    @property
    def finishing(self) -> Finishing:
        """Epilogue of the sums."""
        return Finishing(self.epilogue, self.extras, self.whole)

    def flops(self, sizes: Sequence[int]) -> int:
        m, depth, columns = sizes[:3]
        return 2 * m * depth * columns
