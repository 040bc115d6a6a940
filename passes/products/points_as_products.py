"""Convolutions with kernel size 1 as products, so that passes on products apply, and their axis can be stepped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Node
from treadle.ir.ops.convolution import Conv
from treadle.ir.ops.shapes import Rearrange
from treadle.passes.cleanup.canonicalize import TidyLayout
from treadle.passes.framework.facts import BEFORE_LOWERING, Facts
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.rewriting import Refusal, Rewriting, Site, SiteRewrite


@dataclass(frozen=True)
class PointsAsProducts(SiteRewrite[Site]):
    """conv(rearrange(x), w, bias)   -->   rearrange(linear(x, rearrange(w), bias)), for kernel size 1 along one axis

    The feed-forward layers of SASRec and Informer, and the modules of a Conformer, transpose x [b, n, c] to [b, c, n]
    and back around such convolutions. An activation before a convolution is applied to the transposed rows, so that it
    follows the product before it.

    Refuses: a convolution without a rearrange before or after it, since the product would need two; groups.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING
    tidying: ClassVar[Pass | None] = TidyLayout()

    def sites(self, work: Rewriting) -> Iterator[Site]:
        for node in work.walk():
            if not isinstance(node.op, Conv) or not _takes_points(node):
                continue
            activations, before = [], node.inputs[0].node
            while before is not None and before.is_elementwise and len(before.operands) == 1:
                if len(work.readers(before.result)) > 1:
                    break
                activations.append(before)
                before = before.inputs[0].node
            readers = work.readers(node.result)
            after = readers[0] if len(readers) == 1 else None
            if any(each is not None and isinstance(each.op, Rearrange) for each in (before, after)):
                yield Site(node, tuple(activations))
            else:
                work.refuse(self.name, Refusal("neither its operand nor its result is rearranged", node))

    def build(self, b: Builder, site: Site) -> Expr:
        _, weight, bias = (None if value is None else b.expr(value) for value in site.root.operands)
        assert weight is not None
        first = site.nodes[-1] if site.nodes else site.root
        rows: Expr = b.rearrange(b.expr(first.inputs[0]), pattern="b c n -> b n c")
        for node in reversed(site.nodes):
            rows = b.apply(type(node.op), rows, name=node.result.name, **node.op.attributes)
        y = b.linear(rows, b.rearrange(weight, pattern="o c 1 -> o c"), bias)
        return b.rearrange(y, pattern="b n o -> b o n")


def _takes_points(node: Node) -> bool:
    """Return True if a convolution along one axis reads one element for each of its results."""
    op, (x, weight) = node.op, node.inputs[:2]
    assert isinstance(op, Conv)
    if x.type.rank != 3 or op.groups != 1 or weight.type.shape[2].constant != 1:
        return False
    ((before, after, stride, _),) = op.spatial(1)
    return (before, after, stride) == (0, 0, 1)
