"""The arena: what lives at once never overlaps, and a plan that lies is caught."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.backends.arena import ALIGNMENT, Lifetime, check_arena, plan_arena
from treadle.ir.errors import BackendError

INSTANCES = Path(__file__).resolve().parents[2] / "shared" / "data" / "memory"

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
    end = check_arena(lives, offsets)
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    for i, x in enumerate(lives):
        assert offsets[i] + x.size <= end
        for j, y in enumerate(lives[:i]):
            together = x.first < y.end and y.first < x.end and x.size and y.size
            apart = offsets[i] + x.size <= offsets[j] or offsets[j] + y.size <= offsets[i]
            assert apart or not together


def test_memory_is_used_again() -> None:
    chain = [Lifetime(f"x{i}", i, i + 2, 640) for i in range(100)]
    assert check_arena(chain, plan_arena(chain)) == 2 * 640


def test_a_plan_that_lies_is_caught() -> None:
    lives = [Lifetime("x", 0, 3, 100), Lifetime("y", 2, 4, 100), Lifetime("z", 3, 5, 100)]
    assert check_arena(lives, [0, 128, 0]) == 256
    with pytest.raises(BackendError, match="two buffers that live at once overlap"):
        check_arena(lives, [0, 64, 128])


@pytest.mark.skipif(not INSTANCES.is_dir(), reason="the benchmark instances are not there")
def test_real_instances_are_planned_well() -> None:
    """Within a third of the most that lives at once, which no plan can beat."""
    for file in sorted(INSTANCES.glob("*resnet50*.csv")):
        with file.open() as rows:
            lives = [Lifetime(r["id"], int(r["lower"]), int(r["upper"]), int(r["size"])) for r in csv.DictReader(rows)]
        peak = max(sum(x.size for x in lives if x.first <= t < x.end) for t in {x.first for x in lives})
        assert check_arena(lives, plan_arena(lives)) <= peak * 4 / 3
