"""Fuzzing the passes and the backends: a random graph, optimized and run on every backend, must return the results that
its ops define.

    python -m tests.fuzz.graphs [--count 20000] [--seed 0] [--tvm-every 5] [--backend torch] [--poison]

The graphs are of two kinds: chains of functions in the forms that models use, with near misses of every fusion
(tests/random_programs.py), and attentions with masks, biases and scales of every size in any order, whose rows are
sometimes fully masked (tests/fuzz/attention_chains.py). They are in f64, f32, f16 and bf16; graphs in narrow dtypes
sometimes have an axis of thousands.

A result is right if it is near the result of the declared graph in float64, or in the graph's own dtype, where twice
float32's lowest number is -inf. The tolerance follows from the effect of roundings (`treadle.runtime.roundings`), row
by row. A graph fails the run if a result is not right, or if any error other than a backend's refusal to compile it is
raised. Exit status 1 if any fails; a failure is printed with the seed that reproduces it. With `--poison`, storage that
is dead according to the plan is NaN while a graph runs (`treadle.backends.poison`): a wrong plan then returns wrong
numbers.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from tests.fuzz.attention_chains import draw_attention
from tests.random_programs import random_program
from treadle.backends.registry import find_backend
from treadle.ir.analysis.drawn_inputs import held
from treadle.ir.analysis.tolerances import coarsest_spacing, room
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph, Value
from treadle.ir.interpreter import interpret
from treadle.ir.ops.parts import Slice
from treadle.ir.target import Target
from treadle.ir.transforms.inline import inline_calls
from treadle.ir.types import DType, bf16, f16, f32, f64
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT
from treadle.runtime.roundings import Moved, moved_by_rounding

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

BACKENDS = ("numpy", "torch", "tvm")
LONG = 3000
_FEW, _MANY = 2, 24
_MOST_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Case:
    """A graph, and arrays for its inputs and weights."""

    seed: int
    graph: Graph
    inputs: Arrays
    weights: Arrays


def draw(seed: int) -> Case:
    """Return the case of a seed."""
    if seed % 3 == 2:
        drawn = draw_attention(seed)
        return Case(seed, drawn.graph, {v.name: held(drawn.arrays[v.name], v) for v in drawn.graph.main.inputs}, {})
    r = Random(f"sizes {seed}")
    dtype: DType = r.choice((f64, f64, f32, f32, f32, f16, bf16))
    graph = random_program(seed, dtype)
    sizes = {"B": r.choice((1, 2, 3)), "S": r.choice((1, 2, 4, 5, 7, 9))}
    if dtype in (f16, bf16) and not _reads_a_table(graph) and _elements(graph, {"B": 1, "S": LONG}) <= _MOST_ELEMENTS:
        sizes = {"B": 1, "S": LONG}
    rng = np.random.default_rng(seed)
    inputs = {v.name: _drawn(rng, v, sizes) for v in graph.main.inputs}
    return Case(seed, graph, inputs, {name: _drawn(rng, v, {}) for name, v in graph.main.parameters.items()})


def _drawn(rng: np.random.Generator, value: Value, sizes: Mapping[str, int]) -> Array:
    return held(rng.standard_normal(value.type.evaluate(sizes)) * 0.5, value)


def _reads_a_table(graph: Graph) -> bool:
    """Return True if a graph takes as many rows of a table as there are tokens, and so has a greatest length."""
    slices = [node.op for _, node in graph.walk() if isinstance(node.op, Slice)]
    return any(op.stop is not None and op.stop.symbols for op in slices)


def _elements(graph: Graph, sizes: Mapping[str, int]) -> int:
    """Return the number of elements of a graph's largest value."""
    return max(v.type.elements.evaluate(sizes) for _, node in graph.walk() for v in node.results)


# -- judging ---------------------------------------------------------------------------------------------------------


