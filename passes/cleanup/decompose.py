"""Decompose: fused ops as what they are made of, the reverse of the passes that fuse."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.ir.builder import Builder
from treadle.ir.composites import inline
from treadle.ir.errors import PassError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Composite, find_op
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord

FUSED = (
    *("attention", "rotary", "softmax", "layer_norm", "rms_norm", "gelu", "gelu_tanh", "silu", "quick_gelu"),
    *("activated_linear", "gated_linear"),
    *("add_layer_norm", "add_rms_norm", "embedding_sum"),
    *("attention_with_probabilities", "projections"),
)
"""The composites that passes of the default pipeline make."""


@dataclass(frozen=True)
class Decompose(Pass):
    """attention(q, k, v), layer_norm(x, w), ...   -->   their bodies

    ops    which composites; one in the body of another is decomposed as well if it is among them

    The fusing passes of the default pipeline undo it. Raises PassError for an op that has no body.
    """

    ops: tuple[str, ...] = FUSED

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        for name in self.ops:
            if not issubclass(find_op(name), Composite):
                raise PassError(f"{name} has no body to be decomposed into", hint="one of " + ", ".join(FUSED))
        return super().run_graph(graph, log)

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        if not any(node.op.name in self.ops for node in function.nodes):
            return 0
        scratch = Function("scratch")
        b = Builder(graph, scratch)
        replaced: dict[Value, Value] = {}
        kept: list[Node] = []
        pending = function.nodes[::-1]
        changes = 0

        def current(value: Value) -> Value:
            while value in replaced:  # a body may end in a composite
                value = replaced[value]
            return value

        while pending:
            node = pending.pop()
            if replaced and any(v in replaced for v in node.inputs):
                node.operands = tuple(v if v is None else current(v) for v in node.operands)
            if node.op.name not in self.ops or not isinstance(node.op, Composite):
                kept.append(node)
                continue
            with b.placed_as(node):
                results = inline(b, node.op, node.operands)
            made, scratch.nodes = scratch.nodes, []
            for each in made:
                each.source = node.source
            replaced.update(zip(node.results, results, strict=True))
            pending.extend(reversed(made))
            log.match(self.name, function, node, made=made)
            changes += 1
        function.nodes = kept
        function.outputs = {name: current(v) for name, v in function.outputs.items()}
        return changes
