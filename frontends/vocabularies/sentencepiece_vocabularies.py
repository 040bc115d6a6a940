"""A folder's SentencePiece vocabulary as a tokenizer, with its special tokens and its added tokens.

    spiece.model                   T5, mT5, ALBERT, SigLIP: unigram
    sentencepiece.bpe.model        XLM-R, CamemBERT: unigram, whose numbers their first training shifted
    tokenizer.model                Llama, Mistral, Gemma: BPE, with bytes for unknown characters; if no class is named,
                                   as the file itself declares

config.json's model_type, or tokenizer_config.json's tokenizer_class, selects the tokenization (`sentencepiece_kinds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from treadle.files.contained_files import read_regular
from treadle.files.shown_names import printable
from treadle.frontends.huggingface import ModelFolder
from treadle.frontends.vocabularies.older_vocabularies import kind_names, read_special_tokens
from treadle.frontends.vocabularies.sentencepiece_file import CONTROL, UNIGRAM, USER_DEFINED, read_sentencepieces
from treadle.frontends.vocabularies.sentencepiece_kinds import BY_CLASS, BY_TYPE, PieceKind, PieceVocabulary
from treadle.ir.errors import CheckpointError

FILES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


def build_sentencepiece_tokenizer(place: ModelFolder, settings: Mapping[str, Any], limit_bytes: int) -> Any | None:
    """Build the folder's vocabulary as a `tokenizers.Tokenizer`; None if it has none, or a kind that is not built here.

    settings  tokenizer_config.json

    Raises CheckpointError if the file is damaged or too long.
    """
    import tokenizers

    name = next((name for name in FILES if place.has(name)), None)
    kind = _kind(kind_names(place, settings), "tokenizer_class" in settings)
    if name is None or kind is None:
        return None
    shown = place.show(name)
    file = read_sentencepieces(read_regular(place.file(name), limit_bytes, shown, "limit_bytes="), shown)
    if kind.model not in (None, file.kind):
        raise CheckpointError(
            "the vocabulary does not match the folder's tokenizer class or model type",
            received="unigram" if file.kind == UNIGRAM else "bpe",
            within=shown,
            hint="config.json's model_type, or tokenizer_config.json's tokenizer_class, selects it",
        )
    special = {**kind.special, **read_special_tokens(settings)}
    made, extra = kind.build(PieceVocabulary(tokenizers, file, shown, special, settings))
    user, control = ([p.text for p in file.pieces if p.kind == each] for each in (USER_DEFINED, CONTROL))
    made.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in user])
    listed = _listed(settings)
    tokens = {token: {"special": True, "normalized": False} for token in extra}
    for role in sorted(special, key=lambda role: (_ROLES.index(role) if role in _ROLES else len(_ROLES), role)):
        left, right = _strips(settings, role, kind.strips.get(role))
        tokens[special[role]] = {"special": True, "normalized": False, "lstrip": left, "rstrip": right}
    tokens |= {
        token: {"special": True, "normalized": False} for token in control if not kind.plain and token not in tokens
    }
    for number, options in sorted(listed.items()):
        token = options["content"]
        tokens.pop(token, None)
        made.add_tokens([tokenizers.AddedToken(token, **{name: options.get(name) is True for name in _FLAGS})])
        if made.token_to_id(token) != number:
            raise CheckpointError(
                "tokenizer_config.json: an added token has another number in the vocabulary",
                received=f"{printable(token)}, {number} and {made.token_to_id(token)}",
                within=shown,
            )
    made.add_special_tokens([tokenizers.AddedToken(token, **options) for token, options in tokens.items()])
    return made


_FLAGS = ("lstrip", "rstrip", "normalized", "special", "single_word")


def _kind(names: Sequence[str], has_class: bool) -> PieceKind | None:
    """Return the kind for the names that a folder gives; a class takes precedence over a type."""
    found = [BY_CLASS.get(name) if has_class and n == 0 else BY_TYPE.get(name) for n, name in enumerate(names)]
    return next((kind for kind in found if kind is not None), None)


_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""In the order in which tokens that the file lacks get their numbers."""


def _listed(settings: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Tokens that tokenizer_config.json adds, by their numbers."""
    given = settings.get("added_tokens_decoder")
    if given is None:
        return {}
    if isinstance(given, Mapping) and all(
        key.isascii()
        and key.isdigit()
        and len(key) < 10
        and isinstance(token, Mapping)
        and isinstance(token.get("content"), str)
        for key, token in given.items()
    ):
        return {int(key): token for key, token in given.items()}
    raise CheckpointError("tokenizer_config.json: added_tokens_decoder must hold tokens by their numbers")


def _strips(settings: Mapping[str, Any], role: str, default: tuple[bool, bool] | None) -> tuple[bool, bool]:
    """Whether the space before a special token and the space behind it belong to it."""
    given = settings.get(role)
    if isinstance(given, Mapping):
        return given.get("lstrip") is True, given.get("rstrip") is True
    return default or (False, False)
