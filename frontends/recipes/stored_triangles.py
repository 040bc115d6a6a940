"""Stored tensors that are triangles, rewritten as their formula: nanoGPT's `bias`, CLIP's `attn_mask`.

[1, 1, C, C] of 1 up to the diagonal and 0 past it   -->   where(j <= i, 1, 0)

The formula depends on positions, like a triangle that the model computes. So passes see that a slice of any length is
causal, and the triangle takes no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from treadle.ir.builder import Builder, Expr
from treadle.ir.types import DType


class Triangle(NamedTuple):
    """A tensor whose elements are `inside` if j <= i + diagonal, for its last two axes i and j, and `outside`
    elsewhere.
    """

    shape: tuple[int, ...]
    diagonal: int
    inside: float
    outside: float

    def build(self, b: Builder, dtype: DType) -> Expr:
        rows, columns = (b.iota(size=n) for n in self.shape[-2:])
        edge = b.rearrange(rows, pattern="i -> i 1")
        keep = columns <= (edge + self.diagonal if self.diagonal else edge)
        if dtype.kind == "bool":
            made = keep if self.inside else b.logical_not(keep)
        else:
            made = b.where(keep, b.constant(self.inside, dtype), b.constant(self.outside, dtype))
        leading = len(self.shape) - 2
        return b.rearrange(made, pattern=f"i j -> {'1 ' * leading}i j") if leading else made


def is_square(shape: Sequence[int]) -> bool:
    """Return True if a tensor of this shape may be a triangle."""
    return len(shape) >= 2 and shape[-1] == shape[-2] > 1 and all(n == 1 for n in shape[:-2])


def triangle_of(array: npt.NDArray[Any]) -> Triangle | None:
    """Return the triangle of a square with two values and a diagonal between them, or None for any other tensor.

    The first and last rows are enough to reject most tensors.
    """
    shape = array.shape
    if not is_square(shape):
        return None
    square = array.reshape(shape[-2:])
    inside, outside = square[-1, 0], square[0, -1]
    if inside == outside or inside != inside or outside != outside:
        return None
    first, last = square[0] != outside, square[-1] == inside
    diagonal = int(first.sum()) - 1
    if diagonal < 0:  # below the main diagonal: the last row gives the distance
        diagonal = int(last.sum()) - len(square)
    offsets = np.arange(len(square))
    if not (np.array_equal(first, offsets <= diagonal) and np.array_equal(last, offsets <= len(square) - 1 + diagonal)):
        return None
    wanted = np.where(offsets <= offsets[:, None] + diagonal, inside, outside)
    if not np.array_equal(square, wanted):
        return None
    return Triangle(shape, diagonal, inside.item(), outside.item())
