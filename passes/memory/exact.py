"""The exact search, called from Python: its inputs, its restarts, and the capacities that it tries.

One depth-first search may get stuck after a bad first choice. So it is restarted, each time with another order of
buffers and another rule for sections. The limits of the runs follow the sequence of Luby, Sinclair & Zuckerman 1993:
eventually a run is long enough, and infeasible capacities are proven infeasible. Failed states are stored between runs.
"""

from __future__ import annotations

import importlib.util
import math
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from treadle.passes.memory.depth_first import PlacementSearch

Array = np.ndarray[Any, Any]

LARGEST = 4_000_000
"""Maximum number of pairs of a buffer and a section in which it is live. With more pairs, one node of the search is too
slow.
"""

RUN = 300
"""Number of nodes of the shortest run, plus two for each buffer: enough for a few detours on a good path."""

WORK_A_SECOND = 4e7
"""Minimum number of buffers examined in a second. With this estimate, no run lasts much longer than the time left."""

REMEMBERED = 1 << 19
"""Number of states in the table of failures, which take 16 bytes each."""


def available() -> bool:
    """Return True if numba, which compiles the search, is installed."""
    return importlib.util.find_spec("numba") is not None


@dataclass(frozen=True)
class Outcome:
    """The best known offsets, the size that they need, and a lower bound of every placement's size."""

    offsets: Array
    reached: int
    bound: int


def sections(first: Array, end: Array) -> tuple[Array, Array, int]:
    """Return the first section and the end of each buffer, in sections instead of steps, and the number of sections.

    A section is kept at each time at which some buffer begins and the next event is some buffer's end. Only there, the
    set of buffers that are live together is not part of a larger set. Two buffers are live together exactly if they
    share a section.
    """
    steps = np.unique(np.concatenate([first, end]))
    begins, ends = np.isin(steps, first), np.isin(steps, end)
    before = np.concatenate(([0], np.cumsum(begins[:-1] & ends[1:])))
    return before[np.searchsorted(steps, first)], before[np.searchsorted(steps, end)], int(before[-1])


def luby(n: int) -> int:
    """Return the n-th number, from 1, of 1 1 2 1 1 2 4 1 1 2 1 1 2 4 8 ..."""
    while (n + 1) & n:
        n -= (1 << (n.bit_length() - 1)) - 1
    return 1 << (n.bit_length() - 1)


@cache
def warm_up() -> None:
    """Compile the search, or load it from the cache of an earlier process."""
    one = np.array([0]), np.array([1]), 1
    _Runs(one, np.array([1])).decide(1, math.inf)


def improve(
    first: Array, end: Array, size: Array, known: Outcome, capacity: int | None, seconds: float
) -> Outcome | None:
    """Search for a placement below `capacity`, or, without a capacity, for the smallest placement. Return None if the
    instance is too large.

    For the smallest placement, the lower bound is tried first, then the capacity halfway to the best known size, and so
    on. A capacity that is proven too small raises the bound.
    """
    covered = sections(first, end)
    if int((covered[1] - covered[0]).sum()) > LARGEST:
        return None
    warm_up()
    deadline = time.perf_counter() + seconds
    runs = _Runs(covered, size)
    tried = known.bound
    while known.reached > known.bound and (capacity is None or known.bound <= capacity < known.reached):
        left = deadline - time.perf_counter()
        if left <= 0:
            break
        target = tried if capacity is None else capacity
        answer = runs.decide(target, deadline if capacity is not None else time.perf_counter() + max(left / 4, 0.05))
        if answer is None:
            known = Outcome(known.offsets, known.reached, target + 1)
            tried = max(tried, known.bound)
        elif len(answer):
            known = Outcome(answer, int((answer + size).max()), known.bound)
        else:
            tried = (target + known.reached) // 2
        if tried >= known.reached - 1 or tried == target:
            tried = known.bound
    return known


