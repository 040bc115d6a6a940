"""Products of two operands in blocks of integers become integer products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.builder import Builder, Expr
from treadle.ir.composites import inline
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.graph import Node, Value
from treadle.ir.operation import Composite
from treadle.ir.ops.blocks import ROWS, STEPS, Encode, EncodedLinear, multiplied_with
from treadle.ir.ops.products import Linear, MatMul, MixedProduct
from treadle.passes.capabilities import PRIMITIVES, Capabilities
from treadle.passes.framework.facts import BEFORE_LOWERING, LEGAL, UNPLANNED, Facts
from treadle.passes.framework.rewriting import Rewriting, Site, SiteRewrite


@dataclass(frozen=True)
class OpenBlockProducts(SiteRewrite[Site]):
    """activated_linear(decode(encode(x)), decode(w), bias)   -->   gelu(linear(decode(encode(x)), decode(w), bias))

    The pass applies to activations that are rounded to 8-bit rows at every call, because a backend's kernel for the
    whole op reads numbers, not blocks.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING

    def sites(self, work: Rewriting) -> Iterator[Site]:
        for node in work.walk(into=True):
            composite = isinstance(node.op, MixedProduct) and isinstance(node.op, Composite)
            if composite and _of(node.operands[0]) in (ROWS, STEPS):
                yield Site(node)

    def build(self, b: Builder, site: Site) -> Sequence[Value]:
        assert isinstance(site.root.op, Composite)
        with b.scoped(site.root.op.name):
            return inline(b, site.root.op, site.root.operands, lowered=True)


@dataclass(frozen=True)
class MultiplyBlocks(SiteRewrite[Site]):
    """linear(decode(x), decode(w), bias)   -->   encoded_linear(x, w, bias)        for x = encode(...)

    matmul(decode(x), decode(w))   -->   encoded_linear(x, rearrange(w, "k n -> n k"))

    backend  the backend, which multiplies rounded values with weights of some encodings as integers

    The two sides are equal up to rounding, so no certificate is required: decoded values are rounded to float32 before
    they are multiplied, integers are not. Products of integers are summed exactly over each block, and then multiplied
    by both scales. Refuses: a weight in an encoding for which x is not rounded, or with blocks along another axis; the
    weight and x are then decoded.
    """

    changes_numbers: ClassVar[bool] = True
    requires: ClassVar[Facts] = frozenset({LEGAL, UNPLANNED})
    backend: Capabilities = PRIMITIVES

    def sites(self, work: Rewriting) -> Iterator[Site]:
        for node in work.walk():
            x, w, axis = node.operands[0] if node.operands else None, *_weight(node)
            blocks = None if w is None else _decoded(w)
            encoding = None if blocks is None else blocks.type.encoding
            rounded = _of(x)
            if rounded is None or w is None or encoding is None:
                continue
            if (
                encoding.axis % 2 != axis
                or len(w.type.shape) != 2
                or rounded not in multiplied_with(encoding.along(-1))
            ):
                continue
            if not self.backend.takes(encoding.along(-1)):
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
        of = rows.value.type.encoding
        encodings = {"of": of, "rows": ROWS if of == ROWS else x.type.encoding}
        made: Expr = b.apply(EncodedLinear, *operands, name=site.root.results[0].name, **encodings)
        return made


def _weight(node: Node) -> tuple[Value | None, int]:
    """Return the matrix of a product of two operands, and its summed axis."""
    if isinstance(node.op, Linear) and node.op.to is None:
        return node.operands[1], 1
    if isinstance(node.op, MatMul) and node.op.to is None:
        return node.operands[1], 0
    return None, 0


def _decoded(value: Value | None) -> Value | None:
    """Return the blocks from which a value is decoded, or None if it is not decoded."""
    node = None if value is None else value.node
    return node.inputs[0] if node is not None and node.op.decodes else None


def _of(value: Value | None) -> Encoding | None:
    """Return the encoding of a value, if the value is decoded from blocks that this function encodes at every call,
    else None.
    """
    blocks = _decoded(value)
    made = None if blocks is None else blocks.node
    return None if made is None or blocks is None or not isinstance(made.op, Encode) else blocks.type.encoding
