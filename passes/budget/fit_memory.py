"""`FitMemory`: compute a graph in parts, as planned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from treadle.ir.errors import PassError
from treadle.ir.graph import Graph
from treadle.ir.transforms.fixing import fix_single_sizes
from treadle.passes.budget.computing_again import compute_again
from treadle.passes.budget.fitting import apply_chunks
from treadle.passes.budget.memory_fit import MemoryFit
from treadle.passes.budget.part_checking import check_parts
from treadle.passes.budget.parts import NoPart
from treadle.passes.framework.facts import STATELESS, UNPLANNED, Facts
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord


@dataclass(frozen=True)
class FitMemory(Pass):
    """y = f(x)   -->   y = concat(f_part(x[0:c]), f_part(x[c:2 c]), ...)

    fit  the runs of steps to compute in parts, and the numbers of parts; `treadle.passes.budget.fitting` selects them

    A symbol whose only possible value is 1 becomes a constant. The parts are always checked against the original nodes.
    """

    requires: ClassVar[Facts] = frozenset({STATELESS, UNPLANNED})
    fit: MemoryFit = field(repr=False)

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        fix_single_sizes(graph)
        if self.fit.again:
            compute_again(graph, self.fit.sizes)
        try:
            made = apply_chunks(graph, self.fit.chunks, check_parts)
        except NoPart as error:
            raise PassError("an op of a planned run cannot be computed in parts", received=str(self.fit)) from error
        log.notes += str(self.fit).splitlines()
        log.products[MemoryFit] = self.fit
        return 1 + made
