"""Kernel programs: what a graph becomes for the TVM backend. A flat list of steps over views, a routine a function.

    KernelStep   a kernel with its pointers and sizes, and the node it came from
    RoutineStep  a routine applied to views, as a repeated block is
    Routine      a function of the graph: arguments, results, steps, and how long each storage lives

Sizes and strides are expressions of the graph's symbols; `treadle.backends.tvm.planning` puts numbers in.
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
    """A function of the graph as steps.

    lives   its local storages, those of the plan and what single steps need beside, from the first of its own steps
            that
            may touch each to the last
    handed_out  of an entry: results for which a run allocates new memory, in which others may lie before
    """

    name: str
    arguments: list[Storage] = field(default_factory=list)
    results: list[Storage] = field(default_factory=list)
    steps: list[KernelStep | RoutineStep] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    handed_out: list[Storage] = field(default_factory=list)

    @property
    def frame(self) -> Frame:
        """What it holds of its own, by its own steps."""
        calls = {i: FrameCall(step.routine.name) for i, step in enumerate(self.steps) if isinstance(step, RoutineStep)}
        first: dict[Storage, int] = {}
        for at, step in enumerate(self.steps) if self.handed_out else ():
            for view in step.views:
                first.setdefault(view.storage, at)
        handed_out = tuple([Life(s, first[s], len(self.steps)) for s in self.handed_out if s in first])
        return Frame(self.name, tuple([step.node for step in self.steps]), tuple(self.lives), calls, handed_out)

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
    over       outputs that lie where a donated input does, by the names of both
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
        """Every symbol whose size a run of it needs."""
        steps = [step for routine in self.routines for step in routine.steps]
        sizes = [size for step in steps if isinstance(step, KernelStep) for size in step.sizes]
        sizes += [view.offset for step in steps for view in step.views]
        sizes += [view.storage.elements for step in steps for view in step.views]
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
