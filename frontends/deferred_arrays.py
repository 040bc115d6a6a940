"""Arrays of a mapped file that are converted when a part is read, so that reading a part costs only the bytes of that
part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class DeferredArray:
    """A weight as a file stores it, and the conversion that is applied to any part of it, element by element.

    stored   a view of the file, with the weight's shape
    convert  converts stored elements, of any shape, to `dtype`
    """

    stored: Array
    convert: Callable[[Array], Array]
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        shape: tuple[int, ...] = self.stored.shape
        return shape

    def __getitem__(self, where: Any) -> Array:
        """Return a converted part: a new, read-only array."""
        made = np.asarray(self.convert(self.stored[where]))
        made.flags.writeable = False
        return made

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[...], dtype)

    def then(self, convert: Callable[[Array], Array], dtype: np.dtype[Any]) -> DeferredArray:
        """Return the same array with one further conversion after this one."""
        return DeferredArray(self.stored, lambda part: convert(self.convert(part)), dtype)


def stored_bytes(array: Any, part: Array) -> int:
    """Return the number of the file's bytes that a part of an array occupies."""
    return part.size * array.stored.itemsize if isinstance(array, DeferredArray) else part.nbytes


def widened_bits(bits: Array) -> Array:
    """Return the bits of bf16 numbers as float32, which is exact."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)
