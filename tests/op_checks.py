"""One op on one sample: its graph, the graph of its gradient, and the numbers that both are compared with.

The op suites use these functions to run every registered op on every registered backend, including the ops and backends
of other packages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest

import treadle.ir.ops  # noqa: F401  (registers the ops)
from treadle.backends.registry import backend_names, find_backend
from treadle.ir.builder import Builder
from treadle.ir.errors import RuleError
from treadle.ir.graph import Graph, Value
from treadle.ir.interpreter import interpret
from treadle.ir.op_registry import OPS
from treadle.ir.operation import Op
from treadle.ir.samples import Sample
from treadle.ir.target import Target
from treadle.ir.transforms.differentiate import backward
from treadle.ir.types import DTYPES, DType, Type, bf16, f64

Array = np.ndarray[Any, Any]
Runner = Callable[[Graph, Mapping[str, Array]], Mapping[str, Array]]

BACKENDS = tuple(backend_names())
RUNNERS = ("interpreter", *BACKENDS)
"""The runners of the suites: the interpreter, whose results are the reference, and each backend."""

TESTED = sorted(name for name in OPS if OPS[name].is_word)
"""The ops that have samples. A call is left out, since its meaning is the function that it calls."""

EPSILON = {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}
"""For each float dtype, the distance from 1 to the next larger number."""


def prepared(name: str, graph: Graph) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    """Prepare a graph on one of RUNNERS, to be run on named inputs. Skips if the backend is not available."""
    if name == "interpreter":
        return lambda inputs: interpret(graph, inputs)
    backend = find_backend(name)
    if (reason := backend.available()) is not None:
        pytest.skip(f"backend {name}: {reason}")
    executable = backend.compile(graph, Target("cpu"), {})
    return lambda inputs: executable(**inputs)


def runner(name: str) -> Runner:
    """Return a function that runs a graph once on named inputs, by one of RUNNERS."""
    return lambda graph, inputs: prepared(name, graph)(inputs)


@dataclass(frozen=True)
class Case:
    """An op with operands."""

    op: Op
    types: tuple[Type | None, ...]
    operands: tuple[Array | None, ...]

    @staticmethod
    def of(name: str, number: int, dtype: str | None = None) -> Case:
        """Return a registered op on its sample of this number.

        The operands have the sample's own dtypes, or another dtype for its floats (or its integers, if it is an integer
        dtype).
        """
        sample: Sample = OPS[name].samples[number]
        types = tuple(_retyped(t, dtype) for t in sample.types)
        drawn = zip(sample.draw(seed=number, dtype=None), types, strict=True)
        return Case(
            OPS[name](**sample.attributes),
            types,
            tuple(x if x is None or t is None or dtype is None else held(x, t.dtype) for x, t in drawn),
        )

    @property
    def takes_its_operands(self) -> bool:
        """Return True if the op is defined on operands of these types."""
        try:
            self.op.infer(self.types)
        except RuleError:
            return False
        return True

    @property
    def widened(self) -> Case:
        """Return the same case in float64: the operands, and the op's attributes that are dtypes, such as a cast's."""
        return Case(
            self.op.in_float64(),
            tuple(t.with_dtype(f64) if t is not None and t.dtype.is_float else t for t in self.types),
            tuple(_wide(x) for x in self.operands),
        )

    @property
    def results(self) -> tuple[Array, ...]:
        """Return the results of the op's reference."""
        return self.evaluate(self.operands)

    def evaluate(self, operands: Sequence[Array | None]) -> tuple[Array, ...]:
        """Return the results of the op's reference on these operands, whose types equal the case's."""
        with np.errstate(all="ignore"):
            made = self.op.reference(*operands)
        return tuple(np.asarray(a) for a in (made if isinstance(made, tuple) else (made,)))

    @cached_property
    def inputs(self) -> dict[str, Array]:
        """Return the operands that are present, by name: the inputs of the case's graphs."""
        names = self.op.operand_names(len(self.types))
        return {n: x for n, x in zip(names, self.operands, strict=True) if x is not None}

    @cached_property
    def seeds(self) -> dict[int, Array]:
        """Return a random gradient for each float result, by the result's position; it is exact in all float dtypes."""
        rng = np.random.default_rng(len(self.types))
        drawn = [(n, t, rng.standard_normal(t.evaluate({}))) for n, t in enumerate(self.op.infer(self.types))]
        return {n: held(held(seed, bf16), t.dtype) for n, t, seed in drawn if t.dtype.is_float}

    def forward_graph(self) -> Graph:
        """Return the op's graph: operands by name as inputs, `y0`, `y1`, ... as outputs."""
        b = Builder(Graph("forward"))
        made = self._emit(b)
        b.outputs(**{f"y{n}": b.expr(v) for n, v in enumerate(made)})
        return b.graph

    def gradient_graph(self, seeded: Sequence[int]) -> Graph:
        """Return the graph of the op's gradient.

        Inputs are the operands and `seed0`, ...; outputs are the gradients of the operands, under their names.
        """
        b = Builder(Graph("gradient"))
        made = self._emit(b)
        given = {made[n]: b.input(f"seed{n}", made[n].type) for n in seeded}
        found = backward(b, list(b.function.nodes), given)
        b.outputs(**{v.name: found[v] for v in b.function.inputs if v in found and v not in given})
        return b.graph

    def _emit(self, b: Builder) -> Sequence[Value]:
        names = self.op.operand_names(len(self.types))
        operands = [None if t is None else b.input(n, t).value for n, t in zip(names, self.types, strict=True)]
        return b.emit(self.op, operands).results

    def seed_inputs(self, seeded: Sequence[int]) -> dict[str, Array]:
        """Return all inputs of `gradient_graph`."""
        return self.inputs | {f"seed{n}": self.seeds[n] for n in seeded}

    def differences(self, seeded: Sequence[int]) -> dict[str, Array]:
        """Compute central differences for each float64 operand: the gradient of sum(seed * result)."""
        found: dict[str, Array] = {}
        for position, name in enumerate(self.op.operand_names(len(self.types))):
            x = self.operands[position]
            if x is not None and x.dtype == np.float64:
                slopes = [self._slope(position, index, seeded) for index in np.ndindex(x.shape)]
                found[name] = np.reshape(slopes, x.shape)
        return found

    def _slope(self, position: int, index: tuple[int, ...], seeded: Sequence[int]) -> float:
        """Return the slope along one element.

        A step of the spacing's cube root balances the difference's rounding against the curvature.
        """
        values = self.operands[position]
        assert values is not None
        step = EPSILON["f64"] ** (1 / 3) * max(1.0, abs(values[index]))

        def moved(by: float) -> tuple[Array, ...]:
            other = values.copy()
            other[index] += by
            return self.evaluate((*self.operands[:position], other, *self.operands[position + 1 :]))

        above, below = moved(step), moved(-step)
        return float(sum(np.sum(self.seeds[n] * (above[n] - below[n])) for n in seeded) / (2 * step))


