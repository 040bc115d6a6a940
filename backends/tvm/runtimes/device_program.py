"""A program for a device, as far as no device is needed: its kernels as text, its weights, and a plan for each set of
sizes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel, device_kernel
from treadle.backends.tvm.kernels.devices.group_kernel import LackingWord
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.lowering.listing import unique_titles
from treadle.backends.tvm.lowering.program import KernelProgram, kernels_of
from treadle.backends.tvm.placed_calls import FixedSpaces, place_calls
from treadle.backends.tvm.runtimes.device_arrays import stored_dtype, to_stored
from treadle.backends.tvm.runtimes.device_plans import DeviceEncoder, DevicePlan, memory_form
from treadle.backends.tvm.runtimes.plan_limits import exceeded_limits, located
from treadle.backends.tvm.spaces import Constant, Fixed, Held
from treadle.ir.errors import BackendError
from treadle.ir.types import i64

Array = np.ndarray[Any, Any]

PLANS = 64  # number of sets of sizes whose plans are cached; a server of 24 rows has some 45


class DeviceProgram:
    """A program for a device.

    device   the device that was compiled for, or the one that was opened (`use`)
    titles   the names of the kernels
    weights  weights and constants on the host, until they are copied to the device
    needs    bytes of each weight and constant on the device. Of several names of one array, the first one counts
    plans    plans by entry and sizes, least recently used first
    """

    def __init__(
        self, name: str, program: KernelProgram, device: Device, weights: Mapping[str, Array] | None = None
    ) -> None:
        """Create a program. `weights` may be None if the program is only inspected."""
        self.name, self.entries, self.routines = name, program.entries, program.routines
        self.titles = unique_titles(kernels_of(program))
        self.plans: OrderedDict[tuple[str, tuple[tuple[str, int], ...]], DevicePlan] = OrderedDict()
        self._spaces = FixedSpaces(program)
        self.weights: dict[Fixed, Array] = {
            Held(name): weights[name]
            for entry in program.entries.values()
            for name in entry.weights
            if weights is not None
        }
        for number, (dtype, content) in enumerate(self._spaces.constants):
            data = np.frombuffer(content, np.uint8)
            self.weights[Constant(number)] = data.view(np.int64) if dtype is i64 else data
        self._kernels: dict[Kernel, DeviceKernel] = {}
        self._lacking: dict[Kernel, LackingWord] = {}
        self.use(device)

    def use(self, device: Device) -> None:
        """Generate kernels and plans for this device from now on."""
        self.device, self.form = device, memory_form(device)
        self._kernels.clear()
        self._lacking.clear()
        self.plans.clear()
        self.needs: dict[Fixed, int] = {}
        first: set[int] = set()
        for space, array in self.weights.items():
            nbytes = self.form.size(array.size * stored_dtype(array.dtype, self.form).itemsize)
            self.needs[space] = 0 if id(array) in first else nbytes
            first.add(id(array))

    def stored_weight(self, space: Fixed) -> Array:
        """Return a weight or a constant on the host, in the form in which the device stores it."""
        what = f"weight {space.name}" if isinstance(space, Held) else "a constant"
        return to_stored(self.weights[space], self.form, what)

    def kernels(self, entry: str | None = None) -> dict[str, DeviceKernel]:
        """Return the kernels of the device by name, without collectives and without kernels that the device refuses.

        entry  only kernels of this entry; None: all
        """
        routines = self.routines if entry is None else self.entries[entry].routines
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
        encoder = DeviceEncoder(self.device, self.titles, self.kernels(entry))
        try:
            placed = place_calls(self.entries[entry], sizes, self._spaces.of(self.entries[entry]), self.form)
        except OverflowError as error:  # a size exceeds 64 bits
            received = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise BackendError(
                f"{self.name}: these sizes need more memory than is addressable", received=received
            ) from error
        plan = self.plans[key] = encoder.plan(placed, sizes)
        if len(self.plans) > PLANS:
            self.plans.popitem(last=False)
        return plan

    def exceeded(self, plan: DevicePlan) -> list[str]:
        """Return a line for each limit of the device that a plan exceeds, other than its memory."""
        lines = dict[str, None]()
        for step in plan.steps:
            if (lacking := self._lacking.get(step.kernel)) is not None:
                lines[located(f"{self.titles[step.kernel]} uses the word `{lacking.word}`: {lacking.why}", step)] = None
        return [*lines, *exceeded_limits(plan, self.device.limits)]
