"""Where the values of one function lie when its steps run in one order: what all ways of planning share.

`PlacedFunction` is what is known of a function whatever its order is. `Planning` goes through the steps, and gives each
value a place; derived by who writes by strides (`strided_places.py`) and by who calls a library (`library_places.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from treadle.ir.graph import Function, Node, Value
from treadle.ir.storage.views import Storage, StorageKind, View
from treadle.passes.memory.storage_plan import BEFORE, FunctionPlan, How, Life, Step, ValuePlace

Over = Callable[[Step], Sequence[Value]]
"""The operands that a step reads element by element, each for the result's element at its own place alone."""


class PlacedFunction:
    """A function, of which plans are made in several orders; its callees are planned already.

    is_entry  nobody in the graph calls it: what it hands out is its caller's own
    donated   arguments that the caller gives away
    given     of each argument the storage that it fills, the view, and whether it is a state
    names     of its arguments

    Most functions have far more arguments than steps: weights. What is known of these is the same in all orders.
    """

    def __init__(
        self, function: Function, callees: Mapping[str, FunctionPlan], is_entry: bool, donated: Sequence[str]
    ) -> None:
        self.function, self.callees, self.is_entry = function, callees, is_entry
        self.donated = tuple([value for value in function.inputs if value.name in donated])
        self.uses, self.results = function.uses(), frozenset(function.results)
        self.given: dict[Value, tuple[Storage, View | None, How]] = {}
        self.names = Names()
        for value in function.arguments:
            self.names.add(value)

    @cached_property
    def row_major(self) -> RowMajor:
        """How its values lie for a library, which makes row-major arrays."""
        return RowMajor(self.function)


class Names:
    """Names for values, no two alike."""

    def __init__(self, known: Names | None = None) -> None:
        self.of: dict[Value, str] = {} if known is None else dict(known.of)
        self._counts: dict[str, int] = {} if known is None else dict(known._counts)
        self._taken: set[str] = set() if known is None else set(known._taken)

    def add(self, value: Value, hint: str = "") -> None:
        """Name a value, by its own name if nothing else is told."""
        self.of[value] = self.new(hint or value.name)

    def new(self, hint: str) -> str:
        """A name that nothing has: `hint`, or with a number behind it."""
        count = self._counts.get(hint, 0)
        name = f"{hint}_{count}" if count else hint
        while name in self._taken:
            count += 1
            name = f"{hint}_{count}"
        self._counts[hint] = count + 1
        self._taken.add(name)
        return name


class RowMajor:
    """How the values of a function lie, where its arguments and all that its steps make are row-major.

    views   of each argument and result
    copies  results of views that no strides can say: a library copies the elements
    """

    def __init__(self, function: Function) -> None:
        self.views: dict[Value, View] = {}
        self.copies: set[Value] = set()
        for value in function.arguments:
            self.views[value] = _contiguous(value)
        for node in function.nodes:
            for value in node.results:
                self.views[value] = self._viewed(value, node) or _contiguous(value)

    def _viewed(self, value: Value, node: Node) -> View | None:
        if node.op.callee is not None or not node.op.is_view:
            return None
        (x,) = node.inputs
        view = node.op.viewed(self.of(x), [x.type.held])
        if view is None:
            self.copies.add(value)
        return view

    def of(self, value: Value) -> View:
        """How a value lies, constants too."""
        return self.views[value] if value in self.views else _contiguous(value)


def _contiguous(value: Value) -> View:
    held = value.type.held
    return View.contiguous(Storage(value.name, held.dtype, held.elements, StorageKind.LOCAL), held.shape)


class Planning(ABC):
    """One function in one order."""

    def __init__(self, planned: PlacedFunction, steps: Sequence[Step]) -> None:
        self.planned, self.function, self.callees = planned, planned.function, planned.callees
        self.steps, self.uses = tuple(steps), planned.uses
        self.at = {node: i for i, step in enumerate(self.steps) for node in step.nodes}
        self.places: dict[Value, ValuePlace] = {}
        self.results: dict[str, Storage] = {}
        self.copied: tuple[str, ...] = ()
        self.given_back: dict[str, Value] = {}
        self.workspaces: dict[int, Mapping[str, View]] = {}
        self.last_reads: dict[Storage, int] = {}
        self._named = Names(planned.names)
        self.names = self._named.of
        for step in self.steps:
            for node in step.nodes:
                for value in node.results:
                    self._named.add(value)

    def plan(self) -> FunctionPlan:
        self._add_given()
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
        donated = self.planned.donated
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
            workspaces=self.workspaces,
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
        if value in self.planned.results:
            return len(self.steps)
        return max([self.at[node] for node, _ in self.uses.get(value, ())], default=first)

    def _add_given(self) -> None:
        """Places of arguments, before all others."""
        given = self.planned.given
        for value in () if given else self.function.arguments:
            kind, how = (StorageKind.STATE, How.STATE) if value.kind == "state" else (StorageKind.ARGUMENT, How.GIVEN)
            lies = self._whole(value, kind)
            given[value] = (lies.storage, lies, how) if isinstance(lies, View) else (lies, None, how)
        for value, (storage, view, how) in given.items():
            last = self._last_read(value, BEFORE)
            self.places[value] = ValuePlace(storage, view, how, "", BEFORE, last, False)
            self.last_reads[storage] = last

    def _update(self, value: Value) -> None:
        """A version of a state lies where the one before it does: nobody reads that any longer."""
        before = value.before
        assert before is not None
        lies = self.places[before].view or self.places[before].storage
        assert lies is not None
        self._put(value, lies, How.UPDATE, before, written=True)

    def _constant(self, value: Value) -> None:
        self._named.add(value, "constant")
        self._put(value, self._whole(value, StorageKind.CONSTANT), How.CONSTANT)

    def _whole(self, value: Value, kind: StorageKind, name: str = "") -> View | Storage:
        """A new storage that a value fills."""
        held, layout = value.type.held, value.layout
        elements = held.elements if layout is None else layout.elements(held.shape)
        return Storage(name or self.names[value], held.dtype, elements, kind, layout, value.literal)

    def _may_be_written(self, storage: Storage) -> bool:
        """Whether a step may write over what dies there: what the run made, or was given away with the call."""
        donated = (self.places[v].storage for v in self.planned.donated)
        return storage.kind is StorageKind.LOCAL or any(storage is each for each in donated)

    # -- lives -----------------------------------------------------------------------------------------------

    def _lives(self) -> list[Life]:
        end = len(self.steps)
        found: dict[Storage, tuple[int, int]] = {}
        for place in self.places.values():
            if place.storage is None:
                continue
            known = found.setdefault(place.storage, (place.first, place.last))
            if place.last > known[1] or place.first < known[0]:
                found[place.storage] = min(known[0], place.first), max(known[1], place.last)
        for at, beside in self.workspaces.items():
            found |= {view.storage: (at, at) for view in beside.values()}
        for storage in self.results.values():
            found[storage] = found.get(storage, (end, end))[0], end
        outlive = (StorageKind.ARGUMENT, StorageKind.CONSTANT, StorageKind.STATE)
        return [
            Life(s, BEFORE, end) if s.kind in outlive else Life(s, first, last) for s, (first, last) in found.items()
        ]
