"""Forms of blocks that kernels read by words: the four numbers in each four bytes, and the spans that share a scale.

    y = d q + c      d and c of an element's span: 16 elements, 32 elements, or a whole block

Blocks are stored in the layout `blocks(16, ...)`, so that a vector holds a word (four consecutive bytes of a block) of
each column. A word is unpacked by shifts and masks. The resulting bytes are four consecutive unsigned numbers, each
larger than its value by the form's `zero`. A vector may also have one lane, for reading a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.narrow.encode_groups import GROUP
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.layouts import Layout, blocks
from treadle.ir.types import DTYPES, f16, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

WIDTH = 16
"""Number of columns in a panel."""
_i32 = DTYPES["i32"]
_LOWEST = 0x01010101
"""A word with the lowest bit of each byte set."""
_HIGHEST = -0x7F7F7F80  # 0x80808080 as an i32
_COPIES = 0x00204081  # times four bits: four copies of them, seven bits apart


def column_lanes(isa: Isa) -> int:
    """Return the number of lanes of a vector of columns: at most the columns of a panel."""
    return min(WIDTH, isa.lanes())


@dataclass(frozen=True)
class WordBlock:
    """The blocks of several columns, one column per lane, in a panel of blocks.

    load   loads a number of bytes for each lane, from an offset in the panel's block in bytes of its first column
    column the first lane's column
    """

    k: Emitter
    form: WordForm
    lanes: int
    load: Callable[[Expr, int], Expr]
    column: Expr

    def scale(self, number: int) -> Expr:
        """Return the 16-bit scale with this number as float32."""
        bytes = self.load(2 * (number * WIDTH + self.column), 2 * self.lanes)
        return self.k.let(self.k.cast(self.k.bits(bytes, f16, self.lanes), f32, self.lanes), "d")

    def word(self, number: Expr) -> Expr:
        """Return the word with this number, counted after the 16-bit scales, as an i32."""
        at = 4 * (number * WIDTH + self.column) + 2 * WIDTH * self.form.scales
        return self.k.let(self.k.bits(self.load(at, 4 * self.lanes), _i32, self.lanes), "w")

    def masked(self, word: Expr, shift: Expr, bits: int) -> Expr:
        """Return `bits` bits of each byte of a word, starting at bit `shift`."""
        return self._down(word, shift) & self._all(_LOWEST * ((1 << bits) - 1))

    def raised(self, word: Expr, bits: int) -> Expr:
        """Return a word shifted left by `bits`. No byte may overflow."""
        return self.k.shift_left(word, self._all(bits))

    def spread(self, word: Expr, shift: Expr) -> Expr:
        """Return four bits of a word, starting at bit `shift`, each as the lowest bit of a byte."""
        four = self._down(word, shift) & self._all(15)
        return four * self._all(_COPIES) & self._all(_LOWEST)

    def flipped(self, word: Expr) -> Expr:
        """Return a word of signed bytes with 128 added to each byte."""
        return word ^ self._all(_HIGHEST)

    def number(self, word: Expr, byte: int) -> Expr:
        """Return one unsigned byte of a word as float32."""
        return self.k.cast(self._down(word, 8 * byte) & self._all(255), f32, self.lanes)

    def signed(self, word: Expr, byte: int) -> Expr:
        """Return one signed byte of a word as float32."""
        return self.k.cast(self._down(self.raised(word, 24 - 8 * byte), 24), f32, self.lanes)

    def _down(self, word: Expr, shift: Expr) -> Expr:
        return word if isinstance(shift, int) and not shift else word >> self._all(shift)

    def _all(self, value: Expr) -> Expr:
        k = self.k
        return k.number(value, _i32, self.lanes) if isinstance(value, int) else k.splat(k.cast(value, _i32), self.lanes)


Scale = tuple["Expr", "Expr | None"]
"""d and c of a span. c is None if it is 0, or if it is -d times the form's zero."""


