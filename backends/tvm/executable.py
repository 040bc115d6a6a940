"""Executables of kernels: a program, its kernels, and the machine that runs it on the CPU or on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from treadle.backends.bfloat16 import bf16_given, bf16_taken
from treadle.backends.donation import Donated
from treadle.backends.entries import EntryExecutable
from treadle.backends.protocol import Outputs, Port, ports
from treadle.backends.signature import Signature, gives_tensors, numpy_taken
from treadle.backends.states import ARRAYS, StateKinds, States
from treadle.backends.tvm.host_machine import HostMachine
from treadle.backends.tvm.kernels.devices.cuda_compiler import architecture_of, compile_ptx
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel
from treadle.backends.tvm.kernels.host.cache import KernelCache, assembly
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.lowering.leftovers import find_leftovers
from treadle.backends.tvm.lowering.listing import list_program, unique_titles
from treadle.backends.tvm.lowering.program import KernelProgram, kernels_of
from treadle.backends.tvm.machine_calls import MachineCall
from treadle.backends.tvm.output_memory import stored
from treadle.backends.tvm.planning import Plan
from treadle.backends.tvm.runtimes.device_arrays import DeviceAccess
from treadle.backends.tvm.runtimes.device_machine import DeviceMachine
from treadle.backends.tvm.runtimes.device_plans import DevicePlan
from treadle.backends.tvm.runtimes.launch_table import LaunchTable
from treadle.backends.tvm.spaces import Fixed
from treadle.ir.errors import BackendError
from treadle.ir.graph import Function, Graph
from treadle.passes.memory.storage_plan import StoragePlan

Array = np.ndarray[Any, Any]


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
        machine: HostMachine | DeviceMachine,
        threads: int,
        prepared: Sequence[str] = (),
        plan: StoragePlan | None = None,
    ) -> None:
        """Create an executable from a program and the machine that runs it.

        prepared  descriptions of the values computed from weights by `bind`, one line each
        plan      lists the donated inputs; None means that no input is donated
        """
        if isinstance(machine, DeviceMachine):
            super().__init__(graph, f"tvm ({machine.target})", machine.allocate, DeviceAccess())
        else:
            super().__init__(graph, "tvm", machine.allocate, ARRAYS)
        self._prepared = prepared
        self.program, self.cache, self.machine, self.threads = program, cache, machine, threads
        self.notes = find_leftovers(program, graph.symbols)
        self.compiled = cache.compiled
        entry = partial(_KernelEntry, machine, program, self.state_kinds, graph, plan)
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
        """Bytes of the packed weights and of the arena of the largest run so far; on a device, also of the buffers of
        inputs, outputs and status words.
        """
        return self.machine.nbytes

    def assembly(self, title: str) -> str:
        """Return the assembly of the kernel with this title in `source`; for an NVIDIA GPU its PTX.

        Raises BackendError if there is no such kernel, for a kernel that the device refuses, for other devices, whose
        drivers compile the text of kernels, and if NVRTC is not installed.
        """
        titles = {name: kernel for kernel, name in unique_titles(self.kernels).items() if not kernel.on_host}
        if title not in titles:
            raise BackendError(f"there is no kernel {title!r}", hint="one of " + ", ".join(titles))
        if not isinstance(self.machine, DeviceMachine):
            return assembly(titles[title], self.cache.isa)
        target = self.machine.target
        if self.machine.program.device.limits.language != "cuda":
            what = f"kernels for {target} have no assembly: its driver compiles their text"
            raise BackendError(what, hint="read the text in `source`")
        if title not in self.device_kernels:
            raise BackendError(f"{target} does not run the kernel {title}", hint="explain device has the reason")
        return compile_ptx(self.device_kernels[title].text, architecture_of(target.hardware.capability))

    # -- devices ---------------------------------------------------------------------------------------------

    @property
    def device_kernels(self) -> dict[str, DeviceKernel]:
        """The kernels of the device by their titles in `source`. Raises BackendError for a CPU."""
        return self._device_machine().program.kernels()

    def launch_table(self, entry: str | None = None, **sizes: int) -> LaunchTable:
        """Return the launches of an entry, by default the last one, at these sizes of its symbols. No device is needed.

        Raises BackendError for a CPU, and for an entry or a size that is missing.
        """
        machine, name = self._device_machine(), entry or self.entries[-1]
        self.entry(name)
        missing = sorted(self.program.entries[name].symbols - set(sizes))
        if missing:
            raise BackendError(
                f"the launches of {self.name} need a size for {', '.join(missing)}",
                received=", ".join(f"{symbol}={size}" for symbol, size in sizes.items()) or "no sizes",
                hint="launch_table(" + ", ".join(f"{symbol}=..." for symbol in missing) + ")",
            )
        return machine.program.plan(name, sizes).table

    def stored_weights(self) -> dict[Fixed, Array]:
        """Return weights and constants by their spaces in a launch table, as the device stores them. Raises
        BackendError for a CPU.
        """
        return self._device_machine().weights()

    def _device_machine(self) -> DeviceMachine:
        if not isinstance(self.machine, DeviceMachine):
            raise BackendError(
                f"{self.name} is compiled for the CPU, which has no launches", hint='target="cuda", or another device'
            )
        return self.machine


class _KernelEntry:
    """An entry as a routine of kernel calls. See `treadle.backends.protocol.Entry`."""

    def __init__(
        self,
        machine: HostMachine | DeviceMachine,
        program: KernelProgram,
        kinds: StateKinds,
        graph: Graph,
        plan: StoragePlan | None,
        function: Function,
    ) -> None:
        self._donated = Donated(plan, function)
        self._machine, self._kinds, self._name = machine, kinds, function.name
        self._program = program.entries[function.name]
        self.signature = Signature(graph, function)
        self.inputs = self.signature.ports
        self.outputs = ports(function.outputs)
        self._stored = {port.name: stored(port.dtype) for port in self.outputs}
        self.signature.refuse_undetermined(self._program.symbols)

    def __call__(self, states: States | None = None, /, **given: Any) -> Outputs:
        call = self._call(given, states)
        self._donated.check(self.inputs, given, list(call.inputs.values()), self._machine.lasting(call.states))
        made = self._machine.run(call)
        tensors = gives_tensors(map(type, given.values()))
        outputs = Outputs({p.name: give(p, made[p.name], tensors) for p in self.outputs})
        return self._donated.returned(given, outputs)

    def timed(
        self, given: Mapping[str, Any], runs: int, states: States | None = None
    ) -> tuple[Plan | DevicePlan, dict[str, int], list[list[float]]]:
        """Run the entry `runs` times on arrays by name, and on states, and time each kernel call.

        Returns the plan, the sizes of the symbols, and for each run the seconds of every call. For profiling; see
        `treadle.backends.tvm.profiling`. Raises BackendError as a call does.
        """
        call = self._call(given, states)
        plan, seconds = self._machine.timed(call, runs)
        return plan, dict(call.sizes), seconds

    def _call(self, values: Mapping[str, Any], states: States | None) -> MachineCall:
        """Return a call on a caller's values, in the form that kernels read."""
        held = self._kinds.check(states)
        taken, sizes = self.signature.bind_sized(values, take, held.sizes)
        arrays = dict(zip(self._program.inputs, taken, strict=True))
        return MachineCall(self._name, sizes, arrays, held, self._stored)

    def __repr__(self) -> str:
        takes, gives = (", ".join(map(str, p)) for p in (self.inputs, self.outputs))
        return f"<entry {self._name}({takes}) -> {gives}>"


# -- arrays --------------------------------------------------------------------------------------------------


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
