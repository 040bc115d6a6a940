"""Whisper tiny.en on a recording: the decoder predicts the next token of the transcript from the tokens before it."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle
from treadle.backends.registry import find_backend
from treadle.cli import app
from treadle.fetching import fetch_model, fetch_wheel
from treadle.ir.errors import FrontendError
from treadle.wheels.pinned_models import PinnedWheel

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TRANSCRIPT = " Ever tried, ever failed. No matter, try again. Fail again. Fail better."
RECORDING = PinnedWheel(
    name="beckett",
    wheel="useful-moonshine-onnx",
    version="20251121",
    sha256="b4189b0d7dc8064d567fd0b5d5ce78634be290b0a3a3274ab80ad11c46d531a2",
    size=729_305,
    inside="moonshine_onnx/assets/beckett.wav",
    about="a line of Beckett's, read aloud",
)


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return fetch_model("whisper-tiny")
    except FrontendError as error:
        pytest.skip(f"whisper-tiny cannot be fetched: {error}")


@pytest.fixture(scope="module")
def mel() -> Any:
    """Return the recording's log-mel spectrogram [1, 80, 3000]: 30 s, with silence after the recording."""
    try:
        path = fetch_wheel(RECORDING)
    except FrontendError as error:
        pytest.skip(f"{RECORDING.wheel} cannot be fetched: {error}")
    with wave.open(str(path)) as recording:
        assert (recording.getnchannels(), recording.getsampwidth(), recording.getframerate()) == (1, 2, 16_000)
        samples = np.frombuffer(recording.readframes(recording.getnframes()), "<i2") / 32768
    extractor = transformers.WhisperFeatureExtractor(feature_size=80)
    return extractor(samples, sampling_rate=16_000, return_tensors="np").input_features


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_gives_the_transcript(model: Path, mel: Any, backend: str) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    start, no_times, end = (
        tokenizer.token_to_id(f"<|{n}|>") for n in ("startoftranscript", "notimestamps", "endoftext")
    )
    text = tokenizer.encode(TRANSCRIPT, add_special_tokens=False).ids
    tokens = np.array([[start, no_times, *text]])
    reason = find_backend(backend).available()
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    made = treadle.compile("whisper-tiny", backend=backend)
    assert made.unused == ()
    logits = made(mel=mel, decoder_tokens=tokens).logits
    assert np.argmax(logits[0, 1:], axis=-1).tolist() == [*text, end]


def test_the_command_line_knows_its_name(model: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", "whisper-tiny"])
    assert shown.exit_code == 0, shown.output
    assert "encoder_layer is called 4 times, decoder_layer is called 4 times" in shown.output
    listed = CliRunner().invoke(app, ["models", "--json"])
    assert "whisper-tiny" in listed.stdout
