"""Storages for kernels that write to a given destination, by strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from treadle.ir.graph import Node, Value
from treadle.ir.sizing.sizes import ONE, product
from treadle.ir.storage.views import Storage, StorageKind, View
from treadle.passes.memory.storage_plan import How, Step
from treadle.passes.memory.value_places import Over, PlacedFunction, Planning

Parts = Callable[[Step, View], bool]
"""A predicate: True if a step can write its result through a view with gaps, without a copy."""


class StridedPlanning(Planning):
    """A plan for kernels that write to a given destination.

    wanted  the destinations that save a reader a move, by value, as far as they are decided
    """

    def __init__(self, planned: PlacedFunction, steps: Sequence[Step], parts: Parts, over: Over) -> None:
        super().__init__(planned, steps)
        self.parts, self.over = parts, over
        self.wanted: dict[Value, tuple[View, Value | str]] = {}

    def _whole(self, value: Value, kind: StorageKind, name: str = "") -> View:
        storage = super()._whole(value, kind, name)
        assert isinstance(storage, Storage)
        return View.contiguous(storage, value.type.storage_type.shape)

    def _add_results(self) -> None:
        copied = []
        for name, value in self.function.outputs.items():
            view = self._whole(value, StorageKind.RESULT, self._named.new(f"out_{name}"))
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
        """Return the result of a view op as a view of its operand's storage."""
        if not node.op.is_view:
            return None
        (x,) = node.inputs
        lies = self.places[x].view
        return None if lies is None or lies.panels is not None else node.op.viewed(lies, [x.type.storage_type])

    def _destination(self, value: Value, node: Node) -> tuple[View, How, Value | str]:
        """Return the destination of a result."""
        alike = node.op.repeats([None if v is None else v.type for v in node.operands])
        if alike and value not in self.wanted:
            return self._repeated(value, alike), How.OWN, ""
        step = self.steps[self.at[node]]
        found = self._wanted(value, step)
        dying = [(x, lies) for x in self.over(step) if (lies := self._left_by(x, step, value)) is not None]
        if found is None:
            if dying:
                x, lies = dying[0]
                return lies, How.OVER, x
            return self._whole(value, StorageKind.LOCAL), How.OWN, ""
        for x, lies in dying:
            if self._is_given_back(value, found[1], lies):
                return lies, How.OVER, x
        view, of = found
        return view, How.OWN if of is value else How.INTO, of

    def _is_given_back(self, value: Value, of: Value | str, lies: View) -> bool:
        """Return True if a value is an output whose storage is a donated argument's. If so, record it as given back."""
        if not isinstance(of, str) or self.function.outputs.get(of) is not value:
            return False
        argument = next((v for v in self.planned.donated if self.places[v].storage is lies.storage), None)
        if argument is not None:
            self.given_back[of] = argument
        return argument is not None

    def _left_by(self, x: Value, step: Step, value: Value) -> View | None:
        """Return the view of x if a value may take its storage: x fills the storage, and x is read for the last time.
        Otherwise return None.
        """
        place = self.places[x]
        if place.storage is None or place.view is None or not self._may_be_written(place.storage):
            return None
        fills = place.view.is_contiguous and place.storage.elements == value.type.storage_type.elements
        alone = all(self.places[v].storage is not place.storage for v in step.inputs if v is not x)
        dies = self.last_reads[place.storage] <= self.at[step.root]
        return place.view if fills and alone and dies else None

    def _wanted(self, value: Value, step: Step, read_by_view: bool = False) -> tuple[View, Value | str] | None:
        """Return the destination that the caller or the only reader of a value requires, and the owner of the storage:
        the value itself or a whole of which it is a part. Return None if there is none.

        read_by_view  True if the value is read through a view: then there is a destination only if that can save a move
        """
        if value in self.wanted:
            return self.wanted[value]
        readers = self.uses.get(value, ())
        if len(readers) != 1 or len(readers[0][0].results) != 1 or value.layout is not None:
            return None
        ((reader, position),) = readers
        if reader.op.is_view and read_by_view:
            return None
        moved, types = reader.result, [None if v is None else v.type.storage_type for v in reader.operands]
        held = moved.type.storage_type
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
        """Return True if a step writes its result through a view without an additional copy."""
        if step.root.op.callee is not None or step.root.op.updates:
            return part.is_contiguous
        return reader.op.is_view or self.parts(step, part)

    def _repeated(self, value: Value, alike: Sequence[int]) -> View:
        """Return a view of a new storage that has one element along each axis on which all elements are equal."""
        held = value.type.storage_type
        shape = [ONE if axis in alike else size for axis, size in enumerate(held.shape)]
        storage = Storage(self.names[value], held.dtype, product(shape), StorageKind.LOCAL)
        return View.contiguous(storage, shape).broadcast(held.shape)
