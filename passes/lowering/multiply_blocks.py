"""Products of two sides in 8-bit rows become products of integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.builder import Builder, Expr
from treadle.ir.composites import inline
from treadle.ir.graph import Node, Value
from treadle.ir.operation import Composite
from treadle.ir.ops.blocks import ROWS, Encode, EncodedLinear
from treadle.ir.ops.products import Linear, MatMul, MixedProduct
from treadle.passes.framework.rewriting import Rewriting, Site, SiteRewrite


@dataclass(frozen=True)
class OpenBlockProducts(SiteRewrite[Site]):
    """activated_linear(decode(encode(x)), decode(w), bias)   -->   gelu(linear(decode(encode(x)), decode(w), bias))

    for what is rounded to 8-bit rows at every call: a backend that has a kernel for the whole has it for numbers.
    """

    def sites(self, work: Rewriting) -> Iterator[Site]:
        for node in work.walk(into=True):
            if isinstance(node.op, MixedProduct) and isinstance(node.op, Composite) and _rows(node.operands[0]):
                yield Site(node)

    def build(self, b: Builder, site: Site) -> Sequence[Value]:
        assert isinstance(site.root.op, Composite)
        with b.scoped(site.root.op.name):
            return inline(b, site.root.op, site.root.operands, lowered=True)


@dataclass(frozen=True)
class MultiplyBlocks(SiteRewrite[Site]):
    """linear(decode(x), decode(w), bias)   -->   encoded_linear(x, w, bias)        for x = encode(...) as int8_rows

    matmul(decode(x), decode(w))   -->   encoded_linear(x, rearrange(w, "k n -> n k"))

    The same up to rounding, so that no certificate is asked for: what is decoded is rounded to float32 before it is
    multiplied, whole numbers are not. Products of these are summed exactly, and multiplied by both scales at the end.
    Refuses: a weight in another encoding, or with blocks along another axis, which is decoded, as is x.
    """

    changes_numbers: ClassVar[bool] = True

    def sites(self, work: Rewriting) -> Iterator[Site]:
        for node in work.walk():
            x, w, axis = node.operands[0] if node.operands else None, *_weight(node)
            blocks = None if w is None else _decoded(w)
            encoding = None if blocks is None else blocks.type.encoding
            if not _rows(x) or w is None or encoding is None:
                continue
            if encoding.along(-1) != ROWS or encoding.axis % 2 != axis or len(w.type.shape) != 2:
                continue
            yield Site(node, tuple([v.node for v in (x, w) if v is not None and v.node is not None]))

    def build(self, b: Builder, site: Site) -> Expr:
        x, w = (_decoded(v) for v in site.root.operands[:2])
        assert x is not None
        assert w is not None
        bias = site.root.operands[2] if len(site.root.operands) > 2 else None
        rows = b.expr(w)
        if isinstance(site.root.op, MatMul):
            rows = b.rearrange(rows, pattern="k n -> n k")
        operands = (b.expr(x), rows, None if bias is None else b.expr(bias))
        made: Expr = b.apply(EncodedLinear, *operands, name=site.root.results[0].name)
        return made


def _weight(node: Node) -> tuple[Value | None, int]:
    """The matrix of a product of two, and which axis of it is summed over."""
    if isinstance(node.op, Linear) and node.op.to is None:
        return node.operands[1], 1
    if isinstance(node.op, MatMul) and node.op.to is None:
        return node.operands[1], 0
    return None, 0


def _decoded(value: Value | None) -> Value | None:
    """The blocks that a value is decoded from."""
    node = None if value is None else value.node
    return node.inputs[0] if node is not None and node.op.decodes else None


def _rows(value: Value | None) -> bool:
    """Whether a value is what rows of 8 bits decode to that are made in this function at every call."""
    blocks = _decoded(value)
    made = None if blocks is None else blocks.node
    return made is not None and isinstance(made.op, Encode) and blocks is not None and blocks.type.encoding == ROWS
