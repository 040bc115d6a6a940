"""Executables of kernels: packed weights, a memory plan for each set of sizes, and one table of kernel calls per run.

The first call with new sizes makes a plan (`treadle.backends.tvm.planning`). Later calls with these sizes write the
addresses of inputs and outputs into the plan's table and run it.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from treadle.backends.bfloat16 import bf16_given, bf16_taken
from treadle.backends.donation import Donated
from treadle.backends.entries import EntryExecutable
from treadle.backends.outside_axis import error_of
from treadle.backends.poison import poisons
from treadle.backends.protocol import Outputs, Port, ports
from treadle.backends.signature import Signature, numpy_taken
from treadle.backends.states import StateKinds, States
from treadle.backends.tvm.host_calls import HostCall
from treadle.backends.tvm.kernels import tvm_runtime
from treadle.backends.tvm.kernels.cache import Entry, KernelCache, assembly
from treadle.backends.tvm.kernels.calling import INTEGER, POINTER, address, function_of
from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.runner import Runner
from treadle.backends.tvm.lowering.leftovers import find_leftovers
from treadle.backends.tvm.lowering.listing import list_program, unique_titles
from treadle.backends.tvm.lowering.program import KernelProgram, kernels_of
from treadle.backends.tvm.output_memory import OutputMemory, allocated, placed
from treadle.backends.tvm.placed_calls import FixedSpaces, place_calls
from treadle.backends.tvm.planning import HostEncoder, Plan
from treadle.backends.tvm.poisoning import run_poisoned
from treadle.backends.tvm.spaces import Arena, Constant, Held, Input, Output, State
from treadle.ir.builder import describe_source
from treadle.ir.errors import BackendError
from treadle.ir.graph import Function, Graph
from treadle.ir.types import DType
from treadle.passes.memory.frame_placement import ALIGNMENT
from treadle.passes.memory.frames import aligned
from treadle.passes.memory.storage_plan import StoragePlan

Array = np.ndarray[Any, Any]

PLANS = 32  # number of sets of sizes whose plans are cached


class KernelExecutable(EntryExecutable):
    """A graph compiled to kernels. See `treadle.backends.protocol.Executable`.

    program   the steps
    threads   number of threads that kernels use
    notes     the steps that run element by element because no fast kernel covers them
    """

    exact_rows = True  # the kernel generators guarantee this

    def __init__(
        self,
        graph: Graph,
        program: KernelProgram,
        cache: KernelCache,
        weights: Mapping[str, Array],
        threads: int,
        entries: Mapping[Kernel, Entry],
        prepared: Sequence[str] = (),
        plan: StoragePlan | None = None,
        host: Mapping[Kernel, HostCall] | None = None,
    ) -> None:
        """Create an executable from a program, its weights by name in their layouts, and its compiled kernels.

        entries   addresses of the compiled kernels and the runner; empty if this machine cannot run them
        prepared  descriptions of the values computed from weights by `bind`, one line each
        plan      lists the donated inputs; None means that no input is donated
        host      the steps that this process executes itself between kernels (collectives)
        """
        super().__init__(graph, "tvm", _zeros)
        self._prepared = prepared
        self.program, self.cache, self.threads = program, cache, threads
        self.notes = find_leftovers(program, graph.symbols)
        self.compiled = cache.compiled
        self.machine = _Machine(graph.name, program, cache, weights, threads, entries, host or {})
        entry = partial(_KernelEntry, self.machine, self.state_kinds, graph, plan)
        made = {f.name: entry(f) for f in graph.later_entries}
        self.called |= made
        self.timed = made[graph.main.name].timed
        self.timed_entries = {name: each.timed for name, each in made.items()}

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The distinct kernels, in the order of their first use in the program."""
        return kernels_of(self.program)

    @cached_property
    def source(self) -> str:
        """The program as a listing of its steps, then every distinct kernel as TVMScript."""
        return list_program(self.name, self.program, self.cache.isa, self._prepared)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights and of the arena of the largest run so far."""
        return self.machine.nbytes

    def assembly(self, title: str) -> str:
        """Return the assembly of the kernel with this title in `source`. Raises BackendError if there is no such
        kernel, and for a device.
        """
        titles = {name: kernel for kernel, name in unique_titles(self.kernels).items() if not kernel.on_host}
        if title not in titles:
            raise BackendError(f"there is no kernel {title!r}", hint="one of " + ", ".join(titles))
        if isinstance(self.cache.isa, Device):
            raise BackendError(
                f"kernels for {self.cache.isa} are not compiled here", hint="read their text in `source`"
            )
        return assembly(titles[title], self.cache.isa)


class _KernelEntry:
    """An entry as a routine of kernel calls. See `treadle.backends.protocol.Entry`."""

    def __init__(
        self, machine: _Machine, kinds: StateKinds, graph: Graph, plan: StoragePlan | None, function: Function
    ) -> None:
        self._donated = Donated(plan, function)
        self._machine, self._kinds, self._name = machine, kinds, function.name
        self._program = machine.program.entries[function.name]
        self.signature = Signature(graph, function)
        self.inputs = self.signature.ports
        self.outputs = ports(function.outputs)
        self._stored = {port.name: stored(port.dtype) for port in self.outputs}
        self.signature.refuse_undetermined(self._program.symbols)

    def __call__(self, states: States | None = None, /, **given: Any) -> Outputs:
        held = self._kinds.check(states)
        taken, sizes = self.signature.bind_sized(given, take, held.sizes)
        self._donated.check(self.inputs, given, taken, (*self._machine.weights.values(), *held.values()))
        arrays = dict(zip(self._program.inputs, taken, strict=True))
        made = self._machine.run(self._name, sizes, arrays, held, self._stored)
        tensors = any(_is_tensor(value) for value in given.values())
        outputs = Outputs({p.name: give(p, made[p.name], tensors) for p in self.outputs})
        return self._donated.returned(given, outputs)

    def timed(
        self, given: Mapping[str, Any], runs: int, states: States | None = None
    ) -> tuple[Plan, dict[str, int], list[list[float]]]:
        """Run the entry `runs` times on arrays by name, and on states, and time each kernel call.

        Returns the plan, the sizes of the symbols, and for each run the seconds of every call. For profiling; see
        `treadle.backends.tvm.profiling`. Raises BackendError as a call does.
        """
        held = self._kinds.check(states)
        taken, sizes = self.signature.bind_sized(given, take, held.sizes)
        arrays = dict(zip(self._program.inputs, taken, strict=True))
        plan, seconds = self._machine.timed(self._name, sizes, arrays, held, self._stored, runs)
        return plan, sizes, seconds

    def __repr__(self) -> str:
        takes, gives = (", ".join(map(str, p)) for p in (self.inputs, self.outputs))
        return f"<entry {self._name}({takes}) -> {gives}>"


class _Machine:
    """The state for running the entries of a program: its weights, a plan for each set of sizes, and the arena that all
    plans share.

    One call runs at a time.
    """

    def __init__(
        self,
        name: str,
        program: KernelProgram,
        cache: KernelCache,
        weights: Mapping[str, Array],
        threads: int,
        entries: Mapping[Kernel, Entry],
        host: Mapping[Kernel, HostCall],
    ) -> None:
        self.name, self.program, self.cache, self.threads = name, program, cache, threads
        self._host = host
        self._entries = {**entries, **{kernel: call.entry for kernel, call in host.items()}}
        self.weights = {name: weights[name] for entry in program.entries.values() for name in entry.weights}
        self._fixed = FixedSpaces(program)
        self.constants = [np.frombuffer(s.literal.data or b"\0", np.uint8).copy() for s in self._fixed.constants]
        self.plans: OrderedDict[tuple[str, tuple[tuple[str, int], ...]], Plan] = OrderedDict()
        self._arena = np.empty(0, np.uint8)
        self._outputs = OutputMemory()
        self._lock = threading.Lock()
        self._runner = _TableRunner(entries[Runner()]) if Runner() in entries else None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, each counted once, and of the arena."""
        return sum({id(array): array.nbytes for array in self.weights.values()}.values()) + self._arena.nbytes

    def run(
        self,
        entry: str,
        sizes: Mapping[str, int],
        given: Mapping[str, Array],
        states: States,
        outputs: Mapping[str, np.dtype[Any]],
    ) -> dict[str, Array]:
        """Run an entry on inputs and states, which are updated in place. Return new arrays of the dtypes `outputs`."""
        with self._lock:
            runner, plan, table, made = self._ready(entry, sizes, given, states, outputs)
            with tvm_runtime.at_work():
                failed = run_poisoned(plan, table, self._arena, made, runner) if poisons() else runner(table)
            self._check(plan, failed)
        return made

    def timed(
        self,
        entry: str,
        sizes: Mapping[str, int],
        given: Mapping[str, Array],
        states: States,
        outputs: Mapping[str, np.dtype[Any]],
        runs: int,
    ) -> tuple[Plan, list[list[float]]]:
        """Run an entry `runs` times, call by call. Return its plan and, for each run, the seconds of every call."""
        with self._lock:
            runner, plan, table, made = self._ready(entry, sizes, given, states, outputs)
            calls = [table[i : i + 1] for i in range(len(table))]
            seconds: list[list[float]] = [[] for _ in calls]
            for _ in range(runs):
                for number, (call, found) in enumerate(zip(calls, seconds, strict=True)):
                    started = time.perf_counter()
                    failed = runner(call)
                    found.append(time.perf_counter() - started)
                    self._check(plan, -1 if failed < 0 else number)
        del made  # the calls wrote to their memory
        return plan, seconds

    def _ready(
        self,
        entry: str,
        sizes: Mapping[str, int],
        given: Mapping[str, Array],
        states: States,
        outputs: Mapping[str, np.dtype[Any]],
    ) -> tuple[_TableRunner, Plan, Array, dict[str, Array]]:
        """Return the table runner, an entry's plan, the plan's table with all addresses filled in, and the output
        arrays.
        """
        if self._runner is None:
            self.cache.refuse_other_machine()
        assert self._runner is not None
        plan = self._plan(entry, sizes)
        over = self.program.entries[entry].over
        made = {
            name: given[over[name]]
            if name in over
            else self._outputs.array(name, plan.shapes[name], dtype, aligned=name == plan.host)
            for name, dtype in outputs.items()
        }
        return self._runner, plan, self._place(plan, given, states, made), made

    def _plan(self, entry: str, sizes: Mapping[str, int]) -> Plan:
        key = entry, tuple(sorted(sizes.items()))
        if key in self.plans:
            self.plans.move_to_end(key)
            return self.plans[key]
        try:
            placed = place_calls(self.program.entries[entry], sizes, self._fixed.of(self.program.entries[entry]))
            plan = HostEncoder(sizes, self.threads, self._entries, self._address).plan(placed)
        except OverflowError as error:  # a size exceeds 64 bits
            received = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise BackendError(
                f"{self.name}: these sizes need more memory than is addressable", received=received
            ) from error
        self.plans[key] = plan
        if len(self.plans) > PLANS:
            self.plans.popitem(last=False)
        return plan

    def _place(self, plan: Plan, given: Mapping[str, Array], states: States, made: Mapping[str, Array]) -> Array:
        """Fill in the addresses of inputs, states and outputs in a plan; return its table."""
        if self._arena.nbytes < plan.arena + ALIGNMENT:
            size = plan.arena + ALIGNMENT
            self._arena = allocated(size, (size,))
        plan.put(Arena(), aligned(address(self._arena), ALIGNMENT))
        for name, array in given.items():
            plan.put(Input(name), address(array))
        for name, array in made.items():
            plan.put(Output(name), address(array))
        if plan.states is None or plan.states() is not states:  # addresses of states do not change
            for name, array in states.items():
                plan.put(State(name), address(array))
            plan.states = weakref.ref(states)
        tvm_runtime.set_threads(self.threads)
        table = plan.table
        if tvm_runtime.pool_is_lost():
            table = table.copy()
            table[:, -1] = True
        return table

    def _check(self, plan: Plan, failed: int) -> None:
        """Raise BackendError if a kernel call failed (`failed` is its number) or a kernel reported an error."""
        if failed >= 0:
            plan.status[:] = 0  # discard the reports of earlier kernels
            step = plan.steps[failed]
            source = describe_source(step.node.source, step.node.scope) if step.node is not None else None
            if step.kernel in self._host:
                self._host[step.kernel].raise_failure(source)
            raise BackendError(f"kernel {step.kernel.title}: failed while running", source=source)
        if plan.status.size and plan.status.any():
            raise _outside(plan)

    def _address(self, space: Held | Constant) -> int:
        return address(self.weights[space.name] if isinstance(space, Held) else self.constants[space.number])


