"""ONNX models with QuantizeLinear and DequantizeLinear: quantized weights, roundings as one op, and fused attention."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
quantization = pytest.importorskip("onnxruntime.quantization")

from onnx import TensorProto, helper, numpy_helper

import treadle
from tests.fuzz.quantized_onnx import mutated, outcome
from tests.onnx_models import model
from tests.onnx_models import runtime as unoptimized
from treadle.backends.registry import find_backend
from treadle.backends.tvm.kernels.host import tvm_runtime
from treadle.fetching import fetch_model
from treadle.files.errors import TreadleError
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import FrontendError
from treadle.ir.target import Target

Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN and infinity are quantized too

BACKENDS = ["numpy", "torch", *(["tvm"] if tvm_runtime.missing() is None else [])]
RNG = np.random.default_rng(0)
ROWS, COLUMNS = 64, 48
"""The sizes of a weight: inputs and outputs of a MatMul."""


def cosine(a: Array, b: Array) -> float:
    x, y = (np.asarray(v, np.float64).ravel() for v in (a, b))
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def ops_of(exe: Any) -> Counter[str]:
    return Counter(node.op.name for _, node in exe.optimized.graph.walk())


# -- weights ----------------------------------------------------------------------------------------------------------


def tensor(name: str, kind: int, values: Array) -> Any:
    """Return a tensor of a file, also of 4-bit integers."""
    return helper.make_tensor(name, kind, values.shape, values.ravel().tolist())


def product_of(
    kind: int, q: Array, scale: Array, zero: Array | None, *, opset: int = 21, turned: bool = False, **attributes: int
) -> Any:
    """Return a model of one product with a dequantized weight. turned: Gemm with a transposed weight."""
    inputs = ["q", "scale", *([] if zero is None else ["zero"])]
    k = q.shape[1 if turned else 0]
    n = q.shape[0 if turned else 1]
    nodes = [
        helper.make_node("DequantizeLinear", inputs, ["w"], "dequantize", **attributes),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
        if turned
        else helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    held = [tensor("q", kind, q), numpy_helper.from_array(scale, "scale")]
    held += [] if zero is None else [tensor("zero", kind, zero)]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", size]) for name, size in (("x", k), ("y", n)))
    graph = helper.make_graph(nodes, "product", [x], [y], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def drawn(kind: int, shape: tuple[int, int]) -> Array:
    low, high = {TensorProto.INT8: (-128, 128), TensorProto.UINT8: (0, 256)}.get(kind, (-8, 8))
    if kind == TensorProto.UINT4:
        low, high = 0, 16
    return RNG.integers(low, high, shape)


def scales(*shape: int, halves: bool = False) -> Array:
    made = RNG.uniform(0.01, 0.02, shape).astype(np.float32)
    return made.astype(np.float16).astype(np.float32) if halves else made


I8, U8, I4, U4 = TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4
WEIGHTS: dict[str, tuple[int, Array, Array | None, dict[str, int], str]] = {
    "channels": (I8, scales(COLUMNS), None, {"axis": 1}, "int8_rows(axis=0)"),
    "channels and zeros of 0": (I8, scales(COLUMNS), np.zeros(COLUMNS, int), {"axis": 1}, "int8_rows(axis=0)"),
    "a tensor": (I8, scales(), None, {}, "int8_rows(axis=0)"),
    "a tensor, as a vector of one": (I8, scales(1), np.zeros(1, int), {}, "int8_rows(axis=0)"),
    "unsigned around 128": (U8, scales(COLUMNS), np.full(COLUMNS, 128), {"axis": 1}, "int8_rows(axis=0)"),
    "zeros": (U8, scales(COLUMNS), RNG.integers(0, 256, COLUMNS), {"axis": 1}, "int8_zero_groups(64, axis=0)"),
    "channels along the sum": (I8, scales(ROWS), None, {"axis": 0}, "int8_rows"),
    "blocks": (I8, scales(2, COLUMNS), None, {"axis": 0, "block_size": 32}, "int8_groups(32, axis=0)"),
    "4 bits": (I4, scales(COLUMNS, halves=True), None, {"axis": 1}, "int4_groups(64, axis=0)"),
    "4 bits in blocks": (
        I4, scales(2, COLUMNS, halves=True), None, {"axis": 0, "block_size": 32}, "int4_groups(32, axis=0)",
    ),
    "4 bits, float32 scales": (
        I4, scales(4, COLUMNS), None, {"axis": 0, "block_size": 16}, "uint4_wide_groups(16, axis=0)",
    ),
    "4 bits and zeros": (
        U4, scales(2, COLUMNS, halves=True), RNG.integers(0, 16, (2, COLUMNS)), {"axis": 0, "block_size": 32},
        "uint4_groups(32, axis=0)",
    ),
}  # fmt: skip
"""The kind of a weight [ROWS, COLUMNS], its scales, zeros and attributes, and its encoding."""


def spread(values: Array, attributes: dict[str, int]) -> Array:
    """Return scales or zeros that broadcast to the weight."""
    if "block_size" in attributes:
        return np.repeat(values, attributes["block_size"], axis=0)
    return values if values.size == 1 else values.reshape((1, -1) if attributes["axis"] else (-1, 1))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_dequantized_weight_keeps_its_integers(name: str) -> None:
    kind, scale, zero, attributes, encoding = WEIGHTS[name]
    q = drawn(kind, (ROWS, COLUMNS))
    proto = product_of(kind, q, scale, zero, **attributes)
    graph, weights, notes = import_onnx(proto)
    (value,) = graph.parameters.values()
    assert str(value.type.encoding) == encoding
    assert value.type.encoding is not None
    assert not notes.decoded
    points = 0 if zero is None else spread(zero, attributes)
    expected = (q - points).astype(np.float32) * spread(scale, attributes)
    decoded = value.type.encoding.decode(weights[value.name])
    if encoding.startswith("uint4_groups"):  # y = scale q - scale zero, see the form
        np.testing.assert_allclose(decoded, expected, rtol=1e-6, atol=1e-8)
    else:
        np.testing.assert_array_equal(decoded, expected)
    x = RNG.standard_normal((3, ROWS)).astype(np.float32)
    for backend in BACKENDS:
        (y,) = find_backend(backend).compile(graph, Target("cpu"), weights)(x=x).values()
        np.testing.assert_allclose(y, x @ expected, atol=1e-4)


def test_the_blocks_of_a_transposed_weight_are_along_its_rows() -> None:
    q = drawn(I8, (COLUMNS, ROWS))
    for scale, attributes in ((scales(COLUMNS), {"axis": 0}), (scales(), {})):
        graph, weights, _ = import_onnx(product_of(I8, q, scale, None, turned=True, **attributes))
        (value,) = graph.parameters.values()
        assert value.type.encoding == Encoding("int8_rows")
        x = RNG.standard_normal((2, ROWS)).astype(np.float32)
        (y,) = find_backend("numpy").compile(graph, Target("cpu"), weights)(x=x).values()
        np.testing.assert_allclose(y, x @ (q * (scale.reshape(-1, 1) if attributes else scale)).T, atol=1e-4)


def test_a_bias_and_odd_groups_are_decoded_when_the_file_is_read() -> None:
    q = drawn(U8, (24, COLUMNS))
    zero = RNG.integers(0, 256, COLUMNS)
    graph, weights, notes = import_onnx(product_of(U8, q, scales(COLUMNS), zero, axis=1))
    (value,) = graph.parameters.values()
    assert value.type.encoding is None
    assert weights[value.name].dtype == np.float32
    assert notes.decoded == ["q is decoded when read: groups of 24 are not an integer number of blocks"]


def test_a_model_with_quantized_weights_is_saved_with_them(tmp_path: Path) -> None:
    q = drawn(I8, (ROWS, COLUMNS))
    path = tmp_path / "m.onnx"
    onnx.save(product_of(I8, q, scales(COLUMNS), None, axis=1), path)
    x = RNG.standard_normal((2, ROWS)).astype(np.float32)
    exe = treadle.compile(path, backend="numpy")
    exe.save(tmp_path / "m.treadle")
    again = treadle.load_artifact(tmp_path / "m.treadle")
    assert [str(v.type.encoding) for v in again.graph.parameters.values()] == ["int8_rows(axis=0)"]
    np.testing.assert_array_equal(again(x=x).y, exe(x=x).y)


# -- activations ------------------------------------------------------------------------------------------------------


def rounded_product(activations: int, domain: str = "", opset: int = 18) -> Any:
    """Return a model of x, rounded with scale 0.05 and a zero point, times a weight of 8 bits."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], domain=domain),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xr"], domain=domain),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], axis=1),
        helper.make_node("MatMul", ["xr", "w"], ["y"]),
    ]
    held = [
        tensor("q", I8, drawn(I8, (ROWS, COLUMNS))),
        numpy_helper.from_array(scales(COLUMNS), "scale"),
        numpy_helper.from_array(np.float32(0.05), "xs"),
        tensor("xz", activations, np.asarray(3)),
    ]
    info = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", "S", k]) for n, k in (("x", ROWS), ("y", COLUMNS))
    ]
    graph = helper.make_graph(nodes, "rounded", info[:1], info[1:], held)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(
    ("kind", "domain", "least"),
    [(I8, "", -128), (U8, "", 0), (TensorProto.UINT16, "com.microsoft", 0), (I8, "com.microsoft", -128)],
)
def test_a_value_that_is_quantized_and_dequantized_is_rounded_by_one_op(kind: int, domain: str, least: int) -> None:
    proto = rounded_product(kind, domain)
    graph, weights, _ = import_onnx(proto)
    assert [node.op.name for node in graph.main.nodes] == ["fake_quantize", "decode", "matmul"]
    assert graph.main.nodes[0].op.attributes["least"] == least
    x = 3 * RNG.standard_normal((2, 5, ROWS)).astype(np.float32)
    (expected,) = unoptimized(proto, {"x": x}).values()
    for backend in BACKENDS:
        (y,) = find_backend(backend).compile(graph, Target("cpu"), weights)(x=x).values()
        np.testing.assert_allclose(y, expected, atol=1e-4, err_msg=backend)


