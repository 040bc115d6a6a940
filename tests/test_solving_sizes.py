"""Symbol values derived from arrays, and the errors for arrays that do not fit."""

from __future__ import annotations

import pytest

from treadle.ir.interpreter import solve_sizes
from treadle.ir.types import parse_type


@pytest.mark.parametrize(
    ("type", "shape", "known", "found"),
    [
        ("f32[B, S, 8]", (2, 3, 8), {}, {"B": 2, "S": 3}),
        ("f32[B, S]", (2, 0), {}, {"B": 2, "S": 0}),
        ("f32[2*S+1]", (7,), {}, {"S": 3}),
        ("f32[S-1]", (0,), {}, {"S": 1}),
        ("f32[B*S]", (12,), {}, {}),
        ("f32[B*S]", (12,), {"B": 4}, {"B": 4, "S": 3}),
        ("f32[S//2]", (3,), {"S": 7}, {"S": 7}),
        ("f32[]", (), {"S": 7}, {"S": 7}),
    ],
)
def test_reported_facts(type: str, shape: tuple[int, ...], known: dict[str, int], found: dict[str, int]) -> None:
    assert solve_sizes(parse_type(type), shape, known) is None
    assert known == found


@pytest.mark.parametrize(
    ("type", "shape", "known", "report"),
    [
        ("f32[B, S]", (2,), {}, "must have rank 2, has rank 1"),
        ("f32[B, 8]", (2, 7), {}, "dimension 1 must be 8, is 7"),
        ("f32[B, S]", (2, 3), {"S": 4}, "dimension 1 must be S (S = 4), is 3"),
        ("f32[2*S+1]", (8,), {}, "dimension 0 must be 2*S+1, is 8"),
        ("f32[S+3]", (2,), {}, "dimension 0 must be S+3, is 2"),
        ("f32[B*S]", (11,), {"B": 4}, "dimension 0 must be B*S (B = 4), is 11"),
        ("f32[S//2, T]", (4, 1), {"S": 7, "B": 1}, "dimension 0 must be S//2 (S = 7), is 4"),
        ("f32[S, 2*S]", (3, 5), {}, "dimension 1 must be 2*S (S = 3), is 5"),
    ],
)
def test_misfits(type: str, shape: tuple[int, ...], known: dict[str, int], report: str) -> None:
    assert solve_sizes(parse_type(type), shape, known) == report
