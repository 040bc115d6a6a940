"""A folder's SentencePiece vocabulary as a tokenizer, with its special tokens and its added tokens.

    spiece.model                   T5, mT5, ALBERT, SigLIP: unigram
    sentencepiece.bpe.model        XLM-R, CamemBERT: unigram, with ids shifted by fairseq's special tokens
    tokenizer.model                Llama, Mistral, Gemma: BPE, with bytes for unknown characters; if no class is named,
                                   as the file itself declares

config.json's model_type, or tokenizer_config.json's tokenizer_class, selects the tokenization (`sentencepiece_kinds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.vocabularies.older_vocabularies import kind_names
from treadle.frontends.vocabularies.sentencepiece_file import CONTROL, UNIGRAM, USER_DEFINED, read_sentencepieces
from treadle.frontends.vocabularies.sentencepiece_kinds import BY_CLASS, BY_TYPE, PieceKind, PieceVocabulary
from treadle.frontends.vocabularies.special_tokens import add_named_tokens, read_special_tokens
from treadle.ir.errors import CheckpointError

FILES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


def build_sentencepiece_tokenizer(place: ModelFolder, settings: Mapping[str, Any], limit_bytes: int) -> Any | None:
    """Build the folder's vocabulary as a `tokenizers.Tokenizer`. Return None if the folder has none, or an unsupported
    kind.

    settings  content of tokenizer_config.json

    Raises CheckpointError if the file is damaged or too long.
    """
    import tokenizers

    name = next((name for name in FILES if place.has(name)), None)
    kind = _kind(kind_names(place, settings), "tokenizer_class" in settings)
    if name is None or kind is None:
        return None
    shown = place.show(name)
    file = read_sentencepieces(place.read(name, limit_bytes, "limit_bytes="), shown)
    if kind.model not in (None, file.kind):
        raise CheckpointError(
            "the vocabulary does not match the folder's tokenizer class or model type",
            received="unigram" if file.kind == UNIGRAM else "bpe",
            within=shown,
            hint="another model_type in config.json, or another tokenizer_class in tokenizer_config.json",
        )
    special = {**kind.special, **read_special_tokens(settings)}
    made, extra = kind.build(PieceVocabulary(tokenizers, file, shown, special, settings))
    user, control = ([p.text for p in file.pieces if p.kind == each] for each in (USER_DEFINED, CONTROL))
    made.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in user])
    control = [] if kind.plain else control
    add_named_tokens(tokenizers, made, special, settings, shown, strips=kind.strips, before=extra, after=control)
    return made


def is_sentencepiece_kind(place: ModelFolder, settings: Mapping[str, Any]) -> bool:
    """Return True if tokenizers of the folder's kind are built from a SentencePiece file."""
    return _kind(kind_names(place, settings), "tokenizer_class" in settings) is not None


def _kind(names: Sequence[str], has_class: bool) -> PieceKind | None:
    """Return the kind for the names that a folder gives. The name of a class takes precedence over the name of a
    type.
    """
    found = [BY_CLASS.get(name) if has_class and n == 0 else BY_TYPE.get(name) for n, name in enumerate(names)]
    return next((kind for kind in found if kind is not None), None)
