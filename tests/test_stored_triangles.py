"""Stored tensors that are triangles: their detection, and the ops that rebuild the stored values exactly."""

from __future__ import annotations

import numpy as np
import pytest

from treadle.frontends.recipes.stored_triangles import triangle_of
from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.types import boolean, f16, f32, i64

SIZE = 7


def tri(diagonal: int = 0, inside: float = 1, outside: float = 0, dtype: object = np.float32) -> np.ndarray:
    keep = np.tri(SIZE, k=diagonal, dtype=np.bool_)
    return np.where(keep, inside, outside).astype(dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [f32, f16, i64, boolean], ids=str)
@pytest.mark.parametrize("diagonal", [0, 1, -1, 3, 1 - SIZE, SIZE - 2])
@pytest.mark.parametrize("upper", [False, True])
def test_a_triangle_is_made_again(dtype: object, diagonal: int, upper: bool) -> None:
    stored = tri(diagonal, *((0, 1) if upper else (1, 0)), dtype=dtype.numpy)[None, None]  # type: ignore[attr-defined]
    found = triangle_of(stored)
    assert found is not None
    assert found.diagonal == diagonal
    b = Builder(Graph("made"))
    b.outputs(y=found.build(b, dtype))  # type: ignore[arg-type]
    made = interpret(b.graph, {})["y"]
    assert made.dtype == stored.dtype
    np.testing.assert_array_equal(made, stored)


def test_other_numbers_than_0_and_1() -> None:
    found = triangle_of(tri(0, 0.0, -np.inf))
    assert found is not None
    assert (found.inside, found.outside) == (0.0, -np.inf)


OTHERS = {
    "of one number": np.ones((SIZE, SIZE), np.float32),
    "with a hole": np.where(np.arange(SIZE * SIZE).reshape(SIZE, SIZE) == 22, 0, tri()),
    "with a third number": np.where(np.arange(SIZE * SIZE).reshape(SIZE, SIZE) == 22, 0.5, tri()),
    "of NaN": tri(0, 0.0, np.nan),
    "a band": tri() - tri(-3),
    "from the other corner": tri()[::-1],
    "not square": tri()[:, :-1],
    "several": np.stack([tri(), tri(1)]),
    "of one element": np.ones((1, 1), np.float32),
    "a vector": np.arange(SIZE),
    "a diagonal": np.eye(SIZE),
    "drawn": np.random.default_rng(0).standard_normal((SIZE, SIZE)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_none_stays_a_tensor(name: str) -> None:
    assert triangle_of(OTHERS[name]) is None
