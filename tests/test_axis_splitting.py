"""Splits of two shapes into common pieces, compared with brute force and with the factors that the shapes are built
from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from treadle.ir.rules.axis_splitting import Pieces, common_pieces, common_runs
from treadle.ir.sizing.size_text import parse_size
from treadle.ir.sizing.sizes import ONE, Size, product

Shape = list[int]

SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), max_size=4)
ATOMS = st.lists(st.sampled_from(["1", "2", "3", "5", "B", "S", "T", "S+1", "2*T"]), max_size=6)


def sizes(shape: Sequence[int | str]) -> list[Size]:
    return [parse_size(str(size)) for size in shape]


def ordered_factorizations(number: int) -> Iterator[tuple[int, ...]]:
    """Yield every sequence of numbers from 2 on whose product is this number."""
    if number == 1:
        yield ()
    for first in range(2, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in ordered_factorizations(number // first))


def ends(shape: Sequence[int]) -> set[int]:
    """Return the ends of all axes as products of leading axes."""
    return {math.prod(shape[:n]) for n in range(len(shape) + 1)}


def fewest_pieces(before: Shape, after: Shape) -> tuple[int, ...] | None:
    """Try every sequence of pieces; return the shortest in which every axis of both shapes ends with a piece."""
    fitting = [p for p in ordered_factorizations(math.prod(before)) if ends(before) | ends(after) <= ends(p)]
    return min(fitting, key=len) if fitting else None


def most_runs(before: Shape, after: Shape) -> int:
    """Try all ways to divide both shapes, without their ones, into the same number of groups; return the largest."""
    ours, theirs = ([n for n in shape if n != 1] for shape in (before, after))

    def groupings(shape: Shape, count: int) -> Iterator[list[int]]:
        for cuts in combinations(range(1, len(shape)), count - 1):
            bounds = [0, *cuts, len(shape)]
            yield [math.prod(shape[a:b]) for a, b in pairwise(bounds)]

    counts = range(1, min(len(ours), len(theirs)) + 1)
    fitting = [n for n in counts if any(g in groupings(theirs, n) for g in groupings(ours, n))]
    return max(fitting, default=0)


def holds(pieces: Pieces, before: Sequence[Size], after: Sequence[Size]) -> bool:
    """Return True if the axes of both shapes consist of all pieces, in order, and each axis is the product of its
    pieces.
    """
    return ONE not in pieces.sizes and all(
        [p for axis in axes for p in axis] == list(range(len(pieces.sizes)))
        and [product(pieces.sizes[p] for p in axis) for axis in axes] == list(shape)
        for axes, shape in ((pieces.before, before), (pieces.after, after))
    )


def grouped(atoms: Sequence[str], cuts: Sequence[int]) -> list[Size]:
    """Return a shape whose axes are products of neighboring atoms."""
    bounds = [0, *sorted(cut % (len(atoms) + 1) for cut in cuts), len(atoms)]
    return [product(sizes(atoms[a:b])) for a, b in pairwise(bounds)]


# -- against brute force ---------------------------------------------------------------------------------------


@given(SHAPES, SHAPES)
def test_runs_are_the_finest(before: Shape, after: Shape) -> None:
    runs = common_runs(sizes(before), sizes(after))
    assert (runs is None) == (math.prod(before) != math.prod(after))
    if runs is not None:
        assert len(runs) == most_runs(before, after)
        for side, shape in enumerate((before, after)):
            assert [i for run in runs for i in run[side]] == [i for i, n in enumerate(shape) if n != 1]
        assert all(math.prod(before[i] for i in a) == math.prod(after[j] for j in b) for a, b in runs)


@given(SHAPES, SHAPES)
def test_pieces_are_the_fewest(before: Shape, after: Shape) -> None:
    found = common_pieces(sizes(before), sizes(after))
    wanted = fewest_pieces(before, after) if math.prod(before) == math.prod(after) else None
    assert (None if found is None else found.sizes) == wanted
    assert found is None or holds(found, sizes(before), sizes(after))


# -- symbolic sizes --------------------------------------------------------------------------------------------


@given(ATOMS, st.lists(st.integers(0, 6), max_size=3), st.lists(st.integers(0, 6), max_size=3))
def test_shapes_of_the_same_atoms_have_common_pieces(atoms: list[str], cuts: list[int], others: list[int]) -> None:
    before, after = grouped(atoms, cuts), grouped(atoms, others)
    runs = common_runs(before, after)
    assert runs is not None
    assert all(product(before[i] for i in a) == product(after[j] for j in b) for a, b in runs)
    found = common_pieces(before, after)
    assert found is not None
    assert holds(found, before, after)


@given(ATOMS, ATOMS, st.lists(st.integers(0, 6), max_size=3), st.lists(st.integers(0, 6), max_size=3))
def test_bounds_of_symbols_hold_for_their_values(
    atoms: list[str], other: list[str], cuts: list[int], others: list[int]
) -> None:
    before, after = grouped(atoms, cuts), grouped(other, others)
    found = common_pieces(before, after)
    if found is not None:
        values = {"B": 1, "S": 3, "T": 4}
        numbers = [[Size.of(size.evaluate(values)) for size in each] for each in (found.sizes, before, after)]
        for axes, shape in ((found.before, numbers[1]), (found.after, numbers[2])):
            assert [product(numbers[0][p] for p in axis) for axis in axes] == shape


def test_a_sum_is_a_whole_axis() -> None:
    """(S+1) (T+1) is a product of four terms; only a division finds the factors."""
    before, after = sizes(["B", "S*T+S+T+1", "6"]), sizes(["B*S+B", "2*T+2", "3"])
    assert common_runs(before, after) == [((0, 1, 2), (0, 1, 2))]
    found = common_pieces(before, after)
    assert found is not None
    assert [str(size) for size in found.sizes] == ["B", "S+1", "T+1", "2", "3"]


# -- no answer -------------------------------------------------------------------------------------------------


def test_shapes_without_elements_are_told_apart_only_where_they_are_alike() -> None:
    assert common_runs(sizes([2, 0, 1]), sizes([2, 1, 0])) == [((0,), (0,)), ((1,), (2,))]
    assert common_runs(sizes([0, 3]), sizes([3, 0])) is None
    assert common_runs(sizes([0]), sizes([2, 0])) is None


def test_an_axis_that_is_cut_across_has_no_pieces() -> None:
    assert common_runs(sizes([4, 6]), sizes([3, 8])) == [((0, 1), (0, 1))]
    assert common_pieces(sizes([4, 6]), sizes([3, 8])) is None
    assert common_pieces(sizes(["S", "T"]), sizes(["T", "S"])) is None


def test_products_that_no_size_holds_are_not_told() -> None:
    wide = [f"{a}+1" for a in "ABCDEFGHIJKLMNOP"]
    assert common_runs(sizes(wide), sizes(["7", *wide])) is None
    assert common_runs(sizes(wide), sizes(["1", *wide])) is not None
