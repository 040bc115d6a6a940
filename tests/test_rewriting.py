"""Translation and summarization: the same tokens as Hugging Face's `generate` returns for the same folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import treadle as t
from tests.task_models import byte_level, texts
from treadle.backends.registry import find_backend
from treadle.cli import app
from treadle.ir.errors import CheckpointError, UsageError
from treadle.runtime.beams import Beams

T5 = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_heads": 4, "num_layers": 2}
BART = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 48,
}
SUMMARY = {"num_beams": 4, "length_penalty": 2.0, "no_repeat_ngram_size": 3, "min_length": 6, "max_length": 16}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", T5, {"max_new_tokens": 12}),
    "bart": ("BartForConditionalGeneration", BART, {**SUMMARY, "early_stopping": True, "forced_bos_token_id": 0}),
    "marian": (
        "MarianMTModel",
        BART,
        {"num_beams": 3, "max_length": 14, "bad_words_ids": [[1]], "forced_eos_token_id": 2},
    ),
}


@pytest.fixture(params=("numpy", "torch", "tvm"))
def backend(request: pytest.FixtureRequest) -> str:
    if reason := find_backend(request.param).available():
        pytest.skip(f"backend {request.param}: {reason}")
    return str(request.param)


def saved(place: Path, name: str, **config: Any) -> tuple[Any, Any]:
    """Save a random model as a folder with generation settings; return the model and its tokenizer."""
    architecture, sizes, generation = MODELS[name]
    tokenizer = byte_level()
    special = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2 if name == "bart" else 1}
    cls = getattr(transformers, architecture)
    torch.manual_seed(3)
    model = cls(cls.config_class(vocab_size=len(tokenizer), **sizes, **special, **config)).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" not in key.lower() and weight.requires_grad:  # Marian's sinusoids stay unchanged
                weight.mul_(2.0 if name == "t5" else 6.0)
    model.generation_config = transformers.GenerationConfig(**special, **generation)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return model, tokenizer


def wanted(model: Any, tokenizer: Any, text: str, **options: Any) -> list[int]:
    given = tokenizer(text, return_tensors="pt", truncation=True)
    with torch.no_grad():
        made = model.generate(given.input_ids, attention_mask=given.attention_mask, **options)
    return [int(token) for token in made[0, 1:]]


@dataclass
class Kept:
    """A model's folder, and Hugging Face's results for texts, computed once for all backends."""

    place: Path
    model: Any
    tokenizer: Any
    known: dict[str, list[int]] = field(default_factory=dict)

    def wanted(self, text: str, **options: Any) -> list[int]:
        key = json.dumps([text, options])
        if key not in self.known:
            self.known[key] = wanted(self.model, self.tokenizer, text, **options)
        return self.known[key]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kept]:
    @cache
    def made(name: str) -> Kept:
        place = tmp_path_factory.mktemp(name)
        return Kept(place, *saved(place, name))

    return made


@pytest.mark.parametrize("name", MODELS)
def test_token_for_token_as_hugging_face(name: str, backend: str, kept: Callable[[str], Kept]) -> None:
    theirs = kept(name)
    given = [*texts(49 if backend == "numpy" else 11, longest=20), "the cat " * 30]
    rewriter = t.load(theirs.place, backend=backend).rewriter
    for text, ours in zip(given, rewriter.rewrite(given), strict=True):
        tokens = theirs.wanted(text)
        assert list(ours.tokens) == tokens[: len(ours.tokens)], text
        assert set(tokens[len(ours.tokens) :]) <= {1}
        assert ours.text == theirs.tokenizer.decode(tokens, skip_special_tokens=True)
        assert ours.cut == (len(theirs.tokenizer(text).input_ids) > 40)
    options = {"num_beams": 2, "length_penalty": 0.5, "early_stopping": False, "max_new_tokens": 9}
    options |= {"max_length": None, "min_length": 0}
    for text, ours in zip(
        given[:10], rewriter.rewrite(given[:10], most=9, beams=Beams(2, length_penalty=0.5)), strict=True
    ):
        if name == "t5":
            assert list(ours.tokens) == theirs.wanted(text, **options)[: len(ours.tokens)]
        assert len(ours.tokens) <= 9


@pytest.mark.parametrize("name", MODELS)
def test_an_artifact_rewrites_as_its_folder_does(name: str, kept: Callable[[str], Kept], tmp_path: Path) -> None:
    given, file = texts(6), tmp_path / "model.treadle"
    wanted = t.load(kept(name).place, backend="numpy").rewriter.rewrite(given)
    said = CliRunner().invoke(app, ["compile", str(kept(name).place), "-o", str(file), "--backend", "numpy"])
    assert "its tokenizer is in the file: `translate` and `summarize` take it as MODEL" in said.stdout
    assert t.load(file).rewriter.rewrite(given) == wanted
    found = CliRunner().invoke(app, ["translate", str(file), given[0]])
    assert found.stdout == wanted[0].text + "\n"


TASKS = {
    "summarization": {**SUMMARY, "prefix": "the short "},
    "translation_en_to_de": {"prefix": "the new ", "max_length": 10, "num_beams": 2},
}


def test_task_settings_of_a_folder(tmp_path: Path) -> None:
    model, tokenizer = saved(tmp_path, "t5", task_specific_params=TASKS)
    loaded = t.load(tmp_path)
    given = texts(10)
    for text, ours in zip(given, loaded.summarize(given), strict=True):
        made = wanted(model, tokenizer, "the short " + text, **{**SUMMARY, "max_new_tokens": None})
        assert ours == tokenizer.decode(made, skip_special_tokens=True)
    said = {"max_length": 10, "num_beams": 2, "max_new_tokens": None}
    made = wanted(model, tokenizer, "the new " + given[0], **said)
    translated = loaded.translate(given[0], source="en", target="de")
    assert translated == tokenizer.decode(made, skip_special_tokens=True)
    words = ["translate", str(tmp_path), given[0], "--from", "en", "--to", "de"]
    assert CliRunner().invoke(app, words).stdout == translated + "\n"
    report = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert report["texts"][0]["text"] == translated
    with pytest.raises(UsageError, match="translates en to de") as refused:
        loaded.translate(given[0], source="en", target="fr")
    assert refused.value.received == "en to fr"
    with pytest.raises(UsageError, match="translates en to de"):
        loaded.translate(given[0])
    summary = CliRunner().invoke(app, ["summarize", str(tmp_path), given[0], "--tokens", "5", "--beams", "3", "--json"])
    assert len(json.loads(summary.stdout)["texts"][0]["tokens"]) <= 5


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"num_beams": "many"}, "num_beams must be an integer"),
        ({"bad_words_ids": [1, 2]}, "bad_words_ids must be a list of words, each a list of ids"),
        ({"decoder_start_token_id": None}, "the decoder's start token"),
        ({"length_penalty": 1e9}, "length_penalty must be a number"),
        ({"forced_bos_token_id": -3}, "forced_bos_token_id must be a token id"),
        ({"suppress_tokens": [10**6]}, "token 1000000 is not in the vocabulary"),
    ],
)
def test_a_generation_config_that_is_wrong(said: dict[str, Any], what: str, tmp_path: Path) -> None:
    saved(tmp_path, "t5")
    place = tmp_path / "generation_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **said}))
    config = tmp_path / "config.json"
    kept = {k: v for k, v in json.loads(config.read_text()).items() if k not in said}
    config.write_text(json.dumps(kept))
    with pytest.raises((CheckpointError, UsageError), match=what):
        t.load(tmp_path).summarize("the cat")
    with pytest.raises(UsageError, match="no text to rewrite"):
        t.load(tmp_path).summarize(" ")
