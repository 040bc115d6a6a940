"""Layouts: their text and sizes, the op that changes them, the pass that assigns them, and the check of the pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import GraphError, PassError, RuleError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.interpreter import interpret
from treadle.ir.layouts import _MOST_RUNS, Layout, blocks, pairs, panels, parse_layout, quads
from treadle.ir.literals import Literal
from treadle.ir.op_registry import OPS
from treadle.ir.ops.layout import Relayout
from treadle.ir.sizing.sizes import Size
from treadle.ir.text.parser import parse_graph
from treadle.ir.transforms.differentiate import backward
from treadle.ir.transforms.inline import inline_calls
from treadle.ir.types import f32, i64
from treadle.passes.capabilities import Capabilities, Reads
from treadle.passes.certificates import same_expressions
from treadle.passes.certificates.same_expressions import check_same_expressions
from treadle.passes.cleanup.common_subexpressions import CommonSubexpressions
from treadle.passes.framework.manager import PassManager
from treadle.passes.lowering import assign_layouts
from treadle.passes.lowering.assign_layouts import AssignLayouts
from treadle.passes.lowering.hoist_weights import HoistWeights

# -- layouts ---------------------------------------------------------------------------------------------------

MOST_RUNS = f"blocks(16, {4 * _MOST_RUNS + 2}, 2, {', '.join(f'{n}:{n + 1}' for n in range(_MOST_RUNS))})"
LAYOUTS = {
    "panels(16)": panels(16),
    "panels(1)": panels(1),
    "panels(65536)": panels(65536),
    "panels(48, transposed)": panels(48, transposed=True),
    "panels(48, twos)": panels(48, twos=True),
    "panels(32, transposed, twos)": panels(32, transposed=True, twos=True),
    "pairs(32)": pairs(32),
    "pairs(16, transposed)": pairs(16, transposed=True),
    "pairs(48, flat)": pairs(48, flat=True),
    "pairs(48, flat, transposed)": pairs(48, transposed=True, flat=True),
    "quads(32)": quads(32),
    "quads(48, flat)": quads(48, flat=True),
    "blocks(16, 20, 4)": blocks(16, 20, 4),
    "blocks(48, 18, 2)": blocks(48, 18, 2),
    "blocks(16, 110, 2, tail)": blocks(16, 110, 2, tail=True),
    "blocks(16, 22, 2, tail, 4:5, 0:4)": blocks(16, 22, 2, ((4, 5), (0, 4)), tail=True),
    "blocks(65536, 65536, 4)": blocks(65536, 65536, 4),
    MOST_RUNS: blocks(16, 4 * _MOST_RUNS + 2, 2, tuple((n, n + 1) for n in range(_MOST_RUNS))),
    "onednn": Layout("onednn"),
    "onednn(transposed)": Layout("onednn", transposed=True),
}


@pytest.mark.parametrize("text", LAYOUTS)
def test_the_text_of_a_layout_reads_back(text: str) -> None:
    assert str(LAYOUTS[text]) == text
    assert parse_layout(text) == LAYOUTS[text]
    assert parse_layout(f" {text} ") == LAYOUTS[text]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not a layout"),
        ("16", "not a layout"),
        ("Panels(16)", "not a layout"),
        ("panels(16", "not a layout"),
        ("panels(16))", "not a layout"),
        ("panels (16)", "not a layout"),
        ("rows(16)", "unknown layout 'rows'"),
        ("panels", "invalid panel width"),
        ("panels()", "invalid panel width"),
        ("panels(0)", "invalid panel width"),
        ("panels(65537)", "invalid panel width"),
        ("panels(-1)", "unknown or repeated option '-1' of layout panels"),
        ("panels(16, 16)", "unknown or repeated option '16' of layout panels"),
        ("panels(9999999999)", "unknown or repeated option '9999999999' of layout panels"),
        ("panels(\u0661)", "unknown or repeated option '\u0661' of layout panels"),
        ("panels(16, rows)", "unknown or repeated option 'rows' of layout panels"),
        ("panels(16, transposed, transposed)", "unknown or repeated option 'transposed' of layout panels"),
        ("panels(16,)", "unknown or repeated option '' of layout panels"),
        ("onednn(16)", "onednn takes no width"),
        ("blocks(16)", "invalid layout of blocks"),
        ("blocks(16, 20, 3)", "invalid layout of blocks"),
        ("blocks(16, 22, 4)", "invalid layout of blocks"),
        ("blocks(16, 4, 4)", "invalid layout of blocks"),
        ("blocks(0, 20, 4)", "invalid layout of blocks"),
        ("blocks(65537, 20, 4)", "invalid layout of blocks"),
        ("blocks(16, 65540, 4)", "invalid layout of blocks"),
        (MOST_RUNS.replace(")", f", {_MOST_RUNS}:{_MOST_RUNS + 1})"), f"unknown or repeated option '{_MOST_RUNS}:"),
        ("blocks(16, 20, 4, 4)", "unknown or repeated option '4' of layout blocks"),
        ("blocks(16, 20, 4, transposed)", "the blocks layout stores rows"),
        ("blocks(16, 20, 4, 0:3)", "runs must contain every word once"),
        ("blocks(16, 20, 4, 2:4, 0:3)", "runs must contain every word once"),
        ("blocks(16, 20, 4, 0:2, 3:4)", "runs must contain every word once"),
        ("blocks(16, 20, 4, 0:4, 4:4)", "runs must contain every word once"),
        ("blocks(16, 20, 4, 0:99999)", "unknown or repeated option '0:99999' of layout blocks"),
        ("panels(16, tail)", "only blocks can have a tail"),
        ("panels(16, 0:4)", "unknown or repeated option '0:4' of layout panels"),
        ("pairs", "the width of pairs must be a multiple of 16"),
        ("pairs(24)", "the width of pairs must be a multiple of 16"),
        ("panels(48, flat)", "only pairs and quads can be flat"),
        ("pairs(48, twos)", "only panels can have twos"),
        ("pairs(48, flat, flat)", "unknown or repeated option 'flat' of layout pairs"),
    ],
)
def test_what_is_no_layout_is_refused(text: str, what: str) -> None:
    with pytest.raises(GraphError, match=re.escape(what)) as caught:
        parse_layout(text)
    assert "treadle" not in str(caught.value)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "k", "width"), [(1, 1, 4), (4, 3, 4), (5, 3, 4), (12, 7, 5), (3, 2, 16)])
def test_sizes_are_those_of_packing_by_hand(n: int, k: int, width: int, transposed: bool) -> None:
    """Rows are packed in panels; the last panel is padded."""
    rows = [list(range(row * k, row * k + k)) for row in range(n)]
    rows += [[0] * k] * (-n % width)
    packed = np.array([[[row[j] for row in rows[at : at + width]] for j in range(k)] for at in range(0, n, width)])
    layout = panels(width, transposed)
    shape = [Size.of(size) for size in ((k, n) if transposed else (n, k))]
    assert tuple(size.constant for size in layout.shape(shape)) == packed.shape
    assert layout.elements(shape).constant == packed.size
    for row in range(n):
        for j in range(k):
            assert packed.ravel()[((row // width) * k + j) * width + row % width] == rows[row][j]


def test_onednn_takes_what_the_matrix_takes() -> None:
    shape = [Size.of(5), Size.of(3)]
    assert Layout("onednn").shape(shape) == tuple(shape)
    assert Layout("onednn", transposed=True).elements(shape).constant == 15


# -- relayout --------------------------------------------------------------------------------------------------


def test_relayout_is_the_identity_on_elements() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", f32["N", 4])
    laid = b.apply(Relayout, x, to="panels(4)")
    assert laid.type == x.type and laid.value.layout == panels(4)
    b.outputs(y=b.linear(b.input("u", f32["B", 4]), laid, None))
    inputs = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "u": np.eye(4, dtype=np.float32)[:2]}
    np.testing.assert_array_equal(interpret(b.graph, inputs)["y"], inputs["x"].T[:2])
    assert parse_graph(str(b.graph)) == b.graph
    rows = b.graph.main.nodes[0]
    assert rows.op == Relayout(to=panels(4)) != Relayout(to=panels(8))


@pytest.mark.parametrize("type", [f32[4], f32[2, 3, 4], f32[()]])
def test_relayout_takes_matrices_alone(type: Any) -> None:
    b = Builder(Graph("g"))
    with pytest.raises(RuleError, match=f"only a matrix can have a layout, and x has rank {type.rank}"):
        b.apply(Relayout, b.input("x", type), to=panels(4))


def test_the_gradient_of_relayout_is_row_major() -> None:
    b = Builder(Graph("g"))
    w, x = b.parameter("w", f32[6, 4]), b.input("x", f32[3, 4])
    laid = b.apply(Relayout, w * 2.0, to=panels(4))
    y = b.linear(x, laid, None)
    found = backward(b, list(b.function.nodes), {y.value: b.constant(np.ones((3, 6), np.float32))})
    b.outputs(gradient=found[w.value])
    assert found[w.value].value.layout is None
    drawn = np.arange(12, dtype=np.float32).reshape(3, 4)
    gradient = interpret(b.graph, {"x": drawn}, {"w": np.ones((6, 4), np.float32)})["gradient"]
    np.testing.assert_array_equal(gradient, np.tile(2 * drawn.sum(0), (6, 1)))


# -- assign-layouts --------------------------------------------------------------------------------------------

WANTS = {"four": panels(4), "eight": panels(8), "any": Reads.ANY}


def wants(node: Node, position: int) -> Layout | Reads:
    """Return the layout that the scope of a product names."""
    return WANTS.get(node.scope, Reads.ROW_MAJOR) if position == 1 else Reads.ROW_MAJOR


def assigned(graph: Graph, alone: bool = False) -> Graph:
    """Return a graph after the pass; the pass manager verifies it."""
    return PassManager((AssignLayouts(Capabilities(layouts=wants), alone=alone),)).run(graph).graph


def readers(*scopes: str) -> Graph:
    """Return a graph with products of x and one weight, each in its own scope."""
    b = Builder(Graph("g"))
    x, w = b.input("x", f32["B", 4]), b.parameter("w", f32[6, 4])
    products = {}
    for i, scope in enumerate(scopes):
        b.scope = scope
        products[f"y{i}"] = b.linear(x, w, None)
    b.outputs(**products)
    return b.graph


def read_layouts(graph: Graph) -> list[str]:
    """Return the layout in which each product of main reads its weight."""
    return [str(n.operands[1].layout) for n in graph.main.nodes if n.op.name == "linear" and n.operands[1] is not None]


def relayouts(function: Function) -> int:
    return sum(isinstance(node.op, Relayout) for node in function.nodes)


def test_one_relayout_serves_all_who_want_the_layout() -> None:
    graph = assigned(readers("four", "four"))
    assert [node.op.name for node in graph.main.nodes] == ["relayout", "linear", "linear"]
    assert read_layouts(graph) == ["panels(4)"] * 2


def test_two_layouts_make_two_relayouts() -> None:
    graph = assigned(readers("four", "eight", "four"))
    assert relayouts(graph.main) == 2
    assert read_layouts(graph) == ["panels(4)", "panels(8)", "panels(4)"]


def test_a_reader_of_any_layout_takes_the_first() -> None:
    graph = assigned(readers("any", "eight", "four", "any"))
    assert relayouts(graph.main) == 2
    assert read_layouts(graph) == ["panels(8)", "panels(8)", "panels(4)", "panels(8)"]


def test_where_nobody_wants_a_layout_nothing_changes() -> None:
    for graph in (readers("any", "any"), readers("", "any"), readers("", "")):
        assert assigned(graph) == graph


def test_who_reads_row_major_still_does() -> None:
    graph = assigned(readers("", "four"))
    assert read_layouts(graph) == ["None", "panels(4)"]


def test_alone_refuses_where_a_weight_would_be_there_twice() -> None:
    for graph in (readers("four", ""), readers("four", "eight")):
        assert assigned(graph, alone=True) == graph
    assert read_layouts(assigned(readers("four", "four", "any"), alone=True)) == ["panels(4)"] * 3
    kept = readers("four")
    kept.main.outputs["w"] = kept.main.parameters["w"]
    assert assigned(kept, alone=True) == kept
    both = assigned(kept)
    assert read_layouts(both) == ["panels(4)"] and both.main.outputs["w"].layout is None


def test_the_log_says_who_wants_what() -> None:
    log = PassManager((AssignLayouts(Capabilities(layouts=wants), alone=True),)).run(readers("four", "four")).log
    assert log[0].options == "backend=unnamed,alone=true" and log[0].changes == 1
    assert len(log[0].notes) == 2
    for note in log[0].notes:
        assert re.fullmatch(r"w in panels\(4\): linear reads it, .*test_layouts.py:\d+, scope four", note)


def test_what_varies_and_what_is_no_matrix_is_left_alone() -> None:
    b = Builder(Graph("g"))
    x, y = b.input("x", f32["B", 4]), b.input("y", f32[6, 4])
    both = y + b.parameter("w", f32[6, 4])
    b.scope = "four"
    b.outputs(
        of_an_input=b.linear(x, y, None),
        of_both=b.linear(x, both, None),
        of_constants=b.linear(x, b.constant(np.ones((6, 4), np.float32)), None),
        of_a_symbol=b.linear(x, b.parameter("u", f32["B", 4]), None),
        of_a_vector=b.mul(x, b.parameter("v", f32[4])),
    )
    assert assigned(b.graph) == b.graph


def test_what_is_computed_of_weights_is_laid_out_after_it_is_computed() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", f32["B", 4])
    joined = b.concat(b.parameter("q", f32[3, 4]), b.parameter("k", f32[3, 4]), axis=0)
    b.scope = "four"
    b.outputs(y=b.linear(b.exp(x), joined * 2.0, None))
    graph = assigned(b.graph)
    assert [node.op.name for node in graph.main.nodes] == ["concat", "exp", "mul", "relayout", "linear"]


def block_and_calls(*passed: Callable[[Builder], Expr]) -> Graph:
    """Return a block that multiplies by a weight, and main, which calls it with these arguments."""
    graph = Graph("g")
    block = Function("h")
    graph.add_function(block)
    b = Builder(graph, block)
    x, w = b.input("x", f32["B", 4]), b.parameter("w", f32[4, 4])
    b.scope = "four"
    b.outputs(x=b.linear(x, w, None))
    b = Builder(graph)
    x = b.input("x", f32["B", 4])
    for make in passed:
        (x,) = b.call(block, [x, make(b)])
    b.outputs(y=x)
    return graph


def a_weight(b: Builder) -> Expr:
    return b.parameter(f"w{len(b.function.parameters)}", f32[4, 4])


def made_of_weights(b: Builder) -> Expr:
    return b.exp(a_weight(b))


def an_input(b: Builder) -> Expr:
    return b.input("given", f32[4, 4])


def test_a_block_whose_weight_is_one_at_every_call_lays_it_out() -> None:
    graph = assigned(block_and_calls(a_weight, made_of_weights))
    assert relayouts(graph.functions["h"]) == 1 and relayouts(graph.main) == 0
    hoisted = PassManager((HoistWeights(),)).run(graph).graph
    assert [v.layout for v in hoisted.functions["h"].parameters.values()] == [panels(4)]
    assert sorted(str(v.layout) for v in hoisted.derived_weights.values()) == ["panels(4)", "panels(4)"]
    assert hoisted.main.parameters.keys() == hoisted.derived_weights.keys()


def test_a_block_whose_weight_varies_at_one_call_is_left_alone() -> None:
    for passed in ((a_weight, an_input), (an_input, a_weight), (an_input,)):
        graph = block_and_calls(*passed)
        assert assigned(graph) == graph


def test_a_tied_table_is_there_once_where_its_reader_takes_any_layout() -> None:
    b = Builder(Graph("g"))
    wte, ids = b.parameter("wte", f32[11, 4]), b.input("ids", i64["B"])
    x = b.embedding(wte, ids)
    b.outputs(y=b.linear(x, wte, None))

    def tied(node: Node, position: int) -> Layout | Reads:
        return panels(4) if node.op.name == "linear" else Reads.ANY

    graph = PassManager((AssignLayouts(Capabilities(layouts=tied), alone=True), HoistWeights())).run(b.graph).graph
    assert list(graph.main.parameters) == ["wte.panels"] == list(graph.derived_weights)
    assert list(graph.parameters) == ["wte"]
    inputs, weights = {"ids": np.array([3, 10])}, {"wte": np.random.default_rng(0).standard_normal((11, 4), np.float32)}
    np.testing.assert_array_equal(interpret(graph, inputs, weights)["y"], interpret(b.graph, inputs, weights)["y"])


def test_a_layout_that_changes_what_is_computed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def exp(value: Value, layout: Layout, reader: Node) -> Node:
        return Node(OPS["exp"](), [value], [value.type], "w_panels")

    monkeypatch.setattr(assign_layouts, "_relayout", exp)
    with pytest.raises(PassError, match="assign-layouts failed: output y0 is no longer the same expression"):
        assigned(readers("four"))


# -- the same expressions --------------------------------------------------------------------------------------


def program() -> Graph:
    """Return a graph with a block that is called twice, one op with two results, a constant, and two outputs."""
    return parse_graph("""graph g {
      symbols B
      parameters {
        h.{0..1}.a: f32[4, 4]
        h.{0..1}.b: f32[4, 4]
      }
      block h(x: f32[B, 4]) -> (x: f32[B, 4])
        weights a: f32[4, 4], b: f32[4, 4]
      {
        halved = mul($a, 0.5)
        both = sub(halved, $b)
        laid = relayout(both, to=panels(4))
        linear = linear(x, laid)
        return x = linear
      }
      main(x: f32[B, 4]) -> (y: f32[B, 4], most: f32[B, 2]) {
        first = h(x) with h.0
        second = h(first) with h.1
        most, at = top_k(second, k=2)
        return y = second, most = most
      }
    }""")


def hoisted(graph: Graph) -> Graph:
    return PassManager((HoistWeights(),)).run(graph).graph


def exp_for_relayout(graph: Graph) -> None:
    node = the("relayout", graph)
    node.op = OPS["exp"]()


def swapped_operands(graph: Graph) -> None:
    node = the("sub", graph)
    node.operands = node.operands[::-1]


def another_constant(graph: Graph) -> None:
    node = the("mul", graph)
    node.operands = (node.operands[0], Value.constant(Literal.of(0.25, f32)))


def another_attribute(graph: Graph) -> None:
    the("top_k", graph).op = OPS["top_k"](k=2, axis=0)


def another_weight(graph: Graph) -> None:
    """Derive the second call's weights from the weights of the first call."""
    assert graph.bind is not None
    first, second = (node for node in graph.bind.nodes if node.op.callee is not None)
    second.operands = first.operands


