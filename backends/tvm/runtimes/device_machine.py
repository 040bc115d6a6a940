"""The machine that runs programs on a device.

The device is opened when it is first needed, so a program can be compiled and inspected without one. Weights are packed
on the host and copied to the device before the first run; then the host's copy is released. Each space of a plan has a
buffer. All plans share the buffers of the arena, inputs, outputs and status words; states bring their own. A run copies
the inputs, enqueues the launches, and waits once, for the outputs and the status words together. States are never
copied back.

A buffer that is too small for a plan is released before a larger one is allocated. So the peak of the device's memory
is the sum of what the plans need (`DeviceMachine.nbytes`).
"""

from __future__ import annotations

import math
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from treadle.backends.poison import BYTE, poisons
from treadle.backends.states import States
from treadle.backends.tvm.host_calls import HostCall
from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel, device_kernel
from treadle.backends.tvm.kernels.devices.group_emitter import LackingWord
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.lowering.listing import unique_titles
from treadle.backends.tvm.lowering.program import KernelProgram, KernelStep, kernels_of
from treadle.backends.tvm.output_memory import stored
from treadle.backends.tvm.placed_calls import FixedSpaces, place_calls, reported_error
from treadle.backends.tvm.runtimes.device_arrays import DeviceArray, of_stored, stored_dtype, to_stored
from treadle.backends.tvm.runtimes.device_memory import DeviceBuffer, DeviceLostError, Part
from treadle.backends.tvm.runtimes.device_plans import DeviceEncoder, DevicePlan, memory_form
from treadle.backends.tvm.runtimes.plan_limits import exceeded_limits, exceeded_memory, located, refuse
from treadle.backends.tvm.runtimes.runtime import (
    LoadedKernels,
    PreparedLaunches,
    Runtime,
    find_runtime,
    forget_runtime,
)
from treadle.backends.tvm.spaces import Arena, Constant, Held, Input, Output, Space, State, Status
from treadle.ir.builder import describe_source
from treadle.ir.errors import BackendError
from treadle.ir.target import Target
from treadle.ir.types import DType, i64

Array = np.ndarray[Any, Any]

PLANS = 32  # number of sets of sizes whose plans are cached
PIECE = 64 << 20  # bytes of a weight that are copied to the device at once


