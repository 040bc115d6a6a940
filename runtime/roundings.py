"""The conditioning of a model, measured as the change of its outputs if every op rounds.

Rounding is simulated in float64: the operands and results of every op change by one spacing of their dtypes, up or down
at random; only constants stay exact. No implementation of the model in these dtypes can be sure to differ by less than
the resulting change of the outputs. Causes of a large change are, for example, a mean subtracted from nearly equal
numbers, a softmax over scores in the hundreds, or a hundred layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.analysis.tolerances import spacing_of
from treadle.ir.graph import Graph, Node
from treadle.ir.interpreter import interpret
from treadle.ir.types import DType

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
Operands = Sequence[Array | None]

ROUNDS = 2


@dataclass(frozen=True)
class Moved:
    """The change of a result in perturbed runs. `by`: the maximum change of each float; `undecided`: True for elements
    of other dtypes that changed.
    """

    by: Array
    undecided: Array

    @staticmethod
    def between(expected: Array, others: Sequence[Array]) -> Moved:
        """Compare a result with the same result of perturbed runs."""
        by, undecided = np.zeros(expected.shape), np.zeros(expected.shape, np.bool_)
        for other in others:
            if expected.dtype.kind == "f":
                with np.errstate(all="ignore"):
                    difference = np.abs(other.astype(np.float64) - expected)
                    lost = np.isfinite(expected) & ~np.isfinite(other)
                by = np.maximum(by, np.where(lost, np.inf, np.where(np.isfinite(difference), difference, 0.0)))
            undecided |= other != expected
        return Moved(by, undecided)


def moved_by_rounding(
    graph: Graph, inputs: Arrays, weights: Arrays, expected: Arrays, rounds: int = ROUNDS
) -> dict[str, Moved]:
    """Return the change of each output of a graph if every op rounds: the maximum over a few random draws.

    expected  the graph's own outputs in float64
    rounds    number of draws
    """
    draws = [
        interpret(graph, inputs, weights, float64=True, disturb=_rounding(np.random.default_rng(number)))
        for number in range(rounds)
    ]
    return {name: Moved.between(array, [draw[name] for draw in draws]) for name, array in expected.items()}


def first_choice(graph: Graph, inputs: Arrays, weights: Arrays, rounds: int = ROUNDS) -> Node | None:
    """Return the first node, in program order, whose integers or booleans change if every op rounds: a top_k of nearly
    equal numbers, for example. None if there is none. The graph has no calls.
    """
    exact: dict[Node, Sequence[Array]] = {}
    found: list[Node] = []

    def keep(node: Node, results: Sequence[Array]) -> None:
        if any(not value.type.dtype.is_float for value in node.results):
            exact[node] = results

    def compare(node: Node, results: Sequence[Array]) -> None:
        pairs = zip(node.results, exact.get(node, ()), results, strict=False)
        if any(not value.type.dtype.is_float and not np.array_equal(x, y) for value, x, y in pairs):
            found.append(node)

    interpret(graph, inputs, weights, float64=True, watch=keep)
    for number in range(rounds):
        disturb = _rounding(np.random.default_rng(number))
        interpret(graph, inputs, weights, float64=True, watch=compare, disturb=disturb)
        if found:
            return found[0]
    return None


def changed(array: Array, spacing: float, rng: np.random.Generator, least: float = 0.0) -> Array:
    """Return a float array with each element changed up or down by a relative spacing, or by `least` if that is larger.

    Arrays of other dtypes are returned unchanged.
    """
    if array.dtype.kind != "f" or not spacing:
        return array
    up = np.unpackbits(np.frombuffer(rng.bytes(-(-array.size // 8)), np.uint8), count=array.size).reshape(array.shape)
    with np.errstate(all="ignore"):
        near: Array = array * np.array((1 - spacing, 1 + spacing))[up]
        return near + np.where(array != 0, np.array((-least, least))[up], 0.0) if least > _NO_NUMBER else near


_NO_NUMBER = 1e-30
"""If the smallest number of a dtype is below this value, underflow in the dtype is ignored."""


def _rounding(rng: np.random.Generator) -> Callable[[Node, Operands, Callable[[Operands], list[Array]]], list[Array]]:
    def rounded(array: Array, dtype: DType) -> Array:
        least = 0.0 if dtype.numpy is None or not dtype.is_float else float(np.finfo(dtype.numpy).smallest_subnormal)
        return changed(array, spacing_of(dtype), rng, least)

    def disturb(node: Node, operands: Operands, compute: Callable[[Operands], list[Array]]) -> list[Array]:
        given = [v.type.dtype for v in node.inputs]
        made = [v.type.dtype for v in node.results]
        if node.op.flops == 0:  # an op that moves numbers rounds only to a coarser dtype
            finest = max(map(spacing_of, given), default=0.0)
            results = compute(operands)
            return [
                rounded(a, dtype) if spacing_of(dtype) > finest else a for a, dtype in zip(results, made, strict=True)
            ]
        coarsest = max((*given, *made), key=spacing_of)
        moved = [
            a if a is None or v is None or v.literal is not None else rounded(a, coarsest)
            for a, v in zip(operands, node.operands, strict=True)
        ]
        return [rounded(a, dtype) for a, dtype in zip(compute(moved), made, strict=True)]

    return disturb
