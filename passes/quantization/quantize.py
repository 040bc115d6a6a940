"""Quantization: weights that products multiply are held in fewer bits, by a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.graph import Graph
from treadle.ir.transforms.encoded_weights import encode_parameters
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord
from treadle.passes.quantization.plan_checking import check_quantization
from treadle.passes.quantization.planning import plan_quantization


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """linear(x, w, bias)   -->   linear(x, decode(w), bias)        for a weight w, as int8_rows or int4_groups(32)

    scheme  "int8-weights": 8 bits and a scale a row. "int4": 4 bits and a scale for 32 neighbours, 8 bits where the
            product is an output

    The numbers change, by at most half a step of their scale (of 4 bits by at most a whole one: the largest of a group
    is -8 steps, and one as large of the other sign is 7), so that no certificate is asked for. The plan tells what
    becomes of every weight, and a checker that did not make it looks at it before it is applied. It comes last, so that
    what fuses in the float model fuses here. Whoever has the weights encodes them (`treadle.compiling`).

    Refuses, in the plan's words: what is no matrix, or is read by something else than products and what picks rows of
    it; a line that is no whole number of groups.
    """

    changes_numbers: ClassVar[bool] = True
    scheme: str

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        plan = plan_quantization(graph, self.scheme)
        check_quantization(plan, graph)
        log.notes += str(plan).splitlines()
        if not plan.encodings:
            return 0
        graph.functions = encode_parameters(graph, plan.encodings).functions
        log.touched = None
        return len(plan.encodings)
