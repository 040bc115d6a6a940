"""Check a placement independently of the code that computed it: this module shares no code with the greedy orders or
the search.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence

from treadle.ir.errors import PassError
from treadle.passes.memory.instances import Lifetime


def check_placement(
    buffers: Sequence[Lifetime], offsets: Sequence[int], *, capacity: int | None = None, alignment: int = 1
) -> int:
    """Return the bytes that a placement takes, in whole units of `alignment`.

    Raises PassError if two buffers that are live at the same time overlap, an offset is negative or not aligned, or a
    buffer ends beyond the capacity. A buffer of size zero takes no memory, and may have any offset.

    Steps are processed in order. Live buffers are kept sorted by offset, so a new buffer is compared only with its two
    neighbours: the other buffers are already known to be disjoint.
    """
    if len(offsets) != len(buffers):
        raise PassError(
            "a placement must have one offset for each buffer",
            received=f"{len(offsets)} offsets, {len(buffers)} buffers",
        )
    reached = 0
    for b, at in zip(buffers, offsets, strict=True):
        if at < 0 or at % alignment:
            raise PassError(f"an offset must be a multiple of {alignment}, and not negative", received=f"{b} at {at}")
        if capacity is not None and at + b.size > capacity:
            raise PassError(
                "a buffer ends beyond the capacity", received=f"{b} at {at} ends at {at + b.size} of {capacity}"
            )
        reached = max(reached, -(-(at + b.size) // alignment) * alignment)
    _check_disjoint(buffers, offsets)
    return reached


def _check_disjoint(buffers: Sequence[Lifetime], offsets: Sequence[int]) -> None:
    live: list[tuple[int, int]] = []  # (offset, index), sorted; disjoint
    ending: list[tuple[int, int]] = []  # (end, index), a heap
    for i in sorted((i for i, b in enumerate(buffers) if b.size), key=lambda i: buffers[i].first):
        b = buffers[i]
        while ending and ending[0][0] <= b.first:
            gone = heapq.heappop(ending)[1]
            del live[bisect_left(live, (offsets[gone], gone))]
        at = bisect_left(live, (offsets[i], i))
        for _, j in live[max(at - 1, 0) : at + 1]:
            if offsets[j] < offsets[i] + b.size and offsets[i] < offsets[j] + buffers[j].size:
                raise PassError(
                    "two buffers that live at the same time overlap",
                    received=f"{b} at {offsets[i]}, {buffers[j]} at {offsets[j]}",
                )
        live.insert(at, (offsets[i], i))
        heapq.heappush(ending, (b.end, i))
