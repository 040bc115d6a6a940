"""Keys that queries see under all masks together: the range of their offsets, whether there are any, and the number of
pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from treadle.ir.attention.attention_terms import Causal, MaskTerm, TensorBias, Term, Window
from treadle.ir.sizing.sizes import ZERO, Size


def reach_of(terms: Iterable[Term]) -> tuple[int | None, int | None]:
    """Return the least and the greatest j - i that all masks among the terms can keep; None means no limit."""
    reaches = [term.reach for term in terms if isinstance(term, MaskTerm)]
    least = [low for low, _ in reaches if low is not None]
    greatest = [high for _, high in reaches if high is not None]
    return max(least, default=None), min(greatest, default=None)


def leave_a_key(terms: Iterable[Term], queries: Size, keys: Size, first: Size = ZERO) -> bool:
    """Return True if every query sees a key whatever the operands hold: key 0 if all masks are causal, otherwise the
    key at the query's own position.

    The first query has position `first`, which is 0 or more, so later queries may have no key at their own position.
    The entries of a learned table and slopes are finite numbers; a tensor that is added may hold -inf.
    """
    kinds = {type(term) for term in terms}
    masks = {kind for kind in kinds if issubclass(kind, MaskTerm)}
    if TensorBias in kinds:
        return False
    return masks <= {Causal} or (masks <= {Causal, Window} and queries == keys and first == ZERO)


def live_pairs(terms: Iterable[Term], queries: int, keys: int, start: int = 0) -> int:
    """Return the number of pairs of a query and a key that no mask excludes by position alone. The first query is at
    `start`.

    Masks that depend on values (padding, segments, a boolean mask) are assumed to exclude nothing, so the number is an
    upper bound.
    """
    low, high = reach_of(terms)

    def seen(i: int) -> int:
        first = 0 if low is None else max(i + low, 0)
        last = keys - 1 if high is None else min(i + high, keys - 1)
        return max(last - first + 1, 0)

    turns = {start, start + queries}  # between two turns, the number of keys is linear in the query
    turns |= set() if low is None else {-low, keys - low}
    turns |= set() if high is None else {-high - 1, keys - 1 - high}
    inside = sorted(i for i in turns if start <= i <= start + queries)
    return sum((seen(a) + seen(b - 1)) * (b - a) // 2 for a, b in pairwise(inside))
