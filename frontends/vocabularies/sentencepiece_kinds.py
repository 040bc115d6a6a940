"""Tokenizers of SentencePiece vocabularies, built for each kind of model as Hugging Face builds them.

    t5, albert, siglip             unigram, each with an extra normalization before the file's
    xlm-roberta, camembert         unigram, with ids shifted by fairseq's special tokens
    llama, gemma                   BPE, with bytes for unknown characters
    if no class is named           as the file itself declares

Sources: the classes of these names in Hugging Face transformers 5, which build the same parts; Kudo 2018 for unigram.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from treadle.frontends.vocabularies.sentencepiece_file import BPE, NORMAL, UNIGRAM, USER_DEFINED, SentencePieces
from treadle.frontends.vocabularies.special_tokens import lacks_special_token, put_around
from treadle.ir.errors import CheckpointError

_SPACE = "▁"
_MOST_EXTRA = 10_000


@dataclass(frozen=True)
class PieceVocabulary:
    """The inputs of a tokenizer's construction.

    library   the module tokenizers
    file      content of the folder's file; shown, the name of the file
    special   the names of special tokens by their roles
    settings  content of tokenizer_config.json
    """

    library: Any
    file: SentencePieces
    shown: str
    special: Mapping[str, str]
    settings: Mapping[str, Any]

    def scores(self) -> list[tuple[str, float]]:
        """The pieces with their scores."""
        return [(piece.text, piece.score) for piece in self.file.pieces]

    def control(self, *roles: str) -> list[tuple[str, float]]:
        """Return special tokens as pieces."""
        return [(self.special[role], 0.0) for role in roles]

    def numbered(self, made: Any, *roles: str) -> list[tuple[str, int]]:
        """Return special tokens with their numbers. Raises CheckpointError for a token that the vocabulary lacks."""
        found = [(self.special[role], made.token_to_id(self.special[role])) for role in roles]
        for token, number in found:
            if number is None:
                raise lacks_special_token(token, self.shown)
        return found

    def flag(self, name: str, default: bool) -> bool:
        value = self.settings.get(name)
        return value if isinstance(value, bool) else default


@dataclass(frozen=True)
class PieceKind:
    """The construction of one kind of vocabulary.

    build    function that builds the tokenizer without its special tokens, and returns additional special tokens
    special  default names of special tokens, used unless the folder lists others
    model    required kind of the file: UNIGRAM or BPE; None: both are accepted
    strips   roles of tokens that include the space before them, or the spaces around them
    plain    True if the file's control pieces are not special tokens
    """

    build: Callable[[PieceVocabulary], tuple[Any, list[str]]]
    special: Mapping[str, str]
    model: int | None = UNIGRAM
    strips: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)
    plain: bool = False


# -- unigram ---------------------------------------------------------------------------------------------------


def _unigram(v: PieceVocabulary, scores: list[tuple[str, float]], unknown: int, first: list[Any]) -> Any:
    """Build a tokenizer of words, each with a space before it. `first` runs before the file's own normalization."""
    library = v.library
    made = library.Tokenizer(library.models.Unigram(scores, unk_id=unknown, byte_fallback=False))
    normalizers = [*first, *([library.normalizers.Precompiled(v.file.charmap)] if v.file.charmap else [])]
    if normalizers:
        made.normalizer = library.normalizers.Sequence(normalizers)
    scheme = "always" if v.flag("add_prefix_space", True) else "never"
    pre = library.pre_tokenizers
    made.pre_tokenizer = pre.Sequence(
        [pre.WhitespaceSplit(), pre.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=True)]
    )
    made.decoder = library.decoders.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=True)
    return made


def _ended(v: PieceVocabulary, made: Any) -> Any:
    """Add the end token after each text."""
    end = v.special["eos_token"]
    made.post_processor = v.library.processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=v.numbered(made, "eos_token")
    )
    return made


def _t5(v: PieceVocabulary) -> tuple[Any, list[str]]:
    count = v.settings.get("extra_ids", 100)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= _MOST_EXTRA:
        raise CheckpointError(
            f"tokenizer_config.json: extra_ids must be an integer from 0 to {_MOST_EXTRA}", received=repr(count)[:80]
        )
    extra = [f"<extra_id_{number}>" for number in reversed(range(count))]
    return _ended(v, _unigram(v, [*v.scores(), *((name, 0.0) for name in extra)], v.file.unknown, [])), extra


