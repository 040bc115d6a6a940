"""Executables of kernels: weights in place, offsets chosen once for each set of sizes, each call one table of calls.

The first call with new sizes makes a `Plan`: sizes and strides become numbers, locals get offsets in one arena,
every kernel call a record. Later calls write the addresses of inputs and outputs into the table and run it.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from treadle.backends.bfloat16 import bf16_given, bf16_taken
from treadle.backends.outside_axis import OutsideAxis
from treadle.backends.protocol import Outputs, Port, ports
from treadle.backends.signature import Signature, numpy_taken
from treadle.backends.tvm.arena import ALIGNMENT, Lifetime, check_arena, plan_arena
from treadle.backends.tvm.kernels import tvm_runtime
from treadle.backends.tvm.kernels.cache import Entry, KernelCache, assembly
from treadle.backends.tvm.kernels.calling import INTEGER, POINTER, address, function_of
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.runner import RECORD, Runner
from treadle.backends.tvm.lowering.leftovers import find_leftovers
from treadle.backends.tvm.lowering.listing import list_program, unique_titles
from treadle.backends.tvm.lowering.program import Buffer, Call, KernelProgram, Routine, Slot, Step, View, kernels_of
from treadle.ir.builder import describe_source
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph
from treadle.ir.sizes import product
from treadle.ir.types import DType

Array = np.ndarray[Any, Any]

# What a core does, roughly, and what it takes to wake a pool of threads and wait for it.
_BYTES_A_SECOND, _FLOPS_A_SECOND, _WAKING = 20e9, 50e9, 10e-6
PLANS = 32  # sets of sizes that are kept


@dataclass
class Relocation:
    """Words of a plan's arguments that hold addresses in one buffer, with the offsets in bytes."""

    at: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def arrays(self) -> tuple[Array, Array]:
        return np.array(self.at, np.int64), np.array(self.offsets, np.int64)


@dataclass
class Plan:
    """The program at one set of sizes.

    table      a record a kernel call; see `treadle.backends.tvm.kernels.runner`
    words      all arguments, 16 bytes each: a type index and a value
    moves      by the name of an input or output, "" for the arena, or "status": which words hold its addresses
    arena      bytes that locals need
    shapes     of the outputs
    steps      for each record the step that it came from
    status     four words for each record that is given indices, in order; see `program.STATUS`
    tellers    the steps of these records
    """

    table: Array
    words: Array
    moves: Mapping[str, tuple[Array, Array]]
    arena: int
    shapes: Mapping[str, tuple[int, ...]]
    steps: Sequence[Step]
    lives: Mapping[str, Sequence[Lifetime]]
    status: Array
    tellers: Sequence[Step]


