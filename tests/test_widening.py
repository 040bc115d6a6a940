"""Widening bf16 and f16 to f32, for backends without the dtype: results are equal up to the narrow dtype's rounding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import treadle
from tests.backend_checks import graph_of, message
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.literals import Literal
from treadle.ir.transforms.widening import narrow_dtypes, widen_graph
from treadle.ir.types import DTYPES
from treadle.ir.verifier import verify


def narrow_model(dtype: str) -> Graph:
    """Return a model with weights, constants and results of the dtype, and with f32 values."""

    def build(b: Builder) -> Expr:
        x = b.input("x", f"{dtype}[B, 8]")
        for i in range(2):
            x = b.gelu(b.matmul(x, b.parameter(f"w.{i}", f"{dtype}[8, 8]"))) * 0.5
        return (x + b.constant(np.float32([0.25] * 8), DTYPES[dtype])).cast(DTYPES["f32"]) * 3.0

    return graph_of(build)


def drawn_weights(graph: Graph) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {n: (v.type.static_shape, v.type.dtype) for n, v in graph.parameters.items()}
    return {n: Literal.of(rng.standard_normal(s), d).array for n, (s, d) in shapes.items()}


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("backend", ["numpy", "torch", "tvm"])
def test_narrow_values_are_computed_in_f32_where_the_caller_asks(backend: str, dtype: str) -> None:
    if backend != "numpy":
        pytest.importorskip(backend)
    graph = narrow_model(dtype)
    weights = drawn_weights(graph)
    wide = {n: np.float32(w) for n, w in weights.items()}
    exe = treadle.compile(graph, backend=backend, weights=wide, widen=dtype)
    assert [str(p.dtype) for p in (*exe.inputs, *exe.outputs)] == ["f32", "f32"]
    assert dtype not in str(exe.optimized.source) + str(exe.graph)
    x = Literal.of(np.random.default_rng(4).standard_normal((3, 8)), DTYPES[dtype]).array
    (expected,) = interpret(graph, {"x": x}, weights, float64=True).values()  # the exact results of the narrow model
    np.testing.assert_allclose(next(iter(exe(x=np.float32(x)).values())), expected, rtol=1e-5, atol=1e-6)


def test_a_cast_to_the_narrow_dtype_is_one_to_f32() -> None:
    graph = graph_of(lambda b: b.input("x", "f32[3]").cast(DTYPES["bf16"]).cast(DTYPES["f64"]))
    widened = widen_graph(graph, narrow_dtypes("bf16"))
    verify(widened)
    assert "bf16" not in str(widened)
    assert "bf16" in str(graph), "the graph that was given stays as it is"


def test_numpy_names_a_way_out_that_works() -> None:
    graph = narrow_model("bf16")
    said = message(lambda: treadle.compile(graph, weights=drawn_weights(graph)))
    assert "NumPy has no bf16" in said
    assert 'try       backend="torch", or widen="bf16"' in said
    treadle.compile(graph, weights=drawn_weights(graph), widen="bf16")
    pytest.importorskip("torch")
    treadle.compile(graph, weights=drawn_weights(graph), backend="torch")


def test_an_artifact_is_widened_as_it_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    graph = narrow_model("bf16")
    x = np.float32([[1, 2, 3, 4, 5, 6, 7, 8]])
    made = treadle.compile(graph, weights=drawn_weights(graph), backend="torch")
    made.save(tmp_path / "m.treadle")
    loaded = treadle.load_artifact(tmp_path / "m.treadle", backend="numpy", widen="bf16")
    np.testing.assert_allclose(loaded(x=x)["y"], made(x=x)["y"], rtol=0.05, atol=0.05)
    loaded.save(tmp_path / "wide.treadle")
    np.testing.assert_array_equal(treadle.load_artifact(tmp_path / "wide.treadle")(x=x)["y"], loaded(x=x)["y"])


def test_a_dtype_that_is_not_narrow_is_refused() -> None:
    with pytest.raises(UsageError, match="'f64' is not a dtype that can be widened to f32") as refused:
        treadle.compile("gpt2", widen="f64")
    assert refused.value.hint == "one of bf16, f16, blocks"


def test_an_onnx_file_in_bfloat16_runs_on_numpy(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import helper

    kinds = {"x": onnx.TensorProto.BFLOAT16, "k": onnx.TensorProto.INT64}
    inputs = [helper.make_tensor_value_info(n, k, ["N", 4] if n == "x" else [1]) for n, k in kinds.items()]
    output = helper.make_tensor_value_info("y", kinds["x"], None)
    nodes = [helper.make_node("Add", ["x", "x"], ["s"]), helper.make_node("TopK", ["s", "k"], ["y", "at"])]
    opset = [helper.make_opsetid("", 24)]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, [output]), opset_imports=opset)
    onnx.save(model, tmp_path / "m.onnx")
    x = np.float32([[1, 4, 2, 3]])
    asked = treadle.compile(tmp_path / "m.onnx", widen="bf16")  # compiled for each value of k
    np.testing.assert_array_equal(asked(x=x, k=[2])["y"], [[8, 6]])
    np.testing.assert_array_equal(treadle.compile(tmp_path / "m.onnx", widen="bf16", k=[1])(x=x)["y"], [[8]])


def test_the_command_line_widens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from typer.testing import CliRunner

    from treadle.cli import app

    text = 'import treadle as t\n\n\n@t.model\ndef m(x: t.bf16["B 2"]):\n    return {"y": x + x}\n'
    (tmp_path / "m.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    call = ["run", "m.py:m", "--input", "x=1,2", "--json"]
    refused = CliRunner().invoke(app, call)
    assert refused.exit_code == 2
    assert "--widen bf16" in json.loads(refused.stdout)["error"]["try"]
    done = CliRunner().invoke(app, [*call, "--widen", "bf16"])
    assert json.loads(done.stdout)["outputs"]["y"]["values"] == [[2, 4]]
    assert "bf16" not in CliRunner().invoke(app, ["inspect", "m.py:m", "--widen", "bf16"]).stdout
    assert CliRunner().invoke(app, ["compile", "m.py:m", "-o", "m.treadle", "--backend", "torch"]).exit_code == 0
    loaded = CliRunner().invoke(app, ["run", "m.treadle", *call[2:], "--backend", "numpy", "--widen", "bf16"])
    assert json.loads(loaded.stdout)["outputs"]["y"]["values"] == [[2, 4]]
