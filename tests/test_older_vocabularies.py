"""Vocabularies in vocab.txt, and in vocab.json with merges.txt: the ids that Hugging Face's tokenizers give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("torch")

from tokenizers.pre_tokenizers import ByteLevel

from tests.task_models import byte_level, texts, wordpiece
from treadle.frontends.text import TextTokenizer
from treadle.frontends.vocabularies.older_vocabularies import _clip
from treadle.ir.errors import CheckpointError

HARD = [
    "",
    "  spaces \t and\nlines ",
    "ÀÉÎ œuvre 中文 字",
    "naïve—dash… “quotes”",
    "🙂 emoji",
    "[MASK] and</s>",
    "1234 5.6",
]
MASK = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "normalized": True, "rstrip": False}
MASK |= {"single_word": False, "special": True}


def older(place: Path, kind: str, **settings: Any) -> None:
    """The older files of a kind of tokenizer, with its config.json."""
    if kind in ("bert", "mpnet"):
        vocabulary = wordpiece().get_vocab()
        names = sorted(vocabulary, key=vocabulary.__getitem__)
        if kind == "mpnet":
            others = {"[CLS]": "<s>", "[SEP]": "</s>", "[PAD]": "<pad>", "[MASK]": "<mask>"}
            names = [others.get(name, name) for name in names]
        (place / "vocab.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    elif kind == "clip":
        merged = [("t", "h"), ("th", "e</w>"), ("a", "n"), ("an", "d</w>"), ("i", "n</w>"), ("4", "5</w>")]
        letters = sorted(ByteLevel.alphabet())
        names = [*letters, *(f"{c}</w>" for c in letters), *map("".join, merged), "<|startoftext|>", "<|endoftext|>"]
        vocabulary = {name: number for number, name in enumerate(names)}
        (place / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (place / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merged)) + "\n", encoding="utf-8")
    else:
        model = json.loads(byte_level().backend_tokenizer.to_str())["model"]
        vocabulary = {**model["vocab"], "<|endoftext|>": len(model["vocab"])} if kind == "gpt2" else model["vocab"]
        (place / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        merges = "\n".join(" ".join(merge) for merge in model["merges"])
        (place / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (place / "config.json").write_text(json.dumps({"model_type": kind}))
    if settings:
        (place / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bert", {}),
        ("bert", {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}),
        ("bert", {"strip_accents": False}),
        ("bert", {"strip_accents": True, "do_lower_case": False}),
        ("bert", {"tokenize_chinese_chars": False}),
        ("roberta", {}),
        ("roberta", {"trim_offsets": False}),
        ("roberta", {"add_prefix_space": True}),
        ("bart", {"mask_token": MASK}),
        ("gpt2", {}),
        ("mpnet", {}),
        ("clip", {}),
    ],
)
def test_ids_are_those_of_hugging_face(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    older(tmp_path, kind, **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = TextTokenizer.open(tmp_path, cut=False)
    given = [*texts(60), *HARD]
    for text, (found,) in zip(given, ours.encode(given), strict=True):
        whole = theirs(text, return_offsets_mapping=True)
        assert list(found.ids) == whole["input_ids"], text
        assert list(found.offsets) == whole["offset_mapping"], text
        assert ours.text(found.ids) == theirs.decode(
            found.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    for first, second in zip(given, [*reversed(given[:-7]), *given[:7]], strict=True):
        ((found,),) = ours.encode([(first, second)])
        wanted = theirs(first, second)
        assert list(found.ids) == wanted["input_ids"]
        if kind == "bert":
            assert list(found.types) == wanted["token_type_ids"]


def test_a_space_before_a_mask_belongs_to_it(tmp_path: Path) -> None:
    """As RoBERTa was trained, and as its own tokenizer.json says."""
    older(tmp_path, "roberta")
    tokenizer = TextTokenizer.open(tmp_path)
    ((spaced,), (joined,)) = tokenizer.encode(["the <mask>", "the<mask>"])
    assert spaced.ids == joined.ids
    assert (tokenizer.mask, tokenizer.id_of("<mask>")) == ("<mask>", spaced.ids[-2])


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\na\n", "contains a token twice"),
        ("vocab.txt", "[PAD]\n[UNK]\na\n", "lacks a special token"),
        ("vocab.txt", "[PAD]\n\xff", "not UTF-8"),
        ("vocab.json", '{"<s>": 0, "a": 0}', "two tokens of the vocabulary have one number"),
        ("vocab.json", '{"<s>": "first"}', "must give each token a number"),
        ("vocab.json", '{"<s>": true}', "must give each token a number"),
        ("vocab.json", '{"<s>": -1}', "must give each token a number"),
        ("vocab.json", '{"<s>": 2147483648}', "must give each token a number"),
        ("vocab.json", '{"<s>": {"a": {}}}', "deep"),
        ("merges.txt", "a\n", "a merge must be two tokens"),
        ("merges.txt", "zz yy\n", "a merge must be two tokens(.|\n)*merges.txt, line 1"),
        ("merges.txt", "#version: 0.2\n\nt h e\n", "a merge must be two tokens(.|\n)*merges.txt, line 3"),
        ("merges.txt", "#version: 0.2\n#version: 0.2\n", "a merge must be two tokens(.|\n)*merges.txt, line 2"),
    ],
)
def test_damaged_files(file: str, content: str, what: str, tmp_path: Path) -> None:
    older(tmp_path, "bert" if file == "vocab.txt" else "roberta")
    (tmp_path / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=what):
        TextTokenizer.open(tmp_path)


def test_a_kind_that_is_not_built_says_how_to_make_tokenizer_json(tmp_path: Path) -> None:
    older(tmp_path, "roberta")
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json") as refused:
        TextTokenizer.open(tmp_path)
    assert "transformers" in str(refused.value.hint)


def test_a_byte_that_clips_vocabulary_lacks_is_the_unknown_token() -> None:
    import tokenizers

    vocabulary = {"<s>": 0, "<e>": 1, "<u>": 2, "a</w>": 3}
    made = _clip(tokenizers, vocabulary, [], {"bos_token": "<s>", "eos_token": "<e>", "unk_token": "<u>"}, {})
    assert made.encode("a z zz a").ids == [0, 3, 2, 2, 2, 3, 1]
