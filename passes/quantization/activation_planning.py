"""Plan the activations that are quantized at every call: operands of products whose weights are all quantized to
integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from treadle.ir.encodings.encoding import Encoding
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.ops.blocks import rounded_for
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.products import MixedProduct
from treadle.ir.types import f32
from treadle.passes.quantization.quantization_plan import ActivationPlan, WeightPlan

Weights = Mapping[str, WeightPlan]
"""The plan of each parameter of a graph."""


@dataclass
class _Product:
    """A product of a function, with the results of all calls of the function.

    weights    the names of the parameters with which x is multiplied, in any call
    encodings  the encodings of x that they require, and the encodings of these parameters
    whys       the reasons why x is not quantized for this product
    """

    node: Node
    weights: dict[str, None] = field(default_factory=dict)
    encodings: dict[Encoding, dict[Encoding, None]] = field(default_factory=dict)
    whys: dict[str, None] = field(default_factory=dict)


def plan_activations(graph: Graph, weights: Weights) -> tuple[ActivationPlan, ...]:
    """Return the plans of all values that a product multiplies with a matrix, function by function.

    A value is quantized for a product if, in every call, the product's matrices are in blocks along the summed axis. It
    is quantized row by row for 8-bit rows, and in groups for other integer blocks (`rounded_for`).
    """
    found: dict[str, dict[int, _Product]] = {}
    for entry in graph.later_entries:
        held = {value: (name,) for name, value in entry.parameters.items() if name in weights}
        _read(graph, entry, held, weights, found)
    made: list[ActivationPlan] = []
    for name, function in graph.functions.items():
        made += _planned(function, found.get(name, {}))
    return tuple(made)


def _read(
    graph: Graph,
    function: Function,
    given: Mapping[Value, tuple[str, ...]],
    weights: Weights,
    found: dict[str, dict[int, _Product]],
) -> None:
    """Record the products of a function, and of the functions that it calls, for one call."""
    held = dict(given)
    for place, node in enumerate(function.nodes):
        callee = graph.callee(node)
        if callee is not None:
            pairs = zip(callee.arguments, node.operands, strict=True)
            _read(graph, callee, {f: held[v] for f, v in pairs if v is not None and v in held}, weights, found)
        elif (isinstance(node.op, Cast) or node.op.decodes) and node.inputs[0] in held:
            held[node.result] = held[node.inputs[0]]
        elif isinstance(node.op, MixedProduct):
            product = found.setdefault(function.name, {}).setdefault(place, _Product(node))
            for position in node.op.multiplies(len(node.operands)):
                matrix = node.operands[position]
                if matrix is None:
                    continue
                names = held.get(matrix, ())
                product.weights |= dict.fromkeys(names)
                plans = [weights[name] for name in names]
                product.whys |= dict.fromkeys(_why_not(product, matrix, position, plans))


def _why_not(product: _Product, matrix: Value, position: int, plans: Sequence[WeightPlan]) -> Iterator[str]:
    """Yield the reasons why a product's operand is not quantized for one of its matrices, given the plans of the
    matrix.
    """
    node = product.node
    x = node.operands[0]
    assert x is not None
    if x.type.dtype is not f32:
        yield f"its elements are {x.type.dtype}, but only f32 is quantized"
    elif x.type.shape[-1].constant is None:
        yield "its rows have no constant length"
    if not plans:
        yield f"{node.op.name} multiplies it with {_made(matrix)}, not with a weight"
    for plan in plans:
        encoding = plan.encoding or plan.type.encoding
        along = encoding is not None and encoding.axis % 2 == _summed(node, position)
        wanted = rounded_for(encoding.along(-1)) if encoding is not None and along else None
        if encoding is None or wanted is None:
            yield f"{node.op.name} multiplies it with {encoding or 'numbers'}, as {plan.name} is stored"
        else:
            product.encodings.setdefault(wanted, {})[encoding.along(-1)] = None
    if len(product.encodings) > 1:
        encodings = " and ".join(str(each) for of in product.encodings.values() for each in of)
        yield f"{node.op.name} multiplies it with {encodings}, which require different roundings"


def _summed(node: Node, position: int) -> int | None:
    """Return the axis of a matrix over which a product sums: the axis with the factors of x's last axis. Return None if
    there is no such axis.
    """
    found = node.op.apply([None if v is None else v.type for v in node.operands])
    x, matrix = found.operands[0], found.operands[position]
    return next((axis for axis, dim in enumerate(matrix or ()) if x and dim == x[-1]), None)


def _made(matrix: Value) -> str:
    return f"the result of {matrix.node.op.name}" if matrix.node is not None else matrix.name


def _planned(function: Function, products: Mapping[int, _Product]) -> Iterator[ActivationPlan]:
    """Yield the plans of a function's values, in the order of their first products."""
    by_value: dict[Value, list[int]] = {}
    for place in sorted(products):
        x = products[place].node.operands[0]
        assert x is not None
        by_value.setdefault(x, []).append(place)
    for x, places in by_value.items():
        rounded: dict[Encoding | None, list[int]] = {}
        for place in places:
            if not products[place].whys:
                (encoding,) = products[place].encodings
                rounded.setdefault(encoding, []).append(place)
        whys = dict.fromkeys(why for p in places for why in products[p].whys)
        for wanted, read in (rounded or {None: places}).items():
            reason = ""
            if wanted is not None:
                readers = dict.fromkeys(products[p].node.op.name for p in read)
                of = dict.fromkeys(str(e) for p in read for e in products[p].encodings[wanted])
                reason = f"{', '.join(readers)} multiplies it with {', '.join(of)}"
            reason = "; ".join(filter(None, [reason, *whys]))
            yield ActivationPlan(function.name, x.name, x.type, wanted, tuple(read), reason)
