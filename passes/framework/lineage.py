"""Lineage: for each node of the original graph, the nodes that do its work after passes have run.

While passes run, it refers to nodes. A `NodeNumbers` turns it into numbers that are small enough to be stored with the
log of every pass.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from treadle.ir.graph import Graph, Node

_NONE: frozenset[Node] = frozenset()


class Lineage:
    """For each node of the graph that passes change, the nodes of the original graph whose work it does.

    A pass records this when it replaces nodes by others (`PassRecord.match` does so for most passes). For a node that
    no pass recorded, nothing is known.
    """

    def __init__(self, original: Graph | None = None, working: Graph | None = None) -> None:
        self._given: dict[Node, frozenset[Node]] = {}
        self._replaced: list[tuple[tuple[Node, ...], tuple[Node, ...]]] = []
        if original is not None and working is not None:
            pairs = zip(original.walk(), working.walk(), strict=True)  # a clone has the nodes in the same order
            self._given.update({copy: frozenset((node,)) for (_, node), (_, copy) in pairs})

    def restricted(self, nodes: Iterable[Node]) -> Lineage:
        """Return the lineage of these nodes alone, which holds no removed node."""
        made = Lineage()
        made._given = {node: self._given[node] for node in nodes if node in self._given}
        return made

    def of(self, nodes: Iterable[Node]) -> frozenset[Node]:
        """Return the nodes of the original graph whose work these nodes do."""
        return _NONE.union(*[self._given.get(node, _NONE) for node in nodes])

    def stand(self, created: Iterable[Node], nodes: Iterable[Node]) -> None:
        """Record that `created` nodes, new or existing, now do the work of `nodes` in addition to their own."""
        created, nodes = tuple(created), tuple(nodes)
        self._replaced.append((created, nodes))
        work = self.of(nodes)
        for node in created:
            self._given[node] = work | self._given.get(node, _NONE)

    def take_replacements(self) -> list[tuple[tuple[Node, ...], tuple[Node, ...]]]:
        """Return the pairs of new and replaced nodes that were recorded since the last call, and forget them."""
        taken, self._replaced = self._replaced, []
        return taken


@dataclass(frozen=True)
class NodeHistory:
    """The identity of the nodes of a graph after a pass.

    numbers   for each function, a number for each of its nodes, in program order. A node keeps its number from pass to
              pass; the nodes of the graph that the passes started from are numbered in their order
    replaced  for each node that took over work in this pass, the numbers of the nodes before the pass that did it

    It refers to no node, so it takes 4 bytes for each node of a function that the pass changed; the other functions
    share their numbers with the pass before.
    """

    numbers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    replaced: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


class NodeNumbers:
    """Numbers the nodes of the graph that passes work on; see `NodeHistory`."""

    def __init__(self, working: Graph) -> None:
        self._numbers: dict[Node, int] = {node: at for at, (_, node) in enumerate(working.walk())}
        self._held = self._numbered(working, working.functions)

    @property
    def unchanged(self) -> NodeHistory:
        """The history after a pass that changed nothing."""
        return NodeHistory(self._held)

    def after(self, working: Graph, lineage: Lineage, touched: Collection[str] | None) -> NodeHistory:
        """Return the history after a pass that changed these functions (None: all of them)."""
        count = len(self._numbers)
        before = self._held
        changed = [name for name in working.functions if touched is None or name in touched or name not in before]
        held = {name: before[name] for name in working.functions if name in before}
        self._held = held | self._numbered(working, changed)
        return NodeHistory(self._held, self._links(lineage, count))

    def _numbered(self, working: Graph, names: Iterable[str]) -> dict[str, array[int]]:
        numbers = self._numbers
        found = {}
        for name in names:
            held = array("I")
            for node in working.functions[name].nodes:
                number = numbers.get(node)
                if number is None:
                    number = numbers[node] = len(numbers)
                held.append(number)
            found[name] = held
        return found

    def _links(self, lineage: Lineage, count: int) -> dict[int, tuple[int, ...]]:
        """Return the replaced nodes of each node, followed through the nodes that lived during the pass only."""
        sources: dict[Node, dict[int, None]] = {}
        for created, nodes in lineage.take_replacements():
            work: dict[int, None] = {}
            for node in nodes:
                number = self._numbers.get(node)
                if number is not None and number < count:
                    work[number] = None
                work |= sources.get(node, {})
            for node in created:
                sources[node] = {**sources.get(node, {}), **work}
        found = {}
        for node, before in sources.items():
            number = self._numbers.get(node)
            if number is not None and before:
                found[number] = tuple(each for each in before if each != number)
        return {number: before for number, before in found.items() if before}
