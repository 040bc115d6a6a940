"""Axis rules: every notation of docs/axis-rules.md, solving for sizes, broadcasting, labels, malformed rules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from treadle.ir.axes import Application, Role
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import find_op
from treadle.ir.rules.axis_rule_text import parse_rule
from treadle.ir.rules.dtype_rules import infer_dtypes, number_dtype, operand_entries
from treadle.ir.types import DTYPES, DType, boolean, f16, f32, i64, parse_type

DOCS = Path(__file__).parent.parent / "docs" / "axis-rules.md"


def apply(rule: str, *operands: str | None) -> Application:
    """Apply a rule to f32 operands of these dimensions."""
    types = [None if dims is None else parse_type(f"f32[{dims}]") for dims in operands]
    return parse_rule(rule).apply(types)


def shapes(rule: str, *operands: str | None) -> list[str]:
    """Return the results' dimensions as text, factors and labels included."""
    return [", ".join(map(str, dims)) for dims in apply(rule, *operands).shapes]


def roles(rule: str) -> dict[str, str]:
    return {name: str(factor) for name, factor in parse_rule(rule).factors.items()}


# -- roles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("a, a -> a", {"a": "a is mapped"}),
        ("m k, k n -> m n", {"m": "m is mapped", "k": "k is reduced by sum", "n": "n is mapped"}),
        ("a0 a1:max -> a0", {"a0": "a0 is mapped", "a1": "a1 is reduced by max"}),
        ("a:and ->", {"a": "a is reduced by and"}),
        ("... [n] -> ... [n]", {"n": "n is whole"}),
        ("s, [t<=s] -> s", {"s": "s is mapped", "t": "t is whole up to s"}),
        ("s, [t <= s] -> s", {"s": "s is mapped", "t": "t is whole up to s"}),
        ("... >n -> ... >n", {"n": "n is scanned"}),
        ("... >n -> ... n", {"n": "n is scanned"}),  # one operand that is scanned is enough
        ("n, >n -> n", {"n": "n is scanned"}),
        ("@v d, i -> i d", {"v": "v is indexed", "d": "d is mapped", "i": "i is mapped"}),
        ("-> ^n=S", {"n": "n is generated"}),
        ("a -> a, ^n=S", {"a": "a is mapped", "n": "n is generated"}),
        ("k, a k:max -> a", {"k": "k is reduced by max", "a": "a is mapped"}),
        ("[t], s [t<=s] -> s", {"t": "t is whole up to s", "s": "s is mapped"}),
        ("s [t<=s], [t] -> s", {"t": "t is whole up to s", "s": "s is mapped"}),
    ],
)
def test_roles(rule: str, wanted: dict[str, str]) -> None:
    assert roles(rule) == wanted


def test_the_rules_of_the_page_are_read() -> None:
    """Every rule that docs/axis-rules.md shows in quotes parses, and its table of roles agrees with the code."""
    page = DOCS.read_text(encoding="utf-8")
    rules = re.findall(r'"([^"\n]*->[^"\n]*)"', page)
    assert len(rules) > 6
    for rule in rules:
        assert parse_rule(rule).text == rule
    rows = re.findall(r'^\|.*\| (\w+) \|.*"([^"]*)"` \|$', page, re.MULTILINE)
    assert {role for role, _ in rows} == {role.value for role in Role}
    for role, rule in rows:
        found = {f.role.value for f in parse_rule(rule).factors.values()}
        assert role in found or (role == "mapped" and "..." in rule), rule


