"""States and several entries: text, identity, the verifier's rules, and the invariants of passes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.stateful_graphs import BLOCKS, blocks, counter, drop_update, forget, give, node
from treadle.ir.builder import Builder
from treadle.ir.entry_order import are_entries
from treadle.ir.errors import GraphError, ParseError, VerifyError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.ops.call import Call
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.printer import print_graph
from treadle.ir.verifier import verify


def code(text: str) -> list[str]:
    """Return the lines without their comments."""
    return [line.split("#")[0].rstrip() for line in text.splitlines()]


# -- text --------------------------------------------------------------------------------------------------------


def test_the_text_reads_back() -> None:
    graph = blocks()
    verify(graph)
    text = print_graph(graph)
    assert code(text) == code(BLOCKS)
    again = parse_graph(text)
    assert again == graph and print_graph(again) == text


def test_a_name_with_a_percent_sign_means_the_latest_version() -> None:
    step = blocks().functions["step"]
    update = next(node for node in step.nodes if node.op.updates)
    assert update.operands[0] is step.states["h.0.mem.k"]
    assert step.nodes[step.nodes.index(update) + 1].operands[0] is update.result
    assert step.updated["h.0.mem.k"] is update.result and update.result.state is step.states["h.0.mem.k"]


def test_a_call_says_its_updates_through_its_callee() -> None:
    graph = blocks()
    prefill, block = graph.functions["prefill"], graph.functions["h"]
    first, second = prefill.nodes[:2]
    assert first.op == Call.of(block) and dict(first.op.updates) == {1: 4}
    assert first.results[1].before is prefill.states["h.0.mem.k"]
    assert prefill.updated == {"h.0.mem.k": first.results[1], "h.1.mem.k": second.results[1]}
    assert [v.name for v in first.named_results] == ["y"]


def test_each_entry_holds_the_states_that_it_reads() -> None:
    graph = blocks()
    assert list(graph.functions["prefill"].states) == ["h.0.mem.k", "h.1.mem.k"]
    assert list(graph.functions["step"].states) == ["h.0.mem.k", "seen"]
    assert list(graph.states) == ["h.0.mem.k", "h.1.mem.k", "seen"]
    assert graph.main.name == "step" and [e.name for e in graph.later_entries] == ["prefill", "step"]


def test_exceptions_name_a_state_and_what_nobody_reads_is_the_last_entry_s() -> None:
    text = BLOCKS.replace("with h.1 ", "with h.1 {mem.k: %other} ").replace(
        "seen: i64[R, 1]", "seen: i64[R, 1]\n    other: f32[R, C, 4]", 1
    )
    graph = parse_graph(text)
    assert "with h.1 {mem.k: %other}" in print_graph(graph)
    assert list(graph.main.states) == ["h.0.mem.k", "h.1.mem.k", "seen"]  # h.1.mem.k is unused
    assert parse_graph(print_graph(graph)) == graph


WRONG: dict[str, tuple[str, str, str]] = {
    "an unknown state": ("gather(%seen, rows)", "gather(%saw, rows)", "unknown state %saw"),
    "an update under a plain name": ("%seen = append", "seen = append", "append updates a state"),
    "an update of another": ("%seen = append", "%h.0.mem.k = append", "append updates a state"),
    "no update": ("add = add(gather_2, 1)", "%seen = add(gather_2, 1)", "add does not update %seen"),
    "an output": ("seen = add", "seen = %seen", "output seen is a state"),
    "a weight for a state": ("with h.0 ", "with h.0 {mem.k: $h.0.w}", "passes h.0.w as state mem.k"),
    "a state as an input": ("h(x, rows, start) with h.0", "h(%h.0.mem.k, rows, start) with h.0", "as input x"),
    "a state that is not given": ("with h.0 ", "with {w: $h.0.w} ", "no state is passed for mem.k"),
    "two states": ("seen: i64[R, 1]", "h.0.mem.k: i64[R, 1]", "there are two states h.0.mem.k"),
    "a weight's name": ("seen: i64[R, 1]", "scale: i64[R, 1]", "there are two parameters and states scale"),
    "an initial value": ("seen: i64[R, 1]", "seen: i64[R, 1] = ones", "expected a state's name"),
    "two states of a block": (
        "mem.k: f32[R, C, 4]\n  {",
        "mem.k: f32[R, C, 4], w: f32[4]\n  {",
        "two weights or states w",
    ),
    "main beside step": ("  step(", "  main(", "expected '}', found 'main'"),
    "out of order": ("  prefill(", "  verify(", "expected '}', found 'step'"),
    "a block of an entry's name": (
        "  block h(",
        "  block step() -> () {\n    return\n  }\n  block h(",
        "a block has the name of the entry step",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_reported(name: str) -> None:
    right, wrong, what = WRONG[name]
    assert right in BLOCKS
    with pytest.raises(ParseError, match=re.escape(what)):
        parse_graph(BLOCKS.replace(right, wrong, 1))


# -- entries -----------------------------------------------------------------------------------------------------


def test_which_entries_there_are() -> None:
    good = ["main", "bind main", "prologue main", "bind prologue prefill step verify", "step", "prefill verify"]
    bad = ["", "bind", "prologue", "main bind", "main step", "step prefill", "step step", "h"]
    assert [are_entries(names.split()) for names in (*good, *bad)] == [True] * len(good) + [False] * len(bad)


def test_entries_are_added_in_their_order() -> None:
    graph = Graph("g")
    graph.add_function(Function("h"))
    step = graph.add_entry("step")
    assert list(graph.functions) == ["h", "step"] and graph.main is step
    for name in ("prefill", "bind", "verify", "prologue"):
        graph.add_entry(name)
    assert graph.entry_names == ("bind", "prologue", "prefill", "step", "verify") and graph.main.name == "verify"
    assert list(graph.functions) == ["h", *graph.entry_names]
    for name, what in ("step", "has a function 'step' already"), ("main", "cannot have an entry"), ("loss", "cannot"):
        with pytest.raises(GraphError, match=what):
            graph.add_entry(name)


def test_a_declared_main_makes_no_way() -> None:
    b = Builder(Graph("g"))
    b.input("x", "f32[2]")
    with pytest.raises(GraphError, match="cannot have an entry 'step'"):
        b.graph.add_entry("step")


# -- the builder -------------------------------------------------------------------------------------------------


def test_the_builder_takes_updates_as_they_are_added() -> None:
    graph = counter()
    verify(graph)
    assert graph.symbols.keys() == {"B", "R"}
    assert list(graph.main.updated) == ["count"]
    b = Builder(graph)
    assert b.state("count", "i64[R, 1]").value is graph.main.updated["count"]
    with pytest.raises(GraphError, match="state count is used with two types"):
        b.state("count", "i64[R, 2]")
    b.parameter("w", "f32[2]")
    with pytest.raises(GraphError, match="has a parameter 'w' already"):
        b.state("w", "f32[2]")


def test_a_call_gives_outputs_and_apart_what_it_updates() -> None:
    graph = blocks()
    b = Builder(graph, graph.add_entry("verify"))
    x, rows, start = b.input("x", "f32[B, S, 4]"), b.input("rows", "i64[B]"), b.input("start", "i64[B]")
    arguments = [x, rows, start, b.parameter("h.0.w", "f32[4, 4]"), b.state("h.0.mem.k", "f32[R, C, 4]")]
    (y,), updated = b.call_updating(graph.functions["h"], arguments)
    assert list(updated) == ["mem.k"] and updated["mem.k"].value is b.function.updated["h.0.mem.k"]
    (z,) = b.call(graph.functions["h"], [y, *arguments[1:4], b.state("h.0.mem.k", "f32[R, C, 4]")])
    b.outputs(y=z)
    verify(graph)
    assert b.function.updated["h.0.mem.k"].before is updated["mem.k"].value
    assert parse_graph(print_graph(graph)) == graph


# -- the verifier ------------------------------------------------------------------------------------------------


def swap(graph: Graph, function: str, first: int, second: int) -> None:
    nodes = graph.functions[function].nodes
    nodes[first], nodes[second] = nodes[second], nodes[first]


def update_twice(graph: Graph) -> None:
    step = graph.functions["step"]
    update = node(graph, "step", "append", 1)
    step.nodes.append(Node(update.op, update.operands, [update.result.type]))


def read_later(graph: Graph) -> None:
    """Read the old state after the update."""
    step = graph.functions["step"]
    give(node(graph, "step", "gather"), 0, step.states["h.0.mem.k"])


def call_with_an_old_version(graph: Graph) -> None:
    prefill = graph.functions["prefill"]
    give(prefill.nodes[1], 4, prefill.states["h.0.mem.k"])


FAULTS: dict[str, tuple[Callable[[Graph], object], str]] = {
    "read after the update": (read_later, "gather reads state h.0.mem.k after its update"),
    "reordered": (lambda g: swap(g, "step", 4, 7), "append reads state seen as it was|is not defined before"),
    "updated twice": (update_twice, "append reads state seen after its update"),
    "old across calls": (call_with_an_old_version, "call reads state h.0.mem.k after its update"),
    "not the last version": (
        lambda g: g.functions["step"].updated.update(seen=g.functions["step"].states["seen"]),
        "declares a wrong last version of state seen: it is not the last version",
    ),
    "not said": (lambda g: forget(g, "step", "seen"), "step updates state seen, but does not declare it"),
    "not said by a block": (lambda g: forget(g, "h", "mem.k"), "h updates state mem.k, but does not declare it"),
    "no state of it": (
        lambda g: g.functions["step"].updated.update(saw=g.functions["step"].updated["seen"]),
        "a wrong last version of state saw: it has no such state",
    ),
    "no update": (
        lambda g: g.functions["step"].updated.update(seen=node(g, "step", "add").result),
        "wrong last version of state seen: it is not the last version",
    ),
    "dropped": (drop_update, "wrong last version of state seen: it is not the last version"),
    "an output": (
        lambda g: g.functions["step"].outputs.update(k=g.functions["step"].states["seen"]),
        "output 'k' is state seen",
    ),
    "an updated state as an output": (
        lambda g: g.functions["h"].outputs.update(y=g.functions["h"].updated["mem.k"]),
        "output 'y' is state mem.k",
    ),
    "held under another name": (
        lambda g: g.functions["step"].states.update(other=g.functions["step"].states["seen"]),
        "state 'seen' is held as 'other'",
    ),
    "a parameter's name": (
        lambda g: g.functions["step"].parameters.update(seen=Value("parameter", g.states["seen"].type, "seen")),
        "seen is a parameter and a state",
    ),
    "another kind": (
        lambda g: setattr(g.states["seen"], "kind", "input"),
        "is among the states, but is not one of them",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    graph = blocks()
    damage, message = FAULTS[name]
    damage(graph)
    with pytest.raises(VerifyError, match=message) as caught:
        verify(graph)
    assert str(caught.value)


def test_an_update_reads_its_state_once() -> None:
    text = """graph g {
  symbols R
  states {
    k: f32[R, 4]
  }
  main(rows: i64[R]) -> () {
    %k = append(%k, %k, rows, rows, axis=1)
    return
  }
}
"""
    with pytest.raises(ParseError, match="append both updates and reads %k"):
        parse_graph(text)
    graph = parse_graph(
        text.replace("%k, %k", "%k, $w").replace("  states", "  parameters {\n    w: f32[R, 4]\n  }\n  states")
    )
    give(graph.main.nodes[0], 1, graph.main.states["k"])
    with pytest.raises(VerifyError, match="append both updates and reads state k"):
        verify(graph)


VIEWS = """graph g {
  symbols B, R, S
  states {
    k: f32[R, 2, 4]
  }
  block turned(x: f32[R, 2, 4]) -> (y: f32[R, 4, 2]) {
    y = rearrange(x, pattern="a b c -> a c b")   # f32[R, 4, 2]
    return y = y
  }
  block shown() -> (y: f32[R, 4, 2])
    states k: f32[R, 2, 4]
  {
    y = rearrange(%k, pattern="a b c -> a c b")   # f32[R, 4, 2]
    return y = y
  }
  block wrote(x: f32[S, 1, 4], rows: i64[S]) -> (y: f32[R, 4, 2])
    states k: f32[R, 2, 4]
  {
    %k = append(%k, x, rows, rows, axis=1)   # f32[R, 2, 4]
    y = rearrange(%k, pattern="a b c -> a c b")   # f32[R, 4, 2]
    return y = y
  }
  main(x: f32[S, 1, 4], rows: i64[S]) -> (y: f32[R, 4, 2]) {
    VIEW
    READ
    %k = append(%k, x, rows, rows, axis=1)   # f32[R, 2, 4]
    return y = y
  }
}
"""
"""VIEW returns a state's old value; READ reads the state before the update."""

