"""Blocks are moved as blocks and decoded last: encoded weights that are joined or sliced stay encoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.analysis.weight_only import is_made_of_weights
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.graph import Node, Value
from treadle.ir.ops.blocks import Decode
from treadle.ir.ops.elementwise import Cast
from treadle.passes.framework.facts import LEGAL, UNPLANNED, Facts
from treadle.passes.framework.rewriting import Refusal, Rewriting, Site, SiteRewrite


@dataclass(frozen=True)
class DecodeLast(SiteRewrite[Site]):
    """concat(decode(a), decode(b), axis=0)   -->   decode(concat(a, b, axis=0))        for weights a and b

    The same holds for slice, rearrange and other ops that move whole lines of blocks. Readers of the result may then
    read blocks; if no reader does, the result is decoded once in either case.

    A collective is not changed: it moves the bytes that its plan specifies, and its result is not a weight.

    gathered  True if lines that computed indices select are decoded after they are selected:
              embedding(decode(w), i)   -->   decode(embedding(w, i))

    Refuses: weights in several encodings; parts that are taken along the axis of the blocks.
    """

    requires: ClassVar[Facts] = frozenset({LEGAL, UNPLANNED})
    gathered: bool = False

    def sites(self, work: Rewriting) -> Iterator[Site]:
        for node in work.walk():
            if not node.op.moves_blocks or not node.op.only_moves or len(node.results) != 1:
                continue
            if node.op.meets_ranks:  # it moves the planned bytes, and its result is decoded at every call
                continue
            found = [v for v in node.inputs if _blocks(v) is not None]
            moved = [v for v in node.inputs if not (self.gathered and v.type.dtype.is_int)]
            if not found or not all(map(is_made_of_weights, moved)):
                continue
            try:
                node.op.infer([None if v is None else (_blocks(v) or v).type for v in node.operands])
            except RuleError as error:
                work.refuse(self.name, Refusal(error.what.removeprefix(f"{node.op.name}: "), node))
                continue
            yield Site(node, tuple(dict.fromkeys(v.node for v in found if v.node is not None)))

    def build(self, b: Builder, site: Site) -> Expr:
        name = site.root.results[0].name
        moved = b.emit(site.root.op, [v if v is None else _blocks(v) or v for v in site.root.operands], name)
        encoding = moved.result.type.encoding
        assert encoding is not None
        (decoded, *_) = site.nodes  # all joined values have one dtype
        return b.expr(b.emit(Decode(of=encoding, to=decoded.op.attributes["to"]), [moved.result], name).result)


@dataclass(frozen=True)
class DecodeNarrow(SiteRewrite[Site]):
    """cast(decode(w), to=bf16)   -->   decode(w, to=bf16)        for a weight w

    Readers of the result may then read the blocks of w.
    """

    requires: ClassVar[Facts] = frozenset({LEGAL, UNPLANNED})

    def sites(self, work: Rewriting) -> Iterator[Site]:
        for node in work.walk():
            if isinstance(node.op, Cast) and is_made_of_weights(node.inputs[0]) and node.op.to.is_float:
                made = node.inputs[0].node
                if made is not None and isinstance(made.op, Decode) and made.op.to is None:
                    yield Site(node, (made,))

    def build(self, b: Builder, site: Site) -> Expr:
        (decoded,) = site.nodes
        op = Decode(of=decoded.op.attributes["of"], to=site.root.op.attributes["to"])
        return b.expr(b.emit(op, decoded.operands, site.root.results[0].name).result)


def _blocks(value: Value) -> Value | None:
    """Return the blocks from which a value was decoded, or None if it was not decoded."""
    node: Node | None = value.node
    return node.inputs[0] if node is not None and node.op.decodes else None
