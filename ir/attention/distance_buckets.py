"""Buckets of distances, as in T5's learned bias: one bucket per small distance, then buckets that grow
geometrically.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache

import numpy as np

from treadle.ir.operation import Array


def t5_buckets(offsets: Array, buckets: int, max_distance: int, bidirectional: bool) -> Array:
    """Return the buckets of keys at these offsets j - i from their query, as an array of the offsets' shape.

    The first half of the buckets, `near`, hold one distance each; the others grow geometrically up to max_distance. If
    bidirectional, the upper half of all buckets is reserved for keys after the query; otherwise these keys have bucket
    0.
    """
    count = buckets // 2 if bidirectional else buckets
    near = count // 2
    distances = np.abs(offsets) if bidirectional else np.maximum(-offsets, 0)
    begins = np.array(_growing_buckets(near, count - near, max_distance), np.int64)
    far = near + np.searchsorted(begins, distances, side="right")
    upper = count * (offsets > 0) if bidirectional else 0
    return np.where(distances < near, distances, far) + upper


@lru_cache(maxsize=64)
def _growing_buckets(near: int, growing: int, max_distance: int) -> tuple[int, ...]:
    """Return the distances at which the growing buckets begin, except the first.

    Bucket k begins where (distance/near)^growing >= (max_distance/near)^k. This equals T5's logarithms, but compares
    integers and so avoids their rounding.
    """
    distances = range(near, max_distance + 1)

    def begin(k: int) -> int:
        edge = near ** (growing - k) * max_distance**k
        return distances[bisect_left(distances, True, key=lambda distance: distance**growing >= edge)]

    return tuple(begin(k) for k in range(1, growing))
