"""Layouts: in which order the elements of a value lie in memory, where that is not row-major.

    panels(16)               a matrix [n, k] for the right side of a product: rows in panels of 16
    panels(16, transposed)   the same of a matrix [k, n]
    panels(48, twos)         the same of bytes, in which two neighbours of a row lie side by side
    pairs(32)                panels of 16-bit numbers, in which two neighbours of a row lie side by side
    pairs(32, transposed)    the same of a matrix [k, n]
    pairs(48, flat)          the same pairs, those of all columns of a panel one after another
    quads(32)                panels of 8-bit rows with their scales, in which four neighbours of a row lie side by side
    quads(48, flat)          the same quads, those of all columns of a panel one after another
    blocks(16, 20, 4)        panels of rows in blocks of 20 bytes, the first 4 of which are scales
    blocks(16, 22, 2, tail, 4:5, 0:4)    the same of blocks whose last bytes are scales, with words in another order
    onednn                   a matrix [n, k] as oneDNN orders it, which it tells nobody
    onednn(transposed)       the same of a matrix [k, n]

A value without a layout lies row-major. A layout changes where elements lie, never what they are: `relayout` is an
identity. What reads a value in a layout is the backend's business; it says which of its ops do.
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
"""Rows and columns of a square of pairs."""
PAIR_STEP = 2 * PAIR_SQUARE
"""Elements of k in a square of pairs."""
QUAD_STEP = 4 * PAIR_SQUARE
"""Elements of k in a square of quads, which has the bytes of one of pairs."""
ROW_HEAD = 4
"""Bytes of the scale with which a row of 8-bit numbers begins, see `int8_rows`."""
QUAD_HEAD = 8
"""Bytes of the scale and of the sum of a row, with which a panel of quads begins."""


@dataclass(frozen=True)
class Layout:
    """A layout of matrices.

    kind        "panels", "pairs", "quads", "blocks" or "onednn"
    width       for all but onednn: how many columns of the product a panel has; for pairs and quads a multiple of 16
    transposed  whether the matrix is [k, n], not [n, k]
    flat        whether pairs or quads lie as elements of panels do, and not in squares
    block       for blocks: the bytes of one
    head        for blocks: how many of these are scales of two bytes each
    tail        for blocks: whether scales are a block's last bytes; else they are its first
    twos        for panels: whether the numbers of a row lie by twos, side by side
    runs        for blocks: which words come first, from one number up to another, then which; none: all in their order

    In panels, element (n, k) of a weight [n, k] lies at ((n // width) * k_size + k) * width + n % width; the last panel
    is filled up with zeros. By twos they lie as flat pairs do, but k is filled up to a multiple of 2 alone: bytes of
    blocks are read as one stream, without gaps, which hardware brings in ahead.

    In pairs, a panel is cut into steps of 32 elements of k, and a step into squares of 16 rows: 16 times 16 pairs.
    Element (n, k) is number k % 2 of the pair at row (k % 32) // 2 and column n % 16 of its square. So a row of a
    square is what an instruction that multiplies pairs takes, and a square a tile of a matrix unit. Panels and steps
    are filled up with zeros.

    Quads are of rows as `int8_rows` holds them, a scale of four bytes and then a byte an element. A panel begins with
    the scales of its rows, then has the sum of each row's numbers, in 32 bits. What follows are squares as those of
    pairs, each of 16 rows and 64 elements of k: 16 times 16 times four bytes.

    Flat pairs and quads are filled up as those in squares are. Number i of row n's is at ((n // width) * count + i) *
    width + n % width, count being how many a row has: what an instruction that multiplies them reads lies in the order
    in which registers of a whole panel take it.

    Blocks are of rows in a form of so many bytes a block: scales, and a whole number of words of four bytes. A panel is
    a block of all of its rows after the other: the first scale of all rows, the second, then a word of each row side by
    side, the next one, and so on.
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
            raise GraphError("panels have a width", received=str(self.width), hint=f"panels(16); 1 to {_MOST_WIDE}")
        squares = self.kind in ("pairs", "quads")
        if squares and (not 0 < self.width <= _MOST_WIDE or self.width % PAIR_SQUARE):
            hint = f"{self.kind}(32)"
            raise GraphError(f"{self.kind} have a width of 16 times n", received=str(self.width), hint=hint)
        if self.flat and not squares:
            raise GraphError("only pairs and quads are flat", received=str(self))
        if self.twos and self.kind != "panels":
            raise GraphError("only panels are by twos", received=str(self))
        if (self.tail or self.runs) and self.kind != "blocks":
            raise GraphError("only blocks have a tail, and words", received=str(self))
        if self.kind in ("quads", "blocks") and self.transposed:
            raise GraphError(f"{self.kind} are of rows, which lie along the last axis", received=str(self))
        fours = 0 < self.block - self.head < _MOST_WIDE and (self.block - self.head) % 4 == 0 and self.head % 2 == 0
        if (self.block or self.head or self.kind == "blocks") and not (
            self.kind == "blocks" and fours and 0 < self.width <= _MOST_WIDE
        ):
            hint = "blocks(16, 20, 4): a width, the bytes of a block, and those of its scales"
            raise GraphError("this is no layout of blocks", received=str(self), hint=hint)
        if self.runs and not self._orders_words():
            raise GraphError(
                "words are not all there once", received=str(self), hint="runs such as 4:6, 0:4 of 6 words"
            )
        if self.kind == "onednn" and self.width:
            raise GraphError("onednn has no width", received=str(self.width))

    def _orders_words(self) -> bool:
        at = 0
        for first, end in sorted(self.runs):
            if first != at or end <= first:
                return False
            at = end
        return 4 * at == self.block - self.head

    def shape(self, shape: Sequence[Size]) -> tuple[Size, ...]:
        """The shape of the array that holds a matrix of this shape.

        For panels [panels, k, width], and by twos [panels, k / 2, width, 2]; for pairs [panels, steps, width // 16, 16,
        16, 2], and flat [panels, pairs, width, 2]; for quads and blocks [panels, bytes], of held rows.
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
        """How many elements a matrix of this shape takes, the filling included."""
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
    """Panels of so many rows of a matrix [n, k], or of so many columns of a matrix [k, n]."""
    return Layout("panels", width, transposed, twos=twos)


def pairs(width: int, transposed: bool = False, *, flat: bool = False) -> Layout:
    """Panels of pairs of so many rows of a matrix [n, k], or of so many columns of a matrix [k, n]."""
    return Layout("pairs", width, transposed, flat)


def quads(width: int, *, flat: bool = False) -> Layout:
    """Panels of so many rows of 8-bit numbers, by fours, with their scales."""
    return Layout("quads", width, flat=flat)


def blocks(width: int, block: int, head: int, runs: tuple[tuple[int, int], ...] = (), *, tail: bool = False) -> Layout:
    """Panels of so many rows in blocks of so many bytes, the first of which, or the last, are scales."""
    return Layout("blocks", width, block=block, head=head, tail=tail, runs=runs)


def parse_layout(text: str) -> Layout:
    """A layout from its text. Raises GraphError."""
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise GraphError("this is no layout", received=text[:40], hint="panels(16), pairs(32, transposed), onednn")
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
            raise GraphError(f"{match[1]} has no {word!r}", received=text[:40])
    width, block, head = (*numbers, 0, 0, 0)[:3]
    return Layout(match[1], width, block=block, head=head, runs=tuple(runs), **words)


def _read(value: Layout | str) -> Layout:
    return value if isinstance(value, Layout) else parse_layout(value)


attribute_codec("Layout", _read, "Layout | str")