# -- dimensions and solving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "operands", "results"),
    [
        ("... m k, ... k n -> ... m n", ["B, 2, 3", "3, 4"], ["B, 2, 4"]),
        ("b s (heads=12 d) -> b heads s d", ["B, S, 768"], ["B, heads=12, S, 64"]),
        ("b s (d heads=12) -> b heads s d", ["B, S, 768"], ["B, heads=12, S, 64"]),
        ("b heads s d -> b s (heads d)", ["B, heads=12, S, 64"], ["B, S, (heads=12 64)"]),
        ("b s (h d) -> b h s d", ["B, S, (heads=12 64)"], ["B, heads=12, S, 64"]),  # the dimension keeps its factors
        ("b s (h=12 d) -> b h s d", ["B, S, (heads=12 64)"], ["B, heads=12, S, 64"]),
        ("b s (h=6 d) -> b h s d", ["B, S, (heads=12 64)"], ["B, 6, S, 128"]),
        ("(a b=3) -> b a", ["6*S"], ["3, 2*S"]),
        ("(a b) -> a b", ["(S 4)"], ["S, 4"]),
        ("(a b c) (d=5 a) b -> a b c d", ["24, 15, 2"], ["3, 2, 4, 5"]),
        ("a 1 -> 1 a 1", ["5, 1"], ["1, 5, 1"]),
        ("() a -> a", ["1, 5"], ["5"]),
        ("(1 a) -> a", ["5"], ["5"]),
        ("n, m -> [n+m]", ["S", "3"], ["S+3"]),
        ("[n] -> [(n+2-3)//2+1]", ["S"], ["(S+1)//2"]),
        ("[n] -> [2*n]", ["2*S+1"], ["4*S+2"]),
        ("[n] -> [(S)]", ["7"], ["S"]),  # a symbol of the graph, not of the rule
        ("n=S -> n", ["S"], ["S"]),
        ("-> ^n=2*S ^m=3", [], ["2*S, 3"]),
        ("a b -> a, b, (a b)", ["2, S"], ["2", "S", "(2 S)"]),
        ("a ->", ["5"], [""]),
        (", a -> a", ["", "5"], ["5"]),
        ("a a -> a", ["3, 3"], ["3"]),
        ("b g r s, b g t -> b (g r) s t", ["1, kv=4, 3, S", "1, 4, T"], ["1, (kv=4 3), S, T"]),
        ("b (g r) s, b g t -> b (g r) s t", ["1, heads=12, S", "1, kv=4, T"], ["1, heads=12, S, T"]),
    ],
)
def test_results(rule: str, operands: list[str], results: list[str]) -> None:
    assert shapes(rule, *operands) == results


def test_a_known_factor_elsewhere_settles_a_product() -> None:
    """Single factors are bound first, then products, in whatever order they can be solved."""
    assert shapes("(a b), (b c), c -> a b c", "6", "10", "5") == ["3, 2, 5"]
    application = apply("b (g r) s, b g t -> b (g r) s", "2, 12, S", "2, 4, T")
    assert application.dims["r"].size == 3


def test_the_iteration_space() -> None:
    assert apply("... m k, ... k n -> ... m n", "B, 2, 3", "3, 4").points == apply("a ->", "24*B").points
    assert apply("[n] -> [n+1]", "S").points == apply("a -> a", "S").points


# -- broadcasting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operands", "result"),
    [
        (["2, 3", "2, 3"], "2, 3"),
        (["2, 1, 4", "3, 1"], "2, 3, 4"),
        (["", "2, 3"], "2, 3"),
        (["S", "B, 1"], "B, S"),
        (["1, 1", "1"], "1, 1"),
        (["S+S", "2*S"], "2*S"),
        (["B, S", "1, 1"], "B, S"),
    ],
)
def test_broadcasting(operands: list[str], result: str) -> None:
    assert shapes("..., ... -> ...", *operands) == [result]
    assert shapes("..., ... -> ...", *reversed(operands)) == [result]


def test_an_operand_that_broadcasts_does_not_hold_the_axis() -> None:
    application = apply("..., ... -> ...", "2, 1, 4", "3, 1")
    assert [[d.factors for d in dims] for dims in application.operands if dims is not None] == [
        [("...3",), (), ("...1",)],
        [("...2",), ()],
    ]
    assert application.factors["...2"].role is Role.MAPPED
    assert application.points == 24


def test_a_symbol_does_not_broadcast() -> None:
    with pytest.raises(RuleError, match="sizes disagree: S in operand 0, 3 in operand 1"):
        apply("..., ... -> ...", "S", "3")


def test_a_dimension_of_one_broadcasts_under_the_dots_alone() -> None:
    with pytest.raises(RuleError, match="axis k sizes disagree: 1 in operand 0, 3 in operand 1"):
        apply("... m k, ... k n -> ... m n", "2, 1", "3, 4")


def test_absent_operands() -> None:
    assert shapes("... d, o d, o -> ... o", "B, 4", "8, 4", None) == ["B, 8"]
    assert apply("... d, o d, o -> ... o", "B, 4", "8, 4", None).operands[2] is None
    assert shapes("..., ..., ... -> ...", None, "3, 1", "4") == ["3, 4"]


# -- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "operands", "result"),
    [
        ("..., ... -> ...", ["B, 12", "B, heads=12"], "B, heads=12"),
        ("..., ... -> ...", ["B, heads=12", "B, 12"], "B, heads=12"),
        ("..., ... -> ...", ["B, 768", "(heads=12 64)"], "B, (heads=12 64)"),
        ("..., ... -> ...", ["first=3", "second=3"], "first=3"),
        ("m k, k n -> m n", ["3, 4", "4, ffn=8"], "3, ffn=8"),
        ("(heads=12 d) -> heads d", ["768"], "heads=12, 64"),
        ("(heads=12 d) -> heads d", ["(h=12 e=64)"], "heads=12, e=64"),
        ("(h=12 d) -> h d", ["768"], "12, 64"),  # a letter is not a label
        ("(groups d) -> groups d", ["(4 8)"], "4, 8"),
        ("a b -> (a b)", ["heads=12, 64"], "(heads=12 64)"),
        ("(a b) c -> a (b c)", ["(x=2 y=3), z=5"], "x=2, (y=3 z=5)"),
    ],
)
def test_labels_travel_along(rule: str, operands: list[str], result: str) -> None:
    assert shapes(rule, *operands) == [result]


