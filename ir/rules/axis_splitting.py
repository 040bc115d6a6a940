"""Common factors of the axes of two shapes that hold the same elements in the same order.

    [B, S, 768] and [B*S, 12, 64]     runs B S | B*S and 768 | 12 64; pieces B, S, 12, 64
    [4, 6] and [8, 3]                 one run; pieces 4, 2, 3: 8 is 4 * 2, and 6 is 2 * 3
    [4, 6] and [3, 8]                 one run; no pieces, since 4 is neither a multiple nor a factor of 3

Sizes may be symbolic: a result holds for all values of the symbols. Axes of size 1 are in no run and have no pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.ir.errors import SizeError
from treadle.ir.sizing.sizes import ONE, Size

Run = tuple[tuple[int, ...], tuple[int, ...]]
"""A run: the axes of the first and of the second shape, adjacent except for axes of size 1, with the same product."""


def common_runs(before: Sequence[Size], after: Sequence[Size]) -> list[Run] | None:
    """Return the shortest runs of axes with the same product on both sides, in order.

    Returns None in three cases: the shapes have different numbers of elements; they have no elements, so that axes
    cannot be matched; or a product has more terms than a size may have.
    """
    ours = [i for i, size in enumerate(before) if size != ONE]
    theirs = [i for i, size in enumerate(after) if size != ONE]
    if [before[i] for i in ours] == [after[j] for j in theirs]:
        return [((i,), (j,)) for i, j in zip(ours, theirs, strict=True)]
    if any(size.constant == 0 for size in (*before, *after)):
        return None
    runs: list[Run] = []
    while ours and theirs:
        try:
            found = _first_run([before[i] for i in ours], [after[j] for j in theirs])
        except SizeError:
            found = None
        if found is None:
            return None
        m, n = found
        runs.append((tuple(ours[:m]), tuple(theirs[:n])))
        ours, theirs = ours[m:], theirs[n:]
    return None if ours or theirs else runs


@dataclass(frozen=True)
class Pieces:
    """The common factors of the axes of two shapes.

    sizes           the sizes of the pieces, outermost first
    before, after   for each axis, the pieces whose product it is, outermost first
    """

    sizes: tuple[Size, ...]
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]


def common_pieces(before: Sequence[Size], after: Sequence[Size]) -> Pieces | None:
    """Return the fewest pieces that both shapes consist of. Return None if an axis of one shape ends inside an axis of
    the other, where neither size divides the other.
    """
    runs = common_runs(before, after)
    if runs is None:
        return None
    sizes: list[Size] = []
    made: tuple[dict[int, list[int]], dict[int, list[int]]] = {}, {}
    for run in runs:
        cut = _cut([before[i] for i in run[0]], [after[j] for j in run[1]])
        if cut is None:
            return None
        for size, places in cut:
            for axes, place, side in zip(run, places, made, strict=True):
                side.setdefault(axes[place], []).append(len(sizes))
            sizes.append(size)
    ours, theirs = (
        tuple(tuple(side.get(axis, ())) for axis in range(len(shape)))
        for side, shape in zip(made, (before, after), strict=True)
    )
    return Pieces(tuple(sizes), ours, theirs)


def _first_run(before: Sequence[Size], after: Sequence[Size]) -> tuple[int, int] | None:
    """Return the numbers of leading axes on either side with the same product; the smallest such numbers.

    The product of one side's leading axes is looked up among the products of the other side. The order in which sides
    are extended does not change the result. The side whose product is a part of the other's is extended first, so that
    products stay small.
    """
    ours, theirs = [before[0]], [after[0]]
    while True:
        if ours[-1] in theirs:
            return len(ours), theirs.index(ours[-1]) + 1
        if theirs[-1] in ours:
            return ours.index(theirs[-1]) + 1, len(theirs)
        more_of_ours, more_of_theirs = len(ours) < len(before), len(theirs) < len(after)
        if more_of_ours and (not more_of_theirs or _is_part(ours[-1], theirs[-1])):
            ours.append(ours[-1] * before[len(ours)])
        elif more_of_theirs:
            theirs.append(theirs[-1] * after[len(theirs)])
        else:
            return None


def _is_part(size: Size, whole: Size) -> bool:
    """Return True if a size is less than another or divides it."""
    if size.constant is not None and whole.constant is not None:
        return size.constant < whole.constant
    return _quotient(whole, size) is not None


def _quotient(size: Size, other: Size) -> Size | None:
    try:
        return size.divide(other)
    except SizeError:  # too many terms to divide
        return None


def _cut(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[Size, tuple[int, int]]] | None:
    """Return the pieces of one run, each with its axis on either side. Return None if the axes have no common
    pieces.
    """
    if len(before) == 1:
        return [(size, (0, j)) for j, size in enumerate(after)]
    if len(after) == 1:
        return [(size, (i, 0)) for i, size in enumerate(before)]
    found: list[tuple[Size, tuple[int, int]]] = []
    i = j = 0
    ours = theirs = ONE  # the rest of axis i, and of axis j; 1 before an axis starts
    while i < len(before) and j < len(after):
        ours, theirs = (before[i] if ours == ONE else ours), (after[j] if theirs == ONE else theirs)
        if (rest := _quotient(ours, theirs)) is not None:
            piece, left = theirs, (rest, ONE)
        elif (rest := _quotient(theirs, ours)) is not None:
            piece, left = ours, (ONE, rest)
        else:
            return None
        found.append((piece, (i, j)))
        ours, theirs = left
        i, j = i + (ours == ONE), j + (theirs == ONE)
    return found if i == len(before) and j == len(after) else None
