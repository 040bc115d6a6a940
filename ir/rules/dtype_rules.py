"""Dtype rules: one line next to an op's axis rule that declares the dtypes of its operands and results.

    "f, i -> f"      operands: a float and an integer; result: the float's dtype
    "t, t -> bool"   operands: two of the same dtype; result: bool

There is one entry per operand, in order. `t` is any dtype, `n` any number, `f` any float, `i` any integer. The same
letter is the same dtype everywhere in a rule, and a digit makes another variable of the same class (`f1`). Any other
entry is the name of a dtype. `t*` stands for a variadic operand. There is no promotion: a cast is an op.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from treadle.ir.errors import RuleError
from treadle.ir.types import DTYPES, DType, boolean, f32, i64

_CLASSES: dict[str, tuple[str, Callable[[DType], bool]]] = {
    "t": ("any dtype", lambda d: True),
    "n": ("a number", lambda d: d.kind != "bool"),
    "f": ("a float", lambda d: d.kind == "float"),
    "i": ("an integer", lambda d: d.kind == "int"),
}


_KINDS = ("bool", "int", "float")


@lru_cache(maxsize=512)
def _parse(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    left, arrow, right = text.partition("->")
    if not arrow:
        raise RuleError(f"a dtype rule needs '->': {text!r}")
    sides = tuple(tuple(p.strip() for p in side.split(",") if p.strip()) for side in (left, right))
    for entry in (*sides[0], *sides[1]):
        if not (re.fullmatch(r"[tnfi]\d?\*?", entry) or entry in DTYPES):
            raise RuleError(f"malformed dtype rule: {entry!r}", received=text)
    taken = {entry.removesuffix("*") for entry in sides[0]} | DTYPES.keys()
    if any("*" in entry for entry in (*sides[0][:-1], *sides[1])) or not taken.issuperset(sides[1]):
        raise RuleError(
            "malformed dtype rule: a result's dtype is in no operand, or '*' is not in the last operand", received=text
        )
    return sides[0], sides[1]


def operand_entries(text: str, count: int) -> tuple[str, ...]:
    """Return the rule's entry for each of `count` operands; a variadic operand's entry is repeated."""
    wanted, _ = _parse(text)
    if wanted and wanted[-1].endswith("*"):
        return (*wanted[:-1], *[wanted[-1][:-1]] * (count - len(wanted) + 1))
    return wanted


def count_results(text: str) -> int:
    """Return the number of results of an op with this rule."""
    return len(_parse(text)[1])


def infer_dtypes(text: str, dtypes: Sequence[DType | None], names: Sequence[str]) -> tuple[DType, ...]:
    """Return the results' dtypes. None stands for the dtype of an absent operand. Raises RuleError if an operand does
    not match.
    """
    wanted, results = operand_entries(text, len(dtypes)), _parse(text)[1]
    bound: dict[str, tuple[DType, str]] = {}
    for entry, dtype, name in zip(wanted, dtypes, names, strict=True):
        if dtype is None:
            continue
        if entry in DTYPES:
            if dtype is not DTYPES[entry]:
                raise RuleError(f"{name} must be {entry}, is {dtype}", hint=_cast(name, DTYPES[entry]))
            continue
        words, fits = _CLASSES[entry[0]]
        if not fits(dtype):
            raise RuleError(f"{name} must be {words}, is {dtype}", hint=_cast(name, i64 if entry[0] == "i" else f32))
        known, first = bound.setdefault(entry, (dtype, name))
        if known is not dtype:
            widens = _KINDS.index(dtype.kind) > _KINDS.index(known.kind)  # for example a number in place of a boolean
            raise RuleError(
                f"dtypes disagree: {first} is {known}, {name} is {dtype}",
                hint=_cast(first, dtype) if widens else _cast(name, known),
            )
    unknown = [r for r in results if r not in DTYPES and r not in bound]
    if unknown:
        raise RuleError(f"cannot infer the result's dtype: every operand that could determine {unknown[0]} is absent")
    return tuple(DTYPES[r] if r in DTYPES else bound[r][0] for r in results)


def _cast(name: str, dtype: DType) -> str:
    return f"t.cast({name}, to=t.{'boolean' if dtype is boolean else dtype})"


def number_dtype(entries: Sequence[str], position: int, dtypes: Sequence[DType | None]) -> DType | None:
    """Return the dtype for a Python number at a position, among operands of these dtypes (None: not known yet).

    If the position's entry names a dtype, or shares a variable with another operand, the number gets that dtype.
    Otherwise it gets the dtype of the first operand with a variable entry whose dtype is allowed at the position.
    Returns None if there is no such operand.
    """
    entry = entries[position]
    if entry in DTYPES:
        return DTYPES[entry]
    _, fits = _CLASSES[entry[0]]
    others = [(e, d) for e, d in zip(entries, dtypes, strict=True) if d is not None and e not in DTYPES]
    tied = [d for e, d in others if e == entry]
    loose = [d for _, d in others if fits(d)]
    return next(iter(tied or loose), None)
