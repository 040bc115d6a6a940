"""Run five kernels as WGSL on wgpu, and as OpenCL in the one-lane form on PoCL: `python -m tests.fuzz.device_runtimes`.

Softmax, a norm and products with three widths of panels are compared with NumPy, within 1e-5. A runtime that is not
installed (`wgpu`, `pyopencl` with `pocl-binary-distribution`) is named and left out. The exit status is 1 for a
difference.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from treadle.backends.tvm.kernels.devices.device import DEVICES, Device
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel, device_kernel
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.matmul import Matmul
from treadle.backends.tvm.kernels.normalization import Normalize
from treadle.backends.tvm.kernels.softmax import Softmax

Array = np.ndarray[Any, Any]
Run = Callable[[DeviceKernel, Sequence[Array], Sequence[int]], None]
"""A function that runs a kernel on arrays and sizes, and writes the last array."""

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


def on_wgpu() -> Run:
    wgpu = import_module("wgpu")
    device = wgpu.gpu.request_adapter_sync().request_device_sync()
    usage = wgpu.BufferUsage

    def run(kernel: DeviceKernel, arrays: Sequence[Array], sizes: Sequence[int]) -> None:
        buffers = [device.create_buffer_with_data(data=a, usage=usage.STORAGE | usage.COPY_SRC) for a in arrays]
        numbers = [*[0] * len(arrays), *sizes]
        numbers += [0] * (-len(numbers) % 4)
        uniform = device.create_buffer_with_data(data=np.array(numbers, np.int32), usage=usage.UNIFORM)
        entries = [{"binding": i, "resource": {"buffer": b}} for i, b in enumerate([*buffers, uniform])]
        shader = {"module": device.create_shader_module(code=kernel.text), "entry_point": kernel.group_kernel.name}
        pipeline = device.create_compute_pipeline(layout="auto", compute=shader)
        group = device.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries)
        encoder = device.create_command_encoder()
        commands = encoder.begin_compute_pass()
        commands.set_pipeline(pipeline)
        commands.set_bind_group(0, group)
        commands.dispatch_workgroups(BLOCKS)
        commands.end()
        device.queue.submit([encoder.finish()])
        made = np.frombuffer(device.queue.read_buffer(buffers[-1]), arrays[-1].dtype)
        arrays[-1][...] = made.reshape(arrays[-1].shape)

    return run


def on_opencl() -> Run:
    cl = import_module("pyopencl")
    context = cl.Context(cl.get_platforms()[0].get_devices())
    queue = cl.CommandQueue(context)

    def run(kernel: DeviceKernel, arrays: Sequence[Array], sizes: Sequence[int]) -> None:
        function = getattr(cl.Program(context, kernel.text).build(["-cl-std=CL1.2"]), kernel.group_kernel.name)
        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
        buffers = [cl.Buffer(context, flags, hostbuf=a) for a in arrays]
        function.set_args(*[v for b in buffers for v in (b, np.int64(0))], *map(np.int64, sizes))
        threads = kernel.group_kernel.device.threads
        cl.enqueue_nd_range_kernel(queue, function, (BLOCKS * threads,), (threads,))
        cl.enqueue_copy(queue, arrays[-1], buffers[-1])
        queue.finish()

    return run


def main() -> int:
    failed = 0
    runtimes: list[tuple[str, Callable[[], Run], Device]] = [
        ("wgpu", on_wgpu, DEVICES["webgpu"]),
        ("pyopencl", on_opencl, DEVICES["opencl"].slow),
    ]
    for name, load, device in runtimes:
        try:
            run = load()
        except ImportError:
            print(f"{name} is not installed")
            continue
        for kernel, arrays, sizes, expected in cases():
            begin = time.perf_counter()
            run(device_kernel(kernel, device), arrays, sizes)
            off = float(np.abs(arrays[-1] - expected).max())
            failed += off > 1e-5
            print(f"{name} {kernel.title} {sizes}: off by {off:.1e}, {time.perf_counter() - begin:.1f} s", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
