"""Grouping: which nodes are computed together by one kernel.

Elementwise nodes whose values only others of their group read become one chain, which ends at the group's *root*. If
the chain reads a product that nobody else reads, it becomes the product's epilogue: bias, activation, residual and
gating are done while the tile is in registers. What reads a state that is updated before the root stays by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from treadle.backends.tvm.kernels.arithmetic.vector_math import is_pointwise
from treadle.backends.tvm.kernels.pointwise import Chain, Instruction
from treadle.ir.analysis.state_views import deadlines
from treadle.ir.graph import Function, Node, Value
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.products import Einsum, Linear, MatMul
from treadle.ir.types import f32

PRODUCTS = (Linear, MatMul, Einsum)
MOST_INPUTS = 8  # of a chain: each takes a register in the loop
MOST_NODES = 48  # of a chain: the time to compile one grows with the square of its length, or faster


@dataclass
class Group:
    """Elementwise nodes computed at the place of the last one, the root, with the product that they finish, if any."""

    nodes: list[Node] = field(default_factory=list)
    product: Node | None = None

    @property
    def root(self) -> Node:
        return self.nodes[-1]


def group(function: Function) -> dict[Node, Group]:
    """The group of every elementwise node, and of every product that one finishes."""
    uses = function.uses()
    outputs = set(function.outputs.values())
    until, at = deadlines(function), {node: i for i, node in enumerate(function.nodes)}
    roots: dict[Node, Node] = {}
    counts: dict[Node, int] = {}
    for node in reversed(function.nodes):
        if not is_pointwise(node.op.name):
            continue
        readers = {reader for reader, _ in uses.get(node.result, [])}
        found = {roots.get(reader) for reader in readers}
        (root,) = found if len(found) == 1 else (None,)
        same = root is not None and node.result not in outputs and root.result.type.shape == node.result.type.shape
        same = same and not (root is not None and node in until and at[root] > until[node])
        roots[node] = root if same and root is not None and counts[root] < MOST_NODES else node
        counts[roots[node]] = counts.get(roots[node], 0) + 1
    groups: dict[Node, Group] = {}
    for node in function.nodes:
        if node in roots:
            groups.setdefault(roots[node], Group()).nodes.append(node)
    made: dict[Node, Group] = {}
    for found_group in groups.values():
        for part in _small_enough(found_group):
            late = {node for node, end in until.items() if at[part.root] > end}
            part.product = _product_before(part, uses, outputs, late)
            made |= dict.fromkeys(part.nodes, part)
            if part.product is not None:
                made[part.product] = part
    return made


def _small_enough(whole: Group) -> Sequence[Group]:
    """The group, or each node for itself where the chain would have too many inputs."""
    if len(inputs_of(whole)) <= MOST_INPUTS:
        return [whole]
    return [Group([node]) for node in whole.nodes]


def _product_before(
    part: Group, uses: Mapping[Value, Sequence[tuple[Node, int]]], outputs: set[Value], late: set[Node]
) -> Node | None:
    """The last product that only this group reads, of the group's shape and in float32, and that may wait for it."""
    inside = set(part.nodes)
    shape = part.root.result.type.shape
    found = None
    for value in inputs_of(part):
        node = value.node
        if node is None or not isinstance(node.op, PRODUCTS) or value in outputs or len(node.inputs) < 2:
            continue
        if node in late:
            continue
        alone = all(reader in inside for reader, _ in uses[value])
        if alone and value.type.shape == shape and value.type.dtype is f32:
            found = node
    return found


def inputs_of(part: Group) -> list[Value]:
    """What a group reads from outside, scalar constants apart, each once, in the order in which it does."""
    inside = {node.result for node in part.nodes}
    read = [v for node in part.nodes for v in node.inputs if v not in inside and not is_number(v)]
    return list(dict.fromkeys(read))


def is_number(value: Value) -> bool:
    """Whether a value is a scalar constant, which a chain holds in itself."""
    return value.literal is not None and value.literal.shape == ()


def chain_of(part: Group, inputs: Sequence[Value]) -> Chain:
    """The group as a chain over these inputs."""
    places: dict[Value, int] = {v: i for i, v in enumerate(inputs)}
    made: list[Instruction] = []

    def place(value: Value) -> int:
        if value not in places:
            assert value.literal is not None
            made.append(Instruction("constant", (), value.type.dtype.name, (("value", value.literal.scalar),)))
            places[value] = len(inputs) + len(made) - 1
        return places[value]

    for node in part.nodes:
        operands = tuple([place(v) for v in node.inputs])
        attributes = () if isinstance(node.op, Cast) else tuple(node.op.attributes.items())
        made.append(Instruction(node.op.name, operands, node.result.type.dtype.name, attributes))
        places[node.result] = len(inputs) + len(made) - 1
    return Chain(tuple(v.type.dtype.name for v in inputs), tuple(made))
