"""Ways to compute a graph in parts: for limits from the peak down, the fastest partition of each function.

for candidate in Candidates(variant, plan, frames, target, sizes).all():
    ...                     chunks, with the bytes and the seconds that are estimated of them
Candidates(...).bound       no candidate needs fewer bytes
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
"""From one limit to the next."""


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


def planned(graph: Graph, plan: PlanStorage) -> StoragePlan:
    """What a pass that plans storage makes of a graph."""
    record = PassRecord(plan.name, "", count_ops(graph))
    plan.run_graph(graph, record)
    assert record.plan is not None
    return record.plan


class Candidates:
    """The candidates of one variant, at some sizes.

    plan    of storage
    frames  of a graph and its plan
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
        """Some of them more than once: as if what dies before a result is written lay in it, and as if it did not."""
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
        """What it needs is what lies in no result, if it may lie in one: whether it does is seen when it is placed."""
        table = self._whole_tables[self.entry]
        least = min([partition.bytes, *(table.beside(partition, host) for host in self._likely)])
        return Candidate(self.variant, chunks, least, partition.seconds)

    @cached_property
    def hosts(self) -> list[Host]:
        """Results of the entry in which what dies before they are written may lie, the largest first."""
        frame = parts_of(self.frames(self.graph, self.plan))[0][self.entry]
        found = []
        for life in frame.handed_out:
            first = next(each.first for each in self.plans[self.entry].lives if each.storage is life.storage)
            early = frozenset(each.storage for each in frame.lives if each.last < life.first)
            found.append(Host(first, early, life.storage.nbytes.evaluate(self.sizes)))
        return sorted(found, key=lambda host: -host.bytes)

    @cached_property
    def _likely(self) -> list[Host]:
        """The largest result, if what dies before it is written may be cut into parts that have room in it."""
        table = self._whole_tables[self.entry]
        return [host for host in self.hosts[:1] if table.least_before(host, self._bound) <= host.bytes]

    def _inside_blocks(self, limit: int | None, host: Host | None) -> tuple[Partition, tuple[Chunk, ...]]:
        """Runs of each function are computed in parts, none that holds a call."""
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
        """Runs of the entry are computed in parts, with all that they call."""
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
        """No candidate needs fewer bytes: within blocks, and around them."""
        return self._whole_tables[self.entry].bound(frozenset(), self._bound, self.hosts)

    @cached_property
    def _whole_tables(self) -> dict[str, FunctionTable]:
        return {name: self._table(plan, {}, None, calls=True) for name, plan in self.plans.items()}

    def _bound(self, name: str, counted: frozenset[int]) -> int:
        """The bound of a function that is called; `counted` as `FunctionTable.bound` has it."""
        if (name, counted) not in self._bounds:
            self._bounds[name, counted] = self._whole_tables[name].bound(counted, self._bound)
        return self._bounds[name, counted]

    @cached_property
    def _bounds(self) -> dict[tuple[str, frozenset[int]], int]:
        return {}


def _whole(table: FunctionTable) -> Partition:
    """Every step by itself, whole."""
    runs = [table.run(at, at, 1) for at in range(len(table.plan.steps))]
    return Partition(tuple([run for run in runs if run is not None]))
