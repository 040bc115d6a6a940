"""An operand of a bf16 product that is computed: it is rounded, and stored in the form that the product's kernel reads.

    a[i, k] = x[i, k]        rows of the left operand       w[panel, k // 2, n, k % 2] = x[n, k]      the right operand

x may be contiguous along k, or along its rows (columns of the right operand), as in the operands of a gradient. It is
read in squares of 16 rows and 32 elements of k, which are 16 times 16 pairs. If the result must be contiguous along the
other axis than x, squares are transposed in registers. Two elements of k in different rows of memory are combined into
pairs by one shuffle. (NumPy packs a bound weight, and `RoundRows` packs a left operand that is contiguous along k.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.narrow.round_rows import two_rounded
from treadle.ir.layouts import PAIR_SQUARE, PAIR_STEP
from treadle.ir.types import DTYPES, bf16

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_INTERLEAVED = [half * PAIR_SQUARE + i for i in range(PAIR_SQUARE) for half in range(2)]


@dataclass(frozen=True)
class RoundSquares(Kernel):
    """y = x[n, k] rounded to bf16, for a product of pairs. k is padded to a multiple of 32 with zeros.

    dtype  dtype of x, by name: f32 or bf16
    along  True if x is contiguous along k, False if along n
    width  width of a panel of y, the right operand: rows are padded to a multiple of it; 0: y is the left operand
    flat   True if y has pairs one after the other; otherwise it has the squares of AMX, or for the left operand the
           tiles [n // 32, k // 32, 2, 16, 32], where rows past n are undefined

    Only for instruction sets that multiply pairs. Arguments: x, y; n, k; x's stride along the other axis.
    """

    dtype: str
    along: bool
    width: int
    flat: bool

    @property
    def title(self) -> str:
        side = "right" if self.width else "left"
        return f"round_{side}_by_{'rows' if self.along else 'columns'}"

    def emit(self, k: Emitter) -> None:
        px, py = k.pointer("x", DTYPES[self.dtype]), k.pointer("y", bf16)
        n, depth, stride = k.size("n"), k.size("k"), k.size("x_stride")
        steps = k.let(k.floor_divide(depth + (PAIR_STEP - 1), PAIR_STEP), "steps")
        x = k.view(px, [n, depth] if self.along else [depth, n], [stride, 1])
        filled = self.width or (PAIR_SQUARE if self.flat else 2 * PAIR_SQUARE)
        groups = k.let(k.floor_divide(n + (filled - 1), filled), "groups")
        squares = filled // PAIR_SQUARE
        if not self.flat:
            y = k.view(py, [groups, steps, squares, PAIR_SQUARE, PAIR_STEP])
        elif self.width:
            y = k.view(py, [groups, steps, PAIR_SQUARE, 2 * self.width])
        else:
            y = k.view(py, [n, steps * PAIR_STEP])

        def square(group: Expr, step: Expr, j: Expr) -> None:
            row = k.let(group * filled + j * PAIR_SQUARE, "row")
            self._square(k, x, y, n, depth, group, step, j, row)

        # The loops are ordered so that each task reads contiguous memory.
        if self.along:
            with k.parallel(groups, "group") as group, k.loop(squares, "j") as j, k.loop(steps, "step") as step:
                square(group, step, j)
        else:
            with k.parallel(steps, "step") as step, k.loop(groups, "group") as group, k.loop(squares, "j") as j:
                square(group, step, j)

    def _square(
        self, k: Emitter, x: Any, y: Any, n: Expr, depth: Expr, group: Expr, step: Expr, j: Expr, row: Expr
    ) -> None:
        """Emit square number j of its group: 16 rows from `row` on, and 32 elements of k from `step` on."""
        first = k.let(step * PAIR_STEP, "first")
        whole = k.both(row + PAIR_SQUARE <= n, first + PAIR_STEP <= depth)
        with k.when(whole):
            self._stored(k, self._pairs(k, x, [row, first]), y, group, step, j, row, None)
        with k.when(k.any_of(row + PAIR_SQUARE > n, first + PAIR_STEP > depth)):
            lanes = k.isa.lanes()
            rows, deep = k.let(k.least(n - row, k.index(PAIR_SQUARE)), "rows"), k.let(depth - first, "deep")
            deep = k.let(k.least(deep, k.index(PAIR_STEP)), "deep")
            held = k.registers(PAIR_SQUARE * PAIR_STEP, x.dtype, "held")
            for at in range(0, PAIR_SQUARE * PAIR_STEP, lanes):
                k.store(held, [at], k.number(0, x.dtype, lanes), lanes)
            high, wide, full = (rows, deep, PAIR_STEP) if self.along else (deep, rows, PAIR_SQUARE)

            def copied(count: Expr, lanes: int) -> None:
                with k.loop(high, "i") as i, k.loop(count, "e") as e:
                    at = [row + i, first + e * lanes] if self.along else [first + i, row + e * lanes]
                    k.store(held, [i * full + e * lanes], k.load(x, at, lanes), lanes)

            with k.when(wide >= k.index(full)):
                copied(k.index(full // lanes), lanes)
            with k.when(wide < k.index(full)):
                copied(wide, 1)
            self._stored(k, self._pairs(k, held, None), y, group, step, j, row, rows)

    def _pairs(self, k: Emitter, x: Any, at: list[Expr] | None) -> list[Expr]:
        """Return 16 vectors of pairs. A vector is one row along k, or two elements of k for 16 rows. Without `at`, x
        is a square.
        """
        lanes, i32 = k.isa.lanes(), DTYPES["i32"]
        made = []
        for i in range(PAIR_SQUARE):

            def part(second: int, i: int = i) -> Expr:
                if self.along:
                    place = [i * PAIR_STEP + second * lanes] if at is None else [at[0] + i, at[1] + second * lanes]
                else:
                    place = [(2 * i + second) * lanes] if at is None else [at[1] + 2 * i + second, at[0]]
                return k.load(x, place, lanes)

            if self.dtype == "f32":
                both = k.let(two_rounded(k, part(0), part(1)), "both")
                both = both if self.along else k.shuffle([both], _INTERLEAVED)
            else:
                order = list(range(PAIR_STEP)) if self.along else _INTERLEAVED
                both = k.shuffle([k.let(part(0), "one"), k.let(part(1), "other")], order)
            made.append(k.let(k.bits(k.let(both, "both"), i32, lanes), "pairs"))
        return made

    def _stored(
        self, k: Emitter, pairs: list[Expr], y: Any, group: Expr, step: Expr, j: Expr, row: Expr, rows: Expr | None
    ) -> None:
        """Emit storing of a square. `rows`: number of its rows, or None for 16."""
        if self.along == bool(self.width):
            pairs = k.transposed(pairs)
        for i, vector in enumerate(pairs):
            value = k.bits(vector, bf16, PAIR_STEP)
            if not self.flat:
                k.store(y, [group, step, j, i, 0], value, PAIR_STEP)
            elif self.width:
                k.store(y, [group, step, i, 2 * j * PAIR_SQUARE], value, PAIR_STEP)
            elif rows is None:
                k.store(y, [row + i, step * PAIR_STEP], value, PAIR_STEP)
            else:
                with k.when(rows > k.index(i)):
                    k.store(y, [row + i, step * PAIR_STEP], value, PAIR_STEP)
