"""Errors for data-dependent indices that are out of bounds. They are the same in all backends, and name the input that
contains the index, and the bound. A kernel raises the error; `located` adds the node.

A kernel that cannot raise an error writes four status words: a `StatusKind`, the index (or the start), the size of the
axis (or the capacity), and the row. `error_of` returns their error.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from treadle.ir.builder import describe_source
from treadle.ir.errors import BackendError
from treadle.ir.graph import Node, Value


class OutsideAxis(BackendError):
    """The error for an index that is out of the bounds of the axis."""

    def __init__(self, index: int, size: int) -> None:
        super().__init__(
            f"index {index} is outside an axis of size {size}",
            hint=f"indices from 0 to {size - 1}" if size else None,
        )
        self.index, self.size = index, size

    def located(self, node: Node | None, title: str) -> OutsideAxis:
        """Return the same error with the node that read the index, and the input that the index comes from."""
        found = OutsideAxis(self.index, self.size)
        found.what = f"{node.op.name if node else title}: {self.what}"
        found.args = (found.what,)
        if node is not None:
            origins = dict.fromkeys(_origin(value) for value in _indices(node))
            found.received = f"{self.index} in {' or '.join(origins)}" if origins else None
            found.source = describe_source(node.source, node.scope)
        return found


class NoRoom(BackendError):
    """The error for appended elements of a row that do not fit into the capacity of the state."""

    def __init__(self, row: int, start: int, capacity: int) -> None:
        super().__init__(
            f"row {row} has no room: it starts at {start}, the capacity is {capacity}",
            hint="a state of greater capacity" if start >= 0 else None,
        )
        self.row, self.start, self.capacity = row, start, capacity

    def located(self, node: Node | None, title: str) -> NoRoom:
        """Return the same error with the node that appended to the row."""
        found = NoRoom(self.row, self.start, self.capacity)
        found.what = f"{node.op.name if node else title}: {self.what}"
        found.args = (found.what,)
        found.source = describe_source(node.source, node.scope) if node is not None else None
        return found


class StatusKind(IntEnum):
    """The first status word: the kind of error."""

    OUTSIDE_AXIS = 1
    NO_ROOM = 2


def error_of(words: Sequence[int]) -> OutsideAxis | NoRoom:
    """Return the error that four status words report."""
    what, index, size, row = words
    return OutsideAxis(index, size) if what == StatusKind.OUTSIDE_AXIS else NoRoom(row, index, size)


def _indices(node: Node) -> list[Value]:
    """Return the operands of a node that hold indices: the operand `indices`, or the rows of a cache, else all integer
    operands.
    """
    named = dict(zip(node.op.operand_names(len(node.operands)), node.operands, strict=True))
    for name in ("indices", "rows"):
        if (value := named.get(name)) is not None:
            return [value]
    return [value for value in node.operands if value is not None and value.type.dtype.is_int]


def _origin(value: Value) -> str:
    """Return the name of a value. If the value results from ops of one operand, also name the input that it is computed
    from.
    """
    first = value
    while value.node is not None and value.node.op.callee is None and len(value.node.operands) == 1:
        operand = value.node.operands[0]
        if operand is None:
            break
        value = operand
    if value.kind != "input":
        return first.name
    return f"input {value.name}" if value is first else f"{first.name}, computed from input {value.name}"
