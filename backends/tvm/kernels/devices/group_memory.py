"""Arrays of a kernel for threads, and the loads of their vectors, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from treadle.backends.tvm.kernels.devices.group_kernel import LackingWord
from treadle.backends.tvm.kernels.devices.statements import Access, Memory
from treadle.backends.tvm.kernels.devices.values import INDEX, GroupValue, ThreadNode, constant, index_node, operation


class GroupPointer:
    """A pointer argument of a kernel: a buffer, and an element offset that is added to every index."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.name, self.dtype = memory, memory.name, memory.dtype


class GroupView:
    """An array over a pointer or registers; strides are in elements."""

    def __init__(self, memory: Memory, strides: Sequence[ThreadNode], shape: Sequence[ThreadNode] = ()) -> None:
        self.memory, self.strides, self.shape = memory, tuple(strides), tuple(shape)
        self.name, self.dtype = memory.name, memory.dtype

    def flat_index(self, index: Sequence[Any]) -> ThreadNode:
        """Return the element's index in memory."""
        flat = constant(0, INDEX)
        for i, stride in zip([index_node(i) for i in index] or [constant(0, INDEX)], self.strides, strict=True):
            flat = operation("+", flat, operation("*", i, stride))
        return flat


class LoadedVector(GroupValue):
    """A vector in memory. It is loaded where it is used, as parts of single elements or of wider words.

    base   the index of the first lane's element
    group  the number of threads of a group

    Raises LackingWord for a number of lanes that a group cannot have.
    """

    def __init__(self, memory: Memory, base: ThreadNode, lanes: int, group: int) -> None:
        super().__init__((), lanes)
        self.memory, self.base, self.group = memory, base, group
        self._count = count_parts(lanes, group)
        self._saved: tuple[ThreadNode, ...] | None = None

    @property
    def parts(self) -> tuple[ThreadNode, ...]:
        if self._saved is None:
            self._saved = tuple(
                loaded(self.memory, self.base, self.lanes, part, self.group) for part in range(self._count)
            )
        return self._saved

    def as_words(self, type: str, factor: int) -> GroupValue:
        """Return the vector as words of `factor` elements each."""
        lanes = self.lanes // factor
        parts = [
            loaded(self.memory, self.base, lanes, part, self.group, wide=type, factor=factor)
            for part in range(count_parts(lanes, self.group))
        ]
        return GroupValue(parts, lanes)


def count_parts(lanes: int, group: int) -> int:
    """Return the number of parts of a vector. Raises LackingWord if a group cannot hold it."""
    if lanes % group and group % lanes:
        raise LackingWord("load", f"a vector of {lanes} lanes in a group of {group} threads")
    return max(1, lanes // group)


def loaded(
    memory: Memory,
    base: ThreadNode,
    lanes: int,
    part: int,
    group: int,
    *,
    offset: ThreadNode | None = None,
    wide: str | None = None,
    factor: int = 1,
) -> ThreadNode:
    """Return the load of one part of a vector. The arguments are those of `Access`."""
    access = Access(memory, base, lanes, part, group, offset, wide, factor)
    if wide is not None and offset is None:
        access = replace(access, offset=access.thread_offset)
    return ThreadNode("load", wide or memory.dtype.name, (), access)
