"""Values that are moved and then rounded are rounded first. The product then rounds its result when it stores it, and
no other op has to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Node, Value
from treadle.ir.operation import Op
from treadle.ir.ops.blocks import EncodedLinear
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.products import Einsum, Linear, MatMul
from treadle.ir.types import f32
from treadle.passes.cleanup.common_subexpressions import CommonSubexpressions
from treadle.passes.framework.facts import LEGAL, UNPLANNED, Facts
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.returned_values import readers_of
from treadle.passes.framework.rewriting import Rewriting, Site, SiteRewrite

_PRODUCTS = (Linear, MatMul, Einsum, EncodedLinear)


@dataclass(frozen=True)
class RoundSooner(SiteRewrite[Site]):
    """y = linear(...)                                   y = cast(linear(...), to=bf16)
    cast(rearrange(slice(y)), to=bf16)       -->         rearrange(slice(y))

    The pass applies to a float32 product if all parts of its result are rounded in this way, and it has no other
    readers.
    """

    requires: ClassVar[Facts] = frozenset({LEGAL, UNPLANNED})

    tidying: ClassVar[Pass | None] = CommonSubexpressions()

    def sites(self, work: Rewriting) -> Iterator[Site]:
        readers = readers_of(work.function)
        for node in work.walk():
            if not isinstance(node.op, Cast) or not node.op.to.is_float:
                continue
            moves = _moves_above(node)
            source = (moves[-1] if moves else node).inputs[0]
            if not moves or source.node is None or not isinstance(source.node.op, _PRODUCTS):
                continue
            if source.type.dtype is f32 and _is_rounded(source, node.op, readers):
                yield Site(node, tuple(moves))

    def build(self, b: Builder, site: Site) -> Expr:
        source = site.nodes[-1].inputs[0]
        made = b.emit(site.root.op, [source], f"{source.name}_{site.root.op.attributes['to']}").result
        for move in reversed(site.nodes):
            made = b.emit(move.op, [made], move.result.name).result
        return b.expr(made)


def _moves_above(node: Node) -> list[Node]:
    """Return the chain of nodes before a node that only move their operands, the nearest first."""
    found: list[Node] = []
    while (above := node.inputs[0].node) is not None and _is_move(above):
        found.append(above)
        node = above
    return found


def _is_move(node: Node) -> bool:
    return node.op.is_view and not isinstance(node.op, Cast)


def _is_rounded(value: Value, op: Op, readers: Mapping[Value, Sequence[Node | None]]) -> bool:
    """Return True if every reader of a value is this cast, or a move whose readers all are."""
    return all(
        node is not None and (node.op == op or (_is_move(node) and _is_rounded(node.result, op, readers)))
        for node in readers.get(value, [None])
    )