def test_different_steps_are_not_one_rounding() -> None:
    proto = rounded_product(I8)
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "other"))
    proto.graph.node[1].input[1] = "other"
    names = [node.op.name for node in import_onnx(proto).graph.main.nodes]
    assert "fake_quantize" not in names
    assert "round" in names


@pytest.mark.skipif("tvm" not in BACKENDS, reason="needs tvm")
@pytest.mark.parametrize("kind", [I8, U8])
def test_tvm_multiplies_integers(kind: int, tmp_path: Path) -> None:
    proto = rounded_product(kind)
    onnx.save(proto, tmp_path / "m.onnx")
    exe = treadle.compile(tmp_path / "m.onnx", backend="tvm")
    changes = {record.name: record.op_changes for record in exe.log}
    assert changes["encode-roundings"]["encode"] == 1
    assert changes["multiply-blocks"]["encoded_linear"] == 1
    x = 3 * RNG.standard_normal((2, 5, ROWS)).astype(np.float32)
    x[0, 1, 2], x[1, 1, 3], x[1, 2, 3] = np.nan, np.inf, -np.inf
    plain = treadle.compile(tmp_path / "m.onnx", backend="numpy")(x=x).y
    np.testing.assert_allclose(exe(x=x).y, plain, atol=1e-4)
    assert np.isnan(plain[0, 1]).all()
    assert np.isfinite(plain[1]).all()


