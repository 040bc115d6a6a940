"""Bounds on the rounding error of a graph's outputs: a running error analysis (Wilkinson 1963) of its ops.

Every value has a bound on its error, element by element. This module names no op; the facts about ops are in their
classes.

composite    its body is analysed, so that cancellation and rounding inside it count
elementwise  the incoming error: how far the result moves if each operand moves by its bound, either way. Then the op's
             own rounding: half a spacing of the result's dtype at the element's own value, and FUNCTION spacings of the
             dtype in which it is computed, which is f32 for 16 bits
sum          the incoming error, through the op itself, which is linear: f(|x| + bound) - f(|x|). Then n roundings of
             the sum of the terms' magnitudes, in the op's accumulation dtype (`Op.sums_in`); n is the op on ones. The
             result is rounded once, as above
rearranging  the incoming error, rearranged in the same way

A backend that rounds fewer times, for example because it fuses ops, is within the bounds as well. Exact numbers are
computed in f64, so their own roundings count if the dtype is f64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from tests.op_checks import EPSILON
from treadle.ir.composites import body_of
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Composite, Op
from treadle.ir.types import DType, bf16, f16, f32, f64

Array = np.ndarray[Any, Any]

LEAST = {"f64": 2.0**-1022, "f32": 2.0**-126, "f16": 2.0**-24, "bf16": 2.0**-126}
"""Smallest normal numbers. Smaller numbers are spaced evenly (f16), or may be flushed to 0 (the other dtypes, if the
CPU is configured so).
"""

FUNCTION = 2
"""Maximal error of a library's elementwise function, in spacings of the result. glibc, SLEEF and NumPy promise 1 to 2.
"""


class Bounded:
    """Exact numbers, and the bound on the error of approximate ones; `moved` for integers and bools is 0."""

    def __init__(self, exact: Array, moved: Array | float = 0.0) -> None:
        self.exact = exact
        self.moved = np.broadcast_to(np.asarray(moved, np.float64), exact.shape)

    @property
    def is_float(self) -> bool:
        return self.exact.dtype.kind == "f"


def bounded(
    graph: Graph, inputs: Mapping[str, Array], weights: Mapping[str, Array] | None = None, *, narrow: bool = False
) -> dict[str, Bounded]:
    """Return the outputs of a graph with their bounds.

    The graph has no calls and no symbols in attributes. Its dtypes represent the input arrays exactly.

    narrow  allow for computing bf16 in bf16, with every step and every sum rounded, as the reference of onnx does
    """
    arrays = [inputs[v.name] for v in graph.main.inputs]
    arrays += [(weights or {})[name] for name in graph.main.parameters]
    given = [Bounded(_wide(np.asarray(x))) for x in arrays]
    found = _Analysis({f32: bf16} if narrow else {}).function(graph.main, given)
    made = zip(graph.main.outputs.items(), found, strict=True)
    return {name: _unless_too_large(found, value.type.dtype) for (name, value), found in made}


def _unless_too_large(found: Bounded, dtype: DType) -> Bounded:
    """Return `result`, but without a bound where a number may exceed the dtype's largest number and become inf."""
    if not found.is_float:
        return found
    largest = float(np.finfo(dtype.numpy).max) if dtype.numpy is not None else float(np.finfo(np.float32).max)
    return Bounded(found.exact, np.where(np.abs(found.exact) + found.moved > largest, np.inf, found.moved))


def assert_within(got: Any, wanted: Bounded, what: str) -> None:
    """Assert equal shapes, integers and bools, and floats within their bounds.

    Results are infinite or NaN exactly where the exact numbers are.
    """
    made = np.asarray(got)
    if not wanted.is_float:
        np.testing.assert_array_equal(made, wanted.exact, err_msg=what)
        return
    assert made.shape == wanted.exact.shape, f"{what}: shape {made.shape}, expected {wanted.exact.shape}"
    made = np.asarray(made, np.float64)
    finite = np.isfinite(wanted.exact)
    np.testing.assert_array_equal(made[~finite], wanted.exact[~finite], err_msg=what)
    with np.errstate(invalid="ignore"):
        off = np.abs(made - wanted.exact)
    beyond = finite & ~(off <= wanted.moved)
    if np.any(beyond):
        worst = np.unravel_index(np.argmax(np.where(beyond, off / np.maximum(wanted.moved, 1e-300), 0)), off.shape)
        raise AssertionError(
            f"{what}: {np.count_nonzero(beyond)} of {off.size} elements are beyond their bounds; "
            f"at {list(map(int, worst))} {made[worst]} for {wanted.exact[worst]}, "
            f"off by {off[worst]:.3g}, bound {wanted.moved[worst]:.3g}"
        )


