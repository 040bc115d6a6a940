"""Exact limits of a graph's text: the width of lines, the length of an error, the work of parsing."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from tests.test_text_form import BASE, least_work
from treadle.ir.builder import Builder
from treadle.ir.errors import GraphError, ParseError
from treadle.ir.graph import Function, Graph, Value
from treadle.ir.op_registry import find_op
from treadle.ir.text.attributes import attribute_text
from treadle.ir.text.operands import nearest_names
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.printer import excerpt, print_function, print_graph, value_names
from treadle.ir.text.scanner import Scanner, TextLimits
from treadle.ir.types import f32
from treadle.ir.wording.marked_text import marked, marked_name

# -- widths ----------------------------------------------------------------------------------------------------------


def text_of(outputs: list[str], scopes: tuple[str, ...] = (), hints: tuple[str, ...] = ()) -> list[str]:
    """Return the text's lines for a graph whose `main` returns its input under these names."""
    b = Builder(Graph("g"))
    x = b.input("x", "f32[2]")
    for hint in hints:
        b.apply("neg", x, name=hint)
    for node, scope in zip(b.function.nodes, scopes, strict=False):
        node.scope = scope
    for node in b.function.nodes:
        node.source = None
    b.outputs(**dict.fromkeys(outputs, x))
    return print_function(b.graph, b.graph.main).splitlines()


@pytest.mark.parametrize(("length", "lines"), [(61, 1), (62, 5)])
def test_a_signature_of_more_than_100_characters_takes_lines(length: int, lines: int) -> None:
    names = ["a" * 30, "b" * (length - 30)]
    head = text_of(names)
    (opened,) = [n for n, line in enumerate(head) if line.endswith("{")]
    assert opened + 1 == lines
    if lines == 1:
        assert len(head[0]) == 100 + len(" {")
    else:
        shown = [f"  {names[0]}: f32[2], {names[1]}: f32[2]", ") {"]
        assert head[:5] == ["main(", "  x: f32[2]", ") -> (", *shown]


def test_a_signature_without_inputs_takes_lines() -> None:
    function = Function("main")
    graph = Graph("g")
    graph.functions["main"] = function
    function.outputs = {name * 50: Value("input", f32[2], "x") for name in "ab"}
    shown = [f"  {'a' * 50}: f32[2],", f"  {'b' * 50}: f32[2]", ") {"]
    assert print_function(graph, function).splitlines()[:4] == ["main() -> (", *shown]


@pytest.mark.parametrize(("length", "lines"), [(83, 1), (84, 2)])
def test_items_go_on_in_a_line_up_to_100_characters(length: int, lines: int) -> None:
    names = ["a" * 40, "b" * (length - 40)]
    wanted = [f"  return {names[0]} = x,", f"         {names[1]} = x"]
    assert text_of(names)[-1 - lines : -1] == (wanted if lines == 2 else [f"{wanted[0]} {wanted[1].strip()}"])


@pytest.mark.parametrize(("length", "aligned"), [(72, True), (73, False)])
def test_notes_are_aligned_behind_statements_of_up_to_72_characters(length: int, aligned: bool) -> None:
    b = Builder(Graph("g"))
    x = b.input("x" * 30, "f32[2]")
    b.apply("neg", x, name="a")
    b.apply("neg", x, name="b" * (length - len(" = neg()") - 30))
    _, short, long, *_ = print_function(b.graph, b.function, sources=False).splitlines()
    assert long.index("   # ") - len("  ") == length
    assert short.index("   # ") - len("  ") == (length if aligned else len(f"a = neg({'x' * 30})"))


@pytest.mark.parametrize(("length", "aligned"), [(28, True), (29, False)])
def test_scopes_are_aligned_behind_types_of_up_to_28_characters(length: int, aligned: bool) -> None:
    b = Builder(Graph("g"))
    for name, symbol in ("a", "S"), ("b", "T" * (length - len("f32[]"))):
        b.scope = "here"
        b.apply("neg", b.input(f"x{name}", f"f32[{symbol}]"), name=name)
        b.function.nodes[-1].source = None
    _, short, long, *_ = print_function(b.graph, b.function).splitlines()
    assert long.index("  here") - long.index("f32") == length
    assert short.index("  here") - short.index("f32") == (length if aligned else len("f32[S]"))


