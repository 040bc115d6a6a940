"""Fusion of attention written in primitives, in any layout and with any masks, into one op."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Node, Value
from treadle.ir.ops.parts import Concat
from treadle.passes.cleanup.canonicalize import TidyLayout
from treadle.passes.framework.facts import BEFORE_LOWERING, Facts
from treadle.passes.framework.returned_values import ReturnedValues
from treadle.passes.framework.rewriting import Refusal, Rewriting, Site, SiteRewrite
from treadle.passes.fusion.attention.core import Mismatch, Values, Weighting
from treadle.passes.fusion.attention.origins import is_weight
from treadle.passes.fusion.attention.plan import AttentionPlan
from treadle.passes.fusion.attention.probabilities import follow_probabilities, softmax_at
from treadle.passes.fusion.attention.scores import find_scores
from treadle.passes.fusion.axis_tracking import Axes, Layout


@dataclass(frozen=True)
class FuseAttention(SiteRewrite["_Attention"]):
    """softmax(softcap(scale q k^T) + biases, masked) v   -->   attention(q, k, v, terms, scale, softcap)
    p = softmax(...); return p v, p                    -->   attention_with_probabilities(q, k, v, ...)

     1. any layout of q, k, v, the scores and the result: axes are tracked through rearrange and expand
     2. keys and values repeated for several query heads  -->  fewer heads of keys and values
     3. scale after the product, or on q, on k or on both; x / c and -x; cap * tanh(x / cap)
     4. where(mask, scores, -inf), where(mask, scores, -1e9), scores + where(mask, 0, -inf)  -->  masks
     5. conditions by position  -->  causal, window, padding, segments;  table[bucket(j - i)]  -->  t5_relative;
        slopes[h] (j - i)  -->  alibi;  every other condition or addend  -->  mask(axes), bias(axes)
     6. softmax, or a softmax that returns zeros if every score is -inf
     7. probabilities that are also outputs of the model, at most moved or cast, also through a block's calls

    The two sides are equal for all finite inputs and weights, including rows in which every key is masked. For such a
    row, the left side is NaN (-inf and a plain softmax), zeros (-inf, guarded) or an average over all keys (a large
    negative number); attention gives zeros. So a mask becomes a term only if a row always keeps a key (causal: its own)
    or if the left side gives zeros. A large negative number stays an addend, and a `where` restores NaN. A fill after
    other masks and biases overrides them, as in the graph (`treadle.passes.fusion.attention.chain`). Scores are assumed
    to be far smaller than a mask's number.

    If the probabilities are read inside the model (averaged, multiplied, dropped out), the site is not fused, though
    the second result could serve: it would hide the softmax from passes and backends that could fuse such a reader with
    it. A model that returns the probabilities needs them as a whole in any case.

    zero_empty_rows   True if a row without keys may always give zeros; every mask then becomes a mask, not an addend

    Refuses: probabilities that are used elsewhere or changed before the product with the values, or returned in a wider
    dtype than attention's; a softmax over another axis than that product sums; a scale that depends on data; masks or
    biases before the soft-cap; a fill number that is not low enough; a number such as -1e9, if a row without keys may
    hold scores as well; masks whose factors exceed the range of their dtype and cancel later; an inner value that is
    used elsewhere.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING

    zero_empty_rows: bool = False
    tidying = TidyLayout()

    def sites(self, work: Rewriting) -> Iterator[_Attention]:
        return _Finder(self.name, work).sites(self.zero_empty_rows)

    def build(self, b: Builder, site: _Attention) -> list[Expr] | Refusal:
        made = site.plan.build(b)
        return replace(made, matched=site.plan.nodes) if isinstance(made, Refusal) else made

    def record(self, work: Rewriting, site: _Attention, made: Sequence[Node]) -> None:
        for note in site.plan.chain.notes:
            refusal = Refusal(f"the mask {note.reason}", note.node, note.hint)
            work.refuse(self.name, refusal, nodes=(site.plan.weighting.anchor,))
        super().record(work, site, made)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Attention(Site):
    """A product of probabilities with values, and the plan of its replacement."""

    plan: AttentionPlan


