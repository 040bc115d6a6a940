"""Calls of a compiled model: by position, with NumPy's float64 arrays, and in the form of ONNX Runtime."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import treadle as t
from tests.error_texts import raises_freely
from tests.op_checks import BACKENDS
from treadle.ir.errors import BackendError
from treadle.ir.text.parser import parse_graph


@t.model
def scaled(x: t.f32["B 3"], y: t.f32["B 3"], flags: t.boolean["B"] | None):  # type: ignore[no-untyped-def]
    """Two outputs of two inputs."""
    return {"difference": x - y, "product": x * y}


X = np.array([[1, 2.5, -3], [0.1, 1e30, np.inf]])
Y = np.array([[0.1, 2, 1], [0.2, 1, 0.5]])


@pytest.fixture(scope="module", params=BACKENDS)
def exe(request: pytest.FixtureRequest) -> t.Compiled:
    return t.compile(scaled, backend=request.param)


def test_inputs_are_passed_in_order(exe: t.Compiled) -> None:
    x, y = X.astype(np.float32), Y.astype(np.float32)
    expected = exe(x=x, y=y)
    np.testing.assert_array_equal(expected["difference"], x - y)
    for outputs in (exe(x, y), exe(x, y=y)):
        assert list(outputs) == ["difference", "product"]
        np.testing.assert_array_equal(outputs["difference"], expected["difference"])
    assert exe([[1, 2, 3]], [[0, 0, 1]])["difference"].tolist() == [[1, 2, 2]]


@pytest.mark.parametrize(
    ("ordered", "named", "words"),
    [
        ((X, Y, X), {}, "scaled takes 2 inputs"),
        ((X,), {"x": X, "y": Y}, "input x is passed twice"),
        ((X, Y), {"x": X, "y": Y}, "input x, y is passed twice"),
        ((X,), {}, "no value for y"),
        ((X,), {"z": Y}, "scaled has no input z"),
        (({"x": X, "y": Y},), {}, "an input is an array, not a mapping"),
    ],
)
def test_calls_that_do_not_match_are_refused(ordered: Any, named: Any, words: str) -> None:
    with pytest.raises(BackendError, match=words):
        t.compile(scaled)(*ordered, **named)


def test_a_hint_passes_an_input_whose_name_is_no_identifier() -> None:
    graph = parse_graph('graph g { main("a.b": f32[2]) -> (y: f32[2]) { y = neg("a.b")\n return y = y } }')
    exe = t.compile(graph, backend="numpy")
    with pytest.raises(BackendError, match=r"no value for a\.b") as refused:
        exe()
    assert refused.value.hint == "**{'a.b': ...}"
    assert exe(**{"a.b": np.ones(2, np.float32)})["y"].tolist() == [-1, -1]


def test_float64_is_rounded_to_float32(exe: t.Compiled) -> None:
    expected = exe(x=X.astype(np.float32), y=Y.astype(np.float32))
    outputs = exe(X, Y)
    for name, array in outputs.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[name])
    assert np.isinf(outputs["difference"][1, 2]), "infinity stays infinity"
    np.testing.assert_array_equal(exe(X[:, ::-1], Y.T.copy().T)["product"], (X[:, ::-1] * Y).astype(np.float32))


def test_a_number_beyond_float32_is_refused(exe: t.Compiled) -> None:
    with raises_freely(BackendError, match="input y must be f32, is float64 with a number beyond 3.4e"):
        exe(X, np.full((2, 3), 1e39))
    with raises_freely(BackendError, match="input y must be f32, is a list of numbers beyond f32"):
        exe(X, [[1e39, 1, 1]] * 2)


def test_a_tensor_of_float64_is_rounded(exe: t.Compiled) -> None:
    torch = pytest.importorskip("torch")
    outputs = exe(torch.from_numpy(X), torch.from_numpy(Y))
    np.testing.assert_array_equal(np.asarray(outputs["difference"]), exe(X, Y)["difference"])
    with raises_freely(BackendError, match="input y must be f32, is float64 with a number beyond"):
        exe(torch.from_numpy(X), torch.full((2, 3), 1e39, dtype=torch.float64))


def test_other_dtypes_are_still_refused(exe: t.Compiled) -> None:
    for array in (np.ones((2, 3), np.int64), np.ones((2, 3), bool), X.astype(np.complex128)):
        with raises_freely(BackendError, match="input x must be f32, is"):
            exe(array, Y)


def test_the_form_of_onnx_runtime(exe: t.Compiled) -> None:
    inputs = {"x": X.astype(np.float32), "y": Y.astype(np.float32)}
    difference, product = exe.run(None, inputs)
    expected = exe(**inputs)
    np.testing.assert_array_equal(difference, expected["difference"])
    np.testing.assert_array_equal(product, expected["product"])
    (alone,) = exe.run(["product"], inputs)
    np.testing.assert_array_equal(alone, product)
    assert [each.tolist() for each in exe.run(["product", "difference"], inputs)] == [
        product.tolist(),
        difference.tolist(),
    ]
    assert exe.run([], inputs) == []
    named = exe.run(output_names=None, input_feed=inputs)
    np.testing.assert_array_equal(named, [difference, product])
    with raises_freely(t.UsageError, match="run has no option 'run_options'") as caught:
        exe.run(None, inputs, run_options=None)  # type: ignore[call-arg]
    assert caught.value.hint == "leave it out"


@pytest.mark.parametrize(
    ("names", "inputs", "words"),
    [
        (["logits"], {"x": X, "y": Y}, "scaled has no output logits"),
        (None, {"x": X}, "no value for y"),
        (None, [X, Y], "run takes the names of outputs, then the inputs as a mapping by name"),
        (None, None, "run takes the names of outputs, then the inputs as a mapping by name"),
        ({"x": X, "y": Y}, None, "run takes the names of outputs, then the inputs as a mapping by name"),
        (5, {"x": X, "y": Y}, "run takes the names of outputs, then the inputs as a mapping by name"),
        (None, {"x": X, "y": Y, 1: X}, "scaled has no input 1"),
    ],
)
def test_runs_that_do_not_match_are_refused(names: Any, inputs: Any, words: str) -> None:
    with pytest.raises(BackendError, match=words):
        t.compile(scaled).run(names, inputs)


@t.model
def of_fixed_rows(x: t.f32["2 8"]):
    return {"y": t.linear(x, 3, name="w")}


@t.model
def of_any_rows(x: t.f32["B 8"]):
    return {"y": t.linear(x, 3, name="w")}


def test_a_fixed_size_names_the_declaration_that_takes_any_size() -> None:
    exe = t.compile(of_fixed_rows, backend="numpy")
    with pytest.raises(BackendError, match="dimension 0 must be 2, is 3") as caught:
        exe(x=np.ones((3, 8), np.float32))
    assert 'x: t.f32["B 8"] in a declaration, dynamic={"x": "B 8"} in from_torch' in str(caught.value.hint)
    assert t.compile(of_any_rows, backend="numpy")(x=np.ones((3, 8), np.float32))["y"].shape == (3, 3)
    with pytest.raises(BackendError, match="dimension 1 must be 8, is 9") as caught:
        exe(x=np.ones((2, 9), np.float32))
    assert caught.value.hint is None, "a weight has this size"


def test_a_torch_module_with_the_names_of_sizes_that_its_hint_gives() -> None:
    torch = pytest.importorskip("torch")
    module, example = torch.nn.Linear(8, 3).eval(), (torch.ones(2, 8),)
    exe = t.compile(t.from_torch(module, example), backend="numpy")
    with pytest.raises(BackendError) as caught:
        exe(input=np.ones((3, 8), np.float32))
    dynamic = re.search(r"dynamic=(\{.*?\}) in from_torch", str(caught.value.hint))
    assert dynamic is not None
    again = t.compile(t.from_torch(module, example, dynamic=eval(dynamic[1])), backend="numpy")
    assert again(input=np.ones((3, 8), np.float32))["output"].shape == (3, 3)


@t.model
def padded(tokens: t.i64["B S"], lengths: t.i64["B"]):
    x = t.embed(tokens, 20, 8, name="wte")
    for _ in t.stack("h", 2):
        x = t.self_attention(x, 2, mask=t.padding(lengths), name="attn")
    return {"y": x}


@pytest.mark.parametrize("wrong", [5, -1])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("kind", ["arrays", "lists", "tensors"])
def test_a_length_that_is_not_within_the_row(wrong: int, dtype: Any, kind: str) -> None:
    convert: Callable[[Any], Any] = {
        "arrays": np.asarray,
        "lists": np.ndarray.tolist,
        "tensors": lambda x: pytest.importorskip("torch").from_numpy(x),
    }[kind]
    exe = t.compile(padded, backend="numpy")
    tokens = np.zeros((2, 4), np.int64)
    with raises_freely(BackendError, match=f"lengths has a length of {wrong}, but rows of tokens have 4") as caught:
        exe(tokens=convert(tokens), lengths=convert(np.array([3, wrong], dtype)))
    assert caught.value.hint == "lengths from 0 to 4"
    assert exe(tokens=tokens, lengths=np.array([0, 4], dtype))["y"].shape == (2, 4, 8)
    assert exe(tokens=tokens.tolist(), lengths=[3, 4])["y"].shape == (2, 4, 8)