class Judge:
    """The exact results of one case, and the comparison of a backend's results with them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.optimized = PassManager(DEFAULT, certify=False).run(case.graph).graph
        self.declared = inline_calls(case.graph)
        self.flat = inline_calls(self.optimized)
        self.spacing = coarsest_spacing(self.declared)
        self.wide = interpret(self.declared, case.inputs, case.weights, float64=True)
        self.used = {name: case.weights[name] for name in self.flat.parameters}
        self.moves: dict[int, Mapping[str, Moved]] = {}

    def failure(self, results: Arrays) -> str | None:
        """Return the first error in the results, or None."""
        for rounds in (_FEW, _MANY):  # two draws seldom flip a comparison that rounding decides
            wrong = {name for name, array in results.items() if not self._near(name, array, self.wide, rounds)}
            if not wrong:
                return None
        own = self._own_dtype()
        for name in sorted(wrong):
            if own is None or not self._near(name, results[name], own, _MANY):
                return f"{name} is off by {_furthest(results[name], self.wide[name])}"
        return None

    def _own_dtype(self) -> Arrays | None:
        """Return the graph's results in its own dtype: by the ops' references, or on PyTorch, because NumPy has no
        bf16.
        """
        if any(v.type.dtype is bf16 for _, node in self.declared.walk() for v in (*node.inputs, *node.results)):
            executable = find_backend("torch").compile(self.declared, Target("cpu"), self.case.weights)
            return {name: np.asarray(array) for name, array in executable(**self.case.inputs).items()}
        return interpret(self.declared, self.case.inputs, self.case.weights)

    def _near(self, name: str, made: Array, meant: Arrays, rounds: int) -> bool:
        wanted = meant[name].astype(np.float64)
        if made.shape != wanted.shape:
            return False
        moved = self._moved(rounds)[name]
        if moved.undecided.dtype == np.bool_ and meant[name].dtype.kind != "f":
            return bool(np.all((made == meant[name]) | moved.undecided))
        with np.errstate(all="ignore"):
            finite = np.isfinite(wanted)
            size = _row_most(np.where(finite, np.abs(wanted), 0))
            near = np.abs(made - wanted) <= room(self.spacing, size, _row_most(moved.by))
            same = (made == wanted) | (np.isnan(made) & np.isnan(wanted))
        return bool(np.all(same | (finite & near)))

    def _moved(self, rounds: int) -> Mapping[str, Moved]:
        """Return how far roundings in either graph may move the outputs."""
        if rounds in self.moves:
            return self.moves[rounds]
        found: dict[str, Moved] = {}
        for graph, weights in ((self.declared, self.case.weights), (self.flat, self.used)):
            exact = interpret(graph, self.case.inputs, weights, float64=True)
            for name, moved in moved_by_rounding(graph, self.case.inputs, weights, exact, rounds).items():
                with np.errstate(invalid="ignore"):
                    known = found.setdefault(name, moved)
                    found[name] = Moved(np.maximum(known.by, moved.by), known.undecided | moved.undecided)
        self.moves[rounds] = found
        return found


def _row_most(array: Array) -> Array:
    """Return the largest element of each row, with the row's axis kept."""
    return np.max(array, axis=-1, keepdims=True, initial=0.0) if array.ndim else array


def _furthest(made: Array, wanted: Array) -> str:
    if made.shape != wanted.shape:
        return f"shape {list(made.shape)} for {list(wanted.shape)}"
    with np.errstate(all="ignore"):
        difference = np.abs(made.astype(np.float64) - wanted)
    return f"{np.nanmax(difference, initial=0.0):.3g} of {np.nanmax(np.abs(wanted), initial=0.0):.3g}, " + (
        f"{int(np.sum(np.isnan(made) != np.isnan(wanted)))} NaN of {made.size}"
    )


def verdicts(case: Case, backends: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield for "rewrites" and each backend: "" if right, else the error; None if the backend refuses the graph."""
    try:
        judge = Judge(case)
        yield "rewrites", judge.failure(interpret(judge.flat, case.inputs, judge.used, float64=True)) or ""
    except Exception:
        yield "rewrites", traceback.format_exc(limit=-3)
        return
    for name in backends:
        try:
            executable = find_backend(name).compile(judge.optimized, Target("cpu"), judge.used)
        except BackendError:
            yield name, None
            continue
        except Exception:
            yield name, traceback.format_exc(limit=-3)
            continue
        try:
            made = {output: np.asarray(array) for output, array in executable(**case.inputs).items()}
            yield name, judge.failure(made) or ""
        except Exception:
            yield name, traceback.format_exc(limit=-3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="graphs (default 20000)")
    parser.add_argument("--seed", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--tvm-every", type=int, default=5, metavar="N", help="every Nth on TVM too (default 5)")
    parser.add_argument("--backend", choices=BACKENDS, help="this one alone, for every graph")
    parser.add_argument("--poison", action="store_true", help="fill what is dead with NaN while graphs run")
    options = parser.parse_args()
    if options.poison:
        os.environ["TREADLE_POISON"] = "1"
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    failures = []
    started = time.perf_counter()
    for seed in range(options.seed, options.seed + options.count):
        on_tvm = seed % options.tvm_every == 0
        backends = (options.backend,) if options.backend else BACKENDS if on_tvm else BACKENDS[:2]
        for name, wrong in verdicts(draw(seed), backends):
            counts[name, "refused" if wrong is None else "wrong" if wrong else "right"] += 1
            if wrong:
                failures.append(seed)
                print(f"seed {seed}, {name}: {wrong}", flush=True)
    print(f"{options.count} graphs from seed {options.seed}, {time.perf_counter() - started:.0f} s")
    for (name, what), many in sorted(counts.items()):
        print(f"  {many:7,}  {name} {what}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
