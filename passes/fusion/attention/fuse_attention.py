"""Attention that models spell out, in whatever layout and with whatever masks, as the one op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.ops.arithmetic import Div
from treadle.ir.ops.normalization import MaskedSoftmax, Softmax
from treadle.passes.cleanup.canonicalize import IdentityRearrange, RearrangeOfRearrange
from treadle.passes.cleanup.dead_code import drop_unread
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord
from treadle.passes.framework.returned_values import ReturnedValues, readers_of
from treadle.passes.framework.rewrite import sweep
from treadle.passes.fusion.attention.core import (
    Mismatch,
    Values,
    Weighting,
    find_scores,
    follow_probabilities,
    is_weight,
    softmax_at,
)
from treadle.passes.fusion.attention.plan import Plan
from treadle.passes.fusion.axis_tracking import Axes, Layout


@dataclass(frozen=True)
class FuseAttention(Pass):
    """softmax(softcap(scale q k^T) + biases, masked) v   -->   attention(q, k, v, terms, scale, softcap)
    p = softmax(...); return p v, p                    -->   attention_with_probabilities(q, k, v, ...)

     1. any layout of q, k, v, the scores and the result: axes are followed through rearrange and expand
     2. keys and values repeated for several query heads  -->  fewer of their heads
     3. scale after the product, or on q, on k or on both; x / c and -x; cap * tanh(x / cap)
     4. where(mask, scores, -inf), where(mask, scores, -1e9), scores + where(mask, 0, -inf)  -->  masks
     5. conditions by position  -->  causal, window, padding, segments;  table[bucket(j - i)]  -->  t5_relative;
        slopes[h] (j - i)  -->  alibi;  every other condition or addend  -->  mask(axes), bias(axes)
     6. softmax, or one that puts zeros where every score is -inf
     7. probabilities that are outputs of the model as well, moved or cast at most, also through a block's calls

    The two sides are equal for all finite inputs and weights, a row in which every key is masked included. There the
    left side is NaN (-inf and a plain softmax), zeros (-inf, guarded) or an average over all keys (a large negative
    number); attention gives zeros. So a mask becomes a term only where a row always keeps a key (causal: its own) or
    where zeros are meant, a large negative number stays an addend, and NaN is put back by a `where`. What is filled in
    over other masks and biases wins over them, as it did (`treadle.passes.fusion.attention.chain`). Scores are taken to
    be far below a mask's number in size.

    Where the probabilities are read inside the model (averaged, multiplied, dropped out), the site is left alone though
    the second result could serve: it would hide the softmax from the passes and backends that could join such a reader
    to it. Who returns the probabilities asks for them whole, whatever computes them.

    zero_empty_rows   a row without keys may give zeros, whatever it gave; then every mask is a mask, and none an addend

    Refuses: probabilities that are used elsewhere or changed before the product with the values, or returned in a wider
    dtype than attention's; a softmax over another axis than that product sums; a scale that depends on data; masks or
    biases before the soft-cap; a number in place of masked scores that is not low enough; one such as -1e9, where a row
    without keys may hold scores beside it; masks that are multiplied past the range of their dtype and back; an inner
    value that is used elsewhere.
    """

    zero_empty_rows: bool = False

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        if not any(isinstance(node.op, (Softmax, MaskedSoftmax, Div)) for node in function.nodes):
            return 0
        applied = _Search(self, function, graph, log).run()
        if applied:
            sweep(_TIDYING, function, graph, log)
        return applied


_TIDYING = (IdentityRearrange(), RearrangeOfRearrange())
"""For what attention's own layout leaves between it and its neighbours."""


class Site(NamedTuple):
    """A softmax whose result weights values: its own layout, and the way to the product with the values."""

    weighting: Weighting
    axes: Axes
    layout: Layout
    values: Values

    @property
    def product(self) -> Node:
        return self.values.product


