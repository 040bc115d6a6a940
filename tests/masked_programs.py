"""Random attention programs with masks, biases and fully masked rows, and their gradients.

graph, inputs = drawn_program(3)
gradients_of(graph, inputs)          # of sum(result * fixed factors), by every float input
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.transforms.differentiate import backward
from treadle.ir.transforms.inline import inline_calls

Array = np.ndarray[Any, Any]
LOWEST = (-1e4, -1e20, -3e38, -math.inf)
HOW = ("filled", "chosen", "added", "multiplied", "guarded", "zeroed", "twice", "biased")


def drawn_program(seed: int, how: str | None = None, lowest: float | None = None) -> tuple[Graph, dict[str, Array]]:
    """Return a graph with decomposed attention, [B, H, S, T] scores and at least one mask, and float64 inputs for it.

    One row sees no key, and values repeat, so that there are ties. The fill values of masks are drawn as
    well. If they are -inf, an empty row returns zeros, because a row of NaN has no gradient to compare.
    """
    rng = np.random.default_rng(seed)
    rows, heads, queries, keys, width = (int(rng.integers(1, n)) for n in (3, 4, 5, 6, 5))
    queries, keys, width = queries + 1, keys + 1, width + 1
    drawn_how, drawn_lowest = HOW[int(rng.integers(len(HOW)))], LOWEST[int(rng.integers(len(LOWEST)))]
    how, lowest = how or drawn_how, lowest if lowest is not None else drawn_lowest
    if how == "multiplied" and lowest == -math.inf:
        lowest = -1e20  # 0 * -inf is NaN
    b = Builder(Graph("masked"))
    q = b.input("q", f"f32[{rows}, {heads}, {queries}, {width}]")
    k = b.input("k", f"f32[{rows}, {heads}, {keys}, {width}]")
    v = b.input("v", f"f32[{rows}, {heads}, {keys}, {width}]")
    by_row = bool(rng.integers(2))
    kept = b.input("kept", f"bool[{rows}, 1, {queries if by_row else 1}, {keys}]")
    bias = b.input("bias", f"f32[{heads}, {queries}, {keys}]")
    scores = b.einsum(q, k, equation="b h s d, b h t d -> b h s t") * float(rng.choice([0.25, 0.5, 0.75]))
    if rng.integers(3) == 0:
        scores = b.tanh(scores * 0.1) * 10.0
    if how == "biased" or rng.integers(4) == 0:
        scores = scores + bias
    number = b.constant(lowest, scores.dtype)
    if how in ("filled", "guarded", "zeroed", "twice", "biased"):
        scores = b.where(kept, scores, number)
        if how == "twice":
            order = b.iota(size=queries), b.iota(size=keys)
            causal = b.rearrange(order[1], pattern="t -> 1 t") <= b.rearrange(order[0], pattern="s -> s 1")
            scores = b.where(causal, scores, b.constant(LOWEST[int(rng.integers(3))], scores.dtype))
    elif how == "chosen":
        scores = b.where(b.logical_not(kept), number, scores)
    elif how == "added":
        scores = scores + b.where(kept, b.constant(0.0, scores.dtype), number)
    else:
        scores = scores + (1.0 - kept.cast(scores.dtype)) * lowest
    if rng.integers(4) == 0:
        scores = scores + bias
    weights = b.masked_softmax(scores) if how == "guarded" or lowest == -math.inf else b.softmax(scores)
    if how == "zeroed":
        weights = b.where(kept, weights, b.constant(0.0, weights.dtype))
    b.outputs(y=b.einsum(weights, v, equation="b h s t, b h t e -> b h s e"))
    inputs = {x.name: _numbers(rng, x.type.evaluate({})) for x in b.graph.main.inputs if x.type.dtype.is_float}
    mask = rng.random((rows, 1, queries if by_row else 1, keys)) < 0.6
    mask[int(rng.integers(rows)), :, int(rng.integers(mask.shape[2]))] = False
    return b.graph, {**inputs, "kept": mask}


def _numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    drawn = rng.standard_normal(shape)
    return np.round(drawn * 2) / 2 if rng.integers(2) else drawn


def gradients_of(graph: Graph, inputs: dict[str, Array]) -> dict[str, Array]:
    """Return the gradient in float64 with respect to every float input."""
    b = Builder(inline_calls(graph))
    main, nodes = b.graph.main, list(b.graph.main.nodes)
    (y,) = main.outputs.values()
    factors = np.random.default_rng(0).standard_normal(y.type.evaluate({})).astype(np.float32)
    found: dict[Any, Expr] = backward(b, nodes, {y: b.constant(factors)})
    main.outputs = {x.name: found[x].value for x in main.inputs if x in found}
    with np.errstate(all="ignore"):
        return interpret(b.graph, inputs, float64=True)
