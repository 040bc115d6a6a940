"""Names and sizes of axes that an op refers to by position, for axis rules and patterns."""

from __future__ import annotations

import string
from collections.abc import Collection, Sequence
from itertools import chain, count, islice

from treadle.ir.errors import RuleError
from treadle.ir.sizing.sizes import Size


def place(axis: int, rank: int) -> int:
    """Return the position of `axis` in a tensor of this rank; a negative axis counts from the end.

    Raises RuleError if there is no such axis.
    """
    if not -rank <= axis < rank:
        raise RuleError(f"there is no axis {axis} in a tensor of rank {rank}")
    return axis % rank


def axis_letters(number: int, taken: Collection[str] = ()) -> list[str]:
    """Return `number` unused names: the 52 letters, and for concatenations of more parts, a0, a1, ... after them.

    A rule whose sizes contain a graph's symbols must not use a symbol's name for a factor. Letters come first, since a
    longer name with a size in a rule becomes a label.
    """
    names = chain(string.ascii_letters, (f"a{i}" for i in count()))
    return list(islice((name for name in names if name not in taken), number))


def symbols_in(sizes: Sequence[Size | None]) -> set[str]:
    """Return the symbols in these sizes. None stands for a size without symbols."""
    return {symbol for size in sizes if size is not None for symbol in size.symbols}


def sized(size: Size) -> str:
    """Return a result dimension of this size, as text for a rule. Parentheses prevent that a single symbol is read as a
    factor's name.
    """
    return f"[({size})]"


def resized(names: Sequence[str], axis: int, size: Size) -> tuple[str, str]:
    """Return the operand's and the result's side of a rule that maps every axis but one. That axis is whole and gets
    another size.
    """
    before, after = names[:axis], names[axis + 1 :]
    return " ".join([*before, f"[{names[axis]}]", *after]), " ".join([*before, sized(size), *after])