def test_hints_become_names() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[2]")
    for hint in ("x", "y", "y", "y", "7 a", "inf", "a" * 60, "b" * 61, "y_2"):
        b.apply("neg", x, name=hint)
    names = [value_names(b.graph, b.function)[n.result] for n in b.function.nodes]
    assert names == ["x_2", "y", "y_2", "y_3", "_7_a", "inf_", "a" * 60, "b" * 60, "y_2_2"]


def test_an_excerpt_shows_three_nodes_either_side_in_160_characters() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[2]")
    for n in range(9):
        b.apply("neg", x, name=f"v{n}")
    b.function.nodes[3].scope = "s" * 200
    lines = excerpt(b.graph, b.function, 4).splitlines()
    assert [line[:7] for line in lines] == [f"{' >'[n == 4]} op {n}:" for n in range(1, 8)]
    assert max(map(len, lines)) == 160
    assert len(excerpt(b.graph, b.function, 0).splitlines()) == 4


@pytest.mark.parametrize(("length", "folded"), [(200, True), (201, False)])
def test_parameters_are_folded_by_names_of_up_to_200_characters(length: int, folded: bool) -> None:
    graph = Graph("g")
    for n in range(2):
        Builder(graph).parameter(f"{'h' * (length - 2)}.{n}", "f32[2]")
    assert ("{0..1}" in print_graph(graph)) is folded


# -- errors ----------------------------------------------------------------------------------------------------------


def test_an_error_shows_80_characters_before_its_place_and_40_after() -> None:
    text = "ab\n" + "".join(chr(ord("a") + n % 26) for n in range(300)) + "\nc"
    line = text.splitlines()[1]
    for at, first in ((0, 0), (80, 0), (81, 1), (200, 120)):
        within = Scanner(text, TextLimits()).error("wrong", 3 + at).within
        shown = line[first : first + 120]
        assert within == f"line 2, column {at + 1}\n{shown}\n{' ' * (at - first)}^"
    assert Scanner(text, TextLimits()).error("wrong", len(text)).within == "line 3, column 2\nc\n ^"
    assert Scanner("a\tb", TextLimits()).error("wrong", 2).within == "line 1, column 3\na b\n  ^"


@pytest.mark.parametrize(("length", "shown"), [(400, "w" * 400), (401, "w" * 300 + " ... " + "w" * 60)])
def test_an_error_quotes_up_to_400_characters(length: int, shown: str) -> None:
    error = Scanner("a", TextLimits()).error("w" * length, received="w" * length)
    assert (error.what, error.received) == (shown, shown)


def test_what_is_found_is_told_by_its_first_40_characters() -> None:
    assert Scanner("a" * 41, TextLimits()).found() == repr("a" * 40)
    assert Scanner('  "a b" c', TextLimits()).found() == repr('"a b"')
    assert Scanner("# all", TextLimits()).found() == "the end of the text"
    assert Scanner("+1", TextLimits()).found() == repr("+")


def test_nearest_names_are_looked_for_where_that_is_quick() -> None:
    assert nearest_names("a" * 60, ["a" * 59, "a" * 61]) == f"did you mean {'a' * 59}?"
    assert nearest_names("a" * 61, ["a" * 60]) is None
    many = ["weight", *(f"{n:04}" for n in range(1999))]
    assert nearest_names("weigth", many) == "did you mean weight?"
    assert nearest_names("weigth", [*many, "x"]) is None
    assert nearest_names("ab", ["ab1", "ab2", "ab3", "ab4"]) == "did you mean ab4 or ab3 or ab2?"
    assert nearest_names("abcde", ["abcxy"]) == "did you mean abcxy?", "three letters of five"
    assert nearest_names("abcdef", ["abcuvw"]) is None


