"""Names and sizes for the axes that an op knows by position, to write axis rules and patterns with."""

from __future__ import annotations

import string
from collections.abc import Collection, Sequence
from itertools import chain, count, islice

from treadle.ir.errors import RuleError
from treadle.ir.sizing.sizes import Size


def place(axis: int, rank: int) -> int:
    """The position that `axis` means in a tensor of this rank; a negative one counts from the end.

    Raises RuleError where there is no such axis.
    """
    if not -rank <= axis < rank:
        raise RuleError(f"there is no axis {axis} in a tensor of rank {rank}")
    return axis % rank


def axis_letters(number: int, taken: Collection[str] = ()) -> list[str]:
    """That many names beside those taken: the 52 letters, and where a join has more parts, a0, a1, ... after them.

    A rule whose sizes hold a graph's symbols must not name a factor like one of them. Letters first, since a longer
    name that a rule gives a size to becomes a label.
    """
    names = chain(string.ascii_letters, (f"a{i}" for i in count()))
    return list(islice((name for name in names if name not in taken), number))


def symbols_in(sizes: Sequence[Size | None]) -> set[str]:
    """The symbols that these sizes hold; None holds none."""
    return {symbol for size in sizes if size is not None for symbol in size.symbols}


def sized(size: Size) -> str:
    """A result dimension of this size, in a rule. Parentheses keep a bare symbol from naming a factor."""
    return f"[({size})]"


def resized(names: Sequence[str], axis: int, size: Size) -> tuple[str, str]:
    """The two sides of a rule that maps every axis but one, which is whole and gets another size."""
    before, after = names[:axis], names[axis + 1 :]
    return " ".join([*before, f"[{names[axis]}]", *after]), " ".join([*before, sized(size), *after])
