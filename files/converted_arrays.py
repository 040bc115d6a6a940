"""Arrays of bytes that are computed from parts of mapped files when their rows are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from treadle.files.mapped_files import give_back, in_file, is_mapped

Array = np.ndarray[Any, Any]

_PIECE = 1 << 18  # bytes that are converted at a time, which fit into a core's cache


@dataclass(frozen=True, eq=False)
class ConvertedArray:
    """An array u8[n, ..., m] that is computed from stored arrays, some rows at a time.

    shape   its shape
    parts   the stored arrays that determine its content
    recipe  a text; two arrays with equal recipes, shapes and parts have equal content
    open    returns a function that returns a range of rows; it prepares what all rows share
    """

    shape: tuple[int, ...]
    parts: Sequence[Array] = field(repr=False)
    recipe: str
    open: Callable[[], Callable[[slice], Array]] = field(repr=False)

    dtype = np.dtype(np.uint8)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size

    @property
    def is_mapped(self) -> bool:
        """True if all parts are in mapped files."""
        return all(map(is_mapped, self.parts))

    def release(self) -> None:
        """Let the system release the memory of the parts; see `give_back`."""
        for part in self.parts:
            give_back(part)

    def read(self) -> Array:
        """Compute all rows: a new array. The memory of the parts is released."""
        made, read = np.empty(self.shape, np.uint8), self.open()
        for rows in pieces(len(made), made[:1].nbytes):
            made[rows] = read(rows)
        self.release()
        return made

    @cached_property
    def array(self) -> Array:
        """All rows, read-only, in a file without a name (`in_file`)."""
        made = in_file(self.read())
        made.flags.writeable = False
        return made

    def __getitem__(self, where: Any) -> Array:
        rows: Array = self.array[where]
        return rows

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self.read(), dtype)


def pieces(rows: int, nbytes: int) -> list[slice]:
    """Return ranges of rows, with `nbytes` bytes in a row, that are converted one after the other."""
    step = max(1, _PIECE // max(1, nbytes))
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]
