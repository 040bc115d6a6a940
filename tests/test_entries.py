"""Entries: `bind` before `main` in the text, in the verifier, in graph identity, and in the results of a graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.random_graphs import random_graph
from tests.random_programs import random_program
from treadle.ir.builder import Builder
from treadle.ir.errors import GraphError, ParseError, TreadleError, VerifyError
from treadle.ir.graph import Function, Graph, Init, Node, Value
from treadle.ir.hashing import canonical_form, structural_hash
from treadle.ir.interpreter import interpret
from treadle.ir.layouts import Layout, panels
from treadle.ir.ops.call import Call
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.printer import print_graph
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.transforms.inline import inline_calls, inline_function
from treadle.ir.types import Type, f32
from treadle.ir.verifier import verify
from treadle.passes.capabilities import Capabilities, Reads
from treadle.passes.framework.manager import PassManager
from treadle.passes.lowering.assign_layouts import AssignLayouts
from treadle.passes.lowering.hoist_weights import HoistWeights
from treadle.passes.lowering.legalize import Legalize

TEXT = """graph g {
  symbols B
  parameters {
    h.{0..1}.w: f32[8, 4] = ones
    h.{0..1}.v: f32[8, 4]
    both: f32[8] = normal(0.5)
    free: f32[3]
  }

  block bind_h() -> (w_2: f32[8, 4], "odd name": f32[8, 4])
    weights w: f32[8, 4], v: f32[8, 4]
  {
    mul = mul($w, $v)                        # f32[8, 4]  model.py:3  ln
    relayout = relayout(mul, to=panels(4))   # f32[8, 4]
    return w_2 = relayout, "odd name" = mul
  }

  block h(x: f32[B, 4]) -> (y: f32[B, 8])
    weights w: f32[8, 4], w_2: f32[8, 4] in panels(4)
  {
    linear = linear(x, $w_2)   # f32[B, 8]
    return y = linear
  }

  bind {
    $h.0.* = bind_h() with h.0              # f32[8, 4], f32[8, 4]
    $first, $"a b" = bind_h() with h.1      # f32[8, 4], f32[8, 4]
    plain = exp($both)                      # f32[8]
    $twice = mul($"a b", $"h.0.odd name")   # f32[8, 4]
    $bias = add(plain, $both)               # f32[8]
  }

  main(x: f32[B, 4]) -> (y: f32[B, 8], z: f32[8, 4]) {
    y = h(x) with h.0                               # f32[B, 8]
    y_2 = h(x) with {w: $"h.0.odd name", w_2: $first}   # f32[B, 8]
    add = add(y, y_2)                               # f32[B, 8]
    add_2 = add(add, $bias)                         # f32[B, 8]
    mul = mul(add_2, $both)                         # f32[B, 8]
    return y = mul, z = $twice
  }
}
"""


@pytest.fixture
def graph() -> Graph:
    return parse_graph(TEXT)


# -- text ------------------------------------------------------------------------------------------------------


def test_the_text_of_entries_reads_back(graph: Graph) -> None:
    verify(graph)
    text = print_graph(graph)
    again = parse_graph(text)
    verify(again)
    assert again == graph
    assert print_graph(again) == text
    assert [line.split("#")[0].rstrip() for line in text.splitlines()] == [
        line.split("#")[0].rstrip() for line in TEXT.splitlines()
    ]


def test_statements_of_bind_define_the_names_that_they_use(graph: Graph) -> None:
    assert list(graph.derived_weights) == ["h.0.w_2", "h.0.odd name", "first", "a b", "twice", "bias"]
    assert graph.main.parameters["h.0.w_2"].layout == panels(4) == graph.derived_weights["h.0.w_2"].layout
    assert graph.main.parameters["first"].layout == panels(4)
    assert graph.main.parameters["twice"].layout is None
    assert "a b" not in graph.main.parameters  # only bind reads it
    assert graph.bind is not None
    assert [node.op.name for node in graph.bind.nodes] == ["call", "call", "exp", "mul", "add"]


def test_each_entry_holds_the_weights_that_it_reads(graph: Graph) -> None:
    assert graph.bind is not None
    assert list(graph.bind.parameters) == ["h.0.w", "h.0.v", "h.1.w", "h.1.v", "both"]
    assert [name for name in graph.main.parameters if name not in graph.derived_weights] == ["h.0.w", "both", "free"]
    assert list(graph.parameters) == ["h.0.w", "h.0.v", "h.1.w", "h.1.v", "both", "free"]


def test_results_of_a_block_under_other_names_are_listed(graph: Graph) -> None:
    """`$h.0.*` stands for all results of a block, and is not used for some of them."""
    assert graph.bind is not None
    outputs = graph.bind.outputs
    graph.bind.outputs = {name.replace("odd name", "odder"): value for name, value in outputs.items()}
    renamed = graph.main.parameters["h.0.odder"] = graph.main.parameters.pop("h.0.odd name")
    renamed.name = "h.0.odder"
    text = print_graph(graph)
    assert "$h.0.w_2, $h.0.odder = bind_h() with h.0" in text
    assert parse_graph(text) == graph


def test_a_block_that_makes_nothing_prints(graph: Graph) -> None:
    assert graph.bind is not None
    nothing = Function("nothing")
    graph.add_function(nothing)
    graph.bind.nodes.append(Node(Call.of(nothing), [], []))
    verify(graph)
    assert parse_graph(print_graph(graph)) == graph


WRONG: dict[str, tuple[str, str, str, str]] = {
    "made in main": ("add = add(y,", "$add = add(y,", "derived weight $add is assigned outside of bind", "$add ="),
    "made in a block": ("mul = mul($w", "$mul = mul($w", "derived weight $mul is assigned outside of bind", "$mul ="),
    "all made in main": ("y = h(x)", "$h.9.* = h(x)", "is assigned outside of bind", "$h.9.*"),
    "made twice at once": ('$first, $"a b"', "$first, $first", "two parameters first", "$first, $first"),
    "made twice": ("$bias =", "$first =", "two parameters first", "$first = add"),
    "made under a weight's name": ("$bias =", "$free =", "two parameters free", "$free ="),
    "one of two made": ('$first, $"a b"', "$first", "call has 2 results, but the statement", "bind_h() with h.1"),
    "all results of a plain node": ("$bias =", "$bias.* =", "all results of a call of a block", "add(plain"),
    "all and more": ("$h.0.* =", "$h.0.*, $more =", "all results of a call of a block", "bind_h() with h.0"),
    "a block called bind": ("block h(", "block bind(", "a block has the name of the entry bind", "bind {"),
    "a call of bind": ("y = h(x) with h.0", "y = bind()", "bind is an entry, which", "bind()"),
    "a call of main": ("plain = exp(", "plain = main(", "main is an entry, which", "main("),
    "a weight that is not made yet": ("exp($both)", "exp($twice)", "unknown parameter $twice", "$twice)"),
    "bind with inputs": ("bind {", "bind() {", "expected '{', found '('", "() {"),
    "bind returns": ("    $bias", "    return $bias", "expected a statement", "return $bias"),
    "two binds": ("  main(", "  bind {\n  }\n  main(", "expected 'main', found 'bind'", "bind {"),
    "no layout": ("in panels(4)", "in 4", "not a layout", "4"),
    "unknown layout": ("in panels(4)", "in rows(4)", "unknown layout 'rows'", "rows(4)"),
    "no width": ("in panels(4)", "in panels", "invalid panel width", "panels"),
    "two widths": (
        "in panels(4)",
        "in panels(4, 4)",
        "unknown or repeated option '4' of",
        "panels(4, 4)",
    ),
    "a layout of no matrix": ("w: f32[8, 4], w_2", "w: f32[8] in panels(4), w_2", "w has rank 1", "panels(4), w_2"),
    "relayout to no layout": ("to=panels(4)", "to=panels(0)", "invalid panel width", "panels(0)"),
    "passed in another layout": ("to=panels(4)", "to=panels(5)", "passes h.0.w_2 in another", "h(x) with h.0"),
    "passed row-major": ("w_2: $first", "w_2: $twice", "passes twice in another", "h(x) with {"),
    "an output in a layout": ("z = $twice", "z = $h.0.w_2", "output z of main has layout", "z = $h.0.w_2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_place(name: str) -> None:
    right, wrong, what, marked = WRONG[name]
    assert right in TEXT
    text = TEXT.replace(right, wrong, 1)
    with pytest.raises(ParseError, match=re.escape(what)) as caught:
        parse_graph(text)
    place, line, mark = str(caught.value.within).split("\n")
    number, column = map(int, re.findall(r"\d+", place))
    assert text.splitlines()[number - 1] == line
    assert line[column - 1 :].startswith(marked) and mark == " " * (column - 1) + "^"


# -- verifier --------------------------------------------------------------------------------------------------


def bind_of(graph: Graph) -> Function:
    assert graph.bind is not None
    return graph.bind


def no_result(graph: Graph) -> None:
    bind_of(graph).outputs["free"] = bind_of(graph).parameters["both"]


def two_names(graph: Graph) -> None:
    bind_of(graph).outputs["again"] = graph.derived_weights["twice"]


def name_of_a_weight(graph: Graph) -> None:
    """Give a derived weight the name of the weight from which bind computes it."""
    graph.initial.pop("both")
    bind_of(graph).outputs["both"] = bind_of(graph).outputs.pop("bias")


def call_bind(graph: Graph) -> None:
    """Let `main` call `bind` with the weights that `main` has."""
    op = Call.of(bind_of(graph))
    held = graph.main.parameters
    for name, value in bind_of(graph).parameters.items():
        held.setdefault(name, Value("parameter", value.type, name))
    arguments = [held[name] for name in bind_of(graph).parameters]
    graph.main.nodes.append(Node(op, arguments, op.gives))


def reorder(graph: Graph, *names: str) -> None:
    graph.functions = {name: graph.functions[name] for name in names}


def held(function: Function, name: str, type: Type) -> Value:
    """Add a parameter to a function."""
    value = function.parameters[name] = Value("parameter", type, name)
    return value


def lie(value: Value, layout: Layout | None) -> None:
    value.lies_in = layout


def pass_row_major(graph: Graph) -> None:
    call = graph.main.nodes[1]
    call.operands = (*call.operands[:2], graph.main.parameters["twice"])


def give_in_panels(graph: Graph) -> None:
    graph.main.outputs["z"] = graph.main.parameters["first"]


BROKEN: dict[str, tuple[Callable[[Graph], object], str]] = {
    "bind with an input": (
        lambda g: bind_of(g).inputs.append(Value("input", f32[3], "x")),
        "bind takes no inputs",
    ),
    "no result of a node": (no_result, "an output of bind must be the result of a node"),
    "two names": (two_names, "an output of bind must have one name"),
    "name of a weight": (name_of_a_weight, "bind assigns both, and reads a weight of that name"),
    "another type": (
        lambda g: held(g.main, "h.1.v", f32[4, 8]),
        "parameter h.1.v has another type or layout in bind than in main",
    ),
    "another layout": (
        lambda g: lie(held(g.main, "a b", f32[8, 4]), panels(4)),
        "parameter a b has another type or layout in bind than in main",
    ),
    "a weight in a layout": (
        lambda g: [lie(e.parameters["h.0.w"], panels(4)) for e in g.entries],
        "weight h.0.w must be row-major",
    ),
    "a weight of main in a layout": (
        lambda g: lie(g.main.parameters["free"], panels(4)),
        "weight free must be row-major",
    ),
    "an input in a layout": (lambda g: lie(g.main.inputs[0], panels(4)), "input 'x' has layout panels(4)"),
    "a layout of no matrix": (
        lambda g: setattr(g.functions["h"].parameters["w_2"], "type", f32[8]),
        "parameter w_2 is not a matrix, and has layout panels(4)",
    ),
    "a call passes another layout": (pass_row_major, "passes twice in another layout than the callee reads"),
    "a callee reads another layout": (
        lambda g: lie(g.functions["h"].parameters["w_2"], panels(8)),
        "does not match its signature",
    ),
    "an output in a layout": (give_in_panels, "output 'z' of main has layout panels(4)"),
    "a call of bind": (call_bind, "main calls 'bind', which is an entry"),
    "main before bind": (
        lambda g: reorder(g, "bind_h", "h", "main", "bind"),
        "entries are main, or prefill, step and verify",
    ),
    "bind before a block": (
        lambda g: reorder(g, "bind_h", "bind", "h", "main"),
        "entries are main, or prefill, step and verify",
    ),
    "entries that are not there": (lambda g: g.functions.pop("bind"), "entries are main, or prefill, step and verify"),
    "an unknown entry": (
        lambda g: setattr(g, "entry_names", ("h", "main")),
        "entries are main, or prefill, step and verify",
    ),
    "main alone is last": (
        lambda g: setattr(g, "entry_names", ("main", "bind")),
        "entries are main, or prefill, step and verify",
    ),
    "an initial value of what is made": (
        lambda g: g.initial.update(twice=Init("ones")),
        "'twice', which is not a parameter",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_invariants_of_entries(name: str, graph: Graph) -> None:
    damage, what = BROKEN[name]
    damage(graph)
    with pytest.raises(VerifyError, match=re.escape(what)):
        verify(graph)


def test_a_weight_in_a_layout_is_refused_without_bind_too() -> None:
    graph = Graph("g")
    b = Builder(graph)
    b.outputs(y=b.linear(b.input("x", f32["B", 4]), b.parameter("w", f32[8, 4]), None))
    graph.main.parameters["w"].lies_in = panels(4)
    with pytest.raises(VerifyError, match="weight w must be row-major"):
        verify(graph)


# -- identity --------------------------------------------------------------------------------------------------


def test_when_and_in_which_layout_count(graph: Graph) -> None:
    assert parse_graph(TEXT) == graph
    assert structural_hash(parse_graph(TEXT)) == structural_hash(graph)
    for changed in (
        TEXT.replace("panels(4)", "panels(8)"),
        TEXT.replace("panels(4)", "panels(4, transposed)"),
        TEXT.replace("$twice", "$thrice"),
        TEXT.replace('mul($"a b", $"h.0.odd name")', 'mul($"h.0.odd name", $"a b")'),
    ):
        assert parse_graph(changed) != graph
    lying = parse_graph(TEXT)
    lying.functions["h"].parameters["w_2"].lies_in = None
    assert canonical_form(lying) != canonical_form(graph)


def test_unread_arguments_of_an_entry_do_not_change_the_graph(graph: Graph) -> None:
    """The text names a graph's weights once, for all entries, and marks the entries that read them."""
    held(graph.main, "h.1.v", f32[8, 4])
    held(graph.main, "a b", f32[8, 4])
    bind_of(graph).parameters["free"] = graph.main.parameters.pop("free")
    verify(graph)
    assert graph == parse_graph(TEXT) == parse_graph(print_graph(graph))
    graph.bind.parameters.pop("free")  # type: ignore[union-attr]
    assert graph != parse_graph(TEXT)


