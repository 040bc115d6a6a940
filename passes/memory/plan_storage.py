"""Where every value lies, from when to when: one plan, which backends spell. `storage_plan.py` says what it holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import ONE, Size, product
from treadle.ir.storage.views import Storage, StorageKind, View
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord
from treadle.passes.memory.argument_reuse import reused_arguments
from treadle.passes.memory.frames import frame_of, peak_of
from treadle.passes.memory.ordering import choices, needs_less
from treadle.passes.memory.storage_plan import BEFORE, FunctionPlan, How, Life, Step, StoragePlan, ValuePlace

Grouping = Callable[[Function], Sequence[Step]]
"""Which nodes of a function are computed together, in order; each node is in one step."""
Over = Callable[[Step], Sequence[Value]]
"""The operands that a step reads element by element, each for the result's element at its own place alone."""
Parts = Callable[[Step, View], bool]
"""Whether a step writes its result through a view with gaps, without a copy."""


def each_alone(function: Function) -> Sequence[Step]:
    """Every node is a step."""
    return [Step((node,)) for node in function.nodes]


def every_part(step: Step, view: View) -> bool:
    """Every step writes through any view."""
    return True


def allocates(node: Node) -> bool:
    """A library allocates what each node gives."""
    return False


def over_nothing(step: Step) -> Sequence[Value]:
    """No step writes over what it reads."""
    return ()


@dataclass(frozen=True)
class PlanStorage(Pass):
    """y = op(x, ...)   -->   y lies in s, from step i to step j

    s is, the first that there is:
      that of a state, where y is the update of it: nobody reads what was before
      that of x, where op is a view of it and strides can say so
      the caller's, where y is an output
      z's, where the one reader z of y would only move y to where it lies by then: a part of a concat, what is padded
      that of an operand which dies at this step, where the backend writes over it; of a call, where its callee may
      of its own, in the order in which the one reader wants it: "b s (h d) -> b h s d" is then a view

    strided  kernels read and write by strides, as the plan says. Otherwise a library chooses strides, and allocates
             what it gives: all that is no view has a storage of its own, or that of an operand which dies
    grouped  which nodes the backend computes together, so that only the last of them needs a storage
    parts    whether a step writes its result where it is a part of another
    over     the operands over which a step may write its result, element by element
    placed   where a library allocates: of which nodes it writes the result where it is told to
    donated  inputs of the last entry, by name, that the caller gives away: a step may write over them as over a value
             that the run made, and kernels that write by strides the one output
    in_results  what dies before a result of an entry is written may lie there, where kernels write by strides
    ordered  steps run in the order that needs the least memory, where it is proven to need no more than program order
             at any sizes, and less at some

    Else the order is that of the nodes, groups at the place of their last one. A storage lives from the first step that
    writes it to the last that reads what lies in it, in views too. The graph stays as it is.
    """

    rewrites: ClassVar[bool] = False
    strided: bool = False
    grouped: Grouping = field(default=each_alone, repr=False)
    parts: Parts = field(default=every_part, repr=False)
    over: Over = field(default=over_nothing, repr=False)
    placed: Callable[[Node], bool] = field(default=allocates, repr=False)
    donated: tuple[str, ...] = ()
    in_results: bool = False
    ordered: bool = True

    @property
    def options(self) -> str:
        said = (("strided", self.strided), ("in program order", not self.ordered))
        words = [word for word, holds in said if holds]
        return ", ".join([*words, *(f"{name} donated" for name in self.donated)])

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        functions: dict[str, FunctionPlan] = {}
        peaks: dict[str, tuple[Size, ...]] = {}
        for function in graph.needed_by(*graph.later_entries):
            given_away = self.donated if function is graph.main else ()
            planner = _Planner(self, function, functions, function in graph.entries, given_away)
            over = self._over(functions)
            plan = planner.plan(self.grouped(function), over)
            if self.ordered:
                plan = self._reordered(plan, planner, over, peaks, graph.symbols)
            if self.strided:
                reuses = reused_arguments(plan, functions)
                own = plan.donated if function in graph.entries else reuses
                plan = replace(plan, reuses=tuple([v for v in reuses if v in own and not plan.given_back]))
            functions[function.name] = plan
            if function not in graph.entries:  # which nobody calls
                peaks[function.name] = self._peak(plan, planner, peaks, graph.symbols)
            if plan.reordered is not None:
                log.notes.append(f"{function.name}: {plan.reordered}")
        log.plan = StoragePlan(functions, self.strided, self.in_results)
        log.notes.insert(0, log.plan.note)
        log.touched = set()
        return 0

    def _over(self, callees: Mapping[str, FunctionPlan]) -> Over:
        """Over what a step may write; of a call, what its callee may write over."""

        def over(step: Step) -> Sequence[Value]:
            callee = step.root.op.called_in(callees)
            if callee is None:
                return self.over(step)
            given = step.root.operands
            operands = zip(callee.function.arguments, given, strict=True)
            return [v for formal, v in operands if v is not None and formal in callee.reuses and given.count(v) == 1]

        return over

    def _reordered(
        self,
        plan: FunctionPlan,
        planner: _Planner,
        over: Over,
        peaks: Mapping[str, tuple[Size, ...]],
        symbols: Mapping[str, Bounds],
    ) -> FunctionPlan:
        """The plan in the first order that needs less; else the plan as it is."""
        over_some = any(place.how is How.OVER for place in plan.places.values())
        apart = planner.plan(plan.steps, over_nothing) if over_some else plan
        frame = frame_of(apart, planner.callees, self.strided)
        peak: tuple[Size, ...] | None = None
        for choice in choices(apart, frame, over, peaks, symbols):
            if peak is None:
                peak = self._peak(plan, planner, peaks, symbols)
            other = planner.plan(choice.steps, over)
            saved = needs_less(peak, self._peak(other, planner, peaks, symbols), choice, symbols)
            if saved is not None:
                return replace(other, reordered=saved)
        return plan

    def _peak(
        self,
        plan: FunctionPlan,
        planner: _Planner,
        peaks: Mapping[str, tuple[Size, ...]],
        symbols: Mapping[str, Bounds],
    ) -> tuple[Size, ...]:
        return peak_of(frame_of(plan, planner.callees, self.strided), peaks, symbols)


