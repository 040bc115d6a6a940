"""A tokenizer and a model meet: every task refuses a tokenizer with tokens that the model does not have."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers")

import treadle as t
from tests.command_line import Treadle, commands_in, refused
from treadle.continuation import TextWriter
from treadle.fetching import fetched_model
from treadle.frontends.text import TextTokenizer
from treadle.frontends.vocabularies.trained_vocabularies import train_tokenizer
from treadle.ir.errors import CheckpointError, UsageError
from treadle.program.source import ModelSource
from treadle.resolving import resolve
from treadle.runtime.language_models import count_token_ids
from treadle.tasks.loaded import LoadedModel
from treadle.training.saving import saver_for
from treadle.training.text_data import TextData

MODELS = """
from typing import Annotated

import treadle as t

Tokens = Annotated[t.Tensor, t.i64["B S"]]
Lengths = Annotated[t.Tensor, t.i64["B"]]


@t.model
def causal(tokens: Tokens, *, vocab=270, dim=8):
    x = t.embed(tokens, vocab, dim, name="table")
    return {"logits": t.unembed(x + t.self_attention(x, 2, causal=True, name="attn"), tied="table")}


@t.model
def named(tokens: Tokens, *, words=270, dim=8):
    x = t.embed(tokens, words, dim, name="table")
    return {"logits": t.unembed(x + t.self_attention(x, 2, causal=True, name="attn"), tied="table")}


@t.model
def encoder(tokens: Tokens, lengths: Lengths | None = None, *, vocab=270, dim=8):
    x = t.embed(tokens, vocab, dim, name="table")
    mask = None if lengths is None else t.padding(lengths)
    x += t.self_attention(x, 2, mask=mask, name="attn")
    return {"logits": t.unembed(x, tied="table"), "hidden": x}


@t.model
def classifier(tokens: Tokens, *, vocab=270, dim=8):
    return {"logits": t.linear(t.embed(tokens, vocab, dim, name="table").mean(1), 3, name="head")}


@t.model
def translator(tokens: Tokens, decoder_tokens: Annotated[t.Tensor, t.i64["B T"]], *, vocab=270, dim=8):
    source, x = t.embed(tokens, vocab, dim, name="source"), t.embed(decoder_tokens, vocab, dim, name="table")
    x += t.self_attention(x, 2, causal=True, name="attn") + t.cross_attention(x, source, 2, name="cross")
    return {"logits": t.unembed(x, tied="table")}
