"""An op refuses sizes or numbers that it does not support. The error names the op and its line, and is the same on
every backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import compiled, each_backend, graph_of, message, needs_torch
from tests.op_checks import TESTED, Case
from tests.rounding_bounds import assert_within, bounded
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import GraphError, ParseError, RuleError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.op_registry import OPS
from treadle.ir.source_lines import SourceLine
from treadle.ir.text.attributes import attribute_fields
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.printer import print_graph
from treadle.ir.types import DTYPES

LINE = SourceLine("model.py", 7)

REDUCTIONS: dict[str, tuple[Callable[[Builder, Expr], Expr], str]] = {
    "reduce_max": (lambda b, x: b.reduce_max(x, axes=(1,)), "max"),
    "reduce_min": (lambda b, x: b.reduce_min(x, axes=(1,)), "min"),
    "reduce_mean": (lambda b, x: b.reduce_mean(x, axes=(1,)), "mean"),
    "argmax": (lambda b, x: b.argmax(x, axis=1), "greatest element"),
    "softmax": (lambda b, x: b.softmax(x, axis=1), "softmax"),
    "log_softmax": (lambda b, x: b.log_softmax(x, axis=1), "softmax"),
    "rms_norm": (lambda b, x: b.rms_norm(x, None), "mean"),
}


def _behind_two(name: str) -> Graph:
    """Return a graph that applies the op to an axis without its first two elements; the axis is empty if it has two."""

    def build(b: Builder) -> Expr:
        rest = b.slice(b.input("x", "f32[B, S]"), axis=1, start=2)
        b.source = LINE
        return REDUCTIONS[name][0](b, rest)

    return graph_of(build)


@pytest.mark.parametrize("name", REDUCTIONS)
@each_backend
def test_an_axis_that_a_call_makes_empty_is_refused(backend: str, name: str) -> None:
    exe = compiled(backend, _behind_two(name))
    text = message(lambda: exe(x=np.ones((3, 2), np.float32)))
    assert f"{name}: an axis of size 0 has no {REDUCTIONS[name][1]}, where S = 2" in text
    assert "model.py:7" in text
    assert "sizes for which S-3 is 0 or more" in text
    assert np.isfinite(np.asarray(exe(x=np.ones((3, 3), np.float32))["y"])).all()  # one element is enough


@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_reference_refuses_it_too(name: str) -> None:
    with pytest.raises(GraphError, match=f"{name}: an axis of size 0 has no {REDUCTIONS[name][1]}") as caught:
        interpret(_behind_two(name), {"x": np.ones((3, 2), np.float32)})
    assert "model.py:7" in str(caught.value)


# -- numbers to pad with -------------------------------------------------------------------------------------


def _padded(b: Builder, dtype: str, value: float) -> Expr:
    b.source = LINE
    made: Expr = b.pad(b.input("x", f"{dtype}[N]"), axis=0, before=1, value=value)
    return made


OUTSIDE = [
    ("i8", 128.0), ("i8", 1e300), ("u8", -1.0), ("i32", float("inf")), ("i64", float("nan")), ("i64", 2.0**63),
    ("i16", 0.5), ("bool", 2.0), ("f16", 65520.0), ("f32", 1e39), ("bf16", 3.4e38),
]  # fmt: skip
HELD = [
    ("i8", 127.0), ("i8", -128.0), ("u8", 255.0), ("i64", -(2.0**63)), ("bool", 1.0), ("f16", 65504.0),
    ("f32", 3e38), ("f32", float("-inf")),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "value"), OUTSIDE)
def test_a_number_outside_the_dtype_is_refused_where_the_graph_is_built(dtype: str, value: float) -> None:
    with pytest.raises(RuleError, match=f"pad: value must be a number that {dtype} can hold") as caught:
        _padded(Builder(Graph("padded")), dtype, value)
    assert "model.py:7" in str(caught.value)


def test_a_number_outside_the_dtype_is_refused_in_a_text() -> None:
    text = print_graph(graph_of(lambda b: _padded(b, "i8", 127.0)))
    assert parse_graph(text).main.nodes
    with pytest.raises((ParseError, RuleError), match="pad: value must be a number that i8 can hold"):
        parse_graph(text.replace("127.0", "300.0"))


@pytest.mark.parametrize(("dtype", "value"), HELD)
@each_backend
def test_the_outermost_numbers_are_padded_with(backend: str, dtype: str, value: float) -> None:
    graph = graph_of(lambda b: _padded(b, dtype, value))
    x = np.zeros(2, DTYPES[dtype].numpy)
    expected = np.concatenate([np.asarray([value]).astype(x.dtype), x])
    np.testing.assert_array_equal(np.asarray(compiled(backend, graph)(x=x)["y"]), expected)


# -- float attributes ----------------------------------------------------------------------------------------

FLOAT_ATTRIBUTES = [
    (name, field.name)
    for name in TESTED
    for field in attribute_fields(OPS[name]).values()
    if "float" in field.annotation
]


def _with_number(name: str, field: str, value: float) -> Case:
    """Return the op's first sample, with another number for one attribute."""
    case = Case.of(name, 0)
    return replace(case, op=type(case.op)(**case.op.attributes | {field: value}))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("name", "field"), FLOAT_ATTRIBUTES)
