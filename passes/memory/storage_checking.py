"""Check a storage plan independently of the planner: the effect of ops on elements is taken from their references.

    steps     contain each node once, after the nodes that it reads, and before an update of a state that it reads; only
              the last node of a step is read by other steps
    places    exist for every value, with its shape, within its storage; no two elements are written to one address
    views     refer to the right elements, by the op's reference, which is run on addresses instead of elements
    storages  are live at every step that reads or writes their values; no step writes to arguments or constants
    writes    overwrite nothing that a later step reads, in any view, or that is an output: the steps are replayed with
              numbers in place of elements, for every storage that more than one step writes
    in place  a step overwrites its operands only element by element
    states    an update is stored in its state's storage
    calls     a callee's result is stored where the caller expects it; with a library, values that share a storage in
              the callee share one in the caller
    outputs   of kernels fill the caller's storage, or are copied there

Sizes are drawn within the symbols' bounds. Views and writes are replayed at small sizes; bounds are also checked at
large sizes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from functools import cached_property

from treadle.ir.analysis.state_views import StateViews
from treadle.ir.errors import PassError
from treadle.ir.graph import Function, Graph, Value
from treadle.ir.storage.views import Storage, StorageKind
from treadle.passes.memory.storage_plan import BEFORE, FunctionPlan, How, StoragePlan, ValuePlace
from treadle.passes.memory.stride_checking import StridesCheck
from treadle.passes.memory.wrong_plans import wrong_plan

_DRAWN = (2, 5, 17, 1, 67, 257)
_LARGE = 1009


def check_storage(graph: Graph, plan: StoragePlan) -> list[str]:
    """Check a storage plan. Return lines that describe checks that were not possible; usually there are none.

    Raises PassError for the first error, with the value, the steps, and the user's line.
    """
    needed = graph.needed_by(*graph.later_entries)
    if [f.name for f in needed] != list(plan.functions):
        raise PassError(
            "the storage plan is for other functions than the graph's",
            received=", ".join(plan.functions),
            hint=f"a plan of {', '.join(f.name for f in needed)}",
        )
    notes: list[str] = []
    drawn = list(_drawn(graph)) if plan.strided else []
    if plan.strided and not drawn:
        notes.append("no sizes were found at which to check views")
    shown = StateViews(graph)
    for function in needed:
        planned = plan.functions[function.name]
        _Order(function, planned, shown.bases(function)).check()
        _Lives(function, planned, function in graph.entries).check()
        for sizes, small in drawn:
            notes += StridesCheck(function, planned, sizes, plan.functions).check(small)
        if not plan.strided:
            _Shared(function, planned, plan).check()
    return notes


def _drawn(graph: Graph) -> Iterator[tuple[dict[str, int], bool]]:
    """Yield sizes within bounds at which every op is defined, with True for small sizes: small sizes once, and large
    sizes.
    """
    wanted = {size for _, node in graph.walk() for v in (*node.inputs, *node.results) for size in v.type.shape}
    for _, node in graph.walk():
        if node.op.callee is None:
            wanted.update(n for n, _ in node.op.demands([None if v is None else v.type for v in node.operands]))

    def chosen(least: int, step: int) -> dict[str, int]:
        found = {}
        for number, (symbol, bounds) in enumerate(graph.symbols.items()):
            size = max(bounds.lower, least + step * number)
            found[symbol] = size if bounds.upper is None else min(size, bounds.upper)
        return found

    def fits(sizes: Mapping[str, int]) -> bool:
        return all(n.evaluate(sizes) >= 0 for n in wanted)

    small = next((s for s in (chosen(least, 1) for least in _DRAWN) if fits(s)), None)
    if small is not None:
        yield small, True
    large = chosen(_LARGE, 6)
    if large != small and fits(large):
        yield large, False


# -- the order -----------------------------------------------------------------------------------------------------


class _Order:
    """A check of the steps: each node is in one step, after its operands; no step reads a state, or a view of the
    state, after the state's update.

    bases  the version of a state, or the argument, that a value is a view of
    """

    def __init__(self, function: Function, plan: FunctionPlan, bases: Mapping[Value, Value]) -> None:
        self.function, self.plan, self.bases = function, plan, bases

    def check(self) -> None:
        plan, there = self.plan, {*self.function.arguments}
        if plan.function is not self.function:
            raise wrong_plan("it belongs to another graph", plan)
        gone: set[Value | None] = set()
        for step in plan.steps:
            inside: set[Value] = set()
            for value in step.inputs:
                if self.bases.get(value, value) in gone:
                    raise wrong_plan("a step reads a state's old value after its update", plan, value)
            gone.update(v.before for node in step.nodes for v in node.results if v.state is not None and v.before)
            for node in step.nodes:
                for value in node.inputs:
                    if value.literal is None and value not in there and value not in inside:
                        raise wrong_plan("a step reads a value that no earlier step computes", plan, value)
                inside.update(node.results)
            there.update(step.root.results)
        nodes = [node for step in plan.steps for node in step.nodes]
        if len(nodes) != len(self.function.nodes) or {*nodes} != {*self.function.nodes}:
            raise wrong_plan("its steps do not contain each node exactly once", plan)
        for value in self.function.outputs.values():
            if value.literal is None and value not in there:
                raise wrong_plan("an output is only in registers", plan, value)


# -- lives ---------------------------------------------------------------------------------------------------------


class _Lives:
    """A check of lifetimes: values and storages are live as long as they are read."""

    def __init__(self, function: Function, plan: FunctionPlan, is_entry: bool) -> None:
        self.function, self.plan, self.is_entry = function, plan, is_entry
        self.lives = {life.storage: life for life in plan.lives}

    def check(self) -> None:
        plan, end = self.plan, len(self.plan.steps)
        for value in self.function.arguments:
            self._touched(value, BEFORE)
            wanted = How.STATE if value.kind == "state" else How.GIVEN
            self._expect(
                self._place(value).how is wanted, "an argument's storage is not marked as given by the caller", value
            )
        for at, step in enumerate(plan.steps):
            for value in step.inputs:
                self._touched(value, at)
                if at > self._place(value).last:
                    raise wrong_plan(f"step {at} reads a value that is dead by then", plan, value)
            for value in step.root.results:
                self._touched(value, at)
                if self._place(value).first != at:
                    raise wrong_plan(f"it is computed at step {at}, but the plan has another step", plan, value)
            for node in step.nodes[:-1]:
                for value in node.results:
                    self._expect(self._place(value).storage is None, "a value in registers has a storage", value)
        for name, value in self.function.outputs.items():
            self._touched(value, end)
            self._expect(self._place(value).last >= end, f"output {name} is dead at the end", value)
        donated = [plan.places[value].storage for value in plan.donated]
        self._expect(not donated or self.is_entry, "only the caller of an entry can donate arguments", None)
        kept = {*plan.reuses} - {*plan.donated}
        self._expect(not kept or not self.is_entry, "its result overwrites an input that is not donated", None)
        for value, place in plan.places.items():
            if not place.is_written:
                continue
            kind = None if place.storage is None else place.storage.kind
            if kind in (StorageKind.ARGUMENT, StorageKind.CONSTANT) and place.storage not in donated:
                raise wrong_plan(f"a step writes to {place.storage}", plan, value)
            self._expect(value.node is not None, "an argument is marked as written by a step", value)
        held = {place.storage for place in plan.places.values()}
        for at, beside in plan.workspaces.items():
            for view in beside.values():
                life = self.lives.get(view.storage)
                alone = view.storage not in held and view.storage.kind is StorageKind.LOCAL
                if not alone or life is None or (life.first, life.last) != (at, at):
                    raise wrong_plan(f"a workspace does not belong to step {at} alone", plan, None, str(view.storage))

    def _place(self, value: Value) -> ValuePlace:
        place = self.plan.places.get(value)
        if place is None:
            raise wrong_plan("the plan has no place for the value", self.plan, value)
        return place

    def _touched(self, value: Value, at: int) -> None:
        place = self._place(value)
        if place.storage is None:
            raise wrong_plan("a value that other steps read has no storage", self.plan, value)
        life = self.lives.get(place.storage)
        if life is None or not life.first <= at <= life.last:
            lifetime = "never" if life is None else f"from step {life.first} to {life.last}"
            raise wrong_plan(
                f"step {at} needs a storage that is dead", self.plan, value, f"{place.storage} lives {lifetime}"
            )

    def _expect(self, holds: bool, otherwise: str, value: Value | None) -> None:
        if not holds:
            raise wrong_plan(otherwise, self.plan, value)


# -- a library -----------------------------------------------------------------------------------------------------


class _Shared:
    """A check for a library: only views that are not copied share their operand's storage; results of a call are
    stored as in the callee's plan.
    """

    def __init__(self, function: Function, plan: FunctionPlan, whole: StoragePlan) -> None:
        self.function, self.plan, self.whole = function, plan, whole

    @cached_property
    def _longest(self) -> dict[Storage | None, tuple[list[int], list[Value]]]:
        """For each storage: the first steps of its values, in order, and for each prefix of them the value with the
        latest last read.
        """
        places, found = self.plan.places, dict[Storage | None, tuple[list[int], list[Value]]]()
        for value in sorted(places, key=lambda v: places[v].first):
            firsts, longest = found.setdefault(places[value].storage, ([], []))
            before = longest[-1] if longest else value
            firsts.append(places[value].first)
            longest.append(value if places[value].last > places[before].last else before)
        return found

    def check(self) -> None:
        owners: dict[Storage, Value] = {}
        for value, place in self.plan.places.items():
            if place.storage is None or place.storage.kind is StorageKind.CONSTANT:
                continue
            shares = self._shares(value)
            if place.how is How.OVER:
                self._check_over(value, place)
            elif shares is None:
                other = owners.setdefault(place.storage, value)
                if other is not value:
                    raise wrong_plan(
                        "two values have the same storage, and neither is a view", self.plan, value, other.name
                    )
            elif self.plan.places[shares].storage is not place.storage:
                raise wrong_plan(f"it is a view of {shares.name}, but has another storage", self.plan, value)

    def _check_over(self, value: Value, place: ValuePlace) -> None:
        """Check that an elementwise step overwrites an operand of its shape that was computed in the run and that is
        not read again.
        """
        x, node, plan = place.of, value.node, self.plan
        if not isinstance(x, Value) or node is None or x not in node.inputs or not node.is_elementwise:
            raise wrong_plan("a step overwrites a value that it does not read element by element", plan, value)
        lies = plan.places[x]
        ours = place.storage is not None and place.storage.kind is StorageKind.LOCAL and lies.is_written
        mine = lies.storage is place.storage and (ours or x in plan.donated or lies.how is How.OVER)
        if not mine or not x.type.is_held_like(value.type):
            raise wrong_plan(f"it does not fill the storage of {x.name}", plan, value)
        at = plan.places[value].first
        firsts, longest = self._longest[place.storage]
        read = [v for v in node.inputs if v is not x and plan.places[v].storage is place.storage]
        late = [v for v in longest[: bisect_left(firsts, at)][-1:] if plan.places[v].last > at]
        for other in (*late, *(v for v in read if plan.places[v].first < at)):
            raise wrong_plan(f"it overwrites {other.name}, which is read at that step or later", plan, value)

    def _shares(self, value: Value) -> Value | None:
        """Return a value whose storage this value must share, or None if there is none."""
        node = value.node
        if node is None:
            return None
        if value.state is not None:
            return value.before
        if node.op.callee is None:
            place = self.plan.places[value]
            copied = place.how is How.OWN and place.is_written
            return node.inputs[0] if node.op.is_view and not copied else None
        callee = self.whole.functions[node.op.callee]
        outputs = list(callee.function.outputs.values())
        held = callee.places[outputs[value.index]].storage
        for argument, operand in zip(callee.function.arguments, node.inputs, strict=True):
            if callee.places[argument].storage is held:
                return operand
        for output, result in zip(outputs[: value.index], node.results, strict=False):
            if callee.places[output].storage is held:
                return result
        return None