def test_a_graph_with_bind_is_another_than_the_one_without() -> None:
    """The functions are the same, but `bind` is an entry in one graph, and a block in the other."""
    graphs = []
    for is_entry in (True, False):
        graph = Graph("g")
        bind = graph.add_entry("bind") if is_entry else Function("bind")
        if not is_entry:
            graph.add_function(bind)
        inside = Builder(graph, bind)
        inside.outputs(made=inside.exp(inside.parameter("w", f32[4])))
        b = Builder(graph)
        b.outputs(y=b.input("x", f32[4]) * b.parameter("made", f32[4]))
        graphs.append(graph)
    entry, block = graphs
    assert entry != block
    assert list(entry.parameters) == ["w"] and list(block.parameters) == ["made"]
    assert "\nentries bind,main\n" in canonical_form(entry)
    assert "entries" not in canonical_form(block)
    assert print_graph(parse_graph(print_graph(block))) == print_graph(block)


def test_a_copy_shares_nothing_and_is_equal(graph: Graph) -> None:
    copy = clone_graph(graph)
    verify(copy)
    assert copy == graph and print_graph(copy) == print_graph(graph)
    assert [e.name for e in copy.entries] == ["bind", "main"]
    assert not {id(v) for f in copy.functions.values() for v in f.arguments} & {
        id(v) for f in graph.functions.values() for v in f.arguments
    }
    bind_of(copy).outputs.pop("bias")
    assert "bias" in graph.derived_weights


