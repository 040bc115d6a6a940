"""`causality_in_runs`: whether runs show that an output of a model depends on later tokens.

No rule of an op shows that some models are causal: attention that hides later keys by arithmetic, as in
`scores * triangle - 1e4 * (1 - triangle)`, that mixes heads before its mask, or that multiplies a triangle of scores
by the values. Runs do: if later tokens change, or are left out, the output stays as it is at all positions before them.

    is_causal(graph, "S", "logits") or causality_in_runs(graph, "S", "logits", weights)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from treadle.ir.analysis.drawn_inputs import draw_inputs, held, small_sizes
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Graph, Value
from treadle.ir.interpreter import interpret

Array = np.ndarray[Any, Any]

_LENGTHS = (7, 18, 40)
_MOST_NUMBERS = 1 << 27
"""The most numbers in the weights of a model that is run, in float64: 1 GiB."""
_NEAR = 1e-9
"""The part of the largest number by which sums of other lengths may differ."""


def causality_in_runs(graph: Graph, axis: str, output: str, weights: Mapping[str, Array] | None = None) -> bool | None:
    """Return False if a run shows that positions of an output along an axis depend on later positions of the inputs,
    True if none of several runs does, and None if the model cannot be run in a moment.

    axis     the symbol of the axis, such as "S"
    output   the output's name; it has the axis once
    weights  by name; weights of zeros, which may hide a dependence, and absent ones are drawn

    A dependence on tokens more than 40 positions ahead is not seen.
    """
    dims = [dim for dim, size in enumerate(graph.main.outputs[output].type.shape) if size.as_symbol == axis]
    if len(dims) != 1:
        return None
    bounds = graph.symbols[axis]
    lengths = {min(max(n, bounds.lower), n if bounds.upper is None else bounds.upper) for n in _LENGTHS}
    try:
        used = _used_weights(graph, weights)
        if used is None or min(lengths) < 2:
            return None
        sizes = small_sizes(graph)[-1]
        return all(_is_kept(graph, {**sizes, axis: n}, axis, (output, dims[0]), used) for n in sorted(lengths))
    except TreadleError:  # an op refuses the sizes
        return None


def _used_weights(graph: Graph, weights: Mapping[str, Array] | None) -> dict[str, Array] | None:
    """Return all weights, drawn where they are absent or zeros; None if they are too many, or cannot be drawn."""
    sizes = [value.type.static_shape for value in graph.parameters.values()]
    if any(shape is None for shape in sizes) or sum(math.prod(shape or ()) for shape in sizes) > _MOST_NUMBERS:
        return None
    rng = np.random.default_rng(0)
    found: dict[str, Array] = {}
    for name, value in graph.parameters.items():
        array = None if weights is None else weights.get(name)
        if array is not None and (not value.type.dtype.is_float or np.any(array)):
            found[name] = np.asarray(array)
        elif value.type.encoding is not None or not value.type.dtype.is_float:
            return None
        else:
            shape = value.type.static_shape or ()
            found[name] = held(rng.standard_normal(shape) / math.sqrt(shape[-1] if len(shape) > 1 else 1), value)
    return found


def _is_kept(
    graph: Graph, sizes: Mapping[str, int], axis: str, output: tuple[str, int], weights: Mapping[str, Array]
) -> bool:
    """Return True if an output's first positions stay as they are while later positions of the inputs change."""
    name, dim = output
    first, others = (draw_inputs(graph, sizes, [sizes[axis], seed]) for seed in (0, 1))
    whole = interpret(graph, first, weights, float64=True)[name]
    near = _NEAR * float(np.abs(whole).max(initial=0.0))
    for cut in sorted({1, sizes[axis] // 2, sizes[axis] - 1} - {0, sizes[axis]}):
        before = np.take(whole, range(cut), axis=dim)
        for inputs in _changed(graph, axis, (first, others), cut):
            changed = interpret(graph, inputs, weights, float64=True)[name]
            if not np.abs(np.take(changed, range(cut), axis=dim) - before).max(initial=0.0) <= near:
                return False  # also for NaN
    return True


def _changed(
    graph: Graph, axis: str, pair: tuple[Mapping[str, Array], Mapping[str, Array]], cut: int
) -> Iterator[dict[str, Array]]:
    """Yield inputs that are equal before the position `cut`: with other values from there on, and without the rest, if
    the axis may be so short.
    """
    first, others = pair

    def parts(value: Value) -> tuple[slice, ...]:
        return tuple(slice(0, cut if size.as_symbol == axis else None) for size in value.type.shape)

    mixed = {name: np.array(array) for name, array in others.items()}
    for value in graph.main.inputs:
        mixed[value.name][parts(value)] = first[value.name][parts(value)]
    yield mixed
    if cut >= graph.symbols[axis].lower:
        yield {value.name: first[value.name][parts(value)] for value in graph.main.inputs}
