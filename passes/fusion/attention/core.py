"""The core of attention, spelled out: a softmax between two products, with what lies on the way.

    scores -> [scale, soft-cap, masks and biases, casts, moves] -> softmax -> [casts, moves] -> product with values

`follow_probabilities` goes down from the softmax to the product with the values, `find_scores` up to the product of
queries and keys. Both keep track of the axes, so that the layout in which a model does all this is of no importance.
What cannot be attention raises `Mismatch`, which says why, where, and how much had matched before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from treadle.ir.graph import Node, Value
from treadle.ir.ops.arithmetic import Add, Div, Maximum, Minimum, Mul, Sub
from treadle.ir.ops.elementwise import Cast, Exp
from treadle.ir.ops.logic import NotEqual, Where
from treadle.ir.ops.normalization import MaskedSoftmax, Softmax
from treadle.ir.ops.shapes import Expand, Rearrange, Reshape
from treadle.passes.cleanup.canonicalize import is_lossless
from treadle.passes.cleanup.round_trips import RoundTrip, round_trip_at, round_trip_from
from treadle.passes.framework.pattern import Pattern, Vocabulary
from treadle.passes.framework.pattern_search import Search
from treadle.passes.fusion.axis_tracking import Axes, Layout, narrowed

_MOST_STEPS = 48
"""A chain of more ops between the softmax and the scores is not looked through."""


class Mismatch(Exception):
    """Why a softmax is no attention's, the node that shows it, the ops that had matched, in order, and where that can
    be told the smallest change with which it would be."""

    def __init__(self, reason: str, node: Node, matched: Sequence[Node] = (), hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.node, self.matched, self.hint = reason, node, tuple(matched), hint


@dataclass(frozen=True)
class Placed:
    """A value, and which axes its dimensions are."""

    value: Value
    layout: Layout


@dataclass(frozen=True)
class Weighting:
    """A softmax as it stands in the graph.

    anchor   the node that gives the probabilities
    scores   what it is taken of, and `axis` along which
    guarded  a row that is -inf throughout gives zeros, not NaN
    nodes    all that it is spelled with
    """

    anchor: Node
    scores: Value
    axis: int
    guarded: bool
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Added:
    """A bias: factor * value is added to the scores.

    peak     the most by which it is multiplied on the way there
    """

    placed: Placed
    factor: float
    node: Node
    peak: float = 1.0


@dataclass(frozen=True)
class Chosen:
    """A mask: where `keep` is not what the condition says, the scores are replaced by `fill`.

    fill     as the softmax sees it: the number, times `factor`
    peak     the most by which it is multiplied on the way there
    """

    placed: Placed
    keep: bool
    fill: float
    node: Node
    factor: float = 1.0
    peak: float = 1.0


@dataclass(frozen=True)
class Scores:
    """What `find_scores` came to.

    product          the product of queries and keys; its operands are `left` and `right`
    summed           the axes over which that product sums; None if over none
    scale, softcap   scores = softcap tanh(scale left right / softcap), or scale left right
    terms            masks and biases, those nearest to the product first
    nodes            all that was passed, from the softmax on
    """

    product: Node
    left: Placed
    right: Placed
    summed: tuple[int, ...] | None
    scale: float
    softcap: float | None
    terms: tuple[Added | Chosen, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Values:
    """What `follow_probabilities` came to: the product with the values, its result's layout, and what was passed.

    returned   the probabilities, wherever on the way down they are handed out of the model as well
    """

    product: Node
    values: Placed
    result: Layout
    guarded: bool
    nodes: tuple[Node, ...]
    returned: tuple[Placed, ...] = ()


# -- the softmax -----------------------------------------------------------------------------------------------


@cache
def _guarded_softmax() -> Pattern:
    def pattern(p: Vocabulary, x: Any, over_max: Any, over_sum: Any) -> Any:
        peak = p.reduce_max(x, axes=over_max, keep=True)
        weights = p.exp(x - p.where(peak > -math.inf, peak, 0))
        total = p.reduce_sum(weights, axes=over_sum, keep=True)
        return weights / p.where(total > 0, total, 1)

    return Pattern.trace(pattern)


def softmax_at(node: Node) -> Weighting | None:
    """The softmax whose probabilities this node gives: the op, or one that gives zeros where every score is -inf."""
    if isinstance(node.op, Softmax):
        value = node.inputs[0]
        return Weighting(node, value, node.op.axis % value.type.rank, False, (node,))
    if isinstance(node.op, MaskedSoftmax):
        value = node.inputs[0]
        return Weighting(node, value, value.type.rank - 1, True, (node,))
    if not isinstance(node.op, Div) or node.inputs[0].node is None or not isinstance(node.inputs[0].node.op, Exp):
        return None
    for found in Search(_guarded_softmax()).run(node):
        x: Value = found.captures["x"]
        axes = {tuple(a % x.type.rank for a in found.captures[name]) for name in ("over_max", "over_sum")}
        if len(axes) == 1 and len(axis := axes.pop()) == 1:
            return Weighting(node, x, axis[0], True, found.nodes)
    return None


# -- down to the values ----------------------------------------------------------------------------------------


def follow_probabilities(
    axes: Axes,
    weighting: Weighting,
    layout: Layout,
    readers: Callable[[Value], Sequence[Node | None]],
    goes_out: Callable[[Node | None, Value], bool],
) -> Values:
    """The product of the probabilities with values.

    readers    who reads a value, None for an output
    goes_out   whether such a reader only hands the value out of the model

    Raises Mismatch where there is none, or where the probabilities are used elsewhere as well.
    """
    value, node, passed = weighting.anchor.results[0], weighting.anchor, list(weighting.nodes)
    guarded = weighting.guarded
    returned: list[Placed] = []
    for _ in range(_MOST_STEPS):
        users = list(dict.fromkeys(readers(value)))
        guard = _zeros_for_nan(value, users)
        if guard is not None:
            passed += [n for n in users if n is not None]
            node, value, guarded = guard, guard.results[0], True
            continue
        used = [user for user in users if not goes_out(user, value)]
        if users and not used:
            raise Mismatch("the probabilities are an output, and nothing is weighted by them", node, passed)
        if len(used) < len(users):
            returned.append(Placed(value, layout))
            users = used
        if len(users) != 1 or (user := users[0]) is None:
            raise Mismatch(_elsewhere(users), node, passed, "do not read the probabilities beside that product")
        passed.append(user)
        if user.is_contraction:
            found = _value_product(axes, user, value, layout, passed, guarded)
            return dataclasses.replace(found, returned=tuple(returned))
        if isinstance(user.op, Rearrange):
            below = axes.below(user, layout)
            if below is None:
                raise Mismatch("the probabilities are regrouped across their axes", user, passed[:-1])
            layout = below
        elif isinstance(user.op, Cast):
            to = user.results[0].type.dtype
            if not to.is_float:
                raise Mismatch(f"the probabilities are cast to {to}", user, passed[:-1])
        else:
            trip = round_trip_from(value, readers)
            if trip is not None:
                raise Mismatch(f"the probabilities are {_rounded(trip)}", user, passed[:-1], _UNQUANTIZED)
            hint = "export the model for inference, without dropout" if isinstance(user.op, Mul) else ""
            raise Mismatch(_changed(user, value), user, passed[:-1], hint)
        node, value = user, user.results[0]
    raise Mismatch("the chain after the softmax is too long", node, passed)


def _zeros_for_nan(value: Value, users: Sequence[Node | None]) -> Node | None:
    """where(p != p, 0, p): the op in which a row without keys becomes zeros."""
    if len(users) != 2 or None in users:
        return None
    test = next((n for n in users if n is not None and isinstance(n.op, NotEqual)), None)
    choice = next((n for n in users if n is not None and isinstance(n.op, Where)), None)
    if test is None or choice is None or test.inputs != (value, value):
        return None
    condition, zero, kept = choice.inputs
    fits = condition is test.results[0] and kept is value and number_of(zero) == 0
    return choice if fits and choice.results[0].type.shape == value.type.shape else None


def _elsewhere(users: Sequence[Node | None]) -> str:
    if not users:
        return "nobody reads the probabilities"
    if None in users:
        return "the probabilities are an output of a block that is used where it is called"
    others = [n for n in users if n is not None and not n.is_contraction] or [n for n in users if n is not None]
    line = f" ({others[0].source})" if others[0].source else ""
    return f"the probabilities are used elsewhere, by {others[0].op.name}{line}"


def _changed(user: Node, value: Value) -> str:
    other = next((v for v in user.inputs if v is not value), None)
    match user.op:
        case Mul() | Div() if other is not None:
            by = "a constant" if number_of(other) is not None else "a tensor"
            return f"the probabilities are multiplied by {by} before the product with the values"
        case Add() | Sub() | Where():
            return f"the probabilities are masked or shifted after the softmax, by {user.op.name}"
        case Softmax():
            return "a second softmax follows the first"
        case Reshape():
            return "the probabilities are reshaped across their axes"
    return f"the probabilities go through {user.op.name} before the product with the values"


def _value_product(axes: Axes, user: Node, value: Value, layout: Layout, passed: list[Node], guarded: bool) -> Values:
    """Read the product as probabilities times values."""
    if user.operands.count(value) != 1 or len(user.inputs) != 2:
        what = "by themselves" if user.operands.count(value) != 1 else "by values, with more in one op"
        raise Mismatch(f"the probabilities are multiplied {what}", user, passed[:-1])
    place = user.operands.index(value)
    other = user.inputs[1 - place]
    application = user.op.apply([None if v is None else v.type for v in user.operands])
    known: dict[str, tuple[int, ...]] = {}
    for dim, atoms in zip(application.operands[place] or (), layout, strict=True):
        known |= dict.fromkeys(dim.factors, atoms)
    for name, factor in application.dims.items():
        if name not in known:
            known[name] = axes.new(factor.size)

    def layout_of(dims: Any) -> Layout:
        return tuple(known[d.factors[0]] if d.factors else () for d in dims)

    placed = Placed(other, layout_of(application.operands[1 - place]))
    return Values(user, placed, layout_of(application.results[0]), guarded, tuple(passed))


# -- up to the queries and keys --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trail:
    """What lies between the softmax and a value on the way up: softmax of (factor * value, capped) + terms.

    least    the smallest that the factor has been, nearer to the softmax
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
        """The most by which what stands here is multiplied before it is at the softmax."""
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
    """The product of queries and keys that the softmax is taken of. Raises Mismatch where there is none.

    rounded   go on above scores that a quantizer rounds, which stand in the way of attention and not of a person's eye
    """
    ascent = _Ascent(axes, readers, set(weighting.nodes), rounded)
    return ascent.up(weighting.scores, layout, _Trail(nodes=weighting.nodes))


