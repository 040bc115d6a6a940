"""Contents of exported ONNX files, refusals, and the command that writes the files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle
import treadle.ir.ops
from tests.backend_checks import assert_near, block_model, graph_of, message
from tests.onnx_files import exported, in_runtime, run, session, weights_of
from tests.op_checks import DTYPES
from tests.test_models import ZOO
from treadle.backends.onnx import exporter
from treadle.backends.onnx.exporter import (
    ALIGNMENT,
    DEFAULT_OPSET,
    EXTERNAL_ABOVE,
    NEWEST_OPSET,
    export_onnx,
)
from treadle.backends.onnx.schemas import CODES, NARROW
from treadle.backends.onnx.spelling import SPELLINGS, in_ops
from treadle.cli import app
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import BackendError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.op_registry import OPS, op
from treadle.ir.operation import Operand, Primitive

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


NEWEST = min(NEWEST_OPSET, onnx.defs.onnx_opset_version())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    ort.set_default_logger_severity(4)
    yield
    ort.set_default_logger_severity(2)


# -- the file ------------------------------------------------------------------------------------------------------


def test_names_axes_scopes_and_lines(tmp_path: Path) -> None:
    graph, weights = block_model()
    _, model = exported(graph, tmp_path, weights)
    axes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output, *model.graph.value_info)
    }
    assert axes["tokens"] == ["B", "S"]
    assert axes["logits"] == ["B", "S", 11]
    assert axes["h.1.ln.ln"] == ["B", "S", 8]
    assert [v.name for v in model.graph.input] == ["tokens"]
    assert {t.name for t in model.graph.initializer} >= set(graph.parameters)
    norm = next(n for n in model.graph.node if n.op_type == "LayerNormalization" and n.name.startswith("h.1."))
    assert (norm.name, norm.output[0]) == ("h.1.ln.LayerNormalization", "h.1.ln.ln")
    assert norm.doc_string.startswith("tests/backend_checks.py:")
    assert {p.key: p.value for p in norm.metadata_props} == {
        "treadle.scope": "h.1.ln",
        "treadle.line": norm.doc_string,
    }
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)


def test_bounds_are_written(tmp_path: Path) -> None:
    graph = ZOO["gpt2"][0].configure(context=40).graph()
    _, model = exported(graph, tmp_path, weights_of(graph))
    assert {p.key: p.value for p in model.metadata_props} == {"treadle.sizes": "S <= 40"}


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    """The files in another folder, from a graph that was built again, have the same bytes."""
    files = []
    for folder in ("one", "another"):
        (tmp_path / folder).mkdir()
        graph, weights = block_model()
        made, _ = exported(graph, tmp_path / folder, weights, external_above=64)
        assert made.data is not None
        files.append((made.path.read_bytes(), made.data.read_bytes()))
    assert files[0] == files[1]
    assert str(tmp_path).encode() not in files[0][0]


def test_large_weights_lie_beside_the_model(tmp_path: Path) -> None:
    graph, weights = block_model()
    tokens = np.array([[1, 2, 3], [10, 0, 4]])
    expected = interpret(graph, {"tokens": tokens}, weights, float64=True)["logits"]
    inside = {t.name for t in exported(graph, tmp_path, weights)[1].graph.initializer}
    assert not (tmp_path / "model.onnx.data").exists()
    made, model = exported(graph, tmp_path, weights, external_above=64)
    assert made.data == tmp_path / "model.onnx.data"
    outside = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}
    assert set(outside) == {name for name, w in weights.items() if w.nbytes > 64} < inside
    data = made.data.read_bytes()
    for name, entry in outside.items():
        start, length = int(entry["offset"]), int(entry["length"])
        assert (entry["location"], start % ALIGNMENT) == ("model.onnx.data", 0)
        assert data[start : start + length] == weights[name].tobytes()
    assert made.external_bytes == sum(weights[name].nbytes for name in outside)
    assert_near(run(session(made.path), {"tokens": tokens})["logits"], expected)


def test_weights_in_any_layout(tmp_path: Path) -> None:
    """Transposed, reversed, and in bf16, which NumPy represents as float32."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for array in (x, np.asfortranarray(x), x[::-1]):
        graph = graph_of(lambda b: b.input("x", "f32[2,3]") + b.parameter("w", "f32[2,3]"))
        for above in (0, 1000):
            made = in_runtime(graph, tmp_path, {"x": x}, {"w": array}, external_above=above)["y"]
            np.testing.assert_array_equal(made, x + array)
    graph = graph_of(lambda b: b.input("x", "f32[2]") + b.parameter("w", "bf16[2]").cast(DTYPES["f32"]))
    weight = np.array([1 + 2.0**-7, -3.0], np.float32)
    np.testing.assert_array_equal(
        in_runtime(graph, tmp_path, {"x": np.zeros(2, np.float32)}, {"w": weight})["y"], weight
    )


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_weights_may_be_tensors_that_are_trained(dtype: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    graph = graph_of(lambda b: b.input("x", "f32[2]") + b.parameter("w", f"{dtype}[2]").cast(DTYPES["f32"]))
    weight = torch.tensor([1 + 2.0**-7, -3.0], dtype={"f32": torch.float32, "bf16": torch.bfloat16}[dtype])
    for given in (weight, torch.nn.Parameter(weight)):
        made = in_runtime(graph, tmp_path, {"x": np.zeros(2, np.float32)}, {"w": given})["y"]
        np.testing.assert_array_equal(made, [1 + 2.0**-7, -3.0])
    text = message(lambda: export_onnx(graph, {"w": weight.to_sparse()}, tmp_path / "m.onnx"))
    assert f"received  w: {str(weight.dtype)[6:]}[2], sparse_coo" in text


def test_a_size_past_what_onnx_counts_in_is_refused(tmp_path: Path) -> None:
    def text(value: str) -> str:
        graph = graph_of(lambda b: b.input("x", "f32[S]") * b.size(value=value, dtype=DTYPES["f32"]))
        return message(lambda: export_onnx(graph, {}, tmp_path / "m.onnx"))

    assert f"{10**20} is out of range for int64" in text("S*100000000000000000*1000")
    assert f"{10**20} is out of range for int64" in text("S+100000000000000000*1000")


def test_outputs_that_no_node_makes(tmp_path: Path) -> None:
    """An input, a weight, a constant, and one value twice."""

    def build(b: Builder) -> dict[str, Expr]:
        x, w = b.input("x", "f32[2]"), b.parameter("w", "f32[2]")
        y = x * 2.0
        return {"given": x, "weight": w, "seven": b.constant(7.0), "y": y, "again": y, "same": b.reshape(y, shape=(2,))}

    x, w = np.array([1, 2], np.float32), np.array([3, 4], np.float32)
    made = in_runtime(graph_of(build), tmp_path, {"x": x}, {"w": w})
    expected = {"given": x, "weight": w, "seven": np.float32(7), "y": 2 * x, "again": 2 * x, "same": 2 * x}
    assert list(made) == list(expected)
    for name, right in expected.items():
        np.testing.assert_array_equal(made[name], right)


def test_a_weight_may_be_called_like_an_input(tmp_path: Path) -> None:
    graph = graph_of(lambda b: b.input("x", "f32[2]") * b.parameter("x", "f32[2]"))
    x = np.array([2, 3], np.float32)
    np.testing.assert_array_equal(in_runtime(graph, tmp_path, {"x": x}, {"x": x})["y"], x * x)


def test_names_that_the_file_cannot_have(tmp_path: Path) -> None:
    """A gradient's outputs have the names of its inputs; and names may be invalid text."""
    half = chr(0xD800)

    def build(b: Builder) -> dict[str, Expr]:
        x, odd, empty = (b.input(name, "f32[2]") for name in ("x", half, ""))
        return {"x": b.neg(x, name=half) * b.parameter(half, "f32[2]") + odd + empty, "": x}

    x = np.array([1, 2], np.float32)
    made, _ = exported(graph_of(build, name=half), tmp_path, {half: x})
    assert made.inputs == {"x": "x", half: "?", "": "value"}
    assert made.outputs == {"x": "x_2", "": "value_2"}
    answered = run(session(made.path), {"x": x, "?": 3 * x, "value": 5 * x})
    np.testing.assert_array_equal(answered["x_2"], 8 * x - x * x)
    np.testing.assert_array_equal(answered["value_2"], x)


@pytest.mark.parametrize("opset", range(13, NEWEST + 1))
def test_scopes_and_lines_pass_the_checker_at_every_opset(opset: int, tmp_path: Path) -> None:
    graph, weights = block_model()
    made, model = exported(graph, tmp_path, weights, opset=opset)
    onnx.checker.check_model(str(made.path), full_check=True)
    scopes = {p.value for n in model.graph.node for p in n.metadata_props if p.key == "treadle.scope"}
    assert all(any(scope.startswith(layer) for scope in scopes) for layer in ("h.0.ln", "h.1.ln"))


@pytest.mark.parametrize("hostile", ["</script>", 'a"b', "a\0b", "\u202egnp", "x" * 1_000_000, "\ud800"], ids=range(6))
def test_hostile_scopes_are_text_of_the_file(hostile: str, tmp_path: Path) -> None:
    def build(b: Builder) -> Expr:
        with b.scoped(hostile):
            return -b.input("x", "f32[2]")

    made, model = exported(graph_of(build), tmp_path)
    onnx.checker.check_model(str(made.path), full_check=True)
    (node,) = model.graph.node
    assert {p.key: p.value for p in node.metadata_props}["treadle.scope"] == hostile.replace("\ud800", "?")


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [12, NEWEST + 1, "23", True])
def test_other_opsets_are_refused(opset: Any, tmp_path: Path) -> None:
    graph = graph_of(lambda b: -b.input("x", "f32[2]"))
    text = message(lambda: export_onnx(graph, {}, tmp_path / "m.onnx", opset=opset))
    assert f"ONNX export writes opsets 13 to {NEWEST}" in text
    assert f"opset {opset!r}" in text


