"""A product of two terms as one step. Each letter is assigned to rows, columns, the sum or the batch, and needed copies
are added.

    c[batch..., m, n] = epilogue(sum_k x[batch..., m, k] y[batch..., n, k])

Letters with the same role are merged into one dimension: in a view, or in a copy if the strides do not allow a view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from treadle.backends.tvm.kernels.encoded.block_product import BlockProduct
from treadle.backends.tvm.kernels.encoded.block_words import WIDTH as BLOCKS_WIDTH
from treadle.backends.tvm.kernels.encoded.block_words import WordForm
from treadle.backends.tvm.kernels.encoded.pair_block_product import PairBlockProduct
from treadle.backends.tvm.kernels.encoded.quad_block_product import QuadBlockProduct
from treadle.backends.tvm.kernels.encoded.tile_block_product import TileBlockProduct
from treadle.backends.tvm.kernels.encoded.unpacking import PackedForm
from treadle.backends.tvm.kernels.encoded.wide_block_product import WideBlockProduct
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.matmul import Matmul, Pack, panel_width
from treadle.backends.tvm.kernels.narrow.byte_product import ByteTileProduct, QuadProduct
from treadle.backends.tvm.kernels.narrow.pair_product import PairProduct
from treadle.backends.tvm.kernels.narrow.register_tiles import narrow_width
from treadle.backends.tvm.kernels.narrow.round_rows import RoundRows, form_for, held_dtype, held_elements
from treadle.backends.tvm.kernels.narrow.tile_product import TileProduct
from treadle.backends.tvm.kernels.pointwise import Chain
from treadle.backends.tvm.lowering.lettered_views import LetteredView
from treadle.backends.tvm.lowering.routine_writer import RoutineWriter
from treadle.ir.graph import Node
from treadle.ir.layouts import panels as panels_of
from treadle.ir.sizing.sizes import ONE, ZERO, Size, product
from treadle.ir.storage.views import View
from treadle.ir.types import bf16, f32


def rounded_rows(w: RoutineWriter, x: View, m: Size, k: Size, stride: Size, node: Node) -> View:
    """Round m rows of k elements to bf16, in the form that the instruction set's product reads. All consumers share the
    result.
    """
    found = w.rounded.get(x.storage)
    if found is not None:
        return found
    form = form_for(w.isa)

    def make() -> View:
        made = w.scratch(held_dtype(form), (held_elements(form, m, k),), f"{x.storage.name}_{form}")
        w.step(RoundRows(x.dtype.name, form), [x, made], [m, k, stride], node)
        return made

    return w.made_once(x, ("rounded rows", m, k, stride), make)


@dataclass(frozen=True)
class Finish:
    """The epilogue of a product: a chain whose first input is the sum, and the chain's other inputs."""

    chain: Chain | None = None
    extras: tuple[LetteredView, ...] = ()