def made_for_another_call(graph: Graph) -> None:
    """Let each call read the values that were derived for the other call."""
    first, second = (node for node in graph.main.nodes if node.op.callee is not None)
    made = [node.operands[1:] for node in (second, first)]
    first.operands, second.operands = (first.operands[0], *made[0]), (second.operands[0], *made[1])


def another_result(graph: Graph) -> None:
    graph.main.outputs["most"] = the("top_k", graph).results[1]


def swapped_outputs(graph: Graph) -> None:
    outputs = graph.main.outputs
    outputs["y"], outputs["most"] = outputs["most"], outputs["y"]


def one_call_less(graph: Graph) -> None:
    graph.main.outputs["y"] = graph.main.nodes[0].results[0]


FAULTS = {
    exp_for_relayout: "output y is",
    swapped_operands: "output y is",
    another_constant: "output y is",
    another_attribute: "output most is",
    another_weight: "output y is",
    made_for_another_call: "output y is",
    another_result: "output most is",
    swapped_outputs: "output y is",
    one_call_less: "output y is",
}


def the(op: str, graph: Graph) -> Node:
    """Return the first node of an op."""
    return next(node for _, node in graph.walk() if node.op.name == op)


@pytest.mark.parametrize("damage", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_is_found(damage: Callable[[Graph], None]) -> None:
    before, after = program(), hoisted(program())
    assert check_same_expressions(before, after)
    damage(after)
    with pytest.raises(PassError, match=f"{FAULTS[damage]} no longer the same expression of inputs and weights"):
        check_same_expressions(before, after)


def test_an_output_that_is_dropped_is_found() -> None:
    after = hoisted(program())
    after.main.outputs.pop("most")
    with pytest.raises(PassError, match="the outputs have other names than before") as caught:
        check_same_expressions(program(), after)
    assert caught.value.received == "['output y']; before: ['output y', 'output most']"


def test_when_where_and_how_often_are_all_the_same() -> None:
    graph = program()
    flat = inline_calls(graph)
    shared = PassManager((CommonSubexpressions(),)).run(inline_calls(hoisted(graph))).graph
    for other in (flat, hoisted(graph), inline_calls(hoisted(graph)), shared, hoisted(flat)):
        assert check_same_expressions(graph, other) and check_same_expressions(other, graph)


def test_order_and_dead_nodes_do_not_count() -> None:
    b = Builder(Graph("g"))
    x, w = b.input("x", f32["B", 4]), b.parameter("w", f32[4])
    b.outputs(y=b.exp(x) * b.tanh(w), z=b.exp(w))
    other = Builder(Graph("g"))
    w, x = other.parameter("w", f32[4]), other.input("x", f32["B", 4])
    z, gate, _ = other.exp(w), other.tanh(w), other.exp(w * 3.0)
    other.outputs(z=z, y=other.exp(x) * gate)
    assert check_same_expressions(b.graph, other.graph)


def test_what_is_too_large_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit counts the nodes that run, once for each call, not the nodes in the text."""
    # two calls of a block of four nodes, and three nodes of main
    monkeypatch.setattr(same_expressions, "MOST_NODES", 11)
    assert check_same_expressions(program(), program())
    monkeypatch.setattr(same_expressions, "MOST_NODES", 10)
    assert not check_same_expressions(program(), program())
