"""Buffers of memory spaces on a device.

All plans of a program share the buffers of weights, constants, the arena, inputs, outputs and status words. A buffer
that is too small for a plan is released before a larger one is allocated. So the peak of the device's memory is the sum
of the largest needs of the plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from treadle.backends.states import States
from treadle.backends.tvm.runtimes.device_memory import BufferPart, DeviceBuffer
from treadle.backends.tvm.runtimes.device_plans import DevicePlan
from treadle.backends.tvm.runtimes.device_program import Array, DeviceProgram
from treadle.backends.tvm.runtimes.runtime import Runtime
from treadle.backends.tvm.spaces import Constant, Fixed, Held, Input, Output, Space, State, Status
from treadle.ir.errors import BackendError

PIECE = 64 << 20  # bytes of a weight that are copied to the device at once


class SpaceBuffers:
    """The buffers of a program on a device.

    needs  bytes of each space that the plans need so far, other than weights and constants
    """

    def __init__(self, program: DeviceProgram, runtime: Runtime) -> None:
        self.program, self.runtime = program, runtime
        self.needs: dict[Space, int] = {}
        self._fixed: dict[Fixed, DeviceBuffer] = {}
        self._shared: dict[Space, DeviceBuffer] = {}

    def clear(self) -> None:
        """Forget all buffers, since the device was lost."""
        self._fixed.clear()
        self._shared.clear()

    def copy_weights(self) -> None:
        """Copy weights and constants to the device, once, and release them on the host."""
        program, memory = self.program, self.runtime.memory
        if not program.weights:
            return
        buffers: dict[Fixed, DeviceBuffer] = {}
        copied: dict[int, DeviceBuffer] = {}  # several names may have one array
        for space, array in program.weights.items():
            if id(array) not in copied:
                flat = np.ascontiguousarray(program.stored_weight(space)).reshape(-1).view(np.uint8)
                copied[id(array)] = memory.allocate(program.needs[space])
                for at in range(0, flat.size, PIECE):
                    memory.write(copied[id(array)], flat[at : at + PIECE], at)
            buffers[space] = copied[id(array)]
        self._fixed |= buffers
        program.weights.clear()

    def read_weights(self) -> dict[Fixed, Array]:
        """Return the bytes of weights and constants on the device."""
        parts = [BufferPart(buffer, buffer.nbytes) for buffer in self._fixed.values()]
        return dict(zip(self._fixed, self.runtime.memory.read_parts(parts), strict=True))

    def required(self, plan: DevicePlan, over: Mapping[str, str]) -> int:
        """Return the bytes that have to be allocated for a plan, including weights.

        over  outputs that are stored in a donated input, by the names of both
        """
        growth = sum(nbytes - self._size(space) for space, nbytes in self._too_small(plan, over).items())
        return growth + (0 if self._fixed else sum(self.program.needs.values()))

    def bound(
        self, plan: DevicePlan, states: States, over: Mapping[str, str], release: Callable[[], None]
    ) -> dict[Space, DeviceBuffer]:
        """Return the buffer of each space of a plan. New status words are filled with 0.

        release  drops all other references to the shared buffers, before one of them is replaced
        """
        memory, small = self.runtime.memory, self._too_small(plan, over)
        if small:
            release()
            for space in small:
                self._shared.pop(space, None)
            for space, nbytes in small.items():
                self.needs[space] = nbytes
                self._shared[space] = memory.allocate(nbytes)
            if Status() in small:
                self.clear_status()
        buffers: dict[Space, DeviceBuffer] = {}
        for space in plan.table.spaces:
            if isinstance(space, State):
                buffers[space] = self._state(states, space.name)
            elif isinstance(space, (Held, Constant)):
                buffers[space] = self._fixed[space]
            elif not (isinstance(space, Output) and space.name in over):
                buffers[space] = self._shared[space]
        return buffers | {Output(name): self._shared[Input(donated)] for name, donated in over.items()}

    def clear_status(self) -> None:
        """Fill the status words with 0."""
        buffer = self._shared.get(Status())
        if buffer is not None:
            self.runtime.memory.fill(buffer, 0, buffer.nbytes)

    def _too_small(self, plan: DevicePlan, over: Mapping[str, str]) -> dict[Space, int]:
        """Return the shared spaces that a plan needs larger than they are, with the bytes that it needs."""
        return {
            space: nbytes
            for space, nbytes in plan.table.spaces.items()
            if not isinstance(space, (State, Held, Constant))
            and not (isinstance(space, Output) and space.name in over)
            and self._size(space) < nbytes
        }

    def _size(self, space: Space) -> int:
        buffer = self._shared.get(space)
        return 0 if buffer is None else buffer.nbytes

    def _state(self, states: States, name: str) -> DeviceBuffer:
        array = states[name]
        if array.runtime is not self.runtime:
            raise BackendError(
                f"the states are on another device than {self.program.name}",
                received=f"{array.runtime.name}, not {self.runtime.name}",
                hint="new_states of the executable that is called",
            )
        buffer: DeviceBuffer = array.buffer
        return buffer