def _siglip(v: PieceVocabulary) -> tuple[Any, list[str]]:
    n, regex = v.library.normalizers, v.library.Regex
    lower = [n.Lowercase()] if v.flag("do_lower_case", True) else []
    marks = "".join("\\" + mark for mark in string.punctuation)
    canonical = [*lower, n.Replace(regex(f"[{marks}]"), ""), n.Replace(regex(r"\s+"), " "), n.Strip()]
    return _ended(v, _unigram(v, v.scores(), v.file.unknown, canonical)), []


def _albert(v: PieceVocabulary) -> tuple[Any, list[str]]:
    n = v.library.normalizers
    first = [n.Replace("``", '"'), n.Replace("''", '"')]
    if not v.flag("keep_accents", False):
        first += [n.NFKD(), n.StripAccents()]
    if v.flag("do_lower_case", True):
        first.append(n.Lowercase())
    made = _unigram(v, v.scores(), v.file.unknown, first)
    begin, end = v.special["cls_token"], v.special["sep_token"]
    made.post_processor = v.library.processors.TemplateProcessing(
        single=f"{begin}:0 $A:0 {end}:0",
        pair=f"{begin}:0 $A:0 {end}:0 $B:1 {end}:1",
        special_tokens=v.numbered(made, "cls_token", "sep_token"),
    )
    return made, []


def _enclosed(v: PieceVocabulary, made: Any) -> Any:
    """Add tokens around each text, and two end tokens between the texts of a pair."""
    begin, end = v.special["bos_token"], v.special["eos_token"]
    made.post_processor = v.library.processors.TemplateProcessing(
        single=[begin, "$A", end],
        pair=[begin, "$A", end, end, "$B", end],
        special_tokens=v.numbered(made, "bos_token", "eos_token"),
    )
    return made


def _xlm_roberta(v: PieceVocabulary) -> tuple[Any, list[str]]:
    first, last = v.control("bos_token", "pad_token", "eos_token", "unk_token"), v.control("mask_token")
    return _enclosed(v, _unigram(v, [*first, *v.scores()[3:], *last], 3, [])), []


def _camembert(v: PieceVocabulary) -> tuple[Any, list[str]]:
    (pad, unknown), last = v.control("pad_token", "unk_token"), v.control("mask_token")
    first = [("<s>NOTUSED", 0.0), pad, ("</s>NOTUSED", 0.0), unknown, ("<unk>NOTUSED", -100.0)]
    return _enclosed(v, _unigram(v, [*first, *v.scores()[1:], *last], 3, [])), []


# -- byte pairs ------------------------------------------------------------------------------------------------


def _pairs(v: PieceVocabulary) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary, and the pairs of pieces that merge into a third, in the order of the third's number."""
    vocabulary = {piece.text: number for number, piece in enumerate(v.file.pieces)}
    merges = []
    for text, number in vocabulary.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((number, len(left), len(right), left, right))
    return vocabulary, [(left, right) for *_, left, right in sorted(merges)]


def _llama(v: PieceVocabulary) -> tuple[Any, list[str]]:
    library, (vocabulary, merges) = v.library, _pairs(v)
    made = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True))
    prefix = v.flag("add_prefix_space", True)
    scheme = "never" if not prefix else "always" if v.flag("legacy", False) else "first"
    made.pre_tokenizer = library.pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    d = library.decoders
    steps = [d.Replace(_SPACE, " "), d.ByteFallback(), d.Fuse(), *([d.Strip(content=" ", left=1)] if prefix else [])]
    made.decoder = d.Sequence(steps)
    put_around(v.library, made, v.special, v.settings, v.shown)
    return made, []


def _gemma(v: PieceVocabulary) -> tuple[Any, list[str]]:
    library, (vocabulary, merges) = v.library, _pairs(v)
    unknown = v.special["unk_token"]
    model = library.models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, unk_token=unknown, byte_fallback=True)
    made = library.Tokenizer(model)
    made.normalizer = library.normalizers.Replace(" ", _SPACE)
    d = library.decoders
    made.decoder = d.Sequence([d.Replace(_SPACE, " "), d.ByteFallback(), d.Fuse()])
    put_around(v.library, made, v.special, v.settings, v.shown)
    return made, []


