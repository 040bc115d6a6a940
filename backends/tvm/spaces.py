"""Memory spaces: each pointer of a plan is an offset in one of these spaces.

Arena     the executable's own memory, for local values; it moves if a plan needs more
Input     an array that the caller passes, a different one in each call
Output    an array that a call allocates
State     an array of the states that a call updates
Status    words in which kernels report an index out of range; allocated with the plan, and fixed
Held      a weight; fixed
Constant  a constant of the program; fixed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from treadle.ir.sizing.sizes import Size
from treadle.ir.storage.views import Storage
from treadle.ir.types import DType, i64
from treadle.passes.memory.frames import ALIGNMENT


@dataclass(frozen=True, slots=True)
class Arena:
    pass


@dataclass(frozen=True, slots=True)
class Input:
    name: str


@dataclass(frozen=True, slots=True)
class Output:
    name: str


@dataclass(frozen=True, slots=True)
class State:
    name: str


@dataclass(frozen=True, slots=True)
class Status:
    pass


@dataclass(frozen=True, slots=True)
class Held:
    """A weight by its name."""

    name: str


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant by its number in the program."""

    number: int


Moving = Arena | Input | Output | State
"""The spaces whose addresses are known only when a call begins."""

Fixed = Held | Constant
"""The spaces of the values that an executable holds."""

Space = Moving | Status | Fixed


class Pointer(NamedTuple):
    """Byte `offset` of a storage that begins at byte `begin` of a space."""

    space: Space
    begin: int
    storage: Storage
    offset: int = 0

    @property
    def at(self) -> int:
        """The location in the space, in bytes."""
        return self.begin + self.offset


@dataclass(frozen=True)
class MemoryForm:
    """The form of values in a memory.

    alignment  each storage begins at a multiple of this number of bytes
    narrow     True if 64-bit integers are stored in 32 bits
    """

    alignment: int = ALIGNMENT
    narrow: bool = False

    def element(self, dtype: DType) -> int:
        """Return the bytes of an element."""
        return 4 if self.narrow and dtype is i64 else dtype.bytes

    def size(self, nbytes: int) -> int:
        """Return the bytes of a space with this content: a multiple of the alignment, and not 0."""
        return max(1, -(-nbytes // self.alignment)) * self.alignment

    def nbytes(self, storage: Storage) -> Size:
        """Return the bytes of a storage."""
        return storage.nbytes if not self.narrow else storage.elements * self.element(storage.dtype)


HOST = MemoryForm()
"""The memory of the host."""