def test_blocks_unfold_within_their_entries(graph: Graph) -> None:
    flat = inline_calls(graph)
    verify(flat)
    assert list(flat.functions) == ["bind", "main"] and flat.entry_names == ("bind", "main")
    assert flat.main.parameters["first"].layout == panels(4)
    assert [node.op.name for node in bind_of(flat).nodes] == ["mul", "relayout", "mul", "relayout", "exp", "mul", "add"]
    assert parse_graph(print_graph(graph, unfold=True)) == flat
    alone = inline_function(graph, bind_of(graph))
    assert alone.outputs.keys() == graph.derived_weights.keys()
    drawn = weights_of(graph)
    same(interpret(graph, inputs_of(graph), drawn), interpret(flat, inputs_of(graph), drawn))


def test_functions_that_an_entry_needs(graph: Graph) -> None:
    assert [f.name for f in graph.needed_by(bind_of(graph))] == ["bind_h", "bind"]
    assert [f.name for f in graph.needed_by(graph.main)] == ["h", "main"]
    assert [f.name for f in graph.needed_by(graph.functions["h"])] == ["h"]


def test_an_entry_is_added_before_main() -> None:
    graph = Graph("g")
    assert graph.bind is None and graph.derived_weights == {} and graph.entries == (graph.main,)
    bind = graph.add_entry("bind")
    assert graph.bind is bind and graph.entries == (bind, graph.main)
    graph.add_function(Function("late"))
    assert list(graph.functions) == ["late", "bind", "main"]
    with pytest.raises(GraphError, match="has a function 'bind' already"):
        graph.add_entry("bind")
    with pytest.raises(GraphError, match="has a function 'bind' already"):
        graph.add_function(Function("bind"))


