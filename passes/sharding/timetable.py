"""The timeline of a step: the times at which one rank computes and communicates, derived from its program.

Every node takes the time of its roofline on the rank's parts; every collective takes the time of a ring. A device
computes and sends at the same time, and sends over different mesh axes at the same time. Computation, and the sends
over each axis, run in the order of the program; each starts when its operands are ready. A gather starts where the
program reaches it, or at its `start_gather` if it has one (`gather_ahead`). The same holds for the keys of ring
attention. A stage of a pipeline receives a value when the previous stage has sent it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from treadle.ir.analysis.axis_tracing import joined_scope
from treadle.ir.analysis.cost import node_cost
from treadle.ir.analysis.weight_only import weight_only_nodes
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.hardware import Hardware
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.collectives import AllGather, Awaited, Collective, HandOn, Starting
from treadle.ir.placement.mesh import Mesh

LIMITS = ("compute", "memory bandwidth", "links", "latency")
"""The possible bottlenecks."""


@dataclass(frozen=True)
class Busy:
    """The execution of a node, in seconds from the start of the step.

    over     the mesh axes over which ranks communicate; "" for computation
    because  the reason for the collective
    sent     the number of bytes that the rank sends
    limit    one of LIMITS
    call     the index of the call of `main` that the node is in, from 0; -1 outside of calls
    """

    op: str
    over: str
    because: str
    scope: str
    line: str
    start: float
    seconds: float
    sent: float
    limit: str
    call: int

    @property
    def end(self) -> float:
        """The end of the execution, in seconds."""
        return self.start + self.seconds


@dataclass(frozen=True)
class Cause:
    """All collectives of a step that have one reason and one source line.

    scope    the scope, with `*` for the numbers of repeated blocks
    sent     bytes that the rank sends, and seconds of the collectives: the totals
    """

    op: str
    over: str
    because: str
    scope: str
    line: str
    times: int
    sent: float
    seconds: float


@dataclass(frozen=True)
class Timetable:
    """The timeline of a rank in a step, in the order of its program.

    calls   the scopes of the calls of `main`
    handed  the times at which values have been sent to the next stage of a pipeline
    """

    busy: tuple[Busy, ...]
    calls: tuple[str, ...]
    handed: tuple[float, ...] = ()

    @property
    def seconds(self) -> float:
        """The time of the step in seconds, with communication that overlaps."""
        return max((each.end for each in self.busy), default=0.0)

    @property
    def work(self) -> float:
        """The time of computation in seconds."""
        return sum(each.seconds for each in self.busy if not each.over)

    @property
    def collectives(self) -> float:
        """The time of collectives in seconds, whether or not they overlap with computation."""
        return sum(each.seconds for each in self.busy if each.over)

    def causes(self) -> list[Cause]:
        """Return the causes of collectives, the longest first."""
        groups: dict[tuple[str, str, str, str, str], list[Busy]] = {}
        for each in self.busy:
            if each.over:
                scope = re.sub(r"\.\d+(?=\.|$)", ".*", each.scope)
                groups.setdefault((each.op, each.over, each.because, scope, each.line), []).append(each)
        found = [
            Cause(*key, len(each), sum(e.sent for e in each), sum(e.seconds for e in each))
            for key, each in groups.items()
        ]
        return sorted(found, key=lambda cause: -cause.seconds)

    def by_limit(self) -> dict[str, float]:
        """Return the time in seconds by bottleneck. If gathers overlap, the sum is more than the step's time."""
        found = dict.fromkeys(LIMITS, 0.0)
        for each in self.busy:
            found[each.limit] += each.seconds
        return found


def timetable_of(
    program: Graph,
    mesh: Mesh,
    machine: Hardware,
    sizes: Mapping[str, int],
    *,
    stage: int = 0,
    handed: Sequence[float] = (),
) -> Timetable:
    """Return the timeline of a rank's program at these sizes of symbols.

    stage   the rank's stage in a pipeline
    handed  the times at which values from the previous stage arrive
    """
    made = _Walk(program, mesh, machine, sizes, stage, handed)
    main = program.main
    made.function(main, dict.fromkeys(main.arguments, 0.0), "", -1)
    return Timetable(tuple(made.busy), tuple(made.calls), tuple(made.handed))


@dataclass(frozen=True)
class Turn:
    """The execution of a micro-batch in a stage, in seconds from the start of the step."""

    stage: int
    turn: int
    start: float
    end: float


@dataclass(frozen=True)
class PipelineTimes:
    """The timelines of the stages of a pipeline, each for one of its ranks.

    turns  each micro-batch in each stage, stage by stage
    """

    stages: tuple[Timetable, ...]
    turns: tuple[Turn, ...] = field(repr=False)

    @staticmethod
    def of(stages: Sequence[Timetable], word: str) -> PipelineTimes:
        """Return the times of timelines whose scopes begin with `word` and the number of the micro-batch."""
        found: list[Turn] = []
        for number, times in enumerate(stages):
            spans: dict[int, tuple[float, float]] = {}
            for each in times.busy:
                match = re.match(rf"{word}\.(\d+)(?=\.|$)", each.scope)
                if match is not None and each.op != HandOn.name:
                    first, last = spans.get(int(match[1]), (each.start, each.end))
                    spans[int(match[1])] = min(first, each.start), max(last, each.end)
            found += [Turn(number, turn, *span) for turn, span in sorted(spans.items())]
        return PipelineTimes(tuple(stages), tuple(found))

    @property
    def seconds(self) -> float:
        """The time at which the last stage ends, in seconds."""
        return max((times.seconds for times in self.stages), default=0.0)

    @property
    def waits(self) -> float:
        """The fraction of all ranks' time in which they have no micro-batch: the bubble."""
        worked = sum(each.end - each.start for each in self.turns)
        return 1 - worked / max(len(self.stages) * self.seconds, 1e-30)

    def __str__(self) -> str:
        count = len({each.turn for each in self.turns})
        return f"ranks wait {self.waits:.0%} of the time: {len(self.stages)} stages, {count} micro-batches"


