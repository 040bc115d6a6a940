"""How far apart two ways of computing one thing may be, since every op rounds.

Numbers of a dtype lie a relative **spacing** apart (2^-23 for f32; 1/127 of a row's largest, where rows are rounded to
8 bits at every call). No way to compute f can be nearer than what a
change of last bits makes of it: `moved` is the largest change of a result when what goes into it changes by a spacing,
up or down. A sum of n terms adds n roundings of either sign, which **grow** as their square root. So a result may be
off by

    8 (spacing max|f| + sqrt(n) moved)

where the 8 stands for the several roundings inside a function such as erf. How much a result moves is found by trying,
and what is tried is said where it is:

    one op alone   its operands change; n is the points of its iteration space for one result
    a model        operands and results of every op change; n is 1, since each op has had its own
    a rewrite      inputs and constants of the two sides change; n is their ops

Numbers that are **huge** stand for infinity, and masks are often written so. They say nothing of the scale of the
others, and must stay huge, of the same sign. Each caller says which numbers are huge.
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
"""How many there are inside a function."""


def spacing_of(dtype: DType) -> float:
    """How far a dtype's numbers lie apart, relatively; 0 if it is no float."""
    return dtype.spacing if dtype.is_float else 0.0


def coarsest_spacing(graph: Graph) -> float:
    """The spacing of the coarsest float dtype in a graph, or of the blocks to which it rounds what it computes; 0 where
    there is no float."""
    values = [v for _, node in graph.walk() for v in (*node.inputs, *node.results)]
    rounded = [e.block.spacing for _, node in graph.walk() for e in _made_blocks(node)]
    return max([*(spacing_of(v.type.dtype) for v in values), *rounded], default=0.0)


def _made_blocks(node: Node) -> list[Encoding]:
    """The encoding to which a node rounds what is no weight."""
    return [node.op.to] if isinstance(node.op, Encode) and not is_made_of_weights(node.inputs[0]) else []


def room(spacing: float, size: Numbers, moved: Numbers, growth: float = 1.0) -> Numbers:
    """How far off a result may be.

    size    of its numbers
    moved   how far it moves when numbers change by a spacing
    growth  how much of that it may be off: sqrt(n) for a sum of n terms
    """
    return ROUNDINGS * (spacing * size + growth * moved)


@dataclass(frozen=True)
class Distance:
    """How far numbers are from those that are wanted.

    plain  which are compared: what is wanted there is finite and not huge
    scale  the largest of these that is wanted; 1 where they are zeros, or none
    most   the largest difference of these
    lost   whether a huge number has become another
    """

    plain: Array
    scale: float
    most: float
    lost: bool

    @staticmethod
    def between(got: Array, wanted: Array, huge: float) -> Distance:
        """Of float64 arrays of one shape. A NaN that is wanted is not compared; one that is not makes `most` one."""
        with np.errstate(all="ignore"):
            large = np.abs(wanted) >= huge
            stays = (np.sign(got) == np.sign(wanted)) & (np.abs(got) >= huge / 2)
            plain = np.isfinite(wanted) & ~large
            scale = float(np.max(np.abs(wanted), initial=0.0, where=plain)) or 1.0
            most = float(np.max(np.abs(got - wanted), initial=0.0, where=plain))
        return Distance(plain, scale, most, bool(np.any(large & ~stays)))
