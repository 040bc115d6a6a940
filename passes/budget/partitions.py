"""A function divided into runs of steps, some of them computed in parts: its memory and its time.

    table = FunctionTable(graph, plan, sizes, target, inner)
    table.fastest(most)      the fastest partition in which no run needs more than `most` bytes
    table.least()            the partition that needs the fewest bytes
    table.bound(...)         a lower bound of every partition's bytes, for any number of parts

The memory of a partition is derived from the plan of the unchanged function, as the storages that are live at each
step. If a run is computed in parts, and a split value is live only in that run, only a part of the value counts. The
storages are planned again afterwards, so this is an estimate. The bound is not an estimate: it counts the values that
are live between two runs, wherever they are stored.

The memory of a result of the entry exists before the result is written (`Host`). Temporaries that are dead by then may
use it; all other storages are still live when the result is written. So earlier runs need no memory beyond what the run
that writes the result needs. If that run is computed in parts, its first part already writes the result, while values
that die later in the run are live.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from treadle.ir.analysis.axis_tracing import Tracer
from treadle.ir.builder import describe_source
from treadle.ir.graph import Function, Graph, Node
from treadle.ir.sizing.sizes import ONE
from treadle.ir.storage.views import Storage, StorageKind
from treadle.ir.target import Target
from treadle.passes.budget.memory_fit import Chunk
from treadle.passes.budget.regions import CutRegion, find_region, given_values
from treadle.passes.budget.step_costs import StepCost, step_cost
from treadle.passes.memory.frames import ALIGNMENT, aligned
from treadle.passes.memory.storage_plan import BEFORE, FunctionPlan, How

PARTS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
"""The numbers of parts that are tried."""
_MOST_RUN = 64  # the largest number of steps in a run that is computed in parts


@dataclass(frozen=True)
class Run:
    """Consecutive steps of a function, from the first to the last, computed in a number of parts."""

    first: int
    last: int
    parts: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Partition:
    """All steps of a function in order, divided into runs."""

    runs: tuple[Run, ...]

    @property
    def bytes(self) -> int:
        return max((run.bytes for run in self.runs), default=0)

    @property
    def seconds(self) -> float:
        return sum(run.seconds for run in self.runs)


@dataclass(frozen=True)
class Inner:
    """The memory and time of a partitioned callee, including the time of a call on parts of its arguments."""

    bytes: int
    whole: float
    costs: tuple[StepCost, ...]

    def seconds(self, target: Target, parts: int) -> float:
        return self.whole if parts == 1 else sum(cost.seconds(target, parts) for cost in self.costs)


@dataclass(frozen=True, eq=False)
class Host:
    """A result of the entry. Temporaries that are dead before the result is written may use its memory.

    first  the first step that writes the result
    early  the storages that no kernel needs from that step on
    bytes  the size of the result in bytes
    """

    first: int
    early: Collection[Storage]
    bytes: int


class FunctionTable:
    """The runs of one function, with their memory and time; `inner` has the memory and time of callees, by name.

    calls    True if runs may contain calls
    regions  known regions of the function, by their first and last step; more are added
    tracer   a tracer of the graph
    host     a result whose memory earlier runs are assumed to use; None if they use no result's memory
    """

    def __init__(
        self,
        graph: Graph,
        plan: FunctionPlan,
        sizes: Mapping[str, int],
        target: Target,
        inner: Mapping[str, Inner],
        *,
        calls: bool,
        regions: dict[tuple[int, int], CutRegion | None],
        tracer: Tracer,
        host: Host | None = None,
    ) -> None:
        self.graph, self.plan, self.sizes, self.target, self.inner, self.calls = (
            graph,
            plan,
            sizes,
            target,
            inner,
            calls,
        )
        self.function: Function = plan.function
        self.costs = [
            StepCost(0, {}) if step.root.op.callee is not None else step_cost(step, plan, sizes) for step in plan.steps
        ]
        self.at = {node: i for i, node in enumerate(self.function.nodes)}
        self._regions, self._tracer, self.host = regions, tracer, host
        self._runs: dict[tuple[int, int, int], Run | None] = {}

    # -- lifetimes -------------------------------------------------------------------------------------------

    @cached_property
    def lives(self) -> list[tuple[Storage, int, int, int]]:
        """The function's own storages, with the first and the last step at which they are live, and their bytes."""
        return [
            (life.storage, life.first, life.last, self._bytes(life.storage))
            for life in self.plan.lives
            if life.storage.kind.is_own
        ]

    def _bytes(self, storage: Storage) -> int:
        return aligned(storage.nbytes.evaluate(self.sizes), ALIGNMENT)

    @cached_property
    def live(self) -> list[int]:
        """The number of bytes of the function's own storages that are live at each step."""
        return [
            sum(n for _, first, last, n in self.lives if first <= at <= last) for at in range(len(self.plan.steps) + 1)
        ]

    def room(self, at: int, limit: int) -> int:
        """Return the number of bytes that the callee of a step may need under a limit."""
        if self.host is not None and at < self.host.first:
            limit = max(limit, self.host.bytes + self._kept(self.host, at, at))
        return limit - self.live[at]

    def beside(self, partition: Partition, host: Host) -> int:
        """Return the number of bytes that a partition needs outside of a result, if the result holds as many
        temporaries as it can.
        """
        return max((run.bytes for run in partition.runs if not self._lies_in(host, run)), default=0)

    def _lies_in(self, host: Host, run: Run) -> bool:
        """Return True if a run ends before a result is written, and the result has room for the run's values that are
        dead by then.
        """
        return run.last < host.first and run.bytes - self._kept(host, run.first, run.last) <= host.bytes

    def _kept(self, host: Host, first: int, last: int) -> int:
        """Return the number of bytes that are live both at some of these steps and when a result is written."""
        return sum(
            n for storage, begin, end, n in self.lives if begin <= last and end >= first and storage not in host.early
        )

    def _inner(self, at: int) -> Inner | None:
        return self.plan.steps[at].root.op.called_in(self.inner)

    # -- runs ------------------------------------------------------------------------------------------------

    def region(self, first: int, last: int) -> CutRegion | None:
        """Return the nodes of these steps as a region along the outermost axis of their results. Return None if they
        are not a region.
        """
        if not (self.calls or all(step.root.op.callee is None for step in self.plan.steps[first : last + 1])):
            return None
        key = first, last
        if key not in self._regions:
            self._regions[key] = self._region(first, last)
        return self._regions[key]

    def _region(self, first: int, last: int) -> CutRegion | None:
        steps = self.plan.steps[first : last + 1]
        if last - first >= _MOST_RUN:
            return None
        if all(not self.plan.places[v].is_written for step in steps for v in step.root.results):
            return None
        nodes = sorted((node for step in steps for node in step.nodes), key=self.at.__getitem__)
        if self.at[nodes[-1]] - self.at[nodes[0]] != len(nodes) - 1:
            return None
        given = given_values(self.function, set(nodes), nodes)
        shape = given[0].type.shape if given else ()
        dim = next((i for i, size in enumerate(shape) if size != ONE), None)
        return None if dim is None else find_region(self.graph, self.function, nodes, dim, self._tracer)

    def run(self, first: int, last: int, parts: int) -> Run | None:
        """Return the run of these steps in a number of parts, or None if they cannot be computed in parts."""
        key = first, last, parts
        if key not in self._runs:
            run = self._run(first, last, parts)
            hosted = run is not None and self.host is not None and self._lies_in(self.host, run)
            self._runs[key] = replace(run, bytes=0) if run is not None and hosted else run
        return self._runs[key]

    def _run(self, first: int, last: int, parts: int) -> Run | None:
        if parts == 1:
            inner = self._inner(first)
            seconds = self.costs[first].seconds(self.target) if inner is None else inner.seconds(self.target, 1)
            count = self.live[first] + (0 if inner is None else inner.bytes)
            return Run(first, last, 1, count, seconds)
        region = self.region(first, last)
        if region is None or parts > region.size.evaluate(self.sizes):
            return None
        whole, in_part = 0, [0] * (last - first + 1)
        cut = {place.storage for v, place in self.plan.places.items() if v in region.dims}
        for storage, begin, end, count in self.lives:
            if begin >= first and end <= last and storage in cut:
                for at in range(begin, end + 1):
                    in_part[at - first] += count
            elif begin <= last and end >= first:
                whole += count
        for v in region.outputs:
            if self.plan.places[v].how is How.OVER:
                whole += v.type.bytes_at(self.sizes)
        seconds = 0.0
        for at in range(first, last + 1):
            inner = self._inner(at)
            if inner is not None:
                in_part[at - first] += inner.bytes
                seconds += inner.seconds(self.target, parts)
            else:
                seconds += self.costs[at].seconds(self.target, parts, region.dims)
        return Run(first, last, parts, whole + -(-max(in_part) // parts), seconds)

    # -- partitions ------------------------------------------------------------------------------------------

    def fastest(self, most: int) -> Partition | None:
        """Return the fastest partition in which no run needs more than `most` bytes, or None if there is none."""
        found: list[tuple[float, tuple[Run, ...]] | None] = [(0.0, ())]
        for end in range(1, len(self.plan.steps) + 1):
            best: tuple[float, tuple[Run, ...]] | None = None
            for begin in range(max(0, end - _MOST_RUN), end):
                before = found[begin]
                run = None if before is None else self._cheapest(begin, end - 1, most)
                if before is None or run is None:
                    continue
                seconds = before[0] + run.seconds
                if best is None or seconds < best[0]:
                    best = seconds, (*before[1], run)
            found.append(best)
        last = found[-1]
        return None if last is None else Partition(last[1])

    def _cheapest(self, first: int, last: int, most: int) -> Run | None:
        """Return the run of these steps with the fewest parts that needs at most `most` bytes, or None if there is
        none.
        """
        for parts in (1, *PARTS) if first == last else PARTS:
            run = self.run(first, last, parts)
            if run is None and parts > 1:
                return None
            if run is not None and run.bytes <= most:
                return run
        return None

    def least(self) -> Partition:
        """Return the partition that needs the fewest bytes. Among equal ones, return the fastest."""
        needs = sorted(
            {
                run.bytes
                for first in range(len(self.plan.steps))
                for last in range(first, min(first + _MOST_RUN, len(self.plan.steps)))
                for parts in ((1, *PARTS) if first == last else PARTS)
                if (run := self.run(first, last, parts)) is not None
            }
        )
        low, high = 0, len(needs) - 1
        while low < high:
            middle = (low + high) // 2
            if self.fastest(needs[middle]) is None:
                low = middle + 1
            else:
                high = middle
        found = self.fastest(needs[low]) if needs else Partition(())
        assert found is not None
        return found

    def chunks(self, partition: Partition) -> list[Chunk]:
        """Return the chunks, the last run first. If they are applied in this order, the nodes before a run keep their
        indices.
        """
        made = []
        for run in reversed(partition.runs):
            if run.parts > 1:
                region = self.region(run.first, run.last)
                assert region is not None
                nodes: Sequence[Node] = region.nodes
                first, last = self.at[nodes[0]], self.at[nodes[-1]]
                ops = nodes[0].op.name if first == last else f"{nodes[0].op.name} to {nodes[-1].op.name}"
                dim = region.dims[region.outputs[0]]
                source = describe_source(nodes[-1].source, nodes[-1].scope) or ""
                made.append(Chunk(self.function.name, first, last, dim, run.parts, ops, str(region.size), source))
        return made

    # -- the bound -------------------------------------------------------------------------------------------

    def bound(
        self, counted: frozenset[int], callee: Callable[[str, frozenset[int]], int], hosts: Sequence[Host] = ()
    ) -> int:
        """Return a lower bound of the bytes of every partition, for any number of parts and any placement of storages.
        It counts the values that are live between two runs.

        counted  positions of arguments that belong to the caller, and are dead after the call
        callee   a function that returns the bound of a callee
        hosts    results, one of which may hold temporaries that are dead before it is written, if they can fit
        """
        end = len(self.plan.steps)
        least = self._least(0, end, _Counting(counted, callee))
        for host in hosts:
            for begin in self._begins(host.first):
                early = host.early if begin == host.first else {s for s, _, last, _ in self.lives if last < begin}
                if self._least(0, begin, _Counting(counted, callee, only=early)) <= host.bytes:
                    least = min(least, self._least(begin, end, _Counting(counted, callee, without=early)))
        return least

    def least_before(self, host: Host, callee: Callable[[str, frozenset[int]], int]) -> int:
        """Return a lower bound, for every partition, of the bytes that are needed before a result is written and are
        dead by then.
        """
        return self._least(0, host.first, _Counting(frozenset(), callee, only=host.early))

    def _begins(self, step: int) -> Iterator[int]:
        """Yield the steps at which a run that contains a step may begin."""
        yield step
        for begin in range(max(0, step - _MOST_RUN + 1), step):
            if any(self.region(begin, last) for last in range(step, min(begin + _MOST_RUN, len(self.plan.steps)))):
                yield begin

    def _least(self, start: int, end: int, counting: _Counting) -> int:
        """Return the bound for runs from before step `start` to before step `end`, counting only some storages."""
        best = [self._between(start, counting)]
        for stop in range(start + 1, end + 1):
            least = None
            for begin in range(max(start, stop - _MOST_RUN), stop):
                inside = 0
                if begin == stop - 1:
                    inside = self._inside(begin, counting)
                elif self.region(begin, stop - 1) is None:
                    continue
                need = max(best[begin - start], inside)
                least = need if least is None else min(least, need)
            assert least is not None
            best.append(max(least, self._between(stop, counting)))
        return best[-1]

    def _between(self, at: int, counting: _Counting) -> int:
        """Return the number of bytes that are live before a step: written earlier, and read at the step or later."""
        held: dict[Storage, int] = {}
        counted = counting.arguments
        arguments = {self.plan.places[v].storage for i, v in enumerate(self.function.arguments) if i in counted}
        for place in self.plan.places.values():
            storage = place.storage
            if storage is not None and place.first < at <= place.last:
                given = storage in arguments and place.first == BEFORE
                if given or (self._is_own(storage) and counting.counts(storage)):
                    held[storage] = self._bytes(storage)
        return sum(held.values())

    def _is_own(self, storage: Storage) -> bool:
        """Return True if a storage belongs to the function, or its caller must provide it. Return False for an output
        of the entry.
        """
        is_entry = self.function in self.graph.entries
        return storage.kind.is_own or (storage.kind is StorageKind.RESULT and not is_entry)

    def _inside(self, at: int, counting: _Counting) -> int:
        """Return the number of bytes that are live while a call runs: the values that are live across the call, and the
        callee's need. Return 0 for other steps.
        """
        node = self.plan.steps[at].root
        if node.op.callee is None:
            return 0
        kept, passed = 0, {self.plan.places[v].storage: i for i, v in enumerate(node.operands) if v is not None}
        dying = set()
        for storage, first, last, count in self.lives:
            if not counting.counts(storage):
                continue
            if first < at < last:
                kept += count
            elif first < at == last and storage in passed:
                dying.add(passed[storage])
        made = {self.plan.places[v].storage for v in node.results}
        given = {s for s in made if s is not None and not (self._is_own(s) and counting.counts(s))}
        return kept + max(0, counting.callee(node.op.callee, frozenset(dying)) - sum(map(self._bytes, given)))


@dataclass(frozen=True, eq=False)
class _Counting:
    """The storages that a bound counts: arguments by position, and all or some of the function's own storages."""

    arguments: frozenset[int]
    callee: Callable[[str, frozenset[int]], int]
    only: Collection[Storage] | None = None
    without: Collection[Storage] = ()

    def counts(self, storage: Storage) -> bool:
        return storage not in self.without and (self.only is None or storage in self.only)
