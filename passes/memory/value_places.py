"""Storages of the values of one function for one order of its steps: the code that all planners share.

`PlacedFunction` holds the facts of a function that do not depend on the order. `Planning` visits the steps, and decides
the storage of each value. Its subclasses are for kernels that write by strides (`strided_places.py`) and for libraries
(`library_places.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from treadle.ir.graph import Function, Node, Value
from treadle.ir.storage.views import Storage, StorageKind, View
from treadle.passes.memory.storage_plan import BEFORE, FunctionPlan, How, Life, Step, ValuePlace

Over = Callable[[Step], Sequence[Value]]
"""A function that returns the operands that a step reads element by element, each only for the result's element at the
same index.
"""


class PlacedFunction:
    """A function that is planned in several orders; its callees are already planned.

    is_entry  True if no function of the graph calls it: its outputs belong to its caller
    donated   arguments that the caller donates
    given     for each argument the storage that it fills, the view, and the reason (argument or state)
    names     names of its arguments

    Most functions have far more arguments than steps, most of them weights. The facts about arguments are the same in
    all orders.
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
        """The views of the function's values for a library that returns row-major arrays."""
        return RowMajor(self.function)


class Names:
    """Unique names for values."""

    def __init__(self, known: Names | None = None) -> None:
        self.of: dict[Value, str] = {} if known is None else dict(known.of)
        self._counts: dict[str, int] = {} if known is None else dict(known._counts)
        self._taken: set[str] = set() if known is None else set(known._taken)

    def add(self, value: Value, hint: str = "") -> None:
        """Name a value: by the hint, or by its own name if there is no hint."""
        self.of[value] = self.new(hint or value.name)

    def new(self, hint: str) -> str:
        """Return an unused name: `hint`, or `hint` with a number."""
        count = self._counts.get(hint, 0)
        name = f"{hint}_{count}" if count else hint
        while name in self._taken:
            count += 1
            name = f"{hint}_{count}"
        self._counts[hint] = count + 1
        self._taken.add(name)
        return name


class RowMajor:
    """The views of a function's values, if its arguments and the results of all its steps are row-major.

    views   the view of each argument and result
    copies  results of views that strides cannot express: a library copies the elements
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
        view = node.op.viewed(self.of(x), [x.type.storage_type])
        if view is None:
            self.copies.add(value)
        return view

    def of(self, value: Value) -> View:
        """Return the view of a value, which may be a constant."""
        return self.views[value] if value in self.views else _contiguous(value)


def _contiguous(value: Value) -> View:
    held = value.type.storage_type
    return View.contiguous(Storage(value.name, held.dtype, held.elements, StorageKind.LOCAL), held.shape)


class Planning(ABC):
    """The planning of one function with its steps in one order."""

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
        """Add the storages that the caller provides for outputs."""

    @abstractmethod
    def _place(self, value: Value, node: Node) -> None:
        """Decide the storage of a result."""

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
        """Add the places of arguments, before all others."""
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
        """Place a version of a state in the storage of the previous version, which is no longer read."""
        before = value.before
        assert before is not None
        lies = self.places[before].view or self.places[before].storage
        assert lies is not None
        self._put(value, lies, How.UPDATE, before, written=True)

    def _constant(self, value: Value) -> None:
        self._named.add(value, "constant")
        self._put(value, self._whole(value, StorageKind.CONSTANT), How.CONSTANT)

    def _whole(self, value: Value, kind: StorageKind, name: str = "") -> View | Storage:
        """Return a new storage that a value fills, as a view if strides are planned."""
        held, layout = value.type.storage_type, value.layout
        elements = held.elements if layout is None else layout.elements(held.shape)
        return Storage(name or self.names[value], held.dtype, elements, kind, layout, value.literal)

    def _may_be_written(self, storage: Storage) -> bool:
        """Return True if a step may overwrite a dead value of a storage: the value was computed in the run, or the
        caller donated it.
        """
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
