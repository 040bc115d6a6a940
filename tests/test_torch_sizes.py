"""`from_torch` with open dimensions: which sizes a graph takes, and what a slice of such an axis is."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import treadle
from tests.torch_modules import Applied, assert_equal

torch = pytest.importorskip("torch")
nn: Any = pytest.importorskip("torch.nn")
F: Any = torch.nn.functional

LINE = r"from +\S*torch_\w+\.py:\d+"
"""A line of the module's code. Of a function that a forward calls, torch keeps the line of the call."""


class Sized(nn.Module):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        if x.shape[0] == 1:
            return x * 3
        if x.shape[1] > 3:
            x = x + 1
        return x * 2 if x.shape[1] <= 6 else x


def test_a_size_that_the_code_branches_on_is_bounded_as_it_was_traced() -> None:
    model = treadle.from_torch(Sized(), (torch.randn(3, 5),), dynamic={"x": "A N"})
    assert model.graph.symbols["A"].lower == 2
    assert (model.graph.symbols["N"].lower, model.graph.symbols["N"].upper) == (4, 6)
    assert_equal(model, Sized(), (torch.randn(2, 4),), (torch.randn(5, 6),))
    exe = treadle.compile(model)
    for shape in ((1, 5), (2, 3), (2, 7)):
        with pytest.raises(treadle.TreadleError, match="must be at"):
            exe(x=np.ones(shape, np.float32))


class Parity(nn.Module):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        if x.shape[0] % 2 == 0:
            return x * 2
        return x


class Ordered(nn.Module):  # type: ignore[misc]
    def forward(self, x: Any, y: Any) -> Any:
        if x.shape[0] > y.shape[0]:
            return x.sum(0)
        return y.sum(0)


def test_a_branch_that_bounds_cannot_say_is_refused() -> None:
    with pytest.raises(treadle.TreadleError, match="branches on a size") as caught:
        treadle.from_torch(Parity(), (torch.randn(4, 2),), dynamic={"x": {0: "N"}})
    assert "Mod(N, 2)" in str(caught.value)
    assert "test_torch_sizes.py" in str(caught.value)
    pair = (torch.randn(4, 2), torch.randn(3, 2))
    with pytest.raises(treadle.TreadleError, match="branches on a size"):
        treadle.from_torch(Ordered(), pair, dynamic={"x": {0: "N"}, "y": {0: "M"}})
    assert_equal(treadle.from_torch(Ordered(), pair), Ordered(), pair)


# -- slices ------------------------------------------------------------------------------------------------------------

SLICES: dict[str, tuple[Any, int, tuple[int, int | None]]] = {
    # what it takes of an axis of S elements, S in the example, the bounds of S
    "head": (lambda x: x[:, :4], 8, (4, None)),
    "head at the edge": (lambda x: x[:, :4], 4, (4, None)),
    "head of a short one": (lambda x: x[:, :4], 3, (1, 4)),
    "tail": (lambda x: x[:, -4:], 8, (4, None)),
    "middle": (lambda x: x[:, 2:-4], 8, (6, None)),
    "all but some": (lambda x: x[:, :-3], 8, (3, None)),
    "from the size": (lambda x: x[:, x.shape[1] - 3 :] * 2, 8, (3, None)),
    "half": (lambda x: x[:, x.shape[1] // 2 :], 8, (1, None)),
    "strided": (lambda x: x[:, 1::2], 8, (1, None)),
    "past the end": (lambda x: x[:, 10:], 8, (1, 10)),
    "min": (lambda x: x[:, : min(4, x.shape[1])].reshape(-1), 8, (4, None)),
    "largest": (lambda x: F.pad(x, (0, max(12, x.shape[1]) - x.shape[1])), 8, (1, 12)),
    "table": (lambda x: torch.arange(32.0)[: x.shape[1]] + x, 8, (1, 32)),
    "two": (lambda x: x[:, :4] + x[:, -4:], 8, (4, None)),
    "written": (lambda x: torch.slice_scatter(x, x[:, :2] * 2, 1, -2), 8, (2, None)),
}


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_of_an_open_axis_is_taken_as_in_the_example(name: str) -> None:
    """Other sizes, of which it would take another part, are refused at the call."""
    rule, size, (lower, upper) = SLICES[name]
    model = treadle.from_torch(Applied(rule), (torch.randn(2, size),), dynamic={"x": "B S"})
    bounds = model.graph.symbols["S"]
    assert (bounds.lower, bounds.upper) == (lower, upper)
    sizes = [lower, size, lower + 1 if upper is None else upper]
    exe = assert_equal(model, Applied(rule), *((torch.randn(3, n),) for n in sizes))
    for outside in [n for n in (lower - 1, (upper or 0) + 1) if n > 0 and (upper or n < lower)]:
        if outside < lower or outside > (upper or outside):
            with pytest.raises(treadle.TreadleError, match="dimension 1 must be at"):
                exe(x=np.ones((3, outside), np.float32))


def test_a_slice_up_to_another_size_is_held_at_the_call() -> None:
    rule = Applied(lambda x: x[:, : x.shape[0]])
    model = treadle.from_torch(rule, (torch.randn(2, 8),), dynamic={"x": "B S"})
    assert [str(v.type) for v in model.graph.main.outputs.values()] == ["f32[B, B]"]
    exe = assert_equal(model, rule, (torch.randn(3, 5),), (torch.randn(4, 4),))
    with pytest.raises(treadle.TreadleError, match="from 0 to B is outside an axis of size S"):
        exe(x=np.ones((3, 2), np.float32))


def test_a_size_that_is_not_told_says_node_line_and_way_out() -> None:
    rule = Applied(lambda x: x[: min(*x.shape)])
    with pytest.raises(treadle.TreadleError, match="which of the sizes is the least") as caught:
        treadle.from_torch(rule, (torch.randn(2, 8),), dynamic={"x": "B S"})
    assert "node sym_min" in str(caught.value) or "node slice" in str(caught.value)
    assert re.search(LINE, str(caught.value))
    assert "out of dynamic=" in str(caught.value)
    assert_equal(treadle.from_torch(rule, (torch.randn(2, 8),), dynamic={"x": "B _"}), rule, (torch.randn(3, 8),))
