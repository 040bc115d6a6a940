"""The depth-first search for a placement below a capacity, compiled by numba. Only exact.py imports it, when it runs.

Time is divided into sections: a section is a maximal set of buffers that are all live together (the maximal cliques of
the interval graph, in order of time). A buffer covers consecutive sections. The state is a skyline:

    sky[t]    the top of the placed buffers in section t
    low[b]    a proven lower bound of the offset of buffer b, which is not placed yet
    floor[t]  the least low[b] in section t: no unplaced buffer can be below it there
    rest[t]   bytes of unplaced buffers in section t; floor[t] + rest[t] must not exceed the capacity

The search may require that no buffer can drop into free space: a drop makes the sum of size * offset smaller, so some
placement with the least sum has no drops. So each buffer is at 0 or on the top of another buffer. The lowest unplaced
buffers are in sections with the lowest floor. A node of the search selects one such section t and branches on the
buffer that is at floor[t] there. Each candidate is one branch. The last branch is "none": it lifts the candidates to
the lowest top on which they may rest. The branches exclude one another, so no state is searched twice in another order.

The search prunes four kinds of states: a section no longer fits; a "none" leaves a gap into which a waiting buffer
could drop; the later of two equal buffers would be tried; or the state failed before, which a table records as two
hashes of 64 bits. Sections that no buffer connects any longer are solved separately: if one of the parts fails, the
whole fails.

Canonical placements, the floors of sections and the decomposition follow Moffitt, "MiniMalloc: A Lightweight Memory
Allocator for Hardware-Accelerated Machine Learning" (ASPLOS 2023). Weights of sections that fail follow Boussemart et
al., "Boosting systematic search by weighting constraints" (ECAI 2004).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np

Array = np.ndarray[Any, Any]
F = TypeVar("F", bound=Callable[..., Any])

FOUND, EXHAUSTED, STOPPED = 1, 0, -1
"""Results of `search`: all buffers are placed; no placement exists; a limit was reached."""

CAPACITY, TRAIL, PLACED, SCRATCH, NODES, NODE_LIMIT, WORK, WORK_LIMIT, RULE = range(9)
"""Indices in `PlacementSearch.registers`: the capacity, heights of three stacks, counts of work done, and their
limits.
"""

FEWEST, WEIGHTED, SLACK = range(3)
"""Rules for the section to branch on: fewest branches; fewest branches divided by the section's weight; fewest branches
plus slack, divided by the weight.
"""

FAR = 1 << 61
FAILURE = 0.3
"""The number that a failure adds to the weight of its section."""


class PlacementSearch(NamedTuple):
    """The problem, the state and the stacks. Arrays by buffer: first, end (sections), size, order, twin, low.

    order     buffers of smaller order are tried first
    twin      equal for buffers with the same life and size
    start, items, waiting   items[start[t] : start[t] + waiting[t]] wait in section t; placed buffers follow them
    cross     number of waiting buffers that are live both before and after the boundary at the left of section t
    state     floor, sky and low, one after the other; these three are views of `state`
    trail     pairs of an index in `state` and its previous number
    placed    the buffers in the order in which they were placed
    stale     sections whose floor must be recomputed
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
    """Return to the state in which the trail and the list of placed buffers had these lengths."""
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
    """Compute the floors of stale sections. Return False if the unplaced buffers do not fit above one of them."""
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
    """Place b at low[b]. Return False if the unplaced buffers then do not fit."""
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
    """Raise low[b], a refuted offset, to the lowest top on which b may rest. Return False if no offset is left."""
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
    """Return True if b, at low[b], rests on a placed buffer or the bottom. Section `near` of b is examined first."""
    low = s.low[b]
    if low == 0 or s.sky[near] == low:
        return True
    for t in range(s.first[b], s.end[b]):  # noqa: SIM110 - numba compiles no generator here
        if s.sky[t] == low:
            return True
    return False


@compiled
def _has_room(s: PlacementSearch, depth: int) -> bool:
    """Return True if the stacks have room for one more node, or one more pass over a part, in the worst case."""
    sections, buffers = len(s.floor), len(s.low)
    return (
        depth + 2 < len(s.frames)
        and s.registers[TRAIL] + 2 * (4 * sections + 2 * buffers) < len(s.trail)
        and s.registers[SCRATCH] + 3 * sections + buffers < len(s.scratch)
    )


NOTHING_FITS, NO_ROOM = -1, -2


@compiled
def _settle(s: PlacementSearch, begin: int, end: int) -> int:
    """Lift all buffers of the lowest floor that rest on nothing. Return the lowest floor, or NOTHING_FITS, or
    NO_ROOM.
    """
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
    """Return the section to branch on, among the sections with the lowest floor."""
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
    """Write the buffers that may be at the floor of section t to the scratch, in order. Return their number. Of several
    equal buffers (twins), one is written.
    """
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
    """Take the branch with no buffer at the floor of section t: lift the candidates. Return False if that is
    impossible.
    """
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
    """Write to the scratch the parts that no buffer connects, the parts with the least slack first. Return their
    number.

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
    """Return a bijection of 64 bits that spreads each bit over all of them (the finalizer of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def _hashes(s: PlacementSearch, begin: int, end: int) -> tuple[Any, Any]:
    """Return two hashes of the state that decides if a part has a placement: waiting buffers, their low, the sky, the
    capacity.
    """
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


# A frame of the search. A node branches on SECTION of the part from BEGIN to END, and is at branch AT of COUNT + 1. A
# frame of parts has -1 for a section, and is at part AT. BASE is the start of the branches or parts in the scratch. The
# trail had the length ENTERED before the node was examined, ASKED before its branches; HELD buffers were placed.
SECTION, BEGIN, END, BASE, COUNT, AT, ENTERED, ASKED, HELD = range(9)


@compiled
def search(s: PlacementSearch) -> int:
    """Place all buffers below the capacity. Return FOUND, with offsets in low; EXHAUSTED; or STOPPED at a limit.

    The stack of frames is explicit, because placements of thousands of buffers are deeper than the call stack.
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
        # The top frame receives the result of its part or branch AT; at branch -1 there is none yet.
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
