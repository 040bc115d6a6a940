"""Grouping: which nodes one kernel computes together, as steps of a storage plan.

Elementwise nodes whose values only others of their group read become one chain, which ends at the group's *root*. If
the chain reads a product that nobody else reads, it becomes the product's epilogue: bias, activation, residual and
gating are done while the tile is in registers. What decodes blocks that are laid out is done by the kernel that reads
them. What reads a state that is updated before the root stays by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from treadle.ir.analysis.state_views import deadlines
from treadle.ir.graph import Function, Node, Value
from treadle.passes.lowering.read_blocks import unpacking
from treadle.passes.memory.storage_plan import Step


def _unpacking(reader: Node) -> tuple[Node, ...]:
    """What decodes the blocks that a node reads, in whose step it is."""
    return tuple([made for v in reader.inputs if (made := unpacking(v)) is not None])


def is_number(value: Value) -> bool:
    """Whether a value is a scalar constant, which a chain holds in itself."""
    return value.literal is not None and value.literal.shape == ()


@dataclass
class _Group:
    """Elementwise nodes computed at the place of the last one, with the product that they finish, if any."""

    nodes: list[Node] = field(default_factory=list)
    product: Node | None = None

    @property
    def root(self) -> Node:
        return self.nodes[-1]

    @property
    def inputs(self) -> list[Value]:
        """What it reads from outside, scalar constants apart."""
        return [v for v in Step(tuple(self.nodes)).inputs if not is_number(v)]


@dataclass(frozen=True)
class Chains:
    """Groups of elementwise nodes, of so many nodes and inputs at most; each may finish a product.

    elementwise  whether a chain may hold a node
    finished     whether a chain may finish a node, which is a product then
    most_inputs  that a chain reads, scalar constants apart
    most_nodes   of a chain
    """

    elementwise: Callable[[Node], bool]
    finished: Callable[[Node], bool]
    most_inputs: int
    most_nodes: int

    def __call__(self, function: Function) -> Sequence[Step]:
        """The steps of a function: groups, and every other node alone."""
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
        """The group of every elementwise node, and of every product that one finishes."""
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
        """The group, or each node for itself where the chain would have too many inputs."""
        if len(whole.inputs) <= self.most_inputs:
            return [whole]
        return [_Group([node]) for node in whole.nodes]

    def _product_before(
        self, part: _Group, uses: Mapping[Value, Sequence[tuple[Node, int]]], outputs: set[Value], late: set[Node]
    ) -> Node | None:
        """The last product that only this group reads, of the group's shape, and that may wait for it."""
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
