"""Batches of rows of similar lengths: padding costs as much as words."""

from __future__ import annotations

from collections.abc import Sequence

_CALL = 32
"""The fixed cost of a call, in tokens; 8 to 128 differ little in a small BERT's time."""


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return the rows' numbers, from long to short, in batches of at most `size` with the least total cost.

    The cost of a batch is its rows times the longest of them, since all are padded to it, and one call. The best
    partition of the first rows is the minimum over the start of its last batch (Bellman 1957): len(lengths) times
    `size` steps.
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