def test_at_most_three_ops_are_proposed() -> None:
    with pytest.raises(GraphError) as caught:
        find_op("reduce_mx")
    assert caught.value.hint == "did you mean reduce_max or reduce_sum or reduce_min?"
    with pytest.raises(GraphError) as caught:
        find_op("zzz")
    assert caught.value.hint is None


def test_a_mark_stands_among_60_characters_either_side() -> None:
    text = "".join(chr(ord("a") + n % 26) for n in range(120))
    assert marked(text, 100) == f"column 101\n{text}\n{' ' * 100}^", "all of 120 characters"
    text += "z\ty" + "w" * 100
    for at, first in ((0, 0), (60, 0), (61, 1), (121, 61)):
        shown = text[first : first + 120].replace("\t", " ")
        assert marked(text, at) == f"column {at + 1}\n{shown}\n{' ' * (at - first)}^"


def test_a_name_is_marked_where_it_stands_by_itself() -> None:
    text = "ab a (a=2) b -> a"
    columns = {
        (of, after): marked_name(text, "a", of=of, after=after).split("\n")[0]
        for of in (0, 1, 2, 9)
        for after in (0, 4)
    }
    assert columns == {
        (0, 0): "column 4",
        (1, 0): "column 7",
        (2, 0): "column 17",
        (9, 0): "column 17",
        (0, 4): "column 7",
        (1, 4): "column 17",
        (2, 4): "column 17",
        (9, 4): "column 17",
    }
    assert marked_name(text, "a").startswith("column 4\n")
    assert marked_name(text, "q").startswith("column 1\n")


def test_integers_of_64_bits_are_attributes() -> None:
    text = "graph g {{ main(x: f32[2]) -> (y: f32[2]) {{ y = softmax(x, axis={}) return y = y }} }}"
    for number in (2**63 - 1, -(2**63)):  # valid integers, but not valid axes
        with pytest.raises(ParseError, match="axis"):
            parse_graph(text.format(number))
    for number in (2**63, -(2**63) - 1):
        with pytest.raises(ParseError) as caught:
            parse_graph(text.format(number))
        assert caught.value.what == f"{number} does not fit into 64 bits"


def test_a_value_without_a_text_form_is_shown_by_80_characters() -> None:
    with pytest.raises(GraphError) as caught:
        attribute_text({"a" * 100})
    assert (caught.value.what, caught.value.received) == (
        "an attribute of type set has no text form",
        repr({"a" * 100})[:80],
    )


# -- limits ----------------------------------------------------------------------------------------------------------


def test_what_text_may_ask_for_by_default() -> None:
    assert asdict(TextLimits()) == {
        "characters": 256 * 2**20,
        "functions": 10_000,
        "nodes": 1_000_000,
        "operands": 20_000_000,
        "parameters": 1_000_000,
        "literal_bytes": 128 * 2**20,
        "rank": 64,
        "items": 1024,
        "nesting": 32,
        "type_characters": 4_000,
        "expression_characters": 100_000,
        "symbols": 100_000,
        "arguments": 10_000_000,
        "name_characters": 1_000_000,
        "work": 1_000_000_000,
    }


STATEMENTS = {
    "b = neg(x)": 104,
    "b = neg(x) c = neg(b)": 140,
    "b = reduce_sum(x, axes=[0], keep=true)": 160,
    "b = add(x, f32[2]{1.0, 2.0})": 146,
    "b = expand(x, shape=[2*1, 2])": 164,
    "b = neg(x)   # f32[2]  a.py:3  here\n": 105,
    "b = neg(x) #" + "-" * 640 + "\n": 114,
}


def test_what_statements_count_as_work() -> None:
    """Tokens, nodes, ops on new types and skipped text count as work. The counts are fixed, so that a sufficient limit
    stays sufficient in later versions.
    """
    text = "graph g {{ main(x: f32[2]) -> (y: f32[2]) {{ {} return y = x }} }}"
    empty = least_work(text.format(""))
    assert {each: least_work(text.format(each)) - empty for each in STATEMENTS} == STATEMENTS
    assert (empty, least_work(BASE)) == (95, 869)
