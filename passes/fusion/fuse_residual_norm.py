"""A residual and the norm of it as one op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from treadle.ir.builder import Builder
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.ops.arithmetic import Add
from treadle.ir.ops.elementwise import Cast
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord
from treadle.passes.framework.rewrite import Refusal

FUSED: Mapping[str, str] = {"layer_norm": "add_layer_norm", "rms_norm": "add_rms_norm"}
"""What the norm of a sum becomes."""


@dataclass(frozen=True)
class FuseResidualNorm(Pass):
    """layer_norm(x + residual, w, c)   -->   add_layer_norm(x, residual, w, c)        rms_norm, likewise

    The op has two results, the norm and the sum: whatever else reads the sum (the residual stream of a model that
    normalizes before its layers) then reads the second one. It stands where the norm stood, or where the sum did if
    that is read before.

    Refuses: a sum that broadcasts; a weight or a constant as an addend (a bias); a sum that is cast before the norm; a
    second norm of one sum; a weight of the norm that is not there yet where the sum is first read.
    """

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        if not any(_sum_before(node) is not None for node in function.nodes):
            return 0
        return _Residuals(self, function, graph, log).run()


def _sum_before(norm: Node) -> Node | None:
    """The sum that a norm is of, a cast between them or not."""
    node = norm.inputs[0].node if norm.op.name in FUSED else None
    if node is not None and isinstance(node.op, Cast):
        node = node.inputs[0].node
    return node if node is not None and isinstance(node.op, Add) else None


class _Residuals:
    def __init__(self, rule: FuseResidualNorm, function: Function, graph: Graph, log: PassRecord) -> None:
        self.rule, self.function, self.log = rule, function, log
        self.scratch = Function("scratch")
        self.builder = Builder(graph, self.scratch)
        self.places = {node: place for place, node in enumerate(function.nodes)}
        self.readers = {value: [node for node, _ in uses] for value, uses in function.uses().items()}
        self.norms: dict[Node, Node] = {}
        """For each sum that is fused, the norm that takes it."""

    def run(self) -> int:
        early: dict[Node, Node] = {}
        late: dict[Node, Node] = {}
        for norm in self.function.nodes:
            total = _sum_before(norm)
            if total is None:
                continue
            refusal = self._why_not(total, norm)
            if refusal is not None:
                at = refusal.node or total
                self.log.refuse(self.rule.name, self.function, at, refusal.reason, refusal.hint, (total, norm))
                continue
            self.norms[total] = norm
            if self._read_before(total, norm) is None:
                late[norm] = total
            else:
                early[total] = norm
        self._replace(early, late)
        return len(self.norms)

    def _why_not(self, total: Node, norm: Node) -> Refusal | None:
        given = norm.inputs[0]
        for value in total.inputs:
            if value.kind in ("parameter", "constant"):
                what = "a weight" if value.kind == "parameter" else "a constant"
                return Refusal(f"what is added is {what}, {value.type}, and no residual", total)
        for value in total.inputs:
            if value.type.shape != total.result.type.shape:
                return Refusal(f"the sum broadcasts {value.type} to {total.result.type}", total)
        if given is not total.result:
            cast = f"the sum is cast from {total.result.type.dtype} to {given.type.dtype} before it is normalized"
            return Refusal(cast, given.node)
        other = self.norms.get(total)
        if other is not None:
            return Refusal(f"another {other.op.name} takes the sum already{_line(other)}", norm)
        reader = self._read_before(total, norm)
        missing = [v for v in norm.inputs[1:] if v.node is not None and self._place(v.node) > self.places[total]]
        if reader is not None and missing:
            name = next(n for n, v in zip(norm.op.operands, norm.operands, strict=True) if v is missing[0])
            return Refusal(f"the sum is read, by {reader.op.name}{_line(reader)}, before {name} is computed", norm)
        return None

    def _place(self, node: Node) -> int:
        """Where a node stands, or the fused op that a sum becomes part of."""
        norm = self.norms.get(node)
        return self.places[node if norm is None or self._read_before(node, norm) is not None else norm]

    def _read_before(self, total: Node, norm: Node) -> Node | None:
        """Who reads the sum before the norm does."""
        before = [node for node in self.readers[total.result] if self.places[node] < self.places[norm]]
        return before[0] if before else None

    def _replace(self, early: Mapping[Node, Node], late: Mapping[Node, Node]) -> None:
        """Put the fused op in the place of a norm (late), or of its sum (early), and let all read that."""
        replaced: dict[Value, Value] = {}
        kept: list[Node] = []
        for node in self.function.nodes:
            if replaced and any(v in replaced for v in node.inputs):
                node.operands = tuple(v if v is None else replaced.get(v, v) for v in node.operands)
            total, norm = (late[node], node) if node in late else (node, early.get(node))
            if norm is not None:
                kept.append(self._fused(total, norm, replaced))
            elif node not in self.norms and node not in early.values():
                kept.append(node)
        self.function.nodes = kept
        self.function.outputs = {name: replaced.get(v, v) for name, v in self.function.outputs.items()}

    def _fused(self, total: Node, norm: Node, replaced: dict[Value, Value]) -> Node:
        rule = FUSED[norm.op.name]
        given = [v if v is None else replaced.get(v, v) for v in (*total.operands, *norm.operands[1:])]
        with self.builder.placed_as(norm):
            operands = [v if v is None else self.builder.expr(v) for v in given]
            self.builder.apply(rule, *operands, **norm.op.attributes)
        node = self.scratch.nodes.pop()
        node.source = norm.source
        for old, new in zip((norm.result, total.result), node.results, strict=True):
            replaced[old] = new
            new.name = old.name
        self.log.match(rule.replace("_", "-"), self.function, norm, (total,), (node,))
        return node


def _line(node: Node) -> str:
    return f" ({node.source})" if node.source else ""
