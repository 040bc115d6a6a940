"""Names for the axes that an op knows by position, to write axis rules and patterns with."""

from __future__ import annotations

import string
from collections.abc import Collection

from treadle.ir.errors import RuleError


def place(axis: int, rank: int) -> int:
    """The position that `axis` means in a tensor of this rank; a negative one counts from the end.

    Raises RuleError where there is no such axis.
    """
    if not -rank <= axis < rank:
        raise RuleError(f"there is no axis {axis} in a tensor of rank {rank}")
    return axis % rank


def axis_letters(count: int, taken: Collection[str] = ()) -> list[str]:
    """That many one-letter names beside those taken.

    A rule whose sizes hold a graph's symbols must not name a factor like one of them. One letter, since a
    longer name that a rule gives a size to becomes a label. Raises RuleError where the letters do not
    suffice.
    """
    free = [letter for letter in string.ascii_letters if letter not in taken]
    if count > len(free):
        raise RuleError(f"needs {count} axis names beside {len(taken)}, and letters give {len(free)}")
    return free[:count]