class KernelExecutable:
    """A graph compiled to kernels. See `treadle.backends.protocol.Executable`.

    program   the steps
    threads   how many threads kernels use
    notes     what runs element by element, since no fast kernel covers it
    """

    def __init__(
        self,
        graph: Graph,
        program: KernelProgram,
        cache: KernelCache,
        weights: Mapping[Slot, Array],
        threads: int,
        entries: Mapping[Kernel, Entry],
        prepared: Sequence[str] = (),
    ) -> None:
        """Weights by slot, and kernels.

        entries   where the kernels' code is, and the runner's; none where this machine cannot run it
        prepared  what was computed from weights when they were bound, a line each
        """
        self._prepared = prepared
        self.name = graph.name
        self.signature = Signature(graph)
        self.inputs = self.signature.ports
        self.outputs = ports(graph.main.outputs)
        self.signature.refuse_untold(program.symbols)
        self.program, self.cache, self.threads = program, cache, threads
        self.notes = find_leftovers(program, graph.symbols)
        self.compiled = cache.compiled
        self._entries = entries
        self._weights = {program.weights[slot]: array for slot, array in weights.items()}
        self._constants: dict[Buffer, Array] = {}
        self._plans: OrderedDict[tuple[tuple[str, int], ...], Plan] = OrderedDict()
        self._arena = np.empty(0, np.uint8)
        self._lock = threading.Lock()
        self._runner = entries.get(Runner())
        self._result = np.zeros(1, np.int64)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The distinct kernels, in the order in which the program names them."""
        return kernels_of(self.program)

    @cached_property
    def source(self) -> str:
        """The program as a listing of its steps, then every distinct kernel as TVMScript."""
        return list_program(self.name, self.program, self.cache.isa, self._prepared)

    def assembly(self, title: str) -> str:
        """The assembly of a kernel, by its name in `source`. Raises BackendError where there is none of that name."""
        titles = {name: kernel for kernel, name in unique_titles(self.kernels).items()}
        if title not in titles:
            raise BackendError(f"there is no kernel {title!r}", hint="one of " + ", ".join(titles))
        return assembly(titles[title], self.cache.isa)

    # -- calling ---------------------------------------------------------------------------------------------

    def __call__(self, /, **given: Any) -> Outputs:
        """Run on arrays by name. Raises BackendError where they are not what `inputs` says."""
        if self._runner is None:
            self.cache.refuse_other_machine()
        taken = self.signature.bind(given, take)
        sizes = self.signature.sizes([array.shape for array in taken])
        arrays = dict(zip(self.program.inputs, taken, strict=True))
        with self._lock:
            plan = self._plan(sizes)
            made = {p.name: _allocated(plan.shapes[p.name], stored(p.dtype)) for p in self.outputs}
            places = {f"in {n}": a for n, a in arrays.items()} | {f"out {n}": a for n, a in made.items()}
            self._run(plan, places | {"status": plan.status})
        tensors = any(_is_tensor(value) for value in given.values())
        return Outputs({p.name: give(p, made[p.name], tensors) for p in self.outputs})

    def _plan(self, sizes: Mapping[str, int]) -> Plan:
        key = tuple(sorted(sizes.items()))
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        try:
            plan = Planner(self, sizes).plan()
        except OverflowError as error:  # of 64 bits
            told = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise BackendError(f"{self.name}: no memory is as large as these sizes take", received=told) from error
        self._plans[key] = plan
        if len(self._plans) > PLANS:
            self._plans.popitem(last=False)
        return plan

    def _run(self, plan: Plan, arrays: Mapping[str, Array]) -> None:
        if self._arena.nbytes < plan.arena + ALIGNMENT:
            self._arena = _allocated((plan.arena + ALIGNMENT,), np.dtype(np.uint8))
        base = -(-address(self._arena) // ALIGNMENT) * ALIGNMENT
        values = plan.words[:, 1]
        for name, (at, offsets) in plan.moves.items():
            values[at] = offsets + (base if not name else address(arrays[name]))
        tvm_runtime.set_threads(self.threads)
        assert self._runner is not None
        table = plan.table
        if tvm_runtime.pool_is_lost():
            table = table.copy()
            table[:, -1] = True
        failed = run_table(self._runner, table, self._result)
        if failed >= 0:
            plan.status[:] = 0  # of the kernels before
            step = plan.steps[failed]
            source = describe_source(step.node.source, step.node.scope) if step.node is not None else None
            raise BackendError(f"kernel {step.kernel.title}: failed while running", source=source)
        if plan.status.size and plan.status.any():
            raise _outside(plan)

    def entry(self, kernel: Kernel) -> Entry:
        """Where a kernel's code is."""
        return self._entries[kernel]

    def held(self, buffer: Buffer) -> Array | None:
        """The array of a weight or a constant; None for other buffers."""
        if buffer in self._weights:
            return self._weights[buffer]
        if buffer.literal is not None:
            if buffer not in self._constants:
                self._constants[buffer] = np.frombuffer(buffer.literal.data or b"\0", np.uint8).copy()
            return self._constants[buffer]
        return None

    def __repr__(self) -> str:
        takes, gives = (", ".join(map(str, p)) for p in (self.inputs, self.outputs))
        return f"<executable {self.name}({takes}) -> {gives}>"