# -- functions and nodes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Analysis:
    """held: maps a dtype to the dtype that represents it."""

    held: Mapping[DType, DType]

    def function(self, function: Function, arguments: Sequence[Bounded]) -> list[Bounded]:
        values: dict[Value, Bounded] = dict(zip(function.arguments, arguments, strict=True))

        def read(value: Value | None) -> Bounded | None:
            if value is None:
                return None
            if value.literal is None:
                return values[value]
            # An op's own constant, such as sqrt(1/2), is rounded to its dtype; the literal keeps the exact value.
            held = _wide(value.literal.array)
            return Bounded(held, self._rounding(value.type.dtype, held) if held.dtype.kind == "f" else 0.0)

        for node in function.nodes:
            operands = [read(v) for v in node.operands]
            values.update(zip(node.results, self._node(node, operands), strict=True))
        return [found for value in function.outputs.values() if (found := read(value)) is not None]

    def _node(self, node: Node, operands: Sequence[Bounded | None]) -> list[Bounded]:
        op = node.op
        if isinstance(op, Composite):
            body = body_of(op, [None if v is None else v.type for v in node.operands])
            return self.function(body, [x for x in operands if x is not None])
        exact = _apply(op, [None if x is None else x.exact for x in operands])
        plain = _apply_to_sizes(op, operands, exact) if _is_sum(op) or op.flops == 0 else exact
        moves = self._moves(op, operands, exact, plain)
        return [
            Bounded(y, move + self._own(node, number, operands, y, plain)) if y.dtype.kind == "f" else Bounded(y)
            for number, (y, move) in enumerate(zip(exact, moves, strict=True))
        ]

    def _moves(
        self, op: Op, operands: Sequence[Bounded | None], exact: Sequence[Array], plain: Sequence[Array]
    ) -> list[Array]:
        """Return how far the results move if the operands move by their bounds.

        plain: the results of the magnitudes, if the op is linear.
        """
        floats = [x.is_float and bool(np.any(x.moved)) if x is not None else False for x in operands]
        if not any(floats):
            return [np.zeros(y.shape) for y in exact]
        if _is_sum(op) or op.flops == 0:
            further = [  # infinite numbers have no bound
                None if x is None else np.abs(x.exact) + x.moved if x.is_float else x.exact for x in operands
            ]
            return [_apart(a, b) for a, b in zip(_apply(op, further), plain, strict=True)]
        found = [np.zeros(y.shape) for y in exact]
        for signs in product(*[(-1.0, 1.0) if moves else (0.0,) for moves in floats]):
            with np.errstate(invalid="ignore"):
                moved = [
                    None if x is None else x.exact + sign * x.moved if x.is_float else x.exact
                    for sign, x in zip(signs, operands, strict=True)
                ]
            found = [np.maximum(f, _apart(a, y)) for f, a, y in zip(found, _apply(op, moved), exact, strict=True)]
        return found

    def _own(
        self, node: Node, number: int, operands: Sequence[Bounded | None], y: Array, plain: Sequence[Array]
    ) -> Array | float:
        """Return the rounding error of the op itself: in its sums, and in its result."""
        op, dtype = node.op, node.results[number].type.dtype
        given = [v.type.dtype for v in node.inputs]
        if op.flops == 0 and (
            dtype in given or not given
        ):  # a cast to a coarser dtype rounds, a rearrangement does not
            return 0.0
        made = self._rounding(dtype, y)
        if not _is_sum(op):
            return made if op.flops == 0 else made + FUNCTION * 2 * self._half(self._working(dtype)) * np.abs(y)
        (terms,), count = plain, _terms_of(op, operands)
        return made + self._half(op.sums_in(dtype)) * (count + 1) * terms

    def _working(self, dtype: DType) -> DType:
        return f32 if dtype in (f16, bf16) else dtype

    def _half(self, dtype: DType) -> float:
        dtype = self.held.get(dtype, dtype)
        return EPSILON[dtype.name] / 2 + (EPSILON["f64"] / 2 if dtype is f64 else 0)

    def _rounding(self, dtype: DType, y: Array) -> Array:
        """Return half a spacing at each number."""
        made: Array = self._half(dtype) * np.abs(y) + LEAST[dtype.name]
        return made


def _is_sum(op: Op) -> bool:
    return op.accumulates is not None


def _apart(a: Array, b: Array) -> Array:
    """Return |a - b|, or 0 if either is infinite or NaN; 0 for integers and bools."""
    if b.dtype.kind != "f":
        return np.zeros(b.shape)
    with np.errstate(invalid="ignore"):
        apart = np.abs(a - b)
    finite = np.isfinite(apart)
    return apart if np.all(finite) else np.where(finite, apart, 0.0)


def _apply(op: Op, operands: Sequence[Array | None]) -> list[Array]:
    with np.errstate(all="ignore"):
        made = op.in_float64().reference(*operands)
    return [np.asarray(a) for a in (made if isinstance(made, tuple) else (made,))]


def _apply_to_sizes(op: Op, operands: Sequence[Bounded | None], exact: Sequence[Array]) -> Sequence[Array]:
    """Apply the op to the operands' magnitudes. If no number is negative, these equal the exact numbers."""
    if not any(x is not None and x.is_float and np.any(x.exact < 0) for x in operands):
        return exact
    return _apply(op, [None if x is None else np.abs(x.exact) if x.is_float else x.exact for x in operands])


def _terms_of(op: Op, operands: Sequence[Bounded | None]) -> Array:
    """Return the number of terms of each sum."""
    if all(x is None or x.is_float for x in operands):
        return _terms_of_shapes(op, tuple(None if x is None else x.exact.shape for x in operands))
    (count,) = _apply(op, [None if x is None else np.ones_like(x.exact) if x.is_float else x.exact for x in operands])
    return count


@lru_cache(maxsize=32)
def _terms_of_shapes(op: Op, shapes: tuple[tuple[int, ...] | None, ...]) -> Array:
    (count,) = _apply(op, [None if shape is None else np.ones(shape) for shape in shapes])
    return count


def _wide(x: Array) -> Array:
    return x.astype(np.float64) if x.dtype.kind == "f" else x
