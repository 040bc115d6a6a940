"""Comparisons lane by lane, which return bools."""

from __future__ import annotations

from operator import eq, ge, gt, le, lt, ne
from typing import TYPE_CHECKING

from treadle.backends.tvm.kernels.arithmetic.lane_function import LaneFunction, lane_type
from treadle.ir.types import DType

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_OPERATORS = {"eq": eq, "ne": ne, "lt": lt, "le": le, "gt": gt, "ge": ge}


def compare(k: Emitter, how: str, x: Expr, y: Expr, dtype: DType, lanes: int) -> Expr:
    """Compare lane by lane, and return bools. `how`: eq, ne, lt, le, gt or ge. A NaN differs from every value.

    TVM would fold x == x to true, and evaluates == only at its use.
    """
    t = lane_type(dtype)
    return LaneFunction(f"{how}_{dtype.name}", (t, t), "bool", _OPERATORS[how])(k, lanes, x, y)
