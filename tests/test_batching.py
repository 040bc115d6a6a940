"""Batches by length: the division is the cheapest, each row is in one batch, and rows are sorted from long to short."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from treadle.tasks.batching import _CALL, batches_by_length


def cost(lengths: list[int], runs: list[list[int]]) -> int:
    """Return the number of padded tokens plus the cost of each call."""
    return sum(len(run) * max(lengths[row] for row in run) + _CALL for run in runs)


@pytest.mark.parametrize("seed", range(12))
def test_the_cut_is_the_cheapest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [int(x) for x in rng.integers(1, (8, 90)[seed % 2], 9)]
    size = int(rng.integers(1, 6))
    found = batches_by_length(lengths, size)
    order = [row for run in found for row in run]
    assert sorted(order) == list(range(9))
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)
    ends = [(0, *inner, 9) for count in range(9) for inner in combinations(range(1, 9), count)]
    cuts = [[order[a:b] for a, b in pairwise(cut)] for cut in ends]
    least = min(cost(lengths, runs) for runs in cuts if max(map(len, runs)) <= size)
    assert max(map(len, found)) <= size
    assert cost(lengths, found) == least


def test_no_rows_are_no_batches() -> None:
    assert batches_by_length([], 32) == []
