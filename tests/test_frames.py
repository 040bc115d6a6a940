"""Frames: live values at each step, with and without callees, and the sizes whose maximum is the peak."""

from __future__ import annotations

import pytest

from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.size_text import parse_size
from treadle.ir.sizing.sizes import Size
from treadle.ir.storage.views import Storage, StorageKind
from treadle.ir.types import f32
from treadle.passes.memory.frame_placement import place_frames, share_places
from treadle.passes.memory.frames import (
    ALIGNMENT,
    Frame,
    FrameCall,
    aligned,
    covers,
    largest,
    live_at,
    parts_of,
    peaks_of,
)
from treadle.passes.memory.storage_plan import Life


def life(elements: str, first: int, last: int, kind: StorageKind = StorageKind.LOCAL) -> Life:
    return Life(Storage(f"{elements} from {first}", f32, Size.of(elements), kind), first, last)


GIVEN, LONG, SHORT, MADE = life("S", -1, 0), life("2*S", 0, 2), life("100", 1, 1), life("3*S", 2, 3)
INNER = life("5*S", 0, 0)
FRAMES = {
    "block": Frame("block", (None,), (INNER, life("1", 0, 0, StorageKind.FOREIGN)), {}),
    "main": Frame(
        "main", (None,) * 3, (GIVEN, LONG, SHORT, MADE), {2: FrameCall("block", (MADE.storage,))}, (life("9", 2, 3),)
    ),
}


def test_live_values_at_each_step() -> None:
    assert FRAMES["main"].alive(0) == [GIVEN, LONG]
    assert FRAMES["main"].alive(1) == [LONG, SHORT]
    assert FRAMES["main"].alive(2) == [LONG] and FRAMES["main"].made_at(2) == [MADE.storage]
    assert FRAMES["main"].alive(3) == [MADE] and FRAMES["main"].made_at(1) == []


def test_the_bytes_that_live_at_each_step() -> None:
    at_ten = {"S": 10}
    assert live_at(FRAMES, "main", at_ten) == [
        ((("main", 0),), 40 + 80),
        ((("main", 1),), 80 + 400),
        ((("main", 2), ("block", 0)), 80 + 200 + 4),
        ((("main", 3),), 120),
    ]
    assert [count for _, count in live_at(FRAMES, "main", at_ten, 64)] == [64 + 128, 128 + 448, 128 + 256 + 64, 128]
    assert [count for _, count in live_at(FRAMES, "main", at_ten, 1, LONG.storage)] == [40, 400, 204, 120]
    assert live_at(FRAMES, "block", at_ten) == [((("block", 0),), 204)]


def test_the_peak_at_any_sizes() -> None:
    peaks = peaks_of(FRAMES, {"S": Bounds()})
    assert {name: [str(size) for size in each] for name, each in peaks.items()} == {
        "block": ["20*S+4"],
        "main": ["8*S+400", "28*S+4"],
    }
    few, many = Bounds(1, 19), Bounds(20)
    assert [str(size) for size in peaks_of(FRAMES, {"S": few})["main"]] == ["8*S+400"]
    assert [str(size) for size in peaks_of(FRAMES, {"S": many})["main"]] == ["28*S+4"]


def test_a_library_allocates_beside_the_arena() -> None:
    inside, beside = parts_of(FRAMES)
    assert inside["block"].lives == (INNER,) and [str(x.storage.elements) for x in beside["block"].lives] == ["1"]
    assert (inside["main"].calls[2].storages, beside["main"].calls[2].storages) == ((), (MADE.storage,))
    assert inside["main"].lives == FRAMES["main"].lives and beside["main"].lives == ()


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        (["S", "2*S", "S"], ["2*S"]),
        (["S", "10"], ["S", "10"]),
        (["8", "10", "9"], ["10"]),
        (["S+1", "S", "S+2"], ["S+2"]),
        ([], []),
    ],
)
def test_sizes_that_others_cover_are_left_out(sizes: list[str], kept: list[str]) -> None:
    assert [str(size) for size in largest([parse_size(each) for each in sizes], {})] == kept
    assert covers(Size.of("S"), Size.of(1), {}) and not covers(Size.of("S"), Size.of(2), {})


def test_multiples() -> None:
    assert [aligned(size, 64) for size in (0, 1, 64, 65)] == [0, 64, 64, 128]
    assert ALIGNMENT == 64


def test_places_are_shared_by_what_is_never_there_at_once() -> None:
    assert share_places([(0, 2), (2, 3), (1, 4), (3, 9)]) == [0, 0, 1, 0]
    assert share_places([(4, 6), (0, 5), (5, 6)]) == [1, 0, 0]
    assert share_places([]) == []


def test_temporaries_dead_before_a_result_is_written_share_its_memory() -> None:
    """A value that dies before the result is written is stored in the result's memory if it fits there. The arena then
    holds only the remaining values.
    """
    early, late = life("64", 0, 1), (life("32", 1, 2), life("16", 2, 2))
    for elements, size in (("64", 128 + 64), ("63", 256 + 128)):
        result = life(elements, 2, 3, StorageKind.RESULT)
        frame = Frame("main", (None,) * 3, (early, *late), {}, (result,))
        placed = place_frames({"main": frame}, {})["main"]
        assert placed.size == placed.bound == size
        assert (placed.host, placed.hosted) == ((None, frozenset()), (result.storage, {early.storage}))[
            elements == "64"
        ]
    # If this saves no memory, the value has its own place.
    frame = Frame("main", (None,) * 3, (life("16", 0, 1), *late), {}, (life("16", 2, 3, StorageKind.RESULT),))
    assert place_frames({"main": frame}, {})["main"].host is None
