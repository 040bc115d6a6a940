"""What became of a node of the graph as it was given: which nodes do its work, whatever passes made of it."""

from __future__ import annotations

from collections.abc import Iterable

from treadle.ir.graph import Graph, Node

_NONE: frozenset[Node] = frozenset()


class Lineage:
    """For each node of the graph that passes work on, the nodes of the graph as it was given whose work it does.

    A pass says so where it puts nodes in the place of others (`PassRecord.match` does it for most); of a node that
    nobody spoke for, nothing is known.
    """

    def __init__(self, given: Graph | None = None, working: Graph | None = None) -> None:
        self._given: dict[Node, frozenset[Node]] = {}
        if given is not None and working is not None:
            pairs = zip(given.walk(), working.walk(), strict=True)  # a clone has the nodes in the same order
            self._given.update({copy: frozenset((node,)) for (_, node), (_, copy) in pairs})

    def of(self, nodes: Iterable[Node]) -> frozenset[Node]:
        """The nodes of the graph as it was given whose work these do."""
        return _NONE.union(*[self._given.get(node, _NONE) for node in nodes])

    def stand(self, made: Iterable[Node], nodes: Iterable[Node]) -> None:
        """Nodes that were made, or kept, do the work of others from now on, beside their own."""
        work = self.of(nodes)
        for node in made:
            self._given[node] = work | self._given.get(node, _NONE)
