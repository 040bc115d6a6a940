"""The builder: numbers' dtypes, operators, and errors that name the user's own line."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle.frontends.language as t
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import FrontendError, GraphError, RuleError, TreadleError
from treadle.ir.graph import Graph
from treadle.ir.initial_values import Init
from treadle.ir.interpreter import interpret
from treadle.ir.types import DTYPES, boolean, f16, f32, f64, i64

HERE = f"tests/{Path(__file__).name}"


def start() -> tuple[Builder, Expr, Expr, Expr]:
    """Return a builder, and a float, an integer and a boolean input of [B, 4]."""
    b = Builder(Graph("example"))
    return b, b.input("x", "f32[B, 4]"), b.input("i", "i64[B, 4]"), b.input("m", "bool[B, 4]")


def line(offset: int = 0) -> int:
    """Return the line number of the caller, or of a line `offset` lines below."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno + offset


# -- the user's line -----------------------------------------------------------------------------------------------


def test_nodes_know_their_line() -> None:
    b, x, _, _ = start()
    y, here = b.gelu(x) * 2.0 + 1.0, line()
    z, there = (
        b.softmax(x),
        line(-1),
    )
    for value, number in ((y, here), (z, there)):
        assert value.value.node is not None
        assert str(value.value.node.source) == f"{HERE}:{number}"


def test_a_helper_of_the_users_is_the_users() -> None:
    _, x, _, _ = start()

    def double(v: Expr) -> Expr:
        return v * 2.0

    node = double(x).value.node
    assert node is not None
    assert str(node.source) == f"{HERE}:{inspect.getsourcelines(double)[1] + 1}"


def test_source_lines_skip_library_frames() -> None:
    """The source line of an op or an error is the user's line, even if frames of contextlib, functools or other library
    modules are between that line and the compiler.
    """
    b, x, _, _ = start()
    stack = contextlib.ExitStack()
    stack.callback(lambda: b.gelu(x))
    number = line(-1)
    stack.close()
    assert str(b.function.nodes[-1].source) == f"{HERE}:{number}"
    with pytest.raises(FrontendError, match="while a model is traced") as caught:
        t.scope("outside").__enter__()
    assert caught.value.source == f"{HERE}:{line(-1)}"