class MatrixProduct:
    """One product of two terms as a step, with the copies that it needs.

    packed   True if y is a matrix in panels or in pairs
    form     the form of the blocks in y's panels, or None
    encoded  for an integer product: x in the form that its kernel reads, and the scales of the rows
    sides    for a product of two computed bf16 matrices: both operands in the form that the kernel reads
    """

    def __init__(
        self,
        w: RoutineWriter,
        node: Node,
        sizes: Mapping[str, Size],
        x: LetteredView,
        y: LetteredView,
        to: LetteredView,
        finish: Finish,
        packed: bool = False,
        form: PackedForm | WordForm | None = None,
        encoded: tuple[View, View] | None = None,
        sides: tuple[View, View] | None = None,
    ) -> None:
        self.form, self.encoded, self.sides = form, encoded, sides
        self.w, self.node, self.sizes, self.packed = w, node, sizes, packed or sides is not None
        self.chain, self.extras = finish.chain, list(finish.extras)
        self.x, self.y, self.to, self.c = x, y, to, to
        self.column = self._column()
        if self.column in x.letters:
            self.x, self.y = y, x
        letters, own, other = to.letters, set(self.x.letters), set(self.y.letters)
        self.k = [n for n in self.x.letters if n in other and n not in letters]
        self.rows = [n for n in letters if n in own and n not in other]
        self.batch = [n for n in letters if n in other and n != self.column]

    def _column(self) -> str | None:
        """Return the letter of the columns. It occurs in only one operand, and is contiguous in the result if
        possible.
        """
        if self.packed:
            return next(n for n in reversed(self.to.letters) if n in self.y.letters)
        alone = [n for n in self.to.letters if (n in self.x.letters) != (n in self.y.letters)]
        near = [n for n in alone if self.to.stride(n) == ONE and self.sizes[n] != ONE]
        found = near or alone
        return found[-1] if found else None

    # -- parts -----------------------------------------------------------------------------------------------

    def emit(self) -> None:
        columns = [self.column] if self.column is not None else []
        if columns and self.to.stride(self.column) != ONE and self.sizes[columns[0]] != ONE:
            self._store_elsewhere()
        if self.sides is None:
            self._lay_out_k()
        if not self.batch:
            self._join_rows()
            groups: list[list[str]] = []
        else:
            groups = self._join_batch()
            if len(groups) > 2:
                groups = self._copy_all()
        self._step(groups)
        if self.c is not self.to:
            self.w.copy(self.c.over(self.to.letters, self.sizes), self.to.view, None)

    @property
    def _written(self) -> list[LetteredView]:
        return [self.c, *self.extras]

    def _store_elsewhere(self) -> None:
        """Write the product to new memory, and copy it to the result."""
        order = [n for n in self.to.letters if n != self.column] + ([self.column] if self.column is not None else [])
        order = [n for n in order if n in self.batch] + [n for n in order if n not in self.batch]
        made = self.w.scratch(self.to.view.dtype, [self.sizes[n] for n in order], "product")
        self.c = LetteredView(tuple(order), made)

    def _lay_out_k(self) -> None:
        """Make the summed letters of x contiguous, and make the summed letters of y mergeable in the same order. Insert
        copies if necessary.
        """
        y_order = [n for n in self.y.letters if n in self.k]
        if self._near(self.k) and self.y.joined(self.k, self.sizes) is None and self._near(y_order):
            self.k = y_order
        if not self._near(self.k):
            if self.y.joined(self.k, self.sizes) is None:
                self.k = y_order
            held = [n for n in self.to.letters if n in self.x.letters and self.x.stride(n) != ZERO]
            held = [n for n in held if n not in self.rows] + [n for n in held if n in self.rows]
            self.x = self.x.copied(self.w, [*held, *self.k], self.sizes)
        if not self.packed and self.y.joined(self.k, self.sizes) is None:
            held = [n for n in self.to.letters if n in self.y.letters and n != self.column]
            held = [n for n in held if self.y.stride(n) != ZERO]
            columns = [self.column] if self.column is not None else []
            # columns are innermost, as in panels
            self.y = self.y.copied(self.w, [*held, *self.k, *columns], self.sizes)

    def _near(self, order: Sequence[str]) -> bool:
        """Return True if these letters of x are contiguous in this order."""
        stride = self.x.joined(order, self.sizes)
        return stride is not None and (stride == ONE or product(self.sizes[n] for n in order) == ONE)

    def _join_rows(self) -> None:
        """Merge all rows into one dimension, since y is the same for all rows. Terms whose rows cannot be merged are
        copied.
        """
        if self.sides is None and self.x.joined(self.rows, self.sizes) is None:
            self.x = self.x.copied(self.w, [*self.rows, *self.k], self.sizes)
        if self.c.joined(self.rows, self.sizes) is None:
            self._store_elsewhere()
        columns = [self.column] if self.column is not None else []
        for i, extra in enumerate(self.extras):
            if extra.joined(self.rows, self.sizes) is None or not self._in_line(extra):
                self.extras[i] = extra.copied(self.w, [*self.rows, *columns], self.sizes)

    def _in_line(self, extra: LetteredView) -> bool:
        """Return True if the columns of an extra are contiguous, or if one column is repeated."""
        return extra.stride(self.column) in (ZERO, ONE) or self.sizes[str(self.column)] == ONE

    def _join_batch(self) -> list[list[str]]:
        """Return the letters of each batch dimension. Row letters that cannot be merged become batch letters."""
        columns = [self.column] if self.column is not None else []
        for i, extra in enumerate(self.extras):
            if not self._in_line(extra):
                self.extras[i] = extra.copied(
                    self.w, [n for n in self.to.letters if n not in columns] + columns, self.sizes
                )
        start = 0
        while any(t.joined(self.rows[start:], self.sizes) is None for t in (self.x, *self._written)):
            start += 1
        outer = self.rows[:start]
        self.rows = self.rows[start:]
        self.batch = [n for n in self.to.letters if n in self.batch or n in outer]
        groups = [[n] for n in self.batch if self.sizes[n] != ONE]
        at = 0
        while at + 1 < len(groups):
            both = groups[at] + groups[at + 1]
            if all(t.joined(both, self.sizes) is not None for t in (self.x, self.y, *self._written)):
                groups[at : at + 2] = [both]
            else:
                at += 1
        return groups

    def _copy_all(self) -> list[list[str]]:
        """Copy all operands to new buffers with the same order of batch subscripts."""
        columns = [self.column] if self.column is not None else []
        self.x = self.x.copied(self.w, [*self.batch, *self.rows, *self.k], self.sizes)
        self.y = self.y.copied(self.w, [*self.batch, *self.k, *columns], self.sizes)
        order = [*self.batch, *self.rows, *columns]
        if self.c.letters != tuple(order) or not self.c.view.is_contiguous:
            self.c = LetteredView(
                tuple(order), self.w.scratch(self.to.view.dtype, [self.sizes[n] for n in order], "product")
            )
        self.extras = [extra.copied(self.w, order, self.sizes) for extra in self.extras]
        return [self.batch]

    # -- the step --------------------------------------------------------------------------------------------

    def _step(self, groups: list[list[str]]) -> None:
        """Add the step of the kernel that reads the forms of both operands."""
        m, k = (product(self.sizes[n] for n in part) for part in (self.rows, self.k))
        n = self.sizes[self.column] if self.column is not None else ONE
        width = self._width(n)
        whole = n.constant is not None and n.constant % width == 0
        how, rows = self._extra_rows(m, n)
        if self.encoded is not None:
            self._step_of_bytes(self.encoded, how, whole, [m, k, n, *rows])
        elif self._is_paired:
            self._step_of_pairs(how, whole, width, (m, k, n), rows)
        elif isinstance(self.form, WordForm):
            kernel = WideBlockProduct(self.form, self.chain, how, whole)
            self._step_of_panels(kernel, self.y.view, [m, k, n], rows, [])
        else:
            panels, batches = self._batches(groups, width, n, k)
            shaped = width, self.chain, how, bool(groups), whole
            floats: Kernel = Matmul(*shaped) if self.form is None else BlockProduct(*shaped, self.form)
            self._step_of_panels(floats, panels, [m, k, n], rows, batches)

    @property
    def _is_paired(self) -> bool:
        """True if y is a weight in pairs of bf16 numbers, or in blocks that are multiplied as bf16 numbers."""
        return self.packed and self.x.view.dtype is bf16

    def _width(self, n: Size) -> int:
        """Return the number of columns of a panel of y."""
        if isinstance(self.form, WordForm) and not self._is_paired:
            return BLOCKS_WIDTH
        is_narrow = self._is_paired or self.encoded is not None
        return narrow_width(self.w.isa) if is_narrow else panel_width(n.constant, self.w.isa)

    def _joined(self, term: LetteredView, letters: Sequence[str]) -> Size:
        """Return the stride of letters that are merged into one dimension by now."""
        stride = term.joined(letters, self.sizes)
        assert stride is not None
        return stride

    def _extra_rows(self, m: Size, n: Size) -> tuple[tuple[str, ...], list[Size]]:
        """Return the dimensions of each of the epilogue's inputs (`mn`, `m`, `n`, or `1` for a scalar), and the strides
        of the rows of those that have rows.
        """
        how, rows = [], []
        for extra in self.extras:
            row = self._joined(extra, self.rows) if m != ONE else ZERO
            near = self.column is None or n == ONE or extra.stride(self.column) == ONE
            how.append(("n" if near else "1") if row == ZERO else "mn" if near else "m")
            rows += [row] if row != ZERO else []
        return tuple(how), rows

    def _add_step(
        self, kernel: Kernel, operands: Sequence[View], sizes: Sequence[Size], results: Sequence[View]
    ) -> None:
        """Add a step. Its pointers are the operands, the epilogue's inputs, and the arrays that it writes: the result
        and a workspace, if it has one.
        """
        pointers = [*operands, *[extra.view for extra in self.extras], *results]
        self.w.step(kernel, pointers, sizes, self.node, writes=len(results))

    def _step_of_bytes(self, encoded: tuple[View, View], how: tuple[str, ...], whole: bool, sizes: list[Size]) -> None:
        """Add the product of integers: of rows with their scales, and of a weight in bytes or in blocks."""
        rows, scales = encoded
        if self.form is None:
            kernel: Kernel = (ByteTileProduct if self.w.isa.multiplies_tiles else QuadProduct)(self.chain, how, whole)
        else:
            assert isinstance(self.form, WordForm)
            kernel = QuadBlockProduct(self.form, self.chain, how, whole)
        sizes = [*sizes, self._joined(self.c, self.rows)]
        self._add_step(kernel, [rows, self.y.view, scales], sizes, [self.c.view])

    def _step_of_pairs(
        self, how: tuple[str, ...], whole: bool, width: int, shape: tuple[Size, Size, Size], rows: list[Size]
    ) -> None:
        """Add the product of two bf16 matrices. The result is rounded to tiles if only another product reads it."""
        w, (m, k, n) = self.w, shape
        if self.sides is None:
            left, right = rounded_rows(w, self.x.view, m, k, self._joined(self.x, self.rows), self.node), self.y.view
        else:
            left, right = self.sides
        sizes = [m, k, n, *rows, self._joined(self.c, self.rows)]
        made, kernel = self.c.view, self._paired(how, whole)
        work: list[View] = []
        if made.storage in w.rounded:
            made = w.scratch(bf16, (held_elements("tiles", m, n),), f"{made.storage.name}_tiles")
            w.rounded[self.c.view.storage] = made
        if isinstance(kernel, PairBlockProduct):
            work = [w.scratch(bf16, (Size.of(w.slots), k, Size.of(width)), "unpacked")]
            sizes.append(Size.of(w.slots))
        self._add_step(kernel, [left, right], sizes, [made, *work])

    def _step_of_panels(
        self, kernel: Kernel, panels: View, shape: list[Size], rows: list[Size], batches: list[Size]
    ) -> None:
        """Add the product of a matrix of any dtype and of panels, for each index of the batches."""
        strides = [self._joined(self.x, self.rows), *rows, self._joined(self.c, self.rows)]
        self._add_step(kernel, [self.x.view, panels], [*shape, *strides, *batches], [self.c.view])

    def _batches(self, groups: list[list[str]], width: int, n: Size, k: Size) -> tuple[View, list[Size]]:
        """Return y in panels, which are packed here if y is no packed weight. Also return the two sizes of the batch,
        followed by the strides of each operand, of the epilogue's inputs and of the result. Without a batch, there are
        none.
        """
        missing = 2 - len(groups)
        counts = [ONE] * missing + [product(self.sizes[n] for n in group) for group in groups]

        def strides(term: LetteredView) -> list[Size]:
            return [ZERO] * missing + [self._joined(term, group) for group in groups]

        if self.packed:
            panels, of_panels = self.y.view, [ZERO, ZERO]
        else:
            panels, of_panels = self._pack(width, n, k, counts, strides(self.y), self._joined(self.y, self.k))
        if not groups:
            return panels, []
        extras = [stride for extra in self.extras for stride in strides(extra)]
        return panels, [*counts, *strides(self.x), *of_panels, *extras, *strides(self.c)]

    def _paired(self, how: tuple[str, ...], whole: bool) -> Kernel:
        """Return the kernel of a product with a weight in pairs, or in blocks that are multiplied as bf16 numbers."""
        if not self.w.isa.multiplies_tiles:
            if self.form is None:
                return PairProduct(self.chain, how, whole)
            return PairBlockProduct(self.chain, how, whole, self.form)
        chain, tiled = self.chain, self.c.view.storage in self.w.rounded
        if tiled:
            assert chain is not None
            chain = replace(chain, instructions=chain.instructions[:-1])  # the kernel rounds when it stores
        if self.form is not None:
            assert isinstance(self.form, PackedForm)
            return TileBlockProduct(chain, how, whole, tiled, self.form)
        return TileProduct(chain, how, whole, tiled)

    def _pack(
        self, width: int, n: Size, k: Size, counts: list[Size], strides: list[Size], k_stride: Size
    ) -> tuple[View, list[Size]]:
        """Add the step that packs y into panels, once for each batch index on which y depends. Return the panels and
        their batch strides.
        """
        layout = panels_of(width)
        one = layout.elements((n, k))
        own = [count if stride != ZERO else ONE for count, stride in zip(counts, strides, strict=True)]
        view = self.y.view
        made = self.w.scratch(f32, (one * own[0] * own[1],), f"{view.storage.name}_panels")
        sizes = [n, k, self.y.stride(self.column), k_stride, *own, *strides]
        near = self.column is not None and self.y.stride(self.column) == ONE
        self.w.step(Pack(width, near), [view, made], sizes, self.node)
        apart = [one * own[1], one]
        return made, [a if stride != ZERO else ZERO for a, stride in zip(apart, strides, strict=True)]
