"""The machine that runs programs on the CPU: packed weights, a memory plan for each set of sizes, and one table of
kernel calls per run.

The first call with new sizes makes a plan (`treadle.backends.tvm.planning`). Later calls with these sizes write the
addresses of inputs and outputs into the plan's table and run it.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from treadle.backends.poison import poisons
from treadle.backends.states import States
from treadle.backends.tvm.host_calls import HostCall
from treadle.backends.tvm.kernels.host import tvm_runtime
from treadle.backends.tvm.kernels.host.cache import Entry, KernelCache
from treadle.backends.tvm.kernels.host.calling import INTEGER, POINTER, address, function_of
from treadle.backends.tvm.kernels.host.runner import Runner
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.lowering.program import KernelProgram
from treadle.backends.tvm.machine_calls import MachineCall
from treadle.backends.tvm.output_memory import OutputMemory, allocated, placed, stored
from treadle.backends.tvm.placed_calls import FixedSpaces, place_calls, reported_error
from treadle.backends.tvm.planning import HostEncoder, Plan
from treadle.backends.tvm.poisoning import run_poisoned
from treadle.backends.tvm.spaces import Arena, Constant, Held, Input, Output, State
from treadle.ir.builder import describe_source
from treadle.ir.errors import BackendError
from treadle.ir.types import DType
from treadle.passes.memory.frames import ALIGNMENT, aligned

Array = np.ndarray[Any, Any]

PLANS = 64  # number of sets of sizes whose plans are cached; a server of 24 rows has some 45


class HostMachine:
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
        self.constants = [np.frombuffer(data or b"\0", np.uint8).copy() for _, data in self._fixed.constants]
        self.plans: OrderedDict[tuple[str, tuple[tuple[str, int], ...]], Plan] = OrderedDict()
        self._arena = np.empty(0, np.uint8)
        self._outputs = OutputMemory()
        self._lock = threading.Lock()
        self._runner = _TableRunner(entries[Runner()]) if Runner() in entries else None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, each counted once, and of the arena."""
        return sum({id(array): array.nbytes for array in self.weights.values()}.values()) + self._arena.nbytes

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """Return a new array of zeros for a state. It starts at a cache line, so that each vector of a row is within
        one line.
        """
        kind = stored(dtype)
        size = math.prod(shape) * kind.itemsize
        return placed(np.zeros(size + ALIGNMENT, np.uint8), shape, kind)

    def lasting(self, states: States) -> tuple[Array, ...]:
        """Return the arrays that outlive a call: weights and states."""
        return (*self.weights.values(), *states.values())

    def run(self, call: MachineCall) -> dict[str, Array]:
        """Run an entry. Return new arrays of the outputs."""
        with self._lock:
            runner, plan, table, made = self._ready(call)
            with tvm_runtime.at_work():
                failed = run_poisoned(plan, table, self._arena, made, runner) if poisons() else runner(table)
            self._check(plan, failed)
        return made

    def timed(self, call: MachineCall, runs: int) -> tuple[Plan, list[list[float]]]:
        """Run an entry `runs` times, call by call. Return its plan and, for each run, the seconds of every call."""
        with self._lock:
            runner, plan, table, made = self._ready(call)
            records = [table[i : i + 1] for i in range(len(table))]
            seconds: list[list[float]] = [[] for _ in records]
            for _ in range(runs):
                for number, (record, found) in enumerate(zip(records, seconds, strict=True)):
                    started = time.perf_counter()
                    failed = runner(record)
                    found.append(time.perf_counter() - started)
                    self._check(plan, -1 if failed < 0 else number)
        del made  # the calls wrote to their memory
        return plan, seconds

    def _ready(self, call: MachineCall) -> tuple[_TableRunner, Plan, Array, dict[str, Array]]:
        """Return the table runner, an entry's plan, the plan's table with all addresses filled in, and the output
        arrays.
        """
        if self._runner is None:
            self.cache.refuse_other_machine()
        assert self._runner is not None
        plan = self._plan(call.entry, call.sizes)
        over = self.program.entries[call.entry].over
        made = {
            name: call.inputs[over[name]]
            if name in over
            else self._outputs.array(name, plan.shapes[name], dtype, aligned=name == plan.host)
            for name, dtype in call.outputs.items()
        }
        return self._runner, plan, self._place(plan, call.inputs, call.states, made), made

    def _plan(self, entry: str, sizes: Mapping[str, int]) -> Plan:
        key = entry, tuple(sorted(sizes.items()))
        if key in self.plans:
            self.plans.move_to_end(key)
            return self.plans[key]
        try:
            calls = place_calls(self.program.entries[entry], sizes, self._fixed.of(self.program.entries[entry]))
            plan = HostEncoder(sizes, self.threads, self._entries, self._address).plan(calls)
        except OverflowError as error:  # a size exceeds 64 bits
            received = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise BackendError(
                f"{self.name}: these sizes need more memory than is addressable", received=received
            ) from error
        self.plans[key] = plan
        if len(self.plans) > PLANS:
            self.plans.popitem(last=False)
        return plan

    def _place(self, plan: Plan, inputs: Mapping[str, Array], states: States, made: Mapping[str, Array]) -> Array:
        """Fill in the addresses of inputs, states and outputs in a plan; return its table."""
        if self._arena.nbytes < plan.arena + ALIGNMENT:
            size = plan.arena + ALIGNMENT
            self._arena = allocated(size, (size,))
        plan.put(Arena(), aligned(address(self._arena), ALIGNMENT))
        for name, array in inputs.items():
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
            error = reported_error(plan.status.reshape(-1), plan.tellers)
            plan.status[:] = 0
            raise error

    def _address(self, space: Held | Constant) -> int:
        return address(self.weights[space.name] if isinstance(space, Held) else self.constants[space.number])


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
