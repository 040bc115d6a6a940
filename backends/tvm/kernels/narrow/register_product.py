"""What products of narrow numbers without a matrix unit share: tiles of sums in registers, through all of k.

    c[m, n] = epilogue(sum_k a[m, k] * w[n, k], ...)

w is read once a tile, some of its elements in each lane, and as many of a are broadcast. Each row is summed over k in
one order, however many rows there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.finishing import FinishedProduct
from treadle.backends.tvm.kernels.narrow.register_tiles import narrow_width, over_tiles
from treadle.backends.tvm.kernels.pointwise import Chain

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


@dataclass(frozen=True)
class RegisterTile:
    """A tile of sums.

    panel    of w
    start    its first column there
    vectors  of columns that it has
    first    its first row of a
    high     how many rows it has
    """

    panel: Expr
    start: int
    vectors: int
    first: Expr
    high: int


@dataclass(frozen=True)
class RegisterProduct(FinishedProduct):
    """c = epilogue(a @ w), of narrow numbers.

    epilogue what is done with the sum, the chain's first input; None: it is stored as it is
    extras   how the chain's other inputs lie: see `Finishing`
    whole    whether n is a multiple of a panel's width at every call

    Passed: what `ask` asks for, a and w first; the extras, c; m, k, n; `m` and `mn` extras' and c's strides of rows.
    """

    epilogue: Chain | None = None
    extras: tuple[str, ...] = ()
    whole: bool = False

    @property
    def title(self) -> str:
        return f"{super().title}{self.finishing.title}"

    # -- what a kind of numbers says -----------------------------------------------------------------------------

    def ask(self, k: Emitter) -> dict[str, Any]:
        """Ask for the pointers of a, w and what belongs to them, by name."""
        raise NotImplementedError

    def shapes(self, k: Emitter, m: Expr, steps: Expr, panels: Expr, width: int) -> Mapping[str, list[Expr]]:
        """Their shapes."""
        raise NotImplementedError

    def steps(self, k: Emitter, depth: Expr) -> Expr:
        """Steps of k that panels hold, the last one filled up."""
        raise NotImplementedError

    def sum(self, k: Emitter, views: Mapping[str, Any], tile: RegisterTile, steps: Expr) -> Any:
        """The tile's sums, a vector after the other, row by row."""
        raise NotImplementedError

    def value(self, k: Emitter, views: Mapping[str, Any], tile: RegisterTile, row: Expr, at: int, total: Expr) -> Expr:
        """What a vector of sums stands for: of this row, from column `at` of the panel on."""
        return total

    # -- the loops -----------------------------------------------------------------------------------------------

    def emit(self, k: Emitter) -> None:
        given = self.ask(k)
        finished = self.finishing.pointers(k)
        m, depth, columns = k.size("m"), k.size("k"), k.size("n")
        strides = self.finishing.strides(k)
        steps = k.let(self.steps(k, depth), "steps")
        width, lanes = narrow_width(k.isa), k.isa.lanes()
        panels = k.let(k.floor_divide(columns + (width - 1), width), "panels")
        shapes = self.finishing.shapes(m, columns, strides)
        views = {p.name: k.view(p, *shapes[p.name]) for p in finished}
        views |= {name: k.view(given[name], shape) for name, shape in self.shapes(k, m, steps, panels, width).items()}

        def write(panel: Expr, start: int, wide: int, first: Expr, high: int) -> None:
            tile = RegisterTile(panel, start, wide // lanes, first, high)
            self.finishing.bring(k, views, [first], high, panel * width + start, wide)
            sums = self.sum(k, views, tile, steps)
            with k.loop(high, "i") as i:
                for v in range(tile.vectors):
                    at = start + v * lanes
                    total = k.load(sums, [(i * tile.vectors + v) * lanes], lanes)
                    value = self.value(k, views, tile, first + i, at, total)
                    column = k.let(panel * width + at, "column")
                    self.finishing.store(k, views, [first + i], column, value, columns, lanes)

        over_tiles(k, m, panels, write)