# -- meaning ---------------------------------------------------------------------------------------------------


def test_made_parameters_are_made_first(graph: Graph) -> None:
    shapes = {name: v.type.static_shape or () for name, v in graph.parameters.items()}
    weights = {name: np.full(shapes[name], i + 1.0, np.float32) for i, name in enumerate(shapes)}
    out = interpret(graph, {"x": np.ones((1, 4), np.float32)}, weights)
    first, second = 1.0 * 2.0, 3.0 * 4.0  # the block's results for the weights of h.0, and of h.1
    np.testing.assert_array_equal(out["z"], np.full((8, 4), first * second, np.float32))
    y = (4 * first + 4 * second + np.exp(5.0) + 5.0) * 5.0
    np.testing.assert_allclose(out["y"], np.full((1, 8), y), rtol=1e-6)  # five roundings of float32
    with pytest.raises(GraphError, match="no value for free"):
        interpret(graph, {"x": np.ones((1, 4))}, {n: w for n, w in weights.items() if n != "free"})
    with pytest.raises(GraphError, match="no input or weight twice"):
        interpret(graph, {"x": np.ones((1, 4))}, weights | {"twice": np.ones((8, 4))})


def wants(node: Node, position: int) -> Layout | Reads:
    """Return layouts: products request panels of four; a table is read in any layout."""
    if position == 1 and node.op.name in ("linear", "matmul", "einsum"):
        return panels(4, transposed=node.op.name == "matmul")
    return Reads.ANY if position == 0 and node.op.name in ("gather", "embedding") else Reads.ROW_MAJOR


