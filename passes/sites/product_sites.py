"""Candidate sites around products: the activation of a product, and a product that gates another.

The search accepts more than the rules that fuse these sites: it goes through casts and moves, and finds activations in
primitives and gates with products of two values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from treadle.ir.graph import Node, Value
from treadle.ir.op_registry import find_op
from treadle.ir.operation import Op
from treadle.ir.ops.activated_products import ACTIVATIONS
from treadle.ir.ops.arithmetic import Add, Div, Maximum, Minimum, Mul, Pow, Sub
from treadle.ir.ops.elementwise import Cast, Erf, Exp, Neg, Reciprocal
from treadle.ir.ops.parts import Slice
from treadle.ir.ops.products import Linear, MatMul

_SPELLING = (Add, Sub, Mul, Div, Neg, Pow, Erf, Exp, Reciprocal, Maximum, Minimum)
"""Primitives of which activations consist."""
_ACTIVATIONS = tuple(find_op(name) for name in ACTIVATIONS)
_MOST_STEPS = 32


@dataclass
class _Origin:
    """The origin of a value: the products from which it is computed, the nodes in between, and True in `other` if it
    has other inputs.
    """

    products: list[Node] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    other: bool = False

    @property
    def of_one(self) -> Node | None:
        """The product if the value is computed from one product and nothing else, else None."""
        return self.products[0] if len(self.products) == 1 and not self.other else None

    @property
    def cuts(self) -> set[Op]:
        """The slices in between. Equal slices select the same part."""
        return {node.op for node in self.nodes if isinstance(node.op, Slice)}

    def has(self, *ops: type[Op]) -> bool:
        return any(isinstance(node.op, ops) for node in self.nodes)


def epilogue_nodes(node: Node, spelled: Sequence[Node] | None) -> Sequence[Node] | None:
    """Return the nodes of act(x w + bias). `node` is the activation, or in primitives its erf, tanh or sigmoid;
    `spelled` contains the nodes of an activation in primitives. Return None if the node is not such an activation.
    """
    if spelled is None and not isinstance(node.op, _ACTIVATIONS):
        return None
    origin = _origin(node.inputs[0], _SPELLING if spelled is not None else ())
    if origin.of_one is None or origin.has(Slice):
        return None
    return [*origin.nodes, origin.of_one, *(spelled or ())]


def gate_nodes(node: Node) -> Sequence[Node] | None:
    """Return the nodes of act(x g + b) * (x u + c), if `node` is the multiplication, else None. The factors are two
    products, or two parts of one product.
    """
    if not isinstance(node.op, Mul):
        return None
    for gating, gated in (node.inputs, node.inputs[::-1]):
        plain, curved = _origin(gated), _origin(gating, (*_SPELLING, *_ACTIVATIONS))
        if plain.of_one is None or curved.of_one is None:
            continue
        if plain.of_one is curved.of_one and not _are_apart(plain.cuts, curved.cuts):
            continue  # x sigmoid(x), or both factors are from the same value or part
        activated = curved.has(Erf, Exp, *_ACTIVATIONS)
        only_added = not any(isinstance(n.op, _SPELLING) and not isinstance(n.op, Add) for n in curved.nodes)
        if activated or (only_added and plain.of_one.inputs[0] is curved.of_one.inputs[0]):
            return [*curved.nodes, *plain.nodes, *dict.fromkeys((curved.of_one, plain.of_one))]
    return None


def _origin(value: Value, through: tuple[type[Op], ...] = ()) -> _Origin:
    """Return the origin of a value: search up to the products, through moves and sums with a bias, and through all ops
    of `through`.
    """
    origin = _Origin()
    pending, seen = [value], {value}
    while pending:
        node = (value := pending.pop()).node
        if node is None:
            origin.other |= not _is_bias(value)
        elif _is_product(node):
            origin.products.append(node)
        elif len(seen) > _MOST_STEPS or not (node.op.is_view or isinstance(node.op, (Cast, Add, *through))):
            origin.other |= not _is_bias(value)
        else:
            origin.nodes.append(node)
            new = [v for v in node.inputs if v not in seen]
            seen.update(new)
            pending += new
    return origin


def _are_apart(cuts: set[Op], others: set[Op]) -> bool:
    """Return True if two values are different parts of one value."""
    return bool(cuts and others) and cuts.isdisjoint(others)


def _is_product(node: Node) -> bool:
    """Return True for a product with a matrix, which may be computed: a weight that is transposed or dequantized."""
    return isinstance(node.op, Linear) or (isinstance(node.op, MatMul) and node.inputs[1].type.rank == 2)


def _is_bias(value: Value) -> bool:
    return value.literal is not None or value.type.rank <= 1
