"""Candidate sites around weights: products of one value with several weights, and scalings of norms and products.

The search accepts more than the rules: a weight may be transposed first, or have other readers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from treadle.ir.graph import Function, Node, Value
from treadle.ir.ops.arithmetic import Div, Mul
from treadle.ir.ops.normalization import LayerNorm, RMSNorm
from treadle.ir.ops.products import Linear, MatMul
from treadle.ir.ops.shapes import Rearrange

_NORMS_AND_PRODUCTS = (Linear, MatMul, RMSNorm, LayerNorm)


def products_of_one_value(function: Function, finished: Collection[Node]) -> dict[Node, Sequence[Node]]:
    """Return groups of two or more products of one value with weights, by their first product, without products in
    `finished`.
    """
    groups: dict[tuple[Value, str], list[Node]] = {}
    for node in function.nodes:
        if isinstance(node.op, (Linear, MatMul)) and node not in finished:
            x, weight = node.inputs[:2]
            moved = weight.node
            lies = "n k" if isinstance(node.op, Linear) else "k n"
            if moved is not None and isinstance(moved.op, Rearrange):
                weight, lies = moved.inputs[0], "n k" if lies == "k n" else "k n"
            if weight.kind in ("parameter", "constant") and weight.type.rank == 2:
                groups.setdefault((x, lies), []).append(node)
    return {nodes[0]: nodes for nodes in groups.values() if len(nodes) > 1}


def scale_nodes(node: Node) -> Sequence[Node] | None:
    """Return the nodes of y * c, if `node` is the multiplication, y is the result of a norm or a product with a weight,
    and c is one number. Otherwise return None.
    """
    if not isinstance(node.op, (Mul, Div)) or len(node.inputs) != 2:
        return None
    for scaled, number in (node.inputs, node.inputs[::-1]):
        made = scaled.node
        if (
            number.type.rank == 0
            and number.kind != "result"
            and made is not None
            and isinstance(made.op, _NORMS_AND_PRODUCTS)
        ):
            weight = made.inputs[1] if len(made.inputs) > 1 else None
            if weight is not None and (weight.kind in ("parameter", "constant") or _is_moved_weight(weight)):
                return [made]
    return None


def _is_moved_weight(value: Value) -> bool:
    node = value.node
    return node is not None and isinstance(node.op, Rearrange) and node.inputs[0].kind in ("parameter", "constant")
