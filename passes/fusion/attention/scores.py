"""The path up from a softmax to the product of queries and keys, with the ops applied to the scores in between."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from treadle.ir.graph import Node, Value
from treadle.ir.ops.arithmetic import Add, Maximum, Minimum
from treadle.ir.ops.logic import Where
from treadle.ir.ops.shapes import Expand, Rearrange
from treadle.passes.cleanup.canonicalize import is_lossless
from treadle.passes.cleanup.round_trips import round_trip_at
from treadle.passes.fusion.attention.biases import ABSORBING
from treadle.passes.fusion.attention.core import (
    LEAST_FILL,
    MOST_STEPS,
    Added,
    Chosen,
    Mismatch,
    Placed,
    Scores,
    Weighting,
    number_of,
    quantized,
)
from treadle.passes.fusion.axis_tracking import Axes, Layout, narrowed


@dataclass(frozen=True)
class _Trail:
    """The ops between the softmax and a value on the way up. The softmax is of (factor * value, capped) + terms.

    least    the smallest factor of any value so far, from that value to the softmax
    """

    factor: float = 1.0
    least: float = 1.0
    softcap: float | None = None
    terms: tuple[Added | Chosen, ...] = ()
    nodes: tuple[Node, ...] = ()

    def times(self, factor: float) -> _Trail:
        least = min(self.least, abs(self.factor * factor))
        return dataclasses.replace(self, factor=self.factor * factor, least=least)

    @property
    def peak(self) -> float:
        """The greatest factor by which the value is multiplied at any point on its way to the softmax."""
        return abs(self.factor) / self.least

    def beyond(self, term: Added | Chosen) -> _Trail:
        return dataclasses.replace(self, terms=(term, *self.terms))


def find_scores(
    axes: Axes,
    weighting: Weighting,
    layout: Layout,
    readers: Callable[[Value], Sequence[Node | None]],
    *,
    rounded: bool = False,
) -> Scores:
    """Return the product of queries and keys from which the softmax is computed. Raises Mismatch if there is none.

    rounded   True to continue above scores that a quantizer rounds: they prevent the fusion, but the site is reported
    """
    ascent = _Ascent(axes, readers, set(weighting.nodes), rounded)
    return ascent.up(weighting.scores, layout, _Trail(nodes=weighting.nodes))


_DATA_SCALE = "the scale is a tensor, so it depends on data"


class _Ascent:
    def __init__(
        self, axes: Axes, readers: Callable[[Value], Sequence[Node | None]], softmax: set[Node], rounded: bool
    ) -> None:
        self.axes, self.readers, self.softmax, self.rounded = axes, readers, softmax, rounded
        self.steps = 0

    def up(self, value: Value, layout: Layout, trail: _Trail) -> Scores:
        node = value.node
        self.steps += 1
        if node is None or self.steps > MOST_STEPS:
            below = trail.nodes[-1]
            what = f"the scores are {'an' if value.kind == 'input' else 'a'} {value.kind}, not a product"
            raise Mismatch(what if node is None else "the chain before the softmax is too long", below, trail.nodes)
        self._read_here_alone(value, node, trail)
        trip = round_trip_at(node)
        if trip is not None and self.rounded:
            return self.up(trip.value, layout, dataclasses.replace(trail, nodes=(*trail.nodes, *trip.nodes)))
        if trip is not None:
            raise quantized("the scores", trip, trip.nodes[-1], trail.nodes)
        trail = dataclasses.replace(trail, nodes=(*trail.nodes, node))
        step = getattr(self, f"_{node.op.name}", None)
        if step is None:
            clipped = isinstance(node.op, (Maximum, Minimum))
            what = "the scores are clipped" if clipped else f"the scores go through {node.op.name}"
            raise Mismatch(what, node, trail.nodes[:-1])
        found: Scores = step(node, layout, trail)
        return found

    def _read_here_alone(self, value: Value, node: Node, trail: _Trail) -> None:
        """Raise Mismatch if a value on the way has a reader other than the next op on the path."""
        above = trail.nodes[-1]
        inside = self.softmax if above in self.softmax else {above}
        for user in self.readers(value):
            if user is None:
                raise Mismatch(f"the scores are an output as well, after {node.op.name}", node, trail.nodes)
            if user not in inside or (user is above and user.operands.count(value) > 1):
                line = f" ({user.source})" if user.source else ""
                raise Mismatch(f"the scores are used elsewhere, by {user.op.name}{line}", node, trail.nodes)

    # -- the ends ----------------------------------------------------------------------------------------------

    def _product(self, node: Node, layout: Layout, trail: _Trail) -> Scores:
        if len(node.operands) != 2 and not (len(node.operands) == 3 and node.operands[2] is None):
            raise Mismatch(f"the product is of {len(node.inputs)} operands, not of queries and keys", node, trail.nodes)
        layouts, summed = self.axes.factors(node, layout)
        left, right = (Placed(v, made) for v, made in zip(node.inputs, layouts, strict=True))
        capped = trail.softcap or 1.0
        return Scores(
            product=node,
            left=left,
            right=right,
            summed=tuple(atom for atoms in summed.values() for atom in atoms) if summed else None,
            scale=trail.factor * capped,
            softcap=trail.softcap,
            terms=trail.terms,
            nodes=trail.nodes,
        )

    _matmul = _einsum = _linear = _product

    # -- moves -------------------------------------------------------------------------------------------------

    def _rearrange(self, node: Node, layout: Layout, trail: _Trail) -> Scores:
        above = self.axes.above(node, layout)
        if above is None:
            raise Mismatch("the scores are regrouped across their axes", node, trail.nodes[:-1])
        return self.up(node.inputs[0], above, trail)

    _expand = _rearrange

    def _cast(self, node: Node, layout: Layout, trail: _Trail) -> Scores:
        source, to = node.inputs[0].type.dtype, node.results[0].type.dtype
        if not source.is_float or not is_lossless(source, to):
            raise Mismatch(f"the scores are cast from {source} to {to}, which is lossy", node, trail.nodes[:-1])
        return self.up(node.inputs[0], layout, trail)

    def _maximum(self, node: Node, layout: Layout, trail: _Trail) -> Scores:
        for value, other in (node.inputs, node.inputs[::-1]):
            number = number_of(other)
            if number is not None and number * trail.factor <= -ABSORBING and _adds_mask(value, number):
                return self.up(value, narrowed(value, layout), trail)
        raise Mismatch("the scores are clipped", node, trail.nodes[:-1])

    # -- arithmetic --------------------------------------------------------------------------------------------

    def _mul(self, node: Node, layout: Layout, trail: _Trail) -> Scores:
        x, y = node.inputs
        for value, other in ((x, y), (y, x)):
            if (number := number_of(other)) is not None:
                if not math.isfinite(number) or number == 0:
                    raise Mismatch(f"the scores are multiplied by {number:g}", node, trail.nodes[:-1])
                return self.up(value, narrowed(value, layout), trail.times(number))
        raise Mismatch(_DATA_SCALE, node, trail.nodes[:-1], "scale the queries instead, before the product")

    def _div(self, node: Node, layout: Layout, trail: _Trail) -> Scores:
        x, y = node.inputs
        number = number_of(y)
        if number is None:
            raise Mismatch(_DATA_SCALE, node, trail.nodes[:-1], "scale the queries instead, before the product")
        if not math.isfinite(number) or number == 0:
            raise Mismatch(f"the scores are divided by {number:g}", node, trail.nodes[:-1])
        return self.up(x, narrowed(x, layout), trail.times(1 / number))

    def _neg(self, node: Node, layout: Layout, trail: _Trail) -> Scores:
        return self.up(node.inputs[0], layout, trail.times(-1))

    def _tanh(self, node: Node, layout: Layout, trail: _Trail) -> Scores:
        if trail.softcap is not None:
            raise Mismatch("a second soft-cap", node, trail.nodes[:-1])
        sign = -1.0 if trail.factor < 0 else 1.0
        capped = dataclasses.replace(trail, factor=sign, softcap=abs(trail.factor))
        return self.up(node.inputs[0], layout, capped)

    def _add(self, node: Node, layout: Layout, trail: _Trail) -> Scores:
        return self._sum(node, layout, trail, 1.0)

    def _sub(self, node: Node, layout: Layout, trail: _Trail) -> Scores:
        return self._sum(node, layout, trail, -1.0)

    def _sum(self, node: Node, layout: Layout, trail: _Trail, sign: float) -> Scores:
        x, y = node.inputs
        # The more likely operand for the scores comes first: an operand of the full shape that is not computed from a
        # condition.
        orders = sorted([(x, 1.0, y, sign), (y, sign, x, 1.0)], key=lambda order: _unlikely(order[0], node))
        deepest: Mismatch | None = None
        for value, factor, other, share in orders:
            if trail.softcap is not None:
                raise Mismatch("a bias is added before the soft-cap", node, trail.nodes[:-1])
            bias = Added(Placed(other, narrowed(other, layout)), trail.factor * share, node, trail.peak)
            try:
                return self.up(value, narrowed(value, layout), trail.times(factor).beyond(bias))
            except Mismatch as mismatch:
                if deepest is None or len(mismatch.matched) > len(deepest.matched):
                    deepest = mismatch
        assert deepest is not None
        raise deepest

    def _where(self, node: Node, layout: Layout, trail: _Trail) -> Scores:
        condition, x, y = node.inputs
        if trail.softcap is not None:
            raise Mismatch("a mask is applied before the soft-cap", node, trail.nodes[:-1])
        for value, fill, keep in ((x, y, True), (y, x, False)):
            if (number := number_of(fill)) is not None and value.node is not None:
                held = Placed(condition, narrowed(condition, layout))
                mask = Chosen(held, keep, number * trail.factor, node, trail.factor, trail.peak)
                if not mask.fill <= -LEAST_FILL:
                    raise Mismatch(
                        f"the mask replaces scores by {number:g}, which does not mask keys",
                        node,
                        trail.nodes[:-1],
                        "-inf or -1e9 in place of that number",
                    )
                return self.up(value, narrowed(value, layout), trail.beyond(mask))
        raise Mismatch("the mask selects between two tensors", node, trail.nodes[:-1])


def _adds_mask(value: Value, least: float) -> bool:
    """Return True if a value is a sum with a mask of 0 and one number, which is not below `least`. The number absorbs
    the other addend, so the sum is not below `least` either.
    """
    if value.node is None or not isinstance(value.node.op, Add):
        return False
    for mask in value.node.inputs:
        while mask.node is not None and isinstance(mask.node.op, Rearrange | Expand):
            mask = mask.node.inputs[0]
        if mask.node is not None and isinstance(mask.node.op, Where):
            numbers = [number_of(side) for side in mask.node.inputs[1:]]
            if 0 in numbers and all(n is not None and (n == 0 or least <= n <= -ABSORBING) for n in numbers):
                return True
    return False


def _unlikely(value: Value, node: Node) -> int:
    """Return a sort key for the operands of a sum: the greater it is, the less likely the operand is the scores, and
    the other one the bias.
    """
    made_of_condition = value.node is None or isinstance(value.node.op, Where)
    return 2 * made_of_condition + (value.type.elements != node.results[0].type.elements)
