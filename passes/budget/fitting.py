"""Looking for what makes a run fit into a budget: which runs of steps are computed in parts, and of how many.

    found = Fitting(variants, plan, frames, target, sizes).fit(budget)

A fixed list of candidates is made, whatever the budget is: for limits from the peak down, the fastest partition of each
function that keeps to the limit (`candidates.py`, `partitions.py`). Of those that fit, as planned and placed, the
fastest is taken. So a smaller budget never gives a faster run, nor a larger one a slower run.

What dies before a result is written may lie in it. Smaller sizes, at which the result may be too small for that, must
fit as well: what a run needs at any of them is proven (`memory/hosting.py`).
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
"""What is estimated to need more than so many times the budget is not planned: estimates are not so wrong."""
_ENDLESS = 1 << 256
MOST_TRIED = 256
"""Candidates that are tried: each that may fit is planned and placed."""
SECONDS = 30.0
"""For which the smallest budget that would do is looked for, to be told in an error."""


class Fitting:
    """Variants of one graph, the first of them as it is without a budget, at some sizes.

    plan    of storage
    after   the passes that run before it on what is computed in parts
    frames  of a graph and its plan
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
        """The fastest candidate that fits; None where none does."""
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
        """What a run comes to without a budget."""
        return self._reached(self._base)

    @property
    def _base(self) -> Candidate:
        return next(each for each in self._found if each.variant is self.variants[0] and not each.chunks)

    def least(self, seconds: float) -> tuple[int, int]:
        """The smallest budget that a candidate keeps to, and how many were not looked at, since so long had passed.

        One is looked at, however long that takes; those first that are estimated to need least.
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
        """The peak with all sizes as numbers, which is known sooner: equal parts share a function."""
        key = (candidate.variant, *candidate.chunks)
        if key not in self._rough:
            found = self._placed(candidate, self.sizes)
            # Numbers may hide which axis is meant.
            self._rough[key] = self.peak(candidate) if found is None else found.bytes
        return self._rough[key]

    @cached_property
    def _rough(self) -> dict[tuple[object, ...], int]:
        return {}

    def peak(self, candidate: Candidate) -> int:
        """The peak of a candidate, as planned and placed; one without end where an op has no form on a part."""
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
        """What a candidate comes to; None where an op has no form on a part."""
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
        """All that are tried, the fastest first, as estimated; of those alike the one that needs more.

        They are the same whatever the budget is, so that less memory never gives a faster run.
        """
        return few_of(self._found, MOST_TRIED)

    @property
    def left_out(self) -> int:
        """How many more there are, which are not tried."""
        return len(self._found) - len(self.candidates)

    @cached_property
    def _found(self) -> list[Candidate]:
        found: dict[tuple[object, ...], Candidate] = {}
        for variant in self.variants:
            for candidate in self._makers[variant].all():
                known = found.setdefault((variant, candidate.chunks), candidate)
                if candidate.bytes < known.bytes:  # since it may lie in a result
                    found[variant, candidate.chunks] = candidate
        return sorted(found.values(), key=lambda each: (each.seconds, -each.bytes))

    @cached_property
    def bound(self) -> int:
        """No candidate needs fewer bytes, whatever the number of its parts, nor would any order of storages."""
        return min(maker.bound for maker in self._makers.values())

    @cached_property
    def _makers(self) -> dict[Variant, Candidates]:
        given = self.plan, self.frames, self.target, self.sizes
        return {variant: Candidates(variant, *given) for variant in self.variants}


@dataclass(frozen=True)
class Reached:
    """What a run comes to at some sizes, and at all smaller ones.

    bytes  that it takes at most at any of them
    here   at these sizes
    host   the output in which what dies before that is written lies at these sizes; None: nothing does
    """

    bytes: int
    here: int
    host: str | None = None


def reached(graph: Graph, plan: StoragePlan, frames: Mapping[str, Frame], sizes: Mapping[str, int]) -> Reached:
    """What a run of a graph's last entry comes to up to these sizes, as planned and placed."""
    inside, beside = parts_of(frames)
    entry = graph.main.name
    foreign = max((count for _, count in live_at(beside, entry, sizes, 1)), default=0)
    symbols = {name: Bounds(min(b.lower, sizes[name]), sizes[name]) for name, b in graph.symbols.items()}

    def placed(*results: Life) -> PlacedFrame:
        return place_frames({**inside, entry: replace(inside[entry], handed_out=results)}, sizes)[entry]

    here = most = placed().size  # with nothing in a result, which is never less
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
    """Compute runs of a graph's functions in parts; returns how many. `check` sees each as soon as it is there.

    Raises NoPart where an op has no form on a part.
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
