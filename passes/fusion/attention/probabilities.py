"""Softmaxes, and the path from a softmax down to the product of the probabilities with the values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from treadle.ir.graph import Node, Value
from treadle.ir.ops.arithmetic import Add, Div, Mul, Sub
from treadle.ir.ops.elementwise import Cast, Exp
from treadle.ir.ops.logic import NotEqual, Where
from treadle.ir.ops.normalization import MaskedSoftmax, Softmax
from treadle.ir.ops.parts import Slice
from treadle.ir.ops.shapes import Rearrange, Reshape
from treadle.passes.cleanup.round_trips import round_trip_from
from treadle.passes.framework.pattern import Pattern, Vocabulary
from treadle.passes.framework.pattern_search import Search
from treadle.passes.fusion.attention.core import (
    MOST_STEPS,
    Mismatch,
    Placed,
    Values,
    Weighting,
    number_of,
    quantized,
)
from treadle.passes.fusion.axis_tracking import Axes, Layout


@cache
def _guarded_softmax() -> Pattern:
    def pattern(p: Vocabulary, x: Any, over_max: Any, over_sum: Any, ties: Any) -> Any:
        peak = p.reduce_max(x, axes=over_max, keep=True, ties=ties)
        weights = p.exp(x - p.where(peak > -math.inf, peak, 0))
        total = p.reduce_sum(weights, axes=over_sum, keep=True)
        return weights / p.where(total > 0, total, 1)

    return Pattern.trace(pattern)


def softmax_at(node: Node) -> Weighting | None:
    """Return the softmax whose probabilities this node computes: the op, or its equivalent that returns zeros if every
    score is -inf. Return None for any other node.
    """
    if isinstance(node.op, Softmax):
        value = node.inputs[0]
        return Weighting(node, value, node.op.axis % value.type.rank, False, (node,))
    if isinstance(node.op, MaskedSoftmax):
        value = node.inputs[0]
        return Weighting(node, value, value.type.rank - 1, True, (node,))
    if not isinstance(node.op, Div) or node.inputs[0].node is None or not isinstance(node.inputs[0].node.op, Exp):
        return None
    for found in Search(_guarded_softmax()).run(node):
        x: Value = found.captures["x"]
        axes = {tuple(a % x.type.rank for a in found.captures[name]) for name in ("over_max", "over_sum")}
        if len(axes) == 1 and len(axis := axes.pop()) == 1:
            return Weighting(node, x, axis[0], True, found.nodes)
    return None


def follow_probabilities(
    axes: Axes,
    weighting: Weighting,
    layout: Layout,
    readers: Callable[[Value], Sequence[Node | None]],
    goes_out: Callable[[Node | None, Value], bool],
    *,
    rounded: bool = False,
) -> Values:
    """Return the product of the probabilities with the values.

    readers    returns the readers of a value, with None for an output
    goes_out   returns True if a reader only passes the value on to outputs of the model
    rounded    True to continue below probabilities that a quantizer rounds

    Raises Mismatch if there is no such product, or if the probabilities are used elsewhere as well.
    """
    value, node, passed = weighting.anchor.results[0], weighting.anchor, list(weighting.nodes)
    guarded = weighting.guarded
    returned: list[Placed] = []
    for _ in range(MOST_STEPS):
        users = list(dict.fromkeys(readers(value)))
        guard = _zeros_for_nan(value, users)
        if guard is not None:
            passed += [n for n in users if n is not None]
            node, value, guarded = guard, guard.results[0], True
            continue
        used = [user for user in users if not goes_out(user, value)]
        if users and not used:
            raise Mismatch("the probabilities are an output, and are not multiplied with values", node, passed)
        if len(used) < len(users):
            returned.append(Placed(value, layout))
            users = used
        if len(users) != 1 or (user := users[0]) is None:
            raise Mismatch(_elsewhere(users), node, passed, "do not read the probabilities outside that product")
        passed.append(user)
        if user.is_contraction:
            found = _value_product(axes, user, value, layout, passed, guarded)
            return dataclasses.replace(found, returned=tuple(returned))
        if isinstance(user.op, Rearrange):
            below = axes.below(user, layout)
            if below is None:
                raise Mismatch("the probabilities are regrouped across their axes", user, passed[:-1])
            layout = below
        elif isinstance(user.op, Cast):
            to = user.results[0].type.dtype
            if not to.is_float:
                raise Mismatch(f"the probabilities are cast to {to}", user, passed[:-1])
        else:
            trip = round_trip_from(value, readers)
            if trip is not None and rounded:
                passed += trip.nodes[:-1][::-1]
                user = trip.nodes[0]
            elif trip is not None:
                raise quantized("the probabilities", trip, user, passed[:-1])
            else:
                hint = "export the model for inference, without dropout" if isinstance(user.op, Mul) else ""
                raise Mismatch(_changed(user, value), user, passed[:-1], hint)
        node, value = user, user.results[0]
    raise Mismatch("the chain after the softmax is too long", node, passed)


def _zeros_for_nan(value: Value, users: Sequence[Node | None]) -> Node | None:
    """Return the op that replaces a row without keys by zeros: where(p != p, 0, p). Return None if there is no such
    op.
    """
    if len(users) != 2 or None in users:
        return None
    test = next((n for n in users if n is not None and isinstance(n.op, NotEqual)), None)
    choice = next((n for n in users if n is not None and isinstance(n.op, Where)), None)
    if test is None or choice is None or test.inputs != (value, value):
        return None
    condition, zero, kept = choice.inputs
    fits = condition is test.results[0] and kept is value and number_of(zero) == 0
    return choice if fits and choice.results[0].type.shape == value.type.shape else None


def _elsewhere(users: Sequence[Node | None]) -> str:
    if not users:
        return "the probabilities are unused"
    if None in users:
        return "the probabilities are an output of a block that is used where it is called"
    others = [n for n in users if n is not None and not n.is_contraction] or [n for n in users if n is not None]
    line = f" ({others[0].source})" if others[0].source else ""
    return f"the probabilities are used elsewhere, by {others[0].op.name}{line}"


def _changed(user: Node, value: Value) -> str:
    other = next((v for v in user.inputs if v is not value), None)
    match user.op:
        case Mul() | Div() if other is not None:
            by = "a constant" if number_of(other) is not None else "a tensor"
            return f"the probabilities are multiplied by {by} before the product with the values"
        case Add() | Sub() | Where():
            return f"the probabilities are masked or shifted after the softmax, by {user.op.name}"
        case Softmax():
            return "a second softmax follows the first"
        case Slice():
            return "a part of the probabilities is dropped before the product, such as that of an attention sink"
        case Reshape():
            return "the probabilities are reshaped across their axes"
    return f"the probabilities go through {user.op.name} before the product with the values"


def _value_product(axes: Axes, user: Node, value: Value, layout: Layout, passed: list[Node], guarded: bool) -> Values:
    """Return the product of the probabilities and the values. Raises Mismatch if the op is another one."""
    if user.operands.count(value) != 1 or len(user.inputs) != 2:
        what = "with themselves" if user.operands.count(value) != 1 else "with values and further operands in one op"
        raise Mismatch(f"the probabilities are multiplied {what}", user, passed[:-1])
    place = user.operands.index(value)
    other = user.inputs[1 - place]
    application = user.op.apply([None if v is None else v.type for v in user.operands])
    known: dict[str, tuple[int, ...]] = {}
    for dim, atoms in zip(application.operands[place] or (), layout, strict=True):
        known |= dict.fromkeys(dim.factors, atoms)
    for name, factor in application.dims.items():
        if name not in known:
            known[name] = axes.new(factor.size)

    def layout_of(dims: Any) -> Layout:
        return tuple(known[d.factors[0]] if d.factors else () for d in dims)

    placed = Placed(other, layout_of(application.operands[1 - place]))
    return Values(user, placed, layout_of(application.results[0]), guarded, tuple(passed))
