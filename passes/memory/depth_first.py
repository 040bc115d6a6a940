"""The depth-first search for a placement below a capacity, compiled by numba. Imported by exact.py alone, when it runs.

Time is cut into sections: a section is a largest set of buffers that all live together (the maximal cliques of the
interval graph, in order of time). A buffer covers consecutive sections. The state is a skyline:

    sky[t]    the top of what is placed in section t
    low[b]    a proven lower bound of the offset of buffer b, which is not placed yet
    floor[t]  the least low[b] in section t: no buffer that is left can lie below it there
    rest[t]   bytes that are left to place in section t; floor[t] + rest[t] must not pass the capacity

Each buffer may be required to be where no drop into free space is possible: a drop makes the sum of size * offset
smaller, so some placement of the least sum is one. So a buffer lies at 0 or on the top of another one. The lowest
buffers that are left lie in sections of the lowest floor. A node of the search takes one such section t and asks: which
buffer lies at floor[t] there? Each candidate is one branch; the last one is "none", which lifts the candidates onto the
lowest top that may come to lie under them. The branches exclude one another, so nothing is searched twice in another
order.

Cut off are: a section that no longer fits; a "none" that leaves a gap into which a buffer that waits could be dropped;
the later one of two equal buffers; and states that failed before, which a table remembers by two hashes of 64 bits.
Sections that no buffer connects any longer are solved apart: when one of the parts fails, all of it does.

Canonical placements, the floors of sections and the decomposition follow Moffitt, "MiniMalloc: A Lightweight Memory
Allocator for Hardware-Accelerated Machine Learning" (ASPLOS 2023); weights of sections that fail are those of
Boussemart et al., "Boosting systematic search by weighting constraints" (ECAI 2004).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np

Array = np.ndarray[Any, Any]
F = TypeVar("F", bound=Callable[..., Any])

FOUND, EXHAUSTED, STOPPED = 1, 0, -1
"""What `search` answers: all are placed; no placement exists; a limit was reached."""

CAPACITY, TRAIL, PLACED, SCRATCH, NODES, NODE_LIMIT, WORK, WORK_LIMIT, RULE = range(9)
"""Places in `PlacementSearch.registers`: the capacity, three heights of stacks, what was done and how much may be."""

FEWEST, WEIGHTED, SLACK = range(3)
"""Which section is asked first: fewest branches; fewest over the section's weight; fewest plus slack over weight."""

FAR = 1 << 61
FAILURE = 0.3
"""What a failure adds to the weight of its section."""


class PlacementSearch(NamedTuple):
    """The problem, the state and the stacks. Arrays by buffer: first, end (sections), size, order, twin, low.

    order     buffers of smaller order are tried first
    twin      equal for buffers of one life and one size
    start, items, waiting   items[start[t] : start[t] + waiting[t]] wait in section t; behind them are the placed ones
    cross     how many buffers that wait live both before and after the boundary at the left of section t
    state     floor, sky and low, one behind the other; these three are views of it
    trail     pairs of a place in `state` and the number that it had
    placed    the buffers in the order in which they were placed
    stale     sections whose floor must be computed again
    """

    first: Array
    end: Array
    size: Array
    order: Array
    twin: Array
    start: Array
    items: Array
    waiting: Array
    rest: Array
    cross: Array
    state: Array
    floor: Array
    sky: Array
    low: Array
    trail: Array
    placed: Array
    scratch: Array
    stale: Array
    weight: Array
    failed: Array
    frames: Array
    registers: Array


def compiled(function: F) -> F:
    return cast(F, numba.njit(cache=True)(function))


@compiled
def _write(s: PlacementSearch, place: int, value: int) -> None:
    top = s.registers[TRAIL]
    s.trail[top] = place
    s.trail[top + 1] = s.state[place]
    s.registers[TRAIL] = top + 2
    s.state[place] = value


@compiled
def undo(s: PlacementSearch, trail: int, placed: int) -> None:
    """Go back to where the trail and the list of placed buffers had these lengths."""
    top = s.registers[TRAIL]
    while top > trail:
        top -= 2
        s.state[s.trail[top]] = s.trail[top + 1]
    s.registers[TRAIL] = top
    while s.registers[PLACED] > placed:
        s.registers[PLACED] -= 1
        b = s.placed[s.registers[PLACED]]
        s.cross[s.first[b] + 1 : s.end[b]] += 1
        for t in range(s.first[b], s.end[b]):
            s.rest[t] += s.size[b]
            s.waiting[t] += 1


