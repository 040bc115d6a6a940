"""The comparison of gradients of the two sides of a claim.

For both sides, the gradient of a weighted sum of their float results, with drawn weights, is computed with respect to
their float inputs. It is computed in float64, and must agree to a part in a million of the largest number, since
constants of gradients are float32. A number may be NaN only if it was NaN before. If the gradients do not agree, but
the gradient before the change also moves by that amount when its inputs move by a part in 10^10, the inputs are at the
edge of a step, and the case is inconclusive. Numbers that were drawn to be equal stay equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.builder import Builder
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Graph, Value
from treadle.ir.interpreter import interpret
from treadle.ir.ops.shapes import zeros
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.transforms.differentiate import backward
from treadle.ir.transforms.inline import inline_calls

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

_NEAR = 1e-6
_MOVE = 1e-10


@dataclass(frozen=True)
class Gradients:
    """Both sides as graphs whose outputs are the gradients of their inputs. Additional inputs `seed 0`, ... are the
    gradients of the results.
    """

    before: Graph
    after: Graph
    seeds: tuple[Value, ...]

    def compared(self, inputs: Arrays, sizes: Mapping[str, int], seed: Sequence[int]) -> str | None:
        """Return a description of the error in the gradients after the change; None if they are correct."""
        rng = np.random.default_rng([*seed, 1])
        factors = {v.name: rng.standard_normal(v.type.evaluate(sizes)) for v in self.seeds}
        old = _run(self.before, {**inputs, **factors})
        if old is None:
            return None
        new = _run(self.after, {**inputs, **factors})
        if new is None:
            return "the replacement's gradient fails"
        largest = max((_largest(array) for array in old.values()), default=0.0)
        for name, wanted in old.items():
            off = _apart(new[name], wanted, largest)
            if off is None:
                return f"the gradient with respect to {name} has a NaN that it did not have before"
            if off <= _NEAR:
                continue
            moved = _run(self.before, {**_moved(inputs), **factors})
            edge = None if moved is None else _apart(moved[name], wanted, largest)
            if edge is not None and edge <= _NEAR:
                return f"the gradient with respect to {name} differs by {off:.2g} of the largest number"
        return None


def differentiated(sides: tuple[Graph, Graph]) -> Gradients | None:
    """Return the gradients of both sides. Return None if the side before the change has no gradient: it has no float
    result, or an op has no gradient.
    """
    try:
        before = _with_gradients(sides[0])
    except TreadleError:
        return None
    seeds = tuple([v for v in before.main.inputs if v.name.startswith("seed ")])
    return Gradients(before, _with_gradients(sides[1]), seeds) if seeds and before.main.outputs else None


def _with_gradients(side: Graph) -> Graph:
    graph = inline_calls(side) if len(side.functions) > 1 else clone_graph(side)
    b, main = Builder(graph), graph.main
    nodes, inputs = list(main.nodes), [v for v in main.inputs if _is_plain_float(v)]
    given: dict[Value, Any] = {}
    for number, value in enumerate(main.outputs.values()):
        if value.type.dtype.is_float:
            seed = b.input(f"seed {number}", value.type)
            given[value] = given[value] + seed if value in given else seed
    counting = set(inputs)
    for node in nodes:
        if not counting.isdisjoint(node.inputs):
            counting.update(v for v in node.results if v.type.dtype.is_float)
    found = backward(b, nodes, given, counting=counting)
    main.outputs = {v.name: (found[v] if v in found else zeros(b, v.type)).value for v in inputs}
    return graph


def _is_plain_float(value: Value) -> bool:
    return value.type.dtype.is_float and value.type.encoding is None and not value.name.startswith("size ")


def _run(side: Graph, given: Arrays) -> Arrays | None:
    """Return the gradients of a side, or None if they cannot be computed."""
    try:
        return interpret(side, given, float64=True)
    except (TreadleError, ArithmeticError, IndexError, TypeError, ValueError):
        return None


def _moved(inputs: Arrays) -> dict[str, Array]:
    """Return the inputs with every float slightly larger in magnitude. Equal numbers stay equal, and zeros stay
    zeros.
    """
    return {name: array * (1 + _MOVE) if array.dtype.kind == "f" else array for name, array in inputs.items()}


def _largest(array: Array) -> float:
    finite = np.abs(array[np.isfinite(array)])
    return float(np.max(finite, initial=0.0))


def _apart(got: Array, wanted: Array, largest: float) -> float | None:
    """Return the largest difference, relative to the largest number; None if a number became NaN."""
    known = ~np.isnan(wanted)
    if np.any(np.isnan(got) & known):
        return None
    with np.errstate(invalid="ignore"):
        differences = np.where((got == wanted) | ~known, 0.0, np.abs(got - wanted))
    scale = max(_largest(wanted), 1e-3 * largest) or 1.0
    return float(np.max(differences, initial=0.0)) / scale
