"""Run whole models on WebGPU: `python -m tests.fuzz.webgpu_models [--only llama] [--steps 20]`.

Models with two layers of width 64 are compared with NumPy in float32: a forward run, and for gpt2 and llama a prefill
and steps of a session. A forward run of llama in each other form of weights is compared with the CPU's kernels, and so
is a session of a Llama of SmolLM2's shape with two layers, whose weights are in Q4_1 blocks. Bytes that are read back
are counted: logits and status words, but no states. Prints a line for each run. The exit status is 1 for a difference.
On lavapipe, most of the time is the compilation of kernels, which Mesa keeps in its cache: some 15 minutes without it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import treadle
from tests.fuzz.device_models import APART as DISTANCES
from tests.fuzz.device_models import FORMS, MODELS
from treadle.backends.tvm.runtimes.device_memory import BufferPart
from treadle.backends.tvm.runtimes.runtime import find_runtime
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.target import Target
from treadle.models.registry import find_family

Array = np.ndarray[Any, Any]

APART = 1e-5
"""Allowed difference from NumPy in float32, relative to the largest result."""
APART_Q4_1 = 2e-3
"""Allowed difference between two kernels for Q4_1: a rounded activation may become another number."""
STATUS_BYTES = 1024
"""Most bytes of the status words of these models, which are much less than those of a state."""
PROMPT = (5, 71, 32, 9, 80, 3, 41)


class Reads:
    """Counts the bytes that are read from a device's memory, while it is open."""

    def __init__(self, memory: Any) -> None:
        self._memory, self._read_parts = memory, memory.read_parts
        self.nbytes = self.waits = 0

    def __enter__(self) -> Reads:
        self._memory.read_parts = self._counted
        return self

    def __exit__(self, *_: object) -> None:
        del self._memory.read_parts

    def _counted(self, parts: Sequence[BufferPart]) -> list[Array]:
        self.nbytes += sum(part.nbytes for part in parts)
        self.waits += 1
        made: list[Array] = self._read_parts(parts)
        return made


def distance(made: Array, expected: Array) -> float:
    """Return the largest difference, relative to the largest expected number or 1. NaN counts as infinite."""
    off = np.abs(np.asarray(made, np.float64) - expected).max(initial=0)
    return float("inf") if np.isnan(off) else float(off / max(1.0, float(np.abs(expected).max(initial=0))))


def _sizes(symbols: Iterable[str]) -> dict[str, int]:
    return {symbol: {"B": 3, "N": 3, "F": 32}.get(symbol, 6) for symbol in symbols}


def forward(model: Any, backend: str = "numpy", **options: Any) -> tuple[float, str]:
    """Compare a model's outputs with another backend's. Return the distance and the times as text."""
    here = treadle.compile(model, backend=backend, seed=3, **options)
    there = treadle.compile(model, backend="tvm", target="webgpu", seed=3, **options)
    symbols = {axis for port in here.inputs for axis in port.axes if not axis.isdigit()}
    inputs = draw_inputs(here.graph, _sizes(symbols), [0])
    expected = here(**inputs)
    begin = time.perf_counter()
    made = there(**inputs)
    first = time.perf_counter()
    again = there(**inputs)
    times = f"{first - begin:.1f} s with compiling, {time.perf_counter() - first:.3f} s again"
    assert all(np.array_equal(made[name], again[name]) for name in made), "other bits in the second run"
    return max(distance(made[name], expected[name]) for name in expected), times


def decoded(exe: Any, steps: int, tokens: Sequence[int] = ()) -> tuple[list[Array], list[int], list[float]]:
    """Prefill a prompt, and run steps on these tokens, or on the most likely ones.

    Return the logits after each call, the tokens, and the seconds of each call.
    """
    session = exe.session(rows=2, capacity=64)
    row, chosen = session.open(), list[int]()
    logits, seconds = list[Array](), list[float]()
    for number in range(steps + 1):
        begin = time.perf_counter()
        token = {row: tokens[number - 1] if tokens else chosen[-1]} if number else {}
        logits.append(np.array((session.step(token) if number else session.prefill({row: list(PROMPT)}))[row]))
        seconds.append(time.perf_counter() - begin)
        chosen.append(int(logits[-1].argmax()))
    return logits, chosen, seconds


def stepped(model: Any, steps: int, backend: str, **options: Any) -> tuple[float, str]:
    """Compare a prefill and steps with another backend's, on the tokens that it chooses."""
    expected, tokens, _ = decoded(treadle.compile(model, backend=backend, **options), steps)
    there = treadle.compile(model, backend="tvm", target="webgpu", **options)
    memory = find_runtime(Target("webgpu")).memory
    with Reads(memory) as reads:
        made, _, seconds = decoded(there, steps, tokens)
    least = sum(logits.nbytes for logits in made)
    assert reads.waits <= steps + 1, f"{reads.waits} waits for {steps + 1} calls"
    assert reads.nbytes - least <= STATUS_BYTES * reads.waits, f"{reads.nbytes:,} bytes read, logits have {least:,}"
    times = f"prefill {seconds[0]:.1f} s with compiling, a step {min(seconds[2:]):.3f} s"
    text = f"{reads.nbytes:,} bytes read in {reads.waits} waits, logits have {least:,}; {times}"
    return max(map(distance, made, expected)), text


def smollm2_file(folder: Path) -> str:
    """Write a Llama of SmolLM2's shape with two layers, whose matrices are in Q4_1 blocks."""
    from tests.fuzz.gguf_files import Sizes, tensors, write_model

    sizes = Sizes(dim=576, heads=9, kv_heads=3, hidden=1536, base=1e5)
    weights = {name: x * 0.15 if x.ndim > 1 else x for name, x in tensors(sizes).items()}
    write_model(folder / "smollm2.gguf", sizes, weights, "Q4_1")
    return str(folder / "smollm2.gguf")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only runs whose name contains this text")
    parser.add_argument("--steps", type=int, default=20, help="number of steps after the prefill")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        models = {name: find_family(name).model.configure(**options) for name, options in MODELS.items()}
        runs: Mapping[str, Any] = {
            **{f"{name} forward": lambda m=model: (*forward(m), APART) for name, model in models.items()},
            **{
                f"{name} steps": lambda m=models[name]: (*stepped(m, options.steps, "numpy", seed=3), APART)
                for name in ("gpt2", "llama")
            },
            **{
                f"llama {form}": lambda form=form: (
                    *forward(models["llama"], "tvm", **FORMS[form]),
                    DISTANCES.get(form, APART),
                )
                for form in FORMS
                if form != "f32"
            },
            "q4_1 llama steps": lambda: (
                *stepped(smollm2_file(Path(folder)), options.steps, "tvm"),
                APART_Q4_1,
            ),
        }
        for name, run in runs.items():
            if options.only not in name:
                continue
            try:
                off, text, bound = run()
                failed += not off <= bound
                result = f"off by {off:.1e} of {bound:.0e}; {text}"
            except Exception as error:
                failed += 1
                result = f"FAILED {type(error).__name__}: {str(error)[:1500]}"
            print(f"{name}: {result}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
