"""Legalization: composites that a backend does not emit are lowered until only ops that it emits remain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.builder import Builder
from treadle.ir.composites import inline, lowering_of
from treadle.ir.graph import Graph, Value
from treadle.ir.operation import Composite, Op
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.types import Type
from treadle.passes.capabilities import PRIMITIVES, Capabilities, Keeps
from treadle.passes.framework.facts import LEGAL, PORTABLE, UNPLANNED, Facts
from treadle.passes.framework.pass_log import PassRecord, count_ops
from treadle.passes.framework.rewriting import Rewriting, Site, SiteRewrite


@dataclass(frozen=True)
class Legalize(SiteRewrite[Site]):
    """attention(q, k, v, ...)   -->   its body, if the backend does not emit attention

    backend  the backend, which keeps the composites that it emits

    Composites in the body of another composite are replaced as well, until only calls, primitives and composites that
    the backend emits remain. The new nodes get the scope, name and source line of the replaced node.
    """

    requires: ClassVar[Facts] = frozenset({UNPLANNED})
    ensures: ClassVar[Facts] = frozenset({LEGAL})
    ends: ClassVar[Facts] = frozenset({PORTABLE})
    backend: Capabilities = PRIMITIVES

    def sites(self, work: Rewriting) -> Iterator[Site]:
        """Yield every composite that the backend does not emit, also in the body of another composite."""
        for node in work.walk(into=True):
            types = [None if v is None else v.type for v in node.operands]
            if isinstance(node.op, Composite) and not self.backend.keeps(node.op, types):
                yield Site(node)

    def build(self, b: Builder, site: Site) -> Sequence[Value]:
        assert isinstance(site.root.op, Composite)
        with b.scoped(site.root.op.name):
            return inline(b, site.root.op, site.root.operands, lowered=True)


def legalized(graph: Graph, keeps: Keeps) -> Graph:
    """Return a copy of a graph that consists of calls, primitives and the composites that the backend emits."""
    made, legalize = clone_graph(graph), Legalize(Capabilities(keeps=keeps))
    legalize.run_graph(made, PassRecord(legalize.name, "", count_ops(graph)))
    return made


def primitives(op: Op, types: Sequence[Type | None], keeps: Keeps) -> Iterator[tuple[Op, list[Type | None]]]:
    """Yield the ops to which an op on operands of these types is lowered, each with its operands' types."""
    if not isinstance(op, Composite) or keeps(op, types):
        yield op, list(types)
        return
    for node in lowering_of(op, types).nodes:
        yield from primitives(node.op, [None if v is None else v.type for v in node.operands], keeps)
