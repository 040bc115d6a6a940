"""The cost of a graph: floating-point operations and bytes, derived from axis rules and bodies.

The operations of a primitive are its points (the product of its rule's factors) times its `flops` per point. The
operations of a composite are counted in its body. Attention counts only the pairs of a query and a key that it may see.
Bytes count each element that an op reads or writes once, as if no cache existed. From an operand that is indexed, an op
reads only as many bytes as it writes to the result, and an op that updates a state writes only the update. Computations
on weights alone run once, when weights are bound, and are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from treadle.ir.analysis.weight_only import weight_only_nodes
from treadle.ir.axes import Role
from treadle.ir.composites import body_of
from treadle.ir.errors import SizeError
from treadle.ir.graph import Function, Graph, Node
from treadle.ir.operation import Composite, Op
from treadle.ir.types import Type


@dataclass(frozen=True, slots=True)
class Cost:
    """Floating-point operations, and bytes read and written."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes if self.bytes else 0.0


Sizes = Mapping[str, int]


def graph_cost(graph: Graph, sizes: Sizes, entry: str | None = None) -> Cost:
    """Return the cost of one run of an entry, by default the last entry. `sizes` maps each symbol to its size.

    Raises SizeError for a symbol without a size.
    """
    missing = sorted(set(graph.symbols) - set(sizes))
    if missing:
        raise SizeError(f"a cost needs a size for {', '.join(missing)}", hint=f"{missing[0]}=128")
    known: dict[str, Cost] = {}
    for function in graph.functions.values():
        known[function.name] = _function_cost(function, sizes, known)
    return known[entry or graph.main.name]


def node_cost(node: Node, sizes: Sizes, functions: Mapping[str, Cost] | None = None) -> Cost:
    """Return the cost of one node. `functions` holds the costs of the functions that it may call."""
    if node.op.callee is not None:
        return (functions or {}).get(node.op.callee, Cost())
    operands = [None if v is None else v.type for v in node.operands]
    values = tuple(sorted(sizes.items()))
    flops = _flops(node.op, _key(operands), values)
    if any(v.state is not None for v in node.results):
        updated = node.op.updates.values()
        given = sum(t.bytes_at(sizes) for i, t in enumerate(operands) if t is not None and i not in updated)
        return Cost(flops, 2 * given)
    return Cost(flops, _bytes(node.op, operands, [v.type for v in node.results], sizes))


def parameter_count(graph: Graph) -> int:
    """Return the number of elements of all weights, each counted once."""
    return sum(v.type.elements.evaluate({}) for v in graph.parameters.values())


def parameter_bytes(graph: Graph) -> int:
    """Return the bytes of all weights in their declared dtypes."""
    return sum(v.type.bytes_at({}) for v in graph.parameters.values())


def state_bytes(graph: Graph, sizes: Sizes) -> int:
    """Return the bytes of all states. `sizes` maps each symbol to its size."""
    return sum(v.type.bytes_at(sizes) for v in graph.states.values())


def _function_cost(function: Function, sizes: Sizes, known: Mapping[str, Cost]) -> Cost:
    total = Cost()
    once = weight_only_nodes(function)
    for node in function.nodes:
        if node not in once:
            total = total + node_cost(node, sizes, known)
    return total


def _key(types: list[Type | None]) -> tuple[Type | None, ...]:
    return tuple(types)


@lru_cache(maxsize=4096)
def _flops(op: Op, types: tuple[Type | None, ...], values: tuple[tuple[str, int], ...]) -> int:
    sizes = dict(values)
    counted = op.flops_at(types, sizes)
    if counted is not None:
        return counted
    if isinstance(op, Composite):
        body = body_of(op, types)
        return sum(_flops(n.op, _key([None if v is None else v.type for v in n.operands]), values) for n in body.nodes)
    return op.apply(types).points.evaluate(sizes) * op.flops if op.flops else 0


def _bytes(op: Op, operands: list[Type | None], results: list[Type], sizes: Sizes) -> int:
    application = op.apply(operands)
    written = sum(t.bytes_at(sizes) for t in results)
    read = 0
    for t, dims in zip(operands, application.operands, strict=True):
        if t is None or dims is None:
            continue
        names = {name for d in dims for name in d.factors}
        looked_up = any(application.factors[n].role is Role.INDEXED for n in names)
        read += min(t.bytes_at(sizes), written) if looked_up else t.bytes_at(sizes)
    return read + written
