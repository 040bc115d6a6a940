"""Unpacking of blocks into pairs of bf16 numbers: two consecutive elements of a line form a pair; a vector holds pairs
of 16 lines.

Numbers are decoded in float32 and rounded to the nearest bf16, ties to even, in the same way as a cast of a decoded
weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from treadle.backends.tvm.kernels.encoded.block_words import HeldScales, WordBlock
from treadle.backends.tvm.kernels.encoded.unpacking import PackedForm
from treadle.backends.tvm.kernels.narrow.encode_groups import GROUP
from treadle.backends.tvm.kernels.narrow.round_rows import two_rounded
from treadle.ir.layouts import PAIR_SQUARE
from treadle.ir.types import f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

LANES = PAIR_SQUARE
"""Number of lines in a vector; each lane holds a pair of one line."""

LoadPairs = Callable[["Expr", int, int], "Expr"]
"""A function that loads bytes of 16 lines, which are stored as pairs: it takes the number of the pair, a number of
bytes, and an offset.
"""
Put = Callable[["Expr", "Sequence[Expr]"], None]
"""A function that receives pairs when they are computed: the number of the pair, and a vector for each 16 lines."""


def unpack_pairs(
    k: Emitter,
    form: PackedForm,
    loads: Sequence[LoadPairs],
    begin: Expr,
    first: Expr,
    count: Expr,
    put: Put,
    *,
    in_order: bool = False,
    before: Callable[[Expr], None] = lambda place: None,
) -> None:
    """Unpack `count` pairs of bytes of a block, or of a line that is one block.

    loads     for each 16 lines, a function that loads their bytes
    begin     the pair of bytes at which the block begins
    first     the pair of bytes with the block's first elements, or with the first requested elements of the line
    in_order  True if pairs are passed to `put` in order; bytes that hold two elements are then read twice
    before    is called before the bytes at a place are read
    """
    found = [_scales(k, form, load, begin) for load in loads]
    both = tuple(range(8 // form.bits))
    for halves in [(half,) for half in both] if in_order else [both]:
        with k.loop(count, "pair") as pair:
            place = k.let(first + pair, "place")
            before(place)
            made: list[list[Expr]] = [[] for _ in halves]
            for load, scales in zip(loads, found, strict=True):
                read = [form.elements(k, load(place, at, LANES), LANES, raised=True) for at in (0, LANES)]
                for to, half in zip(made, halves, strict=True):
                    numbers = [x[half] * ds[half] for x, (ds, _) in zip(read, scales, strict=True)]
                    numbers = [x if c is None else x + c for x, (_, c) in zip(numbers, scales, strict=True)]
                    low, high = (k.let(x, "x") for x in numbers)
                    to.append(two_rounded(k, low, high))
            for half, vectors in zip(halves, made, strict=True):
                put(pair + half * count, vectors)


def unpack_words(k: Emitter, blocks: Sequence[WordBlock], put: Put) -> None:
    """Unpack the pairs of a block that is read by words, in order. Each 16 lines have an entry of `blocks`."""
    form, scales = blocks[0].form, HeldScales.of(k, blocks)

    def of_part(chunk: Expr, part: int) -> None:
        for half in range(2):
            found = [scales.whole(k, v, chunk, part, half * form.halves // 2) for v in range(len(blocks))]
            with k.loop(k.index(GROUP // 8), "four") as i:
                words = [k.let(form.four(block, chunk, part, half, i), "word") for block in blocks]
                first = k.let((chunk * form.parts + part) * (GROUP // 2) + half * (GROUP // 4) + 2 * i, "first")
                for n in range(2):
                    vectors = []
                    for block, word, (d, c) in zip(blocks, words, found, strict=True):
                        numbers = [block.number(word, 2 * n + at) * d for at in range(2)]
                        low, high = (k.let(x if c is None else x + c, "x") for x in numbers)
                        vectors.append(pairs_rounded(k, low, high))
                    put(first + n, vectors)

    if form.chunks == 1:
        for part in range(form.parts):
            of_part(k.index(0), part)
        return
    with k.loop(k.index(form.chunks), "chunk") as chunk:
        for part in range(form.parts):
            of_part(chunk, part)


def _scales(k: Emitter, form: PackedForm, load: LoadPairs, at: Expr) -> list[tuple[Sequence[Expr], Expr | None]]:
    """Return, for the first 8 lines and for the others, scales repeated for both numbers of a pair.

    These are d for each element of a byte, and c. The second integer of a byte is left multiplied by 16 when it is
    unpacked, so its d is divided by 16.
    """
    d, c = form.scales_of_pairs(k, lambda place: load(at + place, 0, 2 * LANES), LANES)
    found: list[tuple[Sequence[Expr], Expr | None]] = []
    for first in (0, LANES // 2):

        def twice(x: Expr, first: int = first) -> Expr:
            return k.let(k.shuffle([x], [first + i // 2 for i in range(LANES)]), "twice")

        one = twice(d)
        ds = (
            [one] * (8 // form.bits)
            if form.bits == 8 or form.codes
            else [one, k.let(one * k.number(1 / 16, f32, LANES), "d16")]
        )
        found.append((ds, None if c is None else twice(c)))
    return found


def pairs_rounded(k: Emitter, low: Expr, high: Expr) -> Expr:
    """Round two vectors of 16 floats to 16 pairs of bf16 numbers. Each pair has one number of each vector."""
    return k.shuffle([two_rounded(k, low, high)], [i + n for i in range(LANES) for n in (0, LANES)])
