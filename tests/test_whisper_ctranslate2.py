"""Whisper from a folder in CTranslate2's layout: the folder is recognized by its files, and results equal those of the
original weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle
from tests.test_ctranslate2_file import model, variable
from treadle.cli import app
from treadle.ir.errors import CheckpointError
from treadle.models.whisper import whisper
from treadle.program.weights import initial_weights

Array = np.ndarray[Any, Any]

SMALL = {
    "vocab": 13, "context": 10, "decoder_context": 12, "dim": 12, "heads": 3, "layers": 3, "hidden": 20,
    "decoder_heads": 2, "decoder_layers": 2, "decoder_hidden": 16,
}  # fmt: skip
OPTIONS = {
    "activation": 3, "pre_norm": 1, "scale_embeddings": 0, "alibi": 0, "start_from_zero_embedding": 0, "num_heads": 2,
}  # fmt: skip
WEIGHTS = initial_weights(whisper.configure(**SMALL).graph())


def attention(place: str, ours: str, first: str, second: str) -> Iterator[tuple[str, Array]]:
    """Yield the two or three matrices of an attention, and their biases. Our keys have no bias, so theirs is zero."""
    bias = {f"{ours}.{n}.bias": WEIGHTS.get(f"{ours}.{n}.bias", np.zeros(SMALL["dim"], np.float32)) for n in "qkv"}
    for name, parts in (("linear_0", first), ("linear_1", second)):
        if parts:
            yield f"{place}/{name}/weight", np.concatenate([WEIGHTS[f"{ours}.{n}.weight"] for n in parts])
            yield f"{place}/{name}/bias", np.concatenate([bias[f"{ours}.{n}.bias"] for n in parts])
    out = "linear_2" if second else "linear_1"
    yield f"{place}/{out}/weight", WEIGHTS[f"{ours}.out.weight"]
    yield f"{place}/{out}/bias", WEIGHTS[f"{ours}.out.bias"]


def plain(place: str, ours: str, weight: str = "weight", bias: str = "bias") -> Iterator[tuple[str, Array]]:
    yield f"{place}/{weight}", WEIGHTS[f"{ours}.weight"]
    yield f"{place}/{bias}", WEIGHTS[f"{ours}.bias"]


def norm(place: str, ours: str) -> Iterator[tuple[str, Array]]:
    return plain(f"{place}/layer_norm", ours, "gamma", "beta")


def converted() -> Iterator[tuple[str, Array]]:
    """Yield weights and options as CTranslate2's converter writes them."""
    yield "encoder/num_heads", np.array(SMALL["heads"], "<i2")
    for name, value in OPTIONS.items():
        yield f"decoder/{name}", np.array(value, "i1")
    yield "decoder/embeddings/weight", WEIGHTS["decoder.tokens.weight"]
    for conv in ("conv1", "conv2"):
        yield from plain(f"encoder/{conv}", f"encoder.{conv}")
    for stack, layers in (("encoder", SMALL["layers"]), ("decoder", SMALL["decoder_layers"])):
        yield f"{stack}/position_encodings/encodings", WEIGHTS[f"{stack}.positions.weight"]
        yield from norm(stack, f"{stack}.norm")
        for i in range(layers):
            place, ours = f"{stack}/layer_{i}", f"{stack}.layer.{i}"
            yield from norm(f"{place}/self_attention", f"{ours}.attn_norm")
            yield from attention(f"{place}/self_attention", f"{ours}.attn", "qkv", "")
            if stack == "decoder":
                yield from norm(f"{place}/attention", f"{ours}.cross_norm")
                yield from attention(f"{place}/attention", f"{ours}.cross", "q", "kv")
            yield from norm(f"{place}/ffn", f"{ours}.mlp_norm")
            yield from plain(f"{place}/ffn/linear_0", f"{ours}.mlp.up")
            yield from plain(f"{place}/ffn/linear_1", f"{ours}.mlp.down")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a folder in faster-whisper's form: model.bin, and a config.json without the model's options."""
    made = tmp_path / "whisper-small"
    made.mkdir()
    (made / "model.bin").write_bytes(model(*(variable(name, array) for name, array in converted())))
    (made / "config.json").write_text(json.dumps({"alignment_heads": [[1, 0]], "suppress_ids": []}))
    return made


def inputs() -> dict[str, Array]:
    rng = np.random.default_rng(3)
    mel = rng.normal(size=(2, 80, 14)).astype(np.float32)
    return {"mel": mel, "decoder_tokens": rng.integers(0, SMALL["vocab"], (2, 5))}


def test_a_folder_computes_what_its_weights_do(folder: Path) -> None:
    made = treadle.compile(folder)
    assert made.name == "whisper"
    assert made.unused == ()
    assert made.optimized.source == whisper.configure(**SMALL).graph()
    wanted = treadle.compile(whisper, weights=WEIGHTS, **SMALL)(**inputs())
    assert made(**inputs()).logits.tobytes() == wanted.logits.tobytes()
    other = treadle.compile(folder, weights={**WEIGHTS, "encoder.layer.2.attn.q.weight": np.ones((12, 12), np.float32)})
    assert other(**inputs()).logits.tobytes() != wanted.logits.tobytes()


def test_the_command_line_takes_it(folder: Path, tmp_path: Path) -> None:
    given = inputs()
    for name, array in given.items():
        np.save(tmp_path / f"{name}.npy", array)
    runner = CliRunner()
    shown = runner.invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 0, shown.output
    assert "decoder_layer is called 2 times" in shown.output
    said = [part for name in given for part in ("--input", f"{name}={tmp_path / name}.npy")]
    ran = runner.invoke(app, ["run", str(folder), *said, "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["outputs"]["logits"]["shape"] == [2, 5, SMALL["vocab"]]


@pytest.mark.parametrize("command", ["classify", "label", "translate", "summarize"])
def test_other_tasks_name_its_own(command: str, folder: Path) -> None:
    done = CliRunner().invoke(app, [command, str(folder), "a.png"])
    assert done.exit_code == 2 and "has no head to" in done.stderr, done.output
    assert f"treadle transcribe {folder}, the task of its class" in done.stderr


def test_another_architecture_is_refused(folder: Path) -> None:
    (folder / "model.bin").write_bytes(model(variable("a", np.zeros(3, "<f4")), specification="TransformerSpec"))
    with pytest.raises(CheckpointError, match="the file does not contain a Whisper model") as caught:
        treadle.compile(folder)
    error = caught.value
    assert (error.received, error.within) == ("TransformerSpec", str(folder / "model.bin"))
    assert "WhisperSpec" in (error.hint or "")
    refused = CliRunner().invoke(app, ["inspect", str(folder)])
    assert refused.exit_code == 2
    assert "the file does not contain a Whisper model" in refused.output


def test_quantized_weights_are_refused(folder: Path) -> None:
    """int8 weights need their scales, which the reader does not apply."""
    held = dict(converted())
    name = "encoder/layer_0/ffn/linear_0/weight"
    held[name] = np.zeros(held[name].shape, "i1")
    (folder / "model.bin").write_bytes(model(*(variable(n, array) for n, array in held.items())))
    with pytest.raises(CheckpointError, match="cannot be converted"):
        treadle.compile(folder)


@pytest.mark.parametrize(
    ("name", "array", "what"),
    [
        ("decoder/activation", np.array(0, "i1"), "decoder/activation must be 3, as in Whisper"),
        ("decoder/pre_norm", np.array(0, "i1"), "decoder/pre_norm must be 1, as in Whisper"),
        ("decoder/scale_embeddings", np.array(1, "i1"), "decoder/scale_embeddings must be 0, as in Whisper"),
        ("decoder/alibi", np.array(1, "i1"), "decoder/alibi must be 0, as in Whisper"),
        ("decoder/start_from_zero_embedding", np.array(1, "i1"), "decoder/start_from_zero_embedding must be 0"),
        ("decoder/alibi", np.array([0], "i1"), "decoder/alibi must be one integer"),
        ("decoder/alibi", np.array(0, "<f4"), "decoder/alibi must be one integer"),
        ("encoder/num_heads", np.array(0, "<i2"), "encoder/num_heads must be positive"),
        ("decoder/num_heads", np.array(-1, "i1"), "decoder/num_heads must be positive"),
        ("decoder/embeddings/weight", np.zeros((13, 12, 1), "<f4"), "decoder/embeddings/weight must have 2 dimensions"),
        ("encoder/conv1/weight", np.zeros((12, 80), "<f4"), "encoder/conv1/weight must have 3 dimensions"),
        (
            "encoder/conv1/weight",
            np.zeros((12, 128, 3), "<f4"),
            "the spectrogram has 128 bands, but 80 are supported",
        ),
        ("encoder/position_encodings/encodings", np.zeros((0, 12), "<f4"), "encodings must have 2 dimensions"),
        ("decoder/position_encodings/encodings", np.zeros(12, "<f4"), "encodings must have 2 dimensions"),
        ("encoder/layer_0/ffn/linear_0/weight", np.zeros(12, "<f4"), "linear_0/weight must have 2 dimensions"),
        ("decoder/layer_0/ffn/linear_0/weight", np.zeros(12, "<f4"), "linear_0/weight must have 2 dimensions"),
    ],
)
def test_a_whisper_of_another_kind_is_refused(folder: Path, name: str, array: Array, what: str) -> None:
    held = {**dict(converted()), name: array}
    (folder / "model.bin").write_bytes(model(*(variable(n, each) for n, each in held.items())))
    with pytest.raises(CheckpointError, match=what) as caught:
        treadle.compile(folder)
    assert caught.value.within == str(folder / "model.bin")


def test_names_with_several_meanings(folder: Path, tmp_path: Path) -> None:
    (folder / "model.bin").write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(CheckpointError, match="pickles") as caught:
        treadle.compile(folder)
    assert "model.bin" in str(caught.value)
    (folder / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file is empty"):
        treadle.compile(folder)
    (folder / "model.bin").unlink()
    (tmp_path / "elsewhere.bin").write_bytes(model())
    (folder / "model.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(CheckpointError) as caught:
        treadle.compile(folder)
    assert "model.bin" in str(caught.value)
    assert "WhisperSpec" not in str(caught.value)


def test_safetensors_in_the_same_folder_go_before_it(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(64))
    with pytest.raises(CheckpointError, match="model_type is None"):
        treadle.compile(folder)