def _outside(plan: Plan) -> BackendError:
    """The error that the first kernel tells which met an index outside its axis; the words are cleared."""
    first = int(np.flatnonzero(plan.status[:, 0])[0])
    _, index, size, _ = plan.status[first].tolist()
    plan.status[:] = 0
    node = plan.tellers[first].node
    return OutsideAxis(index, size).located(node, plan.tellers[first].kernel.title)


def run_table(runner: Entry, table: Array, result: Array) -> int:
    """Run a table's calls; -1, or the number of the call that failed."""
    words = np.array([[POINTER, address(table)], [POINTER, address(result)], [INTEGER, len(table)]], np.int64)
    ignored = np.zeros(2, np.int64)
    if function_of(runner)(address(words), len(words), address(ignored)):
        return 0
    return int(result[0])


# -- planning ------------------------------------------------------------------------------------------------


class Planner:
    """Puts numbers in for the symbols: a plan for one set of sizes."""

    def __init__(self, executable: KernelExecutable, sizes: Mapping[str, int]) -> None:
        self.executable, self.sizes = executable, sizes
        self.records: list[tuple[Entry, int, int]] = []
        self.words: list[tuple[int, int]] = []
        self.moves: dict[str, Relocation] = {}
        self.steps: list[Step] = []
        self.tellers: list[Step] = []
        self.frames: dict[str, tuple[dict[Buffer, int], int, int]] = {}
        self.lives: dict[str, list[Lifetime]] = {}

    def plan(self) -> Plan:
        program = self.executable.program
        for routine in program.routines:
            self._frame(routine)
        places: dict[Buffer, tuple[str, int]] = {b: (f"in {n}", 0) for n, b in program.inputs.items()}
        places |= {view.buffer: (f"out {name}", 0) for name, view in program.outputs.items()}
        self._expand(program.main, places, 0)
        table = np.zeros((len(self.records), RECORD), np.int64)
        words = np.array(self.words, np.int64).reshape(-1, 2)
        for i, ((function, handle), first, count) in enumerate(self.records):
            alone = self.executable.threads == 1 or not self._worth_threads(self.steps[i])
            table[i] = (function, handle, address(words) + 16 * first, count, alone)
        _, _, arena = self.frames[program.main.name]
        shapes = {n: tuple(s.evaluate(self.sizes) for s in v.shape) for n, v in program.outputs.items()}
        moves = {name: move.arrays() for name, move in self.moves.items()}
        status = np.zeros((len(self.tellers), 4), np.int64)
        return Plan(table, words, moves, arena, shapes, self.steps, self.lives, status, self.tellers)

    def _worth_threads(self, step: Step) -> bool:
        """Whether a step takes longer than it takes to wake threads: by the bytes it touches and its operations."""
        if step not in self._known_worth:
            touched = sum(product(v.shape).evaluate(self.sizes) * v.dtype.bytes for v in step.views)
            flops = step.kernel.flops([s.evaluate(self.sizes) for s in step.sizes])
            self._known_worth[step] = max(touched / _BYTES_A_SECOND, flops / _FLOPS_A_SECOND) > _WAKING
        return self._known_worth[step]

    @cached_property
    def _known_worth(self) -> dict[Step, bool]:
        return {}

    def _frame(self, routine: Routine) -> None:
        """Offsets of a routine's locals from where its frame begins; that of a callee begins where they end."""
        lives: dict[Buffer, Lifetime] = {}
        for at, step in enumerate(routine.steps):
            for view in step.views:
                buffer = view.buffer
                if buffer.kind == "local":
                    size = buffer.elements.evaluate(self.sizes) * buffer.dtype.bytes
                    known = lives.get(buffer)
                    lives[buffer] = Lifetime(buffer.name, known.first if known else at, at + 1, size)
        offsets = plan_arena(list(lives.values()))
        end = check_arena(list(lives.values()), offsets)
        inner = max((self.frames[s.routine.name][2] for s in routine.steps if isinstance(s, Call)), default=0)
        self.lives[routine.name] = list(lives.values())
        self.frames[routine.name] = dict(zip(lives, offsets, strict=True)), end, end + inner

    def _expand(self, routine: Routine, places: Mapping[Buffer, tuple[str, int]], base: int) -> None:
        offsets, end, _ = self.frames[routine.name]
        for step, pointers, sizes in self._numbers(routine):
            resolved = [self._place(buffer, at, places, offsets, base) for buffer, at in pointers]
            if isinstance(step, Call):
                buffers = [*step.routine.arguments, *step.routine.results]
                self._expand(step.routine, dict(zip(buffers, resolved, strict=True)), base + end)
                continue
            first = len(self.words)
            if any(name == "status" for name, _ in resolved):
                self.tellers.append(step)
            for name, value in resolved:
                if name != "absolute":
                    move = self.moves.setdefault(name, Relocation())
                    move.at.append(len(self.words))
                    move.offsets.append(value)
                self.words.append((POINTER, value))
            self.words += [(INTEGER, n) for n in sizes]
            self.records.append((self.executable.entry(step.kernel), first, len(self.words) - first))
            self.steps.append(step)

    def _numbers(self, routine: Routine) -> list[tuple[Step | Call, list[tuple[Buffer, int]], list[int]]]:
        """A routine's steps with numbers for sizes, made once however often it is called."""
        if routine.name not in self._known:
            self._known[routine.name] = [
                (
                    step,
                    [(v.buffer, self._bytes(v)) for v in step.views],
                    [] if isinstance(step, Call) else [s.evaluate(self.sizes) for s in step.sizes],
                )
                for step in routine.steps
            ]
        return self._known[routine.name]

    @cached_property
    def _known(self) -> dict[str, list[tuple[Step | Call, list[tuple[Buffer, int]], list[int]]]]:
        return {}

    def _bytes(self, view: View) -> int:
        return view.offset.evaluate(self.sizes) * view.dtype.bytes

    def _place(
        self,
        buffer: Buffer,
        at: int,
        places: Mapping[Buffer, tuple[str, int]],
        offsets: Mapping[Buffer, int],
        base: int,
    ) -> tuple[str, int]:
        """In what a pointer lies, and where: the arena, an input, an output, or an address that stays."""
        if buffer.kind == "status":
            return "status", 32 * len(self.tellers)
        if buffer in offsets:
            return "", base + offsets[buffer] + at
        if buffer in places:
            name, offset = places[buffer]
            return name, offset + at
        array = self.executable.held(buffer)
        assert array is not None, buffer
        return "absolute", address(array) + at


# -- arrays --------------------------------------------------------------------------------------------------


def _allocated(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """New memory. Raises BackendError where there is not so much."""
    try:
        return np.empty(shape, dtype)
    except (MemoryError, OverflowError, ValueError) as error:
        gigabytes = math.prod(shape) * dtype.itemsize / 2**30
        raise BackendError("there is not enough memory", received=f"{gigabytes:.3g} GiB for {list(shape)}") from error


def stored(dtype: DType) -> np.dtype[Any]:
    """The NumPy dtype of an element's bytes; that of bf16 is uint16."""
    return dtype.numpy or np.dtype(np.uint16)


def take(port: Port, value: Any) -> Array:
    """What a caller passed, as a row-major array of the port's dtype: the same memory where it is one already."""
    array = numpy_taken(port, value) if port.dtype.numpy is not None else bf16_taken(port, value)
    return np.ascontiguousarray(array).reshape(array.shape)


def give(port: Port, array: Array, tensors: bool) -> Any:
    """A result for the caller: a tensor where one was passed."""
    if port.dtype.numpy is None:
        return bf16_given(array, tensors)
    if tensors:
        import torch

        return torch.from_numpy(array)
    return array


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "data_ptr")
