"""Executables of a device on the emulator: a whole program's kernels as device text, on the memory of the host.

    exe = emulated(treadle.compile("gpt2", backend="tvm", target="cuda", ...))
    exe(ids=ids)

The plan and its table are those of the CPU (`treadle.backends.tvm.planning`); only the runner of the table differs.
Every pointer of a launch is bound to the bytes of its storage, so that an access outside it is found even within the
arena.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from tests.support.gpu_emulator.emulation import EmulatedKernel, Region, build
from treadle.backends.poison import BYTE
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.device_kernels import device_kernel
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.planning import Plan
from treadle.backends.tvm.spaces import Output

WORD = 16
"""Bytes of an argument in a plan: a type code and a value."""


class EmulatorRunner:
    """A runner of tables, as `treadle.backends.tvm.executable` calls it.

    blocks  number of blocks of a launch
    seed    determines the order of threads and of blocks
    """

    def __init__(self, machine: Any, device: Device, kernels: tuple[Kernel, ...]) -> None:
        self.machine, self.blocks, self.seed = machine, 3, 1
        self.kernels = {
            k: EmulatedKernel(device_kernel(k, device, f"kernel_{n}")) for n, k in enumerate(kernels) if not k.on_host
        }
        self.launches = 0

    def __call__(self, table: Any) -> int:
        entry, plan, sizes, first = self._plan_of(table)
        if first == 0:
            self._poison_outputs(entry, plan)
        for number in range(first, first + len(table)):
            self._launch(plan, dict(sizes), number)
        return -1

    def _poison_outputs(self, entry: str, plan: Plan) -> None:
        """Fill the outputs, which may be in memory of an earlier call, with NaN."""
        program = self.machine.program.entries[entry]
        for name, shape in plan.shapes.items():
            if name not in program.over:
                size = math.prod(shape) * program.outputs[name].dtype.bytes
                ctypes.memset(plan.begins[Output(name)], BYTE, size)

    def _plan_of(self, table: Any) -> tuple[str, Plan, Any, int]:
        """Return the entry and the plan of a table or of a part of it, its sizes, and the number of the part's first
        record.
        """
        for (entry, sizes), plan in self.machine.plans.items():
            at = table.ctypes.data - plan.table.ctypes.data
            if 0 <= at < plan.table.nbytes:
                return entry, plan, sizes, at // plan.table.strides[0]
        raise AssertionError("the table is in no plan")

    def _launch(self, plan: Plan, sizes: dict[str, int], number: int) -> None:
        step = plan.steps[number]
        words = plan.table[number]
        given = (ctypes.c_longlong * (2 * int(words[3]))).from_address(int(words[2]))
        values = list(given)[1::2]
        regions = []
        for view, address in zip(step.pointers, values, strict=False):
            at = view.offset.evaluate(sizes)
            begin, size = address - at * view.dtype.bytes, view.storage.nbytes.evaluate(sizes)
            regions.append(Region(_bytes_at(begin, size), at))
        self.kernels[step.kernel].launch(
            regions, values[len(step.pointers) :], blocks=self.blocks, seed=self.seed + number
        )
        self.launches += 1


def _bytes_at(address: int, size: int) -> np.ndarray[Any, Any]:
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), np.uint8) if size else np.empty(0, np.uint8)


def emulated(exe: Any) -> Any:
    """Make an executable of a device callable, by the emulator, and return it. `exe.emulator` is the runner."""
    executable = exe.executable
    assert isinstance(executable, KernelExecutable)
    device = executable.cache.isa
    assert isinstance(device, Device)
    machine = executable.machine
    runner = EmulatorRunner(machine, device, executable.kernels)
    build(list(runner.kernels.values()))
    machine._entries = {**dict.fromkeys(executable.kernels, (0, 0)), **machine._entries}
    machine._runner = runner
    return exe


def runner_of(exe: Any) -> EmulatorRunner:
    """Return the emulator's runner of an executable."""
    made = exe.executable.machine._runner
    assert isinstance(made, EmulatorRunner)
    return made
