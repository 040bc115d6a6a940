"""Projections of one value, such as an attention's query, key and value, as one product whose result is sliced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Function, Node, Value
from treadle.ir.operation import Op
from treadle.ir.ops.arithmetic import Add
from treadle.ir.ops.merged_products import MOST_PROJECTIONS
from treadle.ir.ops.products import Linear, MatMul
from treadle.passes.framework.facts import BEFORE_LOWERING, UNMERGED, Facts
from treadle.passes.framework.rewriting import Refusal, Rewriting, Site, SiteRewrite


@dataclass(frozen=True)
class MergeProjections(SiteRewrite["_Merged"]):
    """q = linear(x, wq, bq); k = linear(x, wk, bk); v = linear(x, wv)
    -->   q, k, v = projections(x, wq, wk, wv, bq, bk, none)

    The same holds for matmul(x, w) + b, with weights in layout [in, out]. x is read once, and one product with many
    columns keeps every core busy, which three narrow products do not. At run time there is one product with a joined
    weight, which is computed once, when weights are bound (`treadle.backends.weight_preparation`). `Decompose` is the
    inverse.

    Refuses: a weight with other readers, which would be stored twice; a weight in another encoding than the others; a
    constant in place of a weight; a bias that is computed, perhaps after the first of the products. Skips products with
    a fused activation or gate: their results are stored activated, and slicing them would read them again.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING
    ends: ClassVar[Facts] = frozenset({UNMERGED})

    def sites(self, work: Rewriting) -> Iterator[_Merged]:
        function = work.function
        projections = find_projections(function)
        uses = function.uses() if projections else {}
        weights = {part.product: tuple(p.weight for p in group) for group in projections for part in group}
        for group in projections:
            alone = []
            for part in group:
                reason = _why_not(part, uses, function, weights)
                if reason:
                    work.refuse(self.name, Refusal(reason, part.product))
                else:
                    alone.append(part)
            for parts in self._joinable(work, alone):
                for start in range(0, len(parts) - 1, MOST_PROJECTIONS):
                    merged = parts[start : start + MOST_PROJECTIONS]
                    if len(merged) > 1:
                        yield _Merged.of(merged)

    def _joinable(self, work: Rewriting, parts: Sequence[Projection]) -> Iterator[Sequence[Projection]]:
        """Yield the parts, grouped by the encoding of their weights: weights in different block forms are not
        joined.
        """
        groups: dict[str, list[Projection]] = {}
        for part in parts:
            groups.setdefault(_encoding(part), []).append(part)
        for encoding, group in groups.items():
            if len(group) == 1 and len(parts) > 1:
                others = " and ".join(other for other in groups if other != encoding)
                reason = f"its weight is stored as {encoding}, but the others as {others}: their blocks are not joined"
                work.refuse(self.name, Refusal(reason, group[0].product))
            yield group

    def build(self, b: Builder, site: _Merged) -> tuple[Expr, ...]:
        first = site.root
        weights = [_read_early(b, part.weight) for part in site.parts]
        biases = [None if part.bias is None else b.expr(part.bias) for part in site.parts]
        weight_axes = "n k" if isinstance(first.op, Linear) else "k n"
        b.scope = _shared_scope([part.product.scope for part in site.parts])
        x = b.expr(first.inputs[0])
        given = {"count": len(weights), "weight_axes": weight_axes, "to": first.op.attributes["to"]}
        made: tuple[Expr, ...] = b.projections(x, *weights, *biases, **given)
        for part, result in zip(site.parts, made, strict=True):
            result.value.name = part.result.name
        return made

    def record(self, work: Rewriting, site: _Merged, made: Sequence[Node]) -> None:
        for part in site.parts:
            bias = [] if part.result.node is None else [part.result.node]
            work.log.match(self.name, work.function, part.product, bias, made)


@dataclass(frozen=True)
class Projection:
    """A product of x with a weight, and a bias.

    product  the node that multiplies
    result   the value after the bias is added
    """

    product: Node
    result: Value
    weight: Value
    bias: Value | None


@dataclass(frozen=True, eq=False, kw_only=True)
class _Merged(Site):
    """Projections that become one product, at the position of the first of them."""

    parts: Sequence[Projection]

    @staticmethod
    def of(parts: Sequence[Projection]) -> _Merged:
        nodes = tuple(n for part in parts for n in (part.product, part.result.node) if n is not None)
        return _Merged(root=parts[0].product, nodes=nodes, replaced=tuple(p.result for p in parts), parts=parts)


def find_projections(function: Function) -> list[list[Projection]]:
    """Return groups of two or more products of one value with weights, of one kind, in program order."""
    uses = function.uses()
    groups: dict[tuple[Value, Op], list[Projection]] = {}
    for node in function.nodes:
        if isinstance(node.op, (Linear, MatMul)):
            x, weight = node.inputs[:2]
            known = weight.weight is not None or weight.kind == "constant"
            if known and weight.type.rank == 2 and weight.type.static_shape:
                groups.setdefault((x, node.op), []).append(_with_bias(node, uses, function))
    return [group for group in groups.values() if len(group) > 1]


def _why_not(
    part: Projection,
    uses: dict[Value, list[tuple[Node, int]]],
    function: Function,
    weights: Mapping[Node, tuple[Value, ...]],
) -> str:
    """Return the reason why a product cannot be a part of a larger product, or an empty string if it can.

    If layers share weights (ALBERT), products of other values with the same weights also read the joined weight.
    """
    others = [n for n, _ in uses[part.weight] if n is not part.product and weights.get(n) != weights[part.product]]
    if others:
        return f"its weight is read by {others[0].op.name} too, and would be stored twice"
    if part.weight in function.outputs.values():
        return "its weight is an output as well, and would be stored twice"
    if part.weight.kind == "constant":
        return "its weight is a constant, and would be joined in every run"
    if part.bias is not None and part.bias.kind == "result" and part.bias.weight is None:
        return "its bias is computed"
    return ""


def _read_early(b: Builder, weight: Value) -> Expr:
    """Return a weight for use at the first of the products. If the weight is decoded later, it is decoded there as
    well.
    """
    node = weight.node
    if node is None:
        return b.expr(weight)
    with b.placed_as(node):
        return b.expr(b.emit(node.op, node.operands, name=weight.name).result)


def _encoding(part: Projection) -> str:
    weight = part.weight.weight
    return str((weight.type.encoding if weight is not None else None) or part.weight.type.dtype)


def _with_bias(node: Node, uses: dict[Value, list[tuple[Node, int]]], function: Function) -> Projection:
    """Return a product with the vector that is added to it, if the product has no other reader."""
    if len(node.inputs) > 2:
        return Projection(node, node.result, node.inputs[1], node.inputs[2])
    readers = uses.get(node.result, [])
    if len(readers) == 1 and isinstance(readers[0][0].op, Add) and node.result not in function.outputs.values():
        add, position = readers[0]
        bias = add.inputs[1 - position]
        known = bias.weight is not None or bias.kind == "constant"
        fits = bias.type.shape == node.result.type.shape[-1:] and known
        if fits and add.result.type == node.result.type:
            return Projection(node, add.result, node.inputs[1], bias)
    return Projection(node, node.result, node.inputs[1], None)


def _shared_scope(scopes: Sequence[str]) -> str:
    """Return the scope around all of these: attn for attn.q, attn.k and attn.v."""
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*(scope.split(".") for scope in scopes), strict=False))
    return ".".join(parts[0] for parts in shared)
