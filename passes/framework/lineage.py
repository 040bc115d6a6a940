"""Lineage: for each node of the original graph, the nodes that do its work after passes have run."""

from __future__ import annotations

from collections.abc import Iterable

from treadle.ir.graph import Graph, Node

_NONE: frozenset[Node] = frozenset()


class Lineage:
    """For each node of the graph that passes change, the nodes of the original graph whose work it does.

    A pass records this when it replaces nodes by others (`PassRecord.match` does so for most passes). For a node that
    no pass recorded, nothing is known.
    """

    def __init__(self, original: Graph | None = None, working: Graph | None = None) -> None:
        self._given: dict[Node, frozenset[Node]] = {}
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
        """Record that the nodes `created`, new or existing, now do the work of `nodes` in addition to their own."""
        work = self.of(nodes)
        for node in created:
            self._given[node] = work | self._given.get(node, _NONE)
