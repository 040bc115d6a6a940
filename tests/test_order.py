"""The order of steps: if it is reported as proven, no other order needs less memory. It never needs more than program
order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, repeat
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.order import random_problem
from tests.backend_checks import compiled, each_backend, graph_of
from tests.random_programs import random_program
from treadle.backends.tvm.kernel_abilities import capabilities, planning
from treadle.backends.tvm.kernels.isa import ISAS
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import Size
from treadle.ir.text.parser import parse_graph
from treadle.passes.capabilities import Capabilities, each_alone
from treadle.passes.framework.manager import Optimized, PassManager
from treadle.passes.memory.frames import frame_of
from treadle.passes.memory.order import MOST_LOOKS, Buffer, Order, OrderProblem, _Sets, find_order, lower_bound
from treadle.passes.memory.ordering import _Making, drawn_sizes, have_one_order, must_precede
from treadle.passes.memory.plan_storage import PlanStorage

PLAN = planning(capabilities(ISAS["x86-64-v3"]))


def peak_by_hand(problem: OrderProblem, order: Sequence[int]) -> int:
    """Return the peak of an order, computed from the lifetimes of buffers."""
    at = {step: time for time, step in enumerate(order)}
    lives = [(min(at[s] for s in b.steps), max(at[s] for s in b.steps)) for b in problem.buffers]
    end, found = len(order), 0
    for time in range(end + 1):
        live = sum(
            b.size
            for b, (first, last) in zip(problem.buffers, lives, strict=True)
            if first <= time and (time <= last or b.kept)
        )
        if time < end:
            step = order[time]
            dies = [
                problem.buffers[made].size
                for made, x in problem.over[step]
                if lives[x][1] == time and not problem.buffers[x].kept
            ]
            live += problem.extra[step] - (dies[0] if dies else 0)
        found = max(found, live)
    return found


def every_order(problem: OrderProblem, begun: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    if len(begun) == len(problem.before):
        yield begun
    for step, before in enumerate(problem.before):
        if step not in begun and set(before) <= set(begun):
            yield from every_order(problem, (*begun, step))


def is_an_order(problem: OrderProblem, order: Sequence[int]) -> bool:
    at = {step: time for time, step in enumerate(order)}
    return sorted(order) == list(range(len(problem.before))) and all(
        at[other] < at[step] for step, before in enumerate(problem.before) for other in before
    )


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 7))
def test_no_order_is_better_than_the_one_that_is_proven(seed: int, count: int) -> None:
    problem = random_problem(seed, count)
    found = find_order(problem)
    best = min(peak_by_hand(problem, order) for order in every_order(problem))
    assert found.proven and found.peak == best == peak_by_hand(problem, found.order)
    assert lower_bound(problem) <= best
    assert is_an_order(problem, found.order)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 60))
def test_a_search_that_is_cut_off_is_never_worse_than_program_order(seed: int, count: int) -> None:
    problem = random_problem(seed, count)
    found = find_order(problem, most_sets=Random(seed).randrange(20))
    assert is_an_order(problem, found.order)
    assert found.bound <= found.peak == peak_by_hand(problem, found.order)
    assert found.peak <= peak_by_hand(problem, range(count))


def test_steps_that_gain_nothing_stay_in_program_order() -> None:
    """Two independent chains: every interleaving of them needs the same memory."""
    buffers = (Buffer(8, (0, 1)), Buffer(8, (1, 4), True), Buffer(8, (2, 3)), Buffer(8, (3, 4), True))
    problem = OrderProblem(((), (0,), (), (2,), (1, 3)), buffers, (0,) * 5, ((),) * 5)
    assert find_order(problem) == Order((0, 1, 2, 3, 4), 24, 24)


def test_memory_for_a_callee_is_taken_while_little_lives() -> None:
    """Step 1 needs 100 bytes of workspace. It must come before step 0, whose result lives until the end."""
    buffers = (Buffer(50, (0, 2)), Buffer(4, (1, 2)), Buffer(4, (2,), True))
    problem = OrderProblem(((), (), (0, 1)), buffers, (0, 100, 0), ((),) * 3)
    assert find_order(problem) == Order((1, 0, 2), 104, 104)


def test_kept_values_are_live_until_their_last_reader() -> None:
    buffers = (Buffer(100, (0,), True), Buffer(50, (2,)), Buffer(7, (1,), True))
    assert lower_bound(OrderProblem(((), (), (0,)), buffers, (0, 0, 0), ((),) * 3)) == 150


def test_the_search_goes_through_as_many_sets_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = next(p for p in map(random_problem, range(100), repeat(12)) if find_order(p).peak < p.peak(range(12)))
    search, following, tried = _Sets(problem), _Sets._next, list[object]()
    monkeypatch.setattr(_Sets, "_next", lambda self, at: tried.append(at) or following(self, at))
    start = lower_bound(problem), problem.peak(range(12))
    found, peak = search.exact(*start, 10**6)
    count = len(tried)
    assert found is not None
    assert search.exact(*start, count) == (found, peak)
    assert search.exact(*start, count - 1)[0] is None
    assert len(tried) == 3 * count - 1


@pytest.mark.parametrize(("count", "width"), [(3, 32), (125, 32), (126, 31), (2001, 1), (4001, 1)])
def test_how_long_is_searched(count: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search is exact for up to two thousand sets of steps. Beyond that, a beam of 32 sets is used, or fewer for
    many steps.
    """
    given: list[int] = []
    program = tuple(range(count))
    monkeypatch.setattr(_Sets, "exact", lambda self, bound, peak, most: given.append(most) or (None, bound))
    monkeypatch.setattr(_Sets, "beam", lambda self, bound, width: given.append(width) or program)
    buffers = (Buffer(100, (1,)), Buffer(8, (0, 2)))  # step 1 should come first
    problem = OrderProblem(((),) * count, buffers, (0,) * count, ((),) * count)
    assert find_order(problem).order == program
    assert given == [2000, width]