def wrong_axis(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return b.softmax(x, axis=2)


def wrong_sizes(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return b.add(x, b.parameter("w", "f32[3]"))


def wrong_dtypes(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return x + i


def unknown_op(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return b.sotfmax(x)


def unknown_attribute(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return b.softmax(x, axes=1)


def missing_attribute(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return b.rearrange(x)


def attribute_of_another_kind(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return b.softmax(x, axis="last")


def attribute_that_is_none(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return b.softmax(x, axis=None)


def attribute_that_is_no_tuple(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return b.reduce_sum(x, axes=1)


def attribute_that_is_no_number(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return b.rms_norm(x, b.parameter("w", "f32[4]"), eps="small")


def attribute_that_is_no_dtype(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return x.cast("float32")


def attribute_that_is_no_size(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return b.pad(x, axis=0, before=1.5)


def too_few(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return b.add(x)


def too_many(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return b.gelu(x, x)


def none_of_any_number(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return b.concat()


def text_operand(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return x + "1"


def list_of_values(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return b.concat([x, x], axis=0)


def half_an_integer(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return i * 0.5


def half_an_integer_first(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return 0.5 * i


def truth_of_a_value(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return 1 if x > 0.0 else 2


def equality_of_values(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return 1 if i == 0 else 2


def chained_comparison(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return 0.0 < x < 1.0


def iteration(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return list(b.input("y", "f32[S]"))


def method_of_other_libraries(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return x.cross(x)


def parameter_of_two_types(b: Builder, x: Expr, i: Expr, m: Expr) -> Any:
    return b.parameter("w", "f32[4]") + b.parameter("w", "f32[5]")


ERRORS: list[tuple[Callable[..., Any], type[TreadleError], str]] = [
    (wrong_axis, RuleError, "softmax: there is no axis 2 in a tensor of rank 2"),
    (wrong_sizes, RuleError, "add: sizes disagree: 4 in x, 3 in y"),
    (wrong_dtypes, RuleError, "add: dtypes disagree: x is f32, y is i64"),
    (unknown_op, GraphError, "did you mean softmax"),
    (unknown_attribute, GraphError, "softmax(x, *, axis=-1, name=None)"),
    (unknown_attribute, GraphError, "softmax got an unexpected keyword argument 'axes'\n"),
    (missing_attribute, GraphError, "rearrange: attribute pattern is missing\n"),
    (attribute_of_another_kind, GraphError, "softmax: axis must be an integer, is 'last'"),
    (attribute_that_is_none, GraphError, "softmax: axis must be an integer, is None"),
    (attribute_that_is_no_tuple, GraphError, "reduce_sum: axes must be a tuple of integers, is 1\n"),
    (attribute_that_is_no_number, GraphError, "rms_norm: eps must be a number, is 'small'"),
    (attribute_that_is_no_dtype, GraphError, "unknown dtype 'float32'"),
    (attribute_that_is_no_size, TreadleError, "a size is an integer or an expression of symbols, not 1.5"),
    (too_few, GraphError, "add: operand y is missing"),
    (too_many, GraphError, "gelu takes 1 operand, received 2"),
    (none_of_any_number, GraphError, "concat takes one operand or more"),
    (text_operand, GraphError, "a constant cannot hold <U1"),
    (list_of_values, GraphError, "concat: an operand must be a tensor, not a list of tensors"),
    (list_of_values, GraphError, "try       tensors one by one, as in concat(x, y)"),
    (half_an_integer, GraphError, "0.5 is not of dtype i64"),
    (half_an_integer_first, GraphError, "0.5 is not of dtype i64"),
    (truth_of_a_value, GraphError, "where(condition, a, b) selects elementwise"),
    (equality_of_values, GraphError, "a tensor of a model has no truth value"),
    (chained_comparison, GraphError, "a tensor of a model has no truth value"),
    (iteration, GraphError, "a tensor cannot be iterated over along an axis whose size differs from call to call: S"),
    (method_of_other_libraries, GraphError, "a tensor of a model has no .cross"),
    (parameter_of_two_types, GraphError, "received  f32[4], then f32[5]"),
]


@pytest.mark.parametrize(("wrong", "kind", "said"), ERRORS, ids=[w.__name__ for w, _, _ in ERRORS])
def test_errors_name_the_line(wrong: Callable[..., Any], kind: type[TreadleError], said: str) -> None:
    b, x, i, m = start()
    with b.scoped("h.3"), pytest.raises(kind) as caught:
        wrong(b, x, i, m)
    assert said in str(caught.value)
    assert caught.value.source == f"{HERE}:{inspect.getsourcelines(wrong)[1] + 1}, scope h.3"


def test_a_failed_op_adds_nothing() -> None:
    b, x, i, _ = start()
    with pytest.raises(RuleError):
        b.add(x, i)
    assert b.function.nodes == []


def test_every_op_is_a_method() -> None:
    b, x, _, _ = start()
    assert b.gelu(x).type == x.type
    assert type(b).gelu is not None, "after the first use it is an attribute of the class"
    with pytest.raises(AttributeError):
        _ = b._private


# -- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [f16, f32, f64])
def test_a_number_takes_the_dtype_it_meets(dtype: Any) -> None:
    b = Builder(Graph("g"))
    x = b.input("x", dtype["4"])
    for y in (x + 1, 1 + x, x - 0.1, 0.1 - x, x * True, 2 / x, x / 2, x**2, b.where(x > 0, x, 0.0), b.maximum(0.5, x)):
        assert y.dtype is dtype
        assert y.type == x.type
    assert (x > 0).dtype is boolean


def test_a_number_beside_integers() -> None:
    b, _, i, _ = start()
    assert (i + 2).dtype is i64
    assert (2.0 * i).dtype is i64  # an integer is an integer
    assert interpret_one(b, 7 - i, i=np.full((1, 4), 3)).tolist() == [[4, 4, 4, 4]]


def test_numbers_that_no_operand_ties() -> None:
    """A condition or an indexed table does not decide the dtype of values or of indices."""
    b, x, _, m = start()
    assert b.where(m, 1.0, 0.0).dtype is f32
    assert b.where(m, 1.0, -2.5).dtype is f32
    assert b.where(m, 1.0, 0).dtype is f32  # the first number decides
    assert b.where(m, 1, 0).dtype is i64
    assert b.where(m, 0.0, x).dtype is f32
    assert b.where(True, x, 0.0).dtype is f32
    assert b.embedding(b.parameter("table", "f32[9, 4]"), 0).type == f32["4"]
    with pytest.raises(GraphError, match=r"0\.5 is not of dtype i64"):
        b.where(m, 1, 0.5)
    with pytest.raises(RuleError, match="indices must be an integer"):
        b.embedding(b.parameter("table", "f32[9, 4]"), 0.5)
    chosen = interpret_one(b, b.where(m, 1.0, -2.5), m=np.array([[True, False, False, True]]))
    assert chosen.tolist() == [[1.0, -2.5, -2.5, 1.0]]


@pytest.mark.parametrize(("dtype", "number"), [("f16", 1e6), ("f16", -70_000), ("bf16", 3.4e38), ("f32", 1e300)])
def test_a_number_does_not_become_infinite(dtype: str, number: float) -> None:
    b = Builder(Graph("g"))
    x = b.input("x", f"{dtype}[4]")
    with pytest.raises(GraphError, match=f"{re.escape(str(number))} is out of the range of {dtype}"):
        x + number
    with pytest.raises(GraphError, match="is out of the range"):
        b.constant([0.0, number, float("-inf")], DTYPES[dtype])
    assert (x + float("-inf")).dtype is DTYPES[dtype]


def test_arrays_and_lists_are_constants() -> None:
    b, x, _, _ = start()
    ones = np.ones((1, 4), np.float32)
    row = np.array([1.0, 2.0, 3.0, 4.0])
    for y in (x + row, row + x, x + [1, 2, 3, 4], x + row.astype(np.float32)):  # noqa: RUF005
        assert isinstance(y, Expr), "NumPy leaves the operator to the traced value"
        assert y.type == x.type
        assert interpret_one(b, y, x=ones).tolist() == [[2.0, 3.0, 4.0, 5.0]]
    assert (np.float32(2) * x).type == x.type
    assert b.constant(0.5).dtype is f32
    assert b.constant(np.float64(0.5)).dtype is f64
    assert b.constant(0.5, f16).dtype is f16


# -- operators -----------------------------------------------------------------------------------------------------


def interpret_one(b: Builder, result: Expr, /, **inputs: Any) -> np.ndarray[Any, Any]:
    b.outputs(out=result)
    shape = next(iter(inputs.values())).shape
    empty = {v.name: np.zeros(shape, v.type.dtype.numpy) for v in b.function.inputs}
    weights = {n: np.zeros(v.type.static_shape or (), v.type.dtype.numpy) for n, v in b.function.parameters.items()}
    return interpret(b.graph, {**empty, **inputs}, weights)["out"]


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, c: a + c,
    "-": lambda a, c: a - c,
    "*": lambda a, c: a * c,
    "/": lambda a, c: a / c,
    "//": lambda a, c: a // c,
    "%": lambda a, c: a % c,
    "**": lambda a, c: a**c,
    "<": lambda a, c: a < c,
    "<=": lambda a, c: a <= c,
    ">": lambda a, c: a > c,
    ">=": lambda a, c: a >= c,
    "==": lambda a, c: a == c,
    "!=": lambda a, c: a != c,
}


@pytest.mark.parametrize("sign", OPERATORS)
def test_operators_mean_what_they_mean_in_numpy(sign: str) -> None:
    apply = OPERATORS[sign]
    left = np.array([[0.5, 1.0, 2.0, 3.0]], np.float32)
    right = np.array([[2.0, 1.0, 0.5, 3.0]], np.float32)
    b = Builder(Graph("g"))
    x, y = b.input("x", "f32[1, 4]"), b.input("y", "f32[1, 4]")
    np.testing.assert_array_equal(interpret_one(b, apply(x, y), x=left, y=right), apply(left, right))
    np.testing.assert_array_equal(interpret_one(b, apply(x, 2.0), x=left, y=right), apply(left, np.float32(2)))
    np.testing.assert_array_equal(interpret_one(b, apply(2.0, x), x=left, y=right), apply(np.float32(2), left))


def test_operators_of_one_value_and_of_truth() -> None:
    b, x, _, m = start()
    values = np.array([[0.5, -1.0, 2.0, 3.0]], np.float32)
    truth = np.array([[True, True, False, False]])
    np.testing.assert_array_equal(interpret_one(b, -x, x=values), -values)
    np.testing.assert_array_equal(interpret_one(b, abs(x), x=values), abs(values))
    np.testing.assert_array_equal(interpret_one(b, ~m, m=truth), ~truth)
    np.testing.assert_array_equal(interpret_one(b, m & (x > 0.0), x=values, m=truth), truth & (values > 0))
    np.testing.assert_array_equal(interpret_one(b, m | (x > 0.0), x=values, m=truth), truth | (values > 0))
    w = b.parameter("w", "f32[4, 3]")
    assert (x @ w).type == f32["B 3"]
    assert (np.ones((2, 4)) @ w).type == f32[2, 3]


def test_values_are_told_apart_though_equality_is_an_op() -> None:
    _, x, i, _ = start()
    assert (x == None) is False  # noqa: E711
    assert (x != None) is True  # noqa: E711
    assert len({x, i, x}) == 2
    assert (i == 0).dtype is boolean


def test_casting() -> None:
    _, x, _, _ = start()
    assert x.cast(f32) is x
    assert x.cast("f32") is x
    assert x.cast("f16").dtype is f16
    assert [x.cast(d).dtype for d in DTYPES.values()] == list(DTYPES.values())
    assert (x.rank, x.shape[1], repr(x)) == (2, 4, "x: f32[B, 4]")


# -- arguments -----------------------------------------------------------------------------------------------------


def test_a_parameter_is_declared_once() -> None:
    b, _, _, _ = start()
    first, second = b.parameter("w", "f32[heads=4]", Init("ones")), b.parameter("w", "f32[4]", Init("zeros"))
    assert first.value is second.value
    assert b.graph.initial == {"w": Init("ones")}, "the first declaration counts"
    assert list(b.graph.parameters) == ["w"]


def test_an_input_is_declared_once() -> None:
    b, _, _, _ = start()
    with pytest.raises(GraphError, match="the function has an input 'x' already"):
        b.input("x", "f32[2]")
    assert b.graph.symbols.keys() == {"B"}
    b.input("y", "f32[2*T, U//2]")
    assert b.graph.symbols.keys() == {"B", "T", "U"}


def test_scopes() -> None:
    b, x, _, _ = start()
    with b.scoped("h"), b.scoped("0.attn"):
        b.gelu(x)
        with b.scoped(""):
            b.gelu(x)
    with contextlib.suppress(RuleError), b.scoped("broken"):
        b.softmax(x, axis=9)
    b.gelu(x)
    assert [n.scope for n in b.function.nodes] == ["h.0.attn", "h.0.attn", ""]


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda x: t.softmax(x, -1), "t.softmax(x, axis=-1)"),
        (lambda x: t.slice(x, 1, 0, 2), "t.slice(x, axis=1, start=0, stop=2)"),
        (lambda x: t.cumsum(x, 1), "t.cumsum(x, axis=1)"),
    ],
)
def test_attributes_behind_the_operands_are_spelled_by_keyword(call: Callable[[Any], Any], hint: str) -> None:
    def declared(x: t.f32["B 8"]) -> Any:
        return function(x)

    function = call
    with pytest.raises(GraphError) as caught:
        t.model(declared).graph()
    assert caught.value.hint == hint
    function = eval(f"lambda x: {hint}", {"t": t})
    assert t.model(declared).graph().main.outputs
