"""Sizes: canonical forms, arithmetic checked by evaluation, bounds, texts that parse back, hostile texts."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from treadle.ir.builder import Builder
from treadle.ir.errors import SizeError
from treadle.ir.graph import Graph
from treadle.ir.placement.mesh import Mesh
from treadle.ir.placement.placements import MeshPlacement, Split, parse_placement
from treadle.ir.rules.axis_rule_text import parse_rule
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.size_text import MOST_TOKENS, parse_size
from treadle.ir.sizing.sizes import Size, product
from treadle.ir.text.parser import parse_graph
from treadle.ir.types import Dim, Factor, Type, f32

SYMBOLS = ("B", "S", "n_1")
S, T = Size.symbol("S"), Size.symbol("T")


def positive_sizes() -> st.SearchStrategy[Size]:
    """Draw sizes that are 1 or more wherever the symbols are: valid divisors."""
    atoms = st.sampled_from(SYMBOLS).map(Size.symbol) | st.integers(1, 5).map(Size.of)
    return st.recursive(
        atoms,
        lambda inner: st.tuples(inner, inner).map(lambda p: p[0] + p[1]) | st.tuples(inner, inner).map(product),
        max_leaves=4,
    )


def sizes() -> st.SearchStrategy[Size]:
    """Draw arbitrary sizes: negative coefficients, products and sums of nested quotients."""
    atoms = st.sampled_from(SYMBOLS).map(Size.symbol) | st.integers(-7, 7).map(Size.of)

    def combined(inner: st.SearchStrategy[Size]) -> st.SearchStrategy[Size]:
        pairs = st.tuples(inner, inner)
        return (
            pairs.map(lambda p: p[0] + p[1])
            | pairs.map(lambda p: p[0] - p[1])
            | pairs.map(lambda p: p[0] * p[1])
            | st.tuples(inner, positive_sizes()).map(lambda p: p[0] // p[1])
            | st.tuples(inner, st.integers(-4, -1)).map(lambda p: p[0] // p[1])
        )

    return st.recursive(atoms, combined, max_leaves=8)


values = st.fixed_dictionaries({name: st.integers(1, 12) for name in SYMBOLS})
Values = Mapping[str, int]


# -- canonical forms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("S+S", "2*S"),
        ("S*T", "T*S"),
        ("(S+1)*(S-1)", "S*S-1"),
        ("S-S", "0"),
        ("(2*S)//2", "S"),
        ("(S*T)//S", "T"),
        ("(6*S*T+4*S)//(2*S)", "3*T+2"),
        ("7//2", "3"),
        ("(0-7)//2", "-4"),
        ("0//S", "0"),
        ("(S-1)//2+1", "(S+1)//2"),
        ("(5*S+7)//4", "S+1+(S+3)//4"),
        ("((S+1)//2+1)//2", "(S+3)//4"),
        ("(S//2+S)//3", "S//2"),
        ("(T-S//3)//2 + (S//3-T)//2", "(T-S//3)//2 + (S-3*T)//6"),
        ("((S//T)//2)//3", "(S//T)//6"),
        ("(4*S+3)//6", "(2*S+1)//3"),
        ("(0-2*S-1)//4", "(0-S-1)//2"),
        ("(2*S+1)//2", "S"),
        ("1*S", "S"),
        ("((S+1)//2)*2", "2*((1+S)//2)"),
    ],
)
def test_equal_sizes_have_one_form(first: str, second: str) -> None:
    assert parse_size(first) == parse_size(second)
    assert hash(parse_size(first)) == hash(parse_size(second))
    assert str(parse_size(first)) == str(parse_size(second))


@pytest.mark.parametrize(
    ("first", "second"), [("2*(S//2)", "S"), ("S", "T"), ("S//2", "(S+1)//2"), ("S*S", "S"), ("S//T", "T//S")]
)
def test_different_sizes_stay_apart(first: str, second: str) -> None:
    assert parse_size(first) != parse_size(second)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ("0", "0"),
        ("1 + S * 2", "2*S+1"),
        ("3 - S", "-S+3"),
        ("S // 2", "S//2"),
        ("(S+3)//4 + 1", "((S+3)//4)+1"),
        ("2*(S//2)", "2*(S//2)"),
        ("0 - S//2", "-(S//2)"),
        ("(S//2)//3", "S//6"),
        ("7//S", "7//S"),
        ("2*((2*(S//2)+1)//3)", "2*((2*(S//2)+1)//3)"),
        ("S//(0-2)", "S//(-2)"),
        ("B*S*3 + S*S", "3*B*S+S*S"),
    ],
)
def test_text(size: str, text: str) -> None:
    assert str(parse_size(size)) == text


def test_an_integer_is_equal_to_its_size_and_hashes_alike() -> None:
    """A set that contains the integer contains the size, and vice versa."""
    for number in (-3, 0, 1, 128):
        assert Size.of(number) == number
        assert number in {Size.of(number)}
        assert Size.of(number) in {number}
    assert S != 1
    assert Size.of("S") != "S", "text is read by Size.of, not by =="
    assert Size.of(np.int64(7)) == 7


# -- arithmetic ----------------------------------------------------------------------------------------------------


@given(sizes(), sizes(), values)
def test_arithmetic_evaluates_as_integers_do(a: Size, b: Size, at: Values) -> None:
    x, y = a.evaluate(at), b.evaluate(at)
    assert (a + b).evaluate(at) == x + y
    assert (a - b).evaluate(at) == x - y
    assert (a * b).evaluate(at) == x * y
    assert (-a).evaluate(at) == -x
    assert (3 + a).evaluate(at) == 3 + x
    assert (3 - a).evaluate(at) == 3 - x
    assert ("S" * a).evaluate(at) == at["S"] * x


@given(sizes(), sizes(), sizes())
def test_sums_and_products_do_not_depend_on_order(a: Size, b: Size, c: Size) -> None:
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a * b == b * a
    assert (a * b) * c == a * (b * c)
    assert a * (b + c) == a * b + a * c
    assert a - a == 0


@given(sizes(), sizes(), values)
def test_floor_division_rounds_down(a: Size, b: Size, at: Values) -> None:
    assume(b.evaluate(at) != 0 and b != 0)
    quotient = a // b
    assert quotient.evaluate(at) == a.evaluate(at) // b.evaluate(at)


@given(sizes(), sizes(), values)
def test_divide_is_exact(a: Size, b: Size, at: Values) -> None:
    exact = a.divide(b)
    if exact is not None:
        assert exact * b == a
        assert exact.evaluate(at) * b.evaluate(at) == a.evaluate(at)


@given(sizes(), positive_sizes())
def test_divide_finds_a_factor(a: Size, b: Size) -> None:
    """A product with a single term is divisible by it again."""
    if len(b.terms) == 1:
        assert (a * b).divide(b) == a


def test_divide_refuses() -> None:
    assert S.divide(0) is None
    assert S.divide(2) is None
    assert (S + 1).divide(S) is None
    assert S.divide(T) is None
    assert Size.of(0).divide(S) == 0
    assert (S * S - 1).divide(S + 1) == S - 1


@given(sizes(), positive_sizes(), positive_sizes(), values)
def test_substitution_is_evaluation_of_the_parts(a: Size, b: Size, s: Size, at: Values) -> None:
    put = {"B": b, "S": s}
    assert a.substitute(put).evaluate(at) == a.evaluate({**at, "B": b.evaluate(at), "S": s.evaluate(at)})
    assert a.substitute({}) == a


def _sum_of(count: int) -> Size:
    return sum((Size.symbol(f"a{i}") for i in range(count)), Size.of(0))


@pytest.mark.parametrize(
    ("last", "first", "what", "hint"),
    [
        (lambda: _sum_of(16) * _sum_of(16), lambda: _sum_of(17) * _sum_of(17), "has too many terms", "at most 256"),
        (lambda: _sum_of(256), lambda: _sum_of(257), "a size expression has too many terms", "at most 256"),
        (lambda: product([S] * 64), lambda: product([S] * 65), "a term of a size has too many factors", "at most 64"),
        (lambda: Size.of(2**127), lambda: Size.of(2**127 + 1), "a size is too large", f"at most {2**127}"),
        (lambda: S * -(2**127), lambda: S * -(2**127) - S, "a size is too large", f"at most {2**127}"),
        (lambda: (S * 2**63) * (T * 2**64), lambda: (S * 2**64) * (T * 2**64), "is too large", f"at most {2**127}"),
        (lambda: _sum_of(32).divide(S + 1), lambda: _sum_of(13).divide(_sum_of(5)), "to be divided", "at most 64"),
        (lambda: parse_size("-S" + "+S" * 99), lambda: parse_size("S" + "+S" * 100), "too long", "at most 200 tokens"),
        (lambda: parse_size("9" * 18), lambda: parse_size("1" + "0" * 18), "is too large", "at most 18 digits"),
    ],
    ids=["product", "sum", "factors", "number", "coefficient", "large", "divided", "tokens", "digits"],
)
def test_a_size_past_a_limit_is_refused_with_the_limit(
    last: Callable[[], object], first: Callable[[], object], what: str, hint: str
) -> None:
    last()
    with pytest.raises(SizeError, match=what) as caught:
        first()
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("$" * 200, repr("$" * 200)),
        ("$" * 201, repr("$" * 100) + " ... " + repr("$" * 40)),
        ("a" * 100 + "$" * 100 + "b" * 40, repr("a" * 100) + " ... " + repr("b" * 40)),
    ],
)
def test_long_text_is_shown_by_its_ends(text: str, shown: str) -> None:
    with pytest.raises(SizeError) as caught:
        parse_size(text)
    assert caught.value.what == f"not a size: {shown}"


def test_substitution_is_of_all_symbols_at_once() -> None:
    assert (S + 2 * T).substitute({"S": T, "T": S}) == T + 2 * S
    assert (S // T).substitute({"S": 7, "T": 2}) == 3


@given(sizes(), sizes(), values)
def test_equal_forms_are_equal_at_all_values(a: Size, b: Size, at: Values) -> None:
    """Two ways to compute the same polynomial, and an identity that must hold exactly: a + b - b is a."""
    again = (a + b) - b
    assert again == a
    assert again.evaluate(at) == a.evaluate(at)
    assert a * b == b * a
    if len(text := str(a * b)) <= MOST_TOKENS:  # a token has at least one character, so longer texts may be refused
        assert parse_size(text) == a * b


@given(sizes())
def test_symbols_are_those_that_evaluation_needs(a: Size) -> None:
    at = dict.fromkeys(a.symbols, 3)
    number = a.evaluate(at)
    assert a.constant in (None, number)
    assert (a.constant is None) == bool(a.symbols)
    for name in a.symbols:
        with pytest.raises(SizeError, match=f"needs a value for {name}"):
            a.evaluate({k: v for k, v in at.items() if k != name})


def test_as_symbol() -> None:
    assert S.as_symbol == "S"
    for other in (2 * S, S + 1, S * T, Size.of(3), S // 2, -S):
        assert other.as_symbol is None


@pytest.mark.parametrize(
    ("size", "linear"),
    [(S, ("S", 1, 0)), (2 * S, ("S", 2, 0)), (3 * S - 4, ("S", 3, -4)), (5 - S, ("S", -1, 5))],
)
def test_as_linear(size: Size, linear: tuple[str, int, int]) -> None:
    assert size.as_linear == linear


@pytest.mark.parametrize("size", [Size.of(3), S * T, S * S, S + T, S // 2])
def test_sizes_that_are_not_linear_in_one_symbol(size: Size) -> None:
    assert size.as_linear is None


# -- bounds --------------------------------------------------------------------------------------------------------


@st.composite
def bounded_values(draw: st.DrawFn) -> tuple[dict[str, Bounds], dict[str, int]]:
    """Draw bounds for each symbol, and a value within them."""
    bounds, at = {}, {}
    for name in SYMBOLS:
        low = draw(st.integers(1, 9))
        high = draw(st.none() | st.integers(low, 20))
        bounds[name] = Bounds(low, high)
        at[name] = draw(st.integers(low, 40 if high is None else high))
    return bounds, at


@settings(max_examples=400)
@given(sizes(), bounded_values())
@example(parse_size("(0-4)//S"), ({"S": Bounds(1, 8)}, {"S": 8}))
@example(parse_size("(0-S)//4"), ({"S": Bounds()}, {"S": 2**61}))
@example(parse_size("(0-4)//S"), ({"S": Bounds()}, {"S": 100}))
def test_bounds_hold_every_value(size: Size, bounded: tuple[dict[str, Bounds], dict[str, int]]) -> None:
    bounds, at = bounded
    assert size.evaluate(at) in size.bounds(bounds), (str(size), size.bounds(bounds))


@pytest.mark.parametrize(
    ("size", "bounds"),
    [
        ("S", Bounds(1, 1024)),
        ("2*S+1", Bounds(3, 2049)),
        ("S-1", Bounds(0, 1023)),
        ("5-S", Bounds(5 - 1024, 4)),
        ("S//4", Bounds(0, 256)),
        ("(S+3)//4", Bounds(1, 256)),
        ("(0-S)//4", Bounds(-256, -1)),
        ("100//S", Bounds(0, 100)),
        ("B", Bounds(1, None)),
        ("B*S", Bounds(1, None)),
        ("0-B", Bounds(-(2**62), -1)),
        ("S//B", Bounds(0, 1024)),
        ("S//(B-1)", Bounds(-(2**62), None)),  # divides by zero if B is 1
        ("7", Bounds(7, 7)),
    ],
)
def test_bounds_of_these_are_tight(size: str, bounds: Bounds) -> None:
    assert parse_size(size).bounds({"S": Bounds(1, 1024)}) == bounds


def test_bounds_of_a_symbol() -> None:
    assert Bounds(1, 8).intersect(Bounds(3)) == Bounds(3, 8)
    assert Bounds(1).intersect(Bounds(2)) == Bounds(2, None)
    assert 8 in Bounds(1, 8)
    assert 9 not in Bounds(1, 8)
    assert 0 not in Bounds()
    said = [Bounds().around("S"), Bounds(1, 8).around("S"), Bounds(2, 8).around("S"), Bounds(0).around("S")]
    assert said == ["S", "S <= 8", "2 <= S <= 8", "0 <= S"]


# -- reading -------------------------------------------------------------------------------------------------------


@settings(max_examples=400)
@given(sizes())
@example(parse_size("(0-3)*(S//2)*((S+1)//(0-2))"))
@example(parse_size("((S//2)//3+1)//(4*B)"))
@example(parse_size("(S//2)*(S//3)"))
def test_text_reads_back(size: Size) -> None:
    assert parse_size(str(size)) == size
    assert str(parse_size(str(size))) == str(size)


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("", 1),
        ("S+", 3),
        ("S S", 3),
        ("2S", 2),
        ("S*-2", 3),
        ("S**2", 3),
        ("S/2", 2),
        ("(S", 3),
        ("S)", 2),
        ("()", 2),
        ("S + $", 5),
        ("S % 2", 3),
        ("1.5", 2),
        ("S²", 2),  # Unicode calls it a letter, but it is not allowed in names of generated code
        ("é", 1),
        ("٣", 1),
    ],
)
def test_malformed_text_names_its_column(text: str, column: int) -> None:
    with pytest.raises(SizeError) as caught:
        parse_size(text)
    assert caught.value.within == f"column {column}"
    assert repr(text) in caught.value.what


@pytest.mark.parametrize("text", ["1//0", "S//0", "S//(2-2)"])
def test_dividing_by_zero(text: str) -> None:
    with pytest.raises(SizeError, match="divides by zero"):
        parse_size(text)


def test_dividing_by_a_size_that_turns_out_zero() -> None:
    with pytest.raises(SizeError, match="divides by zero"):
        (S // (T - 1)).evaluate({"S": 3, "T": 1})
    with pytest.raises(SizeError, match="divides by zero"):
        (S // (T - 1)).substitute({"T": 1})


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000 + "S" + ")" * 100_000,
        "-" * 100_000 + "S",
        "+".join(["S"] * 100_000),
        "*".join(f"(a{i}+b{i})" for i in range(30)),
        "9" * 100_000,
        "(" * 199,
        "*".join(["999999999999999999"] * 99),
        "$" * 1_000_000,
        "S" + " " * 1_000_000 + "$",
    ],
    ids=["deep", "signs", "long", "explodes", "digits", "open", "huge", "junk", "spaces"],
)
def test_hostile_text_is_refused_in_a_few_lines(text: str) -> None:
    with pytest.raises(SizeError) as caught:
        parse_size.__wrapped__(text)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("scale", [1, 2], ids=["one quotient", "nested ones"])
def test_quotients_of_quotients_read_back_wherever_they_stand(scale: int) -> None:
    """As in a stack of convolutions, each of which halves the length and rounds up. The length may be doubled in
    between.
    """
    size, length = S, 2**40 + 1
    for _ in range(12):
        size, length = (scale * size + 1) // 3, (scale * length + 1) // 3
    assert str(size).count("//") == (1 if scale == 1 else 12)
    assert size.evaluate({"S": 2**40 + 1}) == length
    assert parse_size(str(size)) == size
    assert parse_rule(f"-> ^a={3 * size + T}").known_sizes["a"] == 3 * size + T
    b = Builder(Graph("nested"))
    x = b.input("x", Type(f32, (Dim.of(T), Dim.of(2 * size), Dim([Factor(Size.of(4), "heads"), Factor(size)]))))
    y = b.rearrange(x, pattern=f"t (a={2 * size} b) (heads c={size}) -> (t heads) (a b) c")
    b.outputs(
        y=b.slice(y, axis=2, start=size - 1), n=b.iota(size=2 * size), w=b.expand(y, shape=(4 * T, 2 * size, size))
    )
    assert str(parse_graph(str(b.graph))) == str(b.graph)
    mesh = Mesh.of("tp=2")
    placed = MeshPlacement((Split(mesh.parts, 2 * size), None))
    assert parse_placement(placed.text(mesh), mesh) == placed


def test_a_quotient_of_a_quotient_keeps_what_one_number_cannot_hold() -> None:
    size, value = S, 2**100
    for _ in range(4):
        size, value = size // (2**20), value // 2**20
    assert size.evaluate({"S": 2**100}) == value


@pytest.mark.parametrize("value", [2.0, 2.5, None, [3], b"S"])
def test_a_size_of_anything_else_is_refused(value: Any) -> None:
    """A float is not a size, even an integral one: 8 / 3 * dim would silently lose its fraction."""
    with pytest.raises(SizeError, match="a size is an integer or an expression"):
        Size.of(value)


def test_operators_beside_numbers_that_are_no_sizes() -> None:
    """A size that is a number, on either side of the operator; NumPy's integers become sizes in operations with any
    size.
    """
    seven: Any = Size.of(7)
    for function in (operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod):
        for other in (2.5, -3.0, np.float32(1.5)):
            assert function(seven, other) == function(7, other)
            assert function(other, seven) == function(other, 7)
    assert (np.int64(9) - S, np.int64(9) // S, np.int64(9) % S) == (9 - S, 9 // S, 9 % S)
    assert (S**0, S**1, S**3, seven**0, seven**2, seven**-1) == (1, S, S * S * S, 1, 49, 1 / 7)
    for function in (operator.floordiv, operator.mod):
        with pytest.raises(SizeError, match="the size S is not a number while a model is traced"):
            function(2.5, S)
        with pytest.raises(TypeError):
            function([], seven)


@pytest.mark.parametrize("name", ["", "2S", "a b", "S-1", "é"])
def test_names_of_symbols(name: str) -> None:
    with pytest.raises(SizeError, match="is not a symbol's name"):
        Size.symbol(name)
