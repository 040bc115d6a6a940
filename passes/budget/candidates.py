"""Ways to compute a graph in parts: for memory limits from the peak down, the fastest partition of each function.

for candidate in Candidates(variant, plan, frames, target, sizes).all():
    ...                     chunks, with their estimated bytes and seconds
Candidates(...).bound       a lower bound of the bytes of every candidate
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from treadle.ir.analysis.axis_tracing import Tracer
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.passes.budget.memory_fit import Chunk
from treadle.passes.budget.partitions import FunctionTable, Host, Inner, Partition
from treadle.passes.budget.regions import CutRegion
from treadle.passes.framework.pass_log import PassRecord, count_ops
from treadle.passes.memory.frames import Frame, parts_of
from treadle.passes.memory.plan_storage import PlanStorage
from treadle.passes.memory.storage_plan import FunctionPlan, StoragePlan

Frames = Callable[[Graph, StoragePlan], Mapping[str, Frame]]
_FACTOR = 0.94
"""The ratio of one memory limit to the previous one."""


@dataclass(frozen=True, eq=False)
class Variant:
    """A lowered graph without a storage plan, and the flags `apart` and `again` of `MemoryFit`."""

    graph: Graph
    apart: bool = False
    again: bool = False


@dataclass(frozen=True)
class Candidate:
    """Chunks of a variant, with estimates of their bytes and of the seconds of a run."""

    variant: Variant
    chunks: tuple[Chunk, ...]
    bytes: int
    seconds: float


def few_of(found: Sequence[Candidate], most: int) -> list[Candidate]:
    """Return at most `most` candidates, in their order. Prefer candidates for which no other is better in both time and
    memory.

    If there are more such candidates than `most`, keep the first, the last and evenly spaced ones between them. The
    first is the fastest, without any parts.
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
    """Return at most `most` of the numbers, evenly spaced, including the first and the last."""
    if len(numbers) <= most or most < 2:
        return list(numbers[:most])
    return [numbers[i * (len(numbers) - 1) // (most - 1)] for i in range(most)]


def planned(graph: Graph, plan: PlanStorage) -> StoragePlan:
    """Return the storage plan that the pass builds for a graph."""
    record = PassRecord(plan.name, "", count_ops(graph))
    plan.run_graph(graph, record)
    return record.products[StoragePlan]  # type: ignore[no-any-return]


class Candidates:
    """The candidates of one variant, at given sizes of symbols.

    plan    the pass that plans storage
    frames  a function that returns the frames of a graph and its plan
    """

    def __init__(
        self, variant: Variant, plan: PlanStorage, frames: Frames, target: Target, sizes: Mapping[str, int]
    ) -> None:
        self.variant, self.frames, self.target, self.sizes = variant, frames, target, sizes
        self.graph = variant.graph
        self.plan = planned(self.graph, replace(plan, ordered=False))
        self.plans = self.plan.functions
        self.entry = self.graph.main.name

    def all(self) -> Iterator[Candidate]:
        """Yield candidates: for each limit, one with early temporaries placed in a result, and one without. Some may
        occur more than once.
        """
        for host in (None, *self._likely):
            for limited in (self._inside_blocks, self._around_blocks):
                partition, chunks = limited(None, host)
                yield self._candidate(partition, chunks)
                limit, seen = float(partition.bytes), chunks
                while 0 < partition.bytes <= limit:
                    limit *= _FACTOR
                    partition, chunks = limited(int(limit), host)
                    if chunks != seen:
                        yield self._candidate(partition, chunks)
                        seen = chunks

    def _candidate(self, partition: Partition, chunks: tuple[Chunk, ...]) -> Candidate:
        """Return a candidate. Its estimate omits the bytes that can be placed in a result; whether they are placed
        there is known only after placement.
        """
        table = self._whole_tables[self.entry]
        least = min([partition.bytes, *(table.beside(partition, host) for host in self._likely)])
        return Candidate(self.variant, chunks, least, partition.seconds)

    @cached_property
    def hosts(self) -> list[Host]:
        """The results of the entry that may hold early temporaries, the largest first. Early temporaries are dead
        before the result is written.
        """
        frame = parts_of(self.frames(self.graph, self.plan))[0][self.entry]
        found = []
        for life in frame.handed_out:
            first = next(each.first for each in self.plans[self.entry].lives if each.storage is life.storage)
            early = frozenset(each.storage for each in frame.lives if each.last < life.first)
            found.append(Host(first, early, life.storage.nbytes.evaluate(self.sizes)))
        return sorted(found, key=lambda host: -host.bytes)

    @cached_property
    def _likely(self) -> list[Host]:
        """The largest result, if the temporaries that are dead before it is written may be split into parts that fit
        into it. Otherwise empty.
        """
        table = self._whole_tables[self.entry]
        return [host for host in self.hosts[:1] if table.least_before(host, self._bound) <= host.bytes]

    def _inside_blocks(self, limit: int | None, host: Host | None) -> tuple[Partition, tuple[Chunk, ...]]:
        """Return the fastest partition and its chunks, if no run contains a call. Each function has runs of its own."""
        limits: dict[str, int] = {}
        inner: dict[str, Inner] = {}
        tables: dict[str, FunctionTable] = {}
        if limit is not None:
            limits[self.entry] = limit
            for name in reversed(list(self.plans)):  # callers first
                plan = self.plans[name]
                table = self._table(plan, {}, host, calls=False)
                for at, step in enumerate(plan.steps):
                    callee = step.root.op.callee
                    if callee is not None:
                        room = table.room(at, limits.get(name, limit))
                        limits[callee] = min(limits.get(callee, room), room)
        chunks: list[Chunk] = []
        partition = Partition(())
        for name, plan in self.plans.items():
            table = tables[name] = self._table(plan, inner, host, calls=False)
            found = None if limit is None else table.fastest(limits.get(name, limit))
            partition = found or (table.least() if limit is not None else _whole(table))
            chunks += table.chunks(partition)
            inner[name] = self._inner(table, partition)
        return partition, tuple(chunks)

    def _around_blocks(self, limit: int | None, host: Host | None) -> tuple[Partition, tuple[Chunk, ...]]:
        """Return the fastest partition and its chunks, if the entry's runs may contain calls."""
        inner: dict[str, Inner] = {}
        for name, plan in self.plans.items():
            table = self._table(plan, inner, host, calls=True)
            if name != self.entry:
                inner[name] = self._inner(table, _whole(table))
        found = table.fastest(limit) if limit is not None else _whole(table)
        partition = found or table.least()
        return partition, tuple(table.chunks(partition))

    def _table(
        self, plan: FunctionPlan, inner: Mapping[str, Inner], host: Host | None, *, calls: bool
    ) -> FunctionTable:
        host = host if plan.function.name == self.entry else None
        key = plan.function.name, host, calls, tuple((n, i.bytes, i.whole) for n, i in inner.items())
        if key not in self._tables:
            self._tables[key] = FunctionTable(
                self.graph,
                plan,
                self.sizes,
                self.target,
                dict(inner),
                calls=calls,
                regions=self._regions.setdefault(plan.function.name, {}),
                tracer=self._tracer,
                host=host,
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

    # -- the bound -------------------------------------------------------------------------------------------

    @cached_property
    def bound(self) -> int:
        """A lower bound of the bytes of every candidate, with runs inside blocks and around them."""
        return self._whole_tables[self.entry].bound(frozenset(), self._bound, self.hosts)

    @cached_property
    def _whole_tables(self) -> dict[str, FunctionTable]:
        return {name: self._table(plan, {}, None, calls=True) for name, plan in self.plans.items()}

    def _bound(self, name: str, counted: frozenset[int]) -> int:
        """Return a lower bound of the bytes of a called function. `counted` is as in `FunctionTable.bound`."""
        if (name, counted) not in self._bounds:
            self._bounds[name, counted] = self._whole_tables[name].bound(counted, self._bound)
        return self._bounds[name, counted]

    @cached_property
    def _bounds(self) -> dict[tuple[str, frozenset[int]], int]:
        return {}


def _whole(table: FunctionTable) -> Partition:
    """Return the partition in which every step is a separate run, in one part."""
    runs = [table.run(at, at, 1) for at in range(len(table.plan.steps))]
    return Partition(tuple([run for run in runs if run is not None]))
