"""Arguments that die at a call. The callee overwrites them if it may, and the checker finds the cases in which it may
not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import PassError
from treadle.ir.graph import Function, Graph
from treadle.ir.types import f32
from treadle.passes.framework.manager import Optimized, PassManager
from treadle.passes.memory.frames import frames_of, peaks_of
from treadle.passes.memory.plan_storage import PlanStorage
from treadle.passes.memory.storage_checking import check_storage
from treadle.passes.memory.storage_plan import How

Body = Callable[[Builder, Expr], Expr]
HALVES = ({"stop": 4}, {"start": 4})


def residual(b: Builder, x: Expr) -> Expr:
    """Build a graph whose result may overwrite x, since x is read before the result is written."""
    y = b.add(x, b.tanh(x), name="y")
    return b.softmax(y, name="z")


def stacked(body: Body, calls: int = 3, *, kept: bool = False, twice: bool = False) -> Graph:
    """Return a block that is called on its own preceding result."""
    graph = Graph("stacked")
    block = Function("block")
    graph.add_function(block)
    b = Builder(graph, block)
    x = b.input("x", "f32[S, 8]")
    other = b.input("other", "f32[S, 8]")
    b.outputs(x=body(b, x) if not twice else b.softmax(b.softmax(x + 1.0) + b.softmax(other), name="z"))
    main = Builder(graph)
    given = main.input("given", "f32[S, 8]")
    first = value = main.softmax(given, name="first")
    for _ in range(calls):
        (value,) = main.call(block, [value, value if twice else given])
    main.outputs(y=main.softmax(value + first if kept else value))
    return graph


def plan_of(graph: Graph) -> Optimized:
    return PassManager((PlanStorage(strided=True),)).run(graph)


def test_a_stream_through_blocks_is_one_buffer() -> None:
    made = plan_of(stacked(residual))
    assert made.plan is not None
    block, main = made.plan.functions["block"], made.plan.functions["main"]
    assert block.reuses == tuple(made.graph.functions["block"].inputs)
    assert "its result may overwrite x or other" in str(block)
    calls = [main.places[step.root.result] for step in main.steps if step.root.op.callee]
    assert [place.how for place in calls] == [How.OVER] * 3
    assert len({place.storage for place in calls}) == 1
    assert len(made.plan.functions["main"].results) == 1
    peaks = peaks_of(frames_of(made.plan), made.graph.symbols)
    assert [str(size) for size in peaks["main"]] == ["96*S"]  # the stream and two values of a block


@pytest.mark.parametrize("encoded", ["argument", "result"])
def test_blocks_do_not_lie_where_their_numbers_did(encoded: str) -> None:
    """Elements are equal in number and dtype, but differ in bytes: f32[S, 8], and the same in 8-bit rows."""
    graph = Graph("rows")
    block = Function("block")
    graph.add_function(block)
    b = Builder(graph, block)
    if encoded == "argument":
        b.outputs(x=b.softmax(b.decode(b.input("x", f32["S", 8].as_encoded("uint8_rows")), of="uint8_rows")))
    else:
        b.outputs(x=b.encode(b.softmax(b.input("x", f32["S", 8])), to="uint8_rows"))
    main = Builder(graph)
    given = main.softmax(main.input("given", f32["S", 8]), name="given")
    if encoded == "argument":
        (value,) = main.call(block, [main.encode(given, to="uint8_rows")])
    else:
        value = main.decode(*main.call(block, [given]), of="uint8_rows")
    main.outputs(y=value)
    made = plan_of(graph)
    assert made.plan is not None
    assert made.plan.functions["block"].reuses == ()


def test_values_read_after_a_call_are_kept() -> None:
    made = plan_of(stacked(residual, kept=True))
    assert made.plan is not None
    main = made.plan.functions["main"]
    calls = [main.places[step.root.result] for step in main.steps if step.root.op.callee]
    assert [place.how for place in calls] == [How.OWN, How.OVER, How.OVER]


@pytest.mark.parametrize(
    ("body", "reused"),
    [
        (lambda b, x: b.softmax(b.exp(x) + x, name="z"), True),  # exp and add come before softmax
        (lambda b, x: b.add(b.exp(x), b.softmax(x), name="z"), True),  # the last step reads values derived from x
        (lambda b, x: b.add(b.exp(x), x, name="z"), False),  # the last step reads x and writes the result
        # the last step reads a view of x
        (lambda b, x: b.add(b.exp(x), b.rearrange(x, pattern="s d -> s d"), name="z"), False),
        # the last step reads x part by part
        (lambda b, x: b.concat(*[b.softmax(b.slice(x, axis=1, **half)) for half in HALVES]), False),
    ],
)
def test_a_callee_that_reads_late_does_not_write_over(body: Body, reused: bool) -> None:
    made = plan_of(stacked(body))
    assert made.plan is not None
    assert (made.graph.functions["block"].inputs[0] in made.plan.functions["block"].reuses) is reused


@pytest.mark.parametrize(
    ("order", "late", "reused"),
    [
        ((0, 1), False, True),  # each call overwrites the half that it reads
        ((1, 0), False, False),  # each call overwrites the other half, which is read later
        ((0, 0), False, False),  # the first half is read again
        ((0, 1), True, False),  # the callee itself reads late
    ],
)
def test_calls_that_write_a_part_each(order: tuple[int, int], late: bool, reused: bool) -> None:
    graph = Graph("parted")
    inner, block = Function("inner"), Function("block")
    for function in (inner, block):
        graph.add_function(function)
    b = Builder(graph, inner)
    x = b.input("x", "f32[4, S]")
    b.outputs(y=b.add(b.exp(x), x) if late else b.softmax(b.softmax(x)))
    b = Builder(graph, block)
    x = b.input("x", "f32[8, S]")
    halves = [b.slice(x, axis=0, **half) for half in HALVES]
    b.outputs(y=b.concat(*[b.call(inner, [halves[at]])[0] for at in order], axis=0))
    main = Builder(graph)
    main.outputs(y=main.softmax(main.call(block, [main.softmax(main.input("x", "f32[8, S]"))])[0]))
    plan = plan_of(graph).plan
    assert plan is not None
    assert (graph.functions["block"].inputs[0].name in [v.name for v in plan.functions["block"].reuses]) is reused


def test_a_call_that_takes_all_and_gives_all_is_no_part() -> None:
    graph = Graph("whole")
    inner, block = Function("inner"), Function("block")
    for function in (inner, block):
        graph.add_function(function)
    b = Builder(graph, inner)
    b.outputs(y=b.softmax(b.softmax(b.input("x", "f32[8, S]"))))
    b = Builder(graph, block)
    b.outputs(y=b.call(inner, [b.input("x", "f32[8, S]")])[0])
    main = Builder(graph)
    main.outputs(y=main.softmax(main.call(block, [main.softmax(main.input("x", "f32[8, S]"))])[0]))
    plan = plan_of(graph).plan
    assert plan is not None
    assert plan.functions["inner"].reuses
    assert plan.functions["block"].reuses == ()


def test_arguments_passed_twice_are_not_overwritten() -> None:
    made = plan_of(stacked(residual, twice=True))
    assert made.plan is not None
    main = made.plan.functions["main"]
    assert made.plan.functions["block"].reuses
    calls = [main.places[step.root.result].how for step in main.steps if step.root.op.callee]
    assert calls == [How.OWN] * 3


def test_a_caller_s_own_array_is_never_written() -> None:
    graph = Graph("given")
    block = Function("block")
    graph.add_function(block)
    b = Builder(graph, block)
    b.outputs(x=residual(b, b.input("x", "f32[S, 8]")))
    main = Builder(graph)
    (y,) = main.call(block, [main.input("given", "f32[S, 8]")])
    main.outputs(y=main.softmax(y))
    made = plan_of(graph)
    assert made.plan is not None
    plan = made.plan.functions["main"]
    assert plan.places[plan.steps[0].root.result].how is How.OWN


def test_a_false_claim_of_reuse_is_found() -> None:
    made = plan_of(stacked(lambda b, x: b.add(b.exp(x), x, name="z")))
    assert made.plan is not None
    block = made.plan.functions["block"]
    claimed = replace(block, reuses=(made.graph.functions["block"].inputs[0],))
    plan = replace(made.plan, functions={**made.plan.functions, "block": claimed})
    with pytest.raises(PassError, match="overwrites x, which it reads"):
        check_storage(made.graph, plan)


def test_a_result_that_does_not_fit_an_argument_is_found() -> None:
    graph = Graph("narrow")
    block = Function("block")
    graph.add_function(block)
    b = Builder(graph, block)
    x = b.input("x", "f32[S, 8]")
    b.outputs(y=b.softmax(b.slice(b.exp(x), axis=1, stop=4)))
    main = Builder(graph)
    (y,) = main.call(block, [main.input("given", "f32[S, 8]")])
    main.outputs(y=y)
    made = plan_of(graph)
    assert made.plan is not None
    claimed = replace(made.plan.functions["block"], reuses=(made.graph.functions["block"].inputs[0],))
    plan = replace(made.plan, functions={**made.plan.functions, "block": claimed})
    with pytest.raises(PassError, match="does not fit into the storage of an argument"):
        check_storage(made.graph, plan)