def lowered(graph: Graph) -> Graph:
    """Return a graph in primitives, with layouts assigned to its weights and everything that depends only on them
    hoisted.
    """
    passes = (Legalize(), AssignLayouts(Capabilities(layouts=wants)), HoistWeights())
    made = PassManager(passes).run(graph)
    assert made.log[-1].graph == made.graph
    return made.graph


SEEDS = range(100)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("make", [random_graph, random_program])
def test_hoisting_keeps_what_random_graphs_mean(make: Callable[[int], Graph], seed: int) -> None:
    before = make(seed)
    after = lowered(before)
    assert {n: v.type for n, v in after.parameters.items()} == {n: v.type for n, v in before.parameters.items()}
    text = print_graph(after)
    again = parse_graph(text)
    assert again == after and print_graph(again) == text
    inputs, weights = inputs_of(before), weights_of(before)
    try:
        meant = interpret(PassManager((Legalize(),)).run(before).graph, inputs, weights)
    except TreadleError:
        pytest.skip("random operands that an op refuses when it runs")
    same(meant, interpret(after, inputs, weights))


def test_random_graphs_reach_what_is_tested() -> None:
    """Otherwise the test above would prove little."""
    texts = [print_graph(lowered(make(seed))) for make in (random_graph, random_program) for seed in SEEDS]
    assert sum("  bind {" in text for text in texts) > 40
    assert sum("to=panels(4" in text.partition("  bind {")[2] for text in texts) > 10
    assert sum(re.search(r"^    \$\S+\.\* = ", text, re.MULTILINE) is not None for text in texts) > 0


def inputs_of(graph: Graph) -> dict[str, Any]:
    return {v.name: drawn(v, i) for i, v in enumerate(graph.main.inputs)}


def weights_of(graph: Graph) -> dict[str, Any]:
    return {name: drawn(v, 100 + i) for i, (name, v) in enumerate(graph.parameters.items())}


def drawn(value: Value, seed: int) -> Any:
    """Draw values near 1, or small indices, at B = 2 and S = 4; bfloat16 is drawn as float32."""
    shape = value.type.evaluate({"B": 2, "S": 4})
    if not value.type.dtype.is_float:
        return np.random.default_rng(seed).integers(0, 2, shape).astype(value.type.dtype.numpy)
    return np.random.default_rng(seed).standard_normal(shape).astype(value.type.dtype.numpy or np.float32)


def same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Compare bitwise: hoisting changes when an op runs, but not its operands."""
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)
        assert array.dtype == second[name].dtype
