"""Constant folding: compute nodes that depend only on constants at compile time, by the ops' own references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from treadle.ir.errors import SizeError, TreadleError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.literals import Literal
from treadle.ir.operation import Op
from treadle.passes.framework.facts import BEFORE_LOWERING, Facts
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord


@dataclass(frozen=True)
class FoldConstants(Pass):
    """op(c1, c2, ...)   -->   c        for constants c1, c2, ... and sizes without symbols

    Constants are computed in the graph's own precision, so they round as the op would at run time.

    limit_bytes   refuse a fold whose results would be larger
    small_bytes   refuse a fold that produces more bytes than it reads (iota, expand) if the result is larger than this

    Refuses: results over those limits; bf16, which NumPy does not support; ops whose reference fails. Functions of
    calls are not folded at the call: a function is folded once for all its calls.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING

    limit_bytes: int = 1 << 20
    small_bytes: int = 1 << 10

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        folded: dict[Value, Value] = {}
        kept: list[Node] = []
        for node in function.nodes:
            if any(v in folded for v in node.inputs):
                node.operands = tuple(v if v is None else folded.get(v, v) for v in node.operands)
            op = _fixed(node)
            refusal = self._refusal(node) if op is not None else None
            literals = _evaluated(op, node) if op is not None and refusal is None else None
            if literals is not None:
                folded.update(zip(node.results, map(Value.constant, literals), strict=True))
                log.match(self.name, function, node)
                continue
            kept.append(node)
            if op is not None:
                log.refuse(self.name, function, node, refusal or "its reference failed")
        changes = len(function.nodes) - len(kept)
        function.nodes = kept
        function.replace_results(lambda v: folded.get(v, v))
        return changes

    def _refusal(self, node: Node) -> str | None:
        types = [v.type for v in (*node.inputs, *node.results)]
        if any(t.encoding is not None for t in types):
            return "encoded blocks are not decoded: consumers may read them as blocks"
        if any(t.dtype.numpy is None for t in types):
            return "NumPy does not support bf16"
        made = sum(v.type.bytes_at({}) for v in node.results)
        if made > self.limit_bytes:
            return f"would produce {made:,} bytes, over the limit of {self.limit_bytes:,}"
        read = sum(v.type.bytes_at({}) for v in node.inputs)
        if made > max(read, self.small_bytes):
            return f"would produce {made:,} bytes from {read:,}, over the limit of {self.small_bytes:,}"
        return None


def _fixed(node: Node) -> Op | None:
    """Return the node's op with sizes evaluated, if it depends only on constants and on sizes without symbols, else
    None.
    """
    if node.op.callee is not None or any(v.literal is None for v in node.inputs):
        return None
    try:
        return None if any(v.type.symbols for v in node.results) else node.op.at({})
    except SizeError:
        return None


def _evaluated(op: Op, node: Node) -> list[Literal] | None:
    operands = [None if v is None or v.literal is None else v.literal.array for v in node.operands]
    try:
        with np.errstate(all="ignore"):
            made = op.reference(*operands)
        results = made if isinstance(made, tuple) else (made,)
        literals = [Literal.of(r, v.type.dtype) for r, v in zip(results, node.results, strict=True)]
    except (TreadleError, ArithmeticError, IndexError, TypeError, ValueError):
        return None
    return literals if all(x.type == v.type for x, v in zip(literals, node.results, strict=True)) else None
