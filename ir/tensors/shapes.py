"""Shape changes between known sizes: a rearrange if the axes can be matched, else an opaque reshape.

[B, S, 768] -> [B, S, 12, 64]     "a b (c=12 d) -> a b c d"
[B, S, 12, 64] -> [B, S, 768]     "a b c d -> a b (c d)"
[S, B, 16] -> [S, 2*B, 8]         "a b (c=2 d) -> a (b c) d"
[B, S, 1] -> [B, S]               "a b 1 -> a b"
[4, 6] -> [3, 8]                  reshape: the axes of the two sides have no common parts
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from treadle.ir.builder import Builder, Expr
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.rules.axis_splitting import common_pieces
from treadle.ir.sizing.sizes import ONE, Size

_MOST_PERMUTED = 6


def reshaped(b: Builder, x: Expr, shape: Sequence[Size | int]) -> tuple[Expr, bool]:
    """Return x in another shape with the same number of elements, and True if its axes could be matched.

    Raises RuleError if the numbers of elements differ.
    """
    sizes = tuple(map(Size.of, shape))
    if x.shape == sizes:
        return x, True
    pattern = matching_pattern(x.shape, sizes)
    if pattern is None:
        return b.reshape(x, shape=sizes), False
    return b.rearrange(x, pattern=pattern), True


def matching_pattern(before: Sequence[Size], after: Sequence[Size]) -> str | None:
    """Return the pattern of the rearrange that changes one shape to another and keeps the order of the elements, or
    None if the axes have no common parts.
    """
    sides = _sides(before, after)
    return None if sides is None else f"{' '.join(sides[0])} -> {' '.join(sides[1])}"


def permuting_pattern(before: Sequence[Size], after: Sequence[Size]) -> str | None:
    """Return a pattern that splits the axes of one shape into the axes of another in a different order, or None.

    [B, S, 64] -> [B, 4, S, 16] is "a b (c=4 d) -> a c b d".
    """
    if len(after) > _MOST_PERMUTED:
        return None
    for order in permutations(range(len(after))):
        sides = _sides(before, [after[i] for i in order])
        if sides is not None and all("(" not in dim for dim in sides[1]):
            return f"{' '.join(sides[0])} -> {' '.join(sides[1][order.index(i)] for i in range(len(after)))}"
    return None


def _sides(before: Sequence[Size], after: Sequence[Size]) -> tuple[list[str], list[str]] | None:
    """Return the dimensions on both sides of a pattern."""
    taken = {s for size in (*before, *after) for s in size.symbols}
    if 2 * (len(before) + len(after)) + len(taken) > 50:
        return None
    found = common_pieces(before, after)
    if found is None:
        return None
    names = axis_letters(len(found.sizes), taken)
    left = []
    for pieces in found.before:
        # All factors but one have their sizes in the pattern. The factor without a size is the one whose size is the
        # longest to write, or the last one.
        def difficulty(piece: int) -> tuple[bool, int, int]:
            return not _is_plain(found.sizes[piece]), len(found.sizes[piece].symbols), piece

        free = max(pieces, key=difficulty, default=None)
        left.append(_dimension([names[p] if p == free else f"{names[p]}={_spelled(found.sizes[p])}" for p in pieces]))
    return left, [_dimension([names[p] for p in pieces]) for pieces in found.after]


def _dimension(factors: Sequence[str]) -> str:
    return "1" if not factors else factors[0] if len(factors) == 1 else f"({' '.join(factors)})"


def _spelled(size: Size) -> str:
    """Return a size as text without spaces, as patterns have it."""
    return str(size).replace(" ", "")


def _is_plain(size: Size) -> bool:
    return size.constant is not None or size.as_symbol is not None


def permuted(b: Builder, x: Expr, order: Sequence[int]) -> Expr:
    """Return x with its axes in another order."""
    if list(order) == list(range(x.rank)):
        return x
    names = axis_letters(x.rank)
    return b.rearrange(x, pattern=f"{' '.join(names)} -> {' '.join(names[i] for i in order)}")


def swapped(b: Builder, x: Expr, first: int, second: int) -> Expr:
    """Return x with two axes exchanged."""
    if x.rank == 0:
        return x
    order = list(range(x.rank))
    order[first], order[second] = order[second], order[first]
    return permuted(b, x, order)


def selected(b: Builder, x: Expr, axis: int, at: Size) -> Expr:
    """Return x at one position of an axis, without that axis."""
    picked = b.slice(x, axis=axis, start=at, stop=at + ONE)
    return without_axes(b, picked, [axis])


def without_axes(b: Builder, x: Expr, axes: Sequence[int]) -> Expr:
    """Return x without these axes, which have size 1."""
    return reshaped(b, x, [s for i, s in enumerate(x.shape) if i not in axes])[0]
