"""Truth values, as conditions or as numbers 0 and 1: a value is true under a conjunction of conditions on other values.

x and y, x * y, where(x, y, 0)                          true if x is true and y is true
x or y, where(x, 1, y)                                  false if x is false and y is false
not x, 1 - x, x == 0, x < 0.5, where(x, 0, 1)           true if x is false
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treadle.ir.graph import Node, Value
from treadle.ir.ops.arithmetic import Mul, Sub
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.logic import Comparison, LogicalAnd, LogicalNot, LogicalOr, Where
from treadle.ir.ops.parts import Slice
from treadle.ir.ops.shapes import Expand, Rearrange
from treadle.passes.fusion.attention.core import number_of

Wanted = tuple[Value, bool]
"""A value, and the truth value that it should have."""

_MOST_LEVELS = 8
"""The greatest number of levels of ops: numbers that are computed by more levels are not analyzed."""
_LARGEST_TABLE = 1 << 24


def conjuncts_of(node: Node, wanted: bool) -> Sequence[Wanted] | None:
    """Return the conditions that must all hold for a result to have a truth value. Return None if the op implies no
    such conditions.

    Operands broadcast to the result. A number counts as true if it is not 0.
    """
    operands = node.inputs
    match node.op:
        case LogicalNot():
            return [(operands[0], not wanted)]
        case LogicalAnd() if wanted:
            return [(x, True) for x in operands]
        case LogicalOr() if not wanted:
            return [(x, False) for x in operands]
        case Cast() if is_of_truth(operands[0]):
            return [(operands[0], wanted)]
        case Mul() if wanted and all(map(is_of_truth, operands)):
            return [(x, True) for x in operands]
        case Sub() if number_of(operands[0]) == 1 and is_of_truth(operands[1]):
            return [(operands[1], not wanted)]
        case Where():
            return _choice(operands[0], operands[1], operands[2], wanted)
        case Comparison():
            return _comparison(node.op, operands[0], operands[1], wanted)
    return None


def is_of_truth(value: Value, level: int = 0) -> bool:
    """Return True if a value is 0 or 1 by construction: a condition, or a constant of zeros and ones; possibly cast,
    moved, sliced, multiplied, selected, or subtracted from 1.
    """
    node, literal = value.node, value.literal
    if value.type.dtype.kind == "bool":
        return True
    if literal is not None:
        return literal.array.size <= _LARGEST_TABLE and bool(np.isin(literal.array, (0, 1)).all())
    if node is None or level >= _MOST_LEVELS:
        return False
    match node.op:
        case Cast() | Rearrange() | Expand() | Slice() | Mul():
            return all(is_of_truth(x, level + 1) for x in node.inputs)
        case Where():
            return all(is_of_truth(x, level + 1) for x in node.inputs[1:])
        case Sub():
            return number_of(node.inputs[0]) == 1 and is_of_truth(node.inputs[1], level + 1)
    return False


def _choice(condition: Value, x: Value, y: Value, wanted: bool) -> Sequence[Wanted] | None:
    """Return the conjuncts of where(condition, x, y), if one side is a number."""
    for known, other, truth in ((x, y, True), (y, x, False)):
        number = number_of(known)
        if number is None or not is_of_truth(other):
            continue
        if bool(number) != wanted:
            return [(condition, not truth), (other, wanted)]
        if (opposite := number_of(other)) is not None and bool(opposite) != wanted:
            return [(condition, truth)]
    return None


def _comparison(compare: Comparison, x: Value, y: Value, wanted: bool) -> Sequence[Wanted] | None:
    """Return the conjuncts of the comparison of a truth value, 0 or 1, with a number, if only one of 0 and 1 satisfies
    it.
    """
    for value, number, turned in ((x, number_of(y), False), (y, number_of(x), True)):
        if number is None or not is_of_truth(value):
            continue
        fits = [bool(compare.reference(*((number, n) if turned else (n, number)))) for n in (0, 1)]
        if fits[0] != fits[1]:
            return [(value, fits[1] == wanted)]
    return None
