"""The vocabulary in a GGUF file's metadata, as a tokenizer: byte-level BPE, which the format calls "gpt2", or
SentencePiece's BPE, which it calls "llama".

    tokenizer = gguf_text_tokenizer(GGUFFile.open(path))
    tokenizer.batch(["The capital of France is"]).ids

    tokenizer.ggml.model            "gpt2" or "llama"
    tokenizer.ggml.tokens           the tokens by id
    tokenizer.ggml.token_type       1 normal, 3 control, 4 defined by a user, ...
    tokenizer.ggml.merges           gpt2: the merges "left right" in order of priority
    tokenizer.ggml.pre              gpt2: pre-tokenizer, which splits text before merging: one of PRE_TOKENIZERS
    tokenizer.ggml.scores           llama: the scores of the tokens
    tokenizer.ggml.add_space_prefix, remove_extra_whitespaces   llama: flags of the SentencePiece file

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the keys; llama.cpp's llama-vocab.cpp for the
splitting of each name of `pre`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from treadle.files.installation import pip_install
from treadle.files.shown_names import printable
from treadle.frontends.gguf_file import GGUFFile
from treadle.frontends.text import TextTokenizer
from treadle.frontends.vocabularies.sentencepiece_file import (
    BPE,
    BYTE,
    CONTROL,
    MOST_CHARACTERS,
    NORMAL,
    USER_DEFINED,
    SentencePieces,
    VocabularyPiece,
)
from treadle.frontends.vocabularies.sentencepiece_kinds import BY_TYPE, PieceVocabulary
from treadle.ir.errors import CheckpointError, FrontendError

_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
_TYPES, _SCORES = "tokenizer.ggml.token_type", "tokenizer.ggml.scores"

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PRE_TOKENIZERS = {
    "default": (None, False),
    "gpt-2": (None, False),
    "smollm": (None, True),
    "llama-bpe": (_WORDS + r"\p{N}{1,3}" + _REST, False),
    "qwen2": (_WORDS + r"\p{N}" + _REST, False),
}
"""Pre-tokenizers by name: a regular expression (None: GPT-2's own), and True if digits are first split into single
ones.
"""


def build_gguf_tokenizer(file: GGUFFile) -> Any:
    """Build the file's vocabulary as a `tokenizers.Tokenizer`.

    Raises CheckpointError, with the key, if the vocabulary is missing, damaged or of an unsupported kind, and
    FrontendError if the tokenizers library is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise FrontendError(
            "reading text needs the package tokenizers", received=str(error), hint=pip_install("text")
        ) from error
    kind = file.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        received = f"{printable(kind)}; supported: gpt2, llama"
        file.fail("tokenizer.ggml.model", "is a vocabulary that is not supported yet", received)
    tokens = file.texts(_TOKENS)
    if len(set(tokens)) != len(tokens):
        file.fail(_TOKENS, "holds a token twice", f"{len(tokens)} tokens, {len(set(tokens))} different ones")
    return (_build_sentencepieces if kind == "llama" else _build_byte_level)(tokenizers, file, tokens)


def _build_byte_level(tokenizers: Any, file: GGUFFile, tokens: list[str]) -> Any:
    cut = file.text("tokenizer.ggml.pre", "default")
    if cut not in PRE_TOKENIZERS:
        file.fail("tokenizer.ggml.pre", "is not known", f"{printable(cut)}; known: {', '.join(PRE_TOKENIZERS)}")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = []
    for merge in file.texts(_MERGES):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            file.fail(_MERGES, "must hold two tokens each, separated by a space", printable(merge))
        merges.append((left, right))

    def build() -> Any:
        # Llama 3's vocabulary contains whole words that no sequence of merges produces.
        model = tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe")
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = _pre_tokenizer(tokenizers, *PRE_TOKENIZERS[cut])
        made.decoder = tokenizers.decoders.ByteLevel()
        if cut == "qwen2":
            made.normalizer = tokenizers.normalizers.NFC()
        _add_special_tokens(tokenizers, made, file, tokens)
        if file.flag("tokenizer.ggml.add_bos_token", False):
            first = tokens[_token_id(file, "tokenizer.ggml.bos_token_id", len(tokens))]
            made.post_processor = tokenizers.processors.TemplateProcessing(
                single=["first", "$A"],
                special_tokens=[{"id": "first", "ids": [vocabulary[first]], "tokens": [first]}],
            )
        return made

    return _guarded(build, file)


def _build_sentencepieces(tokenizers: Any, file: GGUFFile, tokens: list[str]) -> Any:
    kinds, scores = _of_tokens(file, _TYPES, tokens, "type"), _of_tokens(file, _SCORES, tokens, "score")
    if not np.isfinite(scores).all():
        file.fail(_SCORES, "must be finite numbers")
    entries = [VocabularyPiece(*entry) for entry in zip(tokens, scores.tolist(), kinds.tolist(), strict=True)]
    longest = max((len(each.text) for each in entries if each.kind == NORMAL), default=0)
    if longest > MOST_CHARACTERS:
        file.fail(_TOKENS, f"must be of at most {MOST_CHARACTERS} characters", f"{longest}")
    unknown = _token_id(file, "tokenizer.ggml.unknown_token_id", len(tokens), 0)
    pieces = SentencePieces(
        tuple(entries),
        BPE,
        unknown,
        b"",
        bytes=BYTE in kinds,
        prefix=file.flag("tokenizer.ggml.add_space_prefix", True),
        single=file.flag("tokenizer.ggml.remove_extra_whitespaces", False),
    )
    ends = (("bos", 1), ("eos", 2))
    numbers = {role: _token_id(file, f"tokenizer.ggml.{role}_token_id", len(tokens), n) for role, n in ends}
    special = {f"{role}_token": tokens[number] for role, number in numbers.items()}
    settings = {f"add_{role}_token": file.flag(f"tokenizer.ggml.add_{role}_token", role == "bos") for role, _ in ends}

    def build() -> Any:
        shown = f"{file.path}: key {_TOKENS}"
        made, _ = BY_TYPE["llama"].build(PieceVocabulary(tokenizers, pieces, shown, special, settings))
        _add_special_tokens(tokenizers, made, file, tokens)
        return made

    return _guarded(build, file)


def _of_tokens(file: GGUFFile, key: str, tokens: list[str], noun: str) -> npt.NDArray[Any]:
    """Return an array with a number for each token; `noun` is its meaning."""
    found = file.numbers(key)
    if len(found) != len(tokens):
        file.fail(key, f"must have a {noun} for each token", f"{len(found)} {noun}s, {len(tokens)} tokens")
    return found


def gguf_text_tokenizer(file: GGUFFile, *, max_tokens: int | None = None) -> TextTokenizer:
    """Return the file's tokenizer, which truncates texts to `max_tokens` ids. Raises as `build_gguf_tokenizer` does."""
    made = build_gguf_tokenizer(file)
    if max_tokens is not None:
        made.enable_truncation(max_tokens)
    tokens = file.texts(_TOKENS)
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    keys = {f"{ours}_token": f"tokenizer.ggml.{theirs}_token_id" for ours, theirs in roles.items()}
    special = {role: tokens[_token_id(file, key, len(tokens))] for role, key in keys.items() if file.has(key)}
    return TextTokenizer(made, max_tokens, special)


def gguf_end_tokens(file: GGUFFile) -> tuple[int, ...]:
    """Return the ids that stop generation: the ends of the text, of the turn and of the message, if the file has
    them.
    """
    count = len(file.texts(_TOKENS))
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(_token_id(file, key, count) for key in keys if file.has(key)))