class _Core(NamedTuple):
    """A softmax whose result weights values: its layout, and the path to the product with the values."""

    weighting: Weighting
    axes: Axes
    layout: Layout
    values: Values


class _Finder:
    """The search for attention in one function."""

    def __init__(self, rule: str, work: Rewriting) -> None:
        self.rule, self.work = rule, work
        self.returned = ReturnedValues(work.graph)
        self.by_offset: dict[Value, np.ndarray[Any, Any] | None] = {}

    def sites(self, zero_empty_rows: bool) -> Iterator[_Attention]:
        """Yield the sites. Each is analyzed when its last node, the product with the values, is reached."""
        cores: dict[Node, tuple[Node, _Core]] = {}
        for node in self.work.function.nodes:
            core = self._core(node)
            if core is not None:
                cores[core.values.product] = node, core
        for node in self.work.walk() if cores else ():
            softmax, core = cores.get(node, (None, None))
            if softmax is not None and self.work.applied:
                core = self._core(softmax)  # its operands may have become fused attention
            if core is None:
                continue
            weighting, axes, layout, values = core
            try:
                scores = find_scores(axes, weighting, layout, self.work.readers)
                symbols = self.work.graph.symbols
                found, trained = (weighting, values, scores), self.work.log.differentiated
                plan = AttentionPlan(axes, layout, symbols, *found, zero_empty_rows, self.by_offset, trained=trained)
            except Mismatch as mismatch:
                self.work.refuse(self.rule, mismatch.refusal)
                continue
            yield _Attention(
                root=node,
                nodes=(*weighting.nodes, *scores.nodes, *values.nodes),
                replaced=plan.replaced,
                rule="attention-with-probabilities" if values.returned else self.rule,
                plan=plan,
            )

    def _core(self, node: Node) -> _Core | None:
        """Return the core of attention at a softmax. If there is none, log the reason and return None."""
        weighting = softmax_at(node)
        if weighting is None:
            return None
        axes = Axes()
        layout = axes.of(weighting.anchor.results[0])
        try:
            values = follow_probabilities(axes, weighting, layout, self.work.readers, self._goes_out)
        except Mismatch as mismatch:
            self._refuse(weighting, mismatch)
            return None
        return _Core(weighting, axes, layout, values)

    def _goes_out(self, user: Node | None, value: Value) -> bool:
        return self.returned.goes_out(self.work.function, user, value)

    def _refuse(self, weighting: Weighting, mismatch: Mismatch) -> None:
        """Log the reason why a softmax next to a product is not fused. Any other softmax does not belong to
        attention, and is not logged.
        """
        before = self._nodes_before(weighting)
        if before or mismatch.node.is_contraction:
            self.work.refuse(self.rule, replace(mismatch.refusal, matched=(*before, *mismatch.matched)))

    def _nodes_before(self, weighting: Weighting) -> tuple[Node, ...]:
        """Return the nodes from a softmax up to the product of queries and keys, including that product, also through
        one product with a weight: talking heads mix the scores of the heads (Shazeer et al. 2020). The same holds for
        one join of the scores with others, such as those of attention sinks.
        """
        axes, above = Axes(), weighting
        for _ in range(2):
            try:
                found = find_scores(axes, above, axes.of(above.scores), self.work.readers, rounded=True)
            except Mismatch as mismatch:
                if not isinstance(mismatch.node.op, Concat):
                    return ()
                joined = mismatch.node
                above = replace(above, scores=joined.inputs[0], nodes=(*above.nodes, joined), anchor=joined)
                continue
            computed = [side.value for side in (found.left, found.right) if not is_weight(side.value)]
            if len(computed) != 1:
                return tuple(dict.fromkeys((*above.nodes, *found.nodes)))[::-1] if computed else ()
            above = replace(above, scores=computed[0], nodes=(*above.nodes, *found.nodes), anchor=found.product)
        return ()
