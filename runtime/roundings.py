"""How far a model's outputs move when every op of it rounds: its conditioning, by trying.

Rounding is drawn, not carried out: in float64, every op's operands change by a spacing of its dtypes, up or down by
chance, and so does its result; constants alone are what they are. What the outputs move by is what no way of
computing this model in these dtypes can be sure to stay within, however the loss comes about: a mean taken off
numbers that are nearly equal, a softmax over scores of hundreds, a hundred layers.
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
    """What the results of a run move by: `by`, the most for each float; `undecided`, where others became another."""

    by: Array
    undecided: Array

    @staticmethod
    def between(expected: Array, others: Sequence[Array]) -> Moved:
        """By comparing a result with the same result of changed runs."""
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
    """The moves of each output of a graph when every op of it rounds, the largest of a few draws.

    expected  the graph's own outputs in float64
    rounds    how many draws
    """
    draws = [
        interpret(graph, inputs, weights, float64=True, disturb=_rounding(np.random.default_rng(number)))
        for number in range(rounds)
    ]
    return {name: Moved.between(array, [draw[name] for draw in draws]) for name, array in expected.items()}


def changed(array: Array, spacing: float, rng: np.random.Generator, least: float = 0.0) -> Array:
    """An array of floats, each changed by a relative spacing, or the `least` number, up or down; others as they are."""
    if array.dtype.kind != "f" or not spacing:
        return array
    up = np.unpackbits(np.frombuffer(rng.bytes(-(-array.size // 8)), np.uint8), count=array.size).reshape(array.shape)
    with np.errstate(all="ignore"):
        near: Array = array * np.array((1 - spacing, 1 + spacing))[up]
        return near + np.where(array != 0, np.array((-least, least))[up], 0.0) if least > _NO_NUMBER else near


_NO_NUMBER = 1e-30
"""Dtypes whose least numbers are smaller than this lose none of them."""


def _rounding(rng: np.random.Generator) -> Callable[[Node, Operands, Callable[[Operands], list[Array]]], list[Array]]:
    def rounded(array: Array, dtype: DType) -> Array:
        least = 0.0 if dtype.numpy is None or not dtype.is_float else float(np.finfo(dtype.numpy).smallest_subnormal)
        return changed(array, spacing_of(dtype), rng, least)

    def disturb(node: Node, operands: Operands, compute: Callable[[Operands], list[Array]]) -> list[Array]:
        given = [v.type.dtype for v in node.inputs]
        made = [v.type.dtype for v in node.results]
        if node.op.flops == 0:  # it moves numbers, and rounds them only to a coarser dtype
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
