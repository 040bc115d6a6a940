"""Round trips of values to an integer dtype and back, as quantizers leave them in a model: DequantizeLinear of
QuantizeLinear.

    (clip(round(x / scale) + zero) - zero) scale

The round trip is one op, `fake_quantize`, or consists of arithmetic and casts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from treadle.ir.graph import Node, Value
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.rounding import FakeQuantize, Round
from treadle.ir.types import DType, i8, i16, i32, u8

_MOST_STEPS = 16


@dataclass(frozen=True)
class RoundTrip:
    """A round trip: the rounded value, the dtype to which it is rounded, and the nodes of the round trip, the last one
    first.
    """

    value: Value
    dtype: DType
    nodes: tuple[Node, ...]


def round_trip_at(node: Node) -> RoundTrip | None:
    """Return the round trip whose last node this is, or None if it is not the last node of one."""
    if isinstance(node.op, FakeQuantize):
        signed, count = node.op.least < 0, node.op.greatest - node.op.least
        return RoundTrip(node.inputs[0], (i8 if signed else u8) if count < 256 else i16 if signed else i32, (node,))
    if not node.results[0].type.dtype.is_float or not (isinstance(node.op, Cast) or _is_scaling(node)):
        return None
    passed, least = [node], None
    if not isinstance(node.op, Cast):
        made = node.inputs[_along(node)].node
        if made is None or not isinstance(made.op, Cast):
            return None
        passed.append(made)
    value = passed[-1].inputs[0]
    for _ in range(_MOST_STEPS):
        if value.type.dtype.is_int and (least is None or value.type.dtype.bytes < least.bytes):
            least = value.type.dtype
        made = value.node
        if least is None or made is None or not made.is_elementwise or (along := _along(made)) < 0:
            return None
        passed.append(made)
        value = made.inputs[along]
        if isinstance(made.op, Round):
            made = value.node
            if made is not None and _is_scaling(made):
                passed.append(made)
                value = made.inputs[_along(made)]
            return RoundTrip(value, least, tuple(passed))
    return None


def round_trip_from(value: Value, readers: Callable[[Value], Sequence[Node | None]]) -> RoundTrip | None:
    """Return the round trip that a value goes through. The value, and each value within the round trip, must have one
    reader. Return None otherwise.
    """
    at = value
    for _ in range(_MOST_STEPS):
        users = readers(at)
        if len(users) != 1 or (user := users[0]) is None or not user.is_elementwise:
            return None
        trip = round_trip_at(user)
        if trip is not None and trip.value is value:
            return trip
        at = user.results[0]
    return None


def counts_steps(node: Node, readers: Sequence[Node]) -> bool:
    """Return True if a division or a multiplication scales numbers to a quantizer's steps, which is so if all its
    readers round.
    """
    return _is_scaling(node) and bool(readers) and all(isinstance(user.op, Round) for user in readers)


def _along(node: Node) -> int:
    """Return the index of the only operand that has the result's shape and is not a constant; -1 if there are several
    or none.
    """
    found = [i for i, v in enumerate(node.inputs) if v.type.shape == node.results[0].type.shape and v.literal is None]
    return found[0] if len(found) == 1 else -1


def _is_scaling(node: Node) -> bool:
    """Return True if an op is linear in its one operand of the result's size, which it multiplies by the other
    operand.
    """
    along = _along(node)
    if along < 0 or len(node.inputs) != 2:
        return False
    return frozenset((node.op.operand_names(2)[along],)) in node.op.linear
