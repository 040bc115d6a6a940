"""Scales of a matrix of 8-bit numbers: one for the tensor, for each row, for groups of a row, or for blocks of rows and
columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.frontends.mapped_tensors import TensorRecord
from treadle.frontends.quantized.module_parts import ModuleParts

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class ScaleBlocks:
    """The scales of a matrix [N, K].

    rows     number of rows that share a scale
    group    number of inputs that share a scale
    shape    (N, K)
    read     returns the scales as the file has them, as float32
    """

    rows: int
    group: int
    shape: tuple[int, int]
    read: Callable[[], Array]

    @property
    def members(self) -> Array | None:
        """The group of each input, if the last group is shorter than the others; else None."""
        return np.arange(self.shape[1]) // self.group if self.shape[1] % self.group else None

    def factors(self) -> Array:
        """Return the scale of each group of each row, f32[N, G]."""
        return self.spread(self.read())

    def spread(self, values: Array) -> Array:
        """Return a value for each group of each row, from the values of blocks."""
        rows, size = self.shape
        blocks = values.reshape(-(-rows // self.rows), -(-size // self.group))
        return np.repeat(blocks, self.rows, axis=0)[:rows]

    def __str__(self) -> str:
        if self.rows > 1:
            return f"8 bits in blocks of {self.rows} x {self.group}"
        return f"8 bits in groups of {self.group}"


def groups_of_scales(
    weight: TensorRecord,
    scales: TensorRecord,
    parts: ModuleParts,
    blocks: object = None,
    read: Callable[[], Array] | None = None,
) -> ScaleBlocks:
    """Return the scales of a matrix, by their shape.

    blocks  the settings' size of a block, [rows, columns]; None: scales are of rows, of groups, or of the tensor
    read    returns the scales; by default the tensor's elements

    Raises CheckpointError for scales of another shape.
    """
    rows, size = weight.shape
    found = read or (lambda: parts.scales(scales.name))
    if blocks is not None:
        if (
            not isinstance(blocks, list)
            or len(blocks) != 2
            or not all(type(n) is int and 0 < n <= 1 << 24 for n in blocks)
        ):
            raise parts.error(scales.name, "the size of a block must be two positive numbers", repr(blocks)[:80])
        tall, wide = blocks
        if scales.shape != (-(-rows // tall), -(-size // wide)):
            what = f"the scales do not have one number per block of {tall} x {wide}"
            raise parts.error(scales.name, what, f"{scales} of {weight}")
        return ScaleBlocks(tall, min(wide, size), (rows, size), found)
    if scales.shape in ((), (1,), (1, 1)):
        return ScaleBlocks(rows, size, (rows, size), found)
    if len(scales.shape) == 1 and scales.shape[0] == rows:
        return ScaleBlocks(1, size, (rows, size), found)
    if len(scales.shape) != 2 or scales.shape[0] != rows or size % max(1, scales.shape[1]) or not scales.shape[1]:
        what = "the scales are neither of the tensor nor of its rows or groups of inputs"
        raise parts.error(scales.name, what, f"{scales} of {weight}")
    return ScaleBlocks(1, size // scales.shape[1], (rows, size), found)
