"""The arena: values that live at the same time never overlap, and memory is used again."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.passes.memory.checking import check_placement
from treadle.passes.memory.frame_placement import plan_arena
from treadle.passes.memory.frames import ALIGNMENT
from treadle.passes.memory.instances import Lifetime

lifetimes = st.lists(
    st.builds(
        lambda first, length, size: Lifetime("x", first, first + length, size),
        st.integers(0, 20),
        st.integers(1, 10),
        st.integers(0, 1000),
    ),
    max_size=25,
)


@given(lifetimes)
def test_no_two_live_buffers_overlap(lives: list[Lifetime]) -> None:
    offsets = plan_arena(lives)
    end = check_placement(lives, offsets, alignment=ALIGNMENT)
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    for i, x in enumerate(lives):
        assert offsets[i] + x.size <= end
        for j, y in enumerate(lives[:i]):
            together = x.first < y.end and y.first < x.end and x.size and y.size
            apart = offsets[i] + x.size <= offsets[j] or offsets[j] + y.size <= offsets[i]
            assert apart or not together


def test_memory_is_used_again() -> None:
    chain = [Lifetime(f"x{i}", i, i + 2, 640) for i in range(100)]
    assert check_placement(chain, plan_arena(chain), alignment=ALIGNMENT) == 2 * 640


def cut(rng: np.random.Generator, first: int, end: int, low: int, high: int) -> list[Lifetime]:
    """Return buffers that divide a rectangle of steps and memory and fill it; the best plan takes `high - low`
    units.
    """
    length, height = end - first, high - low
    if max(length, height) == 1 or rng.random() < 0.08:
        return [Lifetime(f"{first} to {end} at {low}", first, end, height * ALIGNMENT)]
    if height == 1 or (length > 1 and rng.random() < 0.5):
        at = int(rng.integers(first + 1, end))
        return cut(rng, first, at, low, high) + cut(rng, at, end, low, high)
    at = int(rng.integers(low + 1, high))
    return cut(rng, first, end, low, at) + cut(rng, first, end, at, high)


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_is_near_the_best_one(seed: int) -> None:
    """A plan is within a tenth of the known minimum. Most of these cases take more if buffers are placed in the given
    order.
    """
    rng = np.random.default_rng(seed)
    lives = cut(rng, 0, 64, 0, 64)
    rng.shuffle(lives)  # type: ignore[arg-type]
    peaks = {sum(x.size for x in lives if x.first <= t < x.end) for t in range(64)}
    assert peaks == {64 * ALIGNMENT}
    assert check_placement(lives, plan_arena(lives), alignment=ALIGNMENT) <= 64 * ALIGNMENT * 1.1


def drawn(seed: int) -> list[Lifetime]:
    r = Random(seed)
    made = []
    for _ in range(40):
        first = r.randrange(60)
        end = first + r.choice((1, 2, 3, 5, 8, 20))
        made.append(Lifetime("x", first, end, r.choice((1, 2, 3, 5, 7, 11, 13)) * ALIGNMENT))
    return made


@pytest.mark.parametrize(
    ("seed", "units"), [(61, 39), (53, 56), (179, 42), (13, 56), (75, 57), (0, 42), (26, 57), (77, 47)]
)
def test_each_order_is_the_best_one_somewhere(seed: int, units: int) -> None:
    """For each seed, exactly one of the eight orders reaches the minimum, and each order is the best for one seed."""
    lives = drawn(seed)
    assert check_placement(lives, plan_arena(lives), alignment=ALIGNMENT) == units * ALIGNMENT
