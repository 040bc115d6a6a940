"""Fusion of a residual addition and the norm after it into one op."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Node
from treadle.ir.ops.arithmetic import Add
from treadle.ir.ops.elementwise import Cast
from treadle.passes.framework.facts import BEFORE_LOWERING, UNMERGED, Facts
from treadle.passes.framework.rewriting import Refusal, Rewriting, Site, SiteRewrite

FUSED: Mapping[str, str] = {"layer_norm": "add_layer_norm", "rms_norm": "add_rms_norm"}
"""The fused op of each norm of a sum."""


@dataclass(frozen=True)
class FuseResidualNorm(SiteRewrite["_Residual"]):
    """layer_norm(x + residual, w, c)   -->   add_layer_norm(x, residual, w, c)        rms_norm, likewise

    The op has two results, the norm and the sum. Other readers of the sum (the residual stream of a model that
    normalizes before its layers) read the second result. The op is placed at the norm's position, or at the sum's if
    the sum is read before the norm.

    Refuses: a sum that broadcasts; a weight or a constant as an addend (a bias); a sum that is cast before the norm; a
    second norm of one sum; a weight of the norm that is computed after the sum is first read.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING
    ends: ClassVar[Facts] = frozenset({UNMERGED})

    def sites(self, work: Rewriting) -> Iterator[_Residual]:
        found = _Residuals(work, self.name)
        return iter(sorted(found.sites(), key=lambda site: found.places[site.stands_at]))

    def build(self, b: Builder, site: _Residual) -> tuple[Expr, ...]:
        total, norm = site.total, site.root
        operands = [v if v is None else b.expr(v) for v in (*total.operands, *norm.operands[1:])]
        made: tuple[Expr, ...] = b.apply(FUSED[norm.op.name], *operands, **norm.op.attributes)
        for old, new in zip(site.replaced, made, strict=True):
            new.value.name = old.name
        return made


@dataclass(frozen=True, eq=False, kw_only=True)
class _Residual(Site):
    """A norm, which is the root of the site, and the sum that it normalizes."""

    total: Node


def _sum_before(norm: Node) -> Node | None:
    """Return the sum that a norm normalizes, with or without a cast between them; None if there is none."""
    node = norm.inputs[0].node if norm.op.name in FUSED else None
    if node is not None and isinstance(node.op, Cast):
        node = node.inputs[0].node
    return node if node is not None and isinstance(node.op, Add) else None


class _Residuals:
    """The sums and norms of one function, with their positions."""

    def __init__(self, work: Rewriting, rule: str) -> None:
        self.work, self.rule = work, rule
        self.places = {node: place for place, node in enumerate(work.function.nodes)}
        self.norms: dict[Node, Node] = {}
        """The norm of each fused sum."""

    def sites(self) -> Iterator[_Residual]:
        for norm in self.work.function.nodes:
            total = _sum_before(norm)
            if total is None:
                continue
            refusal = self._why_not(total, norm)
            if refusal is not None:
                self.work.refuse(self.rule, refusal, total, (total, norm))
                continue
            self.norms[total] = norm
            early = self._read_before(total, norm) is not None
            yield _Residual(
                root=norm,
                total=total,
                nodes=(total,),
                replaced=(norm.result, total.result),
                place=total if early else None,
                rule=FUSED[norm.op.name].replace("_", "-"),
            )

    def _why_not(self, total: Node, norm: Node) -> Refusal | None:
        given = norm.inputs[0]
        for value in total.inputs:
            if value.weight is not None or value.kind == "constant":
                what = "a constant" if value.kind == "constant" else "a weight"
                return Refusal(f"the addend is {what}, {value.type}, not a residual", total)
        for value in total.inputs:
            if value.type.shape != total.result.type.shape:
                return Refusal(f"the sum broadcasts {value.type} to {total.result.type}", total)
        if given is not total.result:
            cast = f"the sum is cast from {total.result.type.dtype} to {given.type.dtype} before it is normalized"
            return Refusal(cast, given.node)
        other = self.norms.get(total)
        if other is not None:
            return Refusal(f"the sum is already fused with another {other.op.name}{_line(other)}", norm)
        reader = self._read_before(total, norm)
        missing = [v for v in norm.inputs[1:] if v.node is not None and self._place(v.node) > self.places[total]]
        if reader is not None and missing:
            name = next(n for n, v in zip(norm.op.operands, norm.operands, strict=True) if v is missing[0])
            return Refusal(f"the sum is read, by {reader.op.name}{_line(reader)}, before {name} is computed", norm)
        return None

    def _place(self, node: Node) -> int:
        """Return the position of a node, or of the fused op that a sum becomes part of."""
        norm = self.norms.get(node)
        return self.places[node if norm is None or self._read_before(node, norm) is not None else norm]

    def _read_before(self, total: Node, norm: Node) -> Node | None:
        """Return the first reader of the sum before the norm, or None."""
        readers = [node for node in self.work.readers(total.result) if node is not None]
        return next((node for node in readers if self.places[node] < self.places[norm]), None)


def _line(node: Node) -> str:
    return f" ({node.source})" if node.source else ""
