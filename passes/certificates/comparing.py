"""The comparison of the results of a claim's two sides, and the tolerances of the comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from treadle.ir.analysis.tolerances import Distance, room
from treadle.ir.graph import Graph
from treadle.ir.types import f64
from treadle.passes.certificates.rounding_moves import HUGE, Moves

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

_PART = 2.0**-5
"""If roundings may move a result by more than this fraction of its range, the case is inconclusive."""


def compared(
    sides: tuple[Graph, Graph], made: Sequence[Arrays], inputs: Arrays, float64: bool
) -> tuple[float, float] | str | None:
    """Return the largest relative difference of the outputs and its tolerance. Return a description if the replacement
    fails, or None if roundings may move an output by more than `_PART` of its range.
    """
    before, after = made
    worst = (0.0, 0.0)
    moves = Moves(sides, made, inputs, float64)
    growth = math.sqrt(sum(len(side.main.nodes) for side in sides))
    conclusive = True
    for name, wanted in before.items():
        got = after[name]
        if got.shape != wanted.shape:
            return f"the replacement has shape {list(got.shape)}, not {list(wanted.shape)}"
        if wanted.dtype.kind != "f":
            differs = got != wanted
            while np.any(differs & ~moves.others[name]):
                if not moves.further():
                    return f"{int(np.sum(differs))} of {wanted.size} results are different"
            continue
        spacing = f64.spacing if float64 else float(np.finfo(wanted.dtype).eps)
        got, wanted = got.astype(np.float64), wanted.astype(np.float64)
        if np.any(np.isnan(got) & ~np.isnan(wanted)):
            return "an element is NaN that was not NaN before"
        off = Distance.between(got, wanted, HUGE)
        if off.lost:
            return "a number above 1e30 has changed"
        error = off.most / off.scale
        most = _PART * _range(wanted[off.plain], off.scale)
        tolerance = room(spacing, 1.0, growth * moves.most[name] / off.scale)
        while not error <= (tolerance if float64 else max(tolerance, most)):
            if not moves.further():
                return f"the results differ by {error:.2g} of the largest number, and the tolerance is {tolerance:.2g}"
            tolerance = room(spacing, 1.0, growth * moves.most[name] / off.scale)
        conclusive = conclusive and (tolerance <= most or (not float64 and error <= most))
        worst = max(worst, (error, tolerance))
    return worst if conclusive else None


def _range(numbers: Array, scale: float) -> float:
    """Return the range of the numbers, relative to the largest number; 1 if they are equal up to roundings."""
    spread = float(np.max(numbers, initial=-math.inf) - np.min(numbers, initial=math.inf)) / scale
    return spread if spread > 2.0**-20 else 1.0