def _own(v: PieceVocabulary) -> tuple[Any, list[str]]:
    """Build the tokenizer that the file declares, with the tokenization of the library that wrote the file."""
    library, file, n = v.library, v.file, v.library.normalizers
    if file.kind == UNIGRAM:
        model = library.models.Unigram(v.scores(), unk_id=file.unknown, byte_fallback=file.bytes)
    else:
        vocabulary = {piece.text: number for number, piece in enumerate(file.pieces)}
        ranks = {p.text: (-p.score, number) for number, p in enumerate(file.pieces) if p.kind == NORMAL}
        merges = sorted(
            (*rank, text[:cut], text[cut:])
            for text, rank in ranks.items()
            for cut in range(1, len(text))
            if text[:cut] in ranks and text[cut:] in ranks
        )
        model = library.models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for *_, left, right in merges],
            unk_token=file.pieces[file.unknown].text,
            fuse_unk=True,
            byte_fallback=file.bytes,
            ignore_merges=any(piece.kind == USER_DEFINED for piece in file.pieces),
        )
    made = library.Tokenizer(model)
    legacy = v.flag("legacy", True)
    steps = [n.Precompiled(file.charmap)] if file.charmap else []
    if file.single:
        steps += [n.Replace(library.Regex(r"\A +| +\z"), ""), n.Replace(library.Regex(" {2,}"), " ")]
    if file.escaped:
        steps.append(n.Replace(" ", _SPACE))
    if file.prefix and legacy:  # the library adds no prefix to a text that begins with the symbol for a space
        steps.append(n.Replace(library.Regex(rf"\A{_SPACE}"), 2 * _SPACE))
    made.normalizer = n.Sequence(steps)
    pre = library.pre_tokenizers
    scheme = "always" if legacy else "first"
    parts = [pre.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)] if file.prefix else []
    if user := sorted((p.text for p in file.pieces if p.kind == USER_DEFINED), key=len, reverse=True):
        parts.append(pre.Split(library.Regex("|".join(map(re.escape, user))), behavior="isolated"))
    if parts:
        made.pre_tokenizer = pre.Sequence(parts)
    d = library.decoders
    back = [d.Replace(_SPACE, " "), *([d.ByteFallback()] if file.bytes else [])]
    back += [d.Fuse(), d.Strip(content=" ", left=1)] if file.prefix else [d.Fuse()] if file.bytes else []
    made.decoder = d.Sequence(back)
    put_around(v.library, made, v.special, v.settings, v.shown)
    return made, []


_AROUND = (True, True)
_BEFORE = (True, False)
_FAIRSEQ = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_T5_KIND = PieceKind(_t5, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"})
_LLAMA_KIND = PieceKind(_llama, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, BPE)
_OWN = PieceKind(_own, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, None)
_GEMMA_TOKENS = {
    "unk_token": "<unk>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_XLM_ROBERTA = PieceKind(_xlm_roberta, _FAIRSEQ)
_GEMMA = PieceKind(_gemma, _GEMMA_TOKENS, BPE)

_KINDS: Mapping[str, PieceKind] = {
    **dict.fromkeys(("t5", "mt5"), _T5_KIND),
    **dict.fromkeys(("xlmroberta", "xlm-roberta"), _XLM_ROBERTA),
    "camembert": PieceKind(_camembert, _FAIRSEQ, strips={"mask_token": _BEFORE}),
    "albert": PieceKind(
        _albert,
        {
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "mask_token": "[MASK]",
        },
    ),
    "siglip": PieceKind(
        _siglip,
        {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"},
        strips=dict.fromkeys(("eos_token", "unk_token", "pad_token"), _AROUND),
        plain=True,
    ),
    **dict.fromkeys(("gemma", "gemma2"), _GEMMA),
}

BY_CLASS = {**_KINDS, "llama": _LLAMA_KIND}
"""Kinds by tokenizer_config.json's tokenizer_class, in lower case and without the endings Tokenizer and Fast."""

BY_TYPE = {**_KINDS, **dict.fromkeys(("llama", "mistral", "phi3"), _OWN)}
"""Kinds by config.json's model_type."""