class DeviceMachine:
    """The state for running the entries of a program on a device. One call runs at a time on a device.

    target   the target that was compiled for
    open     opens the device; tests replace it
    plans    plans by entry and sizes
    """

    def __init__(
        self,
        name: str,
        program: KernelProgram,
        target: Target,
        device: Device,
        weights: Mapping[str, Array],
        collectives: Mapping[Kernel, HostCall],
    ) -> None:
        self.name, self.program, self.target = name, program, target
        self.open: Callable[[], Runtime] = partial(find_runtime, target)
        self.plans: OrderedDict[tuple[str, tuple[tuple[str, int], ...]], DevicePlan] = OrderedDict()
        self.titles = unique_titles(kernels_of(program))
        self._device, self._collectives = device, collectives
        self._spaces = FixedSpaces(program)
        self._weights: dict[Space, Array] = {
            Held(name): weights[name] for entry in program.entries.values() for name in entry.weights
        }
        for number, (dtype, content) in enumerate(self._spaces.constants):
            data = np.frombuffer(content, np.uint8)
            self._weights[Constant(number)] = data.view(np.int64) if dtype is i64 else data
        self._runtime: Runtime | None = None
        self._kernels: dict[Kernel, DeviceKernel] = {}
        self._lacking: dict[Kernel, LackingWord] = {}
        self._loaded: dict[str, LoadedKernels] = {}
        self._buffers: dict[Space, DeviceBuffer] = {}
        self._needs: dict[Space, int] = {}
        self._aliases: set[Space] = set()
        self._checked: weakref.WeakSet[DevicePlan] = weakref.WeakSet()
        self._prepared: dict[int, _Prepared] = {}
        self._lost: DeviceLostError | None = None
        self._count_fixed()

    def _count_fixed(self) -> None:
        """Note the bytes of weights and constants in the form of the device."""
        self._form = memory_form(self.device)
        seen: set[int] = set()
        for space, array in self._weights.items():
            item = stored_dtype(array.dtype, self._form).itemsize
            self._needs[space] = self._form.size(array.size * item)
            if id(array) in seen:
                self._aliases.add(space)
            seen.add(id(array))

    @property
    def device(self) -> Device:
        """The device: the one that was opened, or the one that was compiled for."""
        return self._device if self._runtime is None else self._runtime.device

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the plans of all calls so far need, without states: weights, constants, and the
        largest arena, inputs, outputs and status words. It is computed from the plans; the runtime counts the same
        (`DeviceMemory.used`), if no other executable uses the device.
        """
        return sum(nbytes for space, nbytes in self._needs.items() if space not in self._aliases)

    # -- opening ---------------------------------------------------------------------------------------------

    def runtime(self) -> Runtime:
        """Return the runtime; open the device if necessary. Raises BackendError if there is none, with what to
        install, and DeviceLostError if it was lost.
        """
        if self._lost is not None:
            raise self._lost
        if self._runtime is None:
            runtime = self.open()
            with runtime.lock:
                if self._runtime is None:
                    self._runtime = runtime
                    self._kernels.clear()
                    self._lacking.clear()
                    self.plans.clear()
                    self._count_fixed()
        return self._runtime

    @contextmanager
    def _at_work(self) -> Iterator[Runtime]:
        """Hold the device's lock. If the device is lost, all later calls raise the same error."""
        runtime = self.runtime()
        with runtime.lock:
            try:
                yield runtime
            except DeviceLostError as error:
                self._lost = error
                self._prepared.clear()
                self._buffers.clear()
                forget_runtime(runtime)
                raise

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> DeviceArray:
        """Return a state of zeros on the device."""
        kind = stored(dtype)
        with self._at_work() as runtime:
            nbytes = self._form.size(math.prod(shape) * stored_dtype(kind, self._form).itemsize)
            buffer = runtime.memory.allocate(nbytes)
            runtime.memory.fill(buffer, 0, nbytes)
        return DeviceArray(runtime, buffer, shape, kind, self._form)

    def lasting(self, states: States) -> tuple[Array, ...]:
        """Return the host's arrays that outlive a call: none."""
        return ()

    # -- inspection ------------------------------------------------------------------------------------------

    def kernels(self, entry: str | None = None) -> dict[str, DeviceKernel]:
        """Return the kernels of the device by name, without collectives and without kernels that the device refuses.

        entry  only kernels of this entry; None: all
        """
        routines = self.program.routines if entry is None else self.program.entries[entry].routines
        kernels = dict.fromkeys(step.kernel for routine in routines for step in routine.walk())
        for kernel in kernels:
            if kernel not in self._kernels and kernel not in self._lacking and not kernel.on_host:
                try:
                    self._kernels[kernel] = device_kernel(kernel, self.device, f"treadle_{self.titles[kernel]}")
                except LackingWord as lacking:
                    self._lacking[kernel] = lacking
        return {self.titles[kernel]: self._kernels[kernel] for kernel in kernels if kernel in self._kernels}

    def plan(self, entry: str, sizes: Mapping[str, int]) -> DevicePlan:
        """Return the plan of an entry at these sizes. Limits of the device are not checked."""
        key = entry, tuple(sorted(sizes.items()))
        if key in self.plans:
            self.plans.move_to_end(key)
            return self.plans[key]
        encoder = DeviceEncoder(self.device, self.titles, self.kernels(entry), self._needs)
        routine = self.program.entries[entry]
        try:
            placed = place_calls(routine, sizes, self._spaces.of(routine), self._form)
        except OverflowError as error:  # a size exceeds 64 bits
            received = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise BackendError(
                f"{self.name}: these sizes need more memory than is addressable", received=received
            ) from error
        plan = self.plans[key] = encoder.plan(placed, sizes)
        if len(self.plans) > PLANS:
            _, old = self.plans.popitem(last=False)
            for each in self._prepared.values():
                each.parts.pop(old, None)
        return plan

    def exceeded(self, entry: str, sizes: Mapping[str, int]) -> list[str]:
        """Return a line for each limit of the device that a run exceeds. Opens no device."""
        plan, lines = self.plan(entry, sizes), dict[str, None]()
        for step in plan.steps:
            if (lacking := self._lacking.get(step.kernel)) is not None:
                lines[located(f"{self.titles[step.kernel]} uses the word `{lacking.word}`: {lacking.why}", step)] = None
        lines |= dict.fromkeys(exceeded_limits(plan, self.device.limits))
        if self._runtime is not None:
            memory, spaces = self._runtime.memory, {**self._fixed_needs, **plan.table.spaces}
            over = self.program.entries[entry].over
            required = sum(
                nbytes - (self._buffers[space].nbytes if space in self._buffers else 0)
                for space, nbytes in spaces.items()
                if not isinstance(space, State)
                and space not in self._aliases
                and not (isinstance(space, Output) and space.name in over)
                and (space not in self._buffers or nbytes > self._buffers[space].nbytes)
            )
            lines |= dict.fromkeys(exceeded_memory(plan, required, memory.free))
        return list(lines)

    @property
    def _fixed_needs(self) -> dict[Space, int]:
        return {space: n for space, n in self._needs.items() if isinstance(space, (Held, Constant))}

    def weights(self) -> dict[Space, Array]:
        """Return weights and constants as the device stores them."""
        if self._weights or self._runtime is None:
            return {space: to_stored(array, self._form, _title(space)) for space, array in self._weights.items()}
        fixed = list(self._fixed_needs)
        parts = [Part(self._buffers[space], self._buffers[space].nbytes) for space in fixed]
        with self._runtime.lock:
            return dict(zip(fixed, self._runtime.memory.read_parts(parts), strict=True))

    # -- running ---------------------------------------------------------------------------------------------

    def run(
        self,
        entry: str,
        sizes: Mapping[str, int],
        given: Mapping[str, Array],
        states: States,
        outputs: Mapping[str, np.dtype[Any]],
    ) -> dict[str, Array]:
        """Run an entry on inputs and states, which are updated in place. Return new arrays of the dtypes `outputs`."""
        with self._at_work() as runtime:
            plan, buffers = self._ready(entry, sizes, given, states, runtime)
            if poisons():
                self._run_poisoned(plan, entry, buffers, runtime)
            else:
                self._run(plan, entry, buffers, runtime, states)
            return self._results(plan, entry, given, outputs, buffers, runtime)

    def timed(
        self,
        entry: str,
        sizes: Mapping[str, int],
        given: Mapping[str, Array],
        states: States,
        outputs: Mapping[str, np.dtype[Any]],
        runs: int,
    ) -> tuple[DevicePlan, list[list[float]]]:
        """Run an entry `runs` times, launch by launch. Return its plan and, for each run, the seconds of every launch,
        from its start until the host knows that it has ended.
        """
        with self._at_work() as runtime:
            plan, buffers = self._ready(entry, sizes, given, states, runtime)
            some = next(iter(buffers.values()))
            seconds: list[list[float]] = [[] for _ in plan.steps]
            for _ in range(runs):
                for number, found in enumerate(seconds):
                    parts = self._prepare(plan, entry, (number, number + 1), buffers)
                    runtime.memory.read(some, 4)
                    started = time.perf_counter()
                    self._launch(plan, parts, buffers, runtime)
                    runtime.memory.read(some, 4)
                    found.append(time.perf_counter() - started)
                self._check(plan, buffers, runtime)
        return plan, seconds

    def _ready(
        self, entry: str, sizes: Mapping[str, int], given: Mapping[str, Array], states: States, runtime: Runtime
    ) -> tuple[DevicePlan, dict[Space, DeviceBuffer]]:
        """Return an entry's plan and the buffers of its spaces, with the inputs in them."""
        inputs = {name: to_stored(array, self._form, f"input {name}") for name, array in given.items()}
        plan = self.plan(entry, sizes)
        if plan not in self._checked:
            refuse(self.name, f"{self.target} ({runtime.name})", self.exceeded(entry, sizes))
            self._checked.add(plan)
        if entry not in self._loaded:
            self._loaded[entry] = runtime.load(self.kernels(entry))
        self._upload(runtime)
        buffers = self._bound(plan, entry, states, runtime)
        for name, array in inputs.items():
            if Input(name) in buffers and array.size:
                runtime.memory.write(buffers[Input(name)], array)
        return plan, buffers

    def _upload(self, runtime: Runtime) -> None:
        """Copy weights and constants to the device, once, and release them on the host."""
        if not self._weights:
            return
        buffers: dict[Space, DeviceBuffer] = {}
        copied: dict[int, DeviceBuffer] = {}  # several names may have one array
        for space, array in self._weights.items():
            if id(array) in copied:
                buffers[space] = copied[id(array)]
                continue
            flat = to_stored(np.ascontiguousarray(array).reshape(-1), self._form, _title(space)).view(np.uint8)
            buffers[space] = copied[id(array)] = runtime.memory.allocate(self._needs[space])
            for at in range(0, flat.size, PIECE):
                runtime.memory.write(buffers[space], flat[at : at + PIECE], at)
        self._buffers |= buffers
        self._weights.clear()

    def _bound(self, plan: DevicePlan, entry: str, states: States, runtime: Runtime) -> dict[Space, DeviceBuffer]:
        """Return the buffer of each space of a plan. A buffer that is too small is replaced."""
        over, memory = self.program.entries[entry].over, runtime.memory
        shared: dict[Space, int] = {}
        buffers: dict[Space, DeviceBuffer] = {}
        for space, nbytes in plan.table.spaces.items():
            if isinstance(space, State):
                array = states[space.name]
                if array.runtime is not runtime:
                    raise BackendError(
                        f"the states are on another device than {self.name}",
                        received=f"{array.runtime.name}, not {runtime.name}",
                        hint="new_states of the executable that is called",
                    )
                buffers[space] = array.buffer
            elif not (isinstance(space, Output) and space.name in over):
                shared[space] = nbytes
        small = [s for s, nbytes in shared.items() if s not in self._buffers or self._buffers[s].nbytes < nbytes]
        if small:
            self._prepared.clear()  # it refers to the buffers
            for space in small:
                self._buffers.pop(space, None)
            for space in small:
                self._needs[space] = shared[space]
                self._buffers[space] = memory.allocate(shared[space])
                if isinstance(space, Status):
                    memory.fill(self._buffers[space], 0, shared[space])
        buffers |= {space: self._buffers[space] for space in shared}
        buffers |= {Output(name): buffers[Input(of)] for name, of in over.items() if Input(of) in buffers}
        return buffers

    def _run(
        self,
        plan: DevicePlan,
        entry: str,
        buffers: Mapping[Space, DeviceBuffer],
        runtime: Runtime,
        states: States,
    ) -> None:
        """Run all launches of a plan. Prepared launches are used again while the plan and the states exist."""
        prepared = self._prepared.get(id(states))
        if prepared is None or prepared.states() is not states:
            prepared = self._prepared[id(states)] = _Prepared(self, states)
        if plan not in prepared.parts:
            prepared.parts[plan] = self._prepare(plan, entry, (0, len(plan.steps)), buffers)
        self._launch(plan, prepared.parts[plan], buffers, runtime)

    def _prepare(
        self, plan: DevicePlan, entry: str, calls: tuple[int, int], buffers: Mapping[Space, DeviceBuffer]
    ) -> list[PreparedLaunches | int]:
        """Return calls of a plan in order: prepared launches, and the numbers of collectives."""
        loaded, launches = self._loaded[entry], plan.table.launches
        return [
            first if plan.steps[first].kernel.on_host else loaded.prepare(launches[first:end], buffers)
            for first, end in plan.parts(*calls)
        ]

    def _launch(
        self,
        plan: DevicePlan,
        parts: list[PreparedLaunches | int],
        buffers: Mapping[Space, DeviceBuffer],
        runtime: Runtime,
    ) -> None:
        for part in parts:
            if isinstance(part, int):
                self._collective(plan, part, buffers, runtime)
            else:
                part.run()

    def _collective(
        self, plan: DevicePlan, number: int, buffers: Mapping[Space, DeviceBuffer], runtime: Runtime
    ) -> None:
        """Run a collective on host copies of its operand and its result."""
        launch, step = plan.table.launches[number], plan.steps[number]
        x, y = launch.arguments
        call = self._collectives[step.kernel]
        dtype = call.kernel.dtype
        element = self._form.element(dtype)
        sizes = [math.prod(shape) * element for shape in call.shapes(launch.sizes)]
        at = [argument.begin + argument.at * element for argument in (x, y)]
        kind = stored(dtype)
        data = runtime.memory.read(buffers[x.space], sizes[0], at[0])
        given = of_stored(data, (-1,), kind, self._form)
        result = np.empty(sizes[1] // element, kind)
        call.run(given.view(np.uint8), result.view(np.uint8), launch.sizes, _source(step))
        if result.size:
            runtime.memory.write(buffers[y.space], to_stored(result, self._form, step.kernel.title), at[1])

    def _run_poisoned(
        self, plan: DevicePlan, entry: str, buffers: Mapping[Space, DeviceBuffer], runtime: Runtime
    ) -> None:
        """Run a plan in parts, filling dead memory in between, and outputs before the run."""
        over, memory, begin = self.program.entries[entry].over, runtime.memory, 0
        for space, buffer in buffers.items():
            if isinstance(space, Arena) or (isinstance(space, Output) and space.name not in over):
                memory.fill(buffer, BYTE, buffer.nbytes)
        for calls, pointer, count in [*plan.freed, (len(plan.steps), None, 0)]:
            if calls > begin:
                self._launch(plan, self._prepare(plan, entry, (begin, calls), buffers), buffers, runtime)
                begin = calls
            if pointer is not None and count:
                memory.fill(buffers[pointer.space], BYTE, count, pointer.at)

    def _results(
        self,
        plan: DevicePlan,
        entry: str,
        given: Mapping[str, Array],
        outputs: Mapping[str, np.dtype[Any]],
        buffers: Mapping[Space, DeviceBuffer],
        runtime: Runtime,
    ) -> dict[str, Array]:
        """Wait for the launches; return the outputs, or raise the error that a kernel reported."""
        status = [Part(buffers[Status()], plan.table.spaces[Status()])] if plan.tellers else []
        parts = {}
        for name, dtype in outputs.items():
            nbytes = math.prod(plan.shapes[name]) * stored_dtype(dtype, self._form).itemsize
            if nbytes and Output(name) in buffers:
                parts[name] = Part(buffers[Output(name)], nbytes)
        data = runtime.memory.read_parts([*parts.values(), *status])
        if status:
            self._raise_reported(plan, data.pop(), buffers, runtime)
        over, arrays = self.program.entries[entry].over, dict[str, Array]()
        found = dict(zip(parts, data, strict=True))
        for name, dtype in outputs.items():
            shape = plan.shapes[name]
            arrays[name] = of_stored(found.get(name, np.empty(0, np.uint8)), shape, dtype, self._form)
            if name in over:
                given[over[name]][...] = arrays[name]
                arrays[name] = given[over[name]]
        return arrays

    def _check(self, plan: DevicePlan, buffers: Mapping[Space, DeviceBuffer], runtime: Runtime) -> None:
        if plan.tellers:
            data = runtime.memory.read(buffers[Status()], plan.table.spaces[Status()])
            self._raise_reported(plan, data, buffers, runtime)

    def _raise_reported(
        self, plan: DevicePlan, data: Array, buffers: Mapping[Space, DeviceBuffer], runtime: Runtime
    ) -> None:
        """Raise the first error that a kernel reported in its status words, and clear them."""
        if data.any():
            runtime.memory.fill(buffers[Status()], 0, buffers[Status()].nbytes)
            words = data.view(np.int32 if self._form.narrow else np.int64)
            raise reported_error(words, plan.tellers)


class _Prepared:
    """The prepared launches of plans on some states. They are dropped together with the states.

    parts  by plan: prepared launches, and the numbers of collectives
    """

    def __init__(self, machine: DeviceMachine, states: States) -> None:
        owner, key = weakref.ref(machine), id(states)  # no cycle: device memory is released without a collection

        def drop(_: Any) -> None:
            if (alive := owner()) is not None:
                alive._prepared.pop(key, None)

        self.states = weakref.ref(states, drop)
        self.parts: dict[DevicePlan, list[PreparedLaunches | int]] = {}


def _title(space: Space) -> str:
    return f"weight {space.name}" if isinstance(space, Held) else "a constant"


def _source(step: KernelStep) -> str | None:
    return describe_source(step.node.source, step.node.scope) if step.node is not None else None
