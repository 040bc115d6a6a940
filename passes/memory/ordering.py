"""Steps of a function in the order that needs the least memory.

    for choice in choices(plan, frame, before, over, peaks, symbols):
        ...                                                    plan in that order, and keep it if `needs_less`

The storage of each value is decided first, in program order, and no step overwrites its operands. This determines the
buffers, and the buffers that each step may overwrite. An order is searched at a few sizes, once per function however
often the function is called. The caller keeps the order if the resulting plan is proven to need no more memory at any
sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from treadle.ir.analysis.state_views import deadlines
from treadle.ir.errors import SizeError
from treadle.ir.graph import Function, Node, Value
from treadle.ir.ops.collectives import Awaited, Starting
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import Size
from treadle.ir.storage.views import StorageKind
from treadle.passes.memory.frames import Frame, covers
from treadle.passes.memory.order import Buffer, OrderProblem, find_order
from treadle.passes.memory.storage_plan import BEFORE, BetterOrder, FunctionPlan, How, Step

_DRAWN = (128, 16, 1009)
"""Sizes of symbols at which orders are searched, if their bounds allow these sizes."""


@dataclass(frozen=True)
class Choice:
    """Another order of a function's steps, and the result of the search that found it."""

    steps: tuple[Step, ...]
    sizes: Mapping[str, int]


def drawn_sizes(symbols: Mapping[str, Bounds], sizes: Sequence[Size]) -> Iterator[dict[str, int]]:
    """Yield sizes within bounds at which none of the expressions is negative."""
    seen = []
    for least in _DRAWN:
        found = {}
        for number, (symbol, bounds) in enumerate(symbols.items()):
            size = max(bounds.lower, least + number)
            found[symbol] = size if bounds.upper is None else min(size, bounds.upper)
        try:
            fits = all(size.evaluate(found) >= 0 for size in sizes)
        except SizeError:
            fits = False
        if fits and found not in seen:
            seen.append(found)
            yield found


def choices(
    plan: FunctionPlan,
    frame: Frame,
    before: tuple[tuple[int, ...], ...],
    over: Callable[[Step], Sequence[Value]],
    callees: Mapping[str, Sequence[Size]],
    symbols: Mapping[str, Bounds],
) -> Iterator[Choice]:
    """Yield orders of a function's steps that need less memory than program order at some sizes, without duplicates.

    plan     the plan in program order, without a step that overwrites its operands
    before   for each step, the steps that `must_precede` it
    over     returns the operands that a step may overwrite
    callees  sizes for each callee; the largest is its peak
    """
    made = _Making(plan, frame, before, over)
    wanted = [made.sizes, *callees.values()]
    seen = {tuple(range(len(plan.steps)))}
    for sizes in drawn_sizes(symbols, [size for each in wanted for size in each]):
        found = find_order(made.problem(sizes, callees))
        if found.order not in seen:
            seen.add(found.order)
            yield Choice(tuple([plan.steps[i] for i in found.order]), sizes)


def needs_less(
    before: Sequence[Size], after: Sequence[Size], choice: Choice, symbols: Mapping[str, Bounds]
) -> BetterOrder | None:
    """Return the savings of an order if the sizes `after` are proven to be no larger than `before`, whatever the
    symbols are, else None.
    """
    if not all(any(covers(old, new, symbols) for old in before) for new in after):
        return None
    was, now = (max((s.evaluate(choice.sizes) for s in each), default=0) for each in (before, after))
    return BetterOrder(was, now, choice.sizes) if now < was else None


def have_one_order(before: Sequence[Sequence[int]]) -> bool:
    """Return True if only one order of the steps is possible: each step must come after the one before it."""
    return all(i in each for i, each in enumerate(before[1:]))


