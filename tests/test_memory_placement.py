"""Placement of buffers in one arena: the smallest arena, compared with brute force; the checker; instance files."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.ir.errors import PassError
from treadle.passes.memory import exact, placement
from treadle.passes.memory.checking import check_placement
from treadle.passes.memory.greedy import first_fit, live_bytes
from treadle.passes.memory.instances import Instance, Lifetime, parse_instance, read_instance
from treadle.passes.memory.placement import GREEDY, NO_NUMBA, SEARCHED, TOO_LARGE, place

needs_numba = pytest.mark.skipif(not exact.available(), reason="needs numba")


def lifetimes(most: int, sizes: int, steps: int, least: int = 0) -> st.SearchStrategy[list[Lifetime]]:
    one = st.builds(
        lambda first, length, size: (first, first + length, size),
        st.integers(0, steps),
        st.integers(1, steps),
        st.integers(least, sizes),
    )
    return st.lists(one, max_size=most).map(lambda rows: [Lifetime(str(i), *row) for i, row in enumerate(rows)])


def peak(lives: Sequence[Lifetime]) -> int:
    return max((sum(y.size for y in lives if y.first <= x.first < y.end) for x in lives), default=0)


def lives_with(x: Lifetime, y: Lifetime) -> bool:
    return x.first < y.end and y.first < x.end


def fits(lives: Sequence[Lifetime], capacity: int) -> bool:
    """Return True if buffers that fill most of the capacity fit, by brute force.

    The lowest buffer is placed first, and each further buffer directly above the buffers below it.
    """

    def rest(placed: list[tuple[int, Lifetime]], left: list[Lifetime], lowest: int) -> bool:
        for x in left:
            at = max((o + y.size for o, y in placed if lives_with(x, y)), default=0)
            others = [y for y in left if y is not x]
            if lowest <= at <= capacity - x.size and rest([*placed, (at, x)], others, at):
                return True
        return not left

    return rest([], list(lives), 0)


GAPS = [
    [(2, 5, 1), (2, 6, 2), (4, 5, 1), (4, 6, 1), (0, 2, 3), (0, 1, 2), (1, 4, 2), (5, 7, 2), (6, 7, 3)],
    [(2, 3, 1), (4, 5, 3), (2, 5, 1), (2, 4, 1), (0, 2, 3), (1, 3, 1), (3, 5, 2), (1, 4, 2), (0, 1, 3)],
]
"""Instances in which no placement is as small as the peak number of live bytes."""


def gap(number: int) -> list[Lifetime]:
    return [Lifetime(str(i), *row) for i, row in enumerate(GAPS[number])]


def smallest(lives: Sequence[Lifetime]) -> int:
    """Return the smallest arena by brute force: for each order of the buffers, place each buffer at the lowest free
    offset.

    One of these orders is optimal: in an optimal placement with the least sum of offsets, sorted by offset, each buffer
    is as low as possible.
    """
    best = sum(x.size for x in lives)
    for order in itertools.permutations(lives):
        taken: list[tuple[int, Lifetime]] = []
        for x in order:
            at = 0
            for o, y in sorted((p for p in taken if lives_with(p[1], x)), key=lambda p: p[0]) if x.size else ():
                if at + x.size <= o:
                    break
                at = max(at, o + y.size)
            if at + x.size >= best:
                break
            if x.size:
                taken.append((at, x))
        else:
            best = max((o + y.size for o, y in taken), default=0)
        if best == peak(lives):
            break
    return best


def columns(lives: Sequence[Lifetime]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = np.array([(x.first, x.end, x.size) for x in lives], np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def searched(lives: Sequence[Lifetime], capacity: int | None = None) -> exact.Outcome:
    """Return the result of the exact search alone, which begins with all buffers next to each other."""
    first, end, size = columns(lives)
    worst = exact.Outcome(np.cumsum(size) - size, int(size.sum()), int(live_bytes(first, end, size)[1].max()))
    found = exact.improve(first, end, size, worst, capacity, 20)
    assert found is not None
    return found


# Small instances, against brute force


@needs_numba
@settings(max_examples=300, deadline=None)
@given(lifetimes(6, 9, 8))
def test_a_small_placement_is_the_smallest(lives: list[Lifetime]) -> None:
    found = place(lives, seconds=20)
    assert found.size == smallest(lives) == found.bound
    assert found.proven
    assert check_placement(lives, found.offsets) == found.size


@needs_numba
@settings(max_examples=300, deadline=None)
@given(lifetimes(6, 9, 8, least=1).filter(bool))
def test_the_search_alone_finds_the_smallest(lives: list[Lifetime]) -> None:
    found = searched(lives)
    assert found.reached == found.bound == smallest(lives)
    assert check_placement(lives, [int(x) for x in found.offsets]) == found.reached


@needs_numba
@pytest.mark.parametrize("number", range(len(GAPS)))
def test_a_bound_above_the_largest_live_set_is_proven(number: int) -> None:
    lives = gap(number)
    assert not fits(lives, peak(lives))
    assert place(lives, seconds=20).bound == searched(lives).bound == peak(lives) + 1
    assert place(lives, seconds=20).size == searched(lives).reached == peak(lives) + 1
    assert place(lives, seconds=20).method == SEARCHED
    with pytest.raises(PassError, match="the capacity cannot hold the buffers") as error:
        place(lives, capacity=peak(lives), seconds=20)
    assert f"no placement takes less than {peak(lives) + 1}" in str(error.value)


# Larger ones, against the checker and the bound


@settings(max_examples=60, deadline=None)
@given(lifetimes(60, 100, 30), st.sampled_from([1, 3, 64]))
def test_a_larger_placement_is_sound(lives: list[Lifetime], alignment: int) -> None:
    found = place(lives, alignment=alignment, seconds=0.05)
    aligned = [Lifetime(x.name, x.first, x.end, -(-x.size // alignment) * alignment) for x in lives]
    assert found.size >= found.bound >= peak(aligned)
    assert all(offset % alignment == 0 for offset in found.offsets)
    for (at, x), (other, y) in itertools.combinations(zip(found.offsets, lives, strict=True), 2):
        together = x.first < y.end and y.first < x.end and x.size and y.size
        assert not together or at + x.size <= other or other + y.size <= at
        assert at + x.size <= found.size and other + y.size <= found.size


def cut(rng: np.random.Generator, first: int, end: int, low: int, high: int) -> list[Lifetime]:
    """Divide a rectangle of steps and memory into buffers that fill it, and return them."""
    length, height = end - first, high - low
    if max(length, height) == 1 or rng.random() < 0.1:
        return [Lifetime(f"{first} to {end} at {low}", first, end, height)]
    if height == 1 or (length > 1 and rng.random() < 0.5):
        at = int(rng.integers(first + 1, end))
        return cut(rng, first, at, low, high) + cut(rng, at, end, low, high)
    at = int(rng.integers(low + 1, high))
    return cut(rng, first, end, low, at) + cut(rng, first, end, at, high)


@needs_numba
@pytest.mark.parametrize("seed", [4, 5, 6, 11])
def test_the_search_puts_a_cut_rectangle_together_again(seed: int) -> None:
    """No byte is free at any step, so a placement of this size is optimal."""
    rng = np.random.default_rng(seed)
    lives = cut(rng, 0, 24, 0, 48)
    rng.shuffle(lives)  # type: ignore[arg-type]
    found = searched(lives, 48)
    assert check_placement(lives, [int(x) for x in found.offsets], capacity=48) == 48 == found.bound


# The size that the caller asks for


@settings(max_examples=60, deadline=None)
@given(lifetimes(40, 100, 20))
def test_no_greedy_placement_is_larger_than_largest_first(lives: list[Lifetime]) -> None:
    first, end, size = columns(lives)
    largest_first = first_fit(first, end, size, np.argsort(-size, kind="stable"))
    assert place(lives, seconds=0).size <= max((largest_first + size).tolist(), default=0)


def test_another_order_is_taken_where_it_is_better() -> None:
    lives = [Lifetime("w", 4, 7, 4), Lifetime("x", 3, 4, 3), Lifetime("y", 3, 5, 2), Lifetime("z", 1, 4, 2)]
    first, end, size = columns(lives)
    assert (first_fit(first, end, size, np.array([0, 1, 2, 3])) + size).max() == 8  # largest first
    assert place(lives, seconds=0).size == 7


def test_empty_values_take_no_memory() -> None:
    assert (place([]).size, place([]).proven) == (0, True)
    lives = [Lifetime("x", 0, 2, 0), Lifetime("y", 0, 2, 8), Lifetime("z", 1, 3, 0)]
    assert place(lives, capacity=8).offsets == (0, 0, 0)
    assert place(lives[:1]).size == 0


def test_equal_lifetimes_lie_side_by_side() -> None:
    lives = [Lifetime(str(i), 3, 5, 10) for i in range(30)]
    found = place(lives, seconds=20)
    assert sorted(found.offsets) == list(range(0, 300, 10))
    assert found.proven and found.method == GREEDY


def test_alignment_rounds_sizes_up() -> None:
    found = place([Lifetime("x", 0, 2, 1), Lifetime("y", 1, 3, 65)], alignment=64)
    assert (found.size, found.bound) == (192, 192)
    assert str(found).startswith("2 buffers in 192 bytes, the minimum (bound 192); greedy, ")


def test_a_capacity_that_cannot_hold_names_the_bound() -> None:
    lives = [Lifetime("x", 0, 2, 60), Lifetime("y", 1, 3, 50)]
    with pytest.raises(PassError, match="the capacity cannot hold the buffers") as error:
        place(lives, capacity=100)
    assert "no placement takes less than 110" in str(error.value)
    assert place(lives, capacity=110).size == 110


def test_a_search_without_time_says_what_it_has() -> None:
    lives = gap(0)
    with pytest.raises(PassError, match=r"no placement below the capacity was found in 0 s") as error:
        place(lives, capacity=peak(lives), seconds=0)
    assert f"none takes less than {peak(lives)}" in str(error.value)
    if exact.available():
        capacity = int(str(error.value.hint).removeprefix("capacity="))
        assert place(lives, capacity=capacity, seconds=0).size == capacity


def test_without_numba_the_result_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.exact, "available", lambda: False)
    lives = gap(0)
    found = place(lives)
    assert found.method == NO_NUMBA
    assert found.size > found.bound == peak(lives) and not found.proven
    with pytest.raises(PassError, match="numba") as error:
        place(lives, capacity=peak(lives))
    assert error.value.hint == "pip install '.[memory]'"


@needs_numba
def test_the_search_gives_the_same_placement_each_time() -> None:
    rng = np.random.default_rng(5)
    lives = cut(rng, 0, 24, 0, 48)
    rng.shuffle(lives)  # type: ignore[arg-type]
    assert searched(lives, 48).offsets.tolist() == searched(lives, 48).offsets.tolist()


@pytest.mark.parametrize(
    ("lives", "arguments", "message"),
    [
        ([Lifetime("x", 2, 2, 8)], {}, "must end after it begins"),
        ([Lifetime("x", 0, 2, -8)], {}, "must end after it begins"),
        ([Lifetime("x", 0, 2, 1 << 61)], {}, "too large"),
        ([], {"alignment": 0}, "alignment must be at least 1"),
        ([], {"capacity": -1}, "capacity must not be negative"),
    ],
)
def test_other_types_are_refused(lives: list[Lifetime], arguments: dict[str, int], message: str) -> None:
    with pytest.raises(PassError, match=message):
        place(lives, **arguments)  # type: ignore[arg-type]


def test_numba_is_loaded_by_a_search_alone() -> None:
    program = (
        "import sys\n"
        "from treadle.passes.memory.placement import Lifetime, place\n"
        "place([Lifetime('x', 0, 2, 8), Lifetime('y', 1, 3, 8)])\n"
        "assert 'numba' not in sys.modules"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Parts of the search


def test_luby() -> None:
    assert [exact.luby(n) for n in range(1, 16)] == [1, 1, 2, 1, 1, 2, 4, 1, 1, 2, 1, 1, 2, 4, 8]


@given(lifetimes(12, 1, 12, least=1).filter(bool))
def test_buffers_share_a_section_exactly_if_they_live_together(lives: list[Lifetime]) -> None:
    first, end, size = columns(lives)
    begin, stop, count = exact.sections(first, end)
    assert (begin < stop).all() and begin.min() == 0 and stop.max() == count
    for i, j in itertools.combinations(range(len(lives)), 2):
        together = first[i] < end[j] and first[j] < end[i]
        assert together == (begin[i] < stop[j] and begin[j] < stop[i])
    members = [frozenset(np.flatnonzero((begin <= t) & (t < stop))) for t in range(count)]
    assert not any(a < b for a in members for b in members)
    assert max(int(size[list(m)].sum()) for m in members) == peak(lives)


def test_a_search_among_too_many_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instance has one more than four million pairs of a buffer and a section in which it lives."""
    steps = np.arange(2000)
    first = np.concatenate([steps, np.zeros(2000, np.int64)])
    end = np.concatenate([steps + 1, np.full(1999, 2000), [1]])
    known = exact.Outcome(np.zeros(4000, np.int64), 9, 4)
    assert exact.improve(first, end, np.ones(4000, np.int64), known, None, 0.0) is None
    monkeypatch.setattr(placement.exact, "improve", lambda *_: None)
    monkeypatch.setattr(placement.exact, "available", lambda: True)
    assert place(gap(0)).method == TOO_LARGE == "greedy only: too many buffers are live together for the search"


