"""The conditioning of a model, measured as the change of its outputs if every op rounds.

Rounding is simulated in float64: the operands and results of every op change by one spacing of their dtypes, up or down
at random; only constants stay exact. No implementation of the model in these dtypes can be sure to differ by less than
the resulting change of the outputs. Causes of a large change are, for example, a mean subtracted from nearly equal
numbers, a softmax over scores in the hundreds, or a hundred layers.

If activations are rounded to blocks, a model's outputs differ by more than the last bits. This change is measured by
itself: the numbers that are rounded change by half a step of their block, up or down at random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.analysis.tolerances import rounds_to, spacing_of
from treadle.ir.graph import Graph, Node
from treadle.ir.interpreter import Disturb, interpret
from treadle.ir.types import DType

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
Operands = Sequence[Array | None]
Compute = Callable[[Operands], list[Array]]

ROUNDS = 2


@dataclass(frozen=True)
class Moved:
    """The change of a result in perturbed runs. `by`: the maximum change of each float; `undecided`: True for elements
    of other dtypes that changed; `in_blocks`: the maximum change of each float if numbers that are rounded to blocks
    change by half a step.
    """

    by: Array
    undecided: Array
    in_blocks: Array | float = 0.0

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

    def moved(disturbing: Callable[[np.random.Generator], Disturb]) -> dict[str, Moved]:
        generators = [np.random.default_rng(number) for number in range(rounds)]
        draws = [interpret(graph, inputs, weights, float64=True, disturb=disturbing(rng)) for rng in generators]
        return {name: Moved.between(array, [draw[name] for draw in draws]) for name, array in expected.items()}

    found = moved(_rounding)
    if any(rounds_to(node) is not None for _, node in graph.walk()):
        blocks = moved(_half_steps)
        for name, each in found.items():
            found[name] = Moved(each.by, each.undecided | blocks[name].undecided, blocks[name].by)
    return found


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


def _half_steps(rng: np.random.Generator) -> Disturb:
    """Return a function for `interpret` that changes all numbers to be rounded to blocks by half a step of their block,
    up or down.
    """

    def disturb(node: Node, operands: Operands, compute: Compute) -> list[Array]:
        encoding = rounds_to(node)
        x, by, scale = (*operands, None, None, None)[:3]
        if encoding is None or x is None or not x.size:
            return compute(operands)
        lines = np.moveaxis(x, encoding.axis, -1)
        blocks = (lines if by is None else lines * by).reshape(-1, encoding.elements(lines.shape[-1]))
        largest = np.abs(blocks).max(axis=-1, keepdims=True, initial=0.0)
        half = np.broadcast_to(encoding.block.spacing * largest if scale is None else scale, blocks.shape) / 2
        signs = rng.choice(np.array((-1.0, 1.0)), blocks.shape)
        with np.errstate(all="ignore"):
            moves = np.nan_to_num(
                (signs * half).reshape(lines.shape) / (1.0 if by is None else by), posinf=0.0, neginf=0.0
            )
        return compute([x + np.moveaxis(moves, -1, encoding.axis), *operands[1:]])

    return disturb


def _rounding(rng: np.random.Generator) -> Disturb:
    def rounded(array: Array, dtype: DType) -> Array:
        least = 0.0 if dtype.numpy is None or not dtype.is_float else float(np.finfo(dtype.numpy).smallest_subnormal)
        return changed(array, spacing_of(dtype), rng, least)

    def disturb(node: Node, operands: Operands, compute: Compute) -> list[Array]:
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
