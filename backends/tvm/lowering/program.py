"""Kernel programs: a graph lowered for the TVM backend, as flat lists of steps over views, with one routine for each
function.

    KernelStep   a kernel with its pointers and sizes, and the node it came from
    RoutineStep  a call of a routine with views, for example a repeated block
    Routine      a function of the graph: arguments, results, steps, and the lifetime of each storage

Sizes and strides are expressions of the graph's symbols; `treadle.backends.tvm.planning` replaces them by numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.graph import Node
from treadle.ir.sizing.sizes import ONE, Size
from treadle.ir.storage.views import Storage, StorageKind, View
from treadle.ir.types import i64
from treadle.passes.memory.frames import Frame, FrameCall
from treadle.passes.memory.storage_plan import Life

STATUS = Storage("status", i64, Size.of(4), StorageKind.STATUS)
"""The status words, in which kernels report an index or a position out of range.

If an index is out of range, the words are 1, the index, the size of the axis, and the row. If a kernel appends to a row
that has no room, the words are 2, the start position, the capacity, and the row. Each kernel call in a plan has its own
words, which identify the node; see `treadle.backends.tvm.planning`.
"""

STATUS_WORDS = View(STATUS, (STATUS.elements,), (ONE,))
"""The view of the status words. It is the last pointer of a kernel that reports errors."""


@dataclass(eq=False)
class KernelStep:
    """A kernel call: its pointers, then its sizes, in the order that the kernel expects.

    writes   number of pointers to which the kernel writes, counted from the end
    note     reason why no faster kernel was used
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
    """A call of a routine: a view for each argument, then for each result. All views are contiguous."""

    routine: Routine
    arguments: tuple[View, ...]
    results: tuple[View, ...]
    node: Node

    @property
    def views(self) -> tuple[View, ...]:
        return (*self.arguments, *self.results)


@dataclass(eq=False)
class Routine:
    """A function of the graph as steps.

    lives       local storages of the plan and workspaces of single steps, each with the first and last step of the
                routine that may access it
    handed_out  for an entry: results for which a run allocates new memory; other values may use it before they are
                written
    """

    name: str
    arguments: list[Storage] = field(default_factory=list)
    results: list[Storage] = field(default_factory=list)
    steps: list[KernelStep | RoutineStep] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    handed_out: list[Storage] = field(default_factory=list)

    @property
    def frame(self) -> Frame:
        """Frame of the routine: its local storages, with lifetimes in steps of the routine."""
        calls = {i: FrameCall(step.routine.name) for i, step in enumerate(self.steps) if isinstance(step, RoutineStep)}
        first: dict[Storage, int] = {}
        for at, step in enumerate(self.steps) if self.handed_out else ():
            for view in step.views:
                first.setdefault(view.storage, at)
        handed_out = tuple([Life(s, first[s], len(self.steps)) for s in self.handed_out if s in first])
        return Frame(self.name, tuple([step.node for step in self.steps]), tuple(self.lives), calls, handed_out)

    def walk(self) -> Iterator[KernelStep]:
        """Yield the kernel steps of this routine, without the steps of routines that it calls."""
        return (s for s in self.steps if isinstance(s, KernelStep))


@dataclass(frozen=True)
class ProgramEntry:
    """An entry of the graph.

    routines   the routines it calls, callees first, its own last
    inputs     arguments that a caller passes, by name
    weights    arguments that are parameters
    states     arguments that are states, which are read and written
    outputs    the results, by name
    over       outputs stored in the memory of a donated input, by the names of both
    """

    routines: tuple[Routine, ...]
    inputs: dict[str, Storage]
    weights: dict[str, Storage]
    states: dict[str, Storage]
    outputs: dict[str, View]
    over: dict[str, str] = field(default_factory=dict)

    @property
    def routine(self) -> Routine:
        return self.routines[-1]

    @property
    def symbols(self) -> frozenset[str]:
        """All symbols whose sizes a run needs."""
        steps = [step for routine in self.routines for step in routine.steps]
        sizes = [size for step in steps if isinstance(step, KernelStep) for size in step.sizes]
        sizes += [view.offset for step in steps for view in step.views]
        sizes += [view.storage.elements for step in steps for view in step.views]
        return frozenset().union(*(size.symbols for size in sizes))


@dataclass(frozen=True)
class KernelProgram:
    """The program of a whole graph.

    routines   routines of all entries, callees first
    entries    entries by name; they share routines, weights and kernels
    """

    routines: tuple[Routine, ...]
    entries: dict[str, ProgramEntry]

    @property
    def main(self) -> Routine:
        """Routine of the last entry."""
        return self.routines[-1]


def kernels_of(program: KernelProgram) -> tuple[Kernel, ...]:
    """Return the distinct kernels, in the order of their first use in the program."""
    return tuple(dict.fromkeys(step.kernel for routine in program.routines for step in routine.walk()))
