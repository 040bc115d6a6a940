"""Statements of a kernel for threads, and the memory that they access.

A kernel is first written as a tree of statements (`treadle.backends.tvm.kernels.devices.group_emitter`). Then
`barriers` decides which registers are shared and where threads wait, and a language prints the tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from treadle.backends.tvm.kernels.devices.values import LANE, ThreadNode, constant, divided, operation
from treadle.ir.types import DType

GLOBAL, SHARED, SCALARS, VECTORS = "global", "shared", "scalars", "vectors"


@dataclass(eq=False)
class Memory:
    """An array: a buffer of the kernel, or registers.

    count   number of elements; None for a buffer
    place   `global` for a buffer. Registers begin as None, until `place_registers` decides: `scalars` and `vectors` are
            private to a thread, `shared` is memory of the block
    step    number of lanes of a vector in private registers, whose index is divided by it
    is_written True if the kernel writes to it
    """

    name: str
    dtype: DType
    count: int | None = None
    place: str | None = None
    step: int = 1
    is_written: bool = False

    @property
    def cells(self) -> int:
        """Number of elements that are allocated, for each thread or for the block."""
        assert self.count is not None
        return -(-self.count // self.step) if self.place == VECTORS else self.count


@dataclass(frozen=True)
class Access:
    """A load or a store of one thread.

    base    index of the first lane's element
    lanes   number of lanes of the vector; 1 for a scalar
    part    number of the part (`values`)
    group   number of threads of a group
    offset  index of this thread's element after `base`, if it is not the one that `lanes` and `part` determine
    wide    type as which several consecutive elements are read or written together, or None
    factor  number of these elements
    """

    memory: Memory
    base: ThreadNode
    lanes: int
    part: int
    group: int
    offset: ThreadNode | None = None
    wide: str | None = None
    factor: int = 1

    @property
    def index(self) -> ThreadNode:
        """Index of the thread's element."""
        if self.memory.place == VECTORS:
            first = divided(self.base, self.memory.step)
            assert first is not None
            return operation("+", first, constant(self.part, "i64"))
        if self.offset is not None:
            return operation("+", self.base, self.offset)
        if self.lanes == 1:
            return self.base
        return operation("+", self.base, self.thread_offset)

    @property
    def thread_offset(self) -> ThreadNode:
        """Offset of a thread's first element from `base`, as `lanes` and `part` determine it."""
        if self.lanes == 1:
            return constant(0, "i64")
        lane = lane_of(self.lanes, self.part, self.group)
        return operation("*", lane, constant(self.factor, "i64"))

    @property
    def is_own(self) -> bool:
        """True if thread t accesses the element t after the base, modulo the number of threads."""
        return self.lanes > 1 and self.lanes % self.group == 0 and self.offset is None and self.factor == 1


def lane_of(lanes: int, part: int, group: int) -> ThreadNode:
    """Return the number of the lane that a thread has in a part of a vector."""
    if group == 1:
        return constant(part, "i64")
    if lanes < group:
        return operation("%", LANE, constant(lanes, "i64"))
    return operation("+", LANE, constant(part * group, "i64"))


class Statement:
    pass


@dataclass(frozen=True)
class Let(Statement):
    """Bind an expression to a variable."""

    variable: ThreadNode
    value: ThreadNode


@dataclass(frozen=True)
class Exchange(Statement):
    """Bind to a variable the value that another thread of the group has, by the instruction of a subgroup."""

    variable: ThreadNode
    value: ThreadNode
    thread: ThreadNode


@dataclass(frozen=True)
class Store(Statement):
    """Store a value.

    first   only the threads below this number store; None: all threads
    """

    access: Access
    value: ThreadNode
    first: int | None = None


@dataclass(frozen=True)
class Loop(Statement):
    """A loop from 0 to count - 1.

    unrolled  True if the count is a constant and the loop is to be unrolled
    tasks     True for the loop over the tasks of the kernel, which are divided among blocks
    """

    variable: ThreadNode
    count: ThreadNode
    body: list[Statement] = field(default_factory=list)
    unrolled: bool = False
    tasks: bool = False


@dataclass(frozen=True)
class When(Statement):
    """A block that runs if a condition holds, which is the same for all threads of a group."""

    condition: ThreadNode
    body: list[Statement] = field(default_factory=list)


@dataclass(frozen=True)
class Barrier(Statement):
    """All threads of a block wait for each other, and see what the others wrote."""


@dataclass(frozen=True)
class Declare(Statement):
    """Declare registers that are private to a thread."""

    memory: Memory


def walk(statements: list[Statement]) -> Iterator[Statement]:
    """Yield every statement, outer ones first."""
    for statement in statements:
        yield statement
        if isinstance(statement, (Loop, When)):
            yield from walk(statement.body)


def expressions_of(statement: Statement) -> tuple[ThreadNode, ...]:
    """Return the expressions that a statement evaluates, without the statements inside it."""
    match statement:
        case Let():
            return (statement.value,)
        case Exchange():
            return (statement.value, statement.thread)
        case Store():
            offset = () if statement.access.offset is None else (statement.access.offset,)
            return (statement.access.base, *offset, statement.value)
        case Loop():
            return (statement.count,)
        case When():
            return (statement.condition,)
    return ()
