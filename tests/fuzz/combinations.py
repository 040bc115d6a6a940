"""Compile and run five small models with every combination of `quantize=` scheme, `memory=` budget and backend.

    python -m tests.fuzz.combinations [--only TEXT] [--backends numpy,torch,tvm] [--bits] [--seconds 30]

Each combination runs at 1 row, or at 9 rows and at 1, with three budgets: the smallest, which the error for an
impossible budget reports; the memory of a run without a budget; and the mean of both. Outputs are compared with the
outputs of the same scheme without a budget. A combination must run, or be refused at compile time. A pass or a call
that raises is a failure, and so is a refused budget within the range. The exit status is 1 if there is a failure.

    only     run only combinations whose name contains this text, such as "t5 int8"
    bits     compare outputs bitwise on TVM, whose kernels compute a row independently of the other rows
    seconds  time limit of the search for the smallest budget
"""

from __future__ import annotations

import argparse
import collections
import itertools
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import treadle
from treadle.backends.registry import find_backend
from treadle.compiled import Compiled
from treadle.ir.errors import BackendError, TreadleError
from treadle.ir.target import Target
from treadle.passes.budget import fitted_pipeline
from treadle.passes.framework.manager import BrokenPassError

Array = np.ndarray[Any, Any]

_VOCAB = 50
_SMALL = {"layers": 2, "dim": 32, "heads": 2}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {**_SMALL, "vocab": _VOCAB, "context": 16},
    "bert": {**_SMALL, "vocab": _VOCAB, "context": 16, "hidden": 64},
    "llama": {**_SMALL, "vocab": _VOCAB, "hidden": 64},
    "vit": {**_SMALL, "height": 8, "width": 8, "patch": 4, "hidden": 64},
    "t5": {**_SMALL, "vocab": _VOCAB, "layers": 1, "decoder_layers": 1, "hidden": 64, "head_dim": 16},
}
"""Models of the zoo with a configuration."""
SCHEMES = (None, "int8-weights", "int4", "int8", "int4-int8")
BACKENDS = ("numpy", "torch", "tvm")
ROWS = (1, 9)
BUDGETS = ("least", "middle", "all")

_NEAR = 2e-5
"""Tolerance relative to an output's largest magnitude, for sums in another order."""
_NEAR_ROUNDED = 5e-3
"""The same tolerance if activations are rounded: a number that differs by one bit may round to the next of 255 steps.
"""


@dataclass(frozen=True)
class Combination:
    """A model, compiled in one way, and its maximum number of rows."""

    model: str
    scheme: str | None
    backend: str
    rows: int

    def __str__(self) -> str:
        return f"{self.model} {self.scheme} {self.backend} {self.rows}"

    def compile(self, **options: Any) -> Compiled:
        """Compile the model with these options. Raises the errors of `treadle.compile`."""
        config = {"backend": self.backend, "seed": 3, **MODELS[self.model]}
        target = Target("cpu", None if self.backend == "numpy" else 1)  # NumPy takes threads from the environment
        return treadle.compile(self.model, quantize=self.scheme, target=target, **config, **options)

    def sizes(self, rows: int) -> dict[str, int]:
        """Return the sizes of the symbols at which products have `rows` rows: images, or tokens of one text."""
        if self.model == "vit":
            return {"B": rows}
        return {"B": 1, "S": rows, **({"T": rows} if self.model == "t5" else {})}

    def inputs(self, exe: Compiled, rows: int) -> dict[str, Array]:
        """Draw inputs with `rows` rows."""
        rng, sizes = np.random.default_rng(rows), self.sizes(rows)
        given = {}
        for port in exe.inputs:
            shape = port.type.evaluate(sizes)
            is_float = port.type.dtype.is_float
            given[port.name] = rng.standard_normal(shape, np.float32) if is_float else rng.integers(0, _VOCAB, shape)
        return given


@dataclass(frozen=True)
class Outcome:
    """The result of one combination with one budget, "none" for the run without a budget.

    refused  the first line of the error of a combination that is refused when it is compiled
    failure  a description of the failure
    """

    combination: Combination
    budget: str
    refused: str | None = None
    failure: str | None = None


def combinations(backends: tuple[str, ...] = BACKENDS) -> list[Combination]:
    """Return all combinations for these backends."""
    return list(itertools.starmap(Combination, itertools.product(MODELS, SCHEMES, backends, ROWS)))


