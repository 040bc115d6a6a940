"""Search for runs of steps to compute in parts, and numbers of parts, so that a run fits into a budget.

    found = Fitting(variants, plan, frames, target, sizes).fit(budget)

The list of candidates does not depend on the budget: for limits from the peak down, it has the fastest partition of
each function within the limit (`candidates.py`, `partitions.py`). The fastest candidate that fits after planning and
placement is selected. So a smaller budget never gives a faster run, and a larger budget never a slower run.

Temporaries that are dead before a result is written may use the memory of the result. At smaller sizes, the result may
be too small for that. So the memory at all smaller sizes is bounded by a proof (`memory/hosting.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from treadle.ir.graph import Graph
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.target import Target
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.transforms.fixing import fix_sizes
from treadle.passes.budget.candidates import Candidate, Candidates, Frames, Variant, few_of, planned
from treadle.passes.budget.memory_fit import Chunk, MemoryFit
from treadle.passes.budget.parts import NoPart, Parted, compute_in_parts
from treadle.passes.budget.regions import find_region
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord, count_ops
from treadle.passes.memory.frame_placement import PlacedFrame, place_frames
from treadle.passes.memory.frames import Frame, live_at, parts_of
from treadle.passes.memory.hosting import hostings
from treadle.passes.memory.plan_storage import PlanStorage
from treadle.passes.memory.storage_plan import Life, StoragePlan

_WRONG = 1.25
"""Candidates whose estimate is more than this multiple of the budget are not planned: no estimate is off by that
much.
"""
_ENDLESS = 1 << 256
MOST_TRIED = 256
"""Maximum number of candidates that are tried. Each candidate that may fit is planned and placed."""
SECONDS = 30.0
"""Time limit in seconds of the search for the smallest sufficient budget, which an error reports."""


class Fitting:
    """Variants of one graph at given sizes. The first variant is the graph without a budget.

    plan    the pass that plans storage
    after   the passes that run before `plan` on a graph with parts
    frames  a function that returns the frames of a graph and its plan
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        plan: PlanStorage,
        after: Sequence[Pass],
        frames: Frames,
        target: Target,
        sizes: Mapping[str, int],
    ) -> None:
        self.variants, self.plan, self.after, self.frames = variants, plan, after, frames
        self.target, self.sizes = target, sizes

    def fit(self, budget: int) -> MemoryFit | None:
        """Return the fastest candidate that fits the budget, as a plan. Return None if no candidate fits."""
        base = self._base
        for candidate in self.candidates:
            if candidate.bytes > _WRONG * budget or self.rough(candidate) > budget or self.peak(candidate) > budget:
                continue
            variant, found = candidate.variant, self._reached(candidate)
            return MemoryFit(
                budget,
                dict(self.sizes),
                self.peak(base),
                found.bytes,
                candidate.seconds / base.seconds,
                variant.apart,
                variant.again,
                candidate.chunks,
                found.host,
            )
        return None

    @property
    def whole(self) -> Reached:
        """The memory of a run without a budget."""
        return self._reached(self._base)

    @property
    def _base(self) -> Candidate:
        return next(each for each in self._found if each.variant is self.variants[0] and not each.chunks)

    def least(self, seconds: float) -> tuple[int, int]:
        """Return the smallest budget that a candidate fits into, and the number of candidates that were not tried
        because of the time limit.

        Candidates with the smallest estimates are tried first. At least one is tried, however long it takes.
        """
        least, until = _ENDLESS, time.monotonic() + seconds
        ordered = sorted(self.candidates, key=lambda each: each.bytes)
        for number, each in enumerate(ordered):
            fewest = math.ceil(each.bytes / _WRONG)
            if fewest >= least:
                break
            if least != _ENDLESS and time.monotonic() > until:
                return least, len(ordered) - number
            if max(fewest, self.rough(each)) < least:
                least = min(least, max(fewest, self.rough(each), self.peak(each)))
        return least, 0

    def rough(self, candidate: Candidate) -> int:
        """Return the peak of a candidate in bytes, with all sizes as constants. This is faster than `peak`, since equal
        parts share a function.
        """
        key = (candidate.variant, *candidate.chunks)
        if key not in self._rough:
            found = self._placed(candidate, self.sizes)
            # If sizes are constants, axes of equal size may be confused. The candidate is then planned with symbols.
            self._rough[key] = self.peak(candidate) if found is None else found.bytes
        return self._rough[key]

    @cached_property
    def _rough(self) -> dict[tuple[object, ...], int]:
        return {}

    def peak(self, candidate: Candidate) -> int:
        """Return the peak of a candidate in bytes, after planning and placement. If an op cannot be computed in parts,
        return a number that exceeds every budget.
        """
        return self._reached(candidate).bytes

    def _reached(self, candidate: Candidate) -> Reached:
        key = (candidate.variant, *candidate.chunks)
        if key not in self._known:
            self._known[key] = self._placed(candidate) or Reached(_ENDLESS, _ENDLESS)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[object, ...], Reached]:
        return {}

    def _placed(self, candidate: Candidate, fixed: Mapping[str, int] | None = None) -> Reached | None:
        """Return the memory of a candidate after planning and placement, or None if an op cannot be computed in
        parts.
        """
        graph = clone_graph(candidate.variant.graph)
        fix_sizes(graph, fixed or {})
        try:
            apply_chunks(graph, candidate.chunks)
        except NoPart:
            return None
        for each in self.after:
            each.run_graph(graph, PassRecord(each.name, "", count_ops(graph)))
        plan = planned(graph, self.plan)
        return reached(graph, plan, self.frames(graph, plan), self.sizes)

    # -- candidates ------------------------------------------------------------------------------------------

    @cached_property
    def candidates(self) -> list[Candidate]:
        """The candidates to try, the fastest estimate first. Among equally fast candidates, candidates that need more
        memory come first.

        The list does not depend on the budget, so that less memory never gives a faster run.
        """
        return few_of(self._found, MOST_TRIED)

    @property
    def left_out(self) -> int:
        """The number of candidates that are not tried."""
        return len(self._found) - len(self.candidates)

    @cached_property
    def _found(self) -> list[Candidate]:
        found: dict[tuple[object, ...], Candidate] = {}
        for variant in self.variants:
            for candidate in self._makers[variant].all():
                known = found.setdefault((variant, candidate.chunks), candidate)
                if candidate.bytes < known.bytes:  # it may be placed in a result, so it needs less
                    found[variant, candidate.chunks] = candidate
        return sorted(found.values(), key=lambda each: (each.seconds, -each.bytes))

    @cached_property
    def bound(self) -> int:
        """A lower bound of the bytes of every candidate, for any number of parts and any placement of storages."""
        return min(maker.bound for maker in self._makers.values())

    @cached_property
    def _makers(self) -> dict[Variant, Candidates]:
        given = self.plan, self.frames, self.target, self.sizes
        return {variant: Candidates(variant, *given) for variant in self.variants}