class _Planner:
    """Plans of one function, in several orders; its callees are planned already.

    given  what its arguments fill, which is the same in all of them
    """

    def __init__(
        self,
        options: PlanStorage,
        function: Function,
        callees: Mapping[str, FunctionPlan],
        is_entry: bool,
        donated: Sequence[str],
    ) -> None:
        self.options, self.function, self.callees, self.is_entry = options, function, callees, is_entry
        self.donated = tuple([value for value in function.inputs if value.name in donated])
        self.uses, self.results = function.uses(), frozenset(function.results)
        self.given: dict[Value, View | Storage] = {}

    def plan(self, steps: Sequence[Step], over: Over) -> FunctionPlan:
        """The plan of these steps in this order."""
        if self.options.strided:
            return _Strided(self, steps, self.options.parts, over).plan()
        return _Allocated(self, steps, over).plan()


class _Planning(ABC):
    """One function in one order."""

    def __init__(self, planner: _Planner, steps: Sequence[Step]) -> None:
        self.planner, self.function, self.callees = planner, planner.function, planner.callees
        self.steps, self.uses = tuple(steps), planner.uses
        self.at = {node: i for i, step in enumerate(self.steps) for node in step.nodes}
        self.places: dict[Value, ValuePlace] = {}
        self.results: dict[str, Storage] = {}
        self.copied: tuple[str, ...] = ()
        self.given_back: dict[str, Value] = {}
        self.names: dict[Value, str] = {}
        self.last_reads: dict[Storage, int] = {}
        self._counts: dict[str, int] = {}
        self._taken: set[str] = set()
        made = [value for step in self.steps for node in step.nodes for value in node.results]
        for value in (*self.function.arguments, *made):
            self.names[value] = self._new_name(value.name)

    def plan(self) -> FunctionPlan:
        for value in self.function.arguments:
            self._given(value)
        self._add_results()
        for at, step in enumerate(self.steps):
            for value in step.inputs:
                if value.literal is not None and value not in self.places:
                    self._constant(value)
            for node in step.nodes[:-1]:
                for value in node.results:
                    self.places[value] = ValuePlace(None, None, How.INSIDE, step.root.results[0], at, at, False)
            for value in step.root.results:
                if value.state is None:
                    self._place(value, step.root)
                else:
                    self._update(value)
        for value in self.function.outputs.values():
            if value.literal is not None and value not in self.places:
                self._constant(value)
        lives = tuple(self._lives())
        donated = self.planner.donated
        return FunctionPlan(
            self.function,
            self.steps,
            self.places,
            self.names,
            lives,
            self.results,
            self.copied,
            donated=donated,
            given_back=self.given_back,
        )

    def _add_results(self) -> None:  # noqa: B027 - a library needs none
        """What the caller has ready for outputs."""

    @abstractmethod
    def _place(self, value: Value, node: Node) -> None:
        """Decide where a result lies."""

    # -- making places ---------------------------------------------------------------------------------------

    def _put(self, value: Value, lies: View | Storage, how: How, of: Value | str = "", written: bool = False) -> None:
        storage, view = (lies.storage, lies) if isinstance(lies, View) else (lies, None)
        first = BEFORE if value.node is None else self.at[value.node]
        last = self._last_read(value, first)
        self.places[value] = ValuePlace(storage, view, how, of, first, last, written)
        self.last_reads[storage] = max(last, self.last_reads.get(storage, last))

    def _last_read(self, value: Value, first: int) -> int:
        if value in self.planner.results:
            return len(self.steps)
        return max((self.at[node] for node, _ in self.uses.get(value, ())), default=first)

    def _given(self, value: Value) -> None:
        is_state = value.kind == "state"
        lies = self.planner.given.get(value)
        if lies is None:
            lies = self._whole(value, StorageKind.STATE if is_state else StorageKind.ARGUMENT)
            self.planner.given[value] = lies
        self._put(value, lies, How.STATE if is_state else How.GIVEN)

    def _update(self, value: Value) -> None:
        """A version of a state lies where the one before it does: nobody reads that any longer."""
        before = value.before
        assert before is not None
        lies = self.places[before].view or self.places[before].storage
        assert lies is not None
        self._put(value, lies, How.UPDATE, before, written=True)

    def _constant(self, value: Value) -> None:
        self.names[value] = self._new_name("constant")
        self._put(value, self._whole(value, StorageKind.CONSTANT), How.CONSTANT)

    def _whole(self, value: Value, kind: StorageKind, name: str = "") -> View | Storage:
        """A new storage that a value fills."""
        held, layout = value.type.held, value.layout
        elements = held.elements if layout is None else layout.elements(held.shape)
        return Storage(name or self.names[value], held.dtype, elements, kind, layout, value.literal)

    def _new_name(self, hint: str) -> str:
        count = self._counts.get(hint, 0)
        name = f"{hint}_{count}" if count else hint
        while name in self._taken:
            count += 1
            name = f"{hint}_{count}"
        self._counts[hint] = count + 1
        self._taken.add(name)
        return name

    def _may_be_written(self, storage: Storage) -> bool:
        """Whether a step may write over what dies there: what the run made, or was given away with the call."""
        donated = (self.places[v].storage for v in self.planner.donated)
        return storage.kind is StorageKind.LOCAL or any(storage is each for each in donated)

    # -- lives -----------------------------------------------------------------------------------------------

    def _lives(self) -> list[Life]:
        end = len(self.steps)
        found: dict[Storage, tuple[int, int]] = {}
        for place in self.places.values():
            if place.storage is not None:
                first, last = found.get(place.storage, (place.first, place.last))
                found[place.storage] = min(first, place.first), max(last, place.last)
        for storage in self.results.values():
            found[storage] = found.get(storage, (end, end))[0], end
        outlive = (StorageKind.ARGUMENT, StorageKind.CONSTANT, StorageKind.STATE)
        return [
            Life(s, BEFORE, end) if s.kind in outlive else Life(s, first, last) for s, (first, last) in found.items()
        ]


