"""What products of narrow numbers without a matrix unit share: tiles of sums in registers, through all of k.

    c[m, n] = epilogue(sum_k a[m, k] * w[n, k], ...)

w is read once a tile, some of its elements in each lane, and as many of a are broadcast. Each row is summed over k in
one order, however many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    count    how many of these there are, if not all of them: others repeat the last one, and are not stored
    slot     of the memory that it works in, where its panel lies unpacked; None: it does not
    """

    panel: Expr
    start: int
    vectors: int
    first: Expr
    high: int
    count: Expr | None = None
    slot: Expr | None = None

    def row(self, k: Emitter, number: int) -> Expr:
        """A row of a, by its number in the tile."""
        return self.first + (number if self.count is None else k.least(k.index(number), self.count - 1))


@dataclass(frozen=True)
class ProductSizes:
    """What a call says, and what follows of it.

    m, depth, columns  m, k and n
    slots    of the memory that it works in
    steps    of k that panels hold, the last one filled up
    panels   of w
    """

    m: Expr
    depth: Expr
    columns: Expr
    slots: Expr
    steps: Expr
    panels: Expr


Write = Callable[..., None]
"""Writes one tile: its panel, its first column of the panel and how many, its first row and how many; see
`RegisterTile`."""


@dataclass(frozen=True)
class RegisterProduct(FinishedProduct):
    """c = epilogue(a @ w), of narrow numbers.

    epilogue what is done with the sum, the chain's first input; None: it is stored as it is
    extras   how the chain's other inputs lie: see `Finishing`
    whole    whether n is a multiple of a panel's width at every call

    Passed: what `ask` asks for, a and w first; the extras, c; the memory that it works in; m, k, n; `m` and `mn`
    extras' and c's strides of rows; how many slots that memory has, if there is some.
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

    def memory(self, k: Emitter) -> dict[str, Any]:
        """Ask for the pointers of the memory that it works in, by name."""
        return {}

    def shapes(self, k: Emitter, sizes: ProductSizes, width: int) -> Mapping[str, list[Expr]]:
        """Their shapes."""
        raise NotImplementedError

    def steps(self, k: Emitter, depth: Expr) -> Expr:
        """Steps of k that panels hold, the last one filled up."""
        raise NotImplementedError

    def sum(self, k: Emitter, views: Mapping[str, Any], tile: RegisterTile, sizes: ProductSizes) -> Any:
        """The tile's sums, a vector after the other, row by row."""
        raise NotImplementedError

    def value(self, k: Emitter, views: Mapping[str, Any], tile: RegisterTile, row: Expr, at: int, total: Expr) -> Expr:
        """What a vector of sums stands for: of this row, from column `at` of the panel on."""
        return total

    # -- the loops -----------------------------------------------------------------------------------------------

    def emit(self, k: Emitter) -> None:
        given = self.ask(k)
        finished = self.finishing.pointers(k)
        memory = self.memory(k)
        given |= memory
        m, depth, columns = k.size("m"), k.size("k"), k.size("n")
        strides = self.finishing.strides(k)
        slots = k.size("slots") if memory else k.index(0)
        steps = k.let(self.steps(k, depth), "steps")
        width, lanes = narrow_width(k.isa), k.isa.lanes()
        panels = k.let(k.floor_divide(columns + (width - 1), width), "panels")
        sizes = ProductSizes(m, depth, columns, slots, steps, panels)
        shapes = self.finishing.shapes(m, columns, strides)
        views = {p.name: k.view(p, *shapes[p.name]) for p in finished}
        views |= {name: k.view(given[name], shape) for name, shape in self.shapes(k, sizes, width).items()}

        def write(panel: Expr, start: int, wide: int, first: Expr, high: int, **more: Expr) -> None:
            tile = RegisterTile(panel, start, wide // lanes, first, high, **more)
            self.finishing.bring(k, views, [first], high, panel * width + start, wide)
            sums = self.sum(k, views, tile, sizes)
            with k.loop(high if tile.count is None else tile.count, "i") as i:
                for v in range(tile.vectors):
                    at = start + v * lanes
                    total = k.load(sums, [(i * tile.vectors + v) * lanes], lanes)
                    value = self.value(k, views, tile, first + i, at, total)
                    column = k.let(panel * width + at, "column")
                    self.finishing.store(k, views, [first + i], column, value, columns, lanes)

        self.over(k, views, sizes, write)

    def over(self, k: Emitter, views: Mapping[str, Any], sizes: ProductSizes, write: Write) -> None:
        """Every tile of m rows and of so many panels."""
        over_tiles(k, sizes.m, sizes.panels, write)
