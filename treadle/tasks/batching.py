"""Batches of rows of like lengths: padding costs as much as words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches_by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Runs of the rows' numbers, from long to short, of at most `size` rows, none under half as long as another."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    for at in range(1, len(order) + 1):
        longest = lengths[order[start]]
        if at == len(order) or at - start == size or 2 * lengths[order[at]] < longest:
            yield order[start:at]
            start = at
