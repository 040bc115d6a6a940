"""Attention that models spell out, in whatever layout and with whatever masks, as the one op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.builder import Builder
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.passes.attention_core import (
    PRODUCTS,
    Mismatch,
    Values,
    Weighting,
    find_scores,
    follow_probabilities,
    is_weight,
    softmax_at,
)
from treadle.passes.attention_plan import Plan
from treadle.passes.axis_tracking import Axes, Layout
from treadle.passes.canonicalize import IdentityRearrange, RearrangeOfRearrange
from treadle.passes.dead_code import drop_unread
from treadle.passes.manager import Pass
from treadle.passes.pass_log import Event, PassRecord
from treadle.passes.rewrite import sweep


@dataclass(frozen=True)
class FuseAttention(Pass):
    """softmax(softcap(scale q k^T) + biases, masked) v   -->   attention(q, k, v, terms, scale, softcap)

     1. any layout of q, k, v, the scores and the result: axes are followed through rearrange and expand
     2. keys and values repeated for several query heads  -->  fewer of their heads
     3. scale after the product, or on q, on k or on both; x / c and -x; cap * tanh(x / cap)
     4. where(mask, scores, -inf), where(mask, scores, -1e9), scores + where(mask, 0, -inf)  -->  masks
     5. conditions by position  -->  causal, window, padding, segments;  table[bucket(j - i)]  -->  t5_relative;
        slopes[h] (j - i)  -->  alibi;  every other condition or addend  -->  mask(axes), bias(axes)
     6. softmax, or one that puts zeros where every score is -inf

    The two sides are equal for all finite inputs and weights, a row in which every key is masked included. There the
    left side is NaN (-inf and a plain softmax), zeros (-inf, guarded) or an average over all keys (a large negative
    number); attention gives zeros. So a mask becomes a term only where a row always keeps a key (causal: its own) or
    where zeros are meant, a large negative number stays an addend, and NaN is put back by a `where`. Scores are taken
    to be far below a mask's number in size.

    zero_empty_rows   a row without keys may give zeros, whatever it gave; then every mask is a mask, and none an addend

    Refuses: probabilities that are used elsewhere or changed before the product with the values; a softmax over another
    axis than that product sums; a scale that depends on data; masks or biases before the soft-cap; a number in place of
    masked scores that is not low enough, or that is where a row without keys would differ; an inner value that is used
    elsewhere.
    """

    zero_empty_rows: bool = False

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        if not any(node.op.name in ("softmax", "div") for node in function.nodes):
            return 0
        applied = _Search(self, function, graph, log).run()
        if applied:
            sweep(_TIDYING, function, graph, log)
        return applied


_TIDYING = (IdentityRearrange(), RearrangeOfRearrange())
"""For what attention's own layout leaves between it and its neighbours."""


class _Search:
    """The walk over one function. A site is looked at when its last node, the product with the values, is reached."""

    def __init__(self, options: FuseAttention, function: Function, graph: Graph, log: PassRecord) -> None:
        self.options, self.function, self.graph, self.log = options, function, graph, log
        self.scratch = Function("scratch")
        self.builder = Builder(graph, self.scratch)
        self.replaced: dict[Value, Value] = {}
        self.by_offset: dict[Value, np.ndarray[Any, Any] | None] = {}
        self.users: dict[Value, list[Node | None]] = {}
        for node in function.nodes:
            for value in dict.fromkeys(node.inputs):
                self.users.setdefault(value, []).append(node)
        for value in function.outputs.values():
            self.users.setdefault(value, []).append(None)

    def readers(self, value: Value) -> Sequence[Node | None]:
        return self.users.get(value, ())

    def run(self) -> int:
        weightings = [found for node in self.function.nodes if (found := softmax_at(node)) is not None]
        sites: dict[Node, tuple[Weighting, Axes, Layout, Values]] = {}
        for weighting in weightings:
            axes = Axes()
            layout = axes.of(weighting.anchor.results[0])
            try:
                values = follow_probabilities(axes, weighting, layout, self.readers)
                sites[values.product] = (weighting, axes, layout, values)
            except Mismatch as mismatch:
                self._refuse(weighting, mismatch)
        if not sites:
            return 0
        kept: list[Node] = []
        applied = 0
        for node in self.function.nodes:
            if self.replaced and any(v in self.replaced for v in node.inputs):
                node.operands = tuple(v if v is None else self.replaced.get(v, v) for v in node.operands)
            site = sites.get(node)
            made = self._fused(node, *site) if site is not None else None
            if made is None:
                kept.append(node)
            else:
                kept += made
                applied += 1
        self.function.outputs = {name: self.replaced.get(v, v) for name, v in self.function.outputs.items()}
        self.function.nodes = kept
        if applied:
            drop_unread(self.function)
        return applied

    def _refuse(self, weighting: Weighting, mismatch: Mismatch) -> None:
        """Record why a softmax of a product, or with one after it, is not fused; any other is no one's attention."""
        before = self._nodes_before(weighting)
        if before or mismatch.node.op.name in PRODUCTS:
            self._record(Mismatch(mismatch.reason, mismatch.node, (*before, *mismatch.matched), mismatch.hint))

    def _nodes_before(self, weighting: Weighting) -> tuple[Node, ...]:
        """What lies between a softmax and the product of queries and keys that it is taken of, with that product."""
        axes = Axes()
        try:
            found = find_scores(axes, weighting, axes.of(weighting.scores), self.readers)
        except Mismatch:
            return ()
        return () if any(map(is_weight, (found.left.value, found.right.value))) else found.nodes[::-1]

    def _record(self, mismatch: Mismatch) -> None:
        matched = ", ".join(n.op.name for n in dict.fromkeys(mismatch.matched))
        reason = mismatch.reason + (f"; matched: {matched}" if matched else "")
        event = Event.at(self.options.name, self.function, mismatch.node, reason, mismatch.hint)
        self.log.refusals.append(event)

    def _fused(self, root: Node, weighting: Weighting, axes: Axes, layout: Layout, values: Values) -> list[Node] | None:
        """The nodes to stand in the place of the product with the values, or None where the site is refused."""
        try:
            scores = find_scores(axes, weighting, layout, self.readers)
            zeros = self.options.zero_empty_rows
            plan = Plan(axes, layout, self.graph.symbols, weighting, values, scores, zeros, self.by_offset)
        except Mismatch as mismatch:
            self._record(mismatch)
            return None
        old = root.results[0]
        try:
            with self.builder.placed_as(root):
                result = plan.build(self.builder)
            refused = "" if result.type == old.type else f"attention would give {result.type} for {old.type}"
        except TreadleError as error:
            refused = f"attention does not take this: {error.what}"
        made, self.scratch.nodes = self.scratch.nodes, []
        if refused:
            self._record(Mismatch(refused, root, scores.nodes))
            return None
        for node in made:
            node.source = root.source
        for note in plan.notes:
            event = Event.at(self.options.name, self.function, note.node, f"the mask {note.reason}", note.hint)
            self.log.refusals.append(event)
        self.log.matches.append(Event.at(self.options.name, self.function, root))
        self.replaced[old] = result.value
        if old.name != root.op.name and result.value.node is not None:
            result.value.name = old.name
        return made
