"""Memory spaces: in which memory a pointer of a plan lies, and how far into it.

Arena     the executable's own memory, for what is local to a routine; it moves where a plan needs more
Input     an array that the caller gives, another one each call
Output    an array that a call allocates
State     an array of the states that a call is given, which it changes
Status    words in which kernels tell of an index outside; made with the plan, and stay
Held      an array that the executable holds, a weight or a constant; it stays
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
    """address   of the array's first byte"""

    address: int


Moving = Arena | Input | Output | State
"""Where it lies is known when a call begins."""

Space = Moving | Status | Held


class Pointer(NamedTuple):
    """A place in a space, `offset` bytes from where it begins."""

    space: Space
    offset: int = 0

    def after(self, count: int) -> Pointer:
        """So many bytes further on."""
        return Pointer(self.space, self.offset + count)