@dataclass(frozen=True)
class Reached:
    """The memory of a run at given sizes, and at all smaller sizes.

    bytes  the maximum over all of these sizes, in bytes
    here   the memory at the given sizes, in bytes
    host   the output whose memory early temporaries use at these sizes; None if they use no output's memory
    """

    bytes: int
    here: int
    host: str | None = None


def reached(graph: Graph, plan: StoragePlan, frames: Mapping[str, Frame], sizes: Mapping[str, int]) -> Reached:
    """Return the memory of a run of a graph's last entry at sizes up to these, after planning and placement."""
    inside, beside = parts_of(frames)
    entry = graph.main.name
    foreign = max((count for _, count in live_at(beside, entry, sizes, 1)), default=0)
    symbols = {name: Bounds(min(b.lower, sizes[name]), sizes[name]) for name, b in graph.symbols.items()}

    def placed(*results: Life) -> PlacedFrame:
        return place_frames({**inside, entry: replace(inside[entry], handed_out=results)}, sizes)[entry]

    here = most = placed().size  # without placing anything in a result; the maximum, since placing never needs more
    host = None
    for hosting in hostings(inside, entry):
        there = placed(hosting.result)
        if there.host is None:
            continue
        most = min(most, hosting.most_apart(symbols, there.size, most))
        if there.size < here:
            here, host = there.size, there.host
    name = next((name for name, storage in plan.functions[entry].results.items() if storage is host), None)
    return Reached(most + foreign, here + foreign, name)


def apply_chunks(graph: Graph, chunks: Sequence[Chunk], check: Callable[[Graph, Parted], None] | None = None) -> int:
    """Compute runs of a graph's functions in parts. Return the number of runs. `check` is called after each run is
    rewritten.

    Raises NoPart if an op cannot be computed in parts.
    """
    for chunk in chunks:
        function = graph.functions[chunk.function]
        nodes = function.nodes[chunk.first : chunk.last + 1]
        region = find_region(graph, function, nodes, chunk.dim)
        if region is None:
            raise NoPart
        parted = compute_in_parts(graph, region, chunk.parts)
        if check is not None:
            check(graph, parted)
    return len(chunks)
