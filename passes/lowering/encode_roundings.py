"""Values that a quantizer rounds to 256 steps are encoded, for their products with weights in 8-bit rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Node, Value
from treadle.ir.ops.blocks import ROWS, STEPS, Decode, Encode
from treadle.ir.ops.products import MixedProduct
from treadle.ir.ops.rounding import FakeQuantize
from treadle.ir.types import f32
from treadle.passes.framework.facts import BEFORE_LOWERING, Facts
from treadle.passes.framework.rewriting import Rewriting, Site, SiteRewrite


@dataclass(frozen=True)
class EncodeRoundings(SiteRewrite[Site]):
    """linear(fake_quantize(x, scale, zero), decode(w))   -->   linear(decode(encode(x, scale, zero)), decode(w))

    The pass applies if w is in 8-bit rows, and the steps are of an 8-bit integer. Both sides have the same numbers, in
    a form whose products `MultiplyBlocks` computes on integers. All readers of the rounded value read the decoded one.

    Refuses: a scale per channel of x; a product of which another matrix is not in 8-bit rows.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING
    changes_numbers: ClassVar[bool] = True
    """No certificate is required: the two sides are equal for zero points that are integers, and certificates draw any
    numbers.
    """

    def sites(self, work: Rewriting) -> Iterator[Site]:
        uses = work.function.uses()
        for node in work.walk():
            if (
                isinstance(node.op, FakeQuantize)
                and _fits(node)
                and any(at == 0 and _multiplies_rows(reader) for reader, at in uses.get(node.result, ()))
            ):
                yield Site(node)

    def build(self, b: Builder, site: Site) -> Expr:
        x, scale, zero = (b.expr(v) for v in site.root.inputs)
        assert isinstance(site.root.op, FakeQuantize)
        if site.root.op.least:
            zero = zero - float(site.root.op.least)
        short = site.root.result.name
        held = b.apply(Encode, x, None, scale, zero, to=STEPS, name=f"{short}_rows")
        made: Expr = b.apply(Decode, held, of=STEPS, name=short)
        return made


def _fits(node: Node) -> bool:
    """Return True if a rounding is to the steps of an 8-bit integer, with one scale for all rows of constant length."""
    assert isinstance(node.op, FakeQuantize)
    x, scale, zero = node.inputs
    whole = (node.op.least, node.op.greatest) in ((-128, 127), (0, 255))
    rows = x.type.rank > 0 and x.type.shape[-1].constant is not None and x.type.dtype is f32
    return whole and rows and scale.type.rank == zero.type.rank == 0


def _multiplies_rows(reader: Node) -> bool:
    """Return True if a node multiplies its first operand with weights in 8-bit rows alone."""
    if not isinstance(reader.op, MixedProduct):
        return False
    matrices = [reader.operands[i] for i in reader.op.multiplies(len(reader.operands))]
    return bool(matrices) and all(v is not None and _in_rows(v) for v in matrices)


def _in_rows(value: Value) -> bool:
    """Return True if a matrix is decoded from 8-bit rows, and at most moved."""
    node = value.node
    if node is None:
        return False
    if node.op.decodes:
        encoding = node.inputs[0].type.encoding
        return encoding is not None and encoding.along(-1) == ROWS
    return node.op.only_moves and bool(node.inputs) and all(map(_in_rows, node.inputs))