@compiled
def _refresh(s: PlacementSearch, begin: int, end: int) -> bool:
    """Compute the floors of stale sections; False where what is left does not fit above one."""
    fits = True
    for t in range(begin, end):
        if not s.stale[t]:
            continue
        s.stale[t] = False
        if not fits or s.waiting[t] == 0:
            continue
        lowest = FAR
        for k in range(s.start[t], s.start[t] + s.waiting[t]):
            lowest = min(lowest, s.low[s.items[k]])
        if lowest > s.floor[t]:
            _write(s, t, lowest)
        if lowest + s.rest[t] > s.registers[CAPACITY]:
            s.weight[t] += FAILURE
            fits = False
    return fits


@compiled
def _raise(s: PlacementSearch, b: int, low: int) -> None:
    _write(s, 2 * len(s.floor) + b, low)
    s.stale[s.first[b] : s.end[b]] = True


@compiled
def _place(s: PlacementSearch, b: int) -> bool:
    """Put b at low[b]; False where what is left does not fit then."""
    top = s.low[b] + s.size[b]
    begin, end = s.first[b], s.end[b]
    s.placed[s.registers[PLACED]] = b
    s.registers[PLACED] += 1
    s.cross[s.first[b] + 1 : s.end[b]] -= 1
    for t in range(s.first[b], s.end[b]):
        _write(s, t, top)
        _write(s, len(s.floor) + t, top)
        s.stale[t] = True
        s.rest[t] -= s.size[b]
        s.waiting[t] -= 1
        last = s.start[t] + s.waiting[t]
        for k in range(s.start[t], last):
            if s.items[k] == b:
                s.items[k] = s.items[last]
                s.items[last] = b
                break
    for t in range(s.first[b], s.end[b]):
        for k in range(s.start[t], s.start[t] + s.waiting[t]):
            other = s.items[k]
            if s.low[other] < top:
                _raise(s, other, top)
                begin, end = min(begin, s.first[other]), max(end, s.end[other])
    return _refresh(s, begin, end)


@compiled
def _lift(s: PlacementSearch, b: int) -> bool:
    """Raise low[b], where b cannot lie, to the lowest top that may come under it; False where it then lies nowhere."""
    sky, others, tops = 0, FAR, FAR
    for t in range(s.first[b], s.end[b]):
        sky = max(sky, s.sky[t])
        for k in range(s.start[t], s.start[t] + s.waiting[t]):
            other = s.items[k]
            if other != b:
                others = min(others, s.low[other])
                tops = min(tops, s.low[other] + s.size[other])
    if tops + s.size[b] > s.registers[CAPACITY] or others >= sky + s.size[b]:
        return False  # in the second case, b could be dropped to `sky`
    _raise(s, b, max(tops, s.low[b] + 1))
    return True


@compiled
def _rests(s: PlacementSearch, b: int, near: int) -> bool:
    """Whether b, at low[b], would lie on what is placed. Section `near` of b is looked at first."""
    low = s.low[b]
    if low == 0 or s.sky[near] == low:
        return True
    for t in range(s.first[b], s.end[b]):  # noqa: SIM110 - numba compiles no generator here
        if s.sky[t] == low:
            return True
    return False


@compiled
def _has_room(s: PlacementSearch, depth: int) -> bool:
    """Whether the stacks hold one more node, or one more pass over a part, whatever it does."""
    sections, buffers = len(s.floor), len(s.low)
    return (
        depth + 2 < len(s.frames)
        and s.registers[TRAIL] + 2 * (4 * sections + 2 * buffers) < len(s.trail)
        and s.registers[SCRATCH] + 3 * sections + buffers < len(s.scratch)
    )


NOTHING_FITS, NO_ROOM = -1, -2


@compiled
def _settle(s: PlacementSearch, begin: int, end: int) -> int:
    """Lift all buffers of the lowest floor that would lie on nothing; that floor, or NOTHING_FITS, or NO_ROOM."""
    while True:
        if not _has_room(s, 0):
            return NO_ROOM
        lowest = FAR
        for t in range(begin, end):
            if s.waiting[t] > 0:
                lowest = min(lowest, s.floor[t])
        lifted = False
        s.registers[WORK] += 2 * (end - begin)
        for t in range(begin, end):
            if s.floor[t] != lowest:
                continue
            s.registers[WORK] += s.waiting[t]
            for k in range(s.start[t], s.start[t] + s.waiting[t]):
                b = s.items[k]
                if s.low[b] == lowest and not _rests(s, b, t):
                    lifted = True
                    if not _lift(s, b):
                        s.weight[t] += FAILURE
                        s.stale[begin:end] = False
                        return NOTHING_FITS
        if not lifted:
            return lowest
        if not _refresh(s, begin, end):
            return NOTHING_FITS


