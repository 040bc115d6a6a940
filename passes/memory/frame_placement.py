"""Frames in one arena: an offset for each storage, and for the frame of each callee, when sizes are seen.

A call is a buffer of the caller's, as large as its callee's frame, that lives while the call runs. So a callee lies in
what its caller does not need at that step, and each function is placed once, however often it is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from treadle.ir.storage.views import Storage
from treadle.passes.memory.checking import check_placement
from treadle.passes.memory.frames import Frame
from treadle.passes.memory.greedy import live_bytes, place_greedily
from treadle.passes.memory.instances import Lifetime

ALIGNMENT = 64
"""Bytes; a cache line, and the widest vector."""


@dataclass(frozen=True, eq=False)
class PlacedFrame:
    """Where everything lies, in bytes from where the frame begins.

    offsets  of the function's own storages
    callees  by step, where the frame of its callee begins
    size     of the frame, callees' included
    bound    no placement needs less: the most bytes that live at once, in whole units of the alignment
    """

    offsets: Mapping[Storage, int]
    callees: Mapping[int, int]
    size: int
    bound: int


def place_frames(frames: Mapping[str, Frame], sizes: Mapping[str, int]) -> dict[str, PlacedFrame]:
    """By function; callees come first in `frames`. Checked, each of them.

    Raises OverflowError where 64 bits do not hold the bytes.
    """
    placed: dict[str, PlacedFrame] = {}
    for name, frame in frames.items():
        lives = [Lifetime(x.storage.name, x.first, x.last + 1, x.storage.nbytes.evaluate(sizes)) for x in frame.lives]
        calls = [
            (at, placed[call.callee], Lifetime(f"{call.callee} at {at}", at, at + 1, placed[call.callee].size))
            for at, call in frame.calls.items()
        ]
        buffers = [*lives, *(life for _, _, life in calls)]
        offsets = plan_arena(buffers)
        size = check_placement(buffers, offsets, alignment=ALIGNMENT)
        inner = {at: callee.bound for at, callee, _ in calls}
        placed[name] = PlacedFrame(
            {x.storage: offset for x, offset in zip(frame.lives, offsets, strict=False)},
            {at: offset for (at, _, _), offset in zip(calls, offsets[len(lives) :], strict=True)},
            size,
            _most_alive(lives, inner, len(frame.steps)),
        )
    return placed


def plan_arena(lives: Sequence[Lifetime]) -> list[int]:
    """An offset in bytes for each buffer, a multiple of ALIGNMENT.

    The best of the greedy orders of `treadle.passes.memory`, without the search behind them, since a call waits for it.
    Most often the first order, largest first, takes as few bytes as any placement could, and no other one is tried.
    Raises OverflowError where 64 bits do not hold the bytes of all buffers.
    """
    if sum(x.size + ALIGNMENT for x in lives) >= 1 << 63:
        raise OverflowError("64 bits do not hold the bytes of all buffers")
    table = np.array([(x.first, x.end, -(-x.size // ALIGNMENT) * ALIGNMENT) for x in lives], np.int64).reshape(-1, 3)
    solid = table[:, 2] > 0
    first, end, size = table[solid].T
    offsets = np.zeros(len(lives), np.int64)
    if solid.any():
        offsets[solid] = place_greedily(first, end, size, int(live_bytes(first, end, size)[1].max()))
    return [int(n) for n in offsets]


def _most_alive(lives: Sequence[Lifetime], inner: Mapping[int, int], steps: int) -> int:
    """The most bytes that live at once, with those of callees."""
    change = [0] * (steps + 2)
    for life in lives:
        size = -(-life.size // ALIGNMENT) * ALIGNMENT
        change[life.first] += size
        change[life.end] -= size
    live = found = 0
    for at in range(steps + 1):
        live += change[at]
        found = max(found, live + inner.get(at, 0))
    return found
