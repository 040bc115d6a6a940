"""Positions of the keys in a cache, and the keys that a row's queries may see.

In a cache without a ring, slot j holds the key of position j. A ring of C keys holds the last C positions that were
written: slot j holds the one of these positions that is congruent to j modulo C.
"""

from __future__ import annotations

from collections.abc import Iterable

from treadle.ir.attention.attention_terms import Term
from treadle.ir.attention.seen_keys import reach_of


def live_positions(
    terms: Iterable[Term], start: int, queries: int, capacity: int, lengths: Iterable[int], *, ring: bool
) -> range:
    """Return the positions of all keys that queries at start ... start + queries - 1 may see, by position alone.

    lengths  the row's length, for each padding among the terms

    There are at most `capacity` positions. The key of position x is in slot x modulo `capacity`. Keys at other
    positions are never read.
    """
    low, high = reach_of(terms)
    newest = start + queries
    first, past = (newest - capacity, newest) if ring else (0, capacity)
    first = max(0, first if low is None else max(first, start + low))
    past = min([past if high is None else min(past, newest + high), *lengths])
    return range(first, max(first, past))