def test_dtypes_have_the_numbers_of_the_onnx_package() -> None:
    for code, name in (*CODES.values(), *((code, f"float{ours[1:]}") for ours, (code, _) in NARROW.items())):
        assert code == getattr(onnx.TensorProto, {"float32": "float"}.get(name, name).upper()), name


def test_weights_that_are_missing_or_do_not_fit(tmp_path: Path) -> None:
    graph = graph_of(lambda b: b.input("x", "f32[2]") * b.parameter("w", "f32[2]"))
    target = tmp_path / "m.onnx"
    assert "lacks weights" in message(lambda: export_onnx(graph, {}, target))
    for wrong in (np.zeros(3, np.float32), np.zeros(2)):
        text = message(lambda: export_onnx(graph, {"w": wrong}, target))  # noqa: B023
        assert "weight w must be f32[2]" in text
    assert not target.exists()


def test_a_message_past_what_protobuf_takes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by the size of its weights before they are gathered, and then by its total size.

    Weights in a separate file do not count.
    """
    graph = graph_of(lambda b: b.input("x", "f32[2000]") * b.parameter("w", "f32[2000]"))
    target, weights = tmp_path / "m.onnx", {"w": np.zeros(2000, np.float32)}
    monkeypatch.setattr(exporter, "_LARGEST_MESSAGE", 4000)
    refused = message(lambda: export_onnx(graph, weights, target))
    assert "example is 8,000 bytes without external weights" in refused
    assert f"external_above={EXTERNAL_ABOVE}" in refused
    assert "a smaller external_above" in refused
    assert not list(tmp_path.iterdir())
    assert export_onnx(graph, weights, target, external_above=100).external_bytes == 8000
    monkeypatch.setattr(exporter, "_LARGEST_MESSAGE", target.stat().st_size - 1)
    assert f"{target.stat().st_size:,} bytes" in message(
        lambda: export_onnx(graph, weights, target, external_above=100)
    )


def test_a_primitive_without_a_form_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the decomposition of another op contains the primitive, the error names the place of that op."""
    try:

        @op("triple", axes="... -> ...", dtypes="f -> f")
        class Triple(Primitive):
            """y = 3 x"""

            x = Operand()

        def build(name: str) -> Graph:
            b = Builder(Graph("example"))
            with b.scoped("h.0"):
                b.outputs(y=b.apply(name, b.input("x", "f32[N]")))
            return b.graph

        monkeypatch.setitem(SPELLINGS, "sin", in_ops(lambda b, x: b.triple(x)))
        for graph in (build("triple"), build("sin")):
            text = message(lambda: export_onnx(graph, {}, tmp_path / "m.onnx"))  # noqa: B023
            assert "triple: cannot be expressed in ONNX" in text
            assert "scope h.0" in text
            assert "test_onnx_export_files.py:" in text
    finally:
        OPS.pop("triple", None)


