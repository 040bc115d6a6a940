"""Looking for what makes a run fit into a budget: which runs of steps are computed in parts, and of how many.

    found = Fitting(variants, plan, frames, target, sizes).fit(budget)

A fixed list of candidates is made, whatever the budget is: for limits from the peak down, the fastest partition of each
function that keeps to the limit (`partitions`). Of those that fit, as planned and placed, the fastest is taken. So a
smaller budget never gives a faster run, nor a larger one a slower run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from treadle.ir.analysis.axis_tracing import Tracer
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.transforms.fixing import fix_sizes
from treadle.passes.budget.memory_fit import Chunk, MemoryFit
from treadle.passes.budget.partitions import FunctionTable, Inner, Partition
from treadle.passes.budget.parts import NoPart, Parted, compute_in_parts
from treadle.passes.budget.regions import CutRegion, find_region
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord, count_ops
from treadle.passes.memory.frame_placement import place_frames
from treadle.passes.memory.frames import Frame, live_at, parts_of
from treadle.passes.memory.plan_storage import PlanStorage
from treadle.passes.memory.storage_plan import FunctionPlan, StoragePlan

Frames = Callable[[Graph, StoragePlan], Mapping[str, Frame]]
_FACTOR = 0.94
"""From one limit to the next."""
_WRONG = 1.25
"""What is estimated to need more than so many times the budget is not planned: estimates are not so wrong."""
_ENDLESS = 1 << 256
MOST_TRIED = 256
"""Candidates that are tried: each that may fit is planned and placed."""
SECONDS = 30.0
"""For which the smallest budget that would do is looked for, to be told in an error."""


@dataclass(frozen=True, eq=False)
class Variant:
    """A lowered graph without a storage plan, and how it came to be: see `MemoryFit`."""

    graph: Graph
    apart: bool = False
    again: bool = False


@dataclass(frozen=True)
class Candidate:
    """Chunks of a variant; what these need and how long a run takes, as estimated."""

    variant: Variant
    chunks: tuple[Chunk, ...]
    bytes: int
    seconds: float


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
            variant = candidate.variant
            return MemoryFit(
                budget,
                dict(self.sizes),
                self.peak(base),
                self.peak(candidate),
                candidate.seconds / base.seconds,
                variant.apart,
                variant.again,
                candidate.chunks,
            )
        return None

    @property
    def whole(self) -> int:
        """The peak without a budget."""
        return self.peak(self._base)

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
            found = self._placed(candidate.variant, candidate.chunks, self.sizes)
            self._rough[key] = found if found != _ENDLESS else self.peak(candidate)  # numbers hide which axis is meant
        return self._rough[key]

    @cached_property
    def _rough(self) -> dict[tuple[object, ...], int]:
        return {}

    def peak(self, candidate: Candidate) -> int:
        """The peak of a candidate, as planned and placed."""
        key = (candidate.variant, *candidate.chunks)
        if key not in self._known:
            self._known[key] = self._placed(candidate.variant, candidate.chunks)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[object, ...], int]:
        return {}

    def _placed(self, variant: Variant, chunks: Sequence[Chunk], fixed: Mapping[str, int] | None = None) -> int:
        """The peak of a variant with these chunks; one without end where an op has no form on a part."""
        graph = clone_graph(variant.graph)
        fix_sizes(graph, fixed or {})
        try:
            apply_chunks(graph, chunks)
        except NoPart:
            return _ENDLESS
        for each in self.after:
            each.run_graph(graph, PassRecord(each.name, "", count_ops(graph)))
        plan = self._planned(graph, self.plan)
        return reached_peak(self.frames(graph, plan), plan, graph.main.name, self.sizes)

    def _planned(self, graph: Graph, plan: PlanStorage) -> StoragePlan:
        record = PassRecord(plan.name, "", count_ops(graph))
        plan.run_graph(graph, record)
        assert record.plan is not None
        return record.plan

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
                found.setdefault((variant, candidate.chunks), candidate)
        return sorted(found.values(), key=lambda each: (each.seconds, -each.bytes))

    @cached_property
    def bound(self) -> int:
        """No candidate needs fewer bytes, whatever the number of its parts, nor would any order of storages."""
        return min(maker.bound() for maker in self._makers.values())

    @cached_property
    def _makers(self) -> dict[Variant, _Candidates]:
        return {variant: _Candidates(variant, self) for variant in self.variants}


def few_of(found: Sequence[Candidate], most: int) -> list[Candidate]:
    """So many candidates at most, of all, in their order: what nothing is as fast and as small as first of all.

    Where these are too many alone, the first, the last and some that are evenly far apart. What is computed whole is
    the fastest, so it is the first.
    """
    if len(found) <= most:
        return list(found)
    best: list[int] = []
    for i, each in enumerate(found):
        if not best or each.bytes < found[best[-1]].bytes:
            best.append(i)
    others = sorted({*range(len(found))} - {*best})
    kept = _spread(best, most)
    return [found[i] for i in sorted([*kept, *_spread(others, most - len(kept))])]


def _spread(numbers: Sequence[int], most: int) -> list[int]:
    """So many of some numbers at most, the first and the last among them."""
    if len(numbers) <= most or most < 2:
        return list(numbers[:most])
    return [numbers[i * (len(numbers) - 1) // (most - 1)] for i in range(most)]


class _Candidates:
    """The candidates of one variant."""

    def __init__(self, variant: Variant, of: Fitting) -> None:
        self.variant, self.of = variant, of
        self.graph = variant.graph
        in_order = replace(of.plan, ordered=False)
        self.plans = of._planned(self.graph, in_order).functions
        self.entry = self.graph.main.name

    def all(self) -> Iterator[Candidate]:
        for limited in (self._inside_blocks, self._around_blocks):
            peak, chunks, seconds = limited(None)
            yield Candidate(self.variant, chunks, peak, seconds)
            limit, seen = float(peak), chunks
            while 0 < peak <= limit:
                limit *= _FACTOR
                peak, chunks, seconds = limited(int(limit))
                if chunks != seen:
                    yield Candidate(self.variant, chunks, peak, seconds)
                    seen = chunks

    def _inside_blocks(self, limit: int | None) -> tuple[int, tuple[Chunk, ...], float]:
        """Runs of each function are computed in parts, none that holds a call."""
        limits: dict[str, int] = {}
        inner: dict[str, Inner] = {}
        tables: dict[str, FunctionTable] = {}
        if limit is not None:
            limits[self.entry] = limit
            for name in reversed(list(self.plans)):  # callers first
                plan = self.plans[name]
                table = self._table(plan, {}, calls=False)
                for at, step in enumerate(plan.steps):
                    callee = step.root.op.callee
                    if callee is not None:
                        limits[callee] = min(limits.get(callee, limit), limits.get(name, limit) - table.live[at])
        chunks: list[Chunk] = []
        partition = Partition(())
        for name, plan in self.plans.items():
            table = tables[name] = self._table(plan, inner, calls=False)
            found = None if limit is None else table.fastest(limits.get(name, limit))
            partition = found or (table.least() if limit is not None else _whole(table))
            chunks += table.chunks(partition)
            inner[name] = self._inner(table, partition)
        return partition.bytes, tuple(chunks), partition.seconds

    def _around_blocks(self, limit: int | None) -> tuple[int, tuple[Chunk, ...], float]:
        """Runs of the entry are computed in parts, with all that they call."""
        inner: dict[str, Inner] = {}
        for name, plan in self.plans.items():
            table = self._table(plan, inner, calls=True)
            if name != self.entry:
                inner[name] = self._inner(table, _whole(table))
        found = table.fastest(limit) if limit is not None else _whole(table)
        partition = found or table.least()
        return partition.bytes, tuple(table.chunks(partition)), partition.seconds

    def _table(self, plan: FunctionPlan, inner: Mapping[str, Inner], *, calls: bool) -> FunctionTable:
        key = plan.function.name, calls, tuple((n, i.bytes, i.whole) for n, i in inner.items())
        if key not in self._tables:
            self._tables[key] = FunctionTable(
                self.graph,
                plan,
                self.of.sizes,
                self.of.target,
                dict(inner),
                calls=calls,
                regions=self._regions.setdefault(plan.function.name, {}),
                tracer=self._tracer,
            )
        return self._tables[key]

    @cached_property
    def _tracer(self) -> Tracer:
        return Tracer(self.graph, "")

    @cached_property
    def _regions(self) -> dict[str, dict[tuple[int, int], CutRegion | None]]:
        return {}

    @cached_property
    def _tables(self) -> dict[tuple[object, ...], FunctionTable]:
        return {}

    def _inner(self, table: FunctionTable, partition: Partition) -> Inner:
        costs = []
        for at, cost in enumerate(table.costs):
            callee = table.plan.steps[at].root.op.called_in(table.inner)
            costs += [cost] if callee is None else [*callee.costs]
        return Inner(partition.bytes, partition.seconds, tuple(costs))

    def bound(self) -> int:
        """The bound of the entry: within blocks, and around them."""
        known: dict[tuple[str, frozenset[int]], int] = {}
        tables = {name: self._table(plan, {}, calls=True) for name, plan in self.plans.items()}

        def bound(name: str, counted: frozenset[int]) -> int:
            if (name, counted) not in known:
                known[name, counted] = tables[name].bound(counted, bound)
            return known[name, counted]

        return bound(self.entry, frozenset())


def reached_peak(frames: Mapping[str, Frame], plan: StoragePlan, entry: str, sizes: Mapping[str, int]) -> int:
    """The bytes that a run of an entry takes at these sizes, as planned and placed."""
    inside, beside = parts_of(frames)
    return place_frames(inside, sizes)[entry].size + max((n for _, n in live_at(beside, entry, sizes, 1)), default=0)


def _whole(table: FunctionTable) -> Partition:
    """Every step by itself, whole."""
    runs = [table.run(at, at, 1) for at in range(len(table.plan.steps))]
    return Partition(tuple([run for run in runs if run is not None]))


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
