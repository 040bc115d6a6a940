"""Batches of rows of like lengths: padding costs as much as words."""

from __future__ import annotations

from collections.abc import Sequence

_CALL = 32
"""What a call costs beside its tokens, in tokens; 8 to 128 differ little in a small BERT's time."""


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The rows' numbers, from long to short, in runs of at most `size` that cost least.

    A run costs its rows times the longest of them, as all are padded to it, and one call. The best cut of the first
    rows is the best over where its last run begins (Bellman 1957): len(lengths) times `size` steps.
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