# -- bad input --------------------------------------------------------------------------------------------------------

Q = "float[4,3] x"
BAD: list[tuple[str, str]] = [
    ("s = Constant<value_float = 0.0>() y = QuantizeLinear(x, s)", "the scale s has the number 0"),
    (
        "s = Constant<value_floats = [0.1, nan, 0.1]>() y = QuantizeLinear<axis = 1>(x, s)",
        "the scale s has the number nan",
    ),
    ("s = Constant<value_float = inf>() y = QuantizeLinear(x, s)", "the scale s has the number inf"),
    ("s = Constant<value_int = 1>() y = QuantizeLinear(x, s)", "the scale s is INT64, not a float"),
    (
        "s = Constant<value_floats = [1.0, 2.0, 1.0]>() z = Constant<value = int8[2] {1, 2}>()"
        "y = QuantizeLinear<axis = 1>(x, s, z)",
        "the scale s and the zero point z have the shapes [3] and [2]",
    ),
    ("s = Constant<value_float = 1.0>() y = DequantizeLinear(x, s)", "FLOAT is not a quantized type"),
]


@pytest.mark.parametrize(("body", "what"), BAD, ids=[what for _, what in BAD])
def test_bad_steps_are_refused(body: str, what: str) -> None:
    text = body.replace("nan", "1.0").replace("inf", "1.0")
    proto = model(f"({Q}) => (y)", text)
    for node in proto.graph.node:  # the text form has no NaN
        for attribute in node.attribute:
            if "nan" in body and attribute.name == "value_floats":
                attribute.floats[1] = np.nan
            if "inf" in body and attribute.name == "value_float":
                attribute.f = np.inf
    with pytest.raises(FrontendError) as error:
        import_onnx(proto)
    assert what in error.value.what
    assert "Linear" in (error.value.within or "")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"scale": np.float32([0.1] * 7)}, "scales of shape [7] do not fit the 48 channels of axis 1 of q"),
        ({"scale": np.float32([0.1] * 47 + [np.inf])}, "the scale scale has the number inf"),
        ({"scale": np.float32([0.1] * 47 + [1e37])}, "has the number 1e+37: weights may be infinite"),
        ({"zero": np.zeros(3, int)}, "have the shapes [48] and [3]"),
        ({"axis": 5}, "there is no axis 5 in a tensor of rank 2"),
        ({"block_size": 32, "axis": 0}, "scales of shape [48] do not fit blocks of 32 along axis 0 of q"),
    ],
)
def test_a_weight_that_contradicts_its_scales_is_refused(change: dict[str, Any], what: str) -> None:
    scale, zero = change.pop("scale", scales(COLUMNS)), change.pop("zero", None)
    proto = product_of(I8, drawn(I8, (ROWS, COLUMNS)), scale, zero, **{"axis": 1, **change})
    with pytest.raises(TreadleError) as error:
        import_onnx(proto)
    assert what in error.value.what
    assert "node dequantize (DequantizeLinear)" in (error.value.within or "")


