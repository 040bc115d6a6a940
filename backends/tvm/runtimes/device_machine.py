"""The machine that runs programs on a device.

The device is opened when it is first needed, so a program can be compiled and inspected without one. Weights are packed
on the host and copied to the device before the first run; then the host's copy is released. A run copies the inputs,
enqueues the launches, and waits once, for the outputs and the status words together. States bring their own buffers,
and are never copied back.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from treadle.backends.poison import poisons
from treadle.backends.states import States
from treadle.backends.tvm.host_calls import HostCall
from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.lowering.program import KernelProgram
from treadle.backends.tvm.machine_calls import MachineCall
from treadle.backends.tvm.output_memory import stored
from treadle.backends.tvm.placed_calls import reported_error
from treadle.backends.tvm.poisoning import run_poisoned_on_device
from treadle.backends.tvm.runtimes.device_arrays import DeviceArray, of_stored, stored_dtype, to_stored
from treadle.backends.tvm.runtimes.device_memory import BufferPart, DeviceBuffer, DeviceLostError
from treadle.backends.tvm.runtimes.device_plans import DevicePlan
from treadle.backends.tvm.runtimes.device_program import DeviceProgram
from treadle.backends.tvm.runtimes.plan_limits import exceeded_memory, refuse
from treadle.backends.tvm.runtimes.runtime import (
    LoadedKernels,
    PreparedLaunches,
    Runtime,
    find_runtime,
    forget_runtime,
)
from treadle.backends.tvm.runtimes.space_buffers import SpaceBuffers
from treadle.backends.tvm.spaces import Fixed, Input, Output, Space, Status
from treadle.ir.builder import describe_source
from treadle.ir.target import Target
from treadle.ir.types import DType

Array = np.ndarray[Any, Any]
Buffers = Mapping[Space, DeviceBuffer]


class DeviceMachine:
    """The state for running the entries of a program on a device. One call runs at a time on a device.

    target   the target that was compiled for
    program  the program, with its kernels and plans
    open     opens the device; tests replace it
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
        self.target, self.program = target, DeviceProgram(name, program, device, weights)
        self.open: Callable[[], Runtime] = partial(find_runtime, target)
        self._collectives = collectives
        self._buffers: SpaceBuffers | None = None
        self._loaded: dict[str, LoadedKernels] = {}
        self._checked: weakref.WeakSet[DevicePlan] = weakref.WeakSet()
        self._prepared: dict[int, _PreparedPlans] = {}
        self._is_lost = False
        self._is_clear = True  # the status words are 0

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the plans of all calls so far need, without states: weights, constants, and the
        largest arena, inputs, outputs and status words. It is computed from the plans; the runtime counts the same
        (`DeviceMemory.used`), if no other executable uses the device.
        """
        shared = {} if self._buffers is None else self._buffers.needs
        return sum(self.program.needs.values()) + sum(shared.values())

    # -- opening ---------------------------------------------------------------------------------------------

    def runtime(self) -> Runtime:
        """Return the runtime; open the device if necessary. Raises BackendError if there is none, with what to
        install, and DeviceLostError if it was lost.
        """
        return self._opened().runtime

    def _opened(self) -> SpaceBuffers:
        if self._is_lost:
            raise DeviceLostError(
                f"{self.program.name} cannot run any more, because its device was lost",
                hint="compile it again, which opens the device again",
            )
        if self._buffers is None:
            runtime = self.open()
            with runtime.lock:
                if self._buffers is None:
                    self.program.use(runtime.device)
                    self._buffers = SpaceBuffers(self.program, runtime)
        return self._buffers

    @contextmanager
    def _at_work(self) -> Iterator[SpaceBuffers]:
        """Hold the device's lock. If the device is lost, all later calls raise DeviceLostError."""
        buffers = self._opened()
        with buffers.runtime.lock:
            try:
                yield buffers
            except DeviceLostError:
                self._is_lost = True
                self._prepared.clear()
                buffers.clear()
                forget_runtime(buffers.runtime)
                raise

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> DeviceArray:
        """Return a state of zeros on the device."""
        kind = stored(dtype)
        with self._at_work() as buffers:
            runtime, form = buffers.runtime, self.program.form
            nbytes = form.size(math.prod(shape) * stored_dtype(kind, form).itemsize)
            buffer = runtime.memory.allocate(nbytes)
            runtime.memory.fill(buffer, 0, nbytes)
        return DeviceArray(runtime, buffer, shape, kind, form)

    def lasting(self, states: States) -> tuple[Array, ...]:
        """Return the host's arrays that outlive a call: none."""
        return ()

    def weights(self) -> dict[Fixed, Array]:
        """Return weights and constants as the device stores them; after the first run, their bytes."""
        if self.program.weights:
            return {space: self.program.stored_weight(space) for space in self.program.weights}
        with self._at_work() as buffers:
            return buffers.read_weights()

    def exceeded(self, entry: str, sizes: Mapping[str, int]) -> list[str]:
        """Return a line for each limit of the device that a run exceeds; of its memory, if the device is open."""
        plan = self.program.plan(entry, sizes)
        lines = self.program.exceeded(plan)
        if self._buffers is not None:
            required = self._buffers.required(plan, self.program.entries[entry].over)
            lines += exceeded_memory(plan, required, self._buffers.runtime.memory.free)
        return lines

    # -- running ---------------------------------------------------------------------------------------------

    def run(self, call: MachineCall) -> dict[str, Array]:
        """Run an entry. Return new arrays of the outputs."""
        with self._at_work() as spaces:
            plan, buffers = self._ready(call, spaces)
            run = _Run(self, plan, self._loaded[call.entry], buffers, spaces.runtime)
            self._is_clear = False
            if poisons():
                over = self.program.entries[call.entry].over
                run_poisoned_on_device(
                    plan, spaces.runtime.memory, buffers, over, lambda a, b: run.launch(run.prepare(a, b))
                )
            else:
                run.launch(self._parts(run, call.states))
            results = run.results(call.inputs, call.outputs, self.program.entries[call.entry].over)
            self._is_clear = True
            return results

    def timed(self, call: MachineCall, runs: int) -> tuple[DevicePlan, list[list[float]]]:
        """Run an entry `runs` times, launch by launch. Return its plan and, for each run, the seconds of every launch,
        from its start until the host knows that it has ended.
        """
        with self._at_work() as spaces:
            plan, buffers = self._ready(call, spaces)
            run = _Run(self, plan, self._loaded[call.entry], buffers, spaces.runtime)
            self._is_clear = False
            seconds: list[list[float]] = [[] for _ in plan.steps]
            for _ in range(runs):
                for number, found in enumerate(seconds):
                    parts = run.prepare(number, number + 1)
                    run.wait()
                    started = time.perf_counter()
                    run.launch(parts)
                    run.wait()
                    found.append(time.perf_counter() - started)
                run.results(call.inputs, {}, {})
            self._is_clear = True
        return plan, seconds

    def _ready(self, call: MachineCall, spaces: SpaceBuffers) -> tuple[DevicePlan, Buffers]:
        """Return an entry's plan and the buffers of its spaces, with the inputs in them."""
        program, runtime = self.program, spaces.runtime
        stored_inputs = {name: to_stored(array, program.form, f"input {name}") for name, array in call.inputs.items()}
        plan = program.plan(call.entry, call.sizes)
        if plan not in self._checked:
            refuse(program.name, f"{self.target} ({runtime.name})", self.exceeded(call.entry, call.sizes))
            self._checked.add(plan)
        if call.entry not in self._loaded:
            self._loaded[call.entry] = runtime.load(program.kernels(call.entry))
        spaces.copy_weights()
        if not self._is_clear:
            spaces.clear_status()
        known = self._prepared_on(call.states).get(plan)
        buffers: Buffers
        if known is None:
            buffers = spaces.bound(plan, call.states, program.entries[call.entry].over, self._prepared.clear)
        else:
            buffers = known.buffers
        for name, array in stored_inputs.items():
            if Input(name) in buffers and array.size:
                runtime.memory.write(buffers[Input(name)], array)
        return plan, buffers

    def _parts(self, run: _Run, states: States) -> list[PreparedLaunches | int]:
        """Return the parts of a plan. They are prepared once, while the plan and the states exist."""
        prepared = self._prepared_on(states)
        if run.plan not in prepared:
            prepared[run.plan] = _PreparedPlan(run.buffers, run.prepare(0, len(run.plan.steps)))
        return prepared[run.plan].parts

    def _prepared_on(self, states: States) -> MutableMapping[DevicePlan, _PreparedPlan]:
        """Return the prepared plans on some states."""
        prepared = self._prepared.get(id(states))
        if prepared is None or prepared.states() is not states:
            prepared = self._prepared[id(states)] = _PreparedPlans(self, states)
        return prepared.plans

    def collective(self, kernel: Kernel) -> HostCall:
        """Return the function of a collective."""
        return self._collectives[kernel]


