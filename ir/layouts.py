"""Layouts: orders of a value's elements in memory other than row-major.

    panels(16)               a matrix [n, k] for the right side of a product: rows in panels of 16
    panels(16, transposed)   the same for a matrix [k, n]
    panels(48, twos)         the same for bytes, with two neighbours of a row adjacent
    pairs(32)                panels of 16-bit numbers, with two neighbours of a row adjacent
    pairs(32, transposed)    the same for a matrix [k, n]
    pairs(48, flat)          the same pairs, column by column in each panel
    quads(32)                panels of 8-bit rows with their scales, with four neighbours of a row adjacent
    quads(48, flat)          the same quads, column by column in each panel
    blocks(16, 20, 4)        panels of rows in blocks of 20 bytes, the first 4 of which are scales
    blocks(16, 22, 2, tail, 4:5, 0:4)    the same for blocks whose last bytes are scales, with words in another order
    onednn                   a matrix [n, k] in oneDNN's order, which is opaque
    onednn(transposed)       the same for a matrix [k, n]

A value without a layout is row-major. A layout changes the locations of elements, not their values: `relayout` is an
identity. Each backend declares which of its ops read which layouts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from treadle.ir.attribute_values import attribute_codec
from treadle.ir.errors import GraphError
from treadle.ir.sizing.sizes import Size, product

_TEXT = re.compile(r"([a-z]\w*)(?:\(([^()]*)\))?")
_RUN = re.compile(r"([0-9]{1,4}):([0-9]{1,4})", re.ASCII)
_MOST_WIDE, _MOST_RUNS = 1 << 16, 64

PAIR_SQUARE = 16
"""Number of rows, and of columns, in a square of pairs."""
PAIR_STEP = 2 * PAIR_SQUARE
"""Number of elements of k in a square of pairs."""
QUAD_STEP = 4 * PAIR_SQUARE
"""Number of elements of k in a square of quads. A square of quads takes the same number of bytes as a square of pairs.
"""
ROW_HEAD = 4
"""Number of bytes of the scale at the start of a row of 8-bit numbers, see `int8_rows`."""
QUAD_HEAD = 8
"""Number of bytes of a row's scale and sum, which are stored at the start of a panel of quads."""


