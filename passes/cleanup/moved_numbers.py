"""Constants that move through ops: equations for whole classes of ops, which patterns cannot state.

    c + x                       -->   x + c                       for each commutative op
    x + [[c]]                   -->   x + c                       for each elementwise op, and a constant of one element
    f(expand(n))                -->   expand(f(n))                for each elementwise op or move f
    f(where(c, n, m))           -->   where(c, f(n), f(m))        for each elementwise op f

Masks of exporters arrive in these forms: a condition as a number, from which other numbers are computed. Numbers are
computed by the references of ops, so a kernel may have rounded them differently.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from treadle.ir.errors import TreadleError
from treadle.ir.graph import Function, Node, Value
from treadle.ir.literals import Literal
from treadle.ir.operation import Op
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.logic import Comparison, Where
from treadle.ir.ops.shapes import Expand, Rearrange, Reshape
from treadle.ir.types import boolean
from treadle.passes.framework.pass_log import PassRecord


def move_numbers(function: Function, log: PassRecord) -> int:
    """Apply the equations of this module to the nodes of a function, in place. Return the number of changes."""
    return (
        _constants_to_scalars(function, log) + _constants_to_the_right(function, log) + _numbers_through(function, log)
    )


def _constants_to_scalars(function: Function, log: PassRecord) -> int:
    """x + [[c]]   -->   x + c        for a constant of one element and an operand of the same or higher rank

    x + expand(c)   -->   x + c        for an operand that has the result's shape

    The rules apply to all elementwise ops, since their operands broadcast.
    """
    changed = 0
    for node in function.nodes:
        if len(node.operands) < 2 or node.op.callee is not None:  # a call has many operands, and is not elementwise
            continue
        numbers = {i: literal for i, v in enumerate(node.inputs) if v.type.rank and (literal := _repeated_number(v))}
        if not numbers or not node.is_elementwise:
            continue
        for position, literal in numbers.items():
            value = node.inputs[position]
            others = [v for v in node.inputs if v is not value and v.literal is None]
            whole = node.results[0].type.dims
            if any(v.type.rank >= value.type.rank if value.node is None else v.type.dims == whole for v in others):
                operands = list(node.operands)
                operands[position] = Value.constant(Literal(literal.dtype, (), literal.data))
                node.operands = tuple(operands)
                log.match("constants-to-scalars", function, node)
                changed += 1
    return changed


def _numbers_through(function: Function, log: PassRecord) -> int:
    """f(expand(n))        -->   expand(f(n))              for an elementwise f, or a move, and numbers n, m

    f(where(c, n, m))      -->   where(c, f(n), f(m))      for an elementwise f, also of a moved where(c, n, m)
    f(cast(c))             -->   where(c, f(1), f(0))      for a comparison f

    Further operands of f may be numbers, too.
    """
    made: list[Node] = []
    conditions: dict[tuple[Op, Value], Value] = {}
    changed = 0
    for node in function.nodes:
        replaced = _through(node, conditions)
        if replaced is not None:
            *before, (node.op, node.operands) = replaced
            made += before
            log.match("numbers-through", function, node)
            changed += 1
        made.append(node)
    function.nodes = made
    return changed


def _through(node: Node, conditions: dict[tuple[Op, Value], Value]) -> list[Any] | None:
    """Return the op and the operands that replace a node's, by the equations of `_numbers_through`, after the nodes
    that must come before it. Return None if no equation applies.

    conditions  conditions that were moved for earlier nodes, by move and condition; new ones are added
    """
    values = {v for v in node.inputs if v.literal is None or v.literal.shape}
    if len(values) != 1 or len(node.results) != 1 or node.op.callee is not None:
        return None
    (value,), result = values, node.results[0].type
    above, moves = value.node, list[Node]()
    if above is not None and isinstance(above.op, Expand) and _is_number(above.inputs[0]):
        number: Value | None = above.inputs[0]
        if node.is_elementwise and value.type.dims == result.dims and not isinstance(node.op, Where):
            number = _applied(node, value, above.inputs[0])
        elif isinstance(node.op, Expand) or not (node.op.only_moves and len(node.operands) == 1):
            return None
        expand = Expand(shape=result.shape)
        same = number is not None and expand.infer_for([number]) == (result,)
        return [(expand, (number,))] if same else None
    if not node.is_elementwise or isinstance(node.op, Where) or value.type.dims != result.dims:
        return None
    while above is not None and isinstance(above.op, Rearrange | Expand):
        moves.append(above)
        above = above.inputs[0].node
    if above is None:
        return None
    if isinstance(above.op, Where) and all(map(_is_number, above.inputs[1:])):
        condition, *numbers = above.inputs
    elif isinstance(above.op, Cast) and isinstance(node.op, Comparison) and above.inputs[0].type.dtype is boolean:
        condition, dtype = above.inputs[0], above.results[0].type.dtype
        numbers = [Value.constant(Literal.of(n, dtype)) for n in (1, 0)]
    else:
        return None
    if condition.type.dims != above.results[0].type.dims:
        return None
    applied = [x for x in (_applied(node, value, number) for number in numbers) if x is not None]
    if len(applied) < len(numbers):
        return None
    if applied[0].literal == applied[1].literal:
        return [(Expand(shape=result.shape), (applied[0],))]
    made: list[Any] = []
    for move in reversed(moves):
        key = move.op, condition
        if key not in conditions:
            types = move.op.infer_for([condition])
            made.append(Node(move.op, [condition], types, scope=move.scope, source=move.source))
            conditions[key] = made[-1].result
        condition = conditions[key]
    return [*made, (Where(), (condition, *applied))]


def _is_number(value: Value) -> bool:
    return value.literal is not None and value.literal.shape == ()


def _applied(node: Node, value: Value, number: Value) -> Value | None:
    """Return an elementwise op's result if a value is a number, as its other operands are; None if there is none."""
    dtype = node.results[0].type.dtype
    operands = [number if v is value else v for v in node.inputs]
    if dtype.numpy is None or any(v.type.dtype.numpy is None for v in operands):
        return None
    try:
        with np.errstate(all="ignore"):
            made = node.op.reference(*[v.literal.array for v in operands if v.literal is not None])
        return Value.constant(Literal.of(np.asarray(made), dtype))
    except (TreadleError, ArithmeticError, TypeError, ValueError):
        return None


def _repeated_number(value: Value) -> Literal | None:
    """Return the constant of one element whose number a value repeats or reshapes, or which the value is. Return None
    for any other value.
    """
    while value.node is not None and isinstance(value.node.op, (Expand, Rearrange, Reshape)):
        value = value.node.inputs[0]
    literal = value.literal
    return literal if literal is not None and math.prod(literal.shape) == 1 else None


def _constants_to_the_right(function: Function, log: PassRecord) -> int:
    """c + x   -->   x + c        for each commutative op; not a pattern, since patterns match in both orders"""
    swapped = 0
    for node in function.nodes:
        if node.op.commutes:
            left, right = node.inputs
            if left.literal is not None and right.literal is None:
                node.operands = (right, left)
                log.match("constants-to-the-right", function, node)
                swapped += 1
    return swapped
