"""SentencePiece vocabularies of folders without tokenizer.json give the ids of Hugging Face's tokenizers."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from treadle.frontends.text import TextTokenizer
from treadle.frontends.vocabularies import sentencepiece_file
from treadle.frontends.vocabularies.sentencepiece_file import BPE, UNIGRAM, read_sentencepieces
from treadle.ir.errors import CheckpointError

HARD = [
    "",
    "  spaces \t and\nlines ",
    "ÀÉÎ œuvre 中文 字 ﬁ ½ Ⅷ",
    "naïve—dash… “quotes” ``old'' ",
    "🙂 emoji",
    "<s> and </s> the <mask> [MASK]<pad><extra_id_3> <unk><|end|> x",
    "1234 5.6!?",
    "▁low ▁ line",
]

WORDS = [
    "the",
    "cat",
    "sits",
    "near",
    "an",
    "old",
    "house",
    "under",
    "trees",
    "Ada",
    "wrote",
    "code",
    "and",
    "moved",
    "to",
    "London",
    "naïve",
    "café",
    "Zürich",
]


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        words = [str(word) for word in draw.choice([*WORDS, "walking", "qqq", "Œuvre", "don't"], draw.integers(1, 12))]
        made.append(
            " ".join(w.upper() if draw.random() < 0.1 else w for w in words) + str(draw.choice(["", ".", " !"]))
        )
    return made


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("spiece.model", "unigram", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    "albert": (
        "spiece.model",
        "unigram",
        {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "control_symbols": "[CLS],[SEP],[MASK]"},
    ),
    "siglip": ("spiece.model", "unigram", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    "xlm-roberta": ("sentencepiece.bpe.model", "unigram", {"unk_id": 0, "bos_id": 1, "eos_id": 2}),
    "camembert": ("sentencepiece.bpe.model", "unigram", {"unk_id": 0, "bos_id": 1, "eos_id": 2}),
    "llama": ("tokenizer.model", "bpe", {"byte_fallback": True, "user_defined_symbols": "<fim>"}),
    "phi3": ("tokenizer.model", "bpe", {"byte_fallback": True}),
    "gemma": (
        "tokenizer.model",
        "bpe",
        {
            "byte_fallback": True,
            "pad_id": 0,
            "eos_id": 1,
            "bos_id": 2,
            "unk_id": 3,
            "pad_piece": "<pad>",
            "eos_piece": "<eos>",
            "bos_piece": "<bos>",
            "add_dummy_prefix": False,
        },
    ),
}
"""For each model_type of config.json: the name of the vocabulary file, and its training options."""

ADDED = {
    "content": "<|end|>",
    "lstrip": False,
    "normalized": False,
    "rstrip": True,
    "single_word": False,
    "special": True,
}

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("t5", {}),
    ("t5", {"extra_ids": 7, "tokenizer_class": "T5Tokenizer"}),
    ("albert", {}),
    ("albert", {"do_lower_case": False, "keep_accents": True}),
    ("siglip", {}),
    ("siglip", {"do_lower_case": False}),
    ("xlm-roberta", {}),
    ("xlm-roberta", {"mask_token": {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "special": True}}),
    ("camembert", {}),
    ("llama", {}),
    ("llama", {"add_bos_token": True, "legacy": False}),
    ("llama", {"add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}),
    ("llama", {"legacy": True, "add_eos_token": True, "tokenizer_class": "LlamaTokenizerFast"}),
    ("llama", {"add_prefix_space": False, "tokenizer_class": "LlamaTokenizer", "pad_token": "[PAD]"}),
    ("phi3", {"added_tokens_decoder": {"400": ADDED}}),
    ("gemma", {"add_bos_token": True}),
]


@pytest.fixture(scope="module")
def trained() -> dict[str, bytes]:
    """Train a small vocabulary of each kind with the library that writes such files."""
    library = pytest.importorskip("sentencepiece")
    made = {}
    for kind, (_, model, options) in KINDS.items():
        out = io.BytesIO()
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences(400, seed=5)),
            model_writer=out,
            model_type=model,
            vocab_size=400 if "byte_fallback" in options else 100,
            minloglevel=2,
            num_threads=1,
            **options,
        )
        made[kind] = out.getvalue()
    return made


def folder(place: Path, kind: str, data: bytes, **settings: Any) -> None:
    (place / KINDS[kind][0]).write_bytes(data)
    (place / "config.json").write_text(json.dumps({"model_type": kind}))
    if settings:
        (place / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_ids_are_those_of_hugging_face(
    kind: str, settings: dict[str, Any], trained: dict[str, bytes], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder(tmp_path, kind, trained[kind], **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = TextTokenizer.open(tmp_path, cut=False)
    given = [*sentences(200), *HARD]
    if kind == "siglip":  # Hugging Face's Python tokenizer puts no space after a special token
        given = [text.replace("</s>", "").replace("<unk>", "") for text in given]
    for text, (found,) in zip(given, ours.encode(given), strict=True):
        whole = theirs(text, return_offsets_mapping=theirs.is_fast)
        assert list(found.ids) == whole["input_ids"], text
        assert not theirs.is_fast or list(found.offsets) == whole["offset_mapping"], text
        if kind != "siglip":  # also if tokens are joined differently
            assert ours.text(found.ids) == theirs.decode(
                found.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
    for first, second in zip(given[:50], given[50:100], strict=True):
        ((found,),) = ours.encode([(first, second)])
        wanted = theirs(first, second)
        assert list(found.ids) == wanted["input_ids"]
        if "token_type_ids" in wanted:
            assert list(found.types) == wanted["token_type_ids"]
    for role, name in theirs.special_tokens_map.items():
        if isinstance(name, str):
            assert ours.id_of(name) == theirs.convert_tokens_to_ids(name), role


# -- the file --------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def held(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def piece(text: str, score: float, kind: int = 1) -> bytes:
    return held(
        1, held(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + varint(3 << 3) + varint(kind)
    )


def charmap(offset: int = 0, leaf: int = 0) -> bytes:
    """Return a table of characters with one block, whose first unit points to a child, and whose second unit is a
    leaf.
    """
    units = np.zeros(256, "<u4")
    units[:2] = offset << 10, 1 << 31 | leaf
    return struct.pack("<I", units.nbytes) + units.tobytes() + b"a\0"


SMALL = b"".join(
    [
        piece("<pad>", 0, 3),
        piece("</s>", 0, 3),
        piece("<unk>", 0, 2),
        piece("▁a", -1.5),
        piece("▁cat", -2.25),
        held(2, varint(3 << 3) + varint(UNIGRAM) + varint(40 << 3) + varint(2)),
        held(3, held(1, b"identity")),
        varint(99 << 3 | 1) + bytes(8),
    ]
)
"""A vocabulary as bytes, with a field that the reader skips."""


def test_the_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    read = read_sentencepieces(SMALL, "spiece.model")
    assert [(p.text, p.score, p.kind) for p in read.pieces][2:4] == [("<unk>", 0.0, 2), ("▁a", -1.5, 1)]
    assert (read.kind, read.unknown, read.charmap) == (UNIGRAM, 2, b"")
    folder(tmp_path, "t5", SMALL, extra_ids=2)
    tokenizer = TextTokenizer.open(tmp_path)
    ((found,),) = tokenizer.encode(["a  cat  dog <extra_id_1>"])
    assert found.ids == (3, 4, 2, 5, 1)
    assert tokenizer.name_of(6) == "<extra_id_0>"


@pytest.mark.parametrize(
    ("data", "what", "at"),
    [
        (b"", "has no pieces", 0),
        (SMALL[:-3], "reaches past the end", 98),
        (SMALL[:9], "reaches past the end", 0),
        (SMALL + b"\xff", "ends inside a number", 108),
        (SMALL + b"\xff" * 12, "more than 10 bytes", 108),
        (SMALL + b"\x0b", "not a SentencePiece vocabulary", 108),
        (SMALL + b"\x00\x01", "invalid protobuf field number 0", 108),
        (SMALL + held(1, held(1, b"\xff")), "is not UTF-8", 110),
        (SMALL + held(1, varint(2 << 3 | 5) + struct.pack("<f", np.inf)), "must be a finite number", 110),
        (SMALL + held(1, varint(2 << 3) + b"\x01"), "must be a 32-bit number", 110),
        (SMALL + varint(1 << 3) + b"\x01", "must be a message", 108),
        (SMALL + held(2, held(40, b"x")), "must be an integer", 110),
        (SMALL + held(3, varint(2 << 3) + b"\x01"), "field 2 must hold bytes", 110),
        (SMALL + held(2, varint(40 << 3) + varint(9)), "unk_id must be the id of a piece", 0),
        (SMALL + held(2, varint(3 << 3) + varint(4)), "of kind 1", 0),
        (SMALL + held(2, varint(3 << 3) + varint(BPE)), "does not match the folder's tokenizer", None),
        (SMALL + held(3, held(2, b"\x07\x00\x00\x00damaged")), "table of characters is damaged", 112),
        (SMALL + held(3, held(2, charmap(offset=300))), "table of characters is damaged", 114),
        (SMALL + held(3, held(2, charmap(leaf=9))), "table of characters is damaged", 114),
    ],
)
def test_damaged_files(data: bytes, what: str, at: int | None, tmp_path: Path) -> None:
    """Each error gives the byte at which the damaged field begins."""
    folder(tmp_path, "t5", data)
    with pytest.raises(CheckpointError, match=what) as caught:
        TextTokenizer.open(tmp_path)
    place = str(tmp_path / "spiece.model")
    assert caught.value.within == (place if at is None else f"{place}, byte {at}")


def test_a_vocabulary_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece_file, "_MOST_PIECES", 5)
    assert len(read_sentencepieces(SMALL, "spiece.model").pieces) == 5
    monkeypatch.setattr(sentencepiece_file, "_MOST_PIECES", 4)
    with pytest.raises(CheckpointError, match="more pieces than the limit") as caught:
        read_sentencepieces(SMALL, "spiece.model")
    assert (caught.value.received, caught.value.within) == (
        "4",
        f"spiece.model, byte {SMALL.index(piece('▁cat', -2.25))}",
    )


def test_a_long_piece_is_refused() -> None:
    """Every split of a piece is tried, which takes a time that is quadratic in its length."""
    longest = piece("x" * 512, 0.0)
    assert len(read_sentencepieces(SMALL + longest, "spiece.model").pieces) == 6
    with pytest.raises(CheckpointError, match="a piece has more than 512 characters") as caught:
        read_sentencepieces(SMALL + piece("x" * 513, 0.0), "spiece.model")
    assert (caught.value.received, caught.value.within) == ("513", f"spiece.model, byte {len(SMALL)}")


def test_any_change_of_a_file_is_read_or_refused(tmp_path: Path) -> None:
    """Overwritten bytes and truncated files cause a typed error, or give another vocabulary."""
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        data = bytearray(SMALL[: int(draw.integers(1, len(SMALL) + 1))])
        for at in draw.integers(0, len(data), 2):
            data[at] = int(draw.integers(256))
        folder(tmp_path, "t5", bytes(data))
        try:
            TextTokenizer.open(tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_a_table_of_characters_that_is_whole_is_read() -> None:
    assert read_sentencepieces(SMALL + held(3, held(2, charmap())), "spiece.model").charmap == charmap()


@pytest.mark.parametrize(
    ("added", "what"),
    [
        ([], "must hold tokens by their numbers"),
        ({"a": {"content": "x"}}, "must hold tokens by their numbers"),
        ({"²": {"content": "x"}}, "must hold tokens by their numbers"),
        ({"1234567890": {"content": "x"}}, "must hold tokens by their numbers"),
        ({"400": "x"}, "must hold tokens by their numbers"),
        ({"400": {"content": 4}}, "must hold tokens by their numbers"),
        ({"123456789": {"content": "x"}}, "an added token has another number in the vocabulary"),
    ],
)
def test_added_tokens_that_have_no_place(added: object, what: str, tmp_path: Path) -> None:
    folder(tmp_path, "t5", SMALL, added_tokens_decoder=added)
    with pytest.raises(CheckpointError, match=f"tokenizer_config.json: .*{what}"):
        TextTokenizer.open(tmp_path)


def test_a_vocabulary_without_what_its_kind_needs(tmp_path: Path) -> None:
    folder(tmp_path, "albert", SMALL, do_lower_case=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "albert"}))
    with pytest.raises(CheckpointError, match="lacks a special token"):
        TextTokenizer.open(tmp_path)
    folder(tmp_path, "t5", SMALL, extra_ids=-1)
    with pytest.raises(CheckpointError, match="extra_ids must be an integer from 0"):
        TextTokenizer.open(tmp_path)
