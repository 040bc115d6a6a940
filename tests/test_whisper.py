"""Whisper from Hugging Face folders: results are equal at every number of frames, and its axes have the expected
properties.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle
from treadle.backends.registry import backend_names
from treadle.ir.analysis.following import follow
from treadle.ir.errors import CheckpointError, UsageError
from treadle.models.whisper import whisper
from treadle.resolving import resolve

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from tests.hf_models import VOCAB, Tiny
from tests.test_huggingface_models import assert_close, change_config, prepare

Array = np.ndarray[Any, Any]

TINY = Tiny(
    "WhisperForConditionalGeneration",
    {
        "vocab_size": VOCAB,
        "d_model": 24,
        "max_source_positions": 20,
        "max_target_positions": 24,
        "encoder_layers": 3,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 40,
        "decoder_layers": 2,
        "decoder_attention_heads": 3,
        "decoder_ffn_dim": 36,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    },
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("whisper")
    model = TINY.build()
    model.save_pretrained(folder)
    return folder, model


def answer(model: Any, mel: Array, tokens: Array) -> dict[str, Array]:
    """Return Hugging Face's logits. Its model takes a fixed number of frames, so its positions are sliced to the given
    frames.
    """
    encoder = model.model.encoder
    positions, frames = encoder.embed_positions, mel.shape[-1]
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(positions.weight[: frames // 2])
    model.config.max_source_positions = frames // 2
    try:
        with torch.no_grad():
            out = model(input_features=torch.from_numpy(mel), decoder_input_ids=torch.from_numpy(tokens))
        return {"logits": out["logits"].numpy()}
    finally:
        encoder.embed_positions = positions
        model.config.max_source_positions = positions.num_embeddings


@pytest.mark.parametrize("runner", ["interpreter", *backend_names()])
def test_equals_hugging_face(theirs: tuple[Path, Any], runner: str) -> None:
    folder, model = theirs
    resolved = resolve(folder)
    assert resolved.weights is not None
    assert not resolved.unused
    run = prepare(runner, resolved.graph, resolved.weights)
    for batch, frames, length in ((1, 2, 1), (3, 14, 5), (2, 40, 24)):
        rng = np.random.default_rng(frames)
        mel = rng.normal(size=(batch, 80, frames)).astype(np.float32)
        tokens = rng.integers(0, VOCAB, (batch, length))
        assert_close(run(mel=mel, decoder_tokens=tokens), answer(model, mel, tokens), f"{frames} frames")


@pytest.mark.parametrize(
    "options",
    [
        {"num_mel_bins": 128},
        {"scale_embedding": True},
        {"architectures": ["WhisperForAudioClassification"]},
        {"max_source_positions": 0},
    ],
)
def test_unknown_option(theirs: tuple[Path, Any], tmp_path: Path, options: dict[str, Any]) -> None:
    theirs[1].save_pretrained(tmp_path)
    change_config(tmp_path, **options)
    (option,) = options
    with pytest.raises(CheckpointError, match=f"config.json: {option}"):
        resolve(tmp_path)


def test_follow() -> None:
    """Text may be generated. The convolutions over the frames prevent stepping and packing along frames, which the
    error reports with its line.
    """
    graph = whisper.configure(layers=2, decoder_layers=2).graph()
    assert graph.symbols["F"].upper == 3000
    assert graph.symbols["T"].upper == 448
    step = follow(graph, "T").step()
    assert step, str(step)
    for verdict in (follow(graph, "F").step(), follow(graph, "F").pack()):
        assert not verdict
        assert "conv: the axis is sliced, padded, joined or strided" in str(verdict)
        assert "models/whisper.py:" in str(verdict)


def test_a_session_holds_the_longest_recording_by_default() -> None:
    """The number of frames bounds the number of encoded positions, which each row keeps."""
    sizes = {"dim": 16, "heads": 2, "layers": 1, "hidden": 16, "vocab": 20, "context": 10, "decoder_context": 8}
    decoder = {"decoder_heads": 2, "decoder_layers": 1, "decoder_hidden": 16}
    exe = treadle.compile("whisper", backend="numpy", **sizes, **decoder)
    session = exe.session(rows=1)
    mel = np.random.default_rng(0).standard_normal((80, 20)).astype(np.float32)
    row = session.open(mel=mel)
    wanted = exe(mel=mel[None], decoder_tokens=[[3, 1]])["logits"][0, -1]
    np.testing.assert_allclose(session.prefill({row: [3, 1]})[row], wanted, atol=1e-5)
    with pytest.raises(UsageError, match="a row keeps at most 10 values along memory") as caught:
        exe.session(rows=1, memory={"memory": 512})
    assert caught.value.hint == "memory={'memory': 10}, or no memory="
    exe.session(rows=1, memory={"memory": 10}).open(mel=mel)
