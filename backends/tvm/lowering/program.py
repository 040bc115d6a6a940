"""Kernel programs: what a graph becomes for the TVM backend. A flat list of steps over buffers, a routine a function.

    Buffer       memory that is an argument, a result, a constant or a local of a routine
    View         a buffer under a shape: a size and a stride for each dimension, in elements; or a weight in panels
    KernelStep   a kernel with its pointers and sizes, and the node it came from
    RoutineStep  a routine applied to views, as a repeated block is
    Routine      a function of the graph: arguments, results, steps

Sizes and strides are expressions of the graph's symbols; `treadle.backends.tvm.planning` puts numbers in.
Reshaping is done in views where strides can say it: see `split`, `merged`, `rearranged`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise

from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.graph import Node
from treadle.ir.layouts import Layout
from treadle.ir.literals import Literal
from treadle.ir.sizing.sizes import ONE, ZERO, Size, product
from treadle.ir.types import DType, i64


class BufferKind(Enum):
    """Whose memory a buffer is: the caller's (an argument, a result), the program's (a constant), the routine's own (a
    local), or the plan's, in which kernels tell what went wrong."""

    ARGUMENT = "argument"
    RESULT = "result"
    CONSTANT = "constant"
    LOCAL = "local"
    STATUS = "status"


@dataclass(eq=False)
class Buffer:
    """Memory; elements as a size expression."""

    name: str
    dtype: DType
    elements: Size
    kind: BufferKind
    layout: Layout | None = None
    literal: Literal | None = None

    def __repr__(self) -> str:
        return f"<{self.kind.value} {self.name}: {self.dtype}[{self.elements}]>"


@dataclass(frozen=True)
class View:
    """A buffer under a shape. Element i, j, ... lies at offset + i * strides[0] + j * strides[1] + ...

    A view of a buffer in panels has the parameter's shape and no strides that mean anything: `panels` tells.
    """

    buffer: Buffer
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size = ZERO

    @staticmethod
    def contiguous(buffer: Buffer, shape: Sequence[Size]) -> View:
        """The whole buffer in row-major order."""
        return View(buffer, tuple(shape), row_major(shape))

    @property
    def dtype(self) -> DType:
        return self.buffer.dtype

    @property
    def panels(self) -> Layout | None:
        return self.buffer.layout

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps, at whatever offset."""
        expected = row_major(self.shape)
        pairs = zip(self.shape, self.strides, expected, strict=True)
        return self.panels is None and all(n == ONE or s == e for n, s, e in pairs)

    def permuted(self, order: Sequence[int]) -> View:
        """Dimensions in another order."""
        return replace(self, shape=tuple(self.shape[i] for i in order), strides=tuple(self.strides[i] for i in order))

    def split(self, axis: int, sizes: Sequence[Size]) -> View:
        """One dimension as several, outermost first."""
        strides = [self.strides[axis] * s for s in row_major(sizes)]
        return replace(
            self,
            shape=(*self.shape[:axis], *sizes, *self.shape[axis + 1 :]),
            strides=(*self.strides[:axis], *strides, *self.strides[axis + 1 :]),
        )

    def sliced(self, axis: int, start: Size, size: Size, step: Size = ONE) -> View:
        """`size` of the elements along one dimension: from `start` on, `step` apart."""
        return replace(
            self,
            shape=(*self.shape[:axis], size, *self.shape[axis + 1 :]),
            strides=(*self.strides[:axis], self.strides[axis] * step, *self.strides[axis + 1 :]),
            offset=self.offset + self.strides[axis] * start,
        )

    def merged(self, axis: int, count: int) -> View | None:
        """`count` dimensions from `axis` on as one; None where no stride says it. With 0 a dimension of 1 is added."""
        shape, strides = self.shape[axis : axis + count], self.strides[axis : axis + count]
        kept = [(n, s) for n, s in zip(shape, strides, strict=True) if n != ONE]
        for (_, outer), (size, inner) in pairwise(kept):
            if outer != size * inner:
                return None
        stride = kept[-1][1] if kept else ONE
        return replace(
            self,
            shape=(*self.shape[:axis], product(shape), *self.shape[axis + count :]),
            strides=(*self.strides[:axis], stride, *self.strides[axis + count :]),
        )

    def broadcast(self, shape: Sequence[Size]) -> View:
        """Repeated to a shape, as NumPy broadcasts: leading dimensions and those of size 1 get stride 0."""
        new = len(shape) - self.rank
        old = zip(shape[new:], self.shape, self.strides, strict=True)
        return replace(self, shape=tuple(shape), strides=(*[ZERO] * new, *[s if n == m else ZERO for n, m, s in old]))

    def __str__(self) -> str:
        inside = ", ".join(map(str, self.shape))
        return f"{self.buffer.name}[{inside}]"


STATUS = Buffer("status", i64, Size.of(4), BufferKind.STATUS)
"""Where a kernel that is given indices tells of one that lies outside: 1, the index, the size of its axis, the row. One
that is given places to go on from tells of a row that has no room: 2, its start, the capacity, the row.

