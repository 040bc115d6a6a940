"""Run whole models by the runtimes of devices: `python -m tests.fuzz.runtime_models --target opencl [--only gpt2]`.

    opencl  the OpenCL device of this machine, such as PoCL. With --groups, kernels have the form of GPUs on a CPU, too.
            PoCL's usual method compiles their barriers in loops for minutes, and computes an argmax wrongly; its
            method `cbs` (POCL_WORK_GROUP_METHOD), which --groups selects, does neither
    cuda    a stand-in for NVIDIA's driver, whose kernels run on the emulator; with --hardware the GPU of this machine

Each model of tests/fuzz/device_models.py, with two layers of width 64, runs forward twice. In float32, a model with
caches also prefills two rows of a session and takes 20 steps. Results in float32 are compared with NumPy, within 1e-5;
those in another form of the weights (`--form bf16`, or `--form all`) with the CPU's kernels. On the stand-in, the
driver's counts of copies, launches and waits must equal those of the launch table. `--file` names a GGUF file of a
Llama, whose session is compared with the CPU's kernels instead. Prints one line for each model. The exit status is 1 if
a model fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

import treadle
from tests.fuzz.device_models import APART, CACHED, FORMS, MODELS
from tests.support.stand_in_driver import StandInDriver
from treadle.backends.tvm.runtimes import opencl_runtime
from treadle.backends.tvm.runtimes.runtime import find_runtime, register_runtime
from treadle.backends.tvm.spaces import Input
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.target import Target
from treadle.models.registry import find_family

BOUND = 1e-5
"""Allowed difference, relative to the largest result."""


def check_forward(model: Any, form: str, target: str, driver: StandInDriver | None) -> str:
    """Compare a call with NumPy, or with the CPU's kernels, and return a line about it. Raises AssertionError for a
    difference.
    """
    here, there = (
        treadle.compile(model, backend=backend, target=where, seed=3, **FORMS[form])
        for backend, where in (("numpy" if form == "f32" else "tvm", "cpu"), ("tvm", target))
    )
    symbols = sorted({axis for p in here.inputs for axis in p.axes if not axis.isdigit()})
    sizes = {symbol: {"B": 3, "N": 3, "F": 32}.get(symbol, 6) for symbol in symbols}
    given = draw_inputs(here.graph, sizes, [0])
    begin = time.perf_counter()
    there(**given)
    first, begin = time.perf_counter() - begin, time.perf_counter()
    before = {} if driver is None else counts(driver)
    made = there(**given)
    seconds = time.perf_counter() - begin
    worst = max(_off(made[name], expected) for name, expected in here(**given).items())
    assert worst <= APART.get(form, BOUND), f"off by {worst:.1e}"
    line = f"off by {worst:.1e}, first call {first:.1f} s, second {seconds:.3f} s"
    if driver is None:
        return line
    table = there.executable.launch_table(**sizes)
    made_counts = {name: count - before[name] for name, count in counts(driver).items()}
    inputs = sum(isinstance(space, Input) for space in table.spaces)
    assert made_counts["cuLaunchKernel"] == len(table.launches), made_counts  # captured
    assert made_counts["cuGraphLaunch"] == made_counts["cuStreamSynchronize"] == 1, made_counts
    assert made_counts["cuMemcpyHtoDAsync_v2"] == inputs, made_counts
    return f"{line}, {len(table.launches)} launches as one graph, {inputs} copies in, 1 wait"


def counts(driver: StandInDriver) -> dict[str, int]:
    """Return the numbers of calls of the driver that copy, launch and wait."""
    names = ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuLaunchKernel", "cuGraphLaunch", "cuStreamSynchronize")
    return {name: driver.count(name) for name in names}


def check_session(model: Any, target: str, inputs: Mapping[str, Any], driver: StandInDriver | None) -> str:
    """Compare a session with one of NumPy: a prefill of two rows, then 20 steps. Return a line about it.

    inputs  the inputs with which each row begins

    Raises AssertionError for a difference, and if a step on the stand-in waits more than once.
    """
    memory = {"S": 5} if "tokens" in inputs else {}
    here, there = (
        treadle.compile(model, backend=backend, target=where, seed=3).session(
            rows=3, capacity=48, chunk=16, memory=memory
        )
        for backend, where in (("numpy", "cpu"), ("tvm", target))
    )
    prompts = {0: list(range(1, 19)), 1: [7, 5, 11]}
    for session in (here, there):
        assert [session.open(**inputs) for _ in prompts] == list(prompts)
    wanted, made, worst, seconds = here.prefill(prompts), there.prefill(prompts), 0.0, []
    for _ in range(21):
        worst = max([worst, *(_off(made[row], logits) for row, logits in wanted.items())])
        assert worst <= BOUND, f"off by {worst:.1e}"
        tokens = {row: int(logits.argmax()) for row, logits in wanted.items()}
        waits = 0 if driver is None else driver.count("cuStreamSynchronize")
        wanted, begin = here.step(tokens), time.perf_counter()
        made = there.step(tokens)
        seconds.append(time.perf_counter() - begin)
        assert driver is None or driver.count("cuStreamSynchronize") == waits + 1
    return f"session off by {worst:.1e} in 20 steps, {1000 * float(np.median(seconds)):.1f} ms a step"


def check_file(path: str, target: str) -> str:
    """Compare a session of a model's file with the CPU's kernels: a prefill of five tokens, then 20 steps. Return a
    line about it. Raises AssertionError for a difference, and for another most likely token.
    """
    sessions = [
        treadle.compile(path, backend="tvm", target=where).session(rows=1, capacity=64, chunk=16)
        for where in ("cpu", target)
    ]
    worst, begin = 0.0, time.perf_counter()
    for session in sessions:
        session.open()
    wanted, made = (session.prefill({0: [504, 3575, 282, 4649, 314]})[0] for session in sessions)
    first, seconds = time.perf_counter() - begin, []
    for _ in range(21):
        worst = max(worst, _off(made, wanted))
        assert worst <= BOUND, f"off by {worst:.1e}"
        token = int(wanted.argmax())
        assert token == int(made.argmax())
        wanted = sessions[0].step({0: token})[0]
        begin = time.perf_counter()
        made = sessions[1].step({0: token})[0]
        seconds.append(time.perf_counter() - begin)
    return f"off by {worst:.1e} in 20 steps, {first:.0f} s to prefill, {1000 * float(np.median(seconds)):.0f} ms a step"


def _off(made: Any, expected: Any) -> float:
    """Return the difference, relative to the largest result; NaN counts as infinite."""
    off = np.abs(np.asarray(made, np.float64) - expected).max(initial=0) / max(1.0, float(np.abs(expected).max()))
    return float(off) if off == off else float("inf")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="opencl", help="opencl or cuda")
    parser.add_argument("--only", default="", help="only models whose name contains this text")
    parser.add_argument("--form", default="f32", help="form of the weights, or all")
    parser.add_argument("--file", default="", help="a GGUF file of a Llama, instead of the small models")
    parser.add_argument("--groups", action="store_true", help="groups of threads on an OpenCL CPU, too")
    parser.add_argument("--hardware", action="store_true", help="the GPU of this machine, not a stand-in")
    options = parser.parse_args()
    driver = StandInDriver() if options.target == "cuda" and not options.hardware else None
    if driver is not None:
        runtime = driver.runtime()
        register_runtime("cuda", lambda _: runtime)
    if options.groups:
        os.environ["POCL_WORK_GROUP_METHOD"] = "cbs"
        opencl_runtime.form_of = lambda device, **_: device
    print(find_runtime(Target(options.target)))
    if options.file:
        print(f"{options.file}: {check_file(options.file, options.target)}")
        return 0
    failed = 0
    for form, name in [(form, name) for form in FORMS for name in MODELS]:
        if options.only not in name or options.form not in (form, "all"):
            continue
        model = find_family(name).model.configure(**MODELS[name])
        try:
            result = check_forward(model, form, options.target, driver)
            if form == "f32" and name in CACHED:
                result += f"; {check_session(model, options.target, CACHED[name], driver)}"
        except Exception as error:
            failed += 1
            result = f"FAILED {type(error).__name__}: {str(error)[:1500]}"
        print(f"{name} {form}: {result}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
