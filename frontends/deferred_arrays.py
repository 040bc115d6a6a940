"""Arrays of a mapped file that are converted where they are taken, so that a part costs the bytes of a part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class DeferredArray:
    """What a file stores of a weight, and what makes numbers of any part of it, element by element.

    stored   a view of the file, of the weight's shape
    convert  makes numbers of `dtype` of elements, whatever their shape
    """

    stored: Array
    convert: Callable[[Array], Array]
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        shape: tuple[int, ...] = self.stored.shape
        return shape

    def __getitem__(self, where: Any) -> Array:
        """A part, converted: a new array, read-only."""
        made = np.asarray(self.convert(self.stored[where]))
        made.flags.writeable = False
        return made

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[...], dtype)

    def then(self, convert: Callable[[Array], Array], dtype: np.dtype[Any]) -> DeferredArray:
        """The same, converted once more."""
        return DeferredArray(self.stored, lambda part: convert(self.convert(part)), dtype)


def stored_bytes(array: Any, part: Array) -> int:
    """How many bytes of its file a part of an array takes."""
    return part.size * array.stored.itemsize if isinstance(array, DeferredArray) else part.nbytes


def widened_bits(bits: Array) -> Array:
    """The bits of bf16 numbers as float32, which loses nothing."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)