Each call of a kernel in a plan has words of its own, so that the node is known; see `treadle.backends.tvm.planning`.
"""

STATUS_WORDS = View(STATUS, (STATUS.elements,), (ONE,))
"""What a kernel is passed to tell there, as the last of its pointers."""


@dataclass(eq=False)
class KernelStep:
    """A kernel applied: its pointers, then its sizes, in the order in which it asks for them.

    writes   how many of the pointers, the last ones, it writes
    note     why this kernel, where a faster one was not to be had
    """

    kernel: Kernel
    pointers: tuple[View, ...]
    sizes: tuple[Size, ...]
    node: Node | None
    writes: int = 1
    note: str = ""

    @property
    def views(self) -> tuple[View, ...]:
        return self.pointers


@dataclass(eq=False)
class RoutineStep:
    """A routine applied: a view for each of its arguments, then for each of its results; all contiguous."""

    routine: Routine
    arguments: tuple[View, ...]
    results: tuple[View, ...]
    node: Node

    @property
    def views(self) -> tuple[View, ...]:
        return (*self.arguments, *self.results)


@dataclass(eq=False)
class Routine:
    """A function of the graph as steps."""

    name: str
    arguments: list[Buffer] = field(default_factory=list)
    results: list[Buffer] = field(default_factory=list)
    steps: list[KernelStep | RoutineStep] = field(default_factory=list)

    def walk(self) -> Iterator[KernelStep]:
        """The steps of this routine, not of those it calls."""
        return (s for s in self.steps if isinstance(s, KernelStep))


@dataclass(frozen=True)
class ProgramEntry:
    """An entry of the graph.

    routines   what it calls, callees first, its own last
    inputs     the arguments that a caller passes, by name
    weights    the arguments that are parameters
    states     the arguments that are states, which are read and written
    outputs    the results, by name
    """

    routines: tuple[Routine, ...]
    inputs: dict[str, Buffer]
    weights: dict[str, Buffer]
    states: dict[str, Buffer]
    outputs: dict[str, View]

    @property
    def routine(self) -> Routine:
        return self.routines[-1]

    @property
    def symbols(self) -> frozenset[str]:
        """Every symbol whose size a run of it needs."""
        steps = [step for routine in self.routines for step in routine.steps]
        sizes = [size for step in steps if isinstance(step, KernelStep) for size in step.sizes]
        sizes += [view.offset for step in steps for view in step.views]
        sizes += [view.buffer.elements for step in steps for view in step.views]
        return frozenset().union(*(size.symbols for size in sizes))


@dataclass(frozen=True)
class KernelProgram:
    """A whole graph.

    routines   of all entries, callees first
    entries    by name; what they have in common are routines, weights and kernels
    """

    routines: tuple[Routine, ...]
    entries: dict[str, ProgramEntry]

    @property
    def main(self) -> Routine:
        """That of the last entry."""
        return self.routines[-1]


def kernels_of(program: KernelProgram) -> tuple[Kernel, ...]:
    """The distinct kernels, in the order in which the program names them."""
    return tuple(dict.fromkeys(step.kernel for routine in program.routines for step in routine.walk()))


def row_major(shape: Sequence[Size]) -> tuple[Size, ...]:
    """The strides of an array whose elements lie in row-major order without gaps."""
    strides: list[Size] = []
    stride = ONE
    for size in reversed(shape):
        strides.append(stride)
        stride = stride * size
    return tuple(reversed(strides))