class _Search:
    """The walk over one function. A site is looked at when its last node, the product with the values, is reached."""

    def __init__(self, options: FuseAttention, function: Function, graph: Graph, log: PassRecord) -> None:
        self.options, self.function, self.graph, self.log = options, function, graph, log
        self.scratch = Function("scratch")
        self.builder = Builder(graph, self.scratch)
        self.replaced: dict[Value, Value] = {}
        self.by_offset: dict[Value, np.ndarray[Any, Any] | None] = {}
        self.users = readers_of(function)
        self.returned = ReturnedValues(graph)

    def readers(self, value: Value) -> Sequence[Node | None]:
        return self.users.get(value, ())

    def goes_out(self, user: Node | None, value: Value) -> bool:
        return self.returned.goes_out(self.function, user, value)

    def run(self) -> int:
        sites: dict[Node, Site] = {}
        softmaxes: dict[Node, Node] = {}
        for node in self.function.nodes:
            site = self._site(node)
            if site is not None:
                sites[site.product] = site
                softmaxes[site.product] = node
        if not sites:
            return 0
        kept: list[Node] = []
        applied = 0
        for node in self.function.nodes:
            if self.replaced and any(v in self.replaced for v in node.inputs):
                node.operands = tuple(v if v is None else self.replaced.get(v, v) for v in node.operands)
            site = sites.get(node)
            if site is not None and self.replaced:
                site = self._site(softmaxes[node])  # what it reads may be an attention by now
            made = self._fused(node, site) if site is not None else None
            if made is None or site is None:
                kept.append(node)
                continue
            returned = {placed.value for placed in site.values.returned}
            behind = self._computed_from(returned, kept) if returned else {}
            kept = [*(n for n in kept if n not in behind), *made, *behind]
            applied += 1
        self.function.outputs = {name: self.replaced.get(v, v) for name, v in self.function.outputs.items()}
        self.function.nodes = kept
        if applied:
            drop_unread(self.function)
        return applied

    def _site(self, node: Node) -> Site | None:
        """The site of a softmax, if there is one; why it is none is recorded."""
        weighting = softmax_at(node)
        if weighting is None:
            return None
        axes = Axes()
        layout = axes.of(weighting.anchor.results[0])
        try:
            values = follow_probabilities(axes, weighting, layout, self.readers, self.goes_out)
        except Mismatch as mismatch:
            self._refuse(weighting, mismatch)
            return None
        return Site(weighting, axes, layout, values)

    def _computed_from(self, values: set[Value], nodes: Sequence[Node]) -> dict[Node, None]:
        """Those of these nodes that are computed from values which were replaced. They read from now on what stands in
        their place, and have to stand behind it."""
        values = set(values)
        found: dict[Node, None] = {}
        for node in nodes:
            if any(v in values for v in node.inputs):
                node.operands = tuple(v if v is None else self.replaced.get(v, v) for v in node.operands)
                values.update(node.results)
                found[node] = None
        return found

    def _refuse(self, weighting: Weighting, mismatch: Mismatch) -> None:
        """Record why a softmax of a product, or with one after it, is not fused; any other is no one's attention."""
        before = self._nodes_before(weighting)
        if before or mismatch.node.is_contraction:
            self._record(Mismatch(mismatch.reason, mismatch.node, (*before, *mismatch.matched), mismatch.hint))

    def _nodes_before(self, weighting: Weighting) -> tuple[Node, ...]:
        """What lies between a softmax and the product of queries and keys that it is taken of, with that product."""
        axes = Axes()
        try:
            found = find_scores(axes, weighting, axes.of(weighting.scores), self.readers, rounded=True)
        except Mismatch:
            return ()
        return () if any(map(is_weight, (found.left.value, found.right.value))) else found.nodes[::-1]

    def _record(self, mismatch: Mismatch) -> None:
        rule, matched = self.options.name, mismatch.matched
        self.log.refuse(rule, self.function, mismatch.node, mismatch.reason, mismatch.hint, matched=matched)

    def _fused(self, root: Node, site: Site) -> list[Node] | None:
        """The nodes to stand in the place of the product with the values, or None where the site is refused."""
        weighting, axes, layout, values = site
        try:
            scores = find_scores(axes, weighting, layout, self.readers)
            zeros = self.options.zero_empty_rows
            plan = Plan(axes, layout, self.graph.symbols, weighting, values, scores, zeros, self.by_offset)
        except Mismatch as mismatch:
            self._record(mismatch)
            return None
        refused = ""
        placed: list[tuple[Value, Expr]] = []
        try:
            with self.builder.placed_as(root):
                placed = plan.build(self.builder)
            for old, new in placed:
                if new.type != old.type:
                    refused = f"attention would give {new.type} for {old.type}"
        except TreadleError as error:
            refused = f"attention does not take this: {error.what}"
        made, self.scratch.nodes = self.scratch.nodes, []
        if refused:
            self._record(Mismatch(refused, root, scores.nodes))
            return None
        for node in made:
            node.source = root.source
        for note in plan.chain.notes:
            reason = f"the mask {note.reason}"
            self.log.refuse(self.options.name, self.function, note.node, reason, note.hint, (weighting.anchor,))
        rule = "attention-with-probabilities" if values.returned else self.options.name
        taken = (*weighting.nodes, *scores.nodes, *values.nodes)
        self.log.match(rule, self.function, root, taken, made)
        for old, new in placed:
            self.replaced[old] = new.value
            self.users[new.value] = self.users.get(old, [])
            if old.node is not None and old.name != old.node.op.name and new.value.node is not None:
                new.value.name = old.name
        return made