class _PreparedPlan(NamedTuple):
    """The buffers of a plan, and its parts: prepared launches, and the numbers of collectives."""

    buffers: Buffers
    parts: list[PreparedLaunches | int]


class _PreparedPlans:
    """The prepared plans on some states. They are dropped together with the plans and the states, and when one of the
    buffers is replaced.
    """

    def __init__(self, machine: DeviceMachine, states: States) -> None:
        owner, key = weakref.ref(machine), id(states)  # no cycle: device memory is released without a collection

        def drop(_: Any) -> None:
            if (alive := owner()) is not None:
                alive._prepared.pop(key, None)

        self.states = weakref.ref(states, drop)
        self.plans: weakref.WeakKeyDictionary[DevicePlan, _PreparedPlan] = weakref.WeakKeyDictionary()


class _Run:
    """A run of a plan on buffers."""

    def __init__(
        self, machine: DeviceMachine, plan: DevicePlan, loaded: LoadedKernels, buffers: Buffers, runtime: Runtime
    ) -> None:
        self.machine, self.plan, self.loaded = machine, plan, loaded
        self.buffers, self.memory, self.form = buffers, runtime.memory, machine.program.form

    def prepare(self, begin: int, end: int) -> list[PreparedLaunches | int]:
        """Return consecutive calls of the plan: prepared launches, and the numbers of collectives."""
        launches = self.plan.table.launches
        return [
            first if self.plan.steps[first].kernel.on_host else self.loaded.prepare(launches[first:last], self.buffers)
            for first, last in self.plan.parts(begin, end)
        ]

    def launch(self, parts: list[PreparedLaunches | int]) -> None:
        for part in parts:
            if isinstance(part, int):
                self._collective(part)
            else:
                part.run()

    def wait(self) -> None:
        """Wait until all launches have ended."""
        self.memory.read_parts([BufferPart(next(iter(self.buffers.values())), 4)])

    def _collective(self, number: int) -> None:
        """Run a collective on host copies of its operand and its result."""
        launch, step = self.plan.table.launches[number], self.plan.steps[number]
        x, y = launch.arguments
        call = self.machine.collective(step.kernel)
        kind, element = stored(call.kernel.dtype), self.form.element(call.kernel.dtype)
        counts = [math.prod(shape) for shape in call.shapes(launch.sizes)]
        data = self.memory.read(self.buffers[x.space], counts[0] * element, x.begin + x.at * element)
        operand, result = of_stored(data, (-1,), kind, self.form), np.empty(counts[1], kind)
        source = describe_source(step.node.source, step.node.scope) if step.node is not None else None
        call.run(operand.view(np.uint8), result.view(np.uint8), launch.sizes, source)
        if result.size:
            returned = to_stored(result, self.form, f"the result of {step.kernel.title}")
            self.memory.write(self.buffers[y.space], returned, y.begin + y.at * element)

    def results(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, np.dtype[Any]], over: Mapping[str, str]
    ) -> dict[str, Array]:
        """Wait for the launches; return the outputs, or raise the error that a kernel reported."""
        plan, form = self.plan, self.form
        parts = {}
        for name, dtype in outputs.items():
            nbytes = math.prod(plan.shapes[name]) * stored_dtype(dtype, form).itemsize
            if nbytes and Output(name) in self.buffers:
                parts[name] = BufferPart(self.buffers[Output(name)], nbytes)
        status = [BufferPart(self.buffers[Status()], plan.table.spaces[Status()])] if plan.tellers else []
        data = self.memory.read_parts([*parts.values(), *status])
        if status and (words := data.pop()).any():
            raise reported_error(words.view(np.int32 if form.narrow else np.int64), plan.tellers)
        found, arrays = dict(zip(parts, data, strict=True)), dict[str, Array]()
        for name, dtype in outputs.items():
            arrays[name] = of_stored(found.get(name, np.empty(0, np.uint8)), plan.shapes[name], dtype, form)
            if name in over:
                inputs[over[name]][...] = arrays[name]
                arrays[name] = inputs[over[name]]
        return arrays
