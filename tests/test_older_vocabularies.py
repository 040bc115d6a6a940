"""Vocabularies in vocab.txt, and in vocab.json with merges.txt, give the ids of Hugging Face's tokenizers."""

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
from treadle.frontends.vocabularies.older_vocabularies import _clip, _Parts
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
    """Write the older vocabulary files of a kind of tokenizer, with its config.json."""
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


EXTRA = [
    {"__type": "AddedToken", "content": f"<extra_id_{n}>", "lstrip": True, "normalized": False, "rstrip": False}
    for n in range(3)
]
END = {"content": "</s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    ("kind", "settings", "names", "added"),
    [
        ("opt", {"add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}, {}, []),
        ("opt", {"add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}, {"bos_token": END, "eos_token": END}, []),
        ("gpt2", {"add_bos_token": True, "add_eos_token": True}, {"pad_token": "[P]"}, []),
        ("gpt2", {"add_bos_token": True, "pad_token": "[X]"}, {"pad_token": "[P]"}, ["[P]", "dogs!"]),
        ("gpt2", {}, {"additional_special_tokens": ["[X]", "dogs!"]}, []),
        ("roberta", {"add_bos_token": True}, {"additional_special_tokens": EXTRA}, []),
        ("t5", {"tokenizer_class": "RobertaTokenizer", "additional_special_tokens": EXTRA}, {}, []),
        ("roberta", {"extra_special_tokens": {"image_token": "<image>"}}, {}, ["[X]"]),
        ("roberta", {"added_tokens_decoder": {"1": {"content": "<pad>", "special": True}}}, {"pad_token": "[P]"}, []),
        ("bert", {}, {"additional_special_tokens": ["[X]"], "mask_token": "[M]"}, ["[X]", "dogs!"]),
        ("clip", {}, {"pad_token": "!"}, ["[X]"]),
        ("mpnet", {"pad_token": "<pad>"}, {"bos_token": "<s>"}, []),
    ],
)
def test_tokens_that_a_folder_names_and_adds(
    kind: str, settings: dict[str, Any], names: dict[str, Any], added: list[str], tmp_path: Path
) -> None:
    older(tmp_path, {"opt": "gpt2", "t5": "roberta"}.get(kind, kind), **settings)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    if kind in ("bert", "mpnet"):
        count = len((tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines())
    else:
        count = len(json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    (tmp_path / "added_tokens.json").write_text(json.dumps({token: count + n for n, token in enumerate(added)}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = TextTokenizer.open(tmp_path, cut=False)
    given = [
        "",
        *texts(5),
        *HARD[1:],
        "the <pad> cat",
        "a [X] b[P]",
        "dogs! [M]",
        "a <extra_id_0>b<extra_id_2>",
        "<image>",
    ]
    for text, other in zip(given, [*given[1:], "a"], strict=True):  # theirs ignores an empty second text
        assert list(ours.encode([text])[0][0].ids) == theirs(text)["input_ids"], text
        assert list(ours.encode([(text, other)])[0][0].ids) == theirs(text, other)["input_ids"], text
    for role in {**({} if "added_tokens_decoder" in settings else names), **settings}:
        if role.endswith("_token") and not role.startswith("add_"):
            assert ours.special_names.get(role) == theirs.special_tokens_map.get(role), role


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("special_tokens_map.json", "{", "not JSON(.|\n)*special_tokens_map.json"),
        ("added_tokens.json", "{", "not JSON(.|\n)*added_tokens.json"),
        ("added_tokens.json", '{"a": "1"}', "an added token must have a number"),
        ("added_tokens.json", '{"a": 1000000000}', "an added token must have a number"),
        ("added_tokens.json", '{"[X]": 7}', "an added token has another number"),
        ("tokenizer_config.json", '{"add_bos_token": true, "bos_token": "[X]"}', "lacks a special token"),
    ],
)
def test_damaged_names_of_tokens(file: str, content: str, what: str, tmp_path: Path) -> None:
    older(tmp_path, "gpt2")
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=what):
        TextTokenizer.open(tmp_path)


def test_a_space_before_a_mask_belongs_to_it(tmp_path: Path) -> None:
    """RoBERTa was trained in this way, and its own tokenizer.json specifies it."""
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
        ("vocab.json", '{"<s>": 0, "a": 0}', "two tokens of the vocabulary have the same id"),
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
    special = {"bos_token": "<s>", "eos_token": "<e>", "unk_token": "<u>"}
    made = _clip(_Parts(tokenizers, vocabulary, [], special, {}))
    assert made.encode("a z zz a").ids == [0, 3, 2, 2, 2, 3, 1]
