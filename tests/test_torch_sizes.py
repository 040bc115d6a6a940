"""`from_torch` with open dimensions: the sizes that a graph accepts, and slices of open axes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import treadle
from tests.torch_modules import Applied, Rule, assert_equal, drawn
from treadle.frontends.torch_export.guards import _always
from treadle.frontends.torch_export.sizes import Symbols
from treadle.ir.sizing.size_bounds import Bounds

torch = pytest.importorskip("torch")
nn: Any = pytest.importorskip("torch.nn")
F: Any = torch.nn.functional

LINE = r"from +\S*torch_\w+\.py:\d+"
"""Pattern of a line of the module's code. For a function that `forward` calls, torch.export records the line of the
call.
"""


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


BRANCHES: dict[str, tuple[Any, bool]] = {
    # a condition on sizes N and M, which are 3 and 4 in the example, and True if it has the same value for all sizes
    "sum": (lambda n, m: n + m > 1, True),
    "sum, at the edge": (lambda n, m: n + m >= 2, True),
    "sum, past it": (lambda n, m: n + m > 2, False),
    "product": (lambda n, m: n * m > 0, True),
    "less": (lambda n, m: n < m, False),
    "at most": (lambda n, m: n <= m + 2, False),
    "apart": (lambda n, m: n != n + m, True),
    "either": (lambda n, m: n * m > 0 or n > m, True),
    "quotient": (lambda n, m: n / m < 9, False),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_on_two_sizes_is_taken_where_all_sizes_go_one_way(name: str) -> None:
    condition, holds = BRANCHES[name]
    rule = Rule(lambda x, y: x * 2 if condition(x.shape[0], y.shape[0]) else x * 3)
    pair, dynamic = (torch.randn(3, 2), torch.randn(4, 2)), {"args_0": {0: "N"}, "args_1": {0: "M"}}
    if holds:
        model = treadle.from_torch(rule, pair, dynamic=dynamic)
        assert_equal(model, rule, pair, (pair[0][:1], pair[1][:1]))
        return
    known = "may not be valid for all sizes" if name == "quotient" else "is valid only for some sizes"
    with pytest.raises(treadle.TreadleError, match=f"branches on a size, and that branch {known}"):
        treadle.from_torch(rule, pair, dynamic=dynamic)


STRIDED: dict[str, tuple[list[Any], Any, dict[str, int]]] = {
    # layers, a function that follows them, and the smallest size of each axis
    "no elements": ([nn.Conv2d(3, 3, 2, stride=3), nn.AvgPool2d(2, 2)], None, {"B": 1, "L": 5, "W": 5}),
    "turned": (
        [nn.Conv2d(3, 3, 2, stride=3), nn.AvgPool2d(3, 3)],
        lambda y: y.transpose(1, 2).reshape(y.shape[0], -1),
        {},
    ),
    "mean": ([nn.MaxPool2d(2, 3), nn.AvgPool2d(2, 2)], lambda y: y.mean(dim=(2, 3)), {}),
    "product": ([nn.AvgPool2d(3, 2)], lambda y: y * 2 if (y.shape[2] - 1) * (y.shape[3] - 2) != 0 else y, {}),
    "both": ([nn.Conv2d(3, 3, 2, 3)], lambda y: y if y.shape[2] > 1 and y.shape[3] > 2 else y * 2, {"L": 5, "W": 8}),
    "maximum": (
        [nn.MaxPool2d(2, 2)],
        lambda y: y * 2 if max(1, y.shape[2] - 1) * max(1, y.shape[3]) > 0 else y,
        {},
    ),
}


@pytest.mark.parametrize("name", STRIDED)
def test_conditions_that_hold_for_all_sizes_after_strides(name: str) -> None:
    layers, after, least = STRIDED[name]
    torch.manual_seed(0)
    chain = drawn(nn.Sequential(*layers))
    module = Applied((lambda x: after(chain(x))) if after is not None else chain)
    model = treadle.from_torch(module, (torch.randn(2, 3, 34, 41),), dynamic={"x": "B _ L W"})
    held = model.graph.symbols
    assert {symbol: held[symbol].lower for symbol in least} == least
    assert all(bounds.upper is None for bounds in held.values())
    assert_equal(model, module, *[(torch.randn(b, 3, n, m),) for b, n, m in ((2, 34, 41), (1, 23, 30), (3, 22, 29))])


def test_a_condition_that_fails_somewhere_is_said_to_fail() -> None:
    module = Applied(lambda x: x * 2 if 2 * (x.shape[0] // 2) * x.shape[1] < x.shape[0] * x.shape[1] else x)
    with pytest.raises(treadle.TreadleError, match="that branch is valid only for some sizes"):
        treadle.from_torch(module, (torch.randn(3, 4),), dynamic={"x": "N M"})


ALONE: dict[str, tuple[Any, tuple[int, int | None] | None]] = {
    # a condition on a size that is 4 in the example, and the resulting bounds; None if bounds cannot express it
    "below": (lambda n: n < 6, (1, 5)),
    "square": (lambda n: n * n > 8, (3, None)),
    "cube": (lambda n: n**3 > 8, (3, None)),
    "always": (lambda n: n % 2 < 2, (1, None)),
    "ranges": (lambda n: (n - 1) // 3 == 1, (4, 6)),
    "hole": (lambda n: n != 3, (4, None)),
    "half": (lambda n: n / 2 > 1, None),
    "far": (lambda n: n < 600_000, None),
    "not so far": (lambda n: n < 500_000, (1, 499_999)),
}


@pytest.mark.parametrize("name", ALONE)
def test_the_bounds_that_a_branch_on_one_size_gives(name: str) -> None:
    condition, bounds = ALONE[name]
    rule = Applied(lambda x: x * 2 if condition(x.shape[0]) else x)
    if bounds is None:
        with pytest.raises(treadle.TreadleError, match="branches on a size") as caught:
            treadle.from_torch(rule, (torch.ones(4),), dynamic={"x": "N"})
        assert "N" in str(caught.value.received)
        return
    held = treadle.from_torch(rule, (torch.ones(4),), dynamic={"x": "N"}).graph.symbols["N"]
    assert (held.lower, held.upper) == bounds


@pytest.mark.parametrize(
    ("left", "kind", "right", "holds"),
    [
        ("s0 + s1", "Gt", 1, True),
        ("s0 + s1", "Gt", 2, False),
        ("s0 + s1", "Ge", 2, True),
        ("s0 + s1", "Ge", 3, False),
        ("-s0 - s1", "Lt", -1, True),
        ("-s0 - s1", "Lt", -2, False),
        ("-s0 - s1", "Le", -2, True),
        ("-s0 - s1", "Le", -3, False),
        ("(3*s0 - 2)*(3*s1 - 2)", "Gt", 0, True),
        ("(3*s0 - 2)*(3*s1 - 2)", "Gt", 1, False),
        ("9*s0*s1 - 6*s0 - 6*s1 + 4", "Ge", 1, True),
        ("9*s0*s1 - 6*s0 - 6*s1 + 2", "Ge", 0, False),
        ("Max(1, s0 - 5)*Max(2, s1 - 7)", "Ge", 2, True),
        ("Min(s0, 4) - s1", "Lt", 4, True),
        ("s0*s1 - s1", "Ge", 0, True),
        ("(s0 - s1)**2", "Ge", 0, False),
        ("s0**2*s1", "Ge", 1, True),
        ("s0 + s1", "Ne", 1, True),
        ("-s0 - s1", "Ne", 0, True),
        ("s0 + s1", "Ne", 2, False),
        ("s0 + s1", "Eq", 2, False),
        ("s0**(1/2)", "Gt", 0, False),
        ("s0 + s1", "Xor", 2, False),
    ],
)
def test_a_comparison_that_holds_for_all_sizes(left: str, kind: str, right: int, holds: bool) -> None:
    """All sizes are 1 or more."""
    sympy: Any = pytest.importorskip("sympy")
    symbols = Symbols()
    symbols.names = {"s0": "N", "s1": "M"}
    if kind == "Xor":
        assert not _always(sympy.Xor(sympy.Symbol("a"), sympy.Symbol("b")), {}, symbols)
        return
    expr = getattr(sympy, kind)(sympy.sympify(left), right, evaluate=False)
    assert _always(expr, {"N": Bounds(1), "M": Bounds(1)}, symbols) is holds
    other = sympy.Gt(sympy.Symbol("s0"), 5)
    assert _always(sympy.And(expr, other), {}, symbols) is False
    assert _always(sympy.Or(other, expr, evaluate=False), {}, symbols) is holds


@pytest.mark.parametrize("power", [2, 8, 9])
def test_a_size_to_a_power_is_a_product(power: int) -> None:
    rule, x = Applied(lambda x: x.new_zeros(x.shape[0] ** power)), torch.randn(2)
    if power == 9:
        with pytest.raises(treadle.TreadleError, match="a size of Pow is not supported") as caught:
            treadle.from_torch(rule, (x,), dynamic={"x": "B"})
        assert caught.value.received == "B**9"
        return
    (made,) = treadle.from_torch(rule, (x,), dynamic={"x": "B"}).graph.main.outputs.values()
    assert str(made.type) == f"f32[{'*'.join('B' * power)}]"


def test_a_dimension_that_is_dropped_where_it_is_one_is_two_or_more() -> None:
    rule = Applied(lambda x: x.squeeze(1))
    model = treadle.from_torch(rule, (torch.randn(2, 8),), dynamic={"x": "B S"})
    assert (model.graph.symbols["B"].lower, model.graph.symbols["S"].lower) == (1, 2)
    assert_equal(model, rule, (torch.randn(1, 2),))


def test_a_variance_of_fewer_than_its_correction_is_infinite() -> None:
    rule = Applied(lambda x: x.var(0, correction=3))
    model = treadle.from_torch(rule, (torch.randn(5, 2),), dynamic={"x": "N _"})
    assert_equal(model, rule, (torch.randn(5, 2),))
    got = treadle.compile(model)(x=np.array([[1.0, 0.0], [3.0, 2.0]], np.float32))["output"]
    assert np.isposinf(got).all()


# -- slices ------------------------------------------------------------------------------------------------------------

SLICES: dict[str, tuple[Any, int, tuple[int, int | None]]] = {
    # a slice of an axis of S elements, S in the example, and the bounds of S
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
    """Sizes for which the slice would be another part are refused at the call."""
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
    with pytest.raises(treadle.TreadleError, match="the smallest of several sizes differs") as caught:
        treadle.from_torch(rule, (torch.randn(2, 8),), dynamic={"x": "B S"})
    assert "node sym_min" in str(caught.value) or "node slice" in str(caught.value)
    assert re.search(LINE, str(caught.value))
    assert "out of dynamic=" in str(caught.value)
    assert_equal(treadle.from_torch(rule, (torch.randn(2, 8),), dynamic={"x": "B _"}), rule, (torch.randn(3, 8),))
