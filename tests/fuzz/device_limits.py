"""Every model of the zoo on a device with small limits: `python -m tests.fuzz.device_limits [--only gpt2] [--plan]`.

The device, on the emulator, binds 8 buffers of at most 64 MiB and has 16 KiB of shared memory. A small model of each
family runs and is compared with NumPy, or is refused before the first launch with every limit that it exceeds. With
`--plan`, a model that is not refused does not run. Prints one line for each model, and its kernels in the slow form.
The exit status is 1 if a model fails. Compiled kernels are kept if TREADLE_EMULATOR_CACHE names a folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
import pytest

import treadle
from tests.sharded_models import small_options
from tests.support.gpu_emulator.emulator_runtime import EmulatorRuntime, emulated
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.errors import BackendError
from treadle.models.registry import family_names, find_family

LIMITS: dict[str, Any] = {"buffers": 8, "largest": 64 << 20, "shared": 16 << 10}


def sizes_of(exe: Any) -> dict[str, int]:
    """Return small sizes of the symbols of a model's inputs."""
    symbols = sorted(set().union(*[port.type.symbols for port in exe.inputs]))
    return {symbol: {"F": 16}.get(symbol, 4) for symbol in symbols}


def check(model: Any, *, run: bool = True, **limits: Any) -> str:
    """Run a model, or check that it is refused with every limit. Return a line about it.

    run     False: only plan a model that is not refused
    limits  limits of the device; by default `LIMITS`

    Raises AssertionError if results differ from NumPy's, or if a launch precedes the refusal.
    """
    exe = treadle.compile(model, backend="tvm", target="cuda", seed=3)
    runtime = EmulatorRuntime(**(limits or LIMITS))
    machine = emulated(exe, runtime).executable.machine
    machine.runtime()
    sizes, entry = sizes_of(exe), exe.executable.entries[-1]
    exceeded = machine.exceeded(entry, sizes)
    given = draw_inputs(exe.graph, sizes, [0])
    if exceeded:
        with pytest.raises(BackendError) as caught:
            exe(**given)
        assert runtime.launches == 0
        assert all(line in str(caught.value) for line in exceeded[:20]), caught.value
        return "refused\n    " + "\n    ".join(exceeded)
    slow = "".join(
        f"\n    slow: {n}, {each.why_slow}" for n, each in machine.program.kernels(entry).items() if each.why_slow
    )
    table = machine.program.plan(entry, sizes).table
    text = f"{len(table.launches)} launches, {table.nbytes:,} bytes"
    if not run:
        return f"{text}{slow}"
    wanted, worst = treadle.compile(model, backend="numpy", seed=3)(**given), 0.0
    for name, array in exe(**given).items():
        largest = max(1.0, float(np.abs(np.asarray(wanted[name], np.float64)).max(initial=0)))
        apart = np.abs(np.asarray(array, np.float64) - wanted[name])
        worst = max(worst, float(apart.max(initial=0)) / largest)
    assert worst <= 1e-5, f"off by {worst:.1e}"
    return f"off by {worst:.1e}, {text}{slow}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only models whose name contains this text")
    parser.add_argument("--plan", action="store_true", help="plan the models that are not refused, and do not run them")
    options = parser.parse_args()
    failed = 0
    for name in family_names():
        if options.only not in name:
            continue
        begin = time.perf_counter()
        try:
            result = check(find_family(name).model.configure(**small_options(name)), run=not options.plan)
        except Exception as error:
            failed += 1
            result = f"FAILED {type(error).__name__}: {str(error)[:1500]}"
        print(f"{name}: {result}, {time.perf_counter() - begin:.0f} s", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
