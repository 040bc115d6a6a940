"""Integer division with NumPy's semantics: it rounds down, and nothing traps. Other arithmetic wraps around.

Lane functions compute integers, since TVM declares to LLVM that signed additions never overflow.
"""

from __future__ import annotations

from treadle.backends.tvm.kernels.arithmetic.lane_function import LaneValue, where


def floor_divide(x: LaneValue, y: LaneValue) -> LaneValue:
    """Return x / y, rounded down; 0 if y is 0."""
    zero = y == 0
    if x.type[0] == "u":
        return where(zero, 0, x / where(zero, 1, y))
    trap, divisor = _trap(zero, y)
    quotient = x / divisor
    floor = quotient - _is_above(x - quotient * divisor, divisor).to(x.type)
    return where(trap, where(zero, 0, 0 - x), floor)


def mod(x: LaneValue, y: LaneValue) -> LaneValue:
    """Return the remainder of `floor_divide`, with the sign of y; 0 if y is 0."""
    zero = y == 0
    if x.type[0] == "u":
        return x % where(zero, 1, y)
    _, divisor = _trap(zero, y)
    rest = x - x / divisor * divisor
    return rest + where(_is_above(rest, divisor), divisor, 0)


def _trap(zero: LaneValue, y: LaneValue) -> tuple[LaneValue, LaneValue]:
    """Return a condition under which a division traps, and a divisor that is then 1: y is 0, or y is -1 and x may be
    the lowest integer.
    """
    trap = zero | (y == -1)
    return trap, where(trap, 1, y)


def _is_above(rest: LaneValue, y: LaneValue) -> LaneValue:
    """Return true if a quotient that was rounded towards zero is above the exact one."""
    return (rest != 0) & ((rest ^ y) < 0)
