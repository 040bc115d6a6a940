"""Training data from texts: documents in files, inputs and targets of each objective, and errors for texts that do not
fit the model.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from tests.task_models import byte_level, save, texts, without_specials, wordpiece
from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import CheckpointError, TreadleError, UsageError
from treadle.program.given_texts import read_documents
from treadle.program.source import ModelSource
from treadle.resolving import resolve
from treadle.training.objectives import MaskedToken, NextToken
from treadle.training.text_data import TextData
from treadle.training.texts import NOT_COUNTED

TEXTS = texts(60, 5)


# -- documents of files --------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document_and_jsonl_has_one_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("One\ntwo.\n", encoding="utf-8")
    lines = ['{"text": "Käse\\u2028here", "id": 3}', "", '  {"text": ""} ', '{"text": "last\u2028line"}']
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"piped")))
    found = read_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), "-"])
    assert found == ["One\ntwo.\n", "Käse\u2028here", "last\u2028line", "piped"]


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.txt", "a.jsonl.TXT"])
def test_a_byte_order_mark_is_no_text_and_an_ending_may_be_in_capitals(name: str, tmp_path: Path) -> None:
    text = '{"text": "one"}\n{"text": "two"}'
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_text(text, encoding=encoding)
        wanted = ["one", "two"] if "json" in name.lower()[-5:] else [text]
        assert read_documents([str(tmp_path / name)]) == wanted


@pytest.mark.parametrize(
    "line", ['{"text": 3}', '{"body": "x"}', '["text"]', "{", '"text"', "[" * 100_000], ids=lambda line: line[:15]
)
def test_a_line_that_is_no_object_with_a_text_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n\n' + line, encoding="utf-8")
    with pytest.raises(UsageError, match=r"a line of a \.jsonl file must be an object with a text") as caught:
        read_documents([str(path)])
    assert caught.value.within == f"{path}, line 3"
    assert str(caught.value.hint) == ("column='body'" if "body" in line else '{"text": "Once upon a time"}')


def test_a_hint_names_the_columns_with_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 3, "my prompt": "x", "completion": "y"}\n')
    with pytest.raises(UsageError) as caught:
        read_documents([str(path)])
    assert caught.value.hint == "column='my prompt', or completion"
    assert caught.value.hint.command == "--column 'my prompt', or completion"
    assert read_documents([str(path)], "my prompt") == ["x"]


def test_files_without_a_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_bytes(b"ok \xff")
    with pytest.raises(UsageError, match="there is no text"):
        read_documents([str(tmp_path / "a.txt")])
    with pytest.raises(UsageError, match="the text is not UTF-8"):
        read_documents([str(tmp_path / "b.txt")])
    with pytest.raises(CheckpointError, match="the file does not exist"):
        read_documents([str(tmp_path / "c.txt")])


# -- ids and objectives --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gpt2")
    save(place, "GPT2LMHeadModel", without_specials())
    return place


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bert")
    save(place, "BertForMaskedLM", wordpiece())
    return place


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("make", [wordpiece, byte_level, without_specials])
def test_ids_are_those_of_encode(make: Any, special: bool, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    tokenizer = TextTokenizer.open(tmp_path, cut=False)
    report = [*TEXTS, "", "Œuvre \U0001f600"]
    assert tokenizer.ids(report, special=special) == [list(e.ids) for (e,) in tokenizer.encode(report, special=special)]
    assert [type(ids) for ids in tokenizer.ids(["a cat"])] == [list]
    with pytest.raises(UsageError, match="not valid Unicode"):
        tokenizer.ids(["\ud800"])


def test_the_next_token_of_documents_with_the_end_of_text_between(gpt2: Path, corpus: str) -> None:
    resolved = resolve(gpt2)
    data = TextData.open([corpus], resolved, length=16, batch=4, holdout=0.25, seed=3)
    tokenizer = TextTokenizer.open(gpt2, cut=False)
    end = tokenizer.id_of("<|endoftext|>")
    assert end is not None
    wanted = [number for ids in tokenizer.ids(TEXTS) for number in (*ids, end)][:-1]
    whole = len(wanted) // 16
    held = round(whole / 4)
    assert (len(data.batches.blocks), len(data.heldout), data.length) == (whole - held, held, 16)
    blocks = np.concatenate([data.batches.blocks, data.heldout])
    assert blocks.ravel().tolist() == wanted[: whole * 16], "those held out are the last"
    assert (data.batches.rows, data.batches.seed, data.objective) == (4, 3, NextToken())
    asked = data.objective.asked(blocks[:2], 7)
    np.testing.assert_array_equal(asked["tokens"], blocks[:2])
    np.testing.assert_array_equal(asked["targets"][:, :-1], blocks[:2, 1:])


def test_masked_tokens_hide_none_of_those_around_texts(bert: Path, corpus: str) -> None:
    data = TextData.open([corpus], resolve(bert), objective="masked-token", length=24, batch=2, seed=5)
    tokenizer = TextTokenizer.open(bert, cut=False)
    ids = {name: tokenizer.id_of(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
    assert isinstance(data.objective, MaskedToken)
    assert data.objective == MaskedToken(ids["[MASK]"] or 0, len(tokenizer.vocabulary()), data.objective.special, 5)
    assert set(ids.values()) <= set(data.objective.special)
    wanted = [number for each in tokenizer.ids(TEXTS) for number in each]
    assert data.batches.blocks.ravel().tolist() == wanted[: data.batches.blocks.size], "with [CLS] and [SEP] of each"
    assert len(data.heldout) == 0
    tokens = data.batches.blocks[:8]
    first, again, other = (data.objective.asked(tokens, *n) for n in ((0, 1), (0, 1), (0, 2)))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["targets"], other["targets"])
    counted = first["targets"] != NOT_COUNTED
    assert counted.any(axis=1).all() and not np.isin(tokens[counted], data.objective.special).any()


def test_a_block_is_as_long_as_the_model_takes_unless_it_is_said(gpt2: Path, corpus: str) -> None:
    """The default of 128 tokens per block is reduced to the model's 48 positions."""
    assert TextData.open([corpus], resolve(gpt2)).length == 48
    assert TextData.open([corpus], resolve(gpt2), length=48, batch=1).length == 48


