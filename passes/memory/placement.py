"""Place buffers with lifetimes in one arena, as small as can be proven within a time limit.

The greedy orders come first. If the best of them reaches the lower bound, or the capacity, it is the result. Otherwise
the exact search continues from there, if numba is installed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from treadle.files.installation import pip_install
from treadle.ir.errors import PassError
from treadle.passes.memory import exact
from treadle.passes.memory.checking import check_placement
from treadle.passes.memory.greedy import live_bytes, place_greedily
from treadle.passes.memory.instances import LARGEST, Lifetime

GREEDY = "greedy"
SEARCHED = "searched"
NO_NUMBA = "greedy only: numba, which compiles the search, is not installed"
TOO_LARGE = "greedy only: too many buffers are live together for the search"


@dataclass(frozen=True)
class Placement:
    """The offset of each buffer in one arena.

    offsets  a multiple of the alignment for each buffer, in the order of the arguments
    size     the number of bytes that the arena needs, a multiple of the alignment
    bound    a lower bound of the size of every placement
    method   GREEDY, SEARCHED, or the reason why the search did not run
    seconds  the time spent on the placement
    """

    offsets: tuple[int, ...]
    size: int
    bound: int
    method: str
    seconds: float = field(compare=False)

    @property
    def proven(self) -> bool:
        """True if no placement is smaller."""
        return self.size == self.bound

    def __str__(self) -> str:
        over = "the minimum" if self.proven else f"at most {self.size / self.bound - 1:.2%} over the minimum"
        return (
            f"{len(self.offsets)} buffers in {self.size} bytes, {over} (bound {self.bound}); {self.method},"
            f" {self.seconds:.2f} s"
        )


def place(
    buffers: Sequence[Lifetime], *, capacity: int | None = None, alignment: int = 1, seconds: float = 10.0
) -> Placement:
    """Place buffers in as few bytes as possible so that buffers that are live at the same time do not overlap.

    With a capacity, the first placement within it is returned. Sizes are rounded up to `alignment`. After the time
    limit in `seconds`, the best placement so far is returned. The first search on a machine takes about ten more
    seconds to compile, which do not count; the compiled code is cached on disk.

    Raises PassError if a capacity cannot hold the buffers, or no placement within it was found in time, or a lifetime
    is invalid.
    """
    started = time.perf_counter()
    _check_arguments(buffers, capacity, alignment)
    solid = [i for i, b in enumerate(buffers) if b.size]
    table = np.array([(buffers[i].first, buffers[i].end, buffers[i].size) for i in solid], np.int64).reshape(-1, 3)
    first, end, size = table[:, 0], table[:, 1], -(-table[:, 2] // alignment) * alignment
    unit = (
        int(np.gcd.reduce(size)) if solid else alignment
    )  # offsets are sums of sizes, so all are multiples of this number
    size = size // unit
    bound = int(live_bytes(first, end, size)[1].max()) if solid else 0
    room = None if capacity is None else capacity // unit
    if room is not None and bound > room:
        raise _cannot_hold(capacity, bound * unit)
    offsets = place_greedily(first, end, size, bound if room is None else room)
    known = exact.Outcome(offsets, int((offsets + size).max()) if solid else 0, bound)
    method = GREEDY
    if known.reached > (bound if room is None else room):
        known, method = _search(first, end, size, known, room, seconds)
    if room is not None and known.reached > room:
        if known.bound > room:
            raise _cannot_hold(capacity, known.bound * unit)
        raise PassError(
            f"no placement below the capacity was found in {seconds:g} s",
            received=f"capacity {capacity}; the best placement takes {known.reached * unit}, none takes less than"
            f" {known.bound * unit}; {method}",
            hint=pip_install("memory") if method == NO_NUMBA else f"capacity={known.reached * unit}",
        )
    places = np.zeros(len(buffers), np.int64)
    places[solid] = known.offsets * unit
    found = tuple(int(x) for x in places)
    reached = check_placement(buffers, found, capacity=capacity, alignment=alignment)
    return Placement(found, reached, known.bound * unit, method, time.perf_counter() - started)


def _search(
    first: np.ndarray, end: np.ndarray, size: np.ndarray, known: exact.Outcome, room: int | None, seconds: float
) -> tuple[exact.Outcome, str]:
    """Return the best outcome, which is the search's or the greedy one, and the method that found it."""
    if not exact.available():
        return known, NO_NUMBA
    better = exact.improve(first, end, size, known, room, seconds)
    if better is None:
        return known, TOO_LARGE
    return better, SEARCHED


def _check_arguments(buffers: Sequence[Lifetime], capacity: int | None, alignment: int) -> None:
    if alignment < 1:
        raise PassError("the alignment must be at least 1", received=f"alignment={alignment}", hint="alignment=1")
    if capacity is not None and capacity < 0:
        raise PassError("the capacity must not be negative", received=f"capacity={capacity}", hint="capacity=None")
    total = 0
    for b in buffers:
        if b.end <= b.first or b.size < 0 or max(abs(b.first), abs(b.end)) >= LARGEST:
            raise PassError(
                "a buffer must end after it begins, and its size must not be negative",
                received=str(b),
                hint="Lifetime(name, first, end, size) with first < end and size >= 0",
            )
        total += b.size + alignment
    if total >= LARGEST:
        raise PassError(
            "the buffers are too large to be placed", received=f"{total} bytes in all", hint=f"less than {LARGEST}"
        )


def _cannot_hold(capacity: int | None, bound: int) -> PassError:
    return PassError(
        "the capacity cannot hold the buffers",
        received=f"capacity {capacity}; no placement takes less than {bound}",
        hint=f"capacity={bound} or more",
    )
