"""Counters of the emulator: sectors of global memory and bank conflicts of shared memory."""

from __future__ import annotations

import numpy as np
import pytest

from tests.backend_checks import needs_tvm
from tests.support.gpu_emulator.emulation import EmulatedKernel, Region, compiler
from tests.test_device_kernels import CUDA, Written
from treadle.backends.tvm.kernels.devices.device_kernels import device_kernel

pytestmark = [needs_tvm, pytest.mark.skipif(compiler() is None, reason="no C++ compiler")]


def test_sectors_and_bank_conflicts_are_counted_by_line() -> None:
    """y = x reversed, through shared memory: as it is written, and with a stride in both memories."""
    kernel = device_kernel(Written("reversed"), CUDA)
    x = np.arange(64, dtype=np.float32)
    y = np.full(32, np.nan, np.float32)

    def counted(text: str) -> dict[tuple[str, bool], tuple[int, int, int, int]]:
        """Return instructions, accesses, units and least units by array, apart for the line that reads the tile."""
        emulated = EmulatedKernel(kernel, text, counts=True)
        emulated.launch([Region(x), Region(y)], [], blocks=1)
        found = emulated.counters()
        assert [each.shared for each in found] == [each.name == "tile_0" for each in found]
        return {(c.name, "tile_0[31" in c.line): (c.instructions, c.accesses, c.units, c.least) for c in found}

    loads, stores, writes, reads = ("x_0", False), ("y_0", True), ("tile_0", False), ("tile_0", True)
    assert counted(kernel.body) == {
        loads: (1, 32, 4, 4),
        writes: (1, 32, 1, 1),
        reads: (32, 32, 32, 32),  # the first thread reads and stores one element after the other
        stores: (32, 32, 32, 32),
    }
    text = kernel.body.replace("TREADLE_SHARED(float, tile_0, 32)", "TREADLE_SHARED(float, tile_0, 128)")
    strided = counted(text.replace("tile_0[lane]", "tile_0[lane * 4]").replace("x_0_at + lane]", "x_0_at + lane * 2]"))
    assert strided[loads] == (1, 32, 8, 4)
    assert strided[writes] == (1, 32, 4, 1)  # four threads access each of eight banks