@dataclass(frozen=True)
class _Takes:
    """The cost of a node, which is the same wherever its function is called."""

    seconds: float
    limit: str
    over: str = ""
    because: str = ""
    sent: float = 0.0


class _Walk:
    """A walk through the program, call by call.

    free    the times from which the device is free to compute (""), or to send over axes
    begins  the time at which each call of `main` began
    """

    def __init__(
        self,
        program: Graph,
        mesh: Mesh,
        machine: Hardware,
        sizes: Mapping[str, int],
        stage: int,
        handed: Sequence[float],
    ) -> None:
        self.program, self.mesh, self.machine, self.sizes = program, mesh, machine, sizes
        self.stage, self.arrivals = stage, deque(handed)
        self.handed: list[float] = []
        self.begun: dict[tuple[str, str], deque[int]] = {}
        self.busy: list[Busy] = []
        self.calls: list[str] = []
        self.begins: list[float] = []
        self.free: dict[str, float] = {}
        self.known: dict[str, list[tuple[Node, _Takes | None]]] = {}

    def function(self, function: Function, ready: dict[Value, float], scope: str, call: int) -> list[float]:
        """Simulate a function. `ready` contains the times at which its arguments are ready. Return the times of its
        results.
        """
        if function.name not in self.known:
            self.known[function.name] = list(self.taken(function))
        for node, takes in self.known[function.name]:
            there = max((ready.get(v, 0.0) for v in node.inputs), default=0.0)
            if node.op.callee is not None:
                callee = self.program.functions[node.op.callee]
                inside = call
                if not scope and call < 0:
                    inside = len(self.calls)
                    self.calls.append(node.scope)
                    self.begins.append(max(there, self.free.get("", 0.0)))
                given = {a: ready.get(v, 0.0) for a, v in zip(callee.arguments, node.inputs, strict=True)}
                ends = self.function(callee, given, joined_scope(scope, node.scope), inside)
                ready.update(zip(node.results, ends, strict=True))
            elif takes is None:
                ready.update(dict.fromkeys(node.results, there))
            elif self.is_handed(node):
                ready.update(dict.fromkeys(node.results, self.arrivals.popleft()))
            elif isinstance(node.op, Awaited) and node.op.ahead:
                at = self.begun[node.op.name, takes.over].popleft()
                begun = self.busy[at]
                self.busy[at] = self.during(node, takes, begun.start, scope, call)
                ready.update(dict.fromkeys(node.results, max(begun.end, there)))
            else:
                last = len(self.calls) - 1 if call < 0 else call - 1
                floor = self.begins[last] if takes.over and last >= 0 else 0.0
                if isinstance(node.op, AllGather | Starting):
                    floor = self.free.get("", 0.0)
                start = max(there, self.free.get(takes.over, 0.0), floor)
                end = start + takes.seconds
                ready.update(dict.fromkeys(node.results, end))
                self.free[takes.over] = end
                if isinstance(node.op, Starting):
                    key = node.op.awaited.name, takes.over
                    self.begun.setdefault(key, deque()).append(len(self.busy))
                if isinstance(node.op, HandOn):
                    self.handed.append(end)
                self.busy.append(self.during(node, takes, start, scope, call))
        return [ready.get(v, 0.0) for v in function.results]

    def is_handed(self, node: Node) -> bool:
        """Return True if the previous stage sends the result of a node."""
        return isinstance(node.op, HandOn) and node.op.target == self.stage

    def during(self, node: Node, takes: _Takes, start: float, scope: str, call: int) -> Busy:
        """Return the record of a node's execution."""
        place, line = joined_scope(scope, node.scope), str(node.source or "")
        costs = takes.over, takes.because, place, line, start, takes.seconds, takes.sent, takes.limit
        return Busy(node.op.name, *costs, call)

    def taken(self, function: Function) -> Iterator[tuple[Node, _Takes | None]]:
        """Yield each node with its cost. The cost is None for a call, for a node that runs once, when weights are
        bound, and for a node that only provides the type of a received value.
        """
        once, uses = weight_only_nodes(function), function.uses()
        for node in function.nodes:
            readers = [reader for value in node.results for reader, _ in uses.get(value, ())]
            types = bool(readers) and all(self.is_handed(reader) for reader in readers)
            if node.op.callee is not None or node in once or types:
                yield node, None
            elif isinstance(node.op, Collective):
                yield node, self.meeting(node, node.op)
            else:
                cost = node_cost(node, self.sizes)
                computed, moved = cost.flops / self.machine.product_rate, cost.bytes / self.machine.bandwidth
                yield node, _Takes(max(computed, moved), LIMITS[0 if computed > moved else 1])

    def meeting(self, node: Node, op: Collective) -> _Takes:
        taken, given = (v.type.bytes_at(self.sizes) for v in (node.inputs[0], node.results[0]))
        if isinstance(op, Starting):
            shape = node.inputs[0].type.shape
            part = shape[place(op.axis, len(shape))].evaluate(self.sizes)
            given = taken // part * op.size.evaluate(self.sizes)
            op = op.awaited
        sent = op.payload(taken, given) * op.rounds / op.ways
        on_links = sent / self.machine.link(self.mesh.reach(self.mesh.parts_of(op.over)))
        waits = op.messages * self.machine.latency
        return _Takes(on_links + waits, LIMITS[2 if on_links > waits else 3], op.over, op.because, sent)