def test_a_symbol_that_no_input_tells(tmp_path: Path) -> None:
    graph = graph_of(lambda b: b.input("x", "f32[N*M]") * b.size(value="N", dtype=DTYPES["f32"]))
    assert "needs the size of N" in message(lambda: export_onnx(graph, {}, tmp_path / "m.onnx"))


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, weights = block_model()
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "old.onnx").write_text("old")
    for target in ("missing/m.onnx", "file/m.onnx", "folder.onnx", "a\0b.onnx", f"{'long' * 70}.onnx"):
        with pytest.raises(UsageError, match="the ONNX file cannot be written") as caught:
            export_onnx(graph, weights, tmp_path / target, external_above=64)
        assert repr(target)[1:-1] in str(caught.value)

    with pytest.raises(UsageError, match="cannot be written"):
        export_onnx(graph, weights, "")

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    for above in (64, 2**20):
        with pytest.raises(UsageError, match="cannot be written"):
            export_onnx(graph, weights, tmp_path / "old.onnx", external_above=above)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.onnx", "old.onnx"]
    assert (tmp_path / "old.onnx").read_text() == "old"


# -- the command ---------------------------------------------------------------------------------------------------


def command(*words: str) -> Any:
    from typer.testing import CliRunner

    from treadle.cli import app

    return CliRunner().invoke(app, ["export", *words])


