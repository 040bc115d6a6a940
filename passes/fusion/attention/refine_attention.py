"""Refinement of existing attention ops: replace mask tensors by mask terms (causal, window, padding), and repeated keys
and values by grouped-query heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from treadle.ir.attention.attention_terms import BiasTerm, BooleanMask, Causal, Segments, TensorBias, Term, Window
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.ops.attention import Attention, AttentionWithProbabilities
from treadle.passes.framework.facts import BEFORE_LOWERING, Facts
from treadle.passes.framework.rewriting import Refusal, Rewriting, Site, SiteRewrite
from treadle.passes.fusion.attention.core import Added, Chosen, Mismatch, Placed, Scores, Values, Weighting
from treadle.passes.fusion.attention.plan import AttentionPlan
from treadle.passes.fusion.attention.roles import Fused, Said, WholeOperand
from treadle.passes.fusion.axis_tracking import Axes, Layout


@dataclass(frozen=True)
class RefineAttention(SiteRewrite["_Refined"]):
    """attention(q, k, v, mask(b s t))   -->   attention(q, k, v, causal, mask(b t))        for a mask that is both

     1. a mask that is a conjunction  -->  its parts: causal, window, padding, segments, and for the rest masks with as
        few axes as possible;  a part that is true everywhere  -->  nothing
     2. a bias  -->  the parts of a sum: t5_relative, alibi, and a mask for a part that is 0 or -inf;  a bias that is 0
        or a large negative number  -->  a mask, if every row is sure to keep a key under all masks
     3. keys and values repeated for several query heads  -->  fewer heads of keys and values
     4. a number by which q or k are multiplied  -->  the scale

    The pass is for ops that frontends import: ONNX's Attention, PyTorch's scaled_dot_product_attention, a layer whose
    mask is a tensor. Tensors are analyzed as in FuseAttention. The op keeps its dtype and its other terms.

    Refuses, with a note: a triangle or a band that is not a term; a large negative number that is added if a row may be
    without keys, which is an average over all of them; an addend that may be inf; queries that do not begin at position
    0. A mask that is computed in another way is a near miss; a mask that is an input stays unchanged.

    zero_empty_rows   True if a row without keys may always give zeros; every mask then becomes a mask, not an addend
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING

    zero_empty_rows: bool = False

    def sites(self, work: Rewriting) -> Iterator[_Refined]:
        by_offset: dict[Value, np.ndarray[Any, Any] | None] = {}
        if not any(_is_attention(node) for node in work.function.nodes):
            return
        for node in work.walk():
            if not _is_attention(node):
                continue
            op: Any = node.op
            if op.begins_later:
                work.refuse(self.name, Refusal("its queries do not begin at position 0", node))
                continue
            try:
                plan = self._plan(node, work.graph, by_offset, work.log.differentiated)
            except Mismatch as mismatch:
                work.refuse(self.name, replace(mismatch.refusal, matched=()))
                continue
            for note in plan.chain.notes:
                work.refuse(self.name, Refusal(f"the mask {note.reason}", note.node, note.hint))
            if not plan.chain.notes:
                self._tell_of_tensors(work, plan)
            gain = _gain(plan, node)
            if gain:
                yield _Refined(root=node, reason=gain, plan=plan)

    def build(self, b: Builder, site: _Refined) -> list[Expr] | Refusal:
        return site.plan.build(b)

    def _plan(
        self, node: Node, graph: Graph, by_offset: dict[Value, np.ndarray[Any, Any] | None], trained: bool
    ) -> AttentionPlan:
        """Return the plan of the op's replacement. If keys were repeated in an order in which heads do not share them,
        they stay repeated.
        """
        for grouped in (True, False):
            axes = Axes()
            op = _Op.of(axes, node, grouped)
            found, zeros = (op.weighting, op.values, op.scores), self.zero_empty_rows
            plan = AttentionPlan(axes, op.rows, graph.symbols, *found, zeros, by_offset, op.said, trained=trained)
            if plan.roles.atoms("h") == axes.flat(op.rows[1]):
                return plan
        return plan

    def _tell_of_tensors(self, work: Rewriting, plan: AttentionPlan) -> None:
        """Log a near miss for each computed mask over queries and keys that is not a term."""
        for fused in plan.chain.masks:
            if not isinstance(fused.term, BooleanMask) or not {"s", "t"} <= set(fused.term.axes.split()):
                continue
            made_by = fused.operands[0].placed.value.node
            if made_by is not None:
                none = f"{made_by.op.name} is not causal, a window, padding or segments"
                work.near_miss(self.name, made_by, made_by, f"the mask stays a tensor: {none}")


