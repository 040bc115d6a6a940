"""Axes that ops imply, in graphs whose dimensions have no labels, such as imported ones.

    heads      the heads of attention's queries
    kv_heads   the heads of its keys and values, if they are fewer
    ffn        the hidden axis of a feed-forward network: products with weights make it, elementwise ops map it, and
               products with weights sum over it

Declarations label these axes (`t.split_heads`, `t.mlp`). A label takes precedence over what ops imply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from treadle.ir.analysis.axis_places import Place
from treadle.ir.axes import AxisDim, Role
from treadle.ir.graph import Function, Node, Value
from treadle.ir.sizing.sizes import ONE, Size

HEADS, KV_HEADS, HIDDEN = IMPLIED = ("heads", "kv_heads", "ffn")


def implied_places(function: Function, axis: str) -> Iterator[Place]:
    """Yield places of an axis of this name in a function. Yield nothing for any other name."""
    find = _FINDERS.get(axis)
    return iter(()) if find is None else find(function)


def _heads(function: Function, operand: int) -> Iterator[Place]:
    """Yield the heads of attention's queries (operand 0) or, if there are fewer, of its keys (operand 1)."""
    for node in function.nodes:
        if node.op.pairs is None:
            continue
        queries, keys = node.inputs[:2]
        fewer = keys.type.shape[1] != queries.type.shape[1]
        if operand == 0 or fewer:
            value = node.inputs[operand]
            yield Place(value, 1, ONE, value.type.shape[1])


def _hidden(function: Function) -> Iterator[Place]:
    """Yield the hidden axes of feed-forward networks, at the products that make them."""
    uses = function.uses()
    returned = set(function.results)
    for node in function.nodes:
        if not _has_weight(node):
            continue
        (value,) = node.results
        dim = value.type.rank - 1
        if dim >= 0 and _ends_in_products(value, dim, uses, returned):
            yield Place(value, dim, ONE, value.type.shape[dim])


def _ends_in_products(
    value: Value, dim: int, uses: Mapping[Value, Sequence[tuple[Node, int]]], returned: set[Value]
) -> bool:
    """Return True if every reader of a value maps its last axis elementwise, at least once, together with no values but
    those of other such products, up to products with weights that sum over the axis.

    The axis of a residual stream is mapped together with the embedding.
    """
    size = value.type.shape[dim]
    pending, seen, is_mapped = [value], {value}, False
    while pending:
        x = pending.pop()
        if x in returned or x not in uses:
            return False
        for node, at in uses[x]:
            if _is_mapped(node, size):
                is_mapped = True
                if not all(_is_made(other, size) for other in node.inputs):
                    return False
                if node.result not in seen:
                    seen.add(node.result)
                    pending.append(node.result)
            elif not _sums(node, at):
                return False
    return is_mapped


def _is_mapped(node: Node, size: Size) -> bool:
    """Return True if a node maps its operands elementwise to a result whose last axis has this size."""
    return node.is_elementwise and len(node.results) == 1 and node.result.type.shape[-1:] == (size,)


def _is_made(value: Value, size: Size) -> bool:
    """Return True if a value's last axis is made by products with weights alone, or if the value lacks the axis, or is
    a weight or a constant.
    """
    pending, seen = [value], {value}
    while pending:
        x = pending.pop()
        if x.type.shape[-1:] != (size,) or x.literal is not None or x.weight is not None:
            continue
        if x.node is None or not (_is_mapped(x.node, size) or _has_weight(x.node)):
            return False
        if _is_mapped(x.node, size):
            pending += [v for v in x.node.inputs if v not in seen]
            seen.update(x.node.inputs)
    return True


def _has_weight(node: Node) -> bool:
    """Return True if a node is a product with a weight, which may be moved, such as transposed."""
    if not node.is_contraction:
        return False
    for value in node.inputs:
        while value.node is not None and value.node.op.is_view:
            value = value.node.inputs[0]
        if value.weight is not None:
            return True
    return False


def _sums(node: Node, at: int) -> bool:
    """Return True if a node is a product with a weight that sums over the last axis of its operand at a place."""
    if not _has_weight(node):
        return False
    application = node.op.apply([None if v is None else v.type for v in node.operands])
    last = (application.operands[at] or (AxisDim(),))[-1]
    return bool(last.factors) and all(application.factors[name].role is Role.REDUCED for name in last.factors)


_FINDERS: Mapping[str, Callable[[Function], Iterator[Place]]] = {
    HEADS: partial(_heads, operand=0),
    KV_HEADS: partial(_heads, operand=1),
    HIDDEN: _hidden,
}
