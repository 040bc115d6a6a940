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

Space = Moving | Status | Held | Constant


class Pointer(NamedTuple):
    """A location in a space, `offset` bytes from its start."""

    space: Space
    offset: int = 0

    def after(self, count: int) -> Pointer:
        """Return the pointer `count` bytes after this one."""
        return Pointer(self.space, self.offset + count)
