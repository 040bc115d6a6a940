"""Where the keys of a cache stand, and which of them a row's queries may see.

Without a ring, key j of a slot stands at position j. A ring of C keys holds the last C positions that were written:
key j stands at the one of them that is congruent to j modulo C.
"""

from __future__ import annotations

from collections.abc import Iterable

from treadle.ir.attention.attention_terms import Term
from treadle.ir.attention.seen_keys import reach_of


def live_positions(
    terms: Iterable[Term], start: int, queries: int, capacity: int, lengths: Iterable[int], *, ring: bool
) -> range:
    """The positions of all keys that queries at start ... start + queries - 1 may see, by position alone.

    lengths  what each padding among the terms says of the row

    At most `capacity` positions, each of a slot of its own: x modulo `capacity`. Keys at others are never read.
    """
    low, high = reach_of(terms)
    newest = start + queries
    first, past = (newest - capacity, newest) if ring else (0, capacity)
    first = max(0, first if low is None else max(first, start + low))
    past = min([past if high is None else min(past, newest + high), *lengths])
    return range(first, max(first, past))