class _Allocated(_Planning):
    """What a library allocates, or writes where it is told to, whole: whatever is no view has a storage of its own, or
    that of an operand.

    A view is one of memory, or a copy where the library cannot help it: its operand's storage is counted as alive.
    """

    def __init__(self, planner: _Planner, steps: Sequence[Step], over: Over) -> None:
        super().__init__(planner, steps)
        self.over = over
        outputs = self.function.outputs.values() if planner.is_entry else ()
        self.handed_out = frozenset(self._owner(v) for v in outputs)

    def _owner(self, value: Value) -> Value:
        """In whose storage a value lies."""
        node = value.node
        while node is not None and value.state is None:
            shared = self._shared(value, node) if node.op.callee is not None else None
            if node.op.callee is None and node.op.is_view:
                (shared,) = node.inputs
            if shared is None:
                break
            value, node = shared, shared.node
        return value

    def _place(self, value: Value, node: Node) -> None:
        if node.op.callee is not None:
            self._place_result(value, node)
        elif node.op.is_view:
            (x,) = node.inputs
            self._view(value, x)
        else:
            step = self.steps[self.at[node]]
            dying = next((x for x in self.over(step) if self._dies_in(x, step, value)), None)
            storage = None if dying is None else self.places[dying].storage
            placed = self.planner.options.placed(node) and value not in self.handed_out
            if dying is None or storage is None:
                kind = StorageKind.LOCAL if placed else StorageKind.FOREIGN
                self._put(value, self._whole(value, kind), How.OWN, written=True)
            else:
                self._put(value, storage, How.OVER, dying, written=True)

    def _dies_in(self, x: Value, step: Step, value: Value) -> bool:
        """Whether a value may take the storage of x: that is x's alone and as large, and is read for the last time."""
        place = self.places[x]
        if place.storage is None or not self._may_be_written(place.storage) or place.how is How.VIEW:
            return False
        if value in self.handed_out and place.storage.kind is StorageKind.LOCAL:
            return False  # which the caller shall not have
        alike = x.type.dtype is value.type.dtype and x.type.shape == value.type.shape
        alone = all(self.places[v].storage is not place.storage for v in step.inputs if v is not x)
        return alike and alone and self.last_reads[place.storage] <= self.at[step.root]

    def _view(self, value: Value, of: Value) -> None:
        storage = self.places[of].storage
        assert storage is not None
        self._put(value, storage, How.VIEW, of)

    def _shared(self, value: Value, node: Node) -> Value | None:
        """What a callee may give that the caller has already: what it was given, a view of it, or one storage twice."""
        callee = self.callees[str(node.op.callee)]
        gives = [callee.places[output].storage for output in callee.function.outputs.values()]
        for argument, operand in zip(callee.function.arguments, node.inputs, strict=True):
            if callee.places[argument].storage is gives[value.index]:
                return operand
        earlier = gives.index(gives[value.index])
        return node.results[earlier] if earlier < value.index else None

    def _place_result(self, value: Value, node: Node) -> None:
        shared = self._shared(value, node)
        callee = self.callees[str(node.op.callee)]
        made = callee.places[[*callee.function.outputs.values()][value.index]].storage
        if shared is not None:
            self._view(value, shared)
        elif made is not None and made.kind is StorageKind.CONSTANT:
            self._put(value, made, How.CONSTANT)
        else:
            lies = self._whole(value, StorageKind.LOCAL)
            assert made is not None
            assert isinstance(lies, Storage)
            alike = (made.kind, made.dtype, made.elements) == (lies.kind, lies.dtype, lies.elements)
            told = alike and value not in self.handed_out
            self._put(value, lies if told else replace(lies, kind=StorageKind.FOREIGN), How.OWN, written=True)


