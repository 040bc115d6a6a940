"""Run whole models as device text on the emulator: `python -m tests.fuzz.device_models [--only gpt2] [--form f32]`.

Each model has two layers of width 64. Its outputs are compared with NumPy in float32, and with the CPU's kernels in the
other forms. Then it runs again with 5 orders of threads and 3 grids, with blocks one after another and in turns, and
with dead memory filled with NaN, which must give the same bits, and its first row runs alone, which must have the same
bits as among 7. A model with caches also prefills two rows in a session and takes 20 steps. Prints one line for each
model and form, and the kernels that run in the slow form. The exit status is 1 if a model fails, also because of a race
between blocks. Compiled kernels are kept if TREADLE_EMULATOR_CACHE names a folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import treadle
from tests.support.gpu_emulator.emulator_runtime import emulated, runtime_of
from tests.support.gpu_emulator.faults import poisoning
from treadle.backends.tvm.spaces import Status
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.models.registry import find_family

Array = np.ndarray[Any, Any]

_WIDE: dict[str, Any] = {"dim": 64, "heads": 4, "layers": 2}
_IMAGE = {"height": 32, "width": 32, "patch": 8}
MODELS: Mapping[str, dict[str, Any]] = {
    "gpt2": {**_WIDE, "vocab": 97, "context": 64},
    "bert": {**_WIDE, "vocab": 97, "context": 64, "hidden": 128},
    "llama": {**_WIDE, "vocab": 97, "kv_heads": 2, "hidden": 96},
    "vit": {**_WIDE, **_IMAGE, "hidden": 128},
    "t5": {"dim": 64, "heads": 4, "layers": 2, "decoder_layers": 2, "vocab": 97, "head_dim": 16, "hidden": 128},
    "whisper": {
        **_WIDE,
        "vocab": 97,
        "context": 16,
        "decoder_context": 48,
        "hidden": 128,
        "decoder_heads": 4,
        "decoder_layers": 2,
        "decoder_hidden": 128,
    },
    "clip": {
        "height": 32,
        "width": 32,
        "projection": 64,
        "text": {**_WIDE, "vocab": 97, "context": 32, "hidden": 128, "end": 3},
        "vision": {**_WIDE, "patch": 8, "hidden": 128},
    },
}
"""Options of each model: two layers of width 64."""

FORMS: Mapping[str, dict[str, Any]] = {
    "f32": {},
    "bf16": {"dtype": "bf16"},
    "int8-weights": {"quantize": "int8-weights"},
    "int4": {"quantize": "int4"},
    "int8": {"quantize": "int8"},
    "int4-int8": {"quantize": "int4-int8"},
}
"""Compile options of each form of the weights."""

APART = {"f32": 1e-5, "bf16": 0.05, "int8": 0.05, "int4-int8": 0.05}
"""Allowed difference, relative to the largest result; 1e-5 for the other forms. Sums of bf16 numbers have another
order, and a rounded activation may become another number."""

ORDERS, GRIDS, TOGETHER = range(2, 7), (1, 3, None), (8, 1)

CACHED: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "t5": {"tokens": np.array([5, 9, 2, 7, 1])},
    "whisper": {"mel": np.linspace(-1, 1, 80 * 32, dtype=np.float32).reshape(80, 32)},
}
"""The models with caches, and the inputs with which each row begins."""


def check(model: Any, options: Mapping[str, Any], form: str, target: str = "cuda") -> str:
    """Compare a model on the emulator, and return a line about it. Raises AssertionError for a difference."""
    options = dict(options) if isinstance(model, str) else {"seed": 3, **options}
    here = treadle.compile(model, backend="numpy" if form == "f32" else "tvm", **options)
    symbols = sorted({axis for p in here.inputs for axis in p.axes if not axis.isdigit()})
    rows = [symbol for symbol in symbols if symbol in ("B", "N")]
    sizes = {symbol: 7 if symbol in rows else {"F": 32}.get(symbol, 6) for symbol in symbols}
    given = draw_inputs(here.graph, sizes, [0])
    wanted = here(**given)
    begin = time.perf_counter()
    there = emulated(treadle.compile(model, backend="tvm", target=target, **options))
    built = time.perf_counter()
    made = {name: np.array(array) for name, array in there(**given).items()}
    ran = time.perf_counter()
    runtime = runtime_of(there)
    assert runtime.memory.used == runtime.memory.peak == there.executable.nbytes
    worst = 0.0
    for name, expected in wanted.items():
        assert made[name].shape == expected.shape
        largest = max(1.0, float(np.abs(np.asarray(expected, np.float64)).max(initial=0)))
        worst = max(worst, float(np.abs(np.asarray(made[name], np.float64) - expected).max(initial=0)) / largest)
        assert not np.isnan(made[name]).any(), f"{name} has NaN"
    assert worst <= APART.get(form, 1e-5), f"off by {worst:.1e}"
    for order, blocks in [(o, GRIDS[o % 3]) for o in ORDERS]:
        runtime.seed, runtime.blocks, runtime.together = 1000 * order, blocks, TOGETHER[order % 2]
        _assert_same(made, there(**given), f"order {order}, {blocks} blocks")
    with poisoning():
        _assert_same(made, there(**given), "dead memory is NaN")
    alone = there(
        **{p.name: given[p.name][:1] if p.axes and p.axes[0] in rows else given[p.name] for p in there.inputs}
    )
    rowwise = {p.name for p in there.outputs if p.axes and p.axes[0] in rows and not set(p.axes[1:]) & set(rows)}
    _assert_same({n: made[n][:1] for n in rowwise}, {n: alone[n] for n in rowwise}, "a row alone")
    times = f"{built - begin:.1f} s to compile, {ran - built:.1f} s to run"
    text = f"off by {worst:.1e}, {len(there.executable.kernels)} kernels, {times}"
    return text + "".join(f"\n    slow: {title}, {why}" for title, why in runtime.slow.items())


def check_session(
    model: Any, options: Mapping[str, Any], inputs: Mapping[str, Any], steps: int = 20, target: str = "cuda"
) -> str:
    """Compare a session on the emulator with one of NumPy: a prefill of two rows, then steps. Return a line about it.

    inputs  the inputs with which each row begins

    Raises AssertionError for a difference, and if a step copies more to the host than its logits and status words.
    """
    options = {"seed": 3, **options}
    here = treadle.compile(model, backend="numpy", **options)
    there = treadle.compile(model, backend="tvm", target=target, **options)
    runtime = runtime_of(emulated(there.stepped))
    memory = {"S": 5} if "tokens" in inputs else {}
    sessions = [exe.session(rows=3, capacity=48, chunk=16, memory=memory) for exe in (here, there)]
    prompts = {0: list(range(1, 19)), 1: [7, 5, 11]}
    worst = 0.0
    rows = [[session.open(**inputs) for _ in prompts] for session in sessions]
    assert rows[0] == rows[1] == list(prompts)
    wanted, made = (session.prefill(prompts) for session in sessions)
    for step in range(steps + 1):
        for row, logits in wanted.items():
            assert not np.isnan(made[row]).any(), f"row {row} has NaN at step {step}"
            worst = max(worst, float(np.abs(made[row] - logits).max()) / max(1.0, float(np.abs(logits).max())))
        assert worst <= 1e-5, f"off by {worst:.1e} at step {step}"
        tokens = {row: int(logits.argmax()) for row, logits in wanted.items()}
        runtime.memory.forget_counts()
        wanted, made = (session.step(tokens) for session in sessions)
        returned = sum(logits.nbytes for logits in made.values())
        counts = runtime.memory
        assert counts.waits == 1, f"a step waits {counts.waits} times"
        (plan,) = [
            plan for (entry, _), plan in there.stepped.executable.machine.program.plans.items() if entry == "step"
        ]
        assert counts.bytes_out == returned + plan.table.spaces[Status()], "a step copies more than logits and status"
    return f"off by {worst:.1e} in {steps} steps, {counts.copies_in} copies in and {counts.copies_out} out per step"


def _assert_same(first: Mapping[str, Array], second: Mapping[str, Array], what: str) -> None:
    for name, array in first.items():
        assert np.array_equal(array, second[name], equal_nan=True), f"{name} has other bits: {what}"


def cases(folder: Path) -> dict[tuple[str, str], tuple[Any, Mapping[str, Any]]]:
    """Return the model and the options of every case; models of files are written to a folder."""
    found: dict[tuple[str, str], tuple[Any, Mapping[str, Any]]] = {
        (name, form): (find_family(name).model.configure(**options), FORMS[form])
        for form in FORMS
        for name, options in MODELS.items()
    }
    found["llama", "q4_1"] = str(_q4_1_file(folder)), {}
    return found


def _q4_1_file(folder: Path) -> Path:
    """Write a Llama whose weights are stored in Q4_1 blocks, and return its file."""
    from tests.fuzz.gguf_files import Sizes, tensors, write_model

    path, sizes = folder / "llama.gguf", Sizes(dim=64, hidden=96)
    write_model(path, sizes, tensors(sizes), "Q4_1")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only models whose name contains this text")
    parser.add_argument("--form", default="", help="only this form of the weights")
    parser.add_argument("--target", default="cuda", help="target whose kernels run")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for (name, form), (model, how) in cases(Path(folder)).items():
            if options.only not in name or options.form not in ("", form):
                continue
            begin = time.perf_counter()
            try:
                result = check(model, how, form, options.target)
                if form == "f32" and name in CACHED:
                    result += f"\n    session: {check_session(model, how, CACHED[name], target=options.target)}"
            except Exception as error:
                failed += 1
                result = f"FAILED {type(error).__name__}: {str(error)[:1500]}"
            print(f"{name} {form}: {result}, {time.perf_counter() - begin:.0f} s in all", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
