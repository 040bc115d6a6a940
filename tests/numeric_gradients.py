"""Gradients of imported graphs, compared with difference quotients in float64.

    compared(graph, inputs, weights).errors   -> one line for each wrong derivative

The directions are some elements of each float input, all its elements together, and drawn directions. A derivative must
equal the central quotient to 1e-9 of the largest. At a kink, where the quotients of the two sides differ, it must lie
between them: then it is a subgradient. (Along all elements together, the shares of equal elements add up.) If the
quotients do not converge, as at a jump, the derivative must not be NaN.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.transforms.differentiate import backward
from treadle.ir.transforms.inline import inline_calls
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import RECOGNITION

Array = np.ndarray[Any, Any]

STEP = 2.0**-12
WITHIN = {"smooth": 1e-9, "kink": 1e-5}
"""Tolerances, of the largest derivative. The quotients of one side are less exact."""
ELEMENTS = 6
"""Elements of each input along which derivatives are compared."""
EDGES = np.array([0, -0.0, 0.5, -0.5, 1, -1, 1, 2, -2, 3, 20, -20, 90, -90], np.float32)

_CENTRAL = np.array([-1, 9, -45, 0, 45, -9, 1]) / 60 / STEP
"""Weights of f at -3 to 3 steps; the error is of order 6, and of `_FOURTH` 4."""
_FOURTH = np.array([0, 1, -8, 0, 8, -1, 0]) / 12 / STEP
_SIDE = np.array([-11, 18, -9, 2]) / 6 / STEP
"""Weights of f at 0 to 3 steps; the error is of order 3, and of `_COARSE` 2."""
_COARSE = np.array([-3, 4, -1, 0]) / 2 / STEP


@dataclass
class Compared:
    """The numbers of compared derivatives by kind (smooth, kink, rough), and the errors."""

    kinds: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)


def at_edges(inputs: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """Replace the floats of inputs by zeros, equal numbers and large numbers."""
    rng = np.random.default_rng(seed)
    return {n: rng.choice(EDGES, x.shape).astype(x.dtype) if x.dtype.kind == "f" else x for n, x in inputs.items()}


def compared(graph: Graph, inputs: Mapping[str, Array], weights: Mapping[str, Array], seed: int = 0) -> Compared | None:
    """Compare the gradients of a graph, as imported and after recognition, with difference quotients.

    Returns None if no output is a float, or some are not finite.
    Raises TreadleError if the graph cannot be differentiated.
    """
    rng, report = np.random.default_rng(seed), Compared()
    start = interpret(graph, inputs, weights, float64=True)
    outputs = [name for name, v in graph.main.outputs.items() if v.type.dtype.is_float]
    if not outputs or not all(np.isfinite(start[name]).all() for name in outputs):
        return None
    # Exact in every float dtype, and not 0: 0 times the infinite derivative of a root at 0 is NaN.
    seeds = [(rng.integers(1, 9, start[name].shape) * rng.choice([-1, 1], start[name].shape)) / 4 for name in outputs]
    recognized = PassManager(RECOGNITION, differentiated=True).run(graph).graph
    ours = {
        way: gradients(one, inputs, weights, seeds, float64=True)
        for way, one in (("", graph), (", recognized", recognized))
    }

    def values(name: str, direction: Array, steps: int) -> list[Array]:
        moved = inputs[name].astype(np.float64) + steps * STEP * direction
        results = interpret(graph, {**inputs, name: moved}, weights, float64=True) if steps else start
        return [results[output] for output in outputs]

    for name, x in inputs.items():
        if x.dtype.kind != "f" or not x.size:
            continue
        for place, direction in _directions(x, rng):
            kind, low, high, largest = _quotients([values(name, direction, k) for k in range(-3, 4)], seeds)
            report.kinds[kind] += 1
            for way, gradient in ours.items():
                g = gradient.get(name, np.zeros(x.shape))
                with np.errstate(invalid="ignore"):  # at edges, derivatives may be infinite or NaN
                    terms = (g * direction)[direction != 0]
                    got = float(terms.sum())
                room = WITHIN.get(kind, 0) * max(1.0, largest, float(np.abs(g[np.isfinite(g)]).max(initial=0)))
                if np.isnan(terms).any() if kind == "rough" else not low - room <= got <= high + room:
                    sides = f"{low:.12g} to {high:.12g}"
                    report.errors.append(f"{name}{place}{way}: {got:.12g}, quotients {sides} ({kind})")
    return report


def _directions(x: Array, rng: np.random.Generator) -> list[tuple[str, Array]]:
    found = [(", all", np.ones(x.shape)), (", drawn", rng.integers(-4, 5, x.shape) / 4)]
    for place in rng.permutation(x.size)[:ELEMENTS]:
        one = np.zeros(x.size)
        one[place] = 1
        found.append((f"[{place}] at {x.flat[place]:g}", one.reshape(x.shape)))
    return found


def _quotients(lattice: Sequence[Sequence[Array]], seeds: Sequence[Array]) -> tuple[str, float, float, float]:
    """Return the kind of point, the bounds of the derivative, and the size of its largest term.

    lattice  the outputs at -3 to 3 steps; the derivative is that of their products with the seeds
    """
    low = high = largest = 0.0
    kind = "smooth"
    for seed, *around in zip(seeds, *lattice, strict=True):
        f, s = np.stack(around).reshape(7, -1), seed.reshape(-1)
        moves = (f != f[3]).any(0)
        f, s = f[:, moves], s[moves]
        sides = []
        for sign, ends in ((1, f[3:]), (-1, f[3::-1])):
            quotient, coarse = (sign * np.tensordot(weights, ends, 1) for weights in (_SIDE, _COARSE))
            apart = np.abs(quotient - coarse) > 1e-3 * np.maximum(1, np.abs(quotient))
            if apart.any():  # not where a quotient is NaN: there the other side counts
                return "rough", 0, 0, 0
            sides.append(quotient)
        right, left = (np.where(np.isfinite(x), x, y) for x, y in (sides, sides[::-1]))
        if not np.isfinite([right, left]).all():
            return "rough", 0, 0, 0
        central, scale = np.tensordot(_CENTRAL, f, 1), np.maximum(1, np.abs(right))
        # Central quotients need higher derivatives, which jump at 0 in softsign and elu.
        smooth = (np.abs(right - left) <= 1e-5 * scale) & (np.abs(right - central) <= 1e-7 * scale)
        kind = kind if smooth.all() else "kink"
        bounds = np.sort([s * np.where(smooth, central, side) for side in (right, left)], axis=0)
        low, high = low + float(bounds[0].sum()), high + float(bounds[1].sum())
        rounding = 16 * np.finfo(np.float64).eps / STEP * np.abs(f[3]) / WITHIN["smooth"]
        noise = 8 * np.abs(central - np.tensordot(_FOURTH, f, 1)) / WITHIN["smooth"]  # of intermediate results
        largest = max(largest, float((np.abs(s) * np.maximum(scale, rounding + noise * smooth)).max(initial=0)))
    return kind, low, high, largest


def gradients(
    graph: Graph,
    inputs: Mapping[str, Array],
    weights: Mapping[str, Array],
    seeds: Sequence[Array],
    *,
    float64: bool = False,
) -> dict[str, Array]:
    """Return the gradients of the sum of seeds times float outputs by the float inputs; in float64 if asked."""
    b = Builder(inline_calls(graph))
    main, nodes = b.graph.main, list(b.graph.main.nodes)
    outputs = [v for v in main.outputs.values() if v.type.dtype.is_float]
    given: dict[Any, Any] = {}
    for value, array in zip(outputs, seeds, strict=True):
        seed = b.constant(array.astype(value.type.dtype.numpy))
        given[value] = given[value] + seed if value in given else seed
    counting = {v for v in main.inputs if v.type.dtype.is_float}
    for node in nodes:
        if not counting.isdisjoint(node.inputs):
            counting.update(v for v in node.results if v.type.dtype.is_float)
    found = backward(b, nodes, given, counting=counting)
    main.outputs = {v.name: found[v].value for v in main.inputs if v in found}
    return interpret(b.graph, inputs, weights, float64=float64)