def test_another_tokenizer_serves_a_model_without_a_folder(gpt2: Path, corpus: str) -> None:
    vocabulary = len(TextTokenizer.open(gpt2).vocabulary())
    sizes = {"context": 32, "dim": 8, "heads": 2, "layers": 1}
    source = ModelSource.open("gpt2", tokenizer=str(gpt2))
    data = TextData.open([corpus], source.resolve(vocab=vocabulary, **sizes))
    own = TextData.open([corpus], resolve(gpt2), length=32)
    np.testing.assert_array_equal(data.batches.blocks, own.batches.blocks)
    with pytest.raises(UsageError, match="the tokenizer has tokens that gpt2 does not have") as caught:
        TextData.open([corpus], source.resolve(vocab=50, **sizes))
    assert str(caught.value.hint) == f"vocab={vocabulary}"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"objective": "both"}, "there is no objective 'both'"),
    ("gpt2", {"length": 49}, "a block must have 2 tokens or more and at most 48, the maximum of the model"),
    ("gpt2", {"length": 1}, "a block must have 2 tokens or more"),
    ("gpt2", {"holdout": 1.0}, "the held-out fraction of blocks must be 0 or more and below 1"),
    ("gpt2", {"holdout": -0.1}, "the held-out fraction of blocks must be 0 or more and below 1"),
    ("gpt2", {"batch": 500}, "a batch of 500 rows cannot be formed from"),
    ("gpt2", {"batch": 3, "holdout": 0.99}, "a batch of 3 rows cannot be formed from 0 blocks"),
    ("bert", {}, "it is not a causal language model"),
    ("bert", {"objective": "masked-token", "teacher": "gpt2"}, "a teacher must have the same vocabulary"),
]


@pytest.mark.parametrize(("name", "options", "report"), REFUSED, ids=[report[:40] for _, _, report in REFUSED])
def test_misfits_are_refused(
    name: str, options: dict[str, Any], report: str, gpt2: Path, bert: Path, corpus: str
) -> None:
    places = {"gpt2": gpt2, "bert": bert}
    options = {**options, **({"teacher": str(gpt2)} if "teacher" in options else {})}
    with pytest.raises(TreadleError, match=report):
        TextData.open([corpus], resolve(places[name]), **options)


def test_a_block_is_no_longer_than_the_teacher_takes(gpt2: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = resolve("gpt2", layers=1, dim=8, heads=2, vocab=50, context=24)
    model = resolve(gpt2)
    monkeypatch.setattr("treadle.program.source.ModelSource.resolve", lambda *_, **__: short)
    options: dict[str, Any] = {"teacher": str(gpt2)}
    assert TextData.open([corpus], model, **options).length == 24
    with pytest.raises(UsageError, match="2 tokens or more and at most 24, the maximum of the teacher"):
        TextData.open([corpus], model, length=25, **options)


def test_a_vocabulary_without_a_mask_hides_nothing(bert: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextTokenizer, "mask", None)
    with pytest.raises(CheckpointError, match="no file names the mask token"):
        TextData.open([corpus], resolve(bert), objective="masked-token")


@pytest.mark.parametrize(
    ("model", "report"),
    [
        ("gpt2", "gpt2 has no folder, and so no tokenizer"),
        ("vit", "it is not a model of tokens alone"),
        ("t5", "alone"),
    ],
)
def test_models_that_texts_do_not_train(model: str, report: str, corpus: str) -> None:
    with pytest.raises(UsageError, match=report):
        TextData.open([corpus], resolve(model, layers=1))
