"""Plans which values that weights multiply are rounded at every call: those whose weights are all in 8-bit rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from treadle.ir.encodings.encoding import Encoding
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.ops.blocks import ROWS
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.products import MixedProduct
from treadle.ir.types import f32
from treadle.passes.quantization.quantization_plan import ActivationPlan, WeightPlan

Weights = Mapping[str, WeightPlan]
"""What is planned for each parameter of a graph."""


@dataclass
class _Product:
    """A product of a function, as all calls of it have it.

    weights  the names of the parameters that it multiplies x with, in any call
    whys     what stands against rounding x for it
    """

    node: Node
    weights: dict[str, None] = field(default_factory=dict)
    whys: dict[str, None] = field(default_factory=dict)


def plan_activations(graph: Graph, weights: Weights) -> tuple[ActivationPlan, ...]:
    """What becomes of each value that a product multiplies with a matrix, function by function.

    It is rounded, row by row, for the products all of whose matrices are rounded to 8-bit rows along the axis that the
    product sums over, in every call.
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
    """Note the products of a function, and of those that it calls, in one call of it."""
    held = dict(given)
    for place, node in enumerate(function.nodes):
        callee = graph.callee(node)
        if callee is not None:
            pairs = zip(callee.arguments, node.operands, strict=True)
            _read(graph, callee, {f: held[v] for f, v in pairs if v is not None and v in held}, weights, found)
        elif isinstance(node.op, Cast) and node.inputs[0] in held:
            held[node.result] = held[node.inputs[0]]
        elif isinstance(node.op, MixedProduct):
            product = found.setdefault(function.name, {}).setdefault(place, _Product(node))
            for position in node.op.multiplies(len(node.operands)):
                matrix = node.operands[position]
                if matrix is None:
                    continue
                names = held.get(matrix, ())
                product.weights |= dict.fromkeys(names)
                product.whys |= dict.fromkeys(_why_not(node, matrix, [weights[name] for name in names]))


def _why_not(node: Node, matrix: Value, plans: Sequence[WeightPlan]) -> Iterator[str]:
    """What stands against rounding what a product multiplies with a matrix, by the plans of those that it may be."""
    x = node.operands[0]
    assert x is not None
    if x.type.dtype is not f32:
        yield f"its numbers are {x.type.dtype}, and what is rounded is f32"
    elif x.type.shape[-1].constant is None:
        yield "its rows have no constant length"
    if not plans:
        yield f"{node.op.name} multiplies it with {_made(matrix)}, which is no weight"
    for plan in plans:
        encoding = plan.encoding
        if encoding is None or encoding.along(-1) != ROWS:
            told = plan.type.encoding or encoding or "numbers"
            yield f"{node.op.name} multiplies it with {told}, as {plan.name} is held"


def _made(matrix: Value) -> str:
    return f"what {matrix.node.op.name} gives" if matrix.node is not None else matrix.name


def _planned(function: Function, products: Mapping[int, _Product]) -> Iterator[ActivationPlan]:
    """The plans of a function's values, in the order of their first products."""
    by_value: dict[Value, list[int]] = {}
    for place in sorted(products):
        x = products[place].node.operands[0]
        assert x is not None
        by_value.setdefault(x, []).append(place)
    for x, places in by_value.items():
        rounded = tuple([p for p in places if not products[p].whys])
        told = dict.fromkeys(products[p].node.op.name for p in rounded)
        reason = f"{', '.join(told)} multiplies it with {ROWS}" if rounded else ""
        whys = dict.fromkeys(why for p in places for why in products[p].whys)
        reason = "; ".join(filter(None, [reason, *whys]))
        encoding: Encoding | None = ROWS if rounded else None
        yield ActivationPlan(function.name, x.name, x.type, encoding, rounded or tuple(places), reason)
