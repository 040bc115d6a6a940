"""Lookup of rows of a table that is stored in blocks. The rows are decoded when they are written.

y[i, d] = decode(x)[indices[i], d]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.encoded.block_words import WIDTH, WordBlock, WordForm
from treadle.backends.tvm.kernels.encoded.unpacking import PackedForm
from treadle.backends.tvm.kernels.gathering import checked
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.narrow.encode_groups import GROUP
from treadle.ir.layouts import PAIR_SQUARE, QUAD_HEAD, QUAD_STEP, ROW_HEAD
from treadle.ir.types import DTYPES, f32, i64, u8

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


class TakesRows(Kernel):
    """y[i, d] = decode(x)[indices[i], d]; base class of kernels that look up rows of a table in blocks.

    indices  dtypes of the indices by name; each subclass has this field

    Arguments: x, indices, y, the status words; the sizes v, d, i, where v is the number of rows of x; the strides of
    the indices and of y's rows.
    """

    indices: str

    def table(self, k: Emitter, pointer: Any, v: Expr, d: Expr) -> Any:
        """Return the view of x."""
        raise NotImplementedError

    def pick(self, k: Emitter, x: Any, y: Any, row: Expr, index: Expr, d: Expr) -> None:
        """Decode row `index` of x, and write it as row `row` of y."""
        raise NotImplementedError

    def emit(self, k: Emitter) -> None:
        pointers = [k.pointer("x", u8), k.pointer("indices", DTYPES[self.indices]), k.pointer("y", f32)]
        status_pointer = k.pointer("status", i64)
        v, d, i = (k.size(name) for name in "vdi")
        picked, apart = k.size("indices_i"), k.size("y_i")
        x = self.table(k, pointers[0], v, d)
        indices = k.view(pointers[1], [i], [picked])
        y = k.view(pointers[2], [i, d], [apart, 1])
        status = k.view(status_pointer, [4])
        with k.parallel(i, "row") as row:
            index = k.let(k.index(k.load(indices, [row])), "index")
            checked(k, status, index, v, lambda: self.pick(k, x, y, row, index, d))


@dataclass(frozen=True)
class TakeBlocks(TakesRows):
    """y[i, d] = decode(x)[indices[i], d]

    form     form of x's blocks, which extend along d, in panels of x's rows
    indices  dtype of the indices by name
    width    width of a panel
    lies     layout: "panels", or "quads", the layout of integer products: rows of 8 bits by fours
    flat     for quads: True if the quads of a panel's columns are consecutive
    twos     for panels: True if bytes are stored by twos, for bf16 products
    """

    form: PackedForm
    indices: str
    width: int
    lies: str = "panels"
    flat: bool = False
    twos: bool = False

    @property
    def title(self) -> str:
        return f"gather_of_blocks_{self.form.title}"

    def table(self, k: Emitter, pointer: Any, v: Expr, d: Expr) -> Any:
        panels = k.floor_divide(v + (self.width - 1), self.width)
        if self.lies == "quads":
            steps = k.floor_divide(d + (QUAD_STEP - 1), QUAD_STEP)
            return k.view(pointer, [panels, steps * (self.width * QUAD_STEP) + self.width * QUAD_HEAD])
        form = self.form
        bytes = k.floor_divide(d, form.group) * form.bytes if form.group else d + form.header
        if self.twos:
            return k.view(pointer, [panels, k.floor_divide(bytes, 2), self.width, 2])
        return k.view(pointer, [panels, bytes, self.width])

    def pick(self, k: Emitter, x: Any, y: Any, row: Expr, index: Expr, d: Expr) -> None:
        form = self.form
        panel = k.let(k.floor_divide(index, self.width), "panel")
        column = k.let(k.floor_mod(index, self.width), "column")

        if self.lies == "quads":
            scale, _ = form.scales(k, lambda at: k.load(x, [panel, column * ROW_HEAD + at]), k.index(0), 1)
            side = self.width if self.flat else PAIR_SQUARE
            square = k.let(k.floor_divide(column, side), "square")
            inside = square * (side * QUAD_STEP) + k.floor_mod(column, side) * 4
            first = k.let(self.width * QUAD_HEAD + inside, "first")
            with k.loop(d, "b") as b:
                step = k.floor_divide(b, QUAD_STEP) * (self.width * QUAD_STEP)
                four = k.floor_divide(k.floor_mod(b, QUAD_STEP), 4) * (4 * side)
                (element,) = form.elements(k, k.load(x, [panel, first + step + four + k.floor_mod(b, 4)]), 1)
                k.store(y, [row, b], element * scale)
            return

        def load(at: Expr) -> Expr:
            if self.twos:
                return k.load(x, [panel, k.floor_divide(at, 2), column, k.floor_mod(at, 2)])
            return k.load(x, [panel, at, column])

        with k.loop(k.floor_divide(d, form.group) if form.group else k.index(1), "group") as group:
            base = k.let(group * form.bytes if form.group else k.index(0), "base")
            scale, least = form.scales(k, load, base, 1)
            count = k.index(form.group * form.bits // 8) if form.group else d
            with k.loop(count, "b") as b:
                byte = load(base + form.header + b)
                for half, element in enumerate(form.elements(k, byte, 1)):
                    k.store(
                        y, [row, group * form.group + b + half * (form.group // 2)], form.number(element, scale, least)
                    )


@dataclass(frozen=True)
class TakeWords(TakesRows):
    """A lookup like `TakeBlocks`, for a table that is read by words and stored in the form's layout."""

    form: WordForm
    indices: str

    @property
    def title(self) -> str:
        return f"gather_of_blocks_{self.form.title}"

    def table(self, k: Emitter, pointer: Any, v: Expr, d: Expr) -> Any:
        bytes = k.floor_divide(d, self.form.elements) * (self.form.bytes * WIDTH)
        return k.view(pointer, [k.floor_divide(v + (WIDTH - 1), WIDTH), bytes])

    def pick(self, k: Emitter, x: Any, y: Any, row: Expr, index: Expr, d: Expr) -> None:
        form = self.form
        panel, column = k.let(k.floor_divide(index, WIDTH), "panel"), k.let(k.floor_mod(index, WIDTH), "column")
        with k.loop(k.floor_divide(d, form.elements), "block") as number:
            base = k.let(number * (form.bytes * WIDTH), "base")

            def load(at: Expr, bytes: int, base: Expr = base) -> Expr:
                return k.load(x, [panel, base + at], bytes)

            block = WordBlock(k, form, 1, load, column)
            spans = form.spans(block)
            held = k.registers(2 * len(spans), f32, "scales")
            for at, (d, c) in enumerate(spans):
                zero = d * k.number(-float(form.zero), f32) if c is None else c
                k.store(held, [2 * at], d)
                k.store(held, [2 * at + 1], zero)
            with k.loop(k.index(form.chunks), "chunk") as chunk:
                for part in range(form.parts):
                    begin = k.let((chunk * form.parts + part) * GROUP, "begin")
                    span = k.let(k.floor_divide(begin, form.span), "span")
                    for at, word in form.fours(block, chunk, part):
                        scale = 2 * (span + at // form.span if form.span < GROUP else span)
                        four = k.let(word, "w")
                        for n in range(4):
                            value = block.number(four, n) * k.load(held, [scale]) + k.load(held, [scale + 1])
                            k.store(y, [row, number * form.elements + begin + (at + n)], value)