@each_backend
def test_an_attribute_that_is_no_finite_number_runs_or_is_refused(
    backend: str, name: str, field: str, value: float
) -> None:
    case = _with_number(name, field, value)
    if not case.takes_its_operands:
        b = Builder(Graph("refused"))
        operands = [None if t is None else b.input(f"x{n}", t).value for n, t in enumerate(case.types)]
        b.source = LINE
        with pytest.raises(RuleError, match=f"{name}: {field} must be .*, is {value}") as caught:
            b.emit(case.op, operands)
        assert "model.py:7" in str(caught.value)
        return
    graph = case.forward_graph()
    assert parse_graph(print_graph(graph)) == graph
    made = compiled(backend, graph)(**case.inputs)
    for output, wanted in bounded(graph, case.inputs).items():
        assert_within(made[output], wanted, output)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("name", "field"), FLOAT_ATTRIBUTES)
def test_onnx_holds_such_an_attribute_too(name: str, field: str, value: float, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    case = _with_number(name, field, value)
    if not case.takes_its_operands:
        return
    from treadle.backends.onnx.exporter import export_onnx

    graph = case.forward_graph()
    path = export_onnx(graph, {}, tmp_path / "op.onnx").path
    made = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, case.inputs)
    for got, (output, wanted) in zip(made, bounded(graph, case.inputs).items(), strict=True):
        assert_within(got, wanted, output)


# -- results that no memory holds ----------------------------------------------------------------------------

HUGE = 2**58
"""More bytes than a process can address."""


def _wide(b: Builder) -> Expr:
    x = b.input("x", "i8[N]")
    b.source = LINE
    made: Expr = b.pad(x, axis=0, before=HUGE)
    return made


def _repeated(b: Builder) -> Expr:
    x = b.input("x", "i8[1]")
    b.source = LINE
    made: Expr = b.expand(x, shape=(HUGE,))
    return made


@pytest.mark.parametrize(("build", "name"), [(_wide, "pad"), (_repeated, "expand")], ids=["pad", "expand"])
@each_backend
def test_a_result_that_is_too_large_is_refused(backend: str, build: Callable[[Builder], Expr], name: str) -> None:
    exe = compiled(backend, graph_of(build))
    text = message(lambda: exe(x=np.ones(1, np.int8)))
    if backend == "tvm":  # TVM plans the memory of all ops together
        assert "there is not enough memory" in text
    else:
        assert text.startswith(f"{name}: ")
        assert "model.py:7" in text


@each_backend
def test_sizes_past_64_bits_are_refused(backend: str) -> None:
    def build(b: Builder) -> Expr:
        wide = b.exp(b.pad(b.input("x", "f32[N]"), axis=0, before=f"{10**17}*N"))
        return b.reduce_sum(wide, axes=(0,))

    exe = compiled(backend, graph_of(build))
    assert "these sizes need more memory than is addressable" in message(lambda: exe(x=np.ones(128, np.float32)))


@needs_torch
def test_of_what_a_library_says_the_first_line_is_told() -> None:
    """PyTorch's message continues with a list of its own calls."""
    exe = compiled("torch", graph_of(lambda b: b.pad(b.input("x", "f32[N]"), axis=0, before=f"{10**17}*N")))
    text = message(lambda: exe(x=np.ones(128, np.float32)))
    assert [line[:10].strip() for line in text.splitlines()] == ["pad: faile", "received", "in", "from"]


def test_the_reference_tells_what_it_could_not_make() -> None:
    with pytest.raises(GraphError, match="the reference implementation of pad raised an error") as caught:
        interpret(graph_of(_wide), {"x": np.ones(1, np.int8)})
    assert "MemoryError" in str(caught.value)
    assert "model.py:7" in str(caught.value)


@pytest.mark.parametrize("type", ["f32[3]", "f32[S]"])
def test_a_reference_that_breaks_its_rule_is_told(type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(b: Builder) -> Expr:
        x = b.input("x", type)
        b.source = LINE
        return b.exp(x)

    monkeypatch.setattr(OPS["exp"], "reference", lambda op, x: x[1:])
    with pytest.raises(GraphError, match=r"exp: the reference returns shape \[2\], but the rule gives \[3\]") as caught:
        interpret(graph_of(build), {"x": np.ones(3, np.float32)})
    assert "model.py:7" in str(caught.value)


def test_a_width_with_too_many_digits_is_refused_where_the_graph_is_built() -> None:
    b = Builder(Graph("wide"))
    x: Any = b.input("x", "i8[N]")
    with pytest.raises(RuleError, match=r"pad: .*a number in a size is too large"):
        b.pad(x, axis=0, before=2**70)