"""
TEXT = "the cat sat on the mat, and the dog sat on the log; the cat saw the dog.\n" * 4


def with_added(size: int, *names: str) -> TextTokenizer:
    """Return a tokenizer of up to `size` tokens, and more tokens that are added to its vocabulary."""
    made = train_tokenizer([TEXT], size, mask=True)
    for name in names:
        made, _ = made.with_token(name)
    return made


def write_tokenizer(place: Path, tokenizer: TextTokenizer) -> None:
    place.mkdir(exist_ok=True)
    for name, data in tokenizer.text_files().items():
        (place / name).write_bytes(data)


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Treadle:
    """Run a command in a folder with models.py, weights of its models, and the tokenizers `fits` of 260 tokens and
    `large` of 280.
    """
    run = commands_in(tmp_path, capsys, monkeypatch)
    Path("models.py").write_text(MODELS, encoding="utf-8")
    Path("corpus.txt").write_text(TEXT, encoding="utf-8")
    for name in ("causal", "encoder", "classifier", "translator"):
        resolved = resolve(f"models.py:{name}")
        saver_for(resolved, name).save(t.compile(f"models.py:{name}", seed=1, backend="numpy").weights)
    write_tokenizer(Path("fits"), with_added(260))
    write_tokenizer(Path("large"), with_added(280))
    return lambda *lines: run(*shlex.split(" ".join(lines)))


COMMANDS = [
    "generate models.py:causal the --weights causal --tokens 2",
    "perplexity models.py:causal corpus.txt --weights causal",
    "embed models.py:encoder the --weights encoder",
    "fill models.py:encoder 'the <mask>' --weights encoder",
    "classify models.py:classifier the --weights classifier",
    "train models.py:causal corpus.txt --weights causal -o new --steps 1 --length 8 --batch 1",
    "train models.py:encoder corpus.txt -o new --steps 1 --length 8 --batch 1 --objective masked-token",
]


@pytest.mark.parametrize("line", COMMANDS, ids=[" ".join(line.split()[:2]) for line in COMMANDS])
def test_a_larger_vocabulary_is_refused(line: str, command: Treadle) -> None:
    said = command(line, "--backend numpy --tokenizer large")
    refused(said, "does not have", "token 279; the model has 270 tokens", "try  ")
    assert "--tokenizer FOLDER" in said.err or "--set vocab=280" in said.err
    assert command(line, "--backend numpy --tokenizer fits").code == 0


@pytest.mark.parametrize("line", ["chat models.py:causal --weights causal", "serve models.py:causal --weights causal"])
def test_conversations_and_servers_refuse_it_when_they_open(line: str, command: Treadle) -> None:
    refused(command(line, "--backend numpy --tokenizer large"), "the tokenizer has tokens that models.py:causal does")


def test_a_draft_model_is_checked_with_its_own_tokenizer(command: Treadle) -> None:
    write_tokenizer(Path("causal"), with_added(280))
    assert command("compile models.py:causal --weights causal --backend numpy -o draft.treadle").code == 0
    write_tokenizer(Path("causal"), with_added(260))
    line = "generate models.py:causal the --weights causal --tokens 2 --backend numpy --draft draft.treadle"
    refused(command(line), "the tokenizer has tokens that draft.treadle does not have")


def test_a_new_vocabulary_must_fit_even_if_the_texts_have_no_such_token(command: Treadle) -> None:
    """All bytes are in the vocabulary, also the ones that no text has."""
    line = "train models.py:causal corpus.txt --vocab 257 --set vocab={} -o new --steps 1 --length 8 --batch 1"
    refused(command(line.format(256), "--backend numpy"), "token 256; the model has 256 tokens", "--set vocab=257")
    assert command(line.format(257), "--backend numpy").code == 0


def test_a_vocabulary_that_is_too_small_for_the_bytes_names_both_options(command: Treadle) -> None:
    line = "train models.py:causal corpus.txt --backend numpy -o new --steps 1 --length 8 --batch 1"
    refused(command(line, "--set vocab=100 --vocab 100"), "257 tokens or more", "--vocab 8000 --set vocab=8000")
    refused(command(line, "--set vocab=100"), "--tokenizer FOLDER", "or --vocab 8000 --set vocab=8000, which")
    assert command(line, "--vocab 8000 --set vocab=8000").code == 0


@pytest.mark.parametrize("size", [100, 300])
def test_a_new_vocabulary_fits_a_model_without_an_option_for_it(size: int, command: Treadle) -> None:
    """A size that fits the model is in the hint."""
    line = "train models.py:named corpus.txt --backend numpy -o new --steps 1 --length 8 --batch 1"
    refused(command(line, f"--vocab {size}"), "try       --vocab 270\n")
    assert command(line, "--vocab 270").code == 0


def test_a_model_of_few_tokens_gets_no_new_vocabulary(command: Treadle) -> None:
    line = "train models.py:named corpus.txt --set words=99 --backend numpy -o new --steps 1 --length 8 --batch 1"
    said = command(line)
    refused(said, "--tokenizer FOLDER, of a model with the intended vocabulary")
    assert "--vocab" not in said.err
    refused(command(line, "--vocab 99"), "a model with more token ids")


@pytest.mark.parametrize(
    "line",
    [
        "perplexity short.py:causal corpus.txt --weights causal/weights.safetensors",
        "train short.py:causal corpus.txt -o new --steps 1 --length 8 --batch 1",
    ],
)
def test_a_length_that_is_fixed_is_named_as_the_hint_says(line: str, command: Treadle) -> None:
    Path("short.py").write_text(MODELS.replace('i64["B S"]', 'i64["1 8"]'), encoding="utf-8")
    said = command(line, "--backend numpy --tokenizer fits")
    refused(said, "the length of its inputs is fixed")
    (axes,) = re.findall('names of the sizes, as ("[^"]*"): in the declaration of tokens', said.err)
    Path("short.py").write_text(MODELS.replace('i64["B S"]', f"i64[{axes}]"), encoding="utf-8")
    assert command(line, "--backend numpy --tokenizer fits").code == 0


@pytest.mark.parametrize("option", ["draft", "teacher"])
def test_a_further_model_has_its_own_tokenizer(option: str, command: Treadle) -> None:
    """--tokenizer names the tokenizer of the model alone."""
    lines = {
        "draft": "generate models.py:causal the --weights causal --tokens 2",
        "teacher": "train models.py:causal corpus.txt -o new --steps 1 --length 8 --batch 1",
    }
    compiling = "compile models.py:causal --weights causal --backend numpy -o further.treadle"
    assert command(compiling).code == 0
    line = f"{lines[option]} --backend numpy --tokenizer fits --{option} further.treadle"
    refused(command(line), f"a {option} is a model with its tokenizer", "a folder with tokenizer.json, or an artifact")
    write_tokenizer(Path("causal"), with_added(260))
    assert command(compiling).code == 0
    assert command(line).code == 0


def test_added_tokens_beyond_the_table_are_refused_in_texts_alone(command: Treadle) -> None:
    """Published folders have such tokens, as Gemma 3's <image_soft_token>, number 262,144 of 262,144."""
    write_tokenizer(Path("added"), with_added(270, "<image>", "<video>"))
    found = t.load("models.py:causal", weights="causal", tokenizer="added", backend="numpy")
    assert isinstance(found.generate("the cat", most=2), str)
    with pytest.raises(UsageError, match="the model has no token <image>") as caught:
        found.generate("the <image> cat", most=2)
    assert (caught.value.received, caught.value.hint) == ("token 270 in a text", "a text without <image>")
    filler = t.load("models.py:encoder", weights="encoder", tokenizer="added", backend="numpy")
    with pytest.raises(UsageError, match="the model has no token <video>"):
        filler.fill("a <mask> <video>")
    with pytest.raises(UsageError, match="the model has no token <video>"):
        filler.embed(["a <video>"])
    Path("corpus.txt").write_text(TEXT + "<video>")
    with pytest.raises(UsageError, match="the model has no token <video>"):
        TextData.open(
            ["corpus.txt"], ModelSource.open("models.py:causal", tokenizer="added").resolve(), length=8, batch=1
        )


