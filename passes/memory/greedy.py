"""Greedy placement: buffers are placed in some order, each at the lowest offset that is free for its whole life.

Largest first is the order of Pisarchyk & Lee 2020, "Efficient memory management for deep neural net inference". No
single order is best, so a buffer's weight here is

    size * (most bytes that are live together with it) ** a * (steps of its life) ** b

for several a and b: a large `a` prefers buffers that are live at the peak, a large `b` prefers long lives.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

WEIGHTS = ((0.0, 0.0), (0.0, 0.25), (0.0, 0.5), (8.0, 0.0), (2.0, 0.0), (0.0, 1.0), (8.0, 0.5), (0.0, 8.0))
"""Pairs of a and b. The first pair is largest first; the last is nearly longest first."""


def live_bytes(first: Array, end: Array, size: Array) -> tuple[Array, Array]:
    """Return the steps at which buffers begin or end, and the number of bytes that are live from each step to the
    next.
    """
    steps = np.sort(np.concatenate([first, end]))
    kept = np.ones(len(steps), bool)
    kept[1:] = steps[1:] != steps[:-1]
    steps = steps[kept]  # like np.unique, which imports many modules on first use
    change = np.zeros(len(steps), np.int64)
    np.add.at(change, np.searchsorted(steps, first), size)
    np.add.at(change, np.searchsorted(steps, end), -size)
    return steps, np.cumsum(change)


def first_fit(first: Array, end: Array, size: Array, order: Array) -> Array:
    """Return the offsets of buffers that are placed in `order`, each at the lowest free offset.

    Placed buffers are kept sorted by offset. Only buffers that overlap the new buffer in time are considered. The space
    between such a buffer and the highest end below it is free. The new buffer is placed in the first gap that is high
    enough.
    """
    count = len(size)
    offsets = np.zeros(count, np.int64)
    placed = np.zeros((4, count), np.int64)  # rows: first step, end, offset, offset + size; sorted by offset
    for n, i in enumerate(order):
        row_first, row_end, row_offset, row_top = placed[:, :n]
        meets = np.flatnonzero((row_first < end[i]) & (row_end > first[i]))
        at = 0
        if len(meets):
            below = np.maximum.accumulate(row_top[meets])
            gaps = np.flatnonzero(np.concatenate(([0], below[:-1])) + size[i] <= row_offset[meets])
            if not len(gaps):
                at = below[-1]
            elif gaps[0]:
                at = below[gaps[0] - 1]
        offsets[i] = at
        where = np.searchsorted(row_offset, at, side="right")
        placed[:, where + 1 : n + 1] = placed[:, where:n].copy()
        placed[:, where] = (first[i], end[i], at, at + size[i])
    return offsets


def place_greedily(first: Array, end: Array, size: Array, bound: int) -> Array:
    """Return the offsets of the best order. Stop at the first order that reaches `bound`."""
    if not len(size):
        return np.zeros(0, np.int64)
    steps, live = live_bytes(first, end, size)
    together = np.array(
        [live[a:z].max() for a, z in zip(np.searchsorted(steps, first), np.searchsorted(steps, end), strict=True)]
    )
    life = end - first
    best, reached = np.zeros(0, np.int64), None
    for a, b in WEIGHTS:
        weight = np.log(size) + a * np.log(together) + b * np.log(life)
        offsets = first_fit(
            first, end, size, np.lexsort((-life, -weight)) if a or b else np.argsort(-size, kind="stable")
        )
        if reached is None or (offsets + size).max() < reached:
            best, reached = offsets, int((offsets + size).max())
        if reached <= bound:
            break
    return best
