"""The core of attention, spelled out: a softmax between two products, with what lies on the way.

    scores -> [scale, soft-cap, masks and biases, casts, moves] -> softmax -> [casts, moves] -> product with values

`probabilities` goes down from the softmax to the product with the values, `scores` up to the product of queries and
keys, `origins` up from both products. All keep track of the axes, so that the layout in which a model does all this is
of no importance. Here is what they come to. What cannot be attention raises `Mismatch`, which says why, where, and how
much had matched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from treadle.ir.graph import Node, Value
from treadle.passes.cleanup.round_trips import RoundTrip
from treadle.passes.framework.rewriting import Refusal
from treadle.passes.fusion.axis_tracking import Layout

MOST_STEPS = 48
"""A chain of more ops between the softmax and the scores is not looked through."""
LEAST_FILL = 9_000.0
"""A masked score is this far below others or further, so that its weight is 0: exp(-9000) is in every dtype."""


class Mismatch(Exception):
    """Why a softmax is no attention's, the node that shows it, the ops that had matched, in order, and where that can
    be told the smallest change with which it would be."""

    def __init__(self, reason: str, node: Node, matched: Sequence[Node] = (), hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.node, self.matched, self.hint = reason, node, tuple(matched), hint

    @property
    def refusal(self) -> Refusal:
        return Refusal(self.reason, self.node, self.hint, self.matched)


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


def number_of(value: Value) -> float | None:
    """The number of a constant of one element, and of a move of one."""
    while value.node is not None and value.node.op.is_view:
        value = value.node.inputs[0]
    if value.literal is None or math.prod(value.literal.shape) != 1:
        return None
    return value.literal.array.reshape(()).item()  # type: ignore[no-any-return]


def quantized(what: str, trip: RoundTrip, node: Node, matched: Sequence[Node]) -> Mismatch:
    """That a quantizer rounds something on the way."""
    hint = "leave the softmax and both its products out of quantization"
    return Mismatch(f"{what} are quantized: rounded to {trip.dtype} and back", node, matched, hint)
