"""Tokenization and detokenization with a small vocabulary whose ids are listed in this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from tests.test_sentencepiece import SMALL, folder
from treadle.files.shown_names import printable
from treadle.frontends.text import EncodedText, TextTokenizer
from treadle.frontends.vocabularies.folder_vocabulary import folder_chat_template
from treadle.ir.errors import CheckpointError, UsageError
from treadle.program.source import ModelSource

END, UNKNOWN, A, CAT = 1, 2, 3, 4  # ids in the vocabulary SMALL, which merges adjacent unknown pieces


def opened(place: Path, settings: dict[str, Any] | None = None, **options: Any) -> TextTokenizer:
    folder(place, "t5", SMALL, extra_ids=2, **(settings or {}))
    return TextTokenizer.open(place, **options)


def test_rows_are_padded_and_what_is_cut_is_told(tmp_path: Path) -> None:
    batch = opened(tmp_path, max_tokens=3).batch(["a", "a cat", "a cat a"])
    np.testing.assert_array_equal(batch.ids, [[A, END, 0], [A, CAT, END], [A, CAT, END]])
    assert batch.ids.dtype == batch.lengths.dtype == np.int64
    assert batch.lengths.tolist() == [2, 3, 3]
    assert batch.cut.tolist() == [False, False, True]


@pytest.mark.parametrize("method", ["ids", "encode"])
def test_a_text_in_place_of_a_list_is_refused(method: str, tmp_path: Path) -> None:
    """A text is a sequence, too: of letters. The hint's call works."""
    tokenizer = opened(tmp_path)
    with pytest.raises(UsageError, match=f"{method} takes a list of texts") as caught:
        getattr(tokenizer, method)("a cat")
    found = eval(f"tokenizer.{caught.value.hint}", {"tokenizer": tokenizer})
    ids = {"ids": lambda: found, "encode": lambda: list(found[0].ids)}
    assert ids[method]() == [A, CAT, END]
    with pytest.raises(UsageError, match="texts must be a list") as of_batch:
        tokenizer.batch("a cat")
    batch = eval(f"tokenizer.batch({of_batch.value.hint})", {"tokenizer": tokenizer})
    assert batch.ids.tolist() == [[A, CAT, END]]


@pytest.mark.parametrize(
    ("settings", "options", "most"),
    [
        ({}, {}, None),
        ({}, {"max_tokens": 4}, 4),
        ({"model_max_length": 3}, {}, 3),
        ({"model_max_length": 3}, {"max_tokens": 4}, 4),
        ({"model_max_length": 4.0}, {"context": 3}, 3),
        ({"model_max_length": 3}, {"context": 5}, 3),
        ({}, {"context": 3}, 3),
        ({"model_max_length": 3}, {"context": 3, "cut": False}, None),
        ({"model_max_length": 2**31 - 1}, {}, 2**31 - 1),
        ({"model_max_length": 2**31}, {}, None),
        ({"model_max_length": 10**30}, {}, None),
        ({"model_max_length": 0}, {}, None),
        ({"model_max_length": "3"}, {}, None),
    ],
)
def test_how_long_a_text_may_be(
    settings: dict[str, Any], options: dict[str, Any], most: int | None, tmp_path: Path
) -> None:
    tokenizer = opened(tmp_path, settings, **options)
    assert tokenizer.max_tokens == most
    assert tokenizer.batch(["a " * 9]).lengths.tolist() == [10 if most is None else min(most, 10)]


def test_texts_with_their_places(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path)
    ((one,), (two,)) = tokenizer.encode(["a cat", ("a", "cat dog")])
    assert one == EncodedText((A, CAT, END), (0, 0, 0), ((0, 1), (2, 5), (0, 0)), (0, 0, None), (0, 1, None), cut=False)
    assert (two.ids, two.parts) == ((A, END, CAT, UNKNOWN, END), (0, None, 1, 1, None))
    assert len(two) == 5
    ((plain,),) = tokenizer.encode(["a cat"], special=False)
    assert plain.ids == (A, CAT)