@pytest.mark.parametrize(
    ("proven", "found", "capacity", "asked", "report"),
    [
        (0, 1000, None, [60, 80, 90, 95, 97, 98, 60, 80, 90, 95], (100, 60)),
        (62, 75, None, [60, 61, 62, 81, 62, 71, 76, 62, 69, 72], (76, 62)),
        (60, 60, None, [60], (60, 60)),
        (0, 80, 85, [85], (85, 60)),
        (90, 1000, 85, [85], (100, 86)),
    ],
)
def test_which_sizes_are_asked_for(
    proven: int,
    found: int,
    capacity: int | None,
    asked: list[int],
    report: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bound is tried first, then the middle between bound and best known size, and so on until time is up. The
    clock is read 20 times.

    For sizes below `proven` there is no placement, from `found` on there is one. Between them a search ends without an
    answer.
    """
    clock, was = iter(range(100)), list[int]()

    class Runs:
        def __init__(self, *_: object) -> None:
            pass

        def decide(self, size: int, deadline: float) -> np.ndarray | None:
            was.append(size)
            return None if size < proven else np.array([0, size - 10] if size >= found else [], np.int64)

    monkeypatch.setattr(exact, "_Runs", Runs)
    monkeypatch.setattr(exact, "warm_up", lambda: None)
    monkeypatch.setattr(exact, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    known = exact.Outcome(np.array([0, 90]), 100, 60)
    best = exact.improve(np.array([0, 0]), np.array([1, 1]), np.array([10, 10]), known, capacity, 20.0)
    assert best is not None
    assert (was, (best.reached, best.bound)) == (asked, report)


# Planted faults


def test_the_checker_finds_planted_faults() -> None:
    lives = [Lifetime("x", 0, 3, 100), Lifetime("y", 2, 4, 100), Lifetime("z", 3, 5, 50), Lifetime("none", 0, 9, 0)]
    assert check_placement(lives, [0, 128, 0, 30], alignment=2) == 228
    for offsets, message in (
        ([0, 99, 0, 0], "two buffers that live at the same time overlap"),
        ([0, 128, 126, 0], "two buffers that live at the same time overlap"),
        ([0, 127, 0, 0], "must be a multiple of 2"),
        ([0, -128, 0, 0], "not negative"),
        ([0, 130, 0, 0], "a buffer ends beyond the capacity"),
        ([0, 128, 0], "one offset for each buffer"),
    ):
        with pytest.raises(PassError, match=message):
            check_placement(lives, offsets, alignment=1 if 99 in offsets else 2, capacity=228)


@settings(max_examples=100, deadline=None)
@given(lifetimes(8, 5, 8), st.data())
def test_the_checker_agrees_with_all_pairs(lives: list[Lifetime], data: st.DataObject) -> None:
    offsets = data.draw(st.lists(st.integers(0, 12), min_size=len(lives), max_size=len(lives)))
    overlap = any(
        x.first < y.end and y.first < x.end and x.size and y.size and a < b + y.size and b < a + x.size
        for (a, x), (b, y) in itertools.combinations(zip(offsets, lives, strict=True), 2)
    )
    if overlap:
        with pytest.raises(PassError, match="two buffers that live at the same time overlap"):
            check_placement(lives, offsets)
    else:
        check_placement(lives, offsets)


# Files


def test_an_instance_prints_as_it_is_read(tmp_path: Path) -> None:
    given = Instance("tiny", (Lifetime("a", 0, 3, 8), Lifetime("b, c", 2, 4, 0)), (0, 8))
    assert str(given) == 'id,lower,upper,size,offset\na,0,3,8,0\n"b, c",2,4,0,8\n'
    file = tmp_path / "tiny.csv"
    file.write_text(str(given))
    assert read_instance(file) == given
    plain = Instance("plain", given.buffers)
    assert parse_instance(str(plain), "plain") == plain
    assert parse_instance("size,id,upper,lower\n8,a,3,0\n\n").buffers == given.buffers[:1]


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("", "the first line must name the columns", 1),
        ("id,lower,upper\n", "the first line must name the columns", 1),
        ("id,lower,upper,size,gaps\n", "the first line must name the columns", 1),
        ("id,lower,upper,size,size\n", "the first line must name the columns", 1),
        ("id,lower,upper,size\na,0,1,8\nb,0,1\n", "a line must have as many fields as the first line", 3),
        ("id,lower,upper,size\na,0,1,8,9\n", "a line must have as many fields as the first line", 2),
        ("id,lower,upper,size\na,0,1,-8\n", "size must be a non-negative integer", 2),
        ("id,lower,upper,size\na,0,1.5,8\n", "upper must be a non-negative integer", 2),
        ("id,lower,upper,size\na,0,1,9999999999999999999\n", "size must be a non-negative integer", 2),
        ("id,lower,upper,size\na,٣,5,8\n", "lower must be a non-negative integer", 2),
        ("id,lower,upper,size\na,3,3,8\n", "must end after it begins", 2),
        ("id,lower,upper,size\na,0,1,8\na,0,1,8\n", "two buffers have the same id", 3),
        ('id,lower,upper,size\n"a,0,1,8\n', "the file is not CSV", 2),
    ],
)
def test_a_malformed_file_is_refused_with_the_line(text: str, message: str, line: int) -> None:
    with pytest.raises(PassError, match=message) as error:
        parse_instance(text, "x")
    assert f"x, line {line}" in str(error.value)


def test_a_file_that_is_not_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"id,\xff")
    with pytest.raises(PassError, match="the file is not text"):
        read_instance(tmp_path / "x.csv")
    with pytest.raises(PassError, match="the file cannot be read"):
        read_instance(tmp_path / "y.csv")
