"""Rewrites and a pass that tests plant, and the verdicts of certificates on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from treadle.ir.builder import Builder
from treadle.ir.graph import Function, Graph, Value
from treadle.ir.text.parser import parse_graph
from treadle.passes.certificates.certificate import Certificate
from treadle.passes.framework.manager import Optimized, Pass, PassManager
from treadle.passes.framework.pass_log import PassRecord
from treadle.passes.framework.rewrite import Match, Rewrite


def certified(graph: Graph | str, *passes: Pass) -> Optimized:
    """Run passes on a graph, or on the text of a graph, with certificates enabled, and return the result."""
    return PassManager(passes, certify=True).run(parse_graph(graph) if isinstance(graph, str) else graph)


def certificates(optimized: Optimized) -> list[Certificate]:
    return [c for record in optimized.log for c in record.certificates]


def rolled_back(optimized: Optimized) -> list[str]:
    return [e.reason for record in optimized.log for e in record.refusals if e.reason.startswith("rolled back")]


@dataclass(frozen=True)
class Planted(Rewrite):
    """A rewrite with a pattern and a replacement that a test gives."""

    find: Any = None
    put: Any = None

    def pattern(self, p: Any, x: Any, y: Any) -> Any:
        return self.find(p, x, y)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return self.put(b, m)


@dataclass(frozen=True)
class ForgetsOneOp(Pass):
    """A rewrite that replaces every op of a name by its operand."""

    op: str = "neg"

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        replaced: dict[Value, Value] = {}
        kept = []
        for node in function.nodes:
            node.operands = tuple(v if v is None else replaced.get(v, v) for v in node.operands)
            if node.op.name == self.op:
                replaced[node.results[0]] = node.inputs[0]
            else:
                kept.append(node)
        changes = len(function.nodes) - len(kept)
        function.nodes = kept
        function.outputs = {name: replaced.get(v, v) for name, v in function.outputs.items()}
        return changes
