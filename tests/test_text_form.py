"""The IR's text form: golden prints, parsing back, equality and hashes, errors of the parser, hostile texts."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from tests.golden import Golden
from tests.random_graphs import RECIPES, random_graph, random_graphs
from treadle.ir.attention.attention_terms import Causal, Padding, Window
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import GraphError, ParseError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.hashing import canonical_form, function_key, structural_hash
from treadle.ir.initial_values import Init
from treadle.ir.interpreter import interpret
from treadle.ir.literals import Literal
from treadle.ir.op_registry import OPS
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.source_lines import SourceLine
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.printer import print_function, print_graph
from treadle.ir.text.scanner import TextLimits
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.transforms.inline import inline_calls
from treadle.ir.types import bf16, boolean, f16, f32, f64, i32, parse_type
from treadle.ir.verifier import verify

ROOT = Path(__file__).resolve().parent.parent


# -- graphs to print -----------------------------------------------------------------------------------------------


def transformer(layers: int = 3) -> Graph:
    """Return a graph with attention blocks that are calls of one function with separate weights, and with tied
    embeddings.
    """
    graph = Graph("tiny")
    graph.bound("B", Bounds())
    graph.bound("S", Bounds(1, 1024))
    block = Function("h")
    b = Builder(graph, block)
    x = b.input("x", "f32[B, S, 8]")
    lengths = b.input("lengths", "i64[B]")
    with at(b, "tiny.py", 12, "ln_1"):
        y = b.rms_norm(x, b.parameter("ln_1.weight", "f32[8]"), eps=1e-5)
    with at(b, "tiny.py", 13, "attn"):
        q, k, v = (
            b.rearrange(
                b.linear(y, b.parameter(f"attn.{n}.weight", "f32[8, 8]")), pattern="b s (heads=2 d) -> b heads s d"
            )
            for n in "qkv"
        )
        a = b.attention(q, k, v, lengths, terms=(Causal(), Window(16), Padding()), scale=0.5)
        a = b.rearrange(a, pattern="b heads s d -> b s (heads d)")
    with at(b, "tiny.py", 14, ""):
        b.outputs(x=x + a * 0.5)
    graph.add_function(block)

    m = Builder(graph)
    tokens, lengths = m.input("tokens", "i64[B, S]"), m.input("lengths", "i64[B]")
    wte = m.parameter("wte.weight", "f32[50, 8]", Init("normal", 0.02))
    with at(m, "tiny.py", 8, "wte"):
        x = m.gather(wte, tokens, axis=0)
    for layer in range(layers):
        weights = [
            m.parameter(f"h.{layer}.{name}", formal.type, Init("ones") if "ln" in name else Init("normal", 0.02))
            for name, formal in block.parameters.items()
        ]
        with at(m, "tiny.py", 10, f"h.{layer}"):
            (x,) = m.call(block, [x, lengths, *weights])
    with at(m, "tiny.py", 18, "lm_head"):
        m.outputs(logits=m.linear(x, wte))
    return graph


class at:
    """A context manager: nodes created inside get one source line and one scope."""

    def __init__(self, b: Builder, file: str, line: int, scope: str) -> None:
        self.b, self.place = b, (scope, SourceLine(file, line))

    def __enter__(self) -> None:
        self.b.scope, self.b.source = self.place

    def __exit__(self, *_: object) -> None:
        self.b.scope, self.b.source = "", None


def constants() -> Graph:
    """Return a graph with a constant of every kind."""
    graph = Graph("constants")
    b = Builder(graph)
    b.source = SourceLine("c.py", 1)
    literals = {
        "half": Literal.of(0.5, f32),
        "negative_zero": Literal.of(-0.0, f32),
        "tenth": Literal.of(0.1, f32),
        "wide": Literal.of(0.1, f64),
        "narrow": Literal.of(0.1, f16),
        "infinite": Literal.of(float("-inf"), f64),
        "not_a_number": Literal.of(float("nan"), f32),
        "payload": Literal(f32, (), b"\x01\x00\xc0\x7f"),
        "brain": Literal.of([0.5, float("inf")], bf16),
        "three": Literal.of(3),
        "short": Literal.of(3, i32),
        "yes": Literal.of(True, boolean),
        "table": Literal.of([[1.0, 2.5], [-3.0, 1e-9]], f32),
        "flags": Literal.of([True, False], boolean),
        "empty": Literal.of(np.zeros((0, 3)), f32),
        "long": Literal.of(np.arange(64), f32),
        "same_long": Literal.of(np.arange(64).reshape(8, 8), f32),
    }
    graph.main.outputs = {name: Value.constant(literal) for name, literal in literals.items()}
    return graph


def odd_names() -> Graph:
    """Return a graph with quoted names, functions named like ops, and calls whose weights do not share a prefix."""
    graph = Graph("x y")
    graph.bound("S", Bounds(1, 7))
    block = Function("add")
    b = Builder(graph, block)
    b.source = SourceLine("a b.py", 3)
    x = b.input("none", "f32[S, 4]")
    b.outputs(x=x * b.parameter("w", "f32[4]") + b.parameter("deep.w", "f32[4]"))
    block.nodes[1].scope = "odd scope"
    graph.add_function(block)
    silent = Function("silent")
    graph.add_function(silent)
    m = Builder(graph)
    m.source = SourceLine('quo"te.py', 1)
    x = m.input('"', "f32[S, 4]")
    a, c, w = (m.parameter(name, "f32[4]") for name in ("a.w", "a.deep.w", "odd weight"))
    (y,) = m.call(block, [x, a, c])
    (y,) = m.call(block, [y, w, c])
    (y,) = m.call(block, [y, m.exp(a), w])
    m.call(silent, [])
    y.value.name = "return"
    m.function.outputs = {"out put": (y + x).value}
    return graph


def clipped() -> Graph:
    """Return a graph with absent operands, several results, and sizes as attributes."""
    graph = Graph("sizes")
    b = Builder(graph)
    b.source = SourceLine("s.py", 2)
    x = b.input("x", "f32[B, S, (heads=2 4)]")
    values, index = b.top_k(x, k=3, axis=-1)
    ln = b.layer_norm(x, b.parameter("w", "f32[8]"), None)
    tail = b.slice(ln, axis=1, start="S//2", stop="S")
    wide = b.pad(tail, axis=1, before=0, after="S//2", value=float("-inf"))
    b.outputs(values=values, index=index, wide=wide.cast("f16"))
    return graph


GRAPHS: dict[str, Callable[[], Graph]] = {
    "transformer": transformer,
    "constants": constants,
    "odd_names": odd_names,
    "sizes": clipped,
}


@pytest.mark.parametrize("name", GRAPHS)
def test_golden_text(name: str, golden: Golden) -> None:
    graph = GRAPHS[name]()
    verify(graph)
    golden(f"text_form/{name}.txt", print_graph(graph))


def test_golden_unfolded(golden: Golden) -> None:
    def flops(node: Node) -> str | None:
        return "2*B*S*8*8 FLOP" if node.op.name == "linear" else None

    golden("text_form/transformer_unfolded.txt", print_graph(transformer(2), unfold=True, annotate=flops))
    golden("text_form/transformer_types_only.txt", print_graph(transformer(2), sources=False))


# -- reading back --------------------------------------------------------------------------------------------------


def reads_back(graph: Graph) -> None:
    text = print_graph(graph)
    again = parse_graph(text)
    assert again == graph
    assert print_graph(again) == text, "source lines, scopes, names and labels are kept as well"
    assert structural_hash(again) == structural_hash(graph)


@pytest.mark.parametrize("name", GRAPHS)
def test_hand_built_graphs_read_back(name: str) -> None:
    reads_back(GRAPHS[name]())


@pytest.mark.parametrize("start", range(0, 600, 200))
def test_random_graphs_read_back(start: int) -> None:
    for seed in range(start, start + 200):
        graph = random_graph(seed)
        verify(graph)
        reads_back(graph)


def test_random_graphs_hold_every_op() -> None:
    seen = {node.op.name for seed in range(600) for _, node in random_graph(seed).walk()}
    assert seen >= {name for name, cls in OPS.items() if cls.samples}
    assert RECIPES.keys() <= OPS.keys()


@settings(max_examples=50, deadline=None)
@given(random_graphs())
def test_copies_are_equal_and_apart(graph: Graph) -> None:
    copy = clone_graph(graph)
    verify(copy)
    assert copy == graph
    assert print_graph(copy) == print_graph(graph)
    mine = {id(v) for f, n in graph.walk() for v in (n, f, *n.operands, *n.results) if v is not None}
    assert not mine & {id(v) for f, n in copy.walk() for v in (n, f, *n.operands, *n.results) if v is not None}


@settings(max_examples=50, deadline=None)
@given(random_graphs())
def test_unfolded_graphs_verify_and_read_back(graph: Graph) -> None:
    flat = inline_calls(graph)
    verify(flat)
    assert list(flat.functions) == ["main"]
    assert all(node.op.callee is None for node in flat.main.nodes)
    reads_back(flat)


def test_unfolding_keeps_the_numbers() -> None:
    graph = transformer()
    rng = np.random.default_rng(0)
    weights = {
        n: rng.standard_normal(tuple(s.constant or 0 for s in v.type.shape), np.float32)
        for n, v in graph.parameters.items()
    }
    inputs = {"tokens": rng.integers(0, 50, (2, 5)), "lengths": np.array([5, 3])}
    folded, flat = (interpret(g, inputs, weights)["logits"] for g in (graph, inline_calls(graph)))
    assert np.array_equal(folded, flat), "the same ops in the same order"
    assert [n.scope for n in inline_calls(graph).main.nodes][1] == "h.0.ln_1"


def test_parameters_keep_their_order() -> None:
    names = [
        "h.0.a",
        "h.0.b",
        "h.1.a",
        "h.1.b",
        "x.0",
        "x.1",
        "x.3",
        "y.0.w",
        "y.1.w",
        "y.0.v",
        "y.1.v",
        "h.02.a",
        "7.w",
    ]
    graph = Graph("order")
    for name in names:
        Builder(graph).parameter(name, "f32[2]")
    text = print_graph(graph)
    assert "h.{0..1}.a" in text
    assert "x.{0..1}" in text
    assert list(parse_graph(text).parameters) == names


def test_documented_examples_read() -> None:
    page = (ROOT / "docs" / "ir-grammar.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    graph = parse_graph(example)
    verify(graph)
    assert print_graph(graph) == example


def test_one_function_prints_alone() -> None:
    graph = transformer()
    assert print_function(graph, graph.functions["h"]).startswith("block h(x: f32[B, S, 8], lengths: i64[B]) -> ")


def test_a_constant_stands_in_place_up_to_16_elements_or_bytes() -> None:
    odd = b"\x01\x00\xc0\x7f"  # the bits of a NaN with a payload, which decimal numbers cannot express
    for literal, inside in (
        (Literal.of(np.arange(16), f32), "f32[16]{0.0, 1.0,"),
        (Literal.of(np.arange(17), f32), "f32[17]{@0}"),
        (Literal(f32, (4,), odd * 4), 'f32[4]{base64 "'),
        (Literal(f32, (5,), odd * 5), "f32[5]{@0}"),
    ):
        graph = Graph("g")
        graph.main.outputs = {"y": Value.constant(literal)}
        assert inside in print_graph(graph)
        assert parse_graph(print_graph(graph)) == graph


# -- equality and hashes -------------------------------------------------------------------------------------------


def replaced(node: Node, **attributes: object) -> None:
    node.op = type(node.op)(**{**node.op.attributes, **attributes})


def swap_operands(graph: Graph) -> None:
    node = graph.functions["h"].nodes[-1]
    node.operands = node.operands[::-1]


def rename(graph: Graph, kind: str) -> None:
    if kind == "input":
        graph.main.inputs[0].name = "ids"
    elif kind == "output":
        graph.main.outputs = {"scores": graph.main.outputs["logits"]}
    else:
        graph.main.parameters = {("w" if n == "wte.weight" else n): v for n, v in graph.main.parameters.items()}


def change_constant(graph: Graph, literal: Literal) -> None:
    node = graph.functions["h"].nodes[-2]
    assert node.op.name == "mul"
    node.operands = (node.operands[0], Value.constant(literal))


CHANGES: dict[str, Callable[[Graph], object]] = {
    "attribute": lambda g: replaced(g.functions["h"].nodes[0], eps=2e-5),
    "attribute's sign": lambda g: replaced(g.functions["h"].nodes[0], eps=-1e-5),
    "attention term": lambda g: replaced(
        next(n for n in g.functions["h"].nodes if n.op.name == "attention"), terms=(Causal(), Window(17), Padding())
    ),
    "wiring": swap_operands,
    "constant": lambda g: change_constant(g, Literal.of(0.25, f32)),
    "constant's last bit": lambda g: change_constant(g, Literal.of(np.nextafter(np.float32(0.5), 1), f32)),
    "constant's shape": lambda g: change_constant(g, Literal.of([0.5], f32)),
    "constant's dtype": lambda g: change_constant(g, Literal.of(0.5, f64)),
    "result's type": lambda g: setattr(g.main.nodes[0].result, "type", parse_type("f32[B, S, 9]")),
    "input's type": lambda g: setattr(g.main.inputs[0], "type", parse_type("i32[B, S]")),
    "input's name": lambda g: rename(g, "input"),
    "output's name": lambda g: rename(g, "output"),
    "output": lambda g: g.main.outputs.update(logits=g.main.nodes[0].result),
    "parameter's name": lambda g: rename(g, "parameter"),
    "weights of a call": lambda g: setattr(g.main.nodes[2], "operands", g.main.nodes[1].operands),
    "initial value": lambda g: g.initial.update({"wte.weight": Init("normal", 0.03)}),
    "bounds": lambda g: g.bound("S", Bounds(1, 512)),
    "one node less": lambda g: g.main.nodes.pop(),
    "node order": lambda g: g.functions["h"].nodes.insert(0, g.functions["h"].nodes.pop(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_equality_notices(change: str) -> None:
    graph, changed = transformer(), transformer()
    assert graph == changed
    CHANGES[change](changed)
    assert graph != changed
    assert structural_hash(graph) != structural_hash(changed)


def test_equality_ignores_names_scopes_and_sources() -> None:
    graph, other = transformer(), transformer()
    other.name = "other"
    other.symbols = dict(reversed(other.symbols.items()))
    other.main.parameters = dict(reversed(other.main.parameters.items()))
    for _, node in other.walk():
        node.scope, node.source = "elsewhere", None
        for value in node.results:
            value.name = "v"
            value.type = parse_type(f"{value.type.dtype}[{', '.join(str(s) for s in value.type.shape)}]")
    assert graph == other
    assert structural_hash(graph) == structural_hash(other)


def test_equality_tells_zeros_and_nans_apart() -> None:
    def padded(value: float) -> Graph:
        b = Builder(Graph("pad"))
        b.outputs(y=b.pad(b.input("x", "f32[3]"), axis=0, before=1, after=1, value=value))
        return b.graph

    assert padded(0.0) != padded(-0.0)
    assert padded(float("nan")) == padded(float("nan"))
    reads_back(padded(-0.0))
    reads_back(padded(float("nan")))


def block_of(weights: str, x: str = "x", scale: float = 2.0) -> Function:
    b = Builder(Graph("b"), Function(weights))
    made = b.rms_norm(b.input(x, "f32[4]"), b.parameter(weights, "f32[4]")) * scale
    return b.outputs(y=made)


def test_function_keys_ignore_whose_weights_they_are() -> None:
    assert function_key(block_of("h.0.w")) == function_key(block_of("h.1.w", "y"))
    assert structural_hash(block_of("h.0.w")) != structural_hash(block_of("h.1.w"))
    assert function_key(block_of("w")) != function_key(block_of("w", scale=3.0))


def test_hashes_agree_between_processes() -> None:
    code = (
        "from tests.random_graphs import random_graph; from treadle.ir.hashing import structural_hash;"
        "print([structural_hash(random_graph(s)) for s in range(5)])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert printed == {f"{[structural_hash(random_graph(s)) for s in range(5)]}\n"}


def test_a_broken_graph_still_compares_and_prints() -> None:
    graph = transformer()
    graph.functions["h"].nodes.pop(0)
    assert "?" in canonical_form(graph)
    assert graph != transformer()
    assert "<undefined rms_norm>" in str(graph)


# -- errors --------------------------------------------------------------------------------------------------------

BASE = """graph g {
  symbols B, S <= 16
  parameters {
    w: f32[8] = ones
    h.{0..1}.w: f32[8]
  }
  block h(x: f32[B, 8]) -> (x: f32[B, 8])
    weights w: f32[8]
  {
    y = mul(x, $w)   # f32[B, 8]  a.py:3  here
    return x = y
  }
  main(x: f32[B, 8]) -> (y: f32[B, 8]) {
    a = add(x, 0.5)
    h = h(a) with h.0
    s = reduce_sum(h, axes=[0], keep=true)   # f32[1, 8]
    t = add(h, s)
    return y = t
  }
}
"""

WRONG = {
    "unknown op": ("add(h, s)", "ad(h, s)"),
    "unknown function": ("h(a) with", "hh(a) with"),
    "unknown value": ("reduce_sum(h", "reduce_sum(hx"),
    "used before defined": ("add(x, 0.5)", "add(t, 0.5)"),
    "defined twice": ("t = add", "s = add"),
    "unknown parameter": ("$w)", "$ww)"),
    "unknown attribute": ("axes=", "axis="),
    "missing attribute": ("reduce_sum(h, axes=[0], keep=true)", "top_k(h)"),
    "wrong attribute": ("keep=true", "keep=maybe"),
    "wrong type in note": ("# f32[1, 8]", "# f32[8]"),
    "malformed note": ("a.py:3  here", "a.py:3 here?"),
    "operands disagree": ("add(h, s)", "add(h, 3)"),
    "missing operand": ("add(h, s)", "add(h)"),
    "wrong number of results": ("t = add", "t, u = add"),
    "recursion": ("y = mul(x, $w) ", "y = h(x) with w "),
    "weights of another path": ("with h.0", "with h.2"),
    "no weights": ("with h.0", ""),
    "wrong weight": ("with h.0", "with {w: x}"),
    "undeclared symbol": ("main(x: f32[B, 8])", "main(x: f32[N, 8])"),
    "malformed type": ("main(x: f32[B, 8])", "main(x: f32[B, 8+])"),
    "unknown dtype": ("0.5)", "0.5:f8)"),
    "out of range": ("0.5)", "300:u8)"),
    "other outputs": ("return y = t", "return z = t"),
    "other output type": ("return y = t", "return y = s"),
    "no return": ("    return y = t\n", ""),
    "two parameters": ("h.{0..1}.w", "w"),
    "no such data": ("0.5)", "f32[8]{@0})"),
    "wrong count": ("0.5)", "f32[8]{1.0, 2.0})"),
    "bad bounds": ("S <= 16", "9 <= S <= 8"),
    "ends early": ("    return y = t\n  }\n}\n", ""),
    "goes on": ("return y = t\n  }\n}\n", "return y = t\n  }\n}\n}"),
    "two functions": ("  main(", "  block h() -> () { return }\n  main("),
    "no output": ("return y = t", "return y = none"),
    "two outputs": ("return y = t", "return y = t, y = s"),
    "more inputs": ("h(a) with", "h(a, a) with"),
    "one weight twice": ("with h.0", "with {w: $w, w: $w}"),
    "no weight of it": ("with h.0", "with {w: $w, ww: $w}"),
    "results without =": ("s = reduce_sum", "s, u reduce_sum"),
    "operand after attributes": ("axes=[0], keep=true", "axes=[0], h"),
    "number for a list": ("axes=[0]", "axes=0"),
    "integer past 64 bits": ("axes=[0]", f"axes=[{2**63}]"),
    "word for a number": ("add(x, 0.5)", "rms_norm(x, $w, eps=w)"),
    "no size": ("add(x, 0.5)", "iota(size=)"),
    "odd escape": ("add(x, 0.5)", 'rearrange(x, pattern="\\q")'),
    "no scale": ("= ones", "= normal()"),
    "no type": ("main(x: f32[B, 8])", "main(x: )"),
    "float past any": ("0.5)", "1e999)"),
    "float past f16": ("0.5)", "70000.0:f16)"),
    "float for an integer": ("0.5)", "0.5:i32)"),
    "truth for a float": ("0.5)", "f32[1]{true})"),
    "name for an element": ("0.5)", "f32[2]{1.0, x})"),
    "constant of a symbol": ("0.5)", "f32[B]{1.0})"),
    "malformed base64": ("0.5)", 'f32[1]{base64 "AAA"})'),
    "truth of two bits": ("0.5)", 'bool[1]{base64 "Ag=="})'),
    "two data of a number": ("return y = t\n  }\n", 'return y = t\n  }\n  data { @0: "AAAA" @0: "AAAA" }\n'),
}


def test_golden_errors(golden: Golden) -> None:
    assert parse_graph(BASE)
    shown = []
    for name, (right, wrong) in WRONG.items():
        assert right in BASE, name
        with pytest.raises(ParseError) as caught:
            parse_graph(BASE.replace(right, wrong, 1))
        shown.append(f"-- {name}\n{caught.value}\n")
    golden("text_form/parse_errors.txt", "\n".join(shown))


# -- hostile text --------------------------------------------------------------------------------------------------


def in_main(statement: str) -> str:
    return BASE.replace("a = add(x, 0.5)", statement)


HOSTILE = {
    "nested brackets": in_main("a = reduce_sum(x, axes=" + "[" * 50_000 + ")"),
    "nested parentheses in a size": in_main("a = iota(size=" + "(" * 50_000 + "S" + ")" * 50_000 + ")"),
    "a product of sums": BASE.replace("x: f32[B, 8]", f"x: f32[{'*'.join(['(B+S)'] * 40)}]", 1).replace(
        "(B+S)", "(B*B+S)"
    ),
    "a dimension of many sums": BASE.replace("f32[B, 8]", "f32[(" + " ".join(f"(B+{n}*S*S)" for n in range(90)) + ")]"),
    "a number of many digits": BASE.replace("f32[B, 8]", f"f32[{'9' * 3900}]", 1),
    "a bound of many digits": BASE.replace("<= 16", f"<= {'9' * 50_000}"),
    "an attribute of many digits": in_main(f"a = reduce_sum(x, axes=[{'9' * 50_000}])"),
    "a term of many digits": in_main(f"a = attention(x, x, x, terms=[window({'9' * 50_000})])"),
    "an enormous constant": in_main("a = add(x, f32[1000000, 1000000]{@0})"),
    "an enormous run": BASE.replace("{0..1}", "{0..999999999}"),
    "a high rank": BASE.replace("f32[B, 8]", f"f32[{', '.join(['1'] * 1000)}]"),
    "a long type": BASE.replace("f32[B, 8]", f"f32[{', '.join(['1'] * 100_000)}]"),
    "a long word": in_main("a = " + "x" * 500_000 + "(x)"),
    "a long string": in_main('a = "' + "\\n" * 500_000 + '"(x)'),
    "an open string": in_main('a = "' + "\\n" * 500_000),
    "a long path": in_main("a = add(x, $" + "a.0." * 100_000 + "!"),
    "a long note": BASE.replace("a.py:3  here", " " * 100_000 + "a" * 100_000 + " ?"),
    "a long comment": BASE.replace("block h", "#" * 1_000_000 + "\n" * 1_000_000 + "blok h"),
    "an axis out of range": in_main("a = reduce_sum(x, axes=[99])"),
    "odd truth values": in_main('a = where(bool[8]{base64 "AgICAgICAgI="}, x, x)'),
    "nothing": "",
    "no text": "\x00\xff\ud800",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_refused(name: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse_graph(HOSTILE[name])
    assert len(str(caught.value)) < 10_000


HELD = {"characters": len(BASE), "functions": 2, "nodes": 5, "operands": 9, "parameters": 3, "rank": 2, "symbols": 2}
HELD |= {
    "arguments": 7,
    "items": 2,
    "nesting": 1,
    "type_characters": len("f32[B, 8]"),
    "name_characters": len("reduce_sum"),
}


@pytest.mark.parametrize("limit", HELD)
def test_a_text_may_hold_as_much_as_a_limit_says_and_no_more(limit: str) -> None:
    assert parse_graph(BASE, TextLimits(**{limit: HELD[limit]}))
    with pytest.raises(ParseError, match=r"too (many|long|high|deep)"):
        parse_graph(BASE, TextLimits(**{limit: HELD[limit] - 1}))


def test_the_bytes_of_constants_are_limited() -> None:
    text = BASE.replace("0.5)", "f32[1]{0.5})")
    assert parse_graph(text, TextLimits(literal_bytes=4))
    with pytest.raises(ParseError):
        parse_graph(text, TextLimits(literal_bytes=3))


def least_work(text: str) -> int:
    """Return the smallest work limit with which the text parses."""

    def reads(work: int) -> bool:
        try:
            parse_graph(text, TextLimits(work=work))
        except ParseError as error:
            if "takes too long to read" not in error.what:
                raise
            return False
        return True

    return bisect_left(range(1, 1 << 17), True, key=reads) + 1


def some(count: int, text: str, joint: str = " ") -> str:
    return joint.join(text.replace("#", str(n)) for n in range(count))


LONGER = {
    "inputs": lambda n: f"main({some(n, 'x#: f32[2]', ', ')}) -> (y: f32[2]) {{ a = neg(x0) return y = a }}",
    "nodes": lambda n: f"main(x: f32[2]) -> (y: f32[2]) {{ {some(n, 'a# = neg(x)')} return y = a0 }}",
    "outputs": lambda n: f"main(x: f32[2]) -> ({some(n, 'y#: f32[2]', ', ')}) {{ return {some(n, 'y# = x', ', ')} }}",
}


@pytest.mark.parametrize("kind", LONGER)
def test_all_text_counts_as_work(kind: str) -> None:
    """Each statement has at least three tokens. Each token counts, even if no statement follows."""
    few, many = (least_work(f"graph g {{ {LONGER[kind](count)} }}") for count in (10, 200))
    assert many - few >= 3 * (200 - 10)


def test_doubling_functions_do_not_unfold_without_end() -> None:
    block = "block f{0}(x: f32[2]) -> (x: f32[2]) {{ a = {1}(x) b = {1}(a) return x = b }}\n"
    blocks = "".join(block.format(n, f"f{n - 1}" if n else "neg") for n in range(60))
    graph = parse_graph(f"graph g {{ {blocks} main(x: f32[2]) -> (y: f32[2]) {{ y = f59(x) return y = y }} }}")
    with pytest.raises(GraphError, match="too large"):
        inline_calls(graph, most_nodes=10_000)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_text_is_refused_or_verifies(seed: int) -> None:
    """If the parser accepts a randomly edited text, the graph verifies and its text parses back. Otherwise it raises a
    TreadleError.
    """
    rng = random.Random(seed)
    texts = [print_graph(random_graph(s)) for s in range(seed * 20, seed * 20 + 20)]
    pieces = [re.findall(r"\w+|\s+|[^\w\s]", text) for text in texts]
    words = sorted({word for text in pieces for word in text})
    refused = 0
    for _ in range(250):
        edited = list(rng.choice(pieces))
        for _ in range(rng.choice((1, 1, 2, 5))):
            here, there = rng.randrange(len(edited)), rng.randrange(len(edited))
            match rng.randrange(4):
                case 0:
                    del edited[here]
                case 1:
                    edited[here] = rng.choice([*words, "(", "[", "{", "-", "$", "none", "999999999"])
                case 2:
                    edited[here], edited[there] = edited[there], edited[here]
                case _:
                    edited[here:here] = edited[there : there + rng.randrange(20)]
        try:
            graph = parse_graph("".join(edited))
        except ParseError:
            refused += 1
            continue
        verify(graph)
        assert parse_graph(print_graph(graph)) == graph
    assert 100 < refused < 250


def test_parsed_values_are_usable() -> None:
    graph = parse_graph(BASE)
    b = Builder(graph)
    t: Expr = b.expr(graph.main.outputs["y"])
    b.outputs(y=t, twice=t + t)
    verify(graph)
    out = interpret(graph, {"x": np.ones((2, 8))}, {n: np.ones(8) for n in graph.parameters})
    # a = 1.5, h = a * 1, s = sum over two rows = 3, t = h + s = 4.5, exact in any precision
    assert np.array_equal(out["twice"], np.full((2, 8), 9.0))
