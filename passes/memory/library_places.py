"""Storage planning for libraries that allocate their results, or that write whole arrays to a given destination."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from treadle.ir.graph import Node, Value
from treadle.ir.storage.views import Storage, StorageKind, View
from treadle.ir.types import Type
from treadle.passes.memory.storage_plan import How, Step
from treadle.passes.memory.value_places import Over, PlacedFunction, Planning

Lies = Callable[[Value], View]
"""A function that returns the view of a value, if all values of a run are row-major."""


def allocates(node: Node) -> bool:
    """Return False: a library allocates the result of every node."""
    return False


Workspaces = Callable[[Node, Lies], Mapping[str, Type]]
"""A function that returns the workspaces of a node's call, by name."""


def nothing_beside(node: Node, lies: Lies) -> Mapping[str, Type]:
    """Return no workspaces: calls need no memory of the plan in addition to their results."""
    return {}


class LibraryPlanning(Planning):
    """A plan for results that a library allocates, or writes as a whole to a given destination. A value that is not a
    view has its own storage, or the storage of an operand.

    A view has its operand's storage. If strides cannot express the view, the library copies the elements. If `copies`
    is set, the copy is planned with its own storage. Otherwise the operand's storage stays live as long as the view.
    """

    def __init__(
        self,
        planned: PlacedFunction,
        steps: Sequence[Step],
        over: Over,
        placed: Callable[[Node], bool],
        workspaces: Workspaces,
        copies: bool,
    ) -> None:
        super().__init__(planned, steps)
        self.over, self.placed, self.needed = over, placed, workspaces
        self.copies = planned.row_major.copies if copies else frozenset[Value]()
        outputs = self.function.outputs.values() if planned.is_entry else ()
        self.handed_out = frozenset(self._owner(v) for v in outputs)

    def _owner(self, value: Value) -> Value:
        """Return the value whose storage a value shares."""
        node = value.node
        while node is not None and value.state is None:
            shared = self._shared(value, node) if node.op.callee is not None else None
            if node.op.callee is None and node.op.is_view and value not in self.copies:
                (shared,) = node.inputs
            if shared is None:
                break
            value, node = shared, shared.node
        return value

    def _place(self, value: Value, node: Node) -> None:
        if node.op.callee is not None:
            self._place_result(value, node)
        elif node.op.is_view and value not in self.copies:
            (x,) = node.inputs
            self._view(value, x)
        else:
            step = self.steps[self.at[node]]
            dying = next((x for x in self.over(step) if self._dies_in(x, step, value)), None)
            storage = None if dying is None else self.places[dying].storage
            placed = self.placed(node)
            if dying is None or storage is None:
                is_local = placed and value not in self.handed_out
                self._put(
                    value,
                    self._whole(value, StorageKind.LOCAL if is_local else StorageKind.FOREIGN),
                    How.OWN,
                    written=True,
                )
            else:
                self._put(value, storage, How.OVER, dying, written=True)
            if placed:
                self._beside(value, node)

    def _beside(self, value: Value, node: Node) -> None:
        """Add the workspaces of a call."""
        views = {}
        for name, each in self.needed(node, self.planned.row_major.of).items():
            storage_name = self._named.new(f"{self.names[value]}_{name}")
            storage = Storage(storage_name, each.dtype, each.elements, StorageKind.LOCAL)
            views[name] = View.contiguous(storage, each.shape)
        if views:
            self.workspaces[self.at[node]] = views

    def _dies_in(self, x: Value, step: Step, value: Value) -> bool:
        """Return True if a value may take the storage of x: only x uses the storage, the sizes are equal, and x is read
        for the last time.
        """
        place = self.places[x]
        if place.storage is None or not self._may_be_written(place.storage) or place.how is How.VIEW:
            return False
        if value in self.handed_out and place.storage.kind is StorageKind.LOCAL:
            return False  # the caller must not get this storage
        alike = x.type.is_held_like(value.type)
        alone = all(self.places[v].storage is not place.storage for v in step.inputs if v is not x)
        return alike and alone and self.last_reads[place.storage] <= self.at[step.root]

    def _view(self, value: Value, of: Value) -> None:
        storage = self.places[of].storage
        assert storage is not None
        self._put(value, storage, How.VIEW, of)

    def _shared(self, value: Value, node: Node) -> Value | None:
        """Return the value whose storage a callee's result shares: an argument, a view of one, or an earlier result.
        Return None if it shares none.
        """
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
            is_local = alike and value not in self.handed_out
            self._put(value, lies if is_local else replace(lies, kind=StorageKind.FOREIGN), How.OWN, written=True)
