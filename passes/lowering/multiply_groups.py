"""Products of bf16 values with weights in groups of 4 bits become one op, for backends with a kernel for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Node, Value
from treadle.ir.ops.blocks import GROUPS_OF_4, GroupLinear
from treadle.ir.ops.products import Linear
from treadle.ir.types import bf16, f32
from treadle.passes.capabilities import PRIMITIVES, Capabilities
from treadle.passes.framework.facts import LEGAL, UNPLANNED, Facts
from treadle.passes.framework.rewriting import Refusal, Rewriting, Site, SiteRewrite


@dataclass(frozen=True)
class MultiplyGroups(SiteRewrite[Site]):
    """linear(x, decode(w, to=bf16), bias, to=f32)   -->   group_linear(x, w, bias)        for w in groups of 4 bits

    backend  the backend, which has kernels for some weights

    The two sides are equal up to the rounding of scales in place of numbers, so no certificate is required. Refuses: a
    weight for which the backend has no kernel.
    """

    changes_numbers: ClassVar[bool] = True
    requires: ClassVar[Facts] = frozenset({LEGAL, UNPLANNED})
    backend: Capabilities = PRIMITIVES

    def sites(self, work: Rewriting) -> Iterator[Site]:
        for node in work.walk():
            blocks = _groups(node)
            if blocks is None:
                continue
            reason = self.backend.refuses_groups(blocks)
            if reason is not None:
                work.refuse(self.name, Refusal(reason, node))
                continue
            decoded = node.operands[1]
            assert decoded is not None
            assert decoded.node is not None
            yield Site(node, (decoded.node,))

    def build(self, b: Builder, site: Site) -> Expr:
        blocks = _groups(site.root)
        assert blocks is not None
        x, _, *bias = site.root.operands
        operands = [x, blocks, bias[0] if bias else None]
        encoding = blocks.type.encoding
        assert encoding is not None
        op = GroupLinear(of=encoding)
        return b.expr(b.emit(op, operands, site.root.results[0].name).result)


def _groups(node: Node) -> Value | None:
    """Return the weight in groups of 4 bits that a linear in bf16 multiplies with, or None."""
    if not isinstance(node.op, Linear) or node.op.to is not f32 or node.inputs[0].type.dtype is not bf16:
        return None
    weight = node.operands[1]
    made = None if weight is None else weight.node
    if made is None or not made.op.decodes:
        return None
    encoding = made.inputs[0].type.encoding
    is_of_4 = encoding is not None and encoding.form == GROUPS_OF_4.form and encoding.axis == -1
    return made.inputs[0] if is_of_4 else None