def outcomes(combination: Combination, *, bits: bool = False) -> Iterator[Outcome]:
    """Compile and run a combination without a budget and with each budget. `bits`: compare bitwise on TVM."""
    try:
        free = combination.compile()
    except TreadleError as error:
        if isinstance(error, BrokenPassError):
            yield Outcome(combination, "none", failure=_failure_text(error))
        else:
            yield Outcome(combination, "none", refused=error.what)
        return
    wanted: dict[int, tuple[dict[str, Array], Mapping[str, Any]]] = {}
    try:
        for rows in {1, combination.rows}:
            given = combination.inputs(free, rows)
            wanted[rows] = given, {name: np.array(value) for name, value in free(**given).items()}
        least, peak = _range(combination)
    except Exception as error:
        yield Outcome(combination, "none", failure=_failure_text(error))
        return
    yield Outcome(combination, "none")
    for budget, memory in zip(BUDGETS, (least, (least + peak) // 2, peak), strict=True):
        try:
            made = combination.compile(memory=max(memory, 1), sizes=combination.sizes(combination.rows))
            assert made.memory_fit is not None
            if made.memory_fit.peak > max(memory, 1):
                raise AssertionError(f"a run takes {made.memory_fit.peak} bytes, and may take {memory}")
            for given, outputs in wanted.values():
                _compare(combination, made(**given), outputs, bits)
        except Exception as error:
            yield Outcome(combination, budget, failure=f"memory={memory} of {least} to {peak}: {_failure_text(error)}")
        else:
            yield Outcome(combination, budget)


def _range(combination: Combination) -> tuple[int, int]:
    """Return the smallest possible memory of a run, and its memory without a budget. Raises the errors of `compile`."""
    try:
        made = combination.compile(memory=1, sizes=combination.sizes(combination.rows))
    except BackendError as error:
        least = re.match(r"memory=(\d+)", error.hint or "")
        peak = re.search(r"([\d,]+) bytes without a budget", error.within or "")
        if least is None or peak is None:
            raise
        return int(least[1]), int(peak[1].replace(",", ""))
    assert made.memory_fit is not None
    return made.memory_fit.peak, made.memory_fit.before


def _compare(combination: Combination, made: Mapping[str, Any], wanted: Mapping[str, Array], bits: bool) -> None:
    """Raise AssertionError if outputs differ."""
    for name, expected in wanted.items():
        found = np.asarray(made[name])
        if bits and combination.backend == "tvm":
            np.testing.assert_array_equal(found, expected, err_msg=name)
        near = _NEAR_ROUNDED if combination.scheme in ("int8", "int4-int8") else _NEAR
        np.testing.assert_allclose(found, expected, rtol=0, atol=near * np.abs(expected).max(), err_msg=name)
        if not np.isfinite(expected).all() or not np.ptp(expected):
            raise AssertionError(f"{name} is not finite, or the same everywhere: nothing is compared")


def _failure_text(error: Exception) -> str:
    if isinstance(error, TreadleError):
        return f"{type(error).__name__}: {error}"
    return "".join(traceback.format_exception(error, limit=-3))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="combinations whose name holds this text")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--bits", action="store_true", help="compare bits on TVM")
    parser.add_argument("--seconds", type=float, default=fitted_pipeline.SECONDS)
    options = parser.parse_args()
    fitted_pipeline.SECONDS = options.seconds
    backends = tuple(name for name in options.backends.split(",") if find_backend(name).available() is None)
    started, ran, failures = time.perf_counter(), collections.Counter[str](), 0
    refused: dict[str, list[str]] = collections.defaultdict(list)
    for combination in combinations(backends):
        if options.only not in str(combination):
            continue
        for outcome in outcomes(combination, bits=options.bits):
            if outcome.failure is not None:
                failures += 1
                print(f"{combination}, budget {outcome.budget}:\n{outcome.failure}", flush=True)
            elif outcome.refused is not None:
                refused[outcome.refused].append(str(combination))
            else:
                ran[outcome.budget] += 1
    print(f"{sum(ran.values())} ran: {', '.join(f'{n} with budget {budget}' for budget, n in ran.items())}")
    for reason, of in refused.items():
        print(f"{len(of)} refused: {reason} ({of[0]}, ...)")
    print(f"{failures} failures on {', '.join(backends)}, {time.perf_counter() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
