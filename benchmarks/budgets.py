"""Runs within a memory budget: adherence to the budget, unchanged results, and the measured and predicted slowdown.

    python benchmarks/budgets.py [MODEL ...] [--shares 0.7,0.5,0.35] [--set layers=2 ...] [--runs 7] [--json]

BERT-base at B=8 S=512, GPT-2 at B=1 S=1024 and ViT-base at B=16 are compiled for TVM, one thread, without a budget and
with shares of the memory that a run needs if no value is stored in an output: its peak number of live bytes. The arena
of a run without a budget is printed next to it. It is the same for BERT and ViT. GPT-2's takes a seventh, because all
values that die before the logits are written are stored in their memory. So GPT-2 fits into each of these shares
unchanged, and shares of its arena (`--of arena`) are the budgets that constrain it.

`peak` is the plan's value, `measured` the part of a pattern-filled arena that a run changes; `ratio` is the time of a
run relative to a run without a budget: as predicted, and as the median over pairs of consecutive runs, in seconds of
process time. If nothing fits, the bound is printed.

Exit status 1 if a run exceeds its budget or its plan, changes a bit, or takes over 15 % more or less than predicted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import treadle as t
from treadle.compiled import Compiled
from treadle.explaining.memory import explain_memory
from treadle.ir.errors import BackendError
from treadle.ir.target import Target
from treadle.passes.memory.frames import ALIGNMENT
from treadle.program.flag_values import parse_config
from treadle.program.option_table import declared_options

MODELS = {"bert": {"B": 8, "S": 512}, "gpt2": {"B": 1, "S": 1024}, "vit": {"B": 16}}
ONE = Target("cpu", 1)
_PATTERN = 0xA5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=list(MODELS))
    parser.add_argument("--shares", default="0.7,0.5,0.35")
    parser.add_argument("--of", choices=("need", "arena"), default="need", help="what the shares are of")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of every model")
    parser.add_argument("--runs", type=int, default=7, help="pairs of runs that are timed")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    given = parser.parse_args()
    config, rows = parse_config(given.set, declared_options()), []
    for name in given.models:
        sizes = MODELS[name]
        free = t.compile(name, backend="tvm", target=ONE, **config)
        inputs = drawn(free, sizes)
        whole = free(**inputs)
        need = explain_memory(name, backend="tvm", target=ONE, sizes=sizes, **config).peak
        arena = measured(free, inputs)
        for share in map(float, given.shares.split(",")):
            budget = int((need if given.of == "need" else arena) * share)
            row = {"model": name, "sizes": sizes, "share": share, "need": need, "arena": arena, "budget": budget}
            rows.append(row | one(name, free, config, inputs, whole, row["budget"], given.runs))
            if not given.json:
                print(row_text(rows[-1]), flush=True)
    if given.json:
        print(json.dumps(rows, indent=1))
    return any(not row["holds"] for row in rows)


def one(
    name: str,
    free: Compiled,
    config: dict[str, Any],
    inputs: dict[str, Any],
    whole: Any,
    budget: int,
    runs: int,
) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        kept = t.compile(
            name, backend="tvm", target=ONE, weights=free.weights, memory=budget, sizes=MODELS[name], **config
        )
    except BackendError as error:
        bound = int(str(error.within).rpartition("than ")[2].replace(",", ""))
        return {"refused": str(error.within), "bound": bound, "holds": bound > budget}
    compiled = time.perf_counter() - started
    assert kept.memory_fit is not None
    made = kept(**inputs)
    equal = all(np.array_equal(made[key], whole[key]) for key in whole)
    reached = measured(kept, inputs)
    ratios = []
    for _ in range(runs):
        before, after = timed(free, inputs), timed(kept, inputs)
        ratios.append(after / before)
    ratio = statistics.median(ratios)
    fit = kept.memory_fit
    close = abs(ratio / fit.ratio - 1) <= 0.15
    return {
        "peak": fit.peak,
        "measured": reached,
        "equal": equal,
        "predicted": fit.ratio,
        "ratio": ratio,
        "ratios": ratios,
        "compile_s": compiled,
        "chunks": [str(chunk) for chunk in fit.chunks],
        "holds": equal and close and fit.peak - ALIGNMENT < reached <= fit.peak <= budget,
    }


def drawn(exe: Compiled, sizes: dict[str, int]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found = {}
    for port in exe.inputs:
        shape = port.type.evaluate(sizes)
        found[port.name] = rng.integers(0, 50, shape) if port.dtype.is_int else rng.random(shape, np.float32)
    return found


def measured(exe: Compiled, inputs: dict[str, Any]) -> int:
    """Return the number of bytes of the arena up to the last one that a run changes."""
    machine: Any = exe.executable.machine  # type: ignore[attr-defined]
    arena = machine._arena
    begin = -arena.ctypes.data % ALIGNMENT
    arena.fill(_PATTERN)
    exe(**inputs)
    changed = np.flatnonzero(arena[begin:] != _PATTERN)
    return int(changed[-1]) + 1 if len(changed) else 0


def timed(exe: Compiled, inputs: dict[str, Any]) -> float:
    started = time.process_time()
    exe(**inputs)
    return time.process_time() - started


def row_text(row: dict[str, Any]) -> str:
    sizes = " ".join(f"{name}={size}" for name, size in row["sizes"].items())
    free = f"needs {row['need']:>11,}, arena {row['arena']:>11,}"
    head = f"{row['model']:<5} {sizes:<12} {free}, {row['share']:.2f}: {row['budget']:>11,} bytes"
    if "refused" in row:
        return f"{head}  refused, none needs less than {row['bound']:,}  {'ok' if row['holds'] else 'WRONG'}"
    bits = "same bits" if row["equal"] else "OTHER BITS"
    verdict = "ok" if row["holds"] else "WRONG"
    return (
        f"{head}  peak {row['peak']:>11,}  measured {row['measured']:>11,}  {bits}  "
        f"time {row['predicted']:.3f} predicted, {row['ratio']:.3f} measured  "
        f"{verdict}  (compiled in {row['compile_s']:.1f} s: {'; '.join(row['chunks'])})"
    )


if __name__ == "__main__":
    sys.exit(main())
