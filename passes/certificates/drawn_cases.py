"""The values on which the two sides of a claim are run: plain, masking and extreme values.

`treadle.passes.certificates.certifying` describes each case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from treadle.ir.analysis.drawn_inputs import index_ranges
from treadle.ir.composites import holds_contraction
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.ops.arithmetic import Add, Div, Maximum, Mul, Sub
from treadle.ir.ops.elementwise import Cast, Exp
from treadle.ir.ops.logic import Where
from treadle.ir.ops.normalization import MaskedSoftmax, Softmax
from treadle.ir.ops.reductions import ReduceMax
from treadle.ir.types import DType, f32

Array = np.ndarray[Any, Any]
Sizes = Mapping[str, int]

MASKED = {"masked": -1e9, "masked by -1e4": -1e4, "masked by -1e30": -1e30, "masked by the least": -math.inf}
"""The masking number of each case. If it is out of a dtype's range, the dtype's lowest number is used."""
TIES = "ties"
"""The case of many equal numbers, for derivatives."""


def _nodes(sides: tuple[Graph, Graph]) -> Iterator[Node]:
    return (node for side in sides for _, node in side.walk())


def _is_curved(node: Node) -> bool:
    """Return True if a node computes floats by arithmetic that is not linear in each operand. The error of such a node
    depends on the magnitude of its inputs.
    """
    floats = any(v.type.dtype.is_float for v in node.results)
    return floats and node.op.callee is None and node.op.flops > 0 and not node.is_multilinear


def cases_of(sides: tuple[Graph, Graph], finite: frozenset[str]) -> tuple[str, ...]:
    """Return the names of the cases that are worth trying.

    finite   the names of inputs that hold no masking numbers
    """
    curved = any(map(_is_curved, _nodes(sides)))
    kinds = ("plain", "masked", "extreme") if curved else ("plain", "masked")
    added = any(math.isfinite(number) for value, number in _masks(sides[0]).items() if value.name not in finite)
    return (*kinds, *(case for case in MASKED if case != "masked")) if added else kinds


def draw_inputs(
    sides: tuple[Graph, Graph], sizes: Sizes, case: str, seed: Sequence[int], finite: frozenset[str]
) -> dict[str, Array]:
    """Return an array for each input of both sides. Raises TreadleError if no index is in range for all of its uses."""
    ranges: dict[str, tuple[int, int]] = {}
    if any(v.type.dtype.is_int for v in sides[0].main.inputs):
        for side in sides:
            for name, found in index_ranges(side, sizes).items():
                low, high = ranges.get(name, (found.lower, found.upper))
                ranges[name] = (max(low, found.lower), min(high, found.upper))
    masks = _masks(sides[0]) if case in MASKED else {}
    masks = {value: number for value, number in masks.items() if value.name not in finite}
    products = any(holds_contraction(n.op, n.operands) for n in _nodes(sides))
    inputs: dict[str, Array] = {}
    for number, value in enumerate(sides[0].main.inputs):
        rng = np.random.default_rng([*seed, number, len(case)])
        shape = value.type.evaluate(sizes)
        if value.name.startswith("size "):
            inputs[value.name] = np.zeros(shape, np.bool_)
        elif value.type.encoding is not None:
            inputs[value.name] = value.type.encoding.sample(rng, shape)
        elif value.type.dtype.is_float:
            inputs[value.name] = _floats(rng, shape, case, _mask_of(value, masks, case), 3.0 if products else 30.0)
        elif value.type.dtype.is_int:
            inputs[value.name] = _integers(rng, shape, case, value.type.dtype, ranges.get(value.name), sizes)
        else:
            drawn = rng.random(shape) < 0.75
            if case in MASKED or case == TIES:
                rows = _rows(rng, shape)
                drawn = np.where(rows == 0, False, np.where(rows == 1, True, drawn))
            inputs[value.name] = drawn
    return inputs


def _rows(rng: np.random.Generator, shape: Sequence[int]) -> Array:
    """Return 0, 1 or 2 for each row along the last axis; for a scalar, 2."""
    return rng.integers(0, 3, (*shape[:-1], 1)) if shape else np.array(2)


def _mask_of(value: Value, masks: Mapping[Value, float], case: str) -> float | None:
    """Return the number with which an input masks in this case, or None if it does not mask."""
    number = masks.get(value)
    if number is None or not math.isfinite(number):
        return number
    return max(MASKED[case], -min(value.type.dtype.greatest, f32.greatest))


def _floats(rng: np.random.Generator, shape: Sequence[int], case: str, mask: float | None, most: float) -> Array:
    drawn: Array = np.asarray(rng.standard_normal(shape))
    rows = _rows(rng, shape)
    if mask is not None:
        return np.where((rows == 0) | ((rows == 1) & (rng.random(shape) < 0.5)), mask, drawn)
    if case == TIES:
        halves = np.round(drawn * 2) / 2
        level = halves[..., :1] if shape else halves
        return np.where(rows == 0, 0.0 * halves, np.where(rows == 1, level, halves))
    if case == "extreme":
        wide = np.clip(drawn * most / 2, -most, most)
        level = drawn[..., :1] if shape else drawn
        return np.where(rows == 0, 0.0 * wide, np.where(rows == 1, level, wide))
    return drawn


def _integers(
    rng: np.random.Generator,
    shape: Sequence[int],
    case: str,
    dtype: DType,
    span: tuple[int, int] | None,
    sizes: Sizes,
) -> Array:
    low, high = span or (0, max(sizes.values(), default=4) + 1)
    if high < low:
        raise TreadleError("no index is valid for all of its uses")
    drawn = rng.integers(low, min(high, int(np.iinfo(dtype.numpy or np.int64).max)) + 1, shape)
    if case in MASKED and span is None:
        drawn = np.where(_rows(rng, shape) == 0, 0, np.where(rng.random(shape) < 0.5, drawn % 2, drawn))
    return np.asarray(drawn).astype(dtype.numpy)


_PASSING = (Add, Sub, Mul, Div, Where, Cast, Maximum)


def _masks(graph: Graph) -> dict[Value, float]:
    """Return the inputs that mask, with their masking numbers: operands of a softmax, an exponential or a maximum,
    possibly moved or scaled in between.

    The number is finite, -1, if the input is added to another value on the way; else it is -inf.
    """
    found: dict[Value, float] = {}
    seen: set[tuple[Value, bool]] = set()
    taken = [node for node in graph.main.nodes if isinstance(node.op, (Softmax, MaskedSoftmax, Exp, ReduceMax))]
    pending = [(node.inputs[0], False) for node in taken]
    while pending:
        value, added = pending.pop()
        if (value, added) in seen:
            continue
        seen.add((value, added))
        node = value.node
        if node is None:
            found[value] = -1.0 if added or value in found else -math.inf
        elif node.op.is_view or isinstance(node.op, _PASSING):
            pending += [(v, added or isinstance(node.op, Add)) for v in node.inputs if v.type.dtype.is_float]
    return found