_UNQUANTIZED = "leave the softmax and both its products out of quantization"


def _rounded(trip: RoundTrip) -> str:
    return f"quantized: rounded to {trip.dtype} and back"


_DATA_SCALE = "the scale is a tensor: it depends on data"


class _Ascent:
    def __init__(
        self, axes: Axes, readers: Callable[[Value], Sequence[Node | None]], softmax: set[Node], rounded: bool
    ) -> None:
        self.axes, self.readers, self.softmax, self.rounded = axes, readers, softmax, rounded
        self.steps = 0

    def up(self, value: Value, layout: Layout, trail: _Trail) -> Scores:
        node = value.node
        self.steps += 1
        if node is None or self.steps > _MOST_STEPS:
            below = trail.nodes[-1]
            what = f"the scores are {'an' if value.kind == 'input' else 'a'} {value.kind}, not a product"
            raise Mismatch(what if node is None else "the chain before the softmax is too long", below, trail.nodes)
        self._read_here_alone(value, node, trail)
        trip = round_trip_at(node)
        if trip is not None and self.rounded:
            return self.up(trip.value, layout, dataclasses.replace(trail, nodes=(*trail.nodes, *trip.nodes)))
        if trip is not None:
            raise Mismatch(f"the scores are {_rounded(trip)}", trip.nodes[-1], trail.nodes, _UNQUANTIZED)
        trail = dataclasses.replace(trail, nodes=(*trail.nodes, node))
        step = getattr(self, f"_{node.op.name}", None)
        if step is None:
            clipped = isinstance(node.op, (Maximum, Minimum))
            what = "the scores are clipped" if clipped else f"the scores go through {node.op.name}"
            raise Mismatch(what, node, trail.nodes[:-1])
        found: Scores = step(node, layout, trail)
        return found

    def _read_here_alone(self, value: Value, node: Node, trail: _Trail) -> None:
        """Raise Mismatch where a value on the way is read by anything but the op that was passed before it."""
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
            raise Mismatch(
                f"the scores are cast from {source} to {to}, which loses some of them", node, trail.nodes[:-1]
            )
        return self.up(node.inputs[0], layout, trail)

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
        # The likelier operand first: one of the whole shape, and no mask that was made of a condition.
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
                        f"the mask puts {number:g} in place of scores, which does not take keys away",
                        node,
                        trail.nodes[:-1],
                        "-inf or -1e9 in its place",
                    )
                return self.up(value, narrowed(value, layout), trail.beyond(mask))
        raise Mismatch("the mask chooses between two tensors", node, trail.nodes[:-1])