class WordForm(ABC):
    """A form of blocks that kernels read by words.

    elements  number of elements of a block, a multiple of 32
    bytes     number of bytes of a block, including its 16-bit scales
    scales    number of these scales
    tail      True if the scales are the last bytes of a block instead of the first
    span      number of elements that share d and c
    zero      offset of the stored numbers, to be subtracted
    least     True if each span has its own c
    chunks    number of parts of a block that are read by the same code
    runs      order of words in a panel, if it differs from the block's own order: the hardware prefetches sequential
              reads, and q6_k's own order takes three times as long
    """

    elements: int = 256
    bytes: int
    scales: int = 1
    tail: ClassVar[bool] = False
    span: int = 32
    zero: int = 0
    least: bool = False
    chunks: ClassVar[int] = 8
    runs: ClassVar[tuple[tuple[int, int], ...]] = ()

    @property
    @abstractmethod
    def title(self) -> str:
        """Name of the form in a kernel's name."""

    @property
    def is_direct(self) -> bool:
        """True if a word is unpacked by a shift and a mask or fewer operations, and each span has one scale."""
        return False

    @abstractmethod
    def spans(self, block: WordBlock) -> Sequence[Scale]:
        """Return d and c of each span."""

    @abstractmethod
    def four(self, block: WordBlock, chunk: Expr, part: int, half: int, i: Expr) -> Expr:
        """Return a word with the elements 16 half + 4 i to 16 half + 4 i + 3 of the 32 elements in a part of
        a chunk.
        """

    def fours(self, block: WordBlock, chunk: Expr, part: int) -> Iterator[tuple[int, Expr]]:
        """Yield the words of a part of a chunk, each with the number of its first element."""
        for half, i in product(range(2), range(4)):
            yield 16 * half + 4 * i, self.four(block, chunk, part, half, i)

    @property
    def layout(self) -> Layout:
        """Layout of the blocks in memory."""
        return blocks(WIDTH, self.bytes, 2 * self.scales, self.runs, tail=self.tail)

    @property
    def parts(self) -> int:
        """Number of groups of 32 elements in a chunk."""
        return self.elements // (self.chunks * GROUP)

    @property
    def halves(self) -> int:
        """Number of spans in 32 elements."""
        return max(1, GROUP // self.span)


@dataclass(frozen=True)
class HeldScales:
    """d and c of all spans of a block, for several vectors of columns. They are computed once for all uses.

    made  d and c for each vector, if the form has one span
    held  for other forms, in memory: for each span, d of all vectors and then c
    """

    form: WordForm
    vectors: int
    lanes: int
    made: Sequence[Scale] | None = None
    held: Any = None

    @staticmethod
    def of(k: Emitter, blocks: Sequence[WordBlock]) -> HeldScales:
        form, lanes = blocks[0].form, blocks[0].lanes
        found = HeldScales(form, len(blocks), lanes)
        made = [form.spans(block) for block in blocks]
        if len(made[0]) == 1:
            return replace(found, made=[scale for (scale,) in made])
        held = k.registers(len(made[0]) * 2 * len(blocks) * lanes, f32, "scales")
        for v, scales in enumerate(made):
            for span, (d, c) in enumerate(scales):
                at = (span * 2 * len(made) + v) * lanes
                k.store(held, [at], d, lanes)
                if c is not None:
                    k.store(held, [at + len(made) * lanes], c, lanes)
        return replace(found, held=held)

    def at(self, k: Emitter, vector: int, chunk: Expr, part: int, half: int) -> Scale:
        """Return d and c of a vector of columns, for one half of the 32 elements of a part."""
        if self.made is not None:
            return self.made[vector]
        span = (chunk * self.form.parts + part) * self.form.halves + half
        at = k.let((span * 2 * self.vectors + vector) * self.lanes, "at")
        d = k.load(self.held, [at], self.lanes)
        return d, k.load(self.held, [at + self.vectors * self.lanes], self.lanes) if self.form.least else None

    def whole(self, k: Emitter, vector: int, chunk: Expr, part: int, half: int) -> Scale:
        """Return d and c as `at` does. For a form with a zero, the subtraction of the zero is included in c."""
        d, c = self.at(k, vector, chunk, part, half)
        if self.form.zero:
            c = k.let(d * k.number(-float(self.form.zero), f32, self.lanes), "c")
        return k.let(d, "d"), c if c is None else k.let(c, "c")


@dataclass(frozen=True)
class PlainWords(WordForm):
    """Blocks with one scale, in some forms a minimum or a zero, then numbers of 4, 5 or 8 bits. The fifth bits of all
    numbers come first.

    Numbers of 4 or 5 bits share a byte with the number half a block later. `zeros`: the second scale is a zero, so that
    c is -d times it.
    """

    bits: int
    elements: int
    zero: int
    least: bool = False
    zeros: bool = False
    chunks = 1

    @property
    def scales(self) -> int:  # type: ignore[override]
        return 1 + self.least

    @property
    def span(self) -> int:  # type: ignore[override]
        return self.elements

    @property
    def bytes(self) -> int:  # type: ignore[override]
        return 2 * self.scales + self.elements * self.bits // 8

    @property
    def title(self) -> str:
        return f"{self.bits}_bits_by_{self.elements}" + ("_with_zero" if self.zeros else "_with_least" * self.least)

    @property
    def is_direct(self) -> bool:
        return self.bits != 5 and not self.least

    def spans(self, block: WordBlock) -> Sequence[Scale]:
        d, c = block.scale(0), block.scale(1) if self.least else None
        if self.zeros and c is not None:
            c = block.k.let(d * (block.k.number(0.0, f32, block.lanes) - c), "c")
        return [(d, c)]

    def four(self, block: WordBlock, chunk: Expr, part: int, half: int, i: Expr) -> Expr:
        element = GROUP * part + 16 * half
        if self.bits == 8:
            return block.flipped(block.word(element // 4 + i))
        high, inside = divmod(element, self.elements // 2)
        if self.bits == 4:
            return block.masked(block.word(inside // 4 + i), 4 * high, 4)
        low = block.masked(block.word(1 + inside // 4 + i), 4 * high, 4)
        return low | block.raised(block.spread(block.word(0), element + 4 * i), 4)


class KWords(WordForm):
    """K-quants: forms of 256 elements whose scales are small integers times a 16-bit scale. 32 or 64 elements are read
    at a time.
    """

    def spans(self, block: WordBlock) -> Sequence[Scale]:
        k, d = block.k, block.scale(0)
        below = k.let(k.number(0.0, f32, block.lanes) - block.scale(1), "below") if self.least else None
        made: list[Scale] = []
        for scale, least in self.small(block):
            made.append((k.let(d * scale, "d"), None if below is None else k.let(below * least, "c")))
        return made

    @abstractmethod
    def small(self, block: WordBlock) -> Iterator[tuple[Expr, Expr]]:
        """Yield the integers of each span as float32: the factor of d, and the factor of the minimum or None."""


@dataclass(frozen=True)
class Q2K(KWords):
    """Q2_K blocks as 4-byte words: 4-bit scales and mins (4 words), 2-bit quants (16 words)."""

    bytes, scales, tail, span, least, title = 84, 2, True, 16, True, "q2_k"

    def small(self, block: WordBlock) -> Iterator[tuple[Expr, Expr]]:
        for word in map(block.word, range(4)):
            low, high = block.masked(word, 0, 4), block.masked(word, 4, 4)
            yield from ((block.number(low, n), block.number(high, n)) for n in range(4))

    def four(self, block: WordBlock, chunk: Expr, part: int, half: int, i: Expr) -> Expr:
        return _two_bits(block, 4, chunk, half, i)


@dataclass(frozen=True)
class Q3K(KWords):
    """Q3_K blocks as 4-byte words: third bits of quants (8 words), their low two bits (16), low four bits of scales
    (2), upper two bits of scales (1).
    """

    bytes, scales, tail, span, zero, title = 110, 1, True, 16, 4, "q3_k"

    def small(self, block: WordBlock) -> Iterator[tuple[Expr, Expr]]:
        above = block.word(26)
        for i in range(4):
            low = block.masked(block.word(24 + i % 2), 4 * (i // 2), 4)
            word = low | block.raised(block.masked(above, 2 * i, 2), 4)
            zero = block.k.number(32.0, f32, block.lanes)
            yield from ((block.number(word, n) - zero, None) for n in range(4))

    def four(self, block: WordBlock, chunk: Expr, part: int, half: int, i: Expr) -> Expr:
        third = block.masked(block.word(4 * half + i), chunk, 1)
        return _two_bits(block, 8, chunk, half, i) | block.raised(third, 2)


def _two_bits(block: WordBlock, first: int, chunk: Expr, half: int, i: Expr) -> Expr:
    """Return four elements of two bits each. Eight words hold a chunk in their lowest two bits, and three more chunks
    above.
    """
    k = block.k
    word = block.word(first + 8 * k.floor_divide(chunk, 4) + 4 * half + i)
    return block.masked(word, 2 * k.floor_mod(chunk, 4), 2)


def _six_bits(block: WordBlock) -> Iterator[tuple[Expr, Expr]]:
    """Yield the eight 6-bit scales and the eight 6-bit mins, which are stored in three words."""
    first, second, rest = map(block.word, range(3))
    for half in range(2):
        if half:
            scales = block.masked(rest, 0, 4) | block.raised(block.masked(first, 6, 2), 4)
            least = block.masked(rest, 4, 4) | block.raised(block.masked(second, 6, 2), 4)
        else:
            scales, least = block.masked(first, 0, 6), block.masked(second, 0, 6)
        yield from ((block.number(scales, n), block.number(least, n)) for n in range(4))


@dataclass(frozen=True)
class Q4K(KWords):
    """Q4_K blocks as 4-byte words, after the two scales: 6-bit scales and mins (3 words), 4-bit quants (32 words)."""

    bytes, scales, least, title = 144, 2, True, "q4_k"

    def small(self, block: WordBlock) -> Iterator[tuple[Expr, Expr]]:
        return _six_bits(block)

    def four(self, block: WordBlock, chunk: Expr, part: int, half: int, i: Expr) -> Expr:
        return _four_bits(block, 3, chunk, half, i)


@dataclass(frozen=True)
class Q5K(KWords):
    """Q5_K blocks as 4-byte words, after the two scales: 6-bit scales and mins (3 words), fifth bits of quants (8),
    their low four bits (32).
    """

    bytes, scales, least, title = 176, 2, True, "q5_k"

    def small(self, block: WordBlock) -> Iterator[tuple[Expr, Expr]]:
        return _six_bits(block)

    def four(self, block: WordBlock, chunk: Expr, part: int, half: int, i: Expr) -> Expr:
        fifth = block.masked(block.word(3 + 4 * half + i), chunk, 1)
        return _four_bits(block, 11, chunk, half, i) | block.raised(fifth, 4)


def _four_bits(block: WordBlock, first: int, chunk: Expr, half: int, i: Expr) -> Expr:
    """Return four elements of four bits each. Eight words hold a chunk in the low four bits of each byte, and the next
    chunk in the upper four bits.
    """
    k = block.k
    word = block.word(first + 8 * k.floor_divide(chunk, 2) + 4 * half + i)
    return block.masked(word, 4 * k.floor_mod(chunk, 2), 4)


@dataclass(frozen=True)
class Q6K(KWords):
    """Q6_K blocks as 4-byte words, in the order in which they are read: signed 8-bit scales (4 words), then twice: low
    four bits of quants (16 words) and their upper two bits (8 words).
    """

    bytes, scales, tail, span, zero, title = 210, 1, True, 16, 32, "q6_k"
    runs = ((48, 52), (0, 16), (32, 40), (16, 32), (40, 48))
    chunks = 4  # two groups at a time use more of the CPU's execution units

    def small(self, block: WordBlock) -> Iterator[tuple[Expr, Expr]]:
        for word in map(block.word, range(4)):
            yield from ((block.signed(word, n), None) for n in range(4))

    def four(self, block: WordBlock, chunk: Expr, part: int, half: int, i: Expr) -> Expr:
        second, twice = block.k.floor_divide(chunk, 2), block.k.floor_mod(chunk, 2)
        low = block.masked(block.word(4 + 24 * second + 8 * part + 4 * half + i), 4 * twice, 4)
        high = block.masked(block.word(20 + 24 * second + 4 * half + i), 4 * twice + 2 * part, 2)
        return low | block.raised(high, 4)


def word_form(encoding: Encoding) -> WordForm | None:
    """Return the form in which kernels read an encoding by words, or None if they do not."""
    if encoding.form == "int4_groups" and encoding.group % GROUP == 0:
        return PlainWords(4, encoding.group, 8)
    if encoding.form == "uint4_groups" and encoding.group % GROUP == 0:
        return PlainWords(4, encoding.group, 0, least=True, zeros=True)
    return _FORMS.get(encoding.form)


_FORMS: dict[str, WordForm] = {
    "q8_0": PlainWords(8, 32, 128),
    "q4_0": PlainWords(4, 32, 8),
    "q4_1": PlainWords(4, 32, 0, least=True),
    "q5_0": PlainWords(5, 32, 16),
    "q5_1": PlainWords(5, 32, 0, least=True),
    "q2_k": Q2K(),
    "q3_k": Q3K(),
    "q4_k": Q4K(),
    "q5_k": Q5K(),
    "q6_k": Q6K(),
}