def test_ids_without_a_token_are_not_predicted_and_are_counted(command: Treadle) -> None:
    """The table may have more rows than the tokenizer has tokens."""
    filled = t.load("models.py:encoder", weights="encoder", tokenizer="fits", backend="numpy").fill("a <mask>", top=300)
    tokens = with_added(260).vocabulary()
    assert sorted(filling.id for filling in filled.masks[0]) == sorted(tokens.values())
    weights = dict(t.compile("models.py:causal", weights="causal", backend="numpy").weights)
    weights["table.weight"] = np.array(weights["table.weight"])
    weights["table.weight"][268] = 100 * weights["table.weight"].sum(0)
    resolved = resolve("models.py:causal")
    saver_for(resolved, "other").save(weights)
    said = command("generate models.py:causal the --weights other --tokens 3 --backend numpy --tokenizer fits")
    assert "have no text: the tokenizer lacks their ids" in said.err


@pytest.mark.parametrize("line", ["generate models.py:translator the", "perplexity models.py:translator corpus.txt"])
def test_the_inputs_of_a_model_are_checked_before_its_tokenizer(line: str, command: Treadle) -> None:
    said = command(line, "--weights translator --backend numpy")
    refused(said, "tokens", "decoder_tokens")
    assert "without a tokenizer" not in said.err


def test_a_tokenizer_of_special_tokens_alone(command: Treadle, tmp_path: Path) -> None:
    """transformers writes one for a SentencePiece kind whose file is missing."""
    made: Any = tokenizers.Tokenizer(tokenizers.models.Unigram([("[UNK]", 0.0), ("[MASK]", 0.0)], unk_id=0))
    made.add_special_tokens(["[UNK]", "[MASK]"])
    Path("bare").mkdir()
    made.save("bare/tokenizer.json")
    said = command("fill models.py:encoder 'a [MASK]' --weights encoder --backend numpy --tokenizer bare")
    refused(said, "the tokenizer has no tokens but special ones", "[MASK], [UNK]")


def test_words_of_a_sentencepiece_kind_are_not_converted(tmp_path: Path) -> None:
    """RXNMapper is an ALBERT whose vocab.txt has the tokens of reactions, which transformers does not read."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "albert"}))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nC\nN\n")
    with pytest.raises(CheckpointError, match="the folder has no tokenizer") as caught:
        TextTokenizer.open(tmp_path)
    assert "transformers" not in (caught.value.hint or "") and "spiece.model" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_published_models_fit(name: str) -> None:
    if fetched_model(name) is None:
        pytest.skip(f"{name} is not in the cache")
    found = t.load(name, backend="numpy")
    assert isinstance(found, LoadedModel)
    if name == "minilm":
        graph = t.compile(name, backend="numpy", inputs=["lengths"], quantize="int8").graph
        assert count_token_ids(graph.main, "tokens") == 30522, "a quantized table has as many rows"
        assert found.embed("a cat").shape == (384,)
        return
    writer = TextWriter.open(name, backend="numpy")
    assert writer.tokens(["the cat"]) and writer.model.session(rows=1, capacity=8).vocabulary == 49152