LEAST_FILL = 9_000.0
"""A masked score is this far below others or further, so that its weight is 0: exp(-9000) is in every dtype."""


def _unlikely(value: Value, node: Node) -> int:
    """How unlikely an operand of a sum is to be the scores, and the other the bias."""
    made_of_condition = value.node is None or isinstance(value.node.op, Where)
    return 2 * made_of_condition + (value.type.elements != node.results[0].type.elements)


def number_of(value: Value) -> float | None:
    """The number of a constant of one element, and of a move of one."""
    while value.node is not None and value.node.op.is_view:
        value = value.node.inputs[0]
    if value.literal is None or math.prod(value.literal.shape) != 1:
        return None
    return value.literal.array.reshape(()).item()  # type: ignore[no-any-return]


# -- up from a product -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """A value, and what it is beneath moves, lossless casts and constant factors.

    path     from the value itself up to the one beneath all of these, each with the factors that lie in between
    """

    path: tuple[tuple[Placed, float], ...]

    @property
    def placed(self) -> Placed:
        return self.path[-1][0]

    @property
    def factor(self) -> float:
        return self.path[-1][1]

    def as_laid_out(self, axes: Axes, wanted: Sequence[Sequence[int]]) -> Placed:
        """The value on the path, scaled by as much as the last, that has this layout already; else the last."""
        goal = tuple(map(axes.flat, wanted))
        fitting = [p for p, factor in self.path if factor == self.factor and axes.resolved(p.layout) == goal]
        return fitting[-1] if fitting else self.placed


def origin_of(axes: Axes, placed: Placed, batch: Callable[[int], bool]) -> Origin:
    """Look beneath a value. An expand is passed where all that it repeats is `batch` axes: one of a key's heads for
    several of the queries'."""
    value, layout, factor = placed.value, placed.layout, 1.0
    path = [(placed, factor)]
    while (node := value.node) is not None:
        operand = node.inputs[0] if node.inputs else None
        match node.op:
            case Rearrange():
                above = axes.above(node, layout)
            case Expand():
                above = axes.above(node, layout)
                assert above is not None
                kept = {atom for dim in axes.resolved(above) for atom in dim}
                if not all(batch(a) for dim in axes.resolved(layout) for a in dim if a not in kept):
                    above = None
            case Mul() | Div():
                scaled = _scaled(node)
                above = narrowed(scaled[0], layout) if scaled is not None else None
                if scaled is not None and above is not None:
                    operand, factor = scaled[0], factor * scaled[1]
            case Cast():
                lossless = operand is not None and is_lossless(operand.type.dtype, value.type.dtype)
                above = layout if lossless and operand is not None and operand.type.dtype.is_float else None
            case _:
                above = None
        if above is None or operand is None:
            break
        value, layout = operand, above
        path.append((Placed(value, layout), factor))
    return Origin(tuple(path))


def is_weight(value: Value) -> bool:
    """Whether a value is a weight or a constant, moved, cast or not."""
    while value.node is not None and (value.node.op.is_view or isinstance(value.node.op, Cast)):
        value = value.node.inputs[0]
    return value.kind in ("parameter", "constant")


def _scaled(node: Node) -> tuple[Value, float] | None:
    """x and c of x * c or x / c, for a constant c that is neither 0 nor infinite, where x has the result's shape."""
    x, y = node.inputs
    for value, other in ((x, y), (y, x)) if isinstance(node.op, Mul) else ((x, y),):
        number = number_of(other)
        if number is not None and math.isfinite(number) and number != 0 and value.literal is None:
            same = value.type.shape == node.results[0].type.shape
            return (value, number if isinstance(node.op, Mul) else 1 / number) if same else None
    return None