SHOWN = {
    "a view": 'old = rearrange(%k, pattern="a b c -> a c b")',
    "a view of a view": 'v = slice(%k, axis=1)\n    old = rearrange(v, pattern="a b c -> a c b")',
    "a cast that is none": 'v = cast(%k, to=f32)\n    old = rearrange(v, pattern="a b c -> a c b")',
    "what a block shows": "old = shown() with {k: %k}",
    "a view that a block gives of a view": "v = slice(%k, axis=1)\n    old = turned(v)",
    "a view of what a block wrote": "old = wrote(x, rows) with {k: %k}",
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_view_is_read_before_the_update_as_well(name: str) -> None:
    text = VIEWS.replace("VIEW", SHOWN[name])
    verify(parse_graph(text.replace("READ", "y = neg(old)")))
    late = text.replace("    READ\n", "").replace(
        "    return y = y\n  }\n}", "    y = neg(old)\n    return y = y\n  }\n}"
    )
    with pytest.raises(VerifyError, match="neg reads a view of state k after its update"):
        verify(parse_graph(late))
    given = text.replace("    READ\n", "").replace("    return y = y\n  }\n}", "    return y = old\n  }\n}")
    with pytest.raises(VerifyError, match="output 'y' is a view of an old version of a state"):
        verify(parse_graph(given))


def test_a_copy_is_read_when_one_likes() -> None:
    text = VIEWS.replace("VIEW", 'v = neg(%k)\n    old = rearrange(v, pattern="a b c -> a c b")').replace(
        "    READ\n", ""
    )
    verify(parse_graph(text.replace("    return y = y\n  }\n}", "    y = neg(old)\n    return y = y\n  }\n}")))


def test_entries_agree_on_states_and_bind_takes_none() -> None:
    graph = blocks()
    other = graph.add_entry("verify")
    other.states["seen"] = Value("state", blocks().states["h.0.mem.k"].type, "seen")
    with pytest.raises(VerifyError, match="state seen has another type or layout in step than in verify"):
        verify(graph)
    other.states.clear()
    other.parameters["seen"] = Value("parameter", graph.states["seen"].type, "seen")
    with pytest.raises(VerifyError, match="seen is a state in step, but a parameter in verify"):
        verify(graph)
    other.parameters.clear()
    bind = graph.add_entry("bind")
    bind.states["seen"] = Value("state", graph.states["seen"].type, "seen")
    with pytest.raises(VerifyError, match="bind takes no states"):
        verify(graph)


def test_an_input_passed_as_a_state_is_found() -> None:
    b = Builder(Graph("g"), Function("read"))
    b.graph.add_function(b.function)
    b.outputs(y=b.neg(b.state("k", "f32[2]")))
    main = Builder(b.graph)
    (y,) = main.call(b.function, [main.input("x", "f32[2]")])
    main.outputs(y=y)
    with pytest.raises(VerifyError, match="a call of read passes x as state k"):
        verify(b.graph)