def test_damaged_files_are_refused_or_compute_as_in_onnx_runtime(tmp_path: Path) -> None:
    """A sample of `python -m tests.fuzz.quantized_onnx --compared`."""
    rng, found = random.Random(5), Counter[str]()
    for _ in range(40):
        what, data = mutated(rng)
        name, _, failure = outcome(data, tmp_path, compared=True)
        assert failure is None, f"{what}: {failure}"
        found[name] += 1
    assert found["refused"] > 10 and found["computed"] > 2


# -- whole models -----------------------------------------------------------------------------------------------------


class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
    def __init__(self, data: Iterable[dict[str, Array]]) -> None:
        self.left = list(data)

    def get_next(self) -> Any:
        return self.left.pop() if self.left else None


def quantized(path: Path, data: Iterable[dict[str, Array]], *, linear: bool = False) -> Path:
    """Quantize a model as `onnxruntime.quantization` does: static, QDQ, per channel.

    linear  quantize the operands of products with weights alone
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, made = path.with_suffix(".prepared.onnx"), path.with_suffix(f".{'linear' if linear else 'all'}.onnx")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    options: dict[str, Any] = {}
    if linear:
        proto = onnx.load(prepared)
        held = {each.name for each in proto.graph.initializer}
        computed = [n.name for n in proto.graph.node if n.op_type == "MatMul" and n.input[1] not in held]
        extra = {"OpTypesToExcludeOutputQuantization": ["MatMul"]}
        options = {"op_types_to_quantize": ["MatMul"], "nodes_to_exclude": computed, "extra_options": extra}
    quantization.quantize_static(str(prepared), str(made), Calibration(data), per_channel=True, **options)
    return made


def runtime_answer(path: Path, inputs: dict[str, Array]) -> Array:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return np.asarray(runtime.InferenceSession(path, options).run(None, inputs)[0])


@pytest.mark.parametrize("name", ["bert", "vit"])
@pytest.mark.parametrize("linear", [False, True], ids=["all", "linear"])
def test_a_drawn_model_of_the_quantizer(name: str, linear: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.onnx_exports import draw, export

    path = export(name, tmp_path, dynamo=False, attention="eager", opset=17)
    sizes = {"B": 2, "S": 6}
    made = quantized(path, [full(draw(name, seed, **sizes)) for seed in range(4)], linear=linear)
    inputs = full(draw(name, 9, **sizes))
    expected = runtime_answer(made, inputs)
    attentions = ops_of(treadle.compile(path, backend="numpy"))["attention"]
    assert attentions
    for backend in BACKENDS if not linear else BACKENDS[-1:]:
        exe = treadle.compile(made, backend=backend)
        found = ops_of(exe)
        assert found["attention"] == attentions
        assert found["fake_quantize"]
        assert found["decode"]
        (y,) = exe(**inputs).values()
        assert cosine(y, expected) >= (0.9995 if linear else 0.999), backend
    if not linear:
        assert "a rounding inside attention" in exe.log.explain()


@pytest.mark.parametrize("linear", [False, True], ids=["all", "linear"])
def test_each_value_between_two_roundings_is_as_in_the_file(linear: bool, tmp_path: Path) -> None:
    """Each rounded value is replaced by ONNX Runtime's own, so that a difference at one op does not reach the next: a
    value that differs in the last place may be rounded to another step, and later layers amplify this.
    """
    pytest.importorskip("transformers")
    from tests.onnx_exports import draw, export

    path = export("bert", tmp_path, dynamo=False, attention="eager", opset=17)
    inputs = full(draw("bert", 9, B=2, S=6))
    made = quantized(path, [full(draw("bert", seed, B=2, S=6)) for seed in range(4)], linear=linear)
    proto = onnx.load(made)
    held = {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}
    rounded = {n.input[0]: held[n.input[1]] for n in proto.graph.node if of_value(n, "QuantizeLinear", held)}
    inner = [n.output[0] for n in proto.graph.node if of_value(n, "DequantizeLinear", held)]
    (last,) = [output.name for output in proto.graph.output]
    expected = literal_values(proto, [*dict.fromkeys([*rounded, *inner, last])], inputs)
    parts, feeds = between_roundings(proto, {name: expected[name] for name in inner}, held, inputs)
    onnx.save(parts, tmp_path / "parts.onnx")
    for backend, options in ((BACKENDS[0], {"passes": ()}), (BACKENDS[-1], {})):
        exe = treadle.compile(tmp_path / "parts.onnx", backend=backend, **options)
        names = [output.name for output in parts.graph.output]
        found = dict(zip(names, exe(**feeds).values(), strict=True))
        assert len(found) > 10
        for name, y in found.items():
            close = 2e-6 * max(float(np.abs(expected[name]).max()), 1e-3)
            np.testing.assert_allclose(y, expected[name], rtol=0, atol=close, err_msg=f"{backend} {name}")


def of_value(node: Any, kind: str, held: Container[str]) -> bool:
    """Return True if a node rounds a computed value, or restores one, in contrast to a stored tensor."""
    return bool(node.op_type == kind and node.input[0] not in held)


def literal_values(proto: Any, names: list[str], inputs: dict[str, Array]) -> dict[str, Array]:
    """Return values as ONNX Runtime computes them node by node, without optimizations."""
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    del whole.graph.output[:]
    whole.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
    return unoptimized(whole, inputs)


def between_roundings(
    proto: Any, rounded: dict[str, Array], held: Container[str], inputs: dict[str, Array]
) -> tuple[Any, dict[str, Array]]:
    """Return the model without its roundings of values, whose results are inputs, and its inputs. Its outputs are the
    values before they are rounded, and the last.
    """
    cut, feeds = onnx.ModelProto(), dict(inputs)
    cut.CopyFrom(proto)
    graph = cut.graph
    nodes = [n for n in graph.node if not any(of_value(n, k, held) for k in ("QuantizeLinear", "DequantizeLinear"))]
    before = {n.input[0] for n in graph.node if of_value(n, "QuantizeLinear", held)}
    outputs = [n.output[0] for n in nodes if n.output[0] in before or n.output[0] == graph.output[0].name]
    for node in nodes:
        for at, name in enumerate(node.input):
            if name in rounded:
                feeds[f"given_{name}"] = rounded[name]
                node.input[at] = f"given_{name}"
    kinds = {name: helper.np_dtype_to_tensor_dtype(x.dtype) for name, x in feeds.items()}
    inside = [helper.make_tensor_value_info(name, kinds[name], x.shape) for name, x in feeds.items()]
    del graph.input[:]
    graph.input.extend(inside)
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:], graph.output[:]
    graph.node.extend(kept)
    graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs)
    return cut, feeds


def full(inputs: dict[str, Array]) -> dict[str, Array]:
    """Return inputs without padding: quantized scores with a mask of -3e38 have steps of 1e36."""
    return {name: np.ones_like(x) if name == "attention_mask" else x for name, x in inputs.items()}


SENTENCES = [
    "The weather is lovely today.",
    "He drove to the stadium with his friends and watched the match until the end.",
    "A cat sat on the mat and looked at the birds outside of the window.",
    "Stock markets fell sharply on Monday after the announcement.",
    "Rain is expected in the north of the country over the weekend.",
    "A woman is playing the violin in the street.",
]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Array]]]:
    """MiniLM as an ONNX file, and tokenized sentences; skips if it cannot be fetched."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    try:
        folder = fetch_model("minilm")
    except FrontendError as error:
        pytest.skip(f"minilm cannot be fetched: {error.received}")
    from tests.onnx_exports import export

    built = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    path = export("bert", tmp_path_factory.mktemp("minilm"), dynamo=False, attention="eager", opset=17, model=built)
    made = [tokenizer(text, return_tensors="np") for text in SENTENCES]
    assert torch
    return path, [{name: each[name] for name in ("input_ids", "attention_mask")} for each in made]


@pytest.mark.parametrize("linear", [False, True], ids=["all", "linear"])
def test_minilm_of_the_quantizer(minilm: tuple[Path, list[dict[str, Array]]], linear: bool) -> None:
    path, (*data, inputs) = minilm
    made = quantized(path, data, linear=linear)
    exe = treadle.compile(made, backend=BACKENDS[-1])
    assert ops_of(exe)["attention"] == 6
    (y,) = exe(**inputs).values()
    if linear:
        assert cosine(y, runtime_answer(made, inputs)) >= 0.9995