@pytest.mark.parametrize(("count", "is_searched"), [(40, True), (400, False)])
def test_a_search_ends_soon_where_many_steps_may_follow(
    count: int, is_searched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step stores a little, and needs more while it runs. So the step that needs the least should come last."""
    looked: list[int] = []
    looking = _Sets.run
    monkeypatch.setattr(
        _Sets, "run", lambda self, done, live, step: looked.append(step) or looking(self, done, live, step)
    )
    buffers = [(Buffer(8, (step,), True), Buffer(1000 + step, (step,))) for step in range(count)]
    problem = OrderProblem(((),) * count, tuple(b for pair in buffers for b in pair), (0,) * count, ((),) * count)
    found = find_order(problem)
    assert (found.peak < problem.peak(range(count))) is is_searched
    assert len(looked) <= 3 * MOST_LOOKS + 3 * count


# -- graphs --------------------------------------------------------------------------------------------------------


def two_branches(b: Builder) -> Expr:
    """Program order computes both of the large values before it sums either of them."""
    x = b.input("x", "f32[S, 8]")
    w = b.parameter("w", "f32[64, 8]")
    one, other = b.softmax(b.linear(x, w)), b.softmax(b.linear(b.tanh(x), w))
    return b.softmax(b.reduce_max(one, axes=(1,)) + b.reduce_max(other, axes=(1,)))


def lowered(graph: Graph, plan: PlanStorage) -> Optimized:
    return PassManager((plan,)).run(graph)


@pytest.mark.parametrize("plan", [PlanStorage(), PlanStorage(strided=True), PLAN], ids=["library", "strided", "chains"])
def test_a_graph_is_reordered_where_that_needs_less(plan: PlanStorage) -> None:
    graph = graph_of(two_branches)
    found = lowered(graph, plan)
    assert found.plan is not None
    main = found.plan.functions["main"]
    assert main.reordered is not None and main.reordered.after < main.reordered.before
    names = [step.root.op.name for step in main.steps]
    assert names.index("reduce_max") < len(names) - 1 - names[::-1].index("linear")
    assert f"main: {main.reordered}" in found.log[-1].notes
    assert str(main.reordered) in str(main)
    plain = lowered(graph, replace(plan, ordered=False))
    assert plain.plan is not None and plain.plan.functions["main"].reordered is None
    assert [s.root for s in plain.plan.functions["main"].steps] == [
        s.root for s in plan.backend.grouped(plain.graph.main)
    ]


@each_backend
def test_numbers_are_those_of_program_order(backend: str) -> None:
    graph = graph_of(two_branches)
    rng = np.random.default_rng(0)
    given = {"x": rng.standard_normal((5, 8), np.float32)}
    weights = {"w": rng.standard_normal((64, 8), np.float32)}
    expected = interpret(graph, given, weights, float64=True)["y"]
    np.testing.assert_allclose(compiled(backend, graph, weights)(**given)["y"], expected, rtol=1e-5)


def test_steps_with_one_order_are_told_from_others() -> None:
    """All orders are enumerated, which shows if there is a second one."""
    report = []
    for seed in range(24):
        function = next(iter(random_program(seed).functions.values()))
        steps = each_alone(function)[: 3 + seed % 4]
        before = must_precede(function, steps)
        problem = OrderProblem(before, (), (0,) * len(steps), ((),) * len(steps))
        report.append(have_one_order(before))
        assert report[-1] == (len(list(islice(every_order(problem), 2))) == 1), seed
    assert set(report) == {True, False}


def test_orders_are_looked_for_at_a_few_sizes() -> None:
    s = Size.symbol("S")
    free, bounded = {"B": Bounds(), "S": Bounds()}, {"B": Bounds(20), "S": Bounds(1, 100)}
    assert list(drawn_sizes(free, [s])) == [{"B": 128, "S": 129}, {"B": 16, "S": 17}, {"B": 1009, "S": 1010}]
    assert list(drawn_sizes(bounded, [])) == [{"B": 128, "S": 100}, {"B": 20, "S": 17}, {"B": 1009, "S": 100}]
    assert list(drawn_sizes({"S": Bounds(1, 9)}, [])) == [{"S": 9}], "no two alike"
    assert list(drawn_sizes(free, [s - 17])) == list(drawn_sizes(free, [s]))
    assert len(list(drawn_sizes(free, [s - 18]))) == 2, "one would be negative"
    assert not list(drawn_sizes(free, [Size.symbol("T")]))


UPDATED_LATE = """graph updated {
  symbols B, R
  states {
    k: f32[R, 8, 16]
  }

  main(x: f32[B, 1, 16], rows: i64[B], start: i64[B]) -> (y: f32[16], z: f32[B, 8]) {
    turned = rearrange(%k, pattern="r c d -> d c r")       # f32[16, 8, R]
    some = exp(turned)                                     # f32[16, 8, R]
    y = reduce_sum(some, axes=[1, 2])                      # f32[16]
    %k = append(%k, x, rows, start, axis=1)                # f32[R, 8, 16]
    late = gather(%k, rows)                                # f32[B, 8, 16]
    z = reduce_sum(late, axes=[2])                         # f32[B, 8]
    return y = y, z = z
  }
}
"""


def test_readers_of_a_state_come_before_its_update() -> None:
    main = parse_graph(UPDATED_LATE).main
    before = must_precede(main, each_alone(main))
    assert before[3] == (0, 1)  # exp reads a view of the state's old value
    assert before[4] == (3,)


@pytest.mark.parametrize("merged", [True, False])
def test_values_in_the_readers_layout_overwrite_nothing(merged: bool) -> None:
    """The storage has the reader's layout, so another order of steps saves no memory there."""

    def build(b: Builder) -> Expr:
        y = b.exp(b.tanh(b.input("x", "f32[S, 2, 4]")))
        return b.softmax(b.rearrange(y, pattern="s h d -> h s d") if merged else y)

    plan = replace(PLAN, ordered=False, backend=Capabilities())
    made = PassManager((plan,)).run(graph_of(build)).plan
    assert made is not None
    main = made.functions["main"]
    frame = frame_of(main, {}, strided=True)
    before = must_precede(main.function, main.steps)
    over = _Making(main, frame, before, PLAN.backend.over).over
    names = [step.root.op.name for step in main.steps]
    assert over[names.index("exp")] == (() if merged else ((1, 0),))
