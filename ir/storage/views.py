"""Views: the locations of a value's elements in a storage, by strides.

    Storage   memory that holds elements of one dtype; their number is a size expression
    View      a storage under a shape: an offset, and a size and a stride for each dimension, in elements

Sizes, strides and offsets are expressions of the graph's symbols. If strides can express a change of shape, the result
is a view: see `View.split`, `View.merged` and `View.reshaped`. `Op.viewed` and `Op.part_of` define ops in terms of
views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property, lru_cache
from itertools import pairwise

from treadle.ir.layouts import Layout
from treadle.ir.literals import Literal
from treadle.ir.rules.axis_splitting import common_runs
from treadle.ir.sizing.sizes import ONE, ZERO, Size, product
from treadle.ir.types import DType


class StorageKind(Enum):
    """The owner of a storage's memory.

    The caller owns arguments, results and states, which outlive the call and are written in place. The program owns
    constants, and the function owns its locals. Foreign memory is allocated by a library for the results of its calls.
    A status holds words in which kernels report errors.
    """

    ARGUMENT = "argument"
    RESULT = "result"
    STATE = "state"
    CONSTANT = "constant"
    LOCAL = "local"
    FOREIGN = "foreign"
    STATUS = "status"

    @property
    def is_own(self) -> bool:
        """True if only the function itself needs the memory, while it runs."""
        return self in (StorageKind.LOCAL, StorageKind.FOREIGN)


@dataclass(frozen=True, eq=False)
class Storage:
    """Memory, with the number of elements as a size expression. Storages are compared by identity.

    layout   the layout of a matrix that is not row-major
    literal  the value of a constant
    """

    name: str
    dtype: DType
    elements: Size
    kind: StorageKind
    layout: Layout | None = None
    literal: Literal | None = None

    @cached_property
    def nbytes(self) -> Size:
        """The size of the storage in bytes."""
        return self.elements * self.dtype.bytes

    def __repr__(self) -> str:
        return f"<{self.kind.value} {self.name}: {self.dtype}[{self.elements}]>"


@dataclass(frozen=True)
class View:
    """A storage under a shape. Element i, j, ... is at offset + i * strides[0] + j * strides[1] + ...

    A view of a storage in panels (`panels` is not None) has the matrix's shape, and its strides have no meaning.
    """

    storage: Storage
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size = ZERO

    @staticmethod
    def contiguous(storage: Storage, shape: Sequence[Size]) -> View:
        """Return a view of the whole storage in row-major order."""
        return View(storage, tuple(shape), row_major(shape))

    @property
    def dtype(self) -> DType:
        return self.storage.dtype

    @property
    def panels(self) -> Layout | None:
        return self.storage.layout

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """True if the elements are in row-major order without gaps, at any offset."""
        if self.panels is not None:
            return False
        expected = row_major(self.shape)
        pairs = zip(self.shape, self.strides, expected, strict=True)
        return self.strides == expected or all(n == ONE or s == e for n, s, e in pairs)

    def lies_as(self, other: View) -> bool:
        """Return True if every element is at the location that the other view gives it. Strides along dimensions of
        size 1 do not count.
        """
        alike = (self.storage, self.shape, self.offset) == (other.storage, other.shape, other.offset)
        strides = zip(self.shape, self.strides, other.strides, strict=False)
        return alike and all(n == ONE or s == o for n, s, o in strides)

    def permuted(self, order: Sequence[int]) -> View:
        """Return a view with the dimensions in another order."""
        return replace(self, shape=tuple(self.shape[i] for i in order), strides=tuple(self.strides[i] for i in order))

    def split(self, axis: int, sizes: Sequence[Size]) -> View:
        """Split one dimension into several, outermost first, and return the view. A dimension of size 1 may be split
        into none, which removes it.
        """
        strides = [self.strides[axis] * s for s in row_major(sizes)]
        return replace(
            self,
            shape=(*self.shape[:axis], *sizes, *self.shape[axis + 1 :]),
            strides=(*self.strides[:axis], *strides, *self.strides[axis + 1 :]),
        )

    def sliced(self, axis: int, start: Size, size: Size, step: Size = ONE) -> View:
        """Return a view of `size` elements along one dimension: from `start` on, `step` apart."""
        return replace(
            self,
            shape=(*self.shape[:axis], size, *self.shape[axis + 1 :]),
            strides=(*self.strides[:axis], self.strides[axis] * step, *self.strides[axis + 1 :]),
            offset=self.offset + self.strides[axis] * start,
        )

    def merged(self, axis: int, count: int) -> View | None:
        """Return a view with `count` dimensions from `axis` on merged, or None if no stride expresses it. If `count`
        is 0, a dimension of size 1 is added.
        """
        shape, strides = self.shape[axis : axis + count], self.strides[axis : axis + count]
        kept = [(n, s) for n, s in zip(shape, strides, strict=True) if n != ONE]
        for (_, outer), (size, inner) in pairwise(kept):
            if outer != size * inner:
                return None
        stride = kept[-1][1] if kept else ONE
        return replace(
            self,
            shape=(*self.shape[:axis], product(shape), *self.shape[axis + count :]),
            strides=(*self.strides[:axis], stride, *self.strides[axis + count :]),
        )

    def broadcast(self, shape: Sequence[Size]) -> View:
        """Return the view broadcast to a shape, as in NumPy: leading dimensions and dimensions of size 1 get stride
        0.
        """
        new = len(shape) - self.rank
        old = zip(shape[new:], self.shape, self.strides, strict=True)
        return replace(self, shape=tuple(shape), strides=(*[ZERO] * new, *[s if n == m else ZERO for n, m, s in old]))

    def reshaped(self, shape: Sequence[Size]) -> View | None:
        """Return a view of the elements in row-major order with another shape, or None if no strides express it.

        Runs of dimensions with the same product on both sides are merged, then split.
        """
        shape = tuple(shape)
        if self.is_contiguous:
            return replace(self, shape=shape, strides=row_major(shape))
        runs = common_runs(self.shape, shape)
        if self.panels is not None or runs is None:
            return None
        strides: list[Size] = [ONE] * len(shape)
        for olds, news in runs:
            taken = replace(
                self, shape=tuple(self.shape[a] for a in olds), strides=tuple(self.strides[a] for a in olds)
            )
            merged = taken.merged(0, len(olds))
            if merged is None:
                return None
            for axis, step in zip(news, row_major([shape[a] for a in news]), strict=True):
                strides[axis] = merged.strides[0] * step
        return replace(self, shape=shape, strides=tuple(strides))

    def __str__(self) -> str:
        inside = ", ".join(map(str, self.shape))
        return f"{self.storage.name}[{inside}]"


def row_major(shape: Sequence[Size]) -> tuple[Size, ...]:
    """Return the strides of an array whose elements are in row-major order without gaps."""
    return _row_major(tuple(shape))


@lru_cache(maxsize=4096)
def _row_major(shape: tuple[Size, ...]) -> tuple[Size, ...]:
    strides: list[Size] = []
    stride = ONE
    for size in reversed(shape):
        strides.append(stride)
        stride = stride * size
    return tuple(reversed(strides))
