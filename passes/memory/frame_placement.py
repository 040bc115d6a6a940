"""Frames in one arena: an offset for each storage, and for the frame of each callee, at given sizes.

A call is a buffer of the caller. It has the size of its callee's frame, and is live while the call runs. So a callee
uses memory that its caller does not need at that step, and each function is placed once, however often it is called.

A run allocates memory for the results of an entry anyway. If all storages that are dead before a result is written fit
into that result, they are placed there: logits over a vocabulary are usually larger than all temporaries before them.

The upper bound of a function is a placement in consecutive places, in which buffers of one size that are never live
together share a place, and calls share one place. This bound is a polynomial of the symbols, so it is known before the
sizes are (`hosting.py`). Greedy orders usually need less; if they need more, this placement is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from treadle.ir.sizing.sizes import Size
from treadle.ir.storage.views import Storage
from treadle.passes.memory.checking import check_placement
from treadle.passes.memory.frames import ALIGNMENT, Frame, aligned
from treadle.passes.memory.greedy import live_bytes, place_greedily
from treadle.passes.memory.instances import Lifetime


@dataclass(frozen=True, eq=False)
class PlacedFrame:
    """The placement of a function's frame, in bytes from the frame's start.

    offsets  offsets of the function's own storages
    callees  offsets of callees' frames, by step
    size     size of the frame, including callees, without the memory in the host
    bound    lower bound of the size: the most bytes that are live at once, in whole units of the alignment
    host     a result whose memory holds storages that are dead before it is written; None if there is none
    hosted   the storages in the host, and callees by step. Their offsets count from the start of the result
    """

    offsets: Mapping[Storage, int]
    callees: Mapping[int, int]
    size: int
    bound: int
    host: Storage | None = None
    hosted: frozenset[Storage | int] = frozenset()


def _as_declared(storage: Storage) -> Size:
    return storage.nbytes


def place_frames(
    frames: Mapping[str, Frame],
    sizes: Mapping[str, int],
    alignment: int | None = None,
    nbytes: Callable[[Storage], Size] = _as_declared,
) -> dict[str, PlacedFrame]:
    """Return the placed frame of each function, checked. In `frames`, callees come first.

    alignment  every offset is a multiple of this number of bytes; None: the alignment of the frames
    nbytes     returns the bytes of a storage, for a memory whose elements are smaller than their dtypes

    Raises OverflowError if the bytes do not fit into 64 bits.
    """
    placed: dict[str, PlacedFrame] = {}
    asked = alignment
    for name, frame in frames.items():
        alignment = asked or frame.alignment
        lives = [Lifetime(x.storage.name, x.first, x.last + 1, nbytes(x.storage).evaluate(sizes)) for x in frame.lives]
        calls = [
            (at, placed[call.callee], Lifetime(f"{call.callee} at {at}", at, at + 1, placed[call.callee].size))
            for at, call in frame.calls.items()
        ]
        buffers: dict[Storage | int, Lifetime] = {x.storage: life for x, life in zip(frame.lives, lives, strict=True)}
        buffers |= {at: life for at, _, life in calls}
        offsets, size = _placed(buffers, alignment)
        host, hosted = None, frozenset[Storage | int]()
        for result in frame.handed_out:  # of the results that are large enough, the one with the smallest arena
            early = {key: life for key, life in buffers.items() if life.end <= result.first}
            inside, taken = _placed(early, alignment)
            outside, left = _placed({key: life for key, life in buffers.items() if key not in early}, alignment)
            if taken <= nbytes(result.storage).evaluate(sizes) and left < size:
                offsets, size, host, hosted = inside | outside, left, result.storage, frozenset(early)
        own = [life for key, life in buffers.items() if isinstance(key, Storage) and key not in hosted]
        inner = {at: callee.bound for at, callee, _ in calls if at not in hosted}
        placed[name] = PlacedFrame(
            {key: offset for key, offset in offsets.items() if isinstance(key, Storage)},
            {key: offset for key, offset in offsets.items() if isinstance(key, int)},
            size,
            _most_alive(own, inner, len(frame.steps), alignment),
            host,
            hosted,
        )
    return placed


def _placed(buffers: Mapping[Storage | int, Lifetime], alignment: int) -> tuple[dict[Storage | int, int], int]:
    """Return the checked offsets, and the end of the highest buffer in bytes."""
    lives = list(buffers.values())
    offsets = plan_arena(lives, alignment)
    size = check_placement(lives, offsets, alignment=alignment)
    beside = _one_after_the_other(buffers, alignment)
    if max((at + aligned(life.size, alignment) for at, life in zip(beside, lives, strict=True)), default=0) < size:
        offsets, size = beside, check_placement(lives, beside, alignment=alignment)
    return dict(zip(buffers, offsets, strict=True)), size


def _one_after_the_other(buffers: Mapping[Storage | int, Lifetime], alignment: int) -> list[int]:
    """Return an offset for each buffer. Buffers with the same size expression share places, and calls share one
    place.
    """
    alike: dict[Size | None, list[Storage | int]] = {}
    for key in buffers:
        alike.setdefault(key.nbytes if isinstance(key, Storage) else None, []).append(key)
    at, found = 0, dict[Storage | int, int]()
    for keys in alike.values():
        places = share_places([(buffers[key].first, buffers[key].end) for key in keys])
        size = aligned(max(buffers[key].size for key in keys), alignment)
        found |= {key: at + place * size for key, place in zip(keys, places, strict=True)}
        at += (max(places) + 1) * size
    return [found[key] for key in buffers]


def share_places(lives: Sequence[tuple[int, int]]) -> list[int]:
    """Return the index of a place for each buffer. Buffers that share a place are never live at once, and the number of
    places is minimal.

    lives  pairs of the first step and the step after the last
    """
    found, ends = [0] * len(lives), list[int]()
    for i in sorted(range(len(lives)), key=lives.__getitem__):
        first, end = lives[i]
        found[i] = next((place for place, until in enumerate(ends) if until <= first), len(ends))
        ends[found[i] : found[i] + 1] = [end]
    return found


def plan_arena(lives: Sequence[Lifetime], alignment: int = ALIGNMENT) -> list[int]:
    """Return an offset in bytes for each buffer, a multiple of the alignment.

    The placement is the best of the greedy orders of `treadle.passes.memory`, without the exact search, since a call
    waits for the result. Usually the first order, largest first, reaches the lower bound, and no other order is tried.
    Raises OverflowError if the bytes of all buffers do not fit into 64 bits.
    """
    if sum(x.size + alignment for x in lives) >= 1 << 63:
        raise OverflowError("the bytes of all buffers do not fit into 64 bits")
    table = np.array([(x.first, x.end, -(-x.size // alignment) * alignment) for x in lives], np.int64).reshape(-1, 3)
    solid = table[:, 2] > 0
    first, end, size = table[solid].T
    offsets = np.zeros(len(lives), np.int64)
    if solid.any():
        offsets[solid] = place_greedily(first, end, size, int(live_bytes(first, end, size)[1].max()))
    return [int(n) for n in offsets]


def _most_alive(lives: Sequence[Lifetime], inner: Mapping[int, int], steps: int, alignment: int) -> int:
    """Return the largest number of bytes that are live at once, including callees."""
    change = [0] * (steps + 2)
    for life in lives:
        size = -(-life.size // alignment) * alignment
        change[life.first] += size
        change[life.end] -= size
    live = found = 0
    for at in range(steps + 1):
        live += change[at]
        found = max(found, live + inner.get(at, 0))
    return found
