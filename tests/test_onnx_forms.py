"""ONNX import: old, new and unusual forms of operators agree with ONNX Runtime or NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import onnx
from onnx import numpy_helper

from tests.onnx_cases import LISTED
from tests.onnx_models import answers, model, ops, runtime, same_as_runtime
from treadle.frontends.onnx_import.errors import UnsupportedOnnx
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.frontends.onnx_import.operators import OPERATORS

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape, np.float32)


def test_old_forms_of_operators_are_read_or_refused() -> None:
    """Add of opset 6 broadcasts by an attribute; Softmax of opset 11 normalizes over all axes from its axis on."""
    with pytest.raises(UnsupportedOnnx, match="version 6"):
        import_onnx(model("(float[4] x) => (float[4] y)", "y = Add(x, x)", opset=6))
    same_as_runtime(
        model("(float[2,3,4] x) => (float[2,3,4] y)", "y = Softmax<axis = 1>(x)", opset=11), {"x": floats(2, 3, 4)}
    )


def test_gather_counts_from_the_end_but_not_in_an_embedding() -> None:
    proto = model("(float[5,2] t, int64[3] i) => (float y)", "y = Gather(t, i)")
    same_as_runtime(proto, {"t": floats(5, 2), "i": np.array([0, -1, -5])})
    proto = model("(int64[3] i) => (float y)", "y = Gather(t, i)")
    proto.graph.initializer.append(numpy_helper.from_array(floats(30, 2), "t"))
    found = same_as_runtime(proto, {"i": np.array([0, 7, 29])})
    assert ops(found) == ["embedding"]


@pytest.mark.parametrize("name", ["uint16", "uint32", "uint64"])
def test_integers_without_sign_are_exact_to_their_ends(name: str) -> None:
    """Sums and products wrap; order, quotients and remainders are unsigned."""
    body = """
        sum = Add(x, y) difference = Sub(x, y) product = Mul(x, y) quotient = Div(x, y) rest = Mod(x, y)
        less = Less(x, y) largest = Max(x, y) float = Cast<to = 1>(x)
    """
    outputs = ", ".join(f"{name} {o}" for o in ("sum", "difference", "product", "quotient", "rest", "largest"))
    proto = model(f"({name}[N] x, {name}[N] y) => ({outputs}, bool less, float float)", body)
    top = int(np.iinfo(name).max)
    pairs = [
        (top, 1),
        (top, 2),
        (top, top),
        (top - 1, top),
        (1, top),
        (top // 2 + 1, 3),
        (7, 2),
        (0, 5),
        (top, top // 2 + 2),
    ]
    x, y = (np.array(side, name) for side in zip(*pairs, strict=True))
    for got in answers(import_onnx(proto), {"x": x, "y": y}):
        with np.errstate(over="ignore"):
            wanted = {"sum": x + y, "difference": x - y, "product": x * y, "quotient": x // y, "rest": x % y}
        wanted |= {"largest": np.maximum(x, y), "less": x < y, "float": x.astype(np.float32)}
        for key, expected in wanted.items():
            np.testing.assert_array_equal(got[key], expected, err_msg=key)


def test_operators_are_read_in_their_newest_form() -> None:
    """Each handler names the last version of its schema that it supports; a later one may have another meaning."""
    if not onnx.__version__.startswith(LISTED + "."):
        pytest.skip(f"the versions are those of onnx {LISTED}, this is {onnx.__version__}")
    newest: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            newest[schema.name] = max(newest.get(schema.name, 0), schema.since_version)
    read = {name: each.latest for (domain, name), each in OPERATORS.items() if domain == "" and name in newest}
    behind = {"DepthToSpace", "ReverseSequence", "SpaceToDepth"}  # of opset 28, which are refused
    assert {name for name, latest in read.items() if latest != newest[name]} == behind


def test_quotients_of_integers_are_rounded_towards_zero() -> None:
    x, y = (v.reshape(-1) for v in np.meshgrid(np.arange(-7, 8), [-3, -2, -1, 1, 2, 3]))
    for dtype in (np.int32, np.int64):
        proto = model(f"({np.dtype(dtype)}[N] x, {np.dtype(dtype)}[N] y) => ({np.dtype(dtype)}[N] z)", "z = Div(x, y)")
        same_as_runtime(proto, {"x": x.astype(dtype), "y": y.astype(dtype)})


@pytest.mark.parametrize("mode", ["edge", "wrap", "reflect"])
@pytest.mark.parametrize("pads", [(2, 0), (0, 2), (1, 2)])
def test_values_that_a_border_repeats(mode: str, pads: tuple[int, int]) -> None:
    body = f'p = Constant<value_ints = [{pads[0]}, {pads[1]}]>() y = Pad<mode = "{mode}">(x, p)'
    for length in ("3", "N"):
        same_as_runtime(model(f"(float[{length}] x) => (float[M] y)", body), {"x": np.float32([3, 1, 2])})


@pytest.mark.parametrize("stored", ["y", "x", "neither", "rows of y"])
def test_integers_of_64_bits_to_a_power(stored: str) -> None:
    """Products if the file bounds an exponent from 0 to 8, exact up to 2^63; otherwise f64, exact up to 2^53.

    f64 cannot represent 3^34, nor the cube of 2^20 + 1. A value that is not an exponent, stored or not, is not read as
    one.
    """
    large = [3**17, -(3**17), 0, 1, -1, 2**20 + 1]
    powers = range(9) if stored in ("y", "rows of y") else (3,)
    for power in powers:
        base = [n for n in large if abs(n) ** power < (2**63 if stored == "y" else 2**53)]
        x, y = np.array([2] if stored == "x" else base), np.array([power])
        if stored == "rows of y":
            y = np.array([power, 1])[:, None]
        given = {"x": x, "y": y}
        body = "z = Pow(x, y)"
        if stored != "neither":
            name = stored[-1]
            value = ", ".join(map(str, given[name].ravel()))
            shape = ", ".join(map(str, given[name].shape))
            body = f"s = Constant<value = int64[{shape}] {{{value}}}>() " + body.replace(name, "s")
            del given[name]
        inputs = ", ".join(f"int64[{','.join(map(str, v.shape))}] {n}" for n, v in given.items())
        found = import_onnx(model(f"({inputs}) => (int64[N] z)", body))
        assert ("pow" in {n.op.name for n in found.graph.main.nodes}) == (stored != "y")
        for answer in answers(found, given):
            np.testing.assert_array_equal(answer["z"], x**y)


UNUSUAL: dict[str, tuple[str, str, dict[str, Any], int]] = {
    # signature, body, inputs and opset of rare forms
    "backwards": (
        "(float[N] x) => (float[N] y)",
        "s = Constant<value_ints = [-1]>() e = Constant<value_ints = [-9223372036854775807]>() "
        "a = Constant<value_ints = [0]>() y = Slice(x, s, e, a, s)",
        {"x": floats(5)},
        18,
    ),
    "old pads": (
        "(float[2,3] x) => (float[M,K] y)",
        "y = Pad<pads = [1, 0, 0, 2], value = 1.5>(x)",
        {"x": floats(2, 3)},
        10,
    ),
    "pads that cut": (
        "(float[4,5] x) => (float[M,K] y)",
        "p = Constant<value_ints = [-1, 1, 2, -2]>() y = Pad(x, p)",
        {"x": floats(4, 5)},
        18,
    ),
    "least of none": (
        "(int32[0,3] x) => (int32[3] y, int32[3] z)",
        "a = Constant<value_ints = [0]>() y = ReduceMax<keepdims = 0>(x, a) z = ReduceMin<keepdims = 0>(x, a)",
        {"x": np.zeros((0, 3), np.int32)},
        20,
    ),
    "no infinity": (
        "(float[3] x) => (bool[3] y)",
        "y = IsInf<detect_positive = 0, detect_negative = 0>(x)",
        {"x": np.float32([np.inf, np.nan, 1])},
        18,
    ),
    "sides": ("(uint64[3] x) => (uint64[3] y)", "y = Sign(x)", {"x": np.array([0, 3, 2**64 - 1], np.uint64)}, 18),
    "a double power": (
        "(float[3] x, double[3] e) => (float[3] y)",
        "y = Pow(x, e)",
        {"x": np.float32([1.5, 2, 3]), "e": np.array([0.5, 3, -1])},
        18,
    ),
    "half a norm": (
        "(float16[2,3,4] x, float[3] v, float[3] w) => (float16[2,3,4] y)",
        "y = BatchNormalization(x, v, w, w, v)",
        {"x": floats(2, 3, 4).astype(np.float16), "v": np.float32([1, 2, 3]), "w": np.float32([0.5, -1, 2])},
        15,
    ),
    "a block that is cut": (
        "(int8[2,3] x, float[2,2] s) => (float[2,3] y)",
        "y = DequantizeLinear<axis = 1, block_size = 2>(x, s)",
        {"x": np.int8([[1, -2, 3], [4, 5, -6]]), "s": np.float32([[0.5, 2], [3, 0.25]])},
        21,
    ),
    "a step down": (
        "(int64[4] x) => (int64[M] y)",
        "a = Constant<value_int = 9>() b = Constant<value_int = 0>() c = Constant<value_int = -4>() "
        "r = Range(a, b, c) z = ReduceMax<keepdims = 0>(x) y = Add(r, z)",
        {"x": np.arange(4)},
        18,
    ),
    "no steps": (
        "(float[4] x) => (float[M] y)",
        "a = Constant<value_float = 2.0>() b = Constant<value_float = 0.5>() r = Range(a, b, b) "
        "z = ReduceMax<keepdims = 0>(x) y = Add(r, z)",
        {"x": floats(4)},
        17,
    ),
    "sizes on two axes": (
        "(float[S,3] x, int64[2,1] k) => (int64[2,2] y)",
        "s = Shape(x) z = Constant<value_ints = [0]>() u = Unsqueeze(s, z) y = Mul(u, k)",
        {"x": floats(5, 3), "k": np.array([[1], [2]])},
        18,
    ),
    "a size by itself": (
        "(float[S,3] x, int64[2] k) => (int64[2] y)",
        "n = Size(x) y = Mul(n, k)",
        {"x": floats(5, 3), "k": np.array([1, 2])},
        18,
    ),
    "writes into none": (
        "(float[2,0] x, int64[0,1] i, float[0,0] u) => (float[2,0] y)",
        "y = ScatterND(x, i, u)",
        {"x": floats(2, 0), "i": np.zeros((0, 1), np.int64), "u": floats(0, 0)},
        18,
    ),
}


@pytest.mark.parametrize("form", UNUSUAL)
def test_forms_that_files_seldom_have(form: str) -> None:
    signature, body, inputs, opset = UNUSUAL[form]
    same_as_runtime(model(signature, body, opset=opset), inputs)


def test_floats_become_the_nearest_integers_without_sign_below_them() -> None:
    proto = model("(double[N] x) => (uint64[N] y)", "y = Cast<to = 13>(x)")
    x = np.array([0.0, 1.9, 2.0**53 + 2, 2.0**63 - 1024, 2.0**63, 2.0**63 + 2048, 2.0**64 - 2048])
    for answer in answers(import_onnx(proto), {"x": x}):
        np.testing.assert_array_equal(answer["y"], x.astype(np.uint64))


def test_a_mask_of_one_element_is_that_of_all() -> None:
    """A number that is added to every score changes none of the probabilities; only False hides all keys."""
    x = floats(2, 5, 12)
    body = "y = Attention<q_num_heads = 3, kv_num_heads = 3>(x, x, x{})"
    plain = runtime(model("(float[2,5,12] x) => (float[2,5,12] y)", body.format(""), opset=23), {"x": x})["y"]
    for kind, mask, wanted in (("bool", True, plain), ("float", 3.0, plain), ("bool", False, np.zeros_like(plain))):
        proto = model(f"(float[2,5,12] x, {kind}[1,1] m) => (float[2,5,12] y)", body.format(", m"), opset=23)
        given = {"x": x, "m": np.array([[mask]], "float32" if kind == "float" else kind)}
        for answer in answers(import_onnx(proto), given):
            np.testing.assert_allclose(answer["y"], wanted, rtol=0, atol=2e-6)
