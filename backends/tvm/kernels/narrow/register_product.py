"""Base of products of 8-bit and bf16 numbers without AMX. The accumulators of a tile stay in registers during the loop
over k.

    c[m, n] = epilogue(sum_k a[m, k] * w[n, k], ...)

w is read once for each tile, with several elements in each lane; the corresponding elements of a are broadcast. Each
row is summed over k in the same order, for any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.finishing import FinishedProduct
from treadle.backends.tvm.kernels.narrow.register_tiles import narrow_width, over_tiles, row_of
from treadle.backends.tvm.kernels.pointwise import Chain

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


@dataclass(frozen=True)
class RegisterTile:
    """A tile of the output.

    panel    the panel of w
    start    first column of the tile in the panel
    vectors  number of vectors of columns
    first    first row of a
    high     number of rows
    count    number of existing rows, if fewer: the others repeat the last row and are not stored
    slot     the slot of workspace that holds the unpacked panel, or None
    """

    panel: Expr
    start: int
    vectors: int
    first: Expr
    high: int
    count: Expr | None = None
    slot: Expr | None = None

    def row(self, k: Emitter, number: int) -> Expr:
        """Return the index of a row of a, from its number in the tile."""
        return row_of(k, self.first, number, self.count)


@dataclass(frozen=True)
class ProductSizes:
    """The sizes of a call, and values derived from them.

    m, depth, columns  m, k and n
    slots    number of slots of the workspace
    steps    number of steps of k in panels, the last one padded
    panels   number of panels of w
    """

    m: Expr
    depth: Expr
    columns: Expr
    slots: Expr
    steps: Expr
    panels: Expr


Write = Callable[..., None]
"""A function that emits one tile from its panel, first column, number of columns, first row and number of rows
(`RegisterTile`).
"""


@dataclass(frozen=True)
class RegisterProduct(FinishedProduct):
    """c = epilogue(a @ w), for 8-bit or bf16 numbers.

    epilogue a chain whose first input is the sum; None: the sum is stored unchanged
    extras   form of the chain's other inputs: see `Finishing`
    whole    True if n is a multiple of a panel's width at every call

    Arguments: the pointers of `ask`, a and w first; the extras, c; the workspace; m, k, n; the strides of rows of `m`
    and `mn` extras and of c; the number of slots of the workspace, if there is one.
    """

    epilogue: Chain | None = None
    extras: tuple[str, ...] = ()
    whole: bool = False

    @property
    def title(self) -> str:
        return f"{super().title}{self.finishing.title}"

    # -- specific to a kind of numbers ------------------------------------------------------------------------------

    def ask(self, k: Emitter) -> dict[str, Any]:
        """Declare the pointers of a, w and their scales. Return them by name."""
        raise NotImplementedError

    def memory(self, k: Emitter) -> dict[str, Any]:
        """Declare the pointers of the workspace. Return them by name."""
        return {}

    def shapes(self, k: Emitter, sizes: ProductSizes, width: int) -> Mapping[str, list[Expr]]:
        """Return the shapes of the arrays at these pointers, by name."""
        raise NotImplementedError

    def steps(self, k: Emitter, depth: Expr) -> Expr:
        """Return the number of steps of k in panels, the last one padded."""
        raise NotImplementedError

    def sum(self, k: Emitter, views: Mapping[str, Any], tile: RegisterTile, sizes: ProductSizes) -> Any:
        """Return the tile's sums, row by row, one vector after the other."""
        raise NotImplementedError

    def value(self, k: Emitter, views: Mapping[str, Any], tile: RegisterTile, row: Expr, at: int, total: Expr) -> Expr:
        """Return the value of a vector of sums, for this row and the columns from `at` of the panel on."""
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
        """Emit every tile of m rows and all panels, by calls of `write`."""
        over_tiles(k, sizes.m, sizes.panels, write)
