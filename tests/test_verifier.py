"""The verifier: one test for each invariant, which the test breaks; and the texts of errors."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.golden import Golden
from treadle.ir.builder import Builder
from treadle.ir.errors import VerifyError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.initial_values import Init
from treadle.ir.literals import Literal
from treadle.ir.op_registry import OPS
from treadle.ir.ops.call import Call
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.source_lines import SourceLine
from treadle.ir.text.parser import parse_graph
from treadle.ir.types import boolean, f32, parse_type
from treadle.ir.verifier import verify

TEXT = """graph g {
  symbols B, S <= 16
  parameters {
    w: f32[8] = ones
    h.{0..1}.w: f32[8]
  }
  block scale(x: f32[B, 8]) -> (x: f32[B, 8])
    weights w: f32[8]
  {
    y = mul(x, $w)      # f32[B, 8]  model.py:3  inner
    return x = y
  }
  block h(x: f32[B, 8]) -> (x: f32[B, 8])
    weights w: f32[8]
  {
    a = scale(x) with {w: $w}
    return x = a
  }
  main(x: f32[B, 8]) -> (y: f32[B, 8], v: f32[B, 2]) {
    a = add(x, 0.5)                          # f32[B, 8]  model.py:11  first
    b = exp(a)                               # f32[B, 8]  model.py:12
    c = h(b) with h.0                        # f32[B, 8]  model.py:13  h.0
    d = h(c) with h.1                        # f32[B, 8]  model.py:13  h.1
    e = mul(d, $w)                           # f32[B, 8]  model.py:14  last
    s = reduce_sum(e, axes=[0], keep=true)   # f32[1, 8]  model.py:15  last
    v, i = top_k(e, k=2)                     # f32[B, 2], i64[B, 2]  model.py:16
    t = add(e, s)                            # f32[B, 8]  model.py:17
    return y = t, v = v
  }
}
"""


def node(graph: Graph, index: int) -> Node:
    return graph.main.nodes[index]


def operand(graph: Graph, index: int, position: int, value: Value | None) -> None:
    """Replace an operand by another value."""
    operands = list(node(graph, index).operands)
    operands[position] = value
    node(graph, index).operands = tuple(operands)


def constant(literal: Literal, type: str | None = None, kind: str = "constant") -> Value:
    return Value(kind, literal.type if type is None else parse_type(type), "constant", literal)


def reorder(graph: Graph, *names: str) -> None:
    graph.functions = {name: graph.functions[name] for name in names}


def call_main_from_main(graph: Graph) -> None:
    op = Call.of(graph.main)
    arguments = [graph.main.inputs[0], *graph.main.parameters.values()]
    graph.main.nodes.append(Node(op, arguments, op.gives))


def add_argument(graph: Graph) -> None:
    """Give a block one more weight without changing its callers."""
    block = graph.functions["scale"]
    block.parameters["more"] = Value("parameter", f32[8], "more")


def alien(graph: Graph) -> Value:
    """Return a value of another function."""
    return graph.functions["h"].nodes[0].result


def add_size_of_n(graph: Graph) -> None:
    """Add a node whose type has no symbol, but whose attribute has one."""
    Builder(graph).apply("size", value="N", dtype="i64")


def two_inputs(graph: Graph) -> None:
    graph.main.inputs.append(Value("input", f32[3], "x"))


BROKEN: dict[str, tuple[Callable[[Graph], object], str]] = {
    "no main": (lambda g: g.functions.pop("main"), "entries are main, or prefill, step and verify"),
    "main not last": (lambda g: reorder(g, "scale", "main", "h"), "entries are main, or prefill, step and verify"),
    "function under another name": (
        lambda g: setattr(g.functions["h"], "name", "k"),
        "function 'k' is registered as 'h'",
    ),
    "symbol's name": (lambda g: g.symbols.update({"S+1": Bounds()}), "'S+1' is not a symbol's name"),
    "empty bounds": (lambda g: g.symbols.update(S=Bounds(5, 4)), "the bounds of S allow no size"),
    "undeclared symbol": (lambda g: g.symbols.pop("B"), "symbol B is not declared"),
    "undeclared symbol in an attribute": (add_size_of_n, "size: symbol N is not declared"),
    "initial value of nothing": (lambda g: g.initial.update(z=Init("ones")), "'z', which is not a parameter"),
    "two inputs of one name": (two_inputs, "two inputs 'x'"),
    "one input twice": (lambda g: g.main.parameters.update(x=g.main.inputs[0]), "among the parameters"),
    "parameter under another name": (lambda g: setattr(g.parameters["w"], "name", "u"), "'u' is held as 'w'"),
    "an input of another kind": (lambda g: setattr(g.main.inputs[0], "kind", "parameter"), "but is not one of them"),
    "used before defined": (lambda g: g.main.nodes.reverse(), "not defined before it is used"),
    "operand of another function": (lambda g: operand(g, 1, 0, alien(g)), "operand 0 of exp is not defined"),
    "operand of a removed node": (lambda g: g.main.nodes.pop(0), "operand 0 of exp is not defined"),
    "operand missing": (lambda g: operand(g, 1, 0, None), "operand x is missing"),
    "operands left out": (lambda g: setattr(node(g, 0), "operands", node(g, 0).operands[:1]), "operand y is missing"),
    "an absent operand left out": (
        lambda g: setattr(node(g, 4), "op", OPS["linear"]()),
        "linear: absent operands must be None, not left out",
    ),
    "too many operands": (lambda g: setattr(node(g, 1), "operands", node(g, 0).operands), "takes 1 operand, rec"),
    "operands that do not fit": (lambda g: operand(g, 7, 1, g.main.nodes[6].results[0]), "sizes disagree"),
    "result's dtype": (lambda g: setattr(node(g, 1).result, "type", parse_type("f64[B, 8]")), "rules infer"),
    "result's size": (lambda g: setattr(node(g, 5).result, "type", parse_type("f32[B, 8]")), "rules infer"),
    "results too few": (lambda g: setattr(node(g, 6), "results", node(g, 6).results[:1]), "rules infer"),
    "result of another node": (lambda g: setattr(node(g, 0).result, "node", node(g, 1)), "does not point back"),
    "result's position": (lambda g: setattr(node(g, 6).results[1], "index", 0), "does not point back"),
    "result's kind": (lambda g: setattr(node(g, 1).result, "kind", "input"), "does not point back"),
    "one node twice": (lambda g: g.main.nodes.insert(1, node(g, 0)), "defined twice"),
    "constant without content": (
        lambda g: operand(g, 0, 1, Value("constant", f32[8], "c")),
        "exactly if it is a constant",
    ),
    "content without constant": (
        lambda g: operand(g, 0, 1, constant(Literal.of(0.5, f32), kind="result")),
        "exactly if it is a constant",
    ),
    "constant's type": (lambda g: operand(g, 0, 1, constant(Literal.of(0.5, f32), "f32[8]")), "type than its content"),
    "constant's bytes": (lambda g: operand(g, 0, 1, constant(Literal(f32, (8,), b"1234"))), "type than its content"),
    "constant's truth values": (
        lambda g: g.main.outputs.update(v=constant(Literal(boolean, (1,), b"\2"))),
        "byte must be 0 or 1",
    ),
    "output of another function": (lambda g: g.main.outputs.update(v=alien(g)), "output 'v' is not defined"),
    "call of nothing": (lambda g: g.functions.pop("h"), "calls 'h', which is not in the graph"),
    "call of a later function": (lambda g: reorder(g, "h", "scale", "main"), "'scale', which does not come before"),
    "recursion": (call_main_from_main, "calls 'main', which does not come before"),
    "call of another signature": (add_argument, "does not match its signature"),
    "call with too few": (lambda g: setattr(node(g, 2), "operands", node(g, 2).operands[:1]), "takes 2 arguments"),
    "call with other types": (lambda g: operand(g, 2, 1, g.main.inputs[0]), "argument 1 must be"),
}


def test_the_graph_is_right_before_it_is_broken() -> None:
    verify(parse_graph(TEXT))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_invariant(name: str) -> None:
    graph = parse_graph(TEXT)
    damage, message = BROKEN[name]
    damage(graph)
    with pytest.raises(VerifyError, match=re.escape(message)):
        verify(graph)


def test_errors_show_the_nodes_around_and_the_users_line(golden: Golden) -> None:
    graph = parse_graph(TEXT)
    node(graph, 4).result.type = parse_type("f32[S, 8]")
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    golden("verifier/result_type.txt", str(caught.value))

    graph = parse_graph(TEXT)
    operand(graph, 7, 1, alien(graph))
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    golden("verifier/undefined_operand.txt", str(caught.value))


def test_an_empty_graph_verifies_and_reads_back() -> None:
    graph = Graph("empty")
    verify(graph)
    assert parse_graph(str(graph)) == graph


def test_a_block_may_do_without_inputs() -> None:
    graph = Graph("g")
    block = Function("two")
    b = Builder(graph, block)
    b.source = SourceLine("two.py", 1)
    b.outputs(y=b.neg(b.constant(-2.0, f32)))
    graph.add_function(block)
    m = Builder(graph)
    (y,) = m.call(block, [])
    m.outputs(y=y)
    verify(graph)
    assert parse_graph(str(graph)) == graph