def seedings(case: Case) -> list[list[int]]:
    """Return sets of results to seed with a gradient: all results that can have one, and each of them alone.

    Single results matter because the other results of an op may be unused.
    """
    together = [n for n, type in enumerate(case.op.infer(case.types)) if type.dtype.is_float]
    return [together, *([n] for n in together if len(together) > 1)]


def refusal(backend: str, graph: Graph) -> str | None:
    """Return a pattern for the error of a backend that may refuse a graph; None if it must run it.

    Our backends may refuse what their documentation lists; a backend of another package may refuse anything it does not
    support.
    """
    if backend not in ("interpreter", "numpy", "torch", "tvm"):
        supports = find_backend(backend).supports
        said = [why for _, node in graph.walk() if (why := supports(node)) is not None]
        return re.escape(said[0]) if said else None
    values = [v for _, node in graph.walk() for v in (*node.inputs, *node.results)]
    lacks_bf16 = backend == "numpy" and any(v.type.dtype is bf16 for v in values)
    return "NumPy has no bf16" if lacks_bf16 else None


def held(x: Array, dtype: DType) -> Array:
    """Return the array rounded to a dtype, in NumPy's representation: bf16 values in float32."""
    return np.asarray(OPS["cast"](to=dtype).reference(x))  # type: ignore[call-arg]


def assert_close(got: Array, expected: Array, tolerance: float, what: str) -> None:
    """Assert equal shapes, and equality up to a tolerance relative to the largest magnitude (at least 1).

    For comparisons of float64 with float64: two orders of the same sums, or a difference quotient.
    `tests.rounding_bounds` computes the bounds of other precisions.
    """
    if expected.dtype.kind != "f":
        np.testing.assert_array_equal(got, expected, err_msg=what, strict=True)
        return
    finite = np.abs(expected[np.isfinite(expected)])
    scale = max(1.0, float(np.max(finite, initial=0.0)))
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=tolerance * scale, err_msg=what)


def _wide(x: Array | None) -> Array | None:
    return x.astype(np.float64) if x is not None and x.dtype.kind == "f" else x


def _retyped(type: Type | None, dtype: str | None) -> Type | None:
    if type is None or dtype is None or type.dtype.kind != DTYPES[dtype].kind:
        return type
    return type.with_dtype(DTYPES[dtype])
