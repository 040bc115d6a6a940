"""Run five kernels as WGSL on wgpu, and as OpenCL in the one-lane form on PoCL: `python -m tests.fuzz.device_runtimes`.

Softmax, a norm and products with three widths of panels are compared with NumPy, within 1e-5, with all arrays in one
buffer. A runtime that is missing is named and left out. The exit status is 1 for a difference.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel, device_kernel
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.matmul import Matmul
from treadle.backends.tvm.kernels.normalization import Normalize
from treadle.backends.tvm.kernels.softmax import Softmax
from treadle.backends.tvm.runtimes.launch_table import Argument, Launch
from treadle.backends.tvm.runtimes.runtime import Runtime, find_runtime
from treadle.backends.tvm.spaces import Arena
from treadle.ir.errors import BackendError
from treadle.ir.target import Target

Array = np.ndarray[Any, Any]
BLOCKS = 3


def cases() -> Iterator[tuple[Kernel, list[Array], list[int], Array]]:
    """Yield kernels with their arrays, their sizes, and the expected last array."""
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    for m, d in ((5, 100), (4, 1000)):
        x, weight, bias = drawn(m, d), drawn(d), drawn(d)
        wide = np.exp(x.astype(np.float64))
        yield Softmax(False, "f32"), [x, np.empty_like(x)], [m, 1, *[d] * 5], wide / wide.sum(1, keepdims=True)
        wide = x - x.astype(np.float64).mean(1, keepdims=True)
        wide = wide / np.sqrt((wide * wide).mean(1, keepdims=True) + 1e-5) * weight + bias
        kernel = Normalize(True, True, True, 1e-5, "f32")
        yield kernel, [x, weight, bias, np.empty_like(x)], [1, m, d, 0, d, 0, d], wide
    for width in (32, 64, 96):
        m, n, k = 17, 100, 64
        a, w, panels = drawn(m, k), drawn(n, k), -(-n // width)
        packed = np.zeros((panels * width, k), np.float32)
        packed[:n] = w
        packed = np.ascontiguousarray(packed.reshape(panels, width, k).transpose(0, 2, 1))
        yield Matmul(width), [a, packed, np.empty((m, n), np.float32)], [m, k, n, k, n], a.astype(np.float64) @ w.T


def run(runtime: Runtime, kernel: DeviceKernel, arrays: Sequence[Array], sizes: Sequence[int]) -> Array:
    """Run a kernel on arrays and sizes, and return the last array."""
    alignment, begin = runtime.device.limits.alignment, 0
    arguments = list[Argument]()
    for array in arrays:
        arguments.append(Argument(Arena(), begin, array.nbytes))
        begin += -(-array.nbytes // alignment) * alignment
    arena = runtime.memory.allocate(begin)
    for array, argument in zip(arrays, arguments, strict=True):
        runtime.memory.write(arena, array, argument.begin)
    launch = Launch("kernel", BLOCKS, tuple(arguments), tuple(sizes))
    runtime.load({"kernel": kernel}).prepare([launch], {Arena(): arena}).run()
    read = runtime.memory.read(arena, arrays[-1].nbytes, arguments[-1].begin)
    return read.view(arrays[-1].dtype).reshape(arrays[-1].shape)


def main() -> int:
    failed = 0
    for name in ("webgpu", "opencl"):
        try:
            runtime = find_runtime(Target(name))
        except BackendError as error:
            print(f"{name} is left out: {error.what}")
            continue
        device = runtime.device if name == "webgpu" else runtime.device.slow
        for kernel, arrays, sizes, expected in cases():
            begin = time.perf_counter()
            made = run(runtime, device_kernel(kernel, device), arrays, sizes)
            off = float(np.abs(made - expected).max())
            failed += not off <= 1e-5
            print(f"{name} {kernel.title} {sizes}: off by {off:.1e}, {time.perf_counter() - begin:.1f} s", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
