"""Roundings of a quantizer inside attention, which prevent its fusion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.builder import Builder, describe_source
from treadle.ir.graph import Node, Value
from treadle.ir.ops.rounding import FakeQuantize
from treadle.passes.cleanup.round_trips import round_trip_at
from treadle.passes.framework.facts import BEFORE_LOWERING, Facts
from treadle.passes.framework.rewriting import Rewriting, Site, SiteRewrite
from treadle.passes.fusion.attention.core import Mismatch
from treadle.passes.fusion.attention.plan import AttentionPlan
from treadle.passes.fusion.attention.probabilities import follow_probabilities, softmax_at
from treadle.passes.fusion.attention.scores import find_scores
from treadle.passes.fusion.axis_tracking import Axes


@dataclass(frozen=True)
class DropRoundings(SiteRewrite[Site]):
    """softmax(fake_quantize(q k^T)) v   -->   softmax(q k^T) v        for every rounding from q k^T to the values

    A quantized model (QuantizeLinear and DequantizeLinear around each node) rounds the scores, the masked scores and
    the probabilities to 8 bits. Attention is one op, whose kernels hold these numbers in float32 and never store them.
    Without the roundings, the results are closer to the results of the model before quantization. The log names each of
    them. Roundings of queries, keys, values and the result stay.

    Refuses: a site that is not attention even without the roundings; `FuseAttention` reports the reason.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING
    changes_numbers: ClassVar[bool] = True

    def sites(self, work: Rewriting) -> Iterator[Site]:
        found = {rounding for node in work.function.nodes for rounding in _roundings(work, node)}
        for rounding in work.walk() if found else ():
            if rounding in found:
                what = describe_source(rounding.source, rounding.scope) or work.function.name
                work.log.notes.append(f"a rounding inside attention is dropped: {what}")
                yield Site(rounding)

    def build(self, b: Builder, site: Site) -> Value:
        return site.root.inputs[0]


def _roundings(work: Rewriting, softmax: Node) -> list[Node]:
    """Return the roundings between the two products of the attention at a softmax; none if it is not attention."""
    weighting = softmax_at(softmax)
    if weighting is None:
        return []
    axes = Axes()
    layout = axes.of(weighting.anchor.results[0])
    try:
        values = follow_probabilities(axes, weighting, layout, work.readers, lambda user, value: False, rounded=True)
        scores = find_scores(axes, weighting, layout, work.readers, rounded=True)
        AttentionPlan(axes, layout, work.graph.symbols, weighting, values, scores, False, {})
    except Mismatch:
        return []
    trips = [trip for node in (*scores.nodes, *values.nodes) if (trip := round_trip_at(node)) is not None]
    if not all(isinstance(trip.nodes[0].op, FakeQuantize) for trip in trips):
        return []
    return [trip.nodes[0] for trip in trips]
