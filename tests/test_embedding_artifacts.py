"""Artifacts of models that embed: their tokenizer, their pooling, and how they are served next to other models."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

import treadle as t
from tests import first_hour
from tests.command_line import Treadle, commands_in, refused
from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import CheckpointError, UsageError
from treadle.resolving import resolve
from treadle.serving.models import Opening, ServedEmbedder, ServedWriter
from treadle.training.saving import saver_for
from treadle.training.text_data import TextData

MODELS = dict(first_hour.steps())["models.py"]
ENCODER = dict(first_hour.steps())["encoder.py"].partition("@t.model\ndef my_classifier")[0]
TEXTS = ["the cat", "the dog sees the cat", "the"]


@pytest.fixture
def treadle_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Treadle:
    """Run a command line in a folder with a language model, an encoder of hidden states, and weights of both, which
    have different tokenizers.
    """
    run = commands_in(tmp_path, capsys, monkeypatch)
    Path("lm.py").write_text(MODELS.replace("my_gpt", "lm").replace(', "hidden": x', ""))
    Path("enc.py").write_text(
        ENCODER.replace("my_encoder", "enc").replace('"logits": t.unembed(x, tied="wte"), ', "").replace("300", "290")
    )
    Path("corpus.txt").write_text(first_hour.CORPUS)
    texts = TextData.open(["corpus.txt"], resolve("lm.py:lm"), vocab=300, length=16, batch=2).texts
    other = TextData.open(["corpus.txt"], resolve("lm.py:lm"), vocab=270, length=16, batch=2).texts
    assert texts is not None and other is not None
    for name, written in {"lm": texts, "enc": other}.items():
        model = f"{name}.py:{name}"
        saver_for(resolve(model), f"{name}out").with_texts(written).save(t.compile(model, seed=3).weights)
    return lambda *lines: run(*shlex.split(" ".join(lines)))


def vectors(said: Any) -> Any:
    return np.array([each["vector"] for each in said.json["sentences"]])


@pytest.mark.parametrize("inputs", ["", "--inputs lengths"])
@pytest.mark.parametrize("tokenizer", [True, False])
def test_an_artifact_embeds_as_its_model_does(inputs: str, tokenizer: bool, treadle_command: Treadle) -> None:
    texts = " ".join(map(shlex.quote, TEXTS))
    wanted = vectors(treadle_command(f"embed enc.py:enc {texts} --weights encout --backend numpy --json"))
    where = Path("encout", "tokenizer.json")
    if not tokenizer:
        Path("words").mkdir()
        where = where.rename(Path("words", "tokenizer.json"))
    said = treadle_command(f"compile enc.py:enc --weights encout -o enc.treadle --backend numpy {inputs}")
    assert ("its tokenizer is in the file: `embed` and `serve` take it" in said.out) == tokenizer
    how = "" if tokenizer else "--tokenizer words"
    np.testing.assert_allclose(
        vectors(treadle_command(f"embed enc.treadle {texts} --json {how}")), wanted, rtol=0, atol=1e-6
    )
    options: dict[str, Any] = {} if tokenizer else {"tokenizer": "words"}
    np.testing.assert_allclose(t.load("enc.treadle", **options).embed(TEXTS), wanted, rtol=0, atol=1e-6)
    served = Opening().open("enc.treadle", **options)
    assert isinstance(served, ServedEmbedder)
    np.testing.assert_allclose(served.embed(TEXTS).vectors, wanted, rtol=0, atol=1e-6)
    refused(treadle_command(f"embed enc.treadle the {how} --quantize int4"), "does not accept --quantize")
    if not tokenizer:
        for command in ("embed enc.treadle the", "serve enc.treadle"):
            said = treadle_command(command)
            refused(said, "the artifact enc.treadle has no tokenizer")
            assert "--tokenizer FOLDER" in said.err
        with pytest.raises(UsageError, match="has no tokenizer"):
            t.load("enc.treadle")


POOLINGS = {"mean": "mean_tokens", "first": "cls_token"}


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_an_artifact_pools_as_the_folder_does(mode: str, normalize: bool, treadle_command: Treadle) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *[("2_Normalize", "Normalize")] * normalize]
    place = Path("encout")
    (place / "modules.json").write_text(json.dumps([{"path": p, "type": f"models.{kind}"} for p, kind in modules]))
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{POOLINGS[mode]}": True}))
    (place / "sentence_bert_config.json").write_text('{"max_seq_length": 3}')
    model = t.load("enc.py:enc", weights="encout", backend="numpy")
    wanted = model.embedder.embed_reporting(TEXTS)
    t.compile("enc.py:enc", weights="encout", backend="numpy").save("enc.treadle")
    place.rename("away")  # the file needs no other
    found = t.load("enc.treadle")
    assert found.embedder.pooling == model.embedder.pooling
    assert (found.embedder.pooling.mode, found.embedder.pooling.normalize) == (mode, normalize)
    assert found.embedder.embed_reporting(TEXTS).cut == wanted.cut == (1,)
    np.testing.assert_allclose(found.embed(TEXTS), wanted.vectors, rtol=0, atol=1e-6)
    t.load_artifact("enc.treadle").save("copy.treadle")
    assert Path("copy.treadle").read_bytes() == Path("enc.treadle").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("modules.json", "[1]", "modules.json must list objects"),
        ("modules.json", '[{"path": "", "type": "Transformer"}, {"path": "a", "type": "Pooling"}]', "no such file"),
        ("sentence_bert_config.json", '{"max_seq_length": "long"}', "max_seq_length must be"),
    ],
)
def test_pooling_that_cannot_be_read_is_no_mean(name: str, content: str, what: str, treadle_command: Treadle) -> None:
    Path("encout", name).write_text(content)
    t.compile("enc.py:enc", weights="encout", backend="numpy").save("enc.treadle")
    with pytest.raises(CheckpointError, match=what):
        t.load("enc.treadle").embed("the")


def test_only_what_the_vectors_need_is_computed(treadle_command: Treadle) -> None:
    Path("both.py").write_text(MODELS.replace("my_gpt", "both"))
    saver_for(resolve("both.py:both"), "both").save(t.compile("both.py:both", seed=3).weights)
    t.compile("both.py:both", weights="both", backend="numpy").save("both.treadle")
    made = t.load("both.treadle", tokenizer="encout").embedder.model
    assert [port.name for port in made.outputs] == ["hidden"]
    assert len(made.graph.main.nodes) == len(t.load_artifact("both.treadle").graph.main.nodes) - 1  # the logits
    served = Opening(rows=1).open("both.treadle", tokenizer="lmout")
    assert isinstance(served, ServedWriter)
    np.testing.assert_allclose(
        served.embedder().embed(TEXTS).vectors,
        t.load("both.py:both", weights="both", tokenizer="lmout", backend="numpy").embed(TEXTS),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("tokenizer", ["", "--tokenizer encout"])
def test_the_hint_for_a_language_model_and_an_encoder_works(
    tokenizer: str, treadle_command: Treadle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --tokenizer, the encoder has none of its own, and the language model keeps its own."""
    served: list[Any] = []
    monkeypatch.setattr("treadle.serving.running.serve", lambda models, **_: served.extend(models))
    wanted = t.load("enc.py:enc", weights="encout", backend="numpy").embed(TEXTS)
    folder = "encout"
    if tokenizer:
        Path("bare").mkdir()
        Path("bare", "weights.safetensors").write_bytes(Path("encout", "weights.safetensors").read_bytes())
        folder = "bare"
    said = treadle_command(f"serve lm.py:lm enc.py:enc --weights lmout {tokenizer}")
    refused(said, "--weights names the weights of one model")
    commands = re.findall(r"`treadle (.*?)`", said.err)
    assert len(commands) == 3
    for command in commands:
        assert treadle_command(command.replace("FOLDER", folder)).code == 0, command
    writer, embedder = served
    assert isinstance(writer, ServedWriter) and isinstance(embedder, ServedEmbedder)
    own, other = (TextTokenizer.open(name).vocabulary() for name in ("lmout", "encout"))
    assert writer.writer.tokenizer.vocabulary() == own != other
    assert writer.notes[-1:] == (["lm.treadle uses its own tokenizer, not encout"] if tokenizer else [])
    np.testing.assert_allclose(embedder.embed(TEXTS).vectors, wanted, rtol=0, atol=1e-6)
    served.clear()
    assert treadle_command("serve lm.treadle --tokenizer encout --rows 1").code == 0  # of one model, it is the option's
    assert served[0].writer.tokenizer.vocabulary() == other
