"""Bounds on the difference of two correct ways to compute the same values, since every op rounds.

Numbers of a dtype have a relative **spacing** (2^-23 for f32; 1/127 of a row's largest number, if rows are rounded to 8
bits at every call). If the last bits of its inputs change, the result of f changes, and no computation of f can be more
precise than that change: `moved` is the largest change of a result when its inputs change by one spacing, up or down. A
sum of n terms adds n roundings of either sign, whose sum **grows** as sqrt(n). So the error of a result may be

    8 (spacing max|f| + sqrt(n) moved)

The factor 8 is the number of roundings inside a function such as erf. `moved` is measured by changing inputs. The
caller determines which numbers are changed:

    one op alone   its operands change; n is the points of its iteration space for one result
    a model        operands and results of every op change; n is 1, since each op is changed by itself
    a rewrite      inputs and constants of the two sides change; n is their number of ops

Rounding to blocks changes a number by up to half a step, and later ops may amplify that. In a model, the largest change
of a result when all numbers to be rounded change by half a step is added.

**Huge** numbers represent infinity, and masks often contain them. They do not count for the scale of the other numbers,
and must stay huge, with the same sign. Each caller defines which numbers are huge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from treadle.ir.analysis.weight_only import is_made_of_weights
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.graph import Graph, Node
from treadle.ir.ops.blocks import Encode
from treadle.ir.types import DType

Array = np.ndarray[Any, Any]
Numbers = TypeVar("Numbers", float, Array)

ROUNDINGS = 8.0
"""The number of roundings inside a function such as erf."""


def spacing_of(dtype: DType) -> float:
    """Return the relative spacing of a dtype's numbers; 0 for a dtype that is not a float."""
    return dtype.spacing if dtype.is_float else 0.0


def coarsest_spacing(graph: Graph) -> float:
    """Return the spacing of the coarsest float dtype in a graph, or of the blocks to which it rounds computed values;
    0 if there is no float.
    """
    values = [v for _, node in graph.walk() for v in (*node.inputs, *node.results)]
    rounded = [e.block.spacing for _, node in graph.walk() if (e := rounds_to(node)) is not None]
    return max([*(spacing_of(v.type.dtype) for v in values), *rounded], default=0.0)


def rounds_to(node: Node) -> Encoding | None:
    """Return the encoding to which a node rounds values that are not weights; None for other nodes."""
    return node.op.to if isinstance(node.op, Encode) and not is_made_of_weights(node.inputs[0]) else None


def room(spacing: float, size: Numbers, moved: Numbers, growth: float = 1.0) -> Numbers:
    """Return the allowed error of a result, of the shape of `size` and `moved`.

    size    the magnitude of the result's numbers
    moved   the change of the result when its inputs change by a spacing
    growth  the factor of `moved`: sqrt(n) for a sum of n terms
    """
    return ROUNDINGS * (spacing * size + growth * moved)


@dataclass(frozen=True)
class Distance:
    """The distance of computed numbers from the expected ones.

    plain  the positions that are compared: the expected number is finite and not huge
    scale  the largest expected number at those positions; 1 if all are zero, or if there are none
    most   the largest difference at those positions
    lost   True if a huge number has become another number
    """

    plain: Array
    scale: float
    most: float
    lost: bool

    @staticmethod
    def between(got: Array, wanted: Array, huge: float) -> Distance:
        """Compare float64 arrays of one shape. An expected NaN is not compared; an unexpected NaN makes `most` NaN."""
        with np.errstate(all="ignore"):
            large = np.abs(wanted) >= huge
            stays = (np.sign(got) == np.sign(wanted)) & (np.abs(got) >= huge / 2)
            plain = np.isfinite(wanted) & ~large
            scale = float(np.max(np.abs(wanted), initial=0.0, where=plain)) or 1.0
            most = float(np.max(np.abs(got - wanted), initial=0.0, where=plain))
        return Distance(plain, scale, most, bool(np.any(large & ~stays)))