def gguf_chat_template(file: GGUFFile) -> str | None:
    """Return the model's chat template, if it was trained with one."""
    key = "tokenizer.chat_template"
    return file.text(key) if file.has(key) else None


def _token_id(file: GGUFFile, key: str, count: int, default: int | None = None) -> int:
    """Return the id of a token. A default that the vocabulary lacks counts as missing."""
    return file.integer(key, default if default is not None and default < count else None, least=0, most=count - 1)


def _add_special_tokens(tokenizers: Any, tokenizer: Any, file: GGUFFile, tokens: list[str]) -> None:
    """Add the tokens that are matched as a whole."""
    kinds = _of_tokens(file, _TYPES, tokens, "type") if file.has(_TYPES) else ()
    for kind, token in zip(kinds, tokens, strict=False):
        if kind in (CONTROL, USER_DEFINED) and token:
            added = tokenizers.AddedToken(token, normalized=False, special=bool(kind == CONTROL))
            (tokenizer.add_special_tokens if kind == CONTROL else tokenizer.add_tokens)([added])


def _pre_tokenizer(tokenizers: Any, pattern: str | None, single_digits: bool) -> Any:
    pre = tokenizers.pre_tokenizers
    steps = [pre.Digits(individual_digits=True)] if single_digits else []
    if pattern is not None:
        steps.append(pre.Split(tokenizers.Regex(pattern), behavior="isolated", invert=False))
    return pre.Sequence([*steps, pre.ByteLevel(add_prefix_space=False, use_regex=pattern is None)])


def _guarded(build: Callable[[], Any], file: GGUFFile) -> Any:
    """Return the result of a call of the library for a vocabulary. Its errors, and panics of its Rust code, become
    CheckpointError.
    """
    try:
        return build()
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            "the vocabulary is damaged", received=printable(str(error), 400), within=f"{file.path}: key {_TOKENS}"
        ) from None
