"""Grouping of the nodes that one kernel computes together, as steps of a storage plan.

Elementwise nodes whose values are read only within their group become one chain, which ends at the group's *root*. If
the chain reads a product with no other reader, the chain becomes the product's epilogue: bias, activation, residual and
gating are computed while the tile is in registers. Blocks with a layout are decoded by the kernel that reads them. If a
node reads a state that is updated before the root, the node is not grouped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from treadle.ir.analysis.state_views import deadlines
from treadle.ir.graph import Function, Node, Value
from treadle.passes.lowering.read_blocks import unpacking
from treadle.passes.memory.storage_plan import Step


def _unpacking(reader: Node) -> tuple[Node, ...]:
    """Return the nodes that decode blocks for a node. They belong to that node's step."""
    return tuple([made for v in reader.inputs if (made := unpacking(v)) is not None])


def is_number(value: Value) -> bool:
    """Return True if a value is a scalar constant, which is emitted within a chain."""
    return value.literal is not None and value.literal.shape == ()


@dataclass
class _Group:
    """Elementwise nodes that are computed at the position of the last one, and the product whose epilogue they are, if
    any.
    """

    nodes: list[Node] = field(default_factory=list)
    product: Node | None = None

    @property
    def root(self) -> Node:
        return self.nodes[-1]

    @property
    def inputs(self) -> list[Value]:
        """The values read from outside, except scalar constants."""
        return [v for v in Step(tuple(self.nodes)).inputs if not is_number(v)]


@dataclass(frozen=True)
class Chains:
    """The grouping of elementwise nodes into chains of limited size; a chain may be a product's epilogue.

    elementwise  returns True if a chain may contain a node
    finished     returns True if a chain may be the epilogue of a node, which is then a product
    most_inputs  the greatest number of inputs of a chain, without scalar constants
    most_nodes   the greatest number of nodes of a chain
    """

    elementwise: Callable[[Node], bool]
    finished: Callable[[Node], bool]
    most_inputs: int
    most_nodes: int

    def __call__(self, function: Function) -> Sequence[Step]:
        """Return the steps of a function: a step for each group, and for each other node."""
        found = self._groups(function)
        steps = []
        for node in function.nodes:
            part = found.get(node)
            if part is None:
                if all(unpacking(v) is None for v in node.results):
                    steps.append(Step((*_unpacking(node), node)))
            elif part.root is node:
                before = () if part.product is None else (*_unpacking(part.product), part.product)
                steps.append(Step((*before, *part.nodes), part.product))
        return steps

    def _groups(self, function: Function) -> dict[Node, _Group]:
        """Return the group of every elementwise node, and of every product with an epilogue."""
        uses = function.uses()
        outputs = set(function.outputs.values())
        until, at = deadlines(function), {node: i for i, node in enumerate(function.nodes)}
        roots: dict[Node, Node] = {}
        counts: dict[Node, int] = {}
        for node in reversed(function.nodes):
            if not self.elementwise(node):
                continue
            readers = {reader for reader, _ in uses.get(node.result, [])}
            found = {roots.get(reader) for reader in readers}
            (root,) = found if len(found) == 1 else (None,)
            same = root is not None and node.result not in outputs and root.result.type.shape == node.result.type.shape
            same = same and not (root is not None and node in until and at[root] > until[node])
            roots[node] = root if same and root is not None and counts[root] < self.most_nodes else node
            counts[roots[node]] = counts.get(roots[node], 0) + 1
        groups: dict[Node, _Group] = {}
        for node in function.nodes:
            if node in roots:
                groups.setdefault(roots[node], _Group()).nodes.append(node)
        made: dict[Node, _Group] = {}
        for found_group in groups.values():
            for part in self._small_enough(found_group):
                late = {node for node, end in until.items() if at[part.root] > end}
                part.product = self._product_before(part, uses, outputs, late)
                made |= dict.fromkeys(part.nodes, part)
                if part.product is not None:
                    made[part.product] = part
        return made

    def _small_enough(self, whole: _Group) -> Sequence[_Group]:
        """Return the group, or a group for each node if the chain would have too many inputs."""
        if len(whole.inputs) <= self.most_inputs:
            return [whole]
        return [_Group([node]) for node in whole.nodes]

    def _product_before(
        self, part: _Group, uses: Mapping[Value, Sequence[tuple[Node, int]]], outputs: set[Value], late: set[Node]
    ) -> Node | None:
        """Return the last product that only this group reads, that has the group's shape, and that may be computed at
        the group's root. Return None if there is none.
        """
        inside = set(part.nodes)
        shape = part.root.result.type.shape
        found = None
        for value in part.inputs:
            node = value.node
            if node is None or value in outputs or node in late or not self.finished(node):
                continue
            alone = all(reader in inside for reader, _ in uses[value])
            if alone and value.type.shape == shape:
                found = node
        return found