# -- operands that disagree ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "operands", "said"),
    [
        ("a, b -> a b", ["3"], "takes 2 operands, received 1"),
        ("a b -> a", ["3"], "operand 0 must have rank 2, has rank 1"),
        ("... a b -> ... a", ["3"], "operand 0 must have rank 2 or more, has rank 1"),
        ("a, a -> a", ["3", "4"], "axis a sizes disagree: 3 in operand 0, 4 in operand 1"),
        ("a a -> a", ["3, 4"], "axis a sizes disagree: 3 in operand 0, 4 in operand 0"),
        ("..., ... -> ...", ["2, 3", "2, 4"], "sizes disagree: 3 in operand 0, 4 in operand 1"),
        ("..., ... -> ...", ["S, 3", "T, 3"], "sizes disagree: S in operand 0, T in operand 1"),
        ("a=4 -> a", ["3"], "axis a sizes disagree: 4 in the op's attributes, 3 in operand 0"),
        ("1 a -> a", ["2, 3"], "dimension 0 of operand 0 must be 1, is 2"),
        ("1 a -> a", ["S, 3"], "dimension 0 of operand 0 must be 1, is S"),
        ("(a b=4) -> a b", ["6"], "dimension 0 of operand 0 is 6, not a multiple of 4"),
        ("(a b=2) -> a b", ["S"], "dimension 0 of operand 0 is S, not a multiple of 2"),
        ("(a=2 b=2) -> a b", ["6"], "dimension 0 of operand 0 is 6, but (a b) has size 4"),
        ("c (a b) -> a b c", ["1, 6"], "cannot infer the sizes of a and b in dimension 1 of operand 0"),
        ("(a b), a b -> a", ["7", "2, 3"], "dimension 0 of operand 0 is 7, but (a b) has size 6"),
    ],
)
def test_operands_that_disagree(rule: str, operands: list[str], said: str) -> None:
    with pytest.raises(RuleError) as caught:
        apply(rule, *operands)
    assert caught.value.what == said


def test_errors_use_the_operands_names() -> None:
    with pytest.raises(RuleError) as caught:
        parse_rule("... d, o d -> ... o").apply([f32["B 8"], f32["4 7"]], ["x", "weight"])
    assert caught.value.what == "axis d sizes disagree: 8 in x, 7 in weight"


# -- malformed rules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "said", "column"),
    [
        ("a, b", "'->' is missing", 5),
        ("a -> b -> c", "cannot read '-> c'", 8),
        ("a $ -> a", "cannot read '$'", 3),
        ("a 2 -> a", "cannot read '2'", 3),
        ("a -> a 12", "cannot read '12'", 8),
        ("a,  b% -> a b", "cannot read '%'", 6),
        ("... a ... -> ...", "... may occur once in an operand, outside parentheses", 7),
        ("(... a) -> a", "... may occur once in an operand, outside parentheses", 2),
        ("((a b) c) -> a b c", "parentheses do not nest", 2),
        ("a) -> a", "')' without '('", 2),
        ("(a -> a", "'(' without ')'", 1),
        ("([n] d) -> d", "a whole axis must be outside parentheses", 2),
        ("a:mean -> ", "unknown reduction 'mean', expected one of sum, max, min, prod, and, or", 1),
        ("a:max, a:min ->", "a is reduced by max cannot also be a is reduced by min", 8),
        ("s u, s [t<=s], u [t<=u] -> s u", "t is whole up to s cannot also be t is whole up to u", 18),
        ("[n], >n -> n", "n is both whole and scanned", 6),
        ("@n, >n -> n", "n is both indexed and scanned", 5),
        ("a=2, a=3 -> a", "a has two sizes, 2 and 3", 6),
        ("a -> (a=2b)", "not a size: '2b'", 7),
        ("[n] -> [n+]", "not a size: 'n+'", 8),
        ("[n+1] -> [n]", "a whole axis of an operand must be a name, not 'n+1'", 1),
        ("[] -> a", "a whole axis of an operand must be a name, not ''", 1),
        ("a -> a b", "axis b is after '->', and in no operand", 8),
        ("-> ^n", "a generated axis is in results only and has a size: ^n=4", 4),
        ("^n=3 -> n", "a generated axis is in results only and has a size: ^n=4", 9),
        ("a:max -> a", "a is reduced, so no result can hold it", 10),
        ("[t<=s] -> t", "t is limited by s, which is not an axis of the rule", None),
        ("[t<=] -> t", "t is limited by , which is not an axis of the rule", None),
        ("... a -> a", "'...' must be in an operand and in every result, or nowhere", None),
        ("... a -> ..., a", "'...' must be in an operand and in every result, or nowhere", None),
        ("a -> ... a", "'...' must be in an operand and in every result, or nowhere", None),
    ],
)
def test_malformed_rules(rule: str, said: str, column: int | None) -> None:
    with pytest.raises(RuleError) as caught:
        parse_rule(rule)
    assert said in caught.value.what
    shown = [rule] if column is None else [f"column {column}", rule, " " * (column - 1) + "^"]
    assert (caught.value.within or "").splitlines() == shown


