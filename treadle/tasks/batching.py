"""Batches of rows of similar lengths. Padding costs as much time as real tokens."""

from __future__ import annotations

from collections.abc import Sequence

_CALL = 32
"""The fixed cost of a call, in tokens. Values from 8 to 128 give nearly the same time with a small BERT."""


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return batches of row indices, each of at most `size` rows, with the smallest total cost. Rows are sorted from
    long to short.

    Rows of a batch are padded to the longest one, so a batch costs its number of rows times that length, plus the fixed
    cost of a call. Dynamic programming (Bellman 1957): the best partition of the first n rows is the minimum over the
    start of its last batch. This takes len(lengths) times `size` steps.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    least, begins = [0], [0]
    for end in range(1, len(order) + 1):
        costs = [
            (least[start] + (end - start) * lengths[order[start]] + _CALL, start)
            for start in range(max(0, end - size), end)
        ]
        cost, start = min(costs)
        least.append(cost)
        begins.append(start)
    runs: list[list[int]] = []
    end = len(order)
    while end:
        runs.append(order[begins[end] : end])
        end = begins[end]
    return runs[::-1]
