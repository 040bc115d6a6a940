"""The order of steps in which the fewest bytes are live at once.

    problem = OrderProblem(before=((), (0,), (0,), (1, 2)), buffers=(Buffer(64, (0, 1, 2)), ...), ...)
    found = find_order(problem)
    found.order, found.peak, found.bound

A buffer is live from the first of its steps in the order to the last. The live bytes depend on the set of steps that
are done, not on the order in which they were done. So the search visits sets of steps, sets with the smallest peak
first, and the first complete set has the smallest possible peak. If a step frees at least the bytes that it takes, and
stays below the peak so far, it is done at once: an order that does the step later is not better. After a limit on the
number of sets, a beam search continues, and the result has the bound that was proven by then.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import compress
from operator import or_
from typing import NamedTuple

MOST_SETS = 2_000
"""Maximum number of sets of steps that the exact search visits: about 0.1 s."""
MOST_LOOKS = 100_000
"""Maximum number of steps that the search examines in these sets. A beam search that would examine twice this number is
not started. Steps with many successors, such as updates of hundreds of weights, would take most of the compile time.
"""
_BEAM = 32
_BEAM_WORK = 4_000
"""Maximum of the number of steps times the number of sets in the beam search: the beam is narrower for longer
functions.
"""


@dataclass(frozen=True)
class Buffer:
    """Bytes that are live from the first of `steps` to the last; with `kept`, to the end."""

    size: int
    steps: tuple[int, ...]
    kept: bool = False


@dataclass(frozen=True)
class OrderProblem:
    """The input of the search for an order of steps with the lowest peak memory. Steps are indices in program order.

    before   for each step, the steps that must come before it
    buffers  buffers, each live from the step that computes it to the last step that reads it
    extra    additional bytes of each step while it runs: the memory of a callee. Negative if a callee computes a value
             that already counts as a buffer
    over     for each step: pairs of an output buffer and an operand buffer. The output may overwrite the operand if the
             step is the last use of the operand
    """

    before: tuple[tuple[int, ...], ...]
    buffers: tuple[Buffer, ...]
    extra: tuple[int, ...]
    over: tuple[tuple[tuple[int, int], ...], ...]

    def peak(self, order: Sequence[int]) -> int:
        """Return the most bytes that are live at once in an order."""
        return _Sets(self).peak(order)


@dataclass(frozen=True)
class Order:
    """An order of a problem's steps.

    peak   the peak of the order in bytes
    bound  a lower bound of the peak of every order
    """

    order: tuple[int, ...]
    peak: int
    bound: int

    @property
    def proven(self) -> bool:
        """True if no order is better."""
        return self.peak == self.bound


def find_order(problem: OrderProblem, most_sets: int = MOST_SETS) -> Order:
    """Return the best order that was found. It is never worse than program order."""
    program, search = tuple(range(len(problem.before))), _Sets(problem)
    peak, bound = search.peak(program), lower_bound(problem)
    if peak == bound:
        return Order(program, peak, bound)
    exact, bound = search.exact(bound, peak, most_sets)
    if exact is not None or bound == peak:
        return Order(program if exact is None else exact, bound, bound)
    width = max(1, min(_BEAM, _BEAM_WORK // len(program)))
    if search.looks * len(program) * width > 2 * MOST_LOOKS * search.sets:
        return Order(program, peak, bound)
    found = search.beam(bound, width)
    reached = search.peak(found)
    return Order(found, reached, bound) if reached < peak else Order(program, peak, bound)


def lower_bound(problem: OrderProblem) -> int:
    """Return a lower bound of the peak of every order.

    At each step, the buffers that it touches are live, and so are buffers touched both by a step that must come before
    it and by a step that must come after it.
    """
    sizes, kept = [b.size for b in problem.buffers], tuple([b.kept for b in problem.buffers])
    always = _always_live(problem.before, tuple([b.steps for b in problem.buffers]), kept, problem.over)
    found = sum(compress(sizes, kept))
    for extra, (living, dying) in zip(problem.extra, always, strict=True):
        live = sum([sizes[i] for i in living]) - max([sizes[i] for i in dying], default=0)
        found = max(found, extra + live)
    return found


@lru_cache(maxsize=64)  # the same function is searched at several sizes
def _always_live(
    before: tuple[tuple[int, ...], ...],
    touched: tuple[tuple[int, ...], ...],
    kept: tuple[bool, ...],
    over: tuple[tuple[tuple[int, int], ...], ...],
) -> list[tuple[list[int], list[int]]]:
    """Return, for each step, the buffers that are live at it in every order, and the buffers that it may write in
    place of another buffer.
    """
    order = list(_sorted(before))
    behind = [0] * len(before)  # the steps that must come after each, as bits
    touching, ahead, after = [0] * len(before), [0] * len(before), [0] * len(before)  # buffers, as bits
    for buffer, steps in enumerate(touched):
        for step in steps:
            touching[step] |= 1 << buffer
    for step in order:
        for other in before[step]:
            ahead[step] |= ahead[other] | touching[other]
    for step in reversed(order):
        for other in before[step]:
            behind[other] |= behind[step] | 1 << step
            after[other] |= after[step] | touching[step]
    always = sum(1 << buffer for buffer, keeps in enumerate(kept) if keeps)
    masks = [sum(1 << step for step in set(steps)) for steps in touched]
    found = []
    for step, pairs in enumerate(over):
        living = list(_bits(touching[step] | ahead[step] & (always | after[step])))
        found.append((living, [made for made, dying in pairs if not (kept[dying] or masks[dying] & behind[step])]))
    return found


def _bits(number: int) -> Iterator[int]:
    """Yield the indices of the set bits, from the lowest."""
    while number:
        bit = number & -number
        yield bit.bit_length() - 1
        number ^= bit


def _sorted(edges: Sequence[Sequence[int]]) -> Iterator[int]:
    """Yield the steps in topological order."""
    waiting = [len(set(before)) for before in edges]
    after: list[list[int]] = [[] for _ in waiting]
    for step, before in enumerate(edges):
        for other in set(before):
            after[other].append(step)
    ready = [step for step, count in enumerate(waiting) if not count]
    while ready:
        step = ready.pop()
        yield step
        for other in after[step]:
            waiting[other] -= 1
            if not waiting[other]:
                ready.append(other)


class _DoneSteps(NamedTuple):
    """A set of completed steps, as bits, with the live bytes, the steps that could come next before the last step was
    done, the peak so far, and the previous set.
    """

    done: int
    live: int
    others: int
    peak: int
    earlier: _DoneSteps | None
    step: int

    def order(self) -> tuple[int, ...]:
        found: list[int] = []
        at: _DoneSteps = self
        while at.earlier is not None:
            found.append(at.step)
            at = at.earlier
        return tuple(reversed(found))


_NEVER = -1
"""The steps that free a buffer that is kept: all of them, and more."""


class _Sets:
    """Sets of completed steps, as bits of an integer.

    near         for each step, the steps that touch a buffer that it touches, as bits
    changes      for each step, results of `_change`, by the steps among `near` that are done
    sets, looks  the number of sets that the exact search expanded, and the number of steps that were examined
    """

    def __init__(self, problem: OrderProblem) -> None:
        count = len(problem.before)
        self.whole = (1 << count) - 1
        self.before = [sum(1 << s for s in set(before)) for before in problem.before]
        self.after: list[list[int]] = [[] for _ in range(count)]
        for step, before in enumerate(problem.before):
            for other in set(before):
                self.after[other].append(step)
        masks = [sum(1 << step for step in set(b.steps)) for b in problem.buffers]
        # for each step: the steps of a buffer that it touches, the steps that free the buffer, and its size
        self.touched: list[list[tuple[int, int, int]]] = [[] for _ in range(count)]
        for buffer, mask in zip(problem.buffers, masks, strict=True):
            for step in set(buffer.steps):
                self.touched[step].append((mask, _NEVER if buffer.kept else mask, buffer.size))
        self.over = [
            [(masks[x], problem.buffers[y].size) for y, x in pairs if not problem.buffers[x].kept]
            for pairs in problem.over
        ]
        self.extra = problem.extra
        self.near = [
            reduce(or_, [mask for mask, *_ in (*touched, *over)], 0)
            for touched, over in zip(self.touched, self.over, strict=True)
        ]
        self.changes: list[dict[int, tuple[int, int]]] = [{} for _ in range(count)]
        self.sets = self.looks = 0

    def peak(self, order: Sequence[int]) -> int:
        """Return the most bytes that are live at once in an order."""
        done = live = peak = 0
        for step in order:
            during, live = self.run(done, live, step)
            done |= 1 << step
            peak = max(peak, during)
        return max(peak, live)

    def run(self, done: int, live: int, step: int) -> tuple[int, int]:
        """Return the bytes that are live while a step runs, and after the step."""
        during, after = self.changes[step].get(done & self.near[step]) or self._change(done, step)
        return live + during, live + after

    def _change(self, past: int, step: int) -> tuple[int, int]:
        """Return by how many bytes more are live while a step runs, and after the step.

        This depends on the steps that touch the same buffers alone, so few results serve many sets.
        """
        later = ~(past | 1 << step)
        during = after = 0
        for mask, free, size in self.touched[step]:
            if not mask & past:
                during += size
                after += size
            if not free & later:
                after -= size
        saved = next((size for mask, size in self.over[step] if not mask & later), 0)
        change = self.changes[step][past & self.near[step]] = during - saved + self.extra[step], after
        return change

    def start(self, bound: int) -> _DoneSteps:
        ready = sum(1 << step for step, before in enumerate(self.before) if not before)
        return _DoneSteps(0, 0, ready, bound, None, -1)

    def _ready(self, at: _DoneSteps) -> int:
        """Return the steps that may come next, as bits. Sets do not store them, since most are never continued."""
        ready, missing = at.others, ~at.done
        for other in self.after[at.step] if at.earlier is not None else ():
            if not self.before[other] & missing:
                ready |= 1 << other
        return ready

    def _next(self, at: _DoneSteps) -> list[_DoneSteps]:
        """Return the possible next sets. Return only one if a step should be done at once."""
        found = []
        done, live, top, changes, near = at.done, at.live, at.peak, self.changes, self.near
        room = top - live
        ready = left = self._ready(at)
        while left:
            bit = left & -left
            left ^= bit
            step = bit.bit_length() - 1
            during, after = changes[step].get(done & near[step]) or self._change(done, step)
            self.looks += 1
            if during <= room and after <= 0:
                return [_DoneSteps(done | bit, live + after, ready ^ bit, top, at, step)]
            peak = max(top, live + during, live + after)
            found.append(_DoneSteps(done | bit, live + after, ready ^ bit, peak, at, step))
        return found

    def exact(self, bound: int, known: int, most: int) -> tuple[tuple[int, ...] | None, int]:
        """Return an order with the smallest peak, if that is below the peak `known`, and the peak.

        Otherwise return None and a lower bound. The bound is `known` if no order is below it, and less if there are too
        many sets.
        """
        tie = self.sets = self.looks = 0
        waiting = [(bound, 0, tie, self.start(bound))]
        best: dict[int, int] = {}
        while waiting:
            peak, _, _, at = heapq.heappop(waiting)
            if best.get(at.done, peak) < peak:
                continue
            if at.done == self.whole:
                return at.order(), peak
            self.sets += 1
            if self.sets > most or self.looks > MOST_LOOKS:
                return None, peak
            for made in self._next(at):
                if made.peak < min(known, best.get(made.done, known)):
                    best[made.done] = made.peak
                    tie += 1
                    heapq.heappush(waiting, (made.peak, -made.done.bit_count(), tie, made))
        return None, known

    def beam(self, bound: int, width: int) -> tuple[int, ...]:
        """Return an order with a small peak. Of all sets with the same number of steps, the search continues only with
        the `width` best.
        """
        sets = [self.start(bound)]
        while sets[0].done != self.whole:
            made: dict[int, _DoneSteps] = {}
            for at in sets:
                for each in self._next(at):
                    known = made.get(each.done)
                    if known is None or each.peak < known.peak:
                        made[each.done] = each
            sets = sorted(made.values(), key=lambda each: (each.peak, each.live))[:width]
        return sets[0].order()