@compiled
def _choose(s: PlacementSearch, begin: int, end: int, lowest: int) -> int:
    """The section to ask, of those of the lowest floor."""
    chosen, least = NOTHING_FITS, np.inf
    for t in range(begin, end):
        if s.waiting[t] == 0 or s.floor[t] != lowest:
            continue
        branches = 0
        for k in range(s.start[t], s.start[t] + s.waiting[t]):
            if s.low[s.items[k]] == lowest:
                branches += 1
        slack = s.registers[CAPACITY] - lowest - s.rest[t]
        if slack > 0:
            branches += 1
        elif branches == 1:
            return t
        score = float(branches)
        if s.registers[RULE] == SLACK:
            score += 100.0 * slack / s.registers[CAPACITY]
        if s.registers[RULE] != FEWEST:
            score /= s.weight[t]
        if score < least:
            chosen, least = t, score
    return chosen


@compiled
def _candidates(s: PlacementSearch, t: int) -> int:
    """Write the buffers that may lie at the floor of section t to the scratch, in order; how many. Of twins, one."""
    base = s.registers[SCRATCH]
    written = 0
    for k in range(s.start[t], s.start[t] + s.waiting[t]):
        b = s.items[k]
        if s.low[b] != s.floor[t]:
            continue
        first_twin = True
        for j in range(s.start[t], s.start[t] + s.waiting[t]):
            other = s.items[j]
            if s.twin[other] == s.twin[b] and other < b and s.low[other] == s.low[b]:
                first_twin = False
        if first_twin:
            at = base + written
            while at > base and s.order[s.scratch[at - 1]] > s.order[b]:
                s.scratch[at] = s.scratch[at - 1]
                at -= 1
            s.scratch[at] = b
            written += 1
    return written


@compiled
def _leave_empty(s: PlacementSearch, t: int, begin: int, end: int) -> bool:
    """No buffer lies at the floor of section t: lift those that might; False where this cannot be."""
    floor = s.floor[t]
    if floor + s.rest[t] >= s.registers[CAPACITY]:
        return False
    for k in range(s.start[t], s.start[t] + s.waiting[t]):
        b = s.items[k]
        if s.low[b] == floor and not _lift(s, b):
            s.weight[t] += FAILURE
            s.stale[begin:end] = False
            return False
    return _refresh(s, begin, end)


