"""Collectives: results for the inputs of all ranks, gradients, types and errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from treadle.ir.builder import Builder
from treadle.ir.errors import GraphError, RuleError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.op_registry import find_op
from treadle.ir.operation import Op
from treadle.ir.text.parser import parse_graph
from treadle.ir.transforms.differentiate import backward
from treadle.ir.types import f64

Array = np.ndarray[Any, Any]


def ops(name: str, each: Sequence[dict[str, Any]]) -> list[Any]:
    return [find_op(name).make(over="tp", ways=len(each), **attributes) for attributes in each]


def combined(name: str, each: Sequence[dict[str, Any]], parts: Sequence[Array]) -> list[Array]:
    made = ops(name, each)
    return list(made[0].combined(made, parts))


@pytest.mark.parametrize(
    ("monoid", "wanted"), [("sum", [3, 2, 8]), ("max", [2, 3, 5]), ("min", [1, -1, 3]), ("prod", [2, -3, 15])]
)
def test_all_reduce(monoid: str, wanted: list[int]) -> None:
    got = combined("all_reduce", [{"monoid": monoid}] * 2, [np.array([1, 3, 5]), np.array([2, -1, 3])])
    assert [list(x) for x in got] == [wanted, wanted]


@pytest.mark.parametrize(("monoid", "wanted"), [("and", [True, False, False]), ("or", [True, True, False])])
def test_all_reduce_of_truth_values(monoid: str, wanted: list[bool]) -> None:
    parts = [np.array([True, True, False]), np.array([True, False, False])]
    assert [list(x) for x in combined("all_reduce", [{"monoid": monoid}] * 2, parts)] == [wanted, wanted]


def test_all_gather_puts_uneven_parts_side_by_side() -> None:
    got = combined("all_gather", [{"axis": 1, "size": 3}] * 2, [np.array([[1], [2]]), np.array([[3, 4], [5, 6]])])
    assert all(np.array_equal(x, [[1, 3, 4], [2, 5, 6]]) for x in got)


def test_reduce_scatter_gives_each_rank_its_part_of_the_sum() -> None:
    parts = [np.arange(5), 10 * np.arange(5)]
    got = combined("reduce_scatter", [{"axis": 0, "size": 2}, {"axis": 0, "size": 3}], parts)
    assert [list(x) for x in got] == [[0, 11], [22, 33, 44]]


def test_all_to_all_changes_which_dimension_is_split() -> None:
    whole = np.arange(15).reshape(3, 5)
    each = [{"axis": 1, "size": 2, "onto": 0, "whole": 3}, {"axis": 1, "size": 3, "onto": 0, "whole": 3}]
    got = combined("all_to_all", each, [whole[:1], whole[1:]])
    assert np.array_equal(got[0], whole[:, :2])
    assert np.array_equal(got[1], whole[:, 2:])


def test_pass_on_gives_each_rank_the_part_of_the_one_before() -> None:
    parts = [np.arange(1), np.arange(2), np.arange(3)]
    got = combined("pass_on", [{"axis": 0, "size": n} for n in (3, 1, 2)], parts)
    assert [len(x) for x in got] == [3, 1, 2]
    back = combined("pass_on", [{"axis": 0, "size": n, "steps": -1} for n in (1, 2, 3)], got)
    assert [len(x) for x in back] == [1, 2, 3]
    (op,) = ops("pass_on", [{"axis": 0, "size": 3}])
    assert op.payload(40, 60) * op.rounds / op.ways == 40, "all of its own part"


def test_hand_on_is_between_two_of_a_line() -> None:
    given, unread = np.arange(3), np.zeros(3, int)
    sent, got = combined("hand_on", [{"source": 0, "target": 1}] * 2, [given, unread])
    assert (list(sent), list(got)) == ([0, 0, 0], [0, 1, 2])
    op = find_op("hand_on").make(over="pp", ways=4, source=2, target=3)
    assert op.among((1, 3, 5, 7)) == (5, 7)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("start", "awaited"), [("start_gather", "all_gather"), ("start_pass", "pass_on")])
def test_a_started_collective_equals_the_waited_one(start: str, awaited: str) -> None:
    attributes = {"over": "dp", "ways": 2, "axis": 0, "size": 5, "because": "why"}
    op = find_op(start).make(**attributes)
    x = np.ones((2, 3), np.float32)
    assert op.reference(x).shape == (1, 1)
    assert op.reference(x).dtype == np.float32
    begun = op.awaited  # type: ignore[attr-defined]
    assert begun == find_op(awaited).make(**attributes, ahead=True)
    assert begun.meeting != find_op(awaited).make(**attributes).meeting


def test_parts_that_are_not_the_whole_are_refused() -> None:
    with pytest.raises(GraphError, match="the parts have 4 elements in total, but the dimension has 5"):
        combined("reduce_scatter", [{"axis": 0, "size": 2}] * 2, [np.arange(5)] * 2)


def everywhere(name: str, attributes: dict[str, Any]) -> Callable[[Array], Array]:
    graph = Graph("one")
    b = Builder(graph)
    x = b.input("x", "f32[4, 6]")
    b.outputs(y=b.apply(name, x, over="tp", **attributes))
    return lambda array: interpret(graph, {"x": array})["y"]


CASES = [
    ("all_reduce", {}),
    ("all_gather", {"axis": 0, "size": 4}),
    ("reduce_scatter", {"axis": -1, "size": 6}),
    ("all_to_all", {"axis": 1, "size": 6, "onto": 0, "whole": 4}),
    ("pass_on", {"axis": 1, "size": 6}),
    ("hand_on", {"source": 0, "target": 1}),
]


@pytest.mark.parametrize(("name", "attributes"), CASES[:-1])
def test_among_one_rank_it_is_the_identity(name: str, attributes: dict[str, Any]) -> None:
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    assert np.array_equal(everywhere(name, {**attributes, "ways": 1})(x), x)


@pytest.mark.parametrize(("name", "attributes"), CASES)
def test_a_program_that_runs_alone_has_nobody_to_meet(name: str, attributes: dict[str, Any]) -> None:
    with pytest.raises(GraphError, match=f"{name} needs 2 ranks, but this program runs alone"):
        everywhere(name, {**attributes, "ways": 2})(np.zeros((4, 6), np.float32))


@pytest.mark.parametrize(("name", "attributes"), CASES)
def test_it_prints_with_its_reason_and_reads_back(name: str, attributes: dict[str, Any]) -> None:
    b = Builder(Graph("text"))
    x = b.input("x", "f32[4, 6]")
    b.outputs(y=b.apply(name, x, over="tp", ways=2, because="the split of ffn is summed", **attributes))
    assert 'over="tp", ways=2, because="the split of ffn is summed"' in str(b.graph)
    assert parse_graph(str(b.graph)) == b.graph


@pytest.mark.parametrize(
    ("name", "attributes", "report"),
    [
        ("all_reduce", {"ways": 0}, "ways must be 1 or more"),
        ("all_reduce", {"ways": -1}, "ways must be 1 or more, is -1"),
        ("hand_on", {"ways": 2, "source": -1, "target": 1}, "not -1 and 1"),
        ("all_reduce", {"ways": 2, "monoid": "mean"}, "unknown reduction 'mean'"),
        ("all_gather", {"ways": 2, "axis": 2, "size": 3}, "there is no axis 2"),
        (
            "hand_on",
            {"ways": 2, "source": 1, "target": 1},
            "source and target must be two different ranks below 2, not 1 and 1",
        ),
        ("hand_on", {"ways": 2, "source": 1, "target": 2}, "not 1 and 2"),
    ],
)
def test_impossible_placements_are_refused(name: str, attributes: dict[str, Any], report: str) -> None:
    b = Builder(Graph("wrong"))
    with pytest.raises(RuleError, match=report):
        b.apply(name, b.input("x", "f32[4, 6]"), over="tp", **attributes)


GRADIENTS = {
    "all_reduce": [{}, {}],
    "all_gather": [{"axis": 0, "size": 5}] * 2,
    "reduce_scatter": [{"axis": 0, "size": 2}, {"axis": 0, "size": 3}],
    "all_to_all": [{"axis": 1, "size": 2, "onto": 0, "whole": 5}, {"axis": 1, "size": 4, "onto": 0, "whole": 5}],
    "pass_on": [{"axis": 0, "size": 3}, {"axis": 0, "size": 2}],
    "hand_on": [{"source": 0, "target": 1}] * 2,
}
BRINGS = {
    "all_reduce": [(5, 6), (5, 6)],
    "all_gather": [(2, 6), (3, 6)],
    "reduce_scatter": [(5, 6), (5, 6)],
    "all_to_all": [(2, 6), (3, 6)],
    "pass_on": [(2, 6), (3, 6)],
    "hand_on": [(2, 6), (2, 6)],
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_gradient_is_the_transpose_over_all_ranks(name: str) -> None:
    """sum over ranks of <y, g> = sum over ranks of <x, gradient>: each op is linear in the inputs of all ranks."""
    rng = np.random.default_rng(1)
    made = ops(name, GRADIENTS[name])
    xs = [rng.normal(size=shape) for shape in BRINGS[name]]
    ys = made[0].combined(made, xs)
    gs = [rng.normal(size=y.shape) for y in ys]
    transposed = [gradient_op(op, x, g) for op, x, g in zip(made, xs, gs, strict=True)]
    order = sorted(range(2), key=lambda n: transposed[0].among(range(2)).index(n))  # type: ignore[attr-defined]
    back = transposed[0].combined(transposed, [gs[n] for n in order])  # type: ignore[attr-defined]
    back = [back[order.index(n)] for n in range(2)]
    assert [x.shape for x in back] == [x.shape for x in xs]
    given, taken = (
        sum(float(np.sum(a * b)) for a, b in pairs) for pairs in (zip(ys, gs, strict=True), zip(xs, back, strict=True))
    )
    assert given == pytest.approx(taken, rel=1e-12)


def test_the_greatest_of_terms_has_no_gradient() -> None:
    (op,) = ops("all_reduce", [{"monoid": "max"}])
    with pytest.raises(GraphError, match="all_reduce by max has no gradient"):
        gradient_op(op, np.ones((2, 3)), np.ones((2, 3)))


def gradient_op(op: Op, x: Array, g: Array) -> Op:
    b = Builder(Graph("gradient"))
    given = b.input("x", f"f64[{', '.join(map(str, x.shape))}]")
    node = b.emit(op, [given.value])
    flows = b.input("g", f"f64[{', '.join(map(str, g.shape))}]")
    found = backward(b, [node], {node.result: flows})[given.value]
    assert found.value.node is not None
    return found.value.node.op


SENDS = {
    "all_reduce": (6, 6, 40),
    "all_gather": (3, 3, 40),
    "reduce_scatter": (3, 3, 40),
    "all_to_all": (3, 3, 10),
    "pass_on": (4, 1, 10),
    "hand_on": (4, 1, 40),
}


@pytest.mark.parametrize(("name", "attributes"), CASES)
def test_collectives_have_the_cost_of_a_ring(name: str, attributes: dict[str, Any]) -> None:
    """A collective has the cost of a ring algorithm: the number of rounds, the number of messages that a rank waits
    for, and the payload in bytes for an operand of 10 and a result of 40 bytes.
    """
    op: Any = find_op(name).make(over="tp", ways=4, **attributes)
    assert (op.rounds, op.messages, op.payload(10, 40)) == SENDS[name]


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_flows_among_the_same_ranks(name: str) -> None:
    op = find_op(name).make(over="tp", ways=2, because="why", **GRADIENTS[name][0])
    x = np.zeros(BRINGS[name][0])
    back: Any = gradient_op(op, x, np.zeros(op.infer([f64[x.shape]])[0].static_shape or ()))
    assert (back.over, back.ways, back.because, getattr(back, "ahead", False)) == ("tp", 2, "why", False)


def test_ranks_differ_only_in_the_sizes_of_parts() -> None:
    one, other = ({"axis": 0, "size": size, "onto": 1, "whole": size + 1} for size in (2, 3))
    first, second, third = (
        find_op("all_to_all").make(over=over, ways=2, **each)
        for over, each in (("tp", one), ("tp", other), ("dp", one))
    )
    assert first.meeting == second.meeting != third.meeting  # type: ignore[attr-defined]


def test_passing_on_goes_one_step_by_default() -> None:
    assert [len(x) for x in combined("pass_on", [{"axis": 0, "size": 1}] * 3, [np.zeros(n) for n in range(3)])] == [
        2,
        0,
        1,
    ]
