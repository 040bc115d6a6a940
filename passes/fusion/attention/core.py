"""The core of attention in primitives: a softmax between two products, and the ops in between.

    scores -> [scale, soft-cap, masks and biases, casts, moves] -> softmax -> [casts, moves] -> product with values

`probabilities` walks from the softmax down to the product with the values, `scores` up to the product of queries and
keys, `origins` up from both products. All of them track the axes, so the layouts of a model do not matter. This module
defines their results. For anything that cannot be attention, they raise `Mismatch` with the reason, the node, and the
ops that had matched.
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
"""The greatest number of ops between the softmax and the scores; longer chains are not searched."""
LEAST_FILL = 9_000.0
"""A masked score is lower than other scores by at least this number, so that its weight is 0: exp(-9000) is 0 in every
dtype.
"""


class Mismatch(Exception):
    """The reason why a softmax does not belong to attention, the node that shows the reason, the ops that had
    matched, in order, and if known, the smallest change that would make it attention.
    """

    def __init__(self, reason: str, node: Node, matched: Sequence[Node] = (), hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.node, self.matched, self.hint = reason, node, tuple(matched), hint

    @property
    def refusal(self) -> Refusal:
        return Refusal(self.reason, self.node, self.hint, self.matched)


@dataclass(frozen=True)
class Placed:
    """A value, and the axis of each of its dimensions."""

    value: Value
    layout: Layout


@dataclass(frozen=True)
class Weighting:
    """A softmax in the graph.

    anchor   the node that computes the probabilities
    scores   the operand of the softmax; `axis` is the axis of the softmax
    guarded  True if a row that is -inf throughout gives zeros, not NaN
    nodes    all nodes of the softmax
    """

    anchor: Node
    scores: Value
    axis: int
    guarded: bool
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Added:
    """A bias: factor * value is added to the scores.

    peak     the greatest factor on the way to the scores
    """

    placed: Placed
    factor: float
    node: Node
    peak: float = 1.0


@dataclass(frozen=True)
class Chosen:
    """A mask: the scores are replaced by `fill` where the condition is not `keep`.

    fill     the number as the softmax reads it, that is, times `factor`
    peak     the greatest factor on the way to the scores
    """

    placed: Placed
    keep: bool
    fill: float
    node: Node
    factor: float = 1.0
    peak: float = 1.0


@dataclass(frozen=True)
class Scores:
    """The result of `find_scores`.

    product          the product of queries and keys; its operands are `left` and `right`
    summed           the axes over which that product sums; None if it sums over none
    scale, softcap   scores = softcap tanh(scale left right / softcap), or scale left right
    terms            masks and biases, in order from the product
    nodes            all visited nodes, from the softmax upwards
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
    """The result of `follow_probabilities`: the product with the values, the layout of its result, and the visited
    nodes.

    returned   the probabilities at the point at which the model also returns them, if it does
    """

    product: Node
    values: Placed
    result: Layout
    guarded: bool
    nodes: tuple[Node, ...]
    returned: tuple[Placed, ...] = ()


def number_of(value: Value) -> float | None:
    """Return the number of a constant of one element, whose element may be moved; None for any other value."""
    while value.node is not None and value.node.op.is_view:
        value = value.node.inputs[0]
    if value.literal is None or math.prod(value.literal.shape) != 1:
        return None
    return value.literal.array.reshape(()).item()  # type: ignore[no-any-return]


def quantized(what: str, trip: RoundTrip, node: Node, matched: Sequence[Node]) -> Mismatch:
    """Return the mismatch for a value that a quantizer rounds on the way."""
    hint = "leave the softmax and both its products out of quantization"
    return Mismatch(f"{what} are quantized: rounded to {trip.dtype} and back", node, matched, hint)