@dataclass(frozen=True)
class Layout:
    """A layout of matrices.

    kind        "panels", "pairs", "quads", "blocks" or "onednn"
    width       for all but onednn: the number of the product's columns in a panel; for pairs and quads a multiple of 16
    transposed  True if the matrix is [k, n], not [n, k]
    flat        True if pairs or quads are ordered as elements of panels are, and not in squares
    block       for blocks: the number of bytes in one block
    head        for blocks: the number of these bytes that are scales of two bytes each
    tail        for blocks: True if scales are a block's last bytes; otherwise they are its first
    twos        for panels: True if each two neighbours of a row are stored adjacently
    runs        for blocks: the order of words, as ranges of word numbers, start to end; empty for the original order

    In panels, element (n, k) of a weight [n, k] is at ((n // width) * k_size + k) * width + n % width; the last panel
    is padded with zeros. With `twos`, elements are stored as flat pairs are, but k is padded only to a multiple of 2:
    bytes of blocks are read as one stream, without gaps, which hardware prefetches.

    In pairs, a panel is divided into steps of 32 elements of k, and a step into squares of 16 rows: 16 times 16 pairs.
    Element (n, k) is number k % 2 of the pair at row (k % 32) // 2 and column n % 16 of its square. So a row of a
    square is the operand of an instruction that multiplies pairs, and a square is a tile of a matrix unit. Panels and
    steps are padded with zeros.

    Quads are for rows in the form `int8_rows`: a scale of four bytes and then a byte per element. A panel begins with
    the scales of its rows, followed by the sum of each row's numbers, in 32 bits. Then come squares, as in the layout
    of pairs, each of 16 rows and 64 elements of k: 16 times 16 times four bytes.

    Flat pairs and quads are padded in the same way as pairs and quads in squares. Number i of row n is at ((n // width)
    * count + i) * width + n % width, where count is the number of pairs or quads in a row. So the operands of the
    instruction that multiplies them are stored in the order in which registers of a whole panel load them.

    Blocks are for rows in a form with a fixed number of bytes per block: scales, and an integer number of words of four
    bytes. A panel stores its rows block by block. For each block it stores the first scale of all rows, then the second
    scale of all rows, then the first word of all rows, the second word of all rows, and so on.
    """

    kind: str
    width: int = 0
    transposed: bool = False
    flat: bool = False
    block: int = 0
    head: int = 0
    tail: bool = False
    twos: bool = False
    runs: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("panels", "pairs", "quads", "blocks", "onednn"):
            raise GraphError(f"unknown layout {self.kind!r}", hint="panels(16), pairs(32), onednn")
        if self.kind == "panels" and not 0 < self.width <= _MOST_WIDE:
            raise GraphError("invalid panel width", received=str(self.width), hint=f"panels(16); 1 to {_MOST_WIDE}")
        squares = self.kind in ("pairs", "quads")
        if squares and (not 0 < self.width <= _MOST_WIDE or self.width % PAIR_SQUARE):
            hint = f"{self.kind}(32)"
            raise GraphError(f"the width of {self.kind} must be a multiple of 16", received=str(self.width), hint=hint)
        if self.flat and not squares:
            raise GraphError("only pairs and quads can be flat", received=str(self))
        if self.twos and self.kind != "panels":
            raise GraphError("only panels can have twos", received=str(self))
        if (self.tail or self.runs) and self.kind != "blocks":
            raise GraphError("only blocks can have a tail and an order of words", received=str(self))
        if self.kind in ("quads", "blocks") and self.transposed:
            raise GraphError(
                f"the {self.kind} layout stores rows along the last axis, and cannot be transposed", received=str(self)
            )
        fours = 0 < self.block - self.head < _MOST_WIDE and (self.block - self.head) % 4 == 0 and self.head % 2 == 0
        if (self.block or self.head or self.kind == "blocks") and not (
            self.kind == "blocks" and fours and 0 < self.width <= _MOST_WIDE
        ):
            hint = "blocks(16, 20, 4): a width, the bytes of a block, and the bytes of its scales"
            raise GraphError("invalid layout of blocks", received=str(self), hint=hint)
        if self.runs and not self._orders_words():
            raise GraphError(
                "runs must contain every word once", received=str(self), hint="runs such as 4:6, 0:4 of 6 words"
            )
        if self.kind == "onednn" and self.width:
            raise GraphError("onednn takes no width", received=str(self.width))

    def _orders_words(self) -> bool:
        at = 0
        for first, end in sorted(self.runs):
            if first != at or end <= first:
                return False
            at = end
        return 4 * at == self.block - self.head

    def shape(self, shape: Sequence[Size]) -> tuple[Size, ...]:
        """Return the shape of the array that holds a matrix of this shape.

        For panels it is [panels, k, width], with `twos` [panels, k / 2, width, 2]. For pairs it is [panels, steps,
        width // 16, 16, 16, 2], if flat [panels, pairs, width, 2]. For quads and blocks, whose matrix has held rows, it
        is [panels, bytes].
        """
        if self.kind == "onednn":
            return tuple(shape)
        n, k = (shape[1], shape[0]) if self.transposed else (shape[0], shape[1])
        count = (n + self.width - 1) // self.width
        if self.kind == "panels":
            width = Size.of(self.width)
            return (count, (k + 1) // 2, width, Size.of(2)) if self.twos else (count, k, width)
        if self.kind == "quads":
            steps = (k - ROW_HEAD + QUAD_STEP - 1) // QUAD_STEP
            return count, steps * (self.width * QUAD_STEP) + self.width * QUAD_HEAD
        if self.kind == "blocks":
            return count, k * self.width
        steps, square = (k + PAIR_STEP - 1) // PAIR_STEP, Size.of(PAIR_SQUARE)
        if self.flat:
            return count, steps * PAIR_SQUARE, Size.of(self.width), Size.of(2)
        return count, steps, Size.of(self.width // PAIR_SQUARE), square, square, Size.of(2)

    def elements(self, shape: Sequence[Size]) -> Size:
        """Return the number of elements of a matrix of this shape, including padding."""
        return _elements(self, tuple(shape))

    def __str__(self) -> str:
        inside = [str(self.width)] if self.width else []
        inside += [str(self.block), str(self.head)] if self.block or self.head else []
        inside += ["flat"] if self.flat else []
        inside += ["transposed"] if self.transposed else []
        inside += ["tail"] if self.tail else []
        inside += ["twos"] if self.twos else []
        inside += [f"{first}:{end}" for first, end in self.runs]
        return f"{self.kind}({', '.join(inside)})" if inside else self.kind


@lru_cache(maxsize=1024)
def _elements(layout: Layout, shape: tuple[Size, ...]) -> Size:
    return product(layout.shape(shape))


def panels(width: int, transposed: bool = False, *, twos: bool = False) -> Layout:
    """Return panels of `width` rows of a matrix [n, k], or of `width` columns of a matrix [k, n]."""
    return Layout("panels", width, transposed, twos=twos)


def pairs(width: int, transposed: bool = False, *, flat: bool = False) -> Layout:
    """Return panels of pairs, of `width` rows of a matrix [n, k], or of `width` columns of a matrix [k, n]."""
    return Layout("pairs", width, transposed, flat)


def quads(width: int, *, flat: bool = False) -> Layout:
    """Return panels of `width` rows of 8-bit numbers, four neighbours of a row adjacent, with the rows' scales."""
    return Layout("quads", width, flat=flat)


def blocks(width: int, block: int, head: int, runs: tuple[tuple[int, int], ...] = (), *, tail: bool = False) -> Layout:
    """Return panels of `width` rows in blocks of `block` bytes, whose first or last `head` bytes are scales."""
    return Layout("blocks", width, block=block, head=head, tail=tail, runs=runs)


def parse_layout(text: str) -> Layout:
    """Parse a layout. Raises GraphError."""
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise GraphError("not a layout", received=text[:40], hint="panels(16), pairs(32, transposed), onednn")
    runs = list[tuple[int, int]]()
    numbers, words = list[int](), dict.fromkeys(("flat", "transposed", "tail", "twos"), False)
    most = 3 if match[1] == "blocks" else 1
    for word in [w.strip() for w in match[2].split(",")] if match[2] else []:
        if word.isascii() and word.isdigit() and len(word) < 10 and len(numbers) < most:
            numbers.append(int(word))
        elif words.get(word) is False:
            words[word] = True
        elif match[1] == "blocks" and (run := _RUN.fullmatch(word)) and len(runs) < _MOST_RUNS:
            runs.append((int(run[1]), int(run[2])))
        else:
            raise GraphError(f"unknown or repeated option {word!r} of layout {match[1]}", received=text[:40])
    width, block, head = (*numbers, 0, 0, 0)[:3]
    return Layout(match[1], width, block=block, head=head, runs=tuple(runs), **words)


def _read(value: Layout | str) -> Layout:
    return value if isinstance(value, Layout) else parse_layout(value)


attribute_codec("Layout", _read, "Layout | str")