def test_long_rules_take_no_long_time() -> None:
    """The text of a pattern may come from a file, so the time to read it must not double with every character."""
    with pytest.raises(RuleError):
        parse_rule("a=" + "(" * 5000 + "1" + ")" * 5000 + " -> a")
    with pytest.raises(RuleError):
        parse_rule("a=" + "(1" * 3 + "x" * 20_000 + " -> a")


# -- dtype rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "dtypes", "results"),
    [
        ("f, i -> f", [f32, i64], [f32]),
        ("t, t -> bool", [i64, i64], [boolean]),
        ("f, f1 -> f1, f", [f32, f16], [f16, f32]),
        ("t* -> t", [boolean, boolean, boolean], [boolean]),
        ("f, t* -> t", [f32, i64, i64], [i64]),
        ("f, f -> f", [None, f16], [f16]),
        ("i8, t -> i64", [DTYPES["i8"], f32], [i64]),
        ("-> f32", [], [f32]),
    ],
)
def test_dtype_rules(rule: str, dtypes: list[DType | None], results: list[DType]) -> None:
    assert infer_dtypes(rule, dtypes, "xyz"[: len(dtypes)]) == tuple(results)


@pytest.mark.parametrize(
    ("rule", "dtypes", "said"),
    [
        ("f, i -> f", [i64, i64], "x must be a float, is i64"),
        ("f, i -> f", [f32, f32], "y must be an integer, is f32"),
        ("n -> n", [boolean], "x must be a number, is bool"),
        ("bool, t -> t", [f32, f32], "x must be bool, is f32"),
        ("t, t -> t", [f32, f16], "dtypes disagree: x is f32, y is f16"),
        ("f, i, f -> f", [f32, None, i64], "z must be a float, is i64"),
        ("t, t, t -> t", [f32, None, f16], "dtypes disagree: x is f32, z is f16"),
        ("f, i -> f", [None, i64], "cannot infer the result's dtype: every operand that could determine f is absent"),
        ("f, i", [f32, i64], "needs '->'"),
        ("q -> q", [f32], "malformed dtype rule: 'q'"),
        ("f -> i", [f32], "malformed dtype rule: a result's dtype is in no operand"),
        (
            "t*, f -> f",
            [f32],
            "malformed dtype rule: a result's dtype is in no operand, or '*' is not in the last operand",
        ),
    ],
)
def test_dtypes_that_do_not_fit(rule: str, dtypes: list[DType | None], said: str) -> None:
    with pytest.raises(RuleError) as caught:
        infer_dtypes(rule, dtypes, "xyz"[: len(dtypes)])
    assert said in caught.value.what


@pytest.mark.parametrize(
    ("rule", "dtypes", "position", "wanted"),
    [
        ("f, i -> f", [f32, None], 1, None),  # an index is not a float
        ("n, n -> n", [None, f16], 0, f16),
        ("bool, t, t -> t", [boolean, None, None], 1, None),  # a condition says nothing about the values
        ("bool, t, t -> t", [boolean, None, i64], 1, i64),
        ("bool, t, t -> t", [None, f32, f32], 0, boolean),
        ("f, f1 -> f", [f16, None], 1, f16),
    ],
)
def test_the_dtype_of_a_number(rule: str, dtypes: list[DType | None], position: int, wanted: DType | None) -> None:
    assert number_dtype(operand_entries(rule, len(dtypes)), position, dtypes) is wanted


def test_rule_results_are_cached_by_types_and_labels() -> None:
    tanh = find_op("tanh")()
    plain, labelled = parse_type("f32[B, 8]"), parse_type("f32[B, heads=8]")
    assert plain == labelled
    assert tanh.apply([plain]) is tanh.apply([parse_type("f32[B, 8]")])
    assert [str(tanh.apply([each]).shapes[0][1]) for each in (plain, labelled)] == ["8", "heads=8"]