def test_a_pairs_second_text_in_windows(tmp_path: Path) -> None:
    """Each window has the first text, and overlaps the next window. The tokenizer's own truncation settings are
    unchanged.
    """
    tokenizer = opened(tmp_path, max_tokens=4)
    (windows,) = tokenizer.encode([("a", "cat a cat a")], windows=(5, 1))
    assert [w.ids for w in windows] == [(A, END, CAT, A, END), (A, END, A, CAT, END), (A, END, CAT, A, END)]
    assert [w.cut for w in windows] == [True, False, False]
    ((cut,),) = tokenizer.encode(["a cat a cat"])
    assert cut.ids == (A, CAT, A, END)
    free = opened(tmp_path)
    free.encode([("a", "cat a cat a")], windows=(5, 1))
    assert len(free.encode(["a " * 9])[0][0]) == 10
    with pytest.raises(CheckpointError, match="texts cannot be truncated to 3 tokens"):
        tokenizer.encode([("a", "cat")], windows=(3, 7))


def test_a_vocabulary_answers_by_name_and_by_number(tmp_path: Path) -> None:
    tokenizer = opened(
        tmp_path, {"model_input_names": ["input_ids"], "mask_token": "<extra_id_0>", "unk_token": "<unk>"}
    )
    assert (tokenizer.id_of("▁cat"), tokenizer.id_of("cat"), tokenizer.name_of(CAT)) == (CAT, None, "▁cat")
    assert (tokenizer.unknown, tokenizer.mask, tokenizer.word_prefix) == (UNKNOWN, "<extra_id_0>", None)
    assert tokenizer.join(["▁a", "▁cat"]) == "a cat"
    assert tokenizer.vocabulary()["▁a"] == A
    assert len(tokenizer.vocabulary()) == 7
    assert (tokenizer.token(CAT), tokenizer.token(END), tokenizer.token(99)) == ("cat", "</s>", "None")
    assert {"</s>", "<unk>", "<extra_id_0>"} <= set(tokenizer.special_tokens())
    assert "▁a" not in tokenizer.special_tokens()
    assert tokenizer.text([A, CAT, END]) == "a cat"
    assert tokenizer.text([A, CAT, END], special=True) == "a cat</s>"
    assert tokenizer.input_names == ("input_ids",)
    (tmp_path / "plain").mkdir()
    plain = opened(tmp_path / "plain")
    assert plain.input_names == ("input_ids", "attention_mask")
    assert (plain.unknown, plain.mask) == (None, None)


def test_texts_that_are_none_are_refused(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path)
    with pytest.raises(UsageError, match="there is no text"):
        tokenizer.batch([])
    for use in (lambda text: tokenizer.batch([text]), lambda text: tokenizer.encode([("a", text)])):
        text = "cat \ud800" + "x" * 99
        with pytest.raises(UsageError, match="a text is not valid Unicode") as caught:
            use(text)
        assert caught.value.received == f"{printable(text, 60)}, character 4"


def test_files_that_are_too_long_or_no_json(tmp_path: Path) -> None:
    opened(tmp_path, limit_bytes=len(SMALL))
    with pytest.raises(CheckpointError, match="longer than the limit"):
        opened(tmp_path, limit_bytes=len(SMALL) - 1)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="the file is not JSON"):
        TextTokenizer.open(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert TextTokenizer.open(tmp_path).max_tokens is None


@pytest.mark.parametrize(
    ("held", "template"),
    [
        ({}, None),
        ({"chat_template": "one"}, "one"),
        ({"chat_template": [3, {"name": "default", "template": "two"}, {"template": "three"}]}, "two"),
        ({"chat_template": [{"name": "default"}]}, None),
        ({"chat_template": 3}, None),
    ],
)
def test_the_template_of_a_conversation(held: dict[str, Any], template: str | None, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(held))
    assert folder_chat_template(tmp_path) == template
    (tmp_path / "chat_template.jinja").write_bytes(b"four \xff")
    assert folder_chat_template(tmp_path) == "four \ufffd"


def test_calls_of_other_tokenizers_lead_to_methods(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path)
    for call, hint in (
        (lambda: tokenizer("a text"), 'tokenizer.ids(["a text"])[0]'),
        (lambda: tokenizer.text("a text"), "tokenizer.ids([text])[0]"),  # type: ignore[arg-type]
        (lambda: tokenizer.text([[1, 2]]), "text(ids[0])"),  # type: ignore[list-item]
        (lambda: tokenizer.batch(["a"], padding=True), "leave it out: a batch is padded"),  # type: ignore[call-arg]
        (lambda: tokenizer.eos_token_id, "tokenizer.special_tokens()"),  # type: ignore[attr-defined]
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert str(caught.value.hint).startswith(hint)
    with pytest.raises(UsageError) as source:
        ModelSource("folder")  # type: ignore[arg-type]
    assert source.value.hint == "t.ModelSource.open('folder')"