class _Strided(_Planning):
    """What kernels write where they are told to.

    wanted  where a value must lie so that its reader need not move it, once that is decided
    """

    def __init__(self, planner: _Planner, steps: Sequence[Step], parts: Parts, over: Over) -> None:
        super().__init__(planner, steps)
        self.parts, self.over = parts, over
        self.wanted: dict[Value, tuple[View, Value | str]] = {}

    def _whole(self, value: Value, kind: StorageKind, name: str = "") -> View:
        storage = super()._whole(value, kind, name)
        assert isinstance(storage, Storage)
        return View.contiguous(storage, value.type.held.shape)

    def _add_results(self) -> None:
        copied = []
        for name, value in self.function.outputs.items():
            view = self._whole(value, StorageKind.RESULT, self._new_name(f"out_{name}"))
            self.results[name] = view.storage
            if value.node is None or value in self.wanted:
                copied.append(name)
            else:
                self.wanted[value] = view, name
        self.copied = tuple(copied)

    def _place(self, value: Value, node: Node) -> None:
        view = self._viewed(node)
        wanted = self.wanted.get(value)
        if view is not None and wanted is None:
            self._put(value, view, How.VIEW, node.inputs[0])
        elif view is not None and wanted is not None and view.lies_as(wanted[0]):
            of = wanted[1]
            self._put(value, view, *((How.VIEW, node.inputs[0]) if of is value else (How.INTO, of)))
        else:
            self._put(value, *self._destination(value, node), written=True)

    def _viewed(self, node: Node) -> View | None:
        """The result of a view as one of where its operand lies."""
        if not node.op.is_view:
            return None
        (x,) = node.inputs
        lies = self.places[x].view
        return None if lies is None or lies.panels is not None else node.op.viewed(lies, [x.type.held])

    def _destination(self, value: Value, node: Node) -> tuple[View, How, Value | str]:
        """Where to write a result."""
        alike = node.op.repeats([None if v is None else v.type for v in node.operands])
        if alike and value not in self.wanted:
            return self._repeated(value, alike), How.OWN, ""
        step = self.steps[self.at[node]]
        found = self._wanted(value, step)
        dying = next((x for x in self.over(step) if self._dies_in(x, step, value)), None)
        lies = None if dying is None else self.places[dying].view
        if found is not None and dying is not None and lies is not None and self._is_given_back(value, found[1], lies):
            return lies, How.OVER, dying
        if found is None:
            if dying is not None and lies is not None:
                return lies, How.OVER, dying
            return self._whole(value, StorageKind.LOCAL), How.OWN, ""
        view, of = found
        return view, How.OWN if of is value else How.INTO, of

    def _is_given_back(self, value: Value, of: Value | str, lies: View) -> bool:
        """Note that an output lies where a donated argument does, if it is one and that is so."""
        if not isinstance(of, str) or self.function.outputs.get(of) is not value:
            return False
        argument = next((v for v in self.planner.donated if self.places[v].storage is lies.storage), None)
        if argument is not None:
            self.given_back[of] = argument
        return argument is not None

    def _dies_in(self, x: Value, step: Step, value: Value) -> bool:
        """Whether a value may take the storage of x: it fills it, and all that lies there is read for the last time."""
        place = self.places[x]
        if place.storage is None or place.view is None or not self._may_be_written(place.storage):
            return False
        fills = place.view.is_contiguous and place.storage.elements == value.type.held.elements
        alone = all(self.places[v].storage is not place.storage for v in step.inputs if v is not x)
        return fills and alone and self.last_reads[place.storage] <= self.at[step.root]

    def _wanted(self, value: Value, step: Step, read_by_view: bool = False) -> tuple[View, Value | str] | None:
        """Where the caller or the one reader wants a value, and what it is a part of then: itself, if it is the owner.

        read_by_view  a view of it is asked for: that is wanted somewhere only if something need not be moved then
        """
        if value in self.wanted:
            return self.wanted[value]
        readers = self.uses.get(value, ())
        if len(readers) != 1 or len(readers[0][0].results) != 1 or value.layout is not None:
            return None
        ((reader, position),) = readers
        if reader.op.is_view and read_by_view:
            return None
        moved, types = reader.result, [None if v is None else v.type.held for v in reader.operands]
        held = moved.type.held
        fresh = Storage(self.names[moved], held.dtype, held.elements, StorageKind.LOCAL)
        of: Value | str = moved
        whole = View.contiguous(fresh, held.shape)
        part = reader.op.part_of(whole, types, position)
        if part is None:
            return None
        above = self._wanted(moved, self.steps[self.at[reader]], reader.op.is_view)
        inside = None if above is None else reader.op.part_of(above[0], types, position)
        if above is not None and inside is not None:
            (whole, of), part = above, inside
        if not self._is_written(step, part, reader):
            return None
        self.wanted[moved] = whole, of
        self.wanted[value] = part, value if of is moved and reader.op.is_view else moved
        return self.wanted[value]

    def _is_written(self, step: Step, part: View, reader: Node) -> bool:
        """Whether a step writes its result through a view, without a copy that it would not make otherwise."""
        if step.root.op.callee is not None or step.root.op.updates:
            return part.is_contiguous
        return reader.op.is_view or self.parts(step, part)

    def _repeated(self, value: Value, alike: Sequence[int]) -> View:
        """A new storage with one element along each axis where all are alike."""
        held = value.type.held
        shape = [ONE if axis in alike else size for axis, size in enumerate(held.shape)]
        storage = Storage(self.names[value], held.dtype, product(shape), StorageKind.LOCAL)
        return View.contiguous(storage, shape).broadcast(held.shape)