def test_the_command_writes_what_runs(tmp_path: Path) -> None:
    target = tmp_path / "gpt2.onnx"
    words = ["gpt2", "-o", str(target), "--set", "layers=1", "--set", "dim=8", "--set", "heads=2", "--set", "vocab=11"]
    said = command(*words, "--opset", "18", "--external-above", "100", "--seed", "3")
    assert said.exit_code == 0
    assert f"wrote {target}" in said.output
    assert f"wrote {target}.data" in said.output
    assert "nodes of opset 18: " in said.output
    report = json.loads(command(*words, "--json").output)
    assert (report["model"], report["opset"], report["files"]) == ("gpt2", 23, [str(target)])
    assert report["operators"]["Attention"] == 1
    assert (report["inputs"], report["outputs"]) == ({"tokens": "tokens"}, {"logits": "logits"})
    made = run(session(target), {"tokens": np.array([[1, 2, 3]])})
    compiled = treadle.compile("gpt2", layers=1, dim=8, heads=2, vocab=11)
    assert_near(made["logits"], compiled(tokens=np.array([[1, 2, 3]]))["logits"])
    artifact = tmp_path / "gpt2.treadle"
    compiled.save(artifact)
    assert command(str(artifact), "-o", str(tmp_path / "again.onnx")).exit_code == 0
    again = run(session(tmp_path / "again.onnx"), {"tokens": np.array([[1, 2, 3]])})
    np.testing.assert_array_equal(again["logits"], made["logits"])


def test_the_command_has_the_function_s_defaults() -> None:
    from typer.main import get_command

    from treadle.cli import app

    defaults = {p.name: p.default for p in get_command(app).commands["export"].params}  # type: ignore[attr-defined]
    assert (defaults["opset"], defaults["external_above"]) == (DEFAULT_OPSET, EXTERNAL_ABOVE)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    for words, text in (
        (["gpt2", "-o", str(tmp_path / "gpt2.bin")], "must end in .onnx"),
        (["gpt2", "-o", str(tmp_path / "gpt2.onnx"), "--opset", "12", "--set", "layers=1"], "writes opsets 13 to"),
    ):
        said = command(*words, "--json")
        assert said.exit_code == 2
        assert text in json.loads(said.output)["error"]["what"]
    assert not list(tmp_path.iterdir())


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_readme import blocks
    from tests.test_readme import run as run_block

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "model"}
    shown = [(run_block(code, names), expected) for code, expected in blocks("docs/onnx-export.md", "python")]
    assert shown
    assert all(said == expected for said, expected in shown)
    session(tmp_path / "tiny.onnx")


def test_the_passes_that_lead_to_operators_are_recorded(tmp_path: Path) -> None:
    graph, weights = block_model()
    made = export_onnx(graph, weights, tmp_path / "model.onnx", opset=13)
    (record,) = made.log
    assert record.name == "legalize" and record.op_changes["layer_norm"] < 0
    assert {event.op for event in record.matches} >= {"layer_norm"}


# -- quantized models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "int4-int8"])
def test_rounded_activations_are_refused_with_op_types_and_line(scheme: str, tmp_path: Path) -> None:
    exe = treadle.compile("gpt2", layers=1, dim=64, heads=4, vocab=40, context=32, quantize=scheme)
    exe.save(tmp_path / "model.treadle")
    for held in (exe, treadle.load_artifact(tmp_path / "model.treadle")):
        with pytest.raises(BackendError, match="encode: rounds computed values") as caught:
            export_onnx(held.graph, held.weights, tmp_path / "model.onnx")
        assert (caught.value.received or "").startswith("encode(f32[B, S, 64]")
        assert "models/gpt2.py" in (caught.value.source or "")
    assert not (tmp_path / "model.onnx").exists()


def test_the_command_quantizes_weights(tmp_path: Path) -> None:
    files = {}
    for scheme in (None, "int4"):
        path = tmp_path / f"{scheme}.onnx"
        options = ["--set", "layers=1", "--set", "dim=64", "--set", "heads=4", "--set", "vocab=40"]
        quantize = ["--quantize", scheme] if scheme else []
        command = ["export", "gpt2", *options, *quantize, "-o", str(path), "--external-above", "0"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        exe = treadle.compile("gpt2", layers=1, dim=64, heads=4, vocab=40, quantize=scheme)
        made = export_onnx(exe.graph, exe.weights, tmp_path / "other.onnx", external_above=0)
        files[scheme] = path.with_name(f"{path.name}.data").read_bytes()
        assert made.data is not None and files[scheme] == made.data.read_bytes()
    assert files[None] != files["int4"]
