"""Vocabularies in the files that preceded tokenizer.json, built as the tokenizers library builds them.

    vocab.txt                     WordPiece, a token a line: BERT, DistilBERT, ELECTRA, MPNet
    vocab.json and merges.txt     byte-level BPE: GPT-2, OPT, RoBERTa, BART; CLIP, whose words end in </w>

config.json's model_type, or tokenizer_config.json's tokenizer_class, selects the tokenization. Sources: the classes of
these names in Hugging Face transformers, which build the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from treadle.files.shown_names import printable
from treadle.files.strict_json import read_json_object
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.vocabularies.special_tokens import (
    add_named_tokens,
    lacks_special_token,
    put_around,
    read_special_tokens,
)
from treadle.ir.errors import CheckpointError

_WORDS, _TOKENS, _MERGES = "vocab.txt", "vocab.json", "merges.txt"
_MOST_TOKENS = 4_000_000

_END_OF_TEXT = "<|endoftext|>"
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class _Parts:
    """The contents of a folder from which a tokenizer is built.

    special   the names of special tokens, by role
    settings  content of tokenizer_config.json
    """

    tokenizers: Any
    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]
    special: Mapping[str, str]
    settings: Mapping[str, Any]

    def put_between(self, first: str, last: str, *, trims: bool = False, prefix: bool = False) -> Any:
        """Return the processor that puts a text between the special tokens of two roles.

        trims   True if offsets exclude the space before a word
        prefix  True if a space is added before the first word
        """
        begin, end = ((self.special[role], self.vocabulary[self.special[role]]) for role in (first, last))
        return self.tokenizers.processors.RobertaProcessing(end, begin, trim_offsets=trims, add_prefix_space=prefix)


@dataclass(frozen=True)
class _Kind:
    """The construction of one kind of vocabulary.

    build    function that builds the tokenizer
    special  default names of special tokens, used unless the folder defines others
    strips   by role, a pair: True if the token includes the space before it, as the model was trained, and the same for
             the space after it
    around   True if `add_bos_token` and `add_eos_token` put tokens around a text
    """

    build: Callable[[_Parts], Any]
    special: Mapping[str, str]
    strips: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)
    around: bool = False


def build_older_tokenizer(place: ModelFolder, settings: Mapping[str, Any], limit_bytes: int) -> Any | None:
    """Build the folder's vocabulary as a `tokenizers.Tokenizer`. Return None if the folder has no such files, or an
    unsupported kind.

    settings  content of tokenizer_config.json

    Raises CheckpointError if a file is damaged or too long.
    """
    import tokenizers

    names = kind_names(place, settings)
    vocabulary: dict[str, int] = {}
    merges: list[tuple[str, str]] = []
    if place.has(_WORDS):
        kind = next((_WORDPIECE[name] for name in names if name in _WORDPIECE), None)
        vocabulary = _read_words(place, limit_bytes) if kind else {}
        shown = place.show(_WORDS)
    elif place.has(_TOKENS) and place.has(_MERGES):
        kind = next((_BYTE_LEVEL[name] for name in names if name in _BYTE_LEVEL), None)
        if kind:
            vocabulary, merges = _read_tokens(place, limit_bytes)
        shown = place.show(_TOKENS)
    else:
        return None
    if kind is None:
        return None
    named = read_special_tokens(settings)
    special = {**kind.special, **named}
    needed = [special[role] for role in kind.special if role != "mask_token"]
    missing = [name for name in needed if name not in vocabulary]
    if missing:
        raise lacks_special_token(missing[0], shown)
    made = kind.build(_Parts(tokenizers, vocabulary, merges, special, settings))
    if kind.around:
        put_around(tokenizers, made, {"bos_token": _END_OF_TEXT, **special}, settings, shown)
    if special.get("mask_token") not in vocabulary and "mask_token" not in named:
        special.pop("mask_token", None)
    add_named_tokens(tokenizers, made, special, settings, shown, strips=kind.strips)
    return made


def _wordpiece(parts: _Parts) -> Any:
    tokenizers, settings, special = parts.tokenizers, parts.settings, parts.special
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(parts.vocabulary, unk_token=special["unk_token"]))
    lower, accents = settings.get("do_lower_case", True), settings.get("strip_accents")
    made.normalizer = tokenizers.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True) is not False,
        strip_accents=accents if isinstance(accents, bool) else None,
        lowercase=lower is not False,
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece(prefix="##")
    first, last = special["cls_token"], special["sep_token"]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(first, parts.vocabulary[first]), (last, parts.vocabulary[last])],
    )
    return made


def _mpnet(parts: _Parts) -> Any:
    made = _wordpiece(parts)
    made.post_processor = parts.put_between("cls_token", "sep_token", trims=True)
    return made


def _byte_level(parts: _Parts) -> Any:
    tokenizers = parts.tokenizers
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=parts.vocabulary, merges=parts.merges, fuse_unk=False))
    prefix = parts.settings.get("add_prefix_space") is True
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


def _roberta(parts: _Parts) -> Any:
    made = _byte_level(parts)
    made.post_processor = parts.put_between(
        "cls_token",
        "sep_token",
        trims=parts.settings.get("trim_offsets", True) is not False,
        prefix=parts.settings.get("add_prefix_space") is True,
    )
    return made


def _clip(parts: _Parts) -> Any:
    tokenizers = parts.tokenizers
    model = tokenizers.models.BPE(
        vocab=parts.vocabulary,
        merges=parts.merges,
        end_of_word_suffix="</w>",
        fuse_unk=False,
        unk_token=parts.special["unk_token"],
    )
    made = tokenizers.Tokenizer(model)
    normalize, pre = tokenizers.normalizers, tokenizers.pre_tokenizers
    made.normalizer = normalize.Sequence(
        [normalize.NFC(), normalize.Replace(tokenizers.Regex(r"\s+"), " "), normalize.Lowercase()]
    )
    words = pre.Split(tokenizers.Regex(_CLIP_WORDS), behavior="removed", invert=True)
    made.pre_tokenizer = pre.Sequence([words, pre.ByteLevel(add_prefix_space=False)])
    back = tokenizers.decoders
    made.decoder = back.Sequence(
        [back.ByteLevel(), back.Replace(tokenizers.Regex("</w>$"), ""), back.Replace("</w>", " ")]
    )
    made.post_processor = parts.put_between("bos_token", "eos_token")
    return made


_BERT = _Kind(
    _wordpiece,
    {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
)
_MASK = {"mask_token": (True, False)}
_ROBERTA = _Kind(
    _roberta,
    {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"},
    _MASK,
)
_MPNET = _Kind(_mpnet, {**_ROBERTA.special, "unk_token": "[UNK]"}, _MASK)
_GPT2 = _Kind(_byte_level, {"eos_token": _END_OF_TEXT}, around=True)
_CLIP = _Kind(_clip, {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"})

_WORDPIECE = {**dict.fromkeys(("bert", "distilbert", "electra"), _BERT), "mpnet": _MPNET}
_BYTE_LEVEL = {
    **dict.fromkeys(("gpt2", "opt"), _GPT2),
    **dict.fromkeys(("roberta", "bart"), _ROBERTA),
    **dict.fromkeys(("clip", "clip_text_model"), _CLIP),
}


def kind_names(place: ModelFolder, settings: Mapping[str, Any]) -> list[str]:
    """Return the folder's names for its tokenizer: the class of tokenizer_config.json first, then config.json's
    model_type.
    """
    names = []
    named = settings.get("tokenizer_class")
    if isinstance(named, str):
        names.append(named.removesuffix("Fast").removesuffix("Tokenizer").lower())
    if place.has("config.json"):
        names.append(str(place.config.get("model_type")))
    return names


def _read_words(place: ModelFolder, limit_bytes: int) -> dict[str, int]:
    shown = place.show(_WORDS)
    lines = _read_text(place, _WORDS, limit_bytes).split("\n")
    if lines and not lines[-1]:
        lines.pop()
    vocabulary = {line.rstrip("\r"): number for number, line in enumerate(lines)}
    if len(vocabulary) != len(lines):
        raise CheckpointError(
            "the vocabulary contains a token twice",
            received=f"{len(lines)} lines, {len(vocabulary)} tokens",
            within=shown,
        )
    return vocabulary


def _read_tokens(place: ModelFolder, limit_bytes: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    shown = place.show(_TOKENS)
    data = place.read(_TOKENS, limit_bytes, "limit_bytes=")
    vocabulary = read_json_object(data, shown, nesting=2, values=_MOST_TOKENS)
    numbers = list(vocabulary.values())
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in numbers):
        raise CheckpointError("the vocabulary must give each token a number, 0 or more", within=shown)
    if len(set(numbers)) != len(numbers):
        raise CheckpointError("two tokens of the vocabulary have the same id", within=shown)
    merges = []
    for number, line in enumerate(_read_text(place, _MERGES, limit_bytes).split("\n")):
        if not line.strip() or (number == 0 and line.startswith("#version")):
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if not left or not right or " " in right or not {left, right, left + right} <= vocabulary.keys():
            raise CheckpointError(
                "a merge must be two tokens, separated by a space, that make a third",
                received=printable(line, 80),
                within=f"{place.show(_MERGES)}, line {number + 1}",
            )
        merges.append((left, right))
    return vocabulary, merges


def _read_text(place: ModelFolder, name: str, limit_bytes: int) -> str:
    data = place.read(name, limit_bytes, "limit_bytes=")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            "the file is not UTF-8", received=f"byte {error.start}", within=place.show(name)
        ) from None