class _Making:
    """An order problem derived from a plan, without sizes."""

    def __init__(
        self,
        plan: FunctionPlan,
        frame: Frame,
        before: tuple[tuple[int, ...], ...],
        over: Callable[[Step], Sequence[Value]],
    ) -> None:
        self.plan, self.frame, self.before = plan, frame, before
        own = [life.storage for life in frame.lives]
        # A donated input counts as a buffer of the run, so that a step that may overwrite it comes after its readers.
        donated = [plan.places[v].storage for v in plan.donated]
        self.storages = [*own, *(storage for storage in donated if storage is not None)]
        self.sizes = [storage.nbytes for storage in self.storages]
        self.number = {storage: i for i, storage in enumerate(self.storages)}
        touched: list[set[int]] = [set() for _ in self.storages]
        for place in plan.places.values():
            if place.storage in self.number and place.first != BEFORE:
                touched[self.number[place.storage]].add(place.first)
        for at, step in enumerate(plan.steps):
            for value in step.inputs:
                storage = plan.places[value].storage
                if storage in self.number:
                    touched[self.number[storage]].add(at)
        for at, beside in plan.workspaces.items():
            for view in beside.values():
                touched[self.number[view.storage]].add(at)
        self.touched = [tuple(sorted(steps)) for steps in touched]
        self.kept = [life.last >= plan.end for life in frame.lives] + [False] * (len(self.storages) - len(own))
        self.over = tuple([tuple(self._over(step, over(step))) for step in plan.steps])

    def _over(self, step: Step, operands: Sequence[Value]) -> Iterator[tuple[int, int]]:
        """Yield pairs of the buffer that a step computes, and a buffer that it may overwrite."""
        for value in step.root.results:
            mine = self.plan.places[value]
            if mine.how is not How.OWN or mine.of != "" or not self._fills(value, value):
                continue
            for x in operands:
                storage = self.plan.places[x].storage
                alone = all(self.plan.places[v].storage is not storage for v in step.inputs if v is not x)
                if storage in self.number and alone and self._fills(x, value) and mine.storage in self.number:
                    yield self.number[mine.storage], self.number[storage]

    def _fills(self, value: Value, other: Value) -> bool:
        place = self.plan.places[value]
        if place.storage is None or place.storage.kind not in (StorageKind.LOCAL, StorageKind.ARGUMENT):
            return False
        whole = place.how is not How.VIEW if place.view is None else place.view.is_contiguous
        return whole and place.storage.elements == other.type.storage_type.elements

    def problem(self, sizes: Mapping[str, int], callees: Mapping[str, Sequence[Size]]) -> OrderProblem:
        """Return the problem at these sizes."""
        extra = [0] * len(self.plan.steps)
        for at, call in self.frame.calls.items():
            inner = max((size.evaluate(sizes) for size in callees[call.callee]), default=0)
            extra[at] = inner - sum(storage.nbytes.evaluate(sizes) for storage in call.storages)
        buffers = [
            Buffer(size.evaluate(sizes), steps, kept)
            for size, steps, kept in zip(self.sizes, self.touched, self.kept, strict=True)
        ]
        return OrderProblem(self.before, tuple(buffers), tuple(extra), self.over)


def must_precede(function: Function, steps: Sequence[Step]) -> tuple[tuple[int, ...], ...]:
    """Return, for each step, the steps that must come before it: the producers of its operands, the readers of a state
    that it updates, and for a collective the preceding collective.

    If a step starts an operation that a later step waits for, the operation overlaps with the steps in between. These
    steps stay in between.
    """
    at = {node: i for i, step in enumerate(steps) for node in step.nodes}
    found: list[set[int]] = [set() for _ in steps]
    for i, step in enumerate(steps):
        found[i].update(at[v.node] for v in step.inputs if v.node is not None)
    for node, updated in deadlines(function).items():
        found[at[function.nodes[updated]]].add(at[node])
    collectives = [i for i, step in enumerate(steps) if any(node.op.meets_ranks for node in step.nodes)]
    for first, second in pairwise(collectives):
        found[second].add(first)
    begins = [i for i, step in enumerate(steps) if any(isinstance(node.op, Starting) for node in step.nodes)]
    waits = [i for i, step in enumerate(steps) if any(_awaits(node) for node in step.nodes)]
    for first, until in pairwise([*begins, len(steps)]):
        for later in range(first + 1, until):
            found[later].add(first)
    for since, wait in pairwise([-1, *waits]):
        found[wait].update(range(since + 1, wait))
    return tuple([tuple(sorted(before - {i})) for i, before in enumerate(found)])


def _awaits(node: Node) -> bool:
    """Return True if a node waits for an operation that was started before."""
    return isinstance(node.op, Awaited) and node.op.ahead