def _outside(plan: Plan) -> BackendError:
    """Return the error of the first kernel that reported a value out of range. The status words are cleared."""
    first = int(np.flatnonzero(plan.status[:, 0])[0])
    words = plan.status[first].tolist()
    plan.status[:] = 0
    teller = plan.tellers[first]
    return error_of(words).located(teller.node, teller.kernel.title)


class _TableRunner:
    """Compiled code that runs the calls of a table. It returns -1, or the number of the call that failed. One table
    runs at a time.
    """

    def __init__(self, code: Entry) -> None:
        self._call = function_of(code)
        self._failed, self._ignored = np.zeros(1, np.int64), np.zeros(2, np.int64)
        self._words = np.array([[POINTER, 0], [POINTER, address(self._failed)], [INTEGER, 0]], np.int64)
        self._places = address(self._words), len(self._words), address(self._ignored)

    def __call__(self, table: Array) -> int:
        self._words[0, 1], self._words[2, 1] = address(table), len(table)
        return 0 if self._call(*self._places) else int(self._failed[0])


# -- arrays --------------------------------------------------------------------------------------------------


def _zeros(shape: tuple[int, ...], dtype: DType) -> Array:
    """Return a new array of zeros for a state. It starts at a cache line, so that each vector of a row is within one
    line.
    """
    kind = stored(dtype)
    size = math.prod(shape) * kind.itemsize
    return placed(np.zeros(size + ALIGNMENT, np.uint8), shape, kind)


def stored(dtype: DType) -> np.dtype[Any]:
    """Return the NumPy dtype in which elements of a dtype are stored: uint16 for bf16."""
    return dtype.numpy or np.dtype(np.uint16)


def take(port: Port, value: Any) -> Array:
    """Return a caller's value as a row-major array of the port's dtype. An array that is already in this form is not
    copied.
    """
    array = numpy_taken(port, value) if port.dtype.numpy is not None else bf16_taken(port, value)
    return np.ascontiguousarray(array).reshape(array.shape)


def give(port: Port, array: Array, tensors: bool) -> Any:
    """Return a result for the caller: a tensor if the caller passed tensors, else an array."""
    if port.dtype.numpy is None:
        return bf16_given(array, tensors)
    if tensors:
        import torch

        return torch.from_numpy(array)
    return array


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "data_ptr")
