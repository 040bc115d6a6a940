"""Graphs with states and several entries: identity, transforms, passes, results, cost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.stateful_graphs import BLOCKS, blocks, counter, drop_update, forget, give, node
from treadle.ir.analysis.cost import graph_cost, node_cost, state_bytes
from treadle.ir.builder import Builder
from treadle.ir.errors import GraphError, PassError
from treadle.ir.graph import Function, Graph, Value
from treadle.ir.hashing import canonical_form, structural_hash
from treadle.ir.interpreter import interpret, interpret_entry
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.printer import print_graph
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.transforms.inline import inline_calls
from treadle.ir.transforms.outline import RepeatedRegion, outline_regions
from treadle.ir.verifier import verify
from treadle.passes.certificates.same_expressions import check_same_expressions
from treadle.passes.cleanup.common_subexpressions import CommonSubexpressions
from treadle.passes.cleanup.dead_code import DeadCode
from treadle.passes.framework.manager import BrokenPassError, Pass, PassManager
from treadle.passes.framework.pass_log import PassRecord
from treadle.passes.lowering.hoist_weights import HoistWeights
from treadle.passes.pipelines import DEFAULT
from treadle.reporting.graphs import graph_facts, graph_header

# -- identity ----------------------------------------------------------------------------------------------------


def test_a_copy_shares_nothing_that_changes() -> None:
    graph = blocks()
    copy = clone_graph(graph)
    verify(copy)
    assert copy == graph and print_graph(copy) == print_graph(graph)
    values = {id(v) for f in graph.functions.values() for v in (*f.arguments, *f.results)}
    assert values.isdisjoint(id(v) for f in copy.functions.values() for v in (*f.arguments, *f.results))


OTHER: dict[str, Callable[[Graph], object]] = {
    "no update": lambda g: (forget(g, "step", "seen"), drop_update(g)),
    "another entry": lambda g: g.add_entry("verify"),
    "another state": lambda g: g.main.states.update(more=Value("state", g.states["seen"].type, "more")),
}


@pytest.mark.parametrize("name", OTHER)
def test_graphs_with_different_states_differ(name: str) -> None:
    graph = blocks()
    known = structural_hash(graph)
    OTHER[name](graph)
    assert structural_hash(graph) != known and graph != blocks()


def test_two_states_that_change_places_are_another_graph() -> None:
    """The graphs differ only in which state each update goes to."""
    text = """graph g {
  states {
    a: i64[2, 1]
    b: i64[2, 1]
  }
  main(rows: i64[1], x: i64[1, 1]) -> () {
    %a = append(%a, x, rows, rows, axis=1)
    return
  }
}
"""
    assert parse_graph(text) != parse_graph(text.replace("%a", "%b"))
    swapped = text.replace("a: i64[2, 1]\n    b: i64[2, 1]", "b: i64[2, 1]\n    a: i64[2, 1]")
    assert parse_graph(text) == parse_graph(swapped)


def plain() -> Graph:
    b = Builder(Graph("plain"))
    b.outputs(y=-b.input("x", "f32[2]"))
    return b.graph


def test_a_graph_without_states_is_what_it_was() -> None:
    graph = plain()
    form = ["symbols ", "initial ", 'function "main"', 'input "x":f32[2]', "neg[](i0)f32[2]", 'output "y":0:f32[2]']
    assert canonical_form(graph).splitlines() == form
    assert print_graph(graph, sources=False).splitlines()[1] == "  main(x: f32[2]) -> (y: f32[2]) {"


def test_a_state_is_a_vertex_before_and_after() -> None:
    pytest.importorskip("networkx")
    found = blocks().to_networkx("step")
    kinds = [data["label"] for _, data in found.nodes(data=True) if data.get("kind") in ("state", "updated")]
    assert kinds == ["h.0.mem.k", "seen", "h.0.mem.k", "seen"]


# -- transforms --------------------------------------------------------------------------------------------------


def run(graph: Graph, entry: str, steps: int = 3) -> list[dict[str, np.ndarray]]:
    """Return outputs and states of consecutive calls."""
    rng = np.random.default_rng(7)
    weights = {n: rng.standard_normal(v.type.evaluate({})) for n, v in graph.parameters.items()}
    states = {n: np.zeros(v.type.evaluate({"R": 3, "C": 9}), v.type.dtype.numpy) for n, v in graph.states.items()}
    length = 1 if entry == "step" else 2
    found = []
    for at in range(steps):
        rows = rng.permutation(3)[:2]
        x = rng.standard_normal((2, length, 4)).astype(np.float32)
        inputs = {"x": x, "rows": rows, "start": np.array([at * length, 1])}
        outputs, states = interpret_entry(graph, entry, inputs, weights, states, float64=True)
        found.append({**outputs, **states})
    return found


def same(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name, array in a.items():
            np.testing.assert_array_equal(array, b[name], err_msg=name)


def test_inlining_keeps_states() -> None:
    graph = blocks()
    flat = inline_calls(graph)
    verify(flat)
    assert list(flat.functions) == ["prefill", "step"]
    assert list(flat.functions["prefill"].updated) == ["h.0.mem.k", "h.1.mem.k"]
    assert [n.scope for n in flat.functions["prefill"].nodes if n.op.updates] == ["h.0.mem", "h.1.mem"]
    assert parse_graph(print_graph(flat)) == flat
    for entry in ("prefill", "step"):
        same(run(graph, entry), run(flat, entry))


def test_outlining_gives_each_repetition_its_states() -> None:
    text = """graph g {
  symbols B, R, C
  parameters {
    h.{0..1}.w: f32[4, 4]
  }
  states {
    h.{0..1}.k: f32[R, C, 4]
    last: f32[R, 1, 4]
  }
  main(x: f32[B, 1, 4], rows: i64[B], start: i64[B], zero: i64[B]) -> (y: f32[B, 1, 4]) {
    a = linear(x, $h.0.w)                                        # f32[B, 1, 4]  h.0
    %h.0.k = append(%h.0.k, a, rows, start, axis=1)              # f32[R, C, 4]  h.0
    b = gather(%h.0.k, rows)                                     # f32[B, C, 4]  h.0
    y = reduce_sum(b, axes=[1], keep=true)                       # f32[B, 1, 4]  h.0
    %last = append(%last, y, rows, zero, axis=1)                 # f32[R, 1, 4]  h.0
    a_2 = linear(y, $h.1.w)                                      # f32[B, 1, 4]  h.1
    %h.1.k = append(%h.1.k, a_2, rows, start, axis=1)            # f32[R, C, 4]  h.1
    b_2 = gather(%h.1.k, rows)                                   # f32[B, C, 4]  h.1
    y_2 = reduce_sum(b_2, axes=[1], keep=true)                   # f32[B, 1, 4]  h.1
    %last = append(%last, y_2, rows, zero, axis=1)               # f32[R, 1, 4]  h.1
    return y = y_2
  }
}
"""
    graph = parse_graph(text)
    expected = clone_graph(graph)
    nodes = graph.main.nodes
    outline_regions(graph, [RepeatedRegion("h", f"h.{n}", nodes[5 * n : 5 * n + 5]) for n in range(2)])
    verify(graph)
    block = graph.functions["h"]
    assert list(block.states) == ["k", "last"] and list(block.updated) == ["k", "last"]
    assert print_graph(graph).count("with h.0 {last: %last}") == 1
    assert parse_graph(print_graph(graph)) == graph
    assert inline_calls(graph) == expected


# -- passes ------------------------------------------------------------------------------------------------------


def optimized(graph: Graph, *passes: Pass) -> Graph:
    return PassManager(passes).run(graph).graph


def test_passes_keep_what_stateful_graphs_mean() -> None:
    graph = blocks()
    made = optimized(graph, *DEFAULT)
    assert made.entry_names == ("prefill", "step")
    for entry in ("prefill", "step"):
        for a, b in zip(run(graph, entry), run(made, entry), strict=True):
            for name, array in a.items():
                np.testing.assert_allclose(b[name], array, rtol=1e-12, atol=1e-12, err_msg=name)


def test_equal_updates_are_not_one() -> None:
    """A counter that is incremented twice must not be incremented once."""
    graph = blocks()
    made = optimized(graph, CommonSubexpressions())
    assert made == graph
    b = Builder(Graph("pure"))
    given = [b.input(n, t) for n, t in (("k", "f32[3,4]"), ("x", "f32[2,1]"), ("rows", "i64[2]"), ("start", "i64[2]"))]
    b.outputs(y=b.append(*given, axis=1), z=b.append(*given, axis=1))
    assert len(optimized(b.graph, CommonSubexpressions()).main.nodes) == 2


def test_an_update_is_a_root_and_what_nobody_reads_goes() -> None:
    graph = blocks()
    graph.main.states["more"] = Value("state", graph.states["seen"].type, "more")
    for function in ("prefill", "step"):
        graph.functions[function].outputs.clear()
    result = PassManager([DeadCode()]).run(graph)
    made = result.graph
    assert "removed unused states: more" in result.log[0].notes
    assert [n.op.name for n in made.functions["step"].nodes] == ["linear", "append", "gather", "add", "mul", "append"]
    assert list(made.functions["h"].outputs) == ["y"]  # the second call reads y
    assert [len(n.results) for n in made.functions["prefill"].nodes] == [2, 2]
    assert "scale" not in made.parameters


def test_a_block_s_update_stays_where_its_outputs_go() -> None:
    graph = blocks()
    prefill = graph.functions["prefill"]
    prefill.outputs.clear()
    prefill.nodes[1].operands = (prefill.inputs[0], *prefill.nodes[1].operands[1:])
    made = optimized(graph, DeadCode())
    assert not made.functions["h"].outputs and list(made.functions["h"].updated) == ["mem.k"]
    assert [len(n.results) for n in made.functions["prefill"].nodes] == [1, 1]
    assert "    h(x, rows, start) with h.0" in print_graph(made)
    assert parse_graph(print_graph(made)) == made


def test_entries_share_what_is_made_of_weights() -> None:
    """Both entries, and the block of one of them, read the same exponentials; bind computes each exponential once."""
    text = BLOCKS.replace("linear(x, $w)", "linear(x, double)").replace("linear(x, $h.0.w)", "linear(x, double)")
    text = text.replace("  {\n    linear", "  {\n    double = add($w, $w)\n    linear")
    text = text.replace("seen: i64[B, 1]) {\n", "seen: i64[B, 1]) {\n    double = add($h.0.w, $h.0.w)\n")
    text = text.replace("mul(y_2, $scale)", "mul(y_2, twice)").replace(
        "    y_2 = h", "    twice = exp($scale)\n    y_2 = h"
    )
    text = text.replace(
        "return y = y, seen", "twice = exp($scale)\n    more = mul(y, twice)\n    return y = more, seen"
    )
    graph = parse_graph(text)
    verify(graph)
    made = optimized(graph, HoistWeights())
    assert made.entry_names == ("bind", "prefill", "step")
    assert made.bind is not None and [n.op.name for n in made.bind.nodes] == ["call", "exp", "call", "add"]
    assert made.functions["step"].parameters.keys() == {"double", "twice"}
    assert made.functions["prefill"].parameters["twice"].type == made.functions["step"].parameters["twice"].type
    assert check_same_expressions(graph, made)
    assert parse_graph(print_graph(made)) == made
    for entry in ("prefill", "step"):
        same(run(graph, entry), run(made, entry))


EXPRESSIONS: dict[str, tuple[Callable[[Graph], object], str]] = {
    "another value appended": (
        lambda g: give(node(g, "step", "append", 1), 1, node(g, "step", "gather", 1).result),
        "step, state seen is no longer",
    ),
    "another state": (
        lambda g: give(node(g, "prefill", "call", 1), 3, g.functions["prefill"].parameters["h.0.w"]),
        "prefill, output y is no longer",
    ),
    "an entry's output": (lambda g: g.functions["prefill"].outputs.clear(), "the outputs have other names"),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_of_all_entries_are_compared(name: str) -> None:
    graph = blocks()
    assert check_same_expressions(blocks(), graph)
    damage, message = EXPRESSIONS[name]
    damage(graph)
    with pytest.raises(PassError, match=message):
        check_same_expressions(blocks(), graph)


class Reorder(Pass):
    """x = read(%k); %k = append(%k, ...)   -->   %k = append(%k, ...); x = read(%k), with the old state"""

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        if function.name != "step":
            return 0
        give(function.nodes[2], 0, function.states["h.0.mem.k"])  # this now reads the old state
        return 1


def test_a_pass_that_reorders_is_caught() -> None:
    with pytest.raises(BrokenPassError, match=r"gather reads state .* after its update"):
        optimized(blocks(), Reorder())


def test_a_certified_pipeline_runs_on_stateful_graphs() -> None:
    result = PassManager(DEFAULT, certify=True).run(blocks())
    verify(result.graph)
    assert not [r for record in result.log for r in record.refusals if "rolled back" in r.reason]


# -- meaning -----------------------------------------------------------------------------------------------------


def test_the_interpreter_takes_and_returns_states() -> None:
    graph = counter()
    states = {"count": np.zeros((3, 1), np.int64)}
    for rows, expected in (([0, 2], [1, 1]), ([2], [2]), ([1, 2], [1, 3])):
        before = states["count"].copy()
        outputs, after = interpret_entry(graph, "main", {"rows": np.array(rows)}, {}, states)
        np.testing.assert_array_equal(outputs["count"][:, 0], expected)
        np.testing.assert_array_equal(states["count"], before)
        states = after
    np.testing.assert_array_equal(states["count"][:, 0], [1, 1, 3])


def test_results_may_be_inputs_of_the_interpreter() -> None:
    graph = optimized(blocks(), HoistWeights())
    assert graph.bind is None  # no weights are derived from these
    text = """graph g {
  parameters {
    w: f32[2]
  }
  bind {
    $e = exp($w)
  }
  step() -> (y: f32[2]) {
    return y = $e
  }
}
"""
    graph = parse_graph(text)
    weights = {"w": np.zeros(2, np.float32)}
    made, _ = interpret_entry(graph, "bind", {}, weights, {})
    np.testing.assert_array_equal(made["e"], [1, 1])
    given, _ = interpret_entry(graph, "step", {}, weights, {}, made={"e": np.array([2.0, 3.0], np.float32)})
    np.testing.assert_array_equal(given["y"], [2, 3])


ASKED_WRONG: dict[str, tuple[Callable[[Graph], object], str]] = {
    "as a whole": (lambda g: interpret(g, {}), "must be interpreted entry by entry"),
    "no such entry": (lambda g: interpret_entry(g, "main", {}, {}, {}), "has no entry 'main'"),
    "no states": (
        lambda g: interpret_entry(g, "step", {}, {}, {}),
        "no value for x, rows, start, scale, h.0.w and more",
    ),
}


@pytest.mark.parametrize("name", ASKED_WRONG)
def test_the_interpreter_says_what_is_missing(name: str) -> None:
    ask, what = ASKED_WRONG[name]
    with pytest.raises(GraphError, match=what):
        ask(blocks())


def test_the_interpreter_refuses_unknown_states_and_shapes() -> None:
    graph, states = counter(), {"count": np.zeros((3, 1), np.int64)}
    with pytest.raises(GraphError, match="there is no input or weight or state other"):
        interpret_entry(graph, "main", {"rows": np.array([0])}, {}, states | {"other": np.zeros(1)})
    with pytest.raises(GraphError, match="state count dimension 1 must be 1, is 2"):
        interpret_entry(graph, "main", {"rows": np.array([0])}, {}, {"count": np.zeros((3, 2), np.int64)})


# -- cost --------------------------------------------------------------------------------------------------------


def test_an_update_costs_what_it_is_given() -> None:
    sizes = {"B": 2, "S": 1, "R": 8, "C": 1024}
    graph = blocks()
    update = node(graph, "step", "append")
    assert node_cost(update, sizes).bytes == 2 * (2 * 4 * 4 + 2 * 8 + 2 * 8)
    assert state_bytes(graph, sizes) == 2 * 8 * 1024 * 4 * 4 + 8 * 8
    assert graph_cost(graph, sizes) == graph_cost(graph, sizes, "step") != graph_cost(graph, sizes, "prefill")


def test_facts_tell_of_entries_and_states() -> None:
    sizes = {"B": 2, "S": 1, "R": 8, "C": 1024}
    facts = graph_facts(blocks(), sizes)
    assert facts["entries"] == ["prefill", "step"]
    assert facts["states"][0] == {
        "name": "h.0.mem.k",
        "dtype": "f32",
        "axes": ["R", "C", "4"],
        "bytes": 8 * 1024 * 4 * 4,
    }
    assert facts["state_bytes"] == sum(state["bytes"] for state in facts["states"])
    header = graph_header(facts, "derived").splitlines()
    assert header[0] == "# blocks derived: 16 ops; h is called 2 times"
    assert header[-1] == "# 3 states, 262 kB"
    assert {"entries", "states"}.isdisjoint(graph_facts(plain(), {}))
