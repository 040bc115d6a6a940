"""The cost of a graph: floating-point operations and bytes, derived from axis rules and bodies.

The operations of a primitive are its points (the product of its rule's factors) times its `flops` per point. The
operations of a composite are counted in its body. Attention counts only the pairs of a query and a key that it may see.
Bytes count each element that an op reads or writes once, as if no cache existed. Along an axis that is looked up, an op
reads only the elements at its indices, and an op that updates a state writes only the update. Computations on weights
alone run once, when weights are bound, and are not counted.

Blocks are decoded where they are read: an op that reads the result of `decode` reads the bytes of the blocks, and of a
lookup only the blocks of the rows that it reads. The decode itself then moves nothing. This is the minimum that a run
moves. A backend without a kernel that reads blocks decodes weights once and reads the numbers; the graph that it
compiles has no such decode, and costs what it reads. Decoding is a change of representation like a cast, without
operations, so quantizing weights does not change the number of operations.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from treadle.ir.analysis.weight_only import weight_only_nodes
from treadle.ir.axes import AxisDim, Role
from treadle.ir.composites import body_of
from treadle.ir.errors import SizeError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Composite, Op
from treadle.ir.sizing.sizes import product
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
        known[function.name] = function_cost(function, sizes, known)
    return known[entry or graph.main.name]


def function_cost(function: Function, sizes: Sizes, functions: Mapping[str, Cost]) -> Cost:
    """Return the cost of one run of a function. `functions` holds the costs of the functions that it calls."""
    once = weight_only_nodes(function)
    passed = {v for node in function.nodes if node.op.callee is not None for v in node.inputs}
    nodes = [node for node in function.nodes if node not in once]
    return _sum_of(nodes, sizes, functions, passed.union(function.results))


def kernel_cost(nodes: Iterable[Node], sizes: Sizes) -> Cost:
    """Return the summed cost of nodes that one kernel computes, in order. The kernel decodes only the blocks that a
    `decode` among these nodes reads; the result of its last node, and of a decode elsewhere, is in memory.
    """
    computed = list(nodes)
    inside = {v for node in computed[:-1] for v in node.results}
    numbers = {v for node in computed for v in (*node.inputs, *node.results) if v not in inside}
    return _sum_of(computed, sizes, {}, numbers)


def node_cost(
    node: Node, sizes: Sizes, functions: Mapping[str, Cost] | None = None, decoded: Container[Value] = ()
) -> Cost:
    """Return the cost of one node.

    functions  the costs of the functions that it may call
    decoded    results of `decode` that are stored as numbers; all others are decoded where they are read
    """
    if node.op.callee is not None:
        return (functions or {}).get(node.op.callee, Cost())
    if node.op.decodes and node.result not in decoded:
        return Cost()
    operands = [None if v is None else v.type for v in node.operands]
    stored = [None if v is None else _stored(v, decoded) for v in node.operands]
    values = tuple(sorted(sizes.items()))
    flops = _flops(node.op, _key(operands), values)
    if any(v.state is not None for v in node.results):
        updated = node.op.updates.values()
        given = sum(t.bytes_at(sizes) for i, t in enumerate(stored) if t is not None and i not in updated)
        return Cost(flops, 2 * given)
    return Cost(flops, _bytes(node.op, operands, stored, [v.type for v in node.results], sizes))


def parameter_count(graph: Graph) -> int:
    """Return the number of elements of all weights, each counted once."""
    return sum(v.type.elements.evaluate({}) for v in graph.parameters.values())


def parameter_bytes(graph: Graph) -> int:
    """Return the bytes of all weights in their declared dtypes."""
    return sum(v.type.bytes_at({}) for v in graph.parameters.values())


def state_bytes(graph: Graph, sizes: Sizes) -> int:
    """Return the bytes of all states. `sizes` maps each symbol to its size."""
    return sum(v.type.bytes_at(sizes) for v in graph.states.values())


def _sum_of(nodes: Iterable[Node], sizes: Sizes, functions: Mapping[str, Cost], decoded: Container[Value]) -> Cost:
    return sum((node_cost(node, sizes, functions, decoded) for node in nodes), Cost())


def _stored(value: Value, decoded: Container[Value]) -> Type:
    """Return the type in which a value is read: the type of its blocks, if it is decoded where it is read."""
    node = value.node
    return node.inputs[0].type if node is not None and node.op.decodes and value not in decoded else value.type


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


def _bytes(op: Op, operands: list[Type | None], stored: list[Type | None], results: list[Type], sizes: Sizes) -> int:
    application = op.apply(operands)
    indexed = {name for name, factor in application.factors.items() if factor.role is Role.INDEXED}
    of_operands = [None if dims is None else _factors(dims) for dims in application.operands]
    looked_up = indexed - set[str]().union(*map(_factors, application.results))
    of_indices = set[str]()
    for t, names in zip(operands, of_operands, strict=True):
        if t is not None and t.dtype.is_int and names is not None and not names & indexed:
            of_indices |= names

    def elements(names: Iterable[str]) -> int:
        return product(application.dims[name].size for name in names).evaluate(sizes)

    read = 0
    for t, held, names in zip(operands, stored, of_operands, strict=True):
        if t is None or held is None or names is None:
            continue
        count = held.bytes_at(sizes)
        if names & looked_up:  # of an axis that is looked up, the elements at the indices
            count = min(count, count * elements((names - indexed) | of_indices) // max(1, elements(names)))
        read += count
    written = sum(t.bytes_at(sizes) for t in results)
    return read + written


def _factors(dims: Iterable[AxisDim]) -> set[str]:
    return {name for dim in dims for name in dim.factors}