@compiled
def _parts(s: PlacementSearch, begin: int, end: int) -> int:
    """Write the parts that no buffer connects to the scratch, those of least slack first; how many.

    A part is three numbers: its first section, its end, its slack.
    """
    base = s.registers[SCRATCH]
    written = 0
    t = begin
    while t < end:
        if s.waiting[t] == 0:
            t += 1
            continue
        stop = t + 1
        while stop < end and s.cross[stop] > 0:
            stop += 1
        slack = FAR
        for q in range(t, stop):
            slack = min(slack, s.registers[CAPACITY] - s.floor[q] - s.rest[q])
        at = base + 3 * written
        while at > base and s.scratch[at - 1] > slack:
            s.scratch[at : at + 3] = s.scratch[at - 3 : at]
            at -= 3
        s.scratch[at], s.scratch[at + 1], s.scratch[at + 2] = t, stop, slack
        written += 1
        t = stop
    return written


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@compiled
def _mix(x: Any) -> Any:
    """A bijection of 64 bits that spreads each bit over all of them (the finalizer of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def _hashes(s: PlacementSearch, begin: int, end: int) -> tuple[Any, Any]:
    """Two hashes of all that decides whether a part has a placement: what waits, its low, the sky, the capacity."""
    one = _mix(np.uint64(begin) * GOLDEN + np.uint64(end))
    two = np.uint64(s.registers[CAPACITY])
    for t in range(begin, end):
        if s.waiting[t] == 0:
            continue
        s.registers[WORK] += s.waiting[t]
        h = _mix(np.uint64(2 * t) * GOLDEN + np.uint64(s.sky[t]))
        one += h
        two += _mix(h + GOLDEN)
        for k in range(s.start[t], s.start[t] + s.waiting[t]):
            b = s.items[k]
            if s.first[b] == t:
                h = _mix(np.uint64(2 * b + 1) * GOLDEN + np.uint64(s.low[b]))
                one += h
                two += _mix(h + GOLDEN)
    return _mix(one), _mix(two)


# A frame of the search. A node asks SECTION of the part from BEGIN to END, and is at branch AT of COUNT + 1. A frame of
# parts has -1 for a section, and is at part AT. BASE is where the scratch holds the branches or parts. The trail had
# the length ENTERED before the node was looked at, ASKED before its branches; HELD buffers were placed.
SECTION, BEGIN, END, BASE, COUNT, AT, ENTERED, ASKED, HELD = range(9)


@compiled
def search(s: PlacementSearch) -> int:
    """Place all buffers below the capacity: FOUND, with offsets in low; EXHAUSTED; or STOPPED at a limit.

    The stack of frames is explicit: placements of thousands of buffers are deeper than a machine's stack is.
    """
    frames = s.frames
    hashes = np.zeros((len(frames), 2), np.uint64)
    depth = -1
    begin, end = 0, len(s.floor)
    entering = True
    answer = EXHAUSTED
    while True:
        if entering:
            entering = False
            if not _has_room(s, depth):
                return STOPPED
            base = s.registers[SCRATCH]
            parts = _parts(s, begin, end)
            if parts == 0:
                answer = FOUND
            elif parts > 1:
                depth += 1
                frames[depth, SECTION], frames[depth, BASE], frames[depth, COUNT] = -1, base, parts
                frames[depth, AT], frames[depth, ENTERED] = 0, s.registers[TRAIL]
                frames[depth, HELD] = s.registers[PLACED]
                s.registers[SCRATCH] = base + 3 * parts
                begin, end = s.scratch[base], s.scratch[base + 1]
                entering = True
                continue
            else:
                s.registers[NODES] += 1
                if s.registers[NODES] > s.registers[NODE_LIMIT] or s.registers[WORK] > s.registers[WORK_LIMIT]:
                    return STOPPED
                begin, end = s.scratch[base], s.scratch[base + 1]
                entered = s.registers[TRAIL]
                lowest = _settle(s, begin, end)
                if lowest == NO_ROOM:
                    return STOPPED
                answer = EXHAUSTED
                if lowest >= 0:
                    one, two = _hashes(s, begin, end)
                    slot = one % np.uint64(len(s.failed))
                    if s.failed[slot, 0] != one or s.failed[slot, 1] != two:
                        depth += 1
                        hashes[depth, 0], hashes[depth, 1] = one, two
                        section = _choose(s, begin, end, lowest)
                        count = _candidates(s, section)
                        frames[depth, SECTION], frames[depth, BEGIN], frames[depth, END] = section, begin, end
                        frames[depth, BASE], frames[depth, COUNT], frames[depth, AT] = base, count, -1
                        frames[depth, ENTERED], frames[depth, ASKED] = entered, s.registers[TRAIL]
                        frames[depth, HELD] = s.registers[PLACED]
                        s.registers[SCRATCH] = base + count
        if depth < 0:
            return answer
        # The frame on top hears an answer: of its part or branch AT, or, at branch -1, none yet.
        frame = frames[depth]
        if frame[SECTION] < 0:
            if answer == FOUND:
                frame[AT] += 1
                if frame[AT] < frame[COUNT]:
                    at = frame[BASE] + 3 * frame[AT]
                    begin, end = s.scratch[at], s.scratch[at + 1]
                    entering = True
                    continue
            else:
                undo(s, frame[ENTERED], frame[HELD])
        else:
            if answer == EXHAUSTED:
                begin, end = frame[BEGIN], frame[END]
                while not entering and frame[AT] < frame[COUNT]:
                    undo(s, frame[ASKED], frame[HELD])
                    frame[AT] += 1
                    if frame[AT] < frame[COUNT]:
                        entering = _place(s, s.scratch[frame[BASE] + frame[AT]])
                    else:
                        entering = _leave_empty(s, frame[SECTION], begin, end)
                if entering:
                    continue
                slot = hashes[depth, 0] % np.uint64(len(s.failed))
                s.failed[slot, 0], s.failed[slot, 1] = hashes[depth, 0], hashes[depth, 1]
                undo(s, frame[ENTERED], frame[HELD])
        s.registers[SCRATCH] = frame[BASE]
        depth -= 1
