"""Run every op on every sample as device text: `python -m tests.fuzz.device_ops [--only softmax] [--target webgpu]`.

The target is `cuda` on the emulator, or `webgpu` by `wgpu` (on lavapipe some 20 minutes). Results are held to the
bounds of the op suite (tests/test_op_suite.py), in the samples' own dtypes, or with `--dtypes` in every dtype. Prints
each failure, the ops that the device refuses with the word it lacks, the kernels in the slow form, and at the end the
numbers of cases. The exit status is 1 if a result is outside its bounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import numpy as np

import treadle
from tests.op_checks import TESTED, refusal
from tests.support.gpu_emulator.emulator_runtime import emulated, runtime_of
from tests.test_op_suite import Held, assert_within, forwards, samples_of
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.devices.group_kernel import LackingWord


def check(held: Held, target: str) -> list[str]:
    """Hold an op's results to their bounds. Return the reasons for kernels in the slow form.

    Raises LackingWord if the device refuses a kernel, and BackendError if it refuses a value.
    """
    exe = treadle.compile(held.graph, backend="tvm", target=target)
    if target == "cuda":
        exe = emulated(exe)
    for seed, blocks in ((1, 1), (2, 3)) if target == "cuda" else ((1, 1),):
        if target == "cuda":
            runtime = runtime_of(exe)
            runtime.seed, runtime.blocks, runtime.together = seed, blocks, blocks
        made = exe(**held.inputs)
        for output, wanted in held.wanted.items():
            assert made[output].dtype == (held.graph.main.outputs[output].type.dtype.numpy or np.float32), output
            assert_within(made[output], wanted, output)
    assert isinstance(exe.executable, KernelExecutable)
    return [kernel.why_slow for kernel in exe.executable.device_kernels.values() if kernel.why_slow]


def cases(name: str, *, dtypes: bool) -> list[Held]:
    """Return the samples of an op, in their own dtypes or in all."""
    if dtypes:
        return forwards(name)
    return [Held(what, case.forward_graph(), case.inputs) for what, case in samples_of(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only ops whose name contains this text")
    parser.add_argument("--target", default="cuda", help="cuda on the emulator, or webgpu by wgpu")
    parser.add_argument("--dtypes", action="store_true", help="every dtype, not only the samples' own")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    begin = time.perf_counter()
    for name in TESTED:
        if options.only not in name:
            continue
        print(f"{name}, after {time.perf_counter() - begin:.0f} s: {dict(counts)}", flush=True)
        for held in cases(name, dtypes=options.dtypes):
            try:
                if refusal("tvm", held.graph) is not None:
                    counts["refused by the backend"] += 1
                    continue
                slow = check(held, options.target)
                counts["passed"] += 1
                for why in slow:
                    print(f"{held.what}: slow form, {why}", flush=True)
                counts["in the slow form"] += bool(slow)
            except (Exception, BaseExceptionGroup) as error:
                if isinstance(error, LackingWord) or "does not fit into 32 bits" in str(error):
                    counts["refused by the device"] += 1
                    print(f"{held.what}: refused, {str(error)[:400]}", flush=True)
                    continue
                counts["failed"] += 1
                print(f"{held.what}: FAILED {type(error).__name__}: {str(error)[:1200]}", flush=True)
    print(dict(counts), f"{time.perf_counter() - begin:.0f} s")
    return bool(counts["failed"])


if __name__ == "__main__":
    sys.exit(main())
