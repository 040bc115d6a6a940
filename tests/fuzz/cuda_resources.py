"""Compile the kernels of all models with NVRTC and ptxas, and compare registers, shared memory and spills with the
recorded figures: `python -m tests.fuzz.cuda_resources [--architecture sm_90] [--update]`.

The kernels are those of tests/fuzz/device_models.py, in every form of the weights, and those of the emulator's programs
(tests/support/gpu_emulator/programs.py), of which tests/test_cuda_compiler.py compiles some. Prints each kernel whose
figure rises, kernels that take more than 10 s, and the median time. The exit status is 1 if a kernel is refused or a
figure rises. `--update` records the figures. `--ops` compiles the kernels of every op, sample and dtype instead; their
figures are not recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import treadle
from tests.support.gpu_emulator.programs import PROGRAMS, program_inputs
from treadle.backends.tvm.kernels.devices.cuda_compiler import Resources, compile_cuda
from treadle.backends.tvm.kernels.devices.device import DEVICES
from treadle.backends.tvm.kernels.devices.device_kernels import device_kernel
from treadle.backends.tvm.kernels.devices.group_kernel import LackingWord
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.errors import BackendError

FILE = Path(__file__).parent.parent / "golden" / "cuda_resources.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

Figures = dict[str, dict[str, list[int]]]
"""Registers, shared bytes and spilled bytes by the kernel's name and the architecture."""


def name_of(kernel: Kernel) -> str:
    """Return a name that identifies a kernel: its title, and a hash of its specification."""
    return f"{kernel.title} {hashlib.sha256(kernel.key.encode()).hexdigest()[:8]}"


def program_kernels(name: str) -> list[Kernel]:
    """Return the kernels of a program of the emulator."""
    return list(treadle.compile(program_inputs(name)[0], backend="tvm", target="cuda").executable.kernels)


def resources(kernel: Kernel, architecture: str) -> Resources:
    """Return the resources that a kernel takes. Raises BackendError if it does not compile."""
    return compile_cuda(device_kernel(kernel, DEVICES["cuda"]).text, architecture).resources


def recorded() -> Figures:
    """Return the recorded figures."""
    figures: Figures = json.loads(FILE.read_text()) if FILE.exists() else {}
    return figures


def rises(kernel: Kernel, architecture: str, made: Resources, figures: Mapping[str, Mapping[str, list[int]]]) -> str:
    """Return a line about the figures that are larger than the recorded ones; an empty text if there is none."""
    before = figures.get(name_of(kernel), {}).get(architecture)
    if before is None:
        return f"{name_of(kernel)}, {architecture}: no figures are recorded"
    now = [made.registers, made.shared, made.spilled]
    if all(a <= b for a, b in zip(now, before, strict=True)):
        return ""
    return f"{name_of(kernel)}, {architecture}: {made}; recorded: {Resources(*before)}"


def kernels() -> Iterator[Kernel]:
    """Yield the distinct kernels of the programs and of the models."""
    from tests.fuzz.device_models import cases

    made = dict.fromkeys(kernel for name in PROGRAMS for kernel in program_kernels(name) if not kernel.on_host)
    yield from made
    with tempfile.TemporaryDirectory() as folder:
        for model, how in cases(Path(folder)).values():
            options = dict(how) if isinstance(model, str) else {"seed": 3, **how}
            for kernel in treadle.compile(model, backend="tvm", target="cuda", **options).executable.kernels:
                if not kernel.on_host and kernel not in made:
                    made[kernel] = None
                    yield kernel


def op_kernels() -> Iterator[Kernel]:
    """Yield the distinct kernels of the op suite that the device can express."""
    from tests.op_checks import TESTED, refusal
    from tests.test_op_suite import forwards

    made = set[Kernel]()
    for name in TESTED:
        for held in forwards(name):
            if refusal("tvm", held.graph) is None:
                with suppress(LackingWord):
                    kernels = treadle.compile(held.graph, backend="tvm", target="cuda").executable.kernels
                    yield from (kernel for kernel in kernels if not kernel.on_host and kernel not in made)
                    made |= set(kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architecture", default="", help="only this architecture")
    parser.add_argument("--ops", action="store_true", help="the kernels of every op")
    parser.add_argument("--update", action="store_true", help="record the figures")
    options = parser.parse_args()
    figures, seconds, bad = recorded(), [], 0
    begin = time.perf_counter()
    for kernel in op_kernels() if options.ops else kernels():
        for architecture in ARCHITECTURES:
            if options.architecture not in ("", architecture):
                continue
            started = time.perf_counter()
            try:
                made = resources(kernel, architecture)
            except BackendError as error:
                bad += 1
                print(f"{name_of(kernel)}, {architecture}: REFUSED {str(error)[:1500]}", flush=True)
                continue
            seconds.append(time.perf_counter() - started)
            if seconds[-1] > 10:
                print(f"{name_of(kernel)}, {architecture}: {seconds[-1]:.0f} s to compile", flush=True)
            if options.ops:
                continue
            if options.update:
                now = [made.registers, made.shared, made.spilled]
                figures.setdefault(name_of(kernel), {})[architecture] = now
            elif line := rises(kernel, architecture, made, figures):
                bad += 1
                print(line, flush=True)
    if options.update:
        lines = [f"  {json.dumps(name)}: {json.dumps(figures[name])}" for name in sorted(figures)]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    middle = statistics.median(seconds) if seconds else 0.0
    print(f"{len(seconds)} compilations, median {middle:.2f} s, {time.perf_counter() - begin:.0f} s in all")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
