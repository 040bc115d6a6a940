"""Frames in one arena: an offset for each storage, and for the frame of each callee, when sizes are seen.

A call is a buffer of the caller's, as large as its callee's frame, that lives while the call runs. So a callee lies in
what its caller does not need at that step, and each function is placed once, however often it is called.

A result of an entry is memory that a run allocates anyway. Where all that dies before it is written fits into it, it
lies there: logits over a vocabulary are most often larger than all that leads to them.

No function takes more than places that lie one after the other, where buffers of one size that are never needed
together share a place, and calls share one. What that comes to is a polynomial of the symbols, so it is known for all
sizes before any are seen (`hosting.py`). Greedy orders most often take less; where they take more, it is done so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from treadle.ir.sizing.sizes import Size
from treadle.ir.storage.views import Storage
from treadle.passes.memory.checking import check_placement
from treadle.passes.memory.frames import Frame, aligned
from treadle.passes.memory.greedy import live_bytes, place_greedily
from treadle.passes.memory.instances import Lifetime

ALIGNMENT = 64
"""Bytes; a cache line, and the widest vector."""


@dataclass(frozen=True, eq=False)
class PlacedFrame:
    """Where everything lies, in bytes from where the frame begins.

    offsets  of the function's own storages
    callees  by step, where the frame of its callee begins
    size     of the frame, callees' included, beside what lies in the host
    bound    no placement of that needs less: the most bytes that live at once, in whole units of the alignment
    host     a result in whose memory lies what dies before that is written; None: nothing does
    hosted   what lies there: storages, and callees by step. Their offsets count from where the result begins
    """

    offsets: Mapping[Storage, int]
    callees: Mapping[int, int]
    size: int
    bound: int
    host: Storage | None = None
    hosted: frozenset[Storage | int] = frozenset()


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
        buffers: dict[Storage | int, Lifetime] = {x.storage: life for x, life in zip(frame.lives, lives, strict=True)}
        buffers |= {at: life for at, _, life in calls}
        offsets, size = _placed(buffers)
        host, hosted = None, frozenset[Storage | int]()
        for result in frame.handed_out:  # of those that hold it, the one that leaves the arena smallest
            early = {key: life for key, life in buffers.items() if life.end <= result.first}
            inside, taken = _placed(early)
            outside, left = _placed({key: life for key, life in buffers.items() if key not in early})
            if taken <= result.storage.nbytes.evaluate(sizes) and left < size:
                offsets, size, host, hosted = inside | outside, left, result.storage, frozenset(early)
        own = [life for key, life in buffers.items() if isinstance(key, Storage) and key not in hosted]
        inner = {at: callee.bound for at, callee, _ in calls if at not in hosted}
        placed[name] = PlacedFrame(
            {key: offset for key, offset in offsets.items() if isinstance(key, Storage)},
            {key: offset for key, offset in offsets.items() if isinstance(key, int)},
            size,
            _most_alive(own, inner, len(frame.steps)),
            host,
            hosted,
        )
    return placed


def _placed(buffers: Mapping[Storage | int, Lifetime]) -> tuple[dict[Storage | int, int], int]:
    """Offsets, checked, and the bytes that they reach to."""
    lives = list(buffers.values())
    offsets = plan_arena(lives)
    size = check_placement(lives, offsets, alignment=ALIGNMENT)
    beside = _one_after_the_other(buffers)
    if max((at + aligned(life.size, ALIGNMENT) for at, life in zip(beside, lives, strict=True)), default=0) < size:
        offsets, size = beside, check_placement(lives, beside, alignment=ALIGNMENT)
    return dict(zip(buffers, offsets, strict=True)), size


def _one_after_the_other(buffers: Mapping[Storage | int, Lifetime]) -> list[int]:
    """An offset for each buffer: buffers of one size expression share places, and calls do."""
    alike: dict[Size | None, list[Storage | int]] = {}
    for key in buffers:
        alike.setdefault(key.nbytes if isinstance(key, Storage) else None, []).append(key)
    at, found = 0, dict[Storage | int, int]()
    for keys in alike.values():
        places = share_places([(buffers[key].first, buffers[key].end) for key in keys])
        size = aligned(max(buffers[key].size for key in keys), ALIGNMENT)
        found |= {key: at + place * size for key, place in zip(keys, places, strict=True)}
        at += (max(places) + 1) * size
    return [found[key] for key in buffers]


def share_places(lives: Sequence[tuple[int, int]]) -> list[int]:
    """The number of a place for each buffer, no two of which live there at once; as few places as there can be.

    lives  from which step, to before which one
    """
    found, ends = [0] * len(lives), list[int]()
    for i in sorted(range(len(lives)), key=lives.__getitem__):
        first, end = lives[i]
        found[i] = next((place for place, until in enumerate(ends) if until <= first), len(ends))
        ends[found[i] : found[i] + 1] = [end]
    return found


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
