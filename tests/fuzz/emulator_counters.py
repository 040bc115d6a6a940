"""Report how kernels access memory, counted by the emulator: `python -m tests.fuzz.emulator_counters [--only softmax]`.

The kernels are those of the emulator's programs (tests/support/gpu_emulator/programs.py), or with `--model gpt2` those
of a model of tests/fuzz/device_models.py. For each kernel, prints the lines with more sectors of global memory than
their words need, or more cycles of shared memory than without bank conflicts: the numbers for one instruction, and how
many instructions there are. `--all` prints every line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import treadle
from tests.fuzz.device_models import MODELS
from tests.support.gpu_emulator.emulation import Counter, EmulatedKernel
from tests.support.gpu_emulator.emulator_runtime import EmulatorKernels, EmulatorRuntime, emulated, runtime_of
from tests.support.gpu_emulator.programs import PROGRAMS, build
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.models.registry import find_family


class CountingRuntime(EmulatorRuntime):
    """An emulator that counts accesses to memory."""

    def load(self, kernels: Mapping[str, DeviceKernel]) -> EmulatorKernels:
        made = {name: EmulatedKernel(kernel, counts=True) for name, kernel in kernels.items()}
        self.loads.append(EmulatorKernels(self, made))
        return self.loads[-1]


def report(runtime: EmulatorRuntime, name: str, *, everything: bool) -> None:
    """Print the counters of all kernels that were launched."""
    for kernels in runtime.loads:
        for title, kernel in kernels.kernels.items():
            found = [each for each in kernel.counters() if everything or each.units > each.least]
            if found:
                print(f"{name}, {title}")
            for each in sorted(found, key=lambda each: each.least - each.units):
                print(f"  {line_of(each)}", flush=True)


def line_of(counter: Counter) -> str:
    """Return a counter as text."""
    one, least = (count / counter.instructions for count in (counter.units, counter.least))
    unit = "cycles" if counter.shared else "sectors"
    return f"{one:5.1f} {unit}, least {least:.1f}, {counter.instructions} x {counter.name}: {counter.line[:110]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only programs whose name contains this text")
    parser.add_argument("--model", default="", help="a model instead of programs")
    parser.add_argument("--all", action="store_true", help="every line")
    options = parser.parse_args()
    runs: dict[str, Callable[[], tuple[Any, Mapping[str, Any]]]] = {
        name: lambda name=name: build(name)[:2]  # type: ignore[misc]
        for name in PROGRAMS
        if options.only in name and not options.model
    }
    if options.model:
        runs[options.model] = lambda: model_and_inputs(options.model)
    for name, made in runs.items():
        exe, inputs = made()
        emulated(exe, CountingRuntime(exe.executable.machine.program.device))
        exe(**inputs)
        report(runtime_of(exe), name, everything=options.all)
    return 0


def model_and_inputs(name: str) -> tuple[Any, Mapping[str, Any]]:
    """Return a model compiled for CUDA, and inputs of three rows."""
    exe = treadle.compile(find_family(name).model.configure(**MODELS[name]), backend="tvm", target="cuda", seed=3)
    symbols = {axis for p in exe.inputs for axis in p.axes if not axis.isdigit()}
    sizes = {symbol: {"B": 3, "N": 3, "F": 32}.get(symbol, 6) for symbol in symbols}
    return exe, draw_inputs(exe.graph, sizes, [0])


if __name__ == "__main__":
    sys.exit(main())