class _Runs:
    """Runs of the search over one instance: its state, the number of runs so far, the failed states."""

    def __init__(self, covered: tuple[Array, Array, int], size: Array) -> None:
        from treadle.passes.memory.depth_first import PlacementSearch

        first, end, count = covered
        buffers = len(size)
        members: list[list[int]] = [[] for _ in range(count)]
        rest, cross = np.zeros(count, np.int64), np.zeros(count + 1, np.int64)
        for b in range(buffers):
            rest[first[b] : end[b]] += size[b]
            cross[first[b] + 1 : end[b]] += 1
            for t in range(first[b], end[b]):
                members[t].append(b)
        lengths = np.array([len(x) for x in members], np.int64)
        _, twin = np.unique(np.stack([first, end, size], 1), axis=0, return_inverse=True)
        state = np.zeros(2 * count + buffers, np.int64)
        depth = 4 * (buffers + count) + 1000
        self.search: PlacementSearch = PlacementSearch(
            first=first.astype(np.int64),
            end=end.astype(np.int64),
            size=size.astype(np.int64),
            order=np.arange(buffers),
            twin=twin.reshape(-1).astype(np.int64),
            start=np.concatenate(([0], np.cumsum(lengths)[:-1])).astype(np.int64),
            items=np.array([b for x in members for b in x], np.int64),
            waiting=lengths,
            rest=rest,
            cross=cross,
            state=state,
            floor=state[:count],
            sky=state[count : 2 * count],
            low=state[2 * count :],
            trail=np.zeros(8 * (int(lengths.sum()) + 8 * (count + buffers)) + (1 << 20), np.int64),
            placed=np.zeros(buffers, np.int64),
            scratch=np.zeros(int(lengths.sum()) + 16 * (count + buffers) + (1 << 18), np.int64),
            stale=np.zeros(count, np.bool_),
            weight=np.ones(count),
            failed=np.zeros((REMEMBERED, 2), np.uint64),
            frames=np.zeros((depth, 9), np.int64),
            registers=np.zeros(9, np.int64),
        )
        self.random = np.random.default_rng(0)
        self.made = 0

    def decide(self, capacity: int, deadline: float) -> Array | None:
        """Return offsets below the capacity, an empty array if time is up, or None if there is no such placement."""
        from treadle.passes.memory import depth_first as compiled

        s = self.search
        while (left := deadline - time.perf_counter()) > 0:
            rule = (compiled.FEWEST, compiled.WEIGHTED, compiled.SLACK)[self.made % 3]
            self._reset(self.made // 3)
            self.made += 1
            s.registers[compiled.CAPACITY] = capacity
            s.registers[compiled.RULE] = rule
            s.registers[compiled.NODE_LIMIT] = (RUN + 2 * len(s.size)) * luby(self.made)
            s.registers[compiled.WORK_LIMIT] = int(min(left, 1e6) * WORK_A_SECOND)
            answer = compiled.search(s)
            if answer == compiled.FOUND:
                return s.low.copy()
            if answer == compiled.EXHAUSTED:
                return None
        return np.zeros(0, np.int64)

    def _reset(self, turn: int) -> None:
        """Remove all placed buffers, and order buffers by size, life, area or mixtures of these. Later turns add
        noise.
        """
        from treadle.passes.memory import depth_first as compiled

        s = self.search
        compiled.undo(s, 0, 0)
        s.stale[:] = False
        s.registers[:] = 0
        if turn % 8 == 0:
            s.weight[:] = 1
        life, size = np.log(s.end - s.first), np.log(s.size)
        share = (0.0, 1.0, 0.5, self.random.uniform())[turn % 4]
        key = 2 * ((1 - share) * size + share * life) if turn >= 4 else size * (share < 1) + life * (share > 0)
        if turn >= 4:
            key = key + self.random.normal(0, 0.3, len(key))
        s.order[np.argsort(-key, kind="stable")] = np.arange(len(key))
