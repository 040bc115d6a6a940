"""Compare every lane function in C, and optionally in WGSL and OpenCL, with LLVM on a wide grid of operands.

    python -m tests.fuzz.lane_functions [--count 1048576] [--seed 0] [--opencl] [--wgsl]

The functions are those of every elementwise op and cast on every dtype. LLVM's results are computed with 1, 4, 8 and 16
lanes on every instruction set of this machine, and compared with C's. The form of 16 lanes on AVX-512 differs from C's
form in exp and the functions that contain it, so these are compared with each other by their distance in units in the
last place. C, compiled by g++, has fused products, so instruction sets without them are compared in the functions that
fuse none.

Floats of the grid have every exponent and both signs, with drawn, lowest and highest mantissas. Results must have the
same bits, or be NaN on both sides.

--opencl  run the OpenCL text, with `pyopencl` and a device such as PoCL; x^y is computed in f32 there
--wgsl    run the WGSL text, with `wgpu` and a device such as lavapipe, and report distances: WGSL guarantees no bits

Exit status 1 if LLVM, C or OpenCL differ, if a function does not compile, or if a WGSL result is far off.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.lane_texts import array_of, by_c, by_llvm, grid, lane_functions, same, units_apart
from treadle.backends.tvm.kernels.arithmetic.c_text import prelude
from treadle.backends.tvm.kernels.arithmetic.lane_function import LaneFunction
from treadle.backends.tvm.kernels.arithmetic.wgsl_text import PRELUDE
from treadle.backends.tvm.kernels.isa import ISAS, runs_here
from treadle.ir.errors import BackendError

Array = np.ndarray[Any, Any]

NONPOSITIVE = ("exp_nonpositive_f32", "exp_for_pairs_f32")
UNITS: Mapping[str, float] = {
    "exp_for_pairs_f32": 260,
    "gelu_f32": 0,
    "gelu_tanh_f32": 0,
    "quick_gelu_f32": 0,
    "power_f32": 0,
}
"""The largest distance from C for functions with errors in proportion to an exponent; 0: only reported."""
TOGETHER = 24
"""Number of functions that are compared at once, to limit memory."""

USUAL = 12
"""The largest distance of other functions, in units in the last place."""


def operands_of(f: LaneFunction, count: int, seed: int) -> list[Array]:
    drawn = [grid(t, count, seed + n) for n, t in enumerate(f.operands)]
    return [-np.abs(drawn[0])] if f.name in NONPOSITIVE else drawn


def differences(functions: Sequence[LaneFunction], operands: Sequence[Sequence[Array]], c: Sequence[Array]) -> int:
    """Compare LLVM with C, print the functions that differ, and return their number."""
    found = 0
    for isa in filter(runs_here, ISAS.values()):
        for lanes in (1, 4, 8, 16):
            wide = lanes == 16 and "avx512f" in isa.needs
            made = by_llvm(functions, operands, isa, lanes)
            for f, x, y, own in zip(functions, made, c, operands, strict=True):
                equal = same(x, y)
                if equal.all() or (not isa.fused and "_FMA_" in f.c()):
                    continue
                if wide and f.llvm(16, True) != f.llvm(16):
                    equal = _are_close(f, x, y)
                if not equal.all():
                    found += 1
                    _print(f"{isa}, {lanes} lanes", f, own, y, x, equal)
    return found


def _are_close(f: LaneFunction, x: Array, y: Array) -> Array:
    """Return a mask of results that are as close as another form of the function may be."""
    finite = np.isfinite(y)
    limit = UNITS.get(f.name, USUAL) or np.inf
    near = np.where(finite, units_apart(x, y.astype(np.float64)) <= limit, x == y)
    return near | (np.isnan(x) & np.isnan(y))


def _print(place: str, f: LaneFunction, operands: Sequence[Array], expected: Array, found: Array, equal: Array) -> None:
    first = int(np.flatnonzero(~equal)[0])
    numbers = ", ".join(str(x[first]) for x in operands)
    print(f"{place}: {f.name}({numbers}) is {found[first]}, in C {expected[first]}; {np.sum(~equal)} differ")


# -- OpenCL ------------------------------------------------------------------------------------------------------

_OPENCL = {"bool": "uchar", "f16": "ushort", "u16": "ushort", "u8": "uchar", "i8": "char", "i16": "short", "i32": "int"}
_OPENCL |= {"i64": "long", "f32": "float", "f64": "double"}


def by_opencl(functions: Sequence[LaneFunction], operands: Sequence[Sequence[Array]]) -> list[Array]:
    """Return the results of functions on the first OpenCL device."""
    import pyopencl as cl

    context = cl.create_some_context(interactive=False)
    queue = cl.CommandQueue(context)
    lines = [prelude("opencl"), *(f.c("opencl") for f in functions)]
    for number, f in enumerate(functions):
        types = [_OPENCL[t] for t in (*f.operands, f.result)]
        parameters = ", ".join(f"global {t} *x{i}" for i, t in enumerate(types))
        arguments = ", ".join(f"x{i}[i]" for i in range(len(f.operands)))
        body = f"long i = get_global_id(0); x{len(f.operands)}[i] = {f.symbol}({arguments});"
        lines.append(f"kernel void apply_{number}({parameters}) {{ {body} }}")
    program = cl.Program(context, "\n".join(lines)).build(["-cl-fp32-correctly-rounded-divide-sqrt"])
    results = []
    for number, (f, own) in enumerate(zip(functions, operands, strict=True)):
        y = array_of(f.result, len(own[0]))
        flags = cl.mem_flags
        read = [cl.Buffer(context, flags.COPY_HOST_PTR, hostbuf=x.view(f"u{x.itemsize}")) for x in own]
        written = cl.Buffer(context, flags.WRITE_ONLY, y.nbytes)
        getattr(program, f"apply_{number}")(queue, (len(y),), None, *read, written)
        cl.enqueue_copy(queue, y.view(f"u{y.itemsize}"), written)
        results.append(y)
    return results


# -- WGSL --------------------------------------------------------------------------------------------------------


def wgsl_runner() -> Callable[[LaneFunction, Sequence[Array]], Array]:
    """Return a function that applies a lane function on the first WebGPU device."""
    import wgpu

    adapter = wgpu.gpu.enumerate_adapters_sync()[0]
    device = adapter.request_device_sync()
    print("WebGPU:", adapter.info["device"])

    def run(f: LaneFunction, operands: Sequence[Array]) -> Array:
        stored = [*f.operands, f.result]
        words = [{"f32": "f32", "i8": "i32", "i16": "i32", "i32": "i32"}.get(t, "u32") for t in stored]
        lines = [PRELUDE, f.wgsl()]
        lines += [f"@group(0) @binding({i}) var<storage, read_write> b{i}: array<{t}>;" for i, t in enumerate(words)]
        arguments = ", ".join(f"b{i}[i]" + " != 0u" * (t == "bool") for i, t in enumerate(f.operands))
        call = f"{f.symbol}({arguments})"
        body = f"let i = g.x; b{len(operands)}[i] = {f'u32({call})' if f.result == 'bool' else call};"
        head = "@compute @workgroup_size(64) fn main(@builtin(global_invocation_id) g: vec3<u32>)"
        module = device.create_shader_module(code="\n".join([*lines, f"{head} {{ {body} }}\n"]))
        pipeline = device.create_compute_pipeline(layout="auto", compute={"module": module, "entry_point": "main"})
        usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC
        arrays = [*(_words(x) for x in operands), np.zeros(len(operands[0]), np.uint32)]
        buffers = [device.create_buffer_with_data(data=x, usage=usage) for x in arrays]
        entries = [{"binding": i, "resource": {"buffer": b}} for i, b in enumerate(buffers)]
        group = device.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries)
        encoder = device.create_command_encoder()
        computing = encoder.begin_compute_pass()
        computing.set_pipeline(pipeline)
        computing.set_bind_group(0, group)
        computing.dispatch_workgroups(len(operands[0]) // 64)
        computing.end()
        device.queue.submit([encoder.finish()])
        return np.frombuffer(device.queue.read_buffer(buffers[-1]), np.uint32)

    return run


def _words(x: Array) -> Array:
    """Return values as 32-bit words, as WGSL stores them."""
    if x.dtype == np.float32:
        return np.ascontiguousarray(x)
    x = x.view(np.uint16) if x.dtype == np.float16 else x
    return x.astype(np.int32 if x.dtype.kind == "i" else np.uint32)


def wgsl_differs(
    run: Callable[[LaneFunction, Sequence[Array]], Array], f: LaneFunction, operands: Sequence[Array], c: Array
) -> bool:
    """Compare a function in WGSL with C, print the largest distance, and return True if it is far off."""
    if "i64" in (*f.operands, f.result):  # computed in 32 bits
        return False
    try:
        f.wgsl()
    except BackendError:  # f64
        return False
    x, expected = run(f, operands), _words(c)
    if f.result != "f32":
        equal = expected.view(np.uint32) == x
    else:
        x = x.view(np.float32)
        tiny = [np.abs(o) < 2.0**-126 for o in (*operands, c) if o.dtype == np.float32]  # may be flushed to zero
        equal = same(x, c) | np.any(tiny, axis=0)
        if not equal.all() and np.isfinite(c[~equal]).all():
            distance = units_apart(x[~equal], c[~equal].astype(np.float64)).max()
            print(f"WGSL: {f.name} is up to {distance:.3g} units in the last place from C")
            equal |= _are_close(f, x, c)
    if not equal.all():
        _print("WGSL", f, operands, c, x, equal)
    return not equal.all()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1 << 20, help="number of operands of each function")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawn operands")
    parser.add_argument("--opencl", action="store_true", help="run the OpenCL text, too")
    parser.add_argument("--wgsl", action="store_true", help="run the WGSL text, too")
    options = parser.parse_args(arguments)
    np.seterr(all="ignore")
    functions = list(lane_functions().values())
    run = wgsl_runner() if options.wgsl else None
    found: Counter[str] = Counter()
    for first in range(0, len(functions), TOGETHER):
        part = functions[first : first + TOGETHER]
        operands = [operands_of(f, -(-options.count // 64) * 64, options.seed) for f in part]
        with tempfile.TemporaryDirectory() as folder:
            c = by_c(part, operands, Path(folder))
        found["LLVM"] += differences(part, operands, c)
        if options.opencl:
            for f, own, x, y in zip(part, operands, by_opencl(part, operands), c, strict=True):
                if f.name != "power_f32" and not (equal := same(x, y)).all():
                    found["OpenCL"] += 1
                    _print("OpenCL", f, own, y, x, equal)
        if run is not None:
            found["WGSL"] += sum(wgsl_differs(run, *each) for each in zip(part, operands, c, strict=True))
    print(f"{len(functions)} functions, {options.count} operands: {sum(found.values())} differences", dict(found))
    return int(found.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