@dataclass(frozen=True, eq=False, kw_only=True)
class _Refined(Site):
    """An attention op, and the plan of its replacement."""

    plan: AttentionPlan


def _is_attention(node: Node) -> bool:
    return isinstance(node.op, (Attention, AttentionWithProbabilities))


# -- an op in the plan's form ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Op:
    """An attention op, described by the data structures for attention in primitives.

    rows   the layout of the scores: b, h, s, t
    """

    rows: Layout
    weighting: Weighting
    values: Values
    scores: Scores
    said: Said

    @staticmethod
    def of(axes: Axes, node: Node, grouped: bool) -> _Op:
        op: Any = node.op
        q, k, v, *given = node.inputs
        b, s, t, d, e = (axes.new(x.type.shape[i]) for x, i in ((q, 0), (q, 2), (k, 2), (q, 3), (v, 3)))
        g = axes.new(k.type.shape[1])
        shared = q.type.shape[1].divide(k.type.shape[1])
        h = (*g, *axes.new(shared)) if shared is not None else g
        rows = (b, h, s, t)
        by_name = dict(zip("bhst", rows, strict=True))
        added: list[Added] = []
        chosen: list[Chosen] = []
        said: list[Fused] = []
        rest = iter(given)
        for term in op.terms:
            operands = [next(rest) for _ in term.operands]
            if not isinstance(term, BooleanMask | TensorBias):
                said.append(_as_said(term, operands))
                continue
            placed = Placed(operands[0], tuple(by_name[axis] for axis in term.axes.split()))
            if isinstance(term, BooleanMask):
                chosen.append(Chosen(placed, True, -np.inf, node))
            else:
                added.append(Added(placed, 1.0, node))
        terms: tuple[Added | Chosen, ...] = (*added, *chosen)  # a mask removes the key whatever the addends are
        scale = op.scale_for(q.type.shape[3].constant or 1)
        return _Op(
            rows,
            Weighting(node, node.results[0], 3, True, (node,)),
            Values(
                *(node, Placed(v, (b, g, t, e)), (b, h, s, e), True, (node,)),
                returned=tuple(Placed(x, rows) for x in node.results[1:]),
            ),
            Scores(node, Placed(q, (b, h, s, d)), Placed(k, (b, g, t, d)), d, scale, op.softcap, terms, (node,)),
            Said(q.type.dtype, op.scale, tuple(said), (h,) if grouped else ()),
        )


def _as_said(term: Term, operands: Sequence[Value]) -> Fused:
    """Return a term by position with its operands, and the facts known about the keys that it keeps."""
    own = isinstance(term, Segments) and operands[0] is operands[1]
    return Fused(
        term,
        tuple(WholeOperand(Placed(x, ()), "") for x in operands),
        diagonal=isinstance(term, Causal | Window) or own,
        first=isinstance(term, Causal),
    )


# -- the gain ----------------------------------------------------------------------------------------------------------


def _gain(plan: AttentionPlan, node: Node) -> str:
    """Return a description of the improvement, or an empty string if there is none."""
    op: Any = node.op
    heads, fewer = node.inputs[1].type.shape[1], plan.axes.size(plan.g)
    terms = [f.term for f in (*plan.chain.masks, *plan.chain.biases)]
    changes = []
    if _weight(terms) < _weight(op.terms):
        was, now = (Counter(map(str, each)) for each in (op.terms, terms))
        changes.append(f"{', '.join(was - now)} read as {', '.join(now - was) or 'true everywhere'}")
    if fewer != heads:
        changes.append(f"{fewer} heads of keys and values instead of {heads}")
    if plan.q.factor * plan.k.factor != 1.0:
        changes.append(f"scale {plan.scale:g}, which includes the factors of queries and keys")
    return "; ".join(changes)


def _weight(terms: Sequence[Term]) -> tuple[int, list[tuple[int, bool]]]:
    """Return a sort key for terms. It is smaller for more terms by position. If these are equal, it is smaller for
    tensors of fewer axes, compared from the largest on, and for tensors of truth values.
    """
    tensors = [(len(t.axes.split()), isinstance(t, BiasTerm)) for t in terms if isinstance(t, BooleanMask | TensorBias)]
    return len(tensors) - len(terms), sorted(tensors, reverse=True)
