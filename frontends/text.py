"""Text as token ids: the vocabulary of a model's folder, run by the tokenizers library.

    tokenizer = TextTokenizer.open(folder)
    batch = tokenizer.batch(["a cat", "a longer sentence"])
    batch.ids        # i64[2, S], padded to the longest
    batch.lengths    # i64[2], number of ids of each row without padding

Source: the format of Hugging Face tokenizers, https://huggingface.co/docs/tokenizers. The file holds data only. The
project's own padding replaces the file's.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from treadle.files.contained_files import PathLike
from treadle.files.installation import pip_install
from treadle.files.shown_names import printable
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.vocabularies.folder_vocabulary import (
    FILE,
    FILE_BYTES,
    OLDER,
    SETTINGS,
    TEXT_FILES,
    FolderVocabulary,
    guarded,
)
from treadle.frontends.vocabularies.special_tokens import read_special_tokens, read_tokenizer_settings
from treadle.ir.errors import CheckpointError, FrontendError, UsageError
from treadle.ir.source_lines import user_line
from treadle.ir.wording.checked_calls import with_checked_call
from treadle.ir.wording.other_interfaces import TOKENIZER_ATTRIBUTES
from treadle.ir.wording.unknown_attributes import with_attribute_hints

_INPUT_NAMES = ("input_ids", "attention_mask")
_UNLIMITED = 1 << 31  # files say 10^30 for no limit


@dataclass(frozen=True)
class TokenBatch:
    """Texts as ids.

    ids      i64[B, S], each row padded at its end to the longest
    lengths  i64[B], number of ids of each row without padding, special tokens included
    cut      bool[B], True if a text was longer than the limit and was truncated
    """

    ids: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    cut: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class EncodedText:
    """A text, or a pair of texts, as ids; every field has an entry for each id.

    ids      of the vocabulary
    types    0 for tokens of the first text, 1 for the second, as the model was trained
    offsets  character range of each token in its text: start, end (exclusive)
    parts    the text of each token, 0 or 1; None for a special token
    words    the number of its word in its text; None for a special token
    cut      True if the text was truncated or, with windows, if more windows follow
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    parts: tuple[int | None, ...]
    words: tuple[int | None, ...]
    cut: bool

    @classmethod
    def of(cls, encoding: Any) -> EncodedText:
        """Build from the library's encoding."""
        return cls(
            tuple(encoding.ids),
            tuple(encoding.type_ids),
            tuple(encoding.offsets),
            tuple(encoding.sequence_ids),
            tuple(encoding.word_ids),
            bool(encoding.overflowing),
        )

    def __len__(self) -> int:
        return len(self.ids)


_ELSEWHERE = {
    "padding": "leave it out: a batch is padded to its longest text",
    "return_tensors": "leave it out: a batch has arrays",
    **dict.fromkeys(("truncation", "max_length"), "leave it out: a text longer than tokenizer.max_tokens is truncated"),
}
"""Options of Hugging Face's tokenizers, with what `batch` does."""


@with_attribute_hints("a tokenizer", TOKENIZER_ATTRIBUTES)
class TextTokenizer:
    """The tokenizer of a model's folder."""

    def __init__(
        self,
        tokenizer: Any,
        max_tokens: int | None,
        special: Mapping[str, str] = MappingProxyType({}),
        input_names: Sequence[str] = _INPUT_NAMES,
        beyond: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """Wrap `tokenizer`, a `tokenizers.Tokenizer` without padding; texts are truncated to `max_tokens` ids.

        special      the names of special tokens by their roles, such as mask_token, as far as the folder lists them
        input_names  the model's inputs besides ids, by Hugging Face's names: attention_mask if it takes padding
        beyond       the names of added tokens that the model does not have, by id: a text with one of them is an error
        """
        self._tokenizer, self._beyond = tokenizer, beyond
        self.special_names = special
        self.input_names = tuple(input_names)
        self.max_tokens = max_tokens

    @classmethod
    def open(
        cls,
        folder: PathLike | ModelFolder,
        *,
        max_tokens: int | None = None,
        context: int | None = None,
        cut: bool = True,
        limit_bytes: int = FILE_BYTES,
    ) -> TextTokenizer:
        """Read tokenizer.json of a model's folder, or of its place in a hub cache; else one of the older forms.

        max_tokens   maximum length of texts, special tokens included; by default the value in tokenizer_config.json
                     (model_max_length), else in tokenizer.json (truncation)
        context      number of the model's positions: texts are truncated to it, whatever the files say
        cut          False keeps texts whole, whatever their length
        limit_bytes  the longest file that is read

        Raises CheckpointError if the file is missing, leads out of the folder, is too long or damaged, and
        FrontendError if the tokenizers library is not installed.
        """
        try:
            import tokenizers  # noqa: F401
        except ImportError as error:
            raise FrontendError(
                "reading text needs the package tokenizers",
                received=str(error),
                hint=pip_install("text"),
            ) from error
        try:
            place = ModelFolder.find(folder)
        except CheckpointError as error:
            if not isinstance(folder, ModelFolder) and not os.path.isdir(folder):
                call = f"treadle.ModelSource.open({os.fspath(folder)!r}).tokenizer()"
                error.hint = f"{call}, if this names a model that is not a folder; else {error.hint}"
            raise
        shown = place.show(FILE)
        made, truncation = place.once((FILE, limit_bytes), lambda: FolderVocabulary.read(place, limit_bytes)).take()
        made.no_padding()
        settings = read_tokenizer_settings(place, limit_bytes)
        asked = max_tokens if max_tokens is not None else _longest_input(settings)
        if asked is None and truncation is not None:
            asked = int(truncation["max_length"])
        most = min((n for n in (asked, context) if n is not None), default=None) if cut else None
        if most is None:
            made.no_truncation()
        else:
            guarded(lambda: made.enable_truncation(most), f"texts cannot be truncated to {most} tokens", shown)
        named = settings.get("model_input_names")
        names = [str(name) for name in named] if isinstance(named, list) else _INPUT_NAMES
        return cls(made, most, read_special_tokens(settings), names)

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Raise UsageError: the tokenizers of Hugging Face are called, and this one has methods."""
        hint = 'tokenizer.ids(["a text"])[0], a list of ids; tokenizer.batch(["a", "b"]), one padded array'
        raise UsageError("a tokenizer is not callable", source=str(user_line() or "") or None, hint=hint)

    @with_checked_call(_ELSEWHERE)
    def batch(self, texts: Sequence[str]) -> TokenBatch:
        """Return texts as one padded array. Raises UsageError if there are none, for a text that is not valid
        Unicode, and as `for_model` says.
        """
        if not texts:
            raise UsageError("there is no text")
        for text in texts:
            if not text.isascii():
                _refuse_surrogates(text)
        encoded = guarded(lambda: self._tokenizer.encode_batch(list(texts)), "the tokenizer failed on a text", FILE)
        self._refuse_beyond(encoded)
        lengths = np.array([len(e.ids) for e in encoded], np.int64)
        ids = np.zeros((len(encoded), max(1, int(lengths.max()))), np.int64)
        for row, e in zip(ids, encoded, strict=True):
            row[: len(e.ids)] = e.ids
        return TokenBatch(ids, lengths, np.array([bool(e.overflowing) for e in encoded]))

    def encode(
        self, texts: Sequence[str | tuple[str, str]], *, windows: tuple[int, int] | None = None, special: bool = True
    ) -> list[list[EncodedText]]:
        """Return each text, or pair, as ids with offsets. A text that is too long is truncated; of a pair, the longer
        text.

        windows  (most, step): instead, the second text of a pair is split into windows, so that each, with the first
                 text and special tokens, has at most `most` ids, and overlaps the next by `step`; all are returned
        special  True if special tokens are added

        Raises UsageError for a text that is not valid Unicode, and if windows leave no room for the second text.
        """
        _refuse_one_text(texts, "encode")
        for text in texts:
            for part in (text,) if isinstance(text, str) else text:
                if not part.isascii():
                    _refuse_surrogates(part)
        kept = self._tokenizer.truncation
        if windows is not None:
            most, step = windows

            def cut() -> None:
                self._tokenizer.enable_truncation(most, stride=step, strategy="only_second")

            guarded(cut, f"texts cannot be truncated to {most} tokens", FILE)
        try:
            encoded = guarded(
                lambda: self._tokenizer.encode_batch(list(texts), add_special_tokens=special),
                "the tokenizer failed on a text",
                FILE,
            )
        finally:
            if windows is not None:
                self._tokenizer.no_truncation()
                if kept is not None:
                    self._tokenizer.enable_truncation(**kept)
        self._refuse_beyond(encoded)
        if windows is None:
            return [[EncodedText.of(e)] for e in encoded]
        return [[EncodedText.of(e), *map(EncodedText.of, e.overflowing)] for e in encoded]

    def ids(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Return the ids of each text, as `encode` does, without the offsets, which take far more memory than the ids
        do.

        Raises UsageError for a text that is not valid Unicode.
        """
        _refuse_one_text(texts, "ids")
        for text in texts:
            if not text.isascii():
                _refuse_surrogates(text)
        encoded = guarded(
            lambda: self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special),
            "the tokenizer failed on a text",
            FILE,
        )
        self._refuse_beyond(encoded)
        return [e.ids for e in encoded]

    def _refuse_beyond(self, encoded: Sequence[Any]) -> None:
        """Raise UsageError if a text has a token that the model does not have."""
        if not self._beyond:
            return
        for number in (number for e in encoded for number in e.ids if number in self._beyond):
            name = printable(self._beyond[number])
            raise UsageError(
                f"the model has no token {name}, which the tokenizer adds to its vocabulary",
                received=f"token {number:,} in a text",
                hint=f"a text without {name}",
            )

    @property
    def largest_id(self) -> int:
        """The largest token id of the vocabulary, without added tokens."""
        return max(self._tokenizer.get_vocab(with_added_tokens=False).values(), default=0)

    def for_model(self, count: int, model: str, *, hint: str) -> TextTokenizer:
        """Return the tokenizer for a model with this number of token ids. A model may have more ids than the tokenizer.
        It may lack tokens that were added to the vocabulary: `encode`, `batch` and `ids` then raise UsageError for a
        text with one of them.

        model  the model's name
        hint   what to do if they do not fit

        Raises UsageError if the model lacks other tokens.
        """
        largest = self.largest_id
        if largest >= count:
            raise UsageError(
                f"the tokenizer has tokens that {printable(model)} does not have",
                received=f"token {largest:,}; the model has {count:,} tokens",
                hint=hint,
            )
        added = self._tokenizer.get_added_tokens_decoder()
        beyond = {number: token.content for number, token in added.items() if number >= count}
        return TextTokenizer(self._tokenizer, self.max_tokens, self.special_names, self.input_names, beyond)

    def id_of(self, name: str) -> int | None:
        """Return the id of a token by its name in the vocabulary; None if there is none, or if the model lacks it."""
        found = self._tokenizer.token_to_id(name)
        return None if found is None or found in self._beyond else int(found)

    def with_token(self, name: str) -> tuple[TextTokenizer, int]:
        """Return a copy of the tokenizer with one more special token, and the token's id."""
        made = copy.deepcopy(self._tokenizer)
        made.add_special_tokens([name])
        copied = TextTokenizer(made, self.max_tokens, self.special_names, self.input_names)
        return copied, int(made.token_to_id(name))

    def has(self, number: int) -> bool:
        """Return True if an id has a token. A model may have more ids than the vocabulary."""
        return self._tokenizer.id_to_token(number) is not None

    def name_of(self, number: int) -> str:
        """Return an id's name in the vocabulary, such as ##ing."""
        return str(self._tokenizer.id_to_token(number))

    @property
    def unknown(self) -> int | None:
        """The id of the unknown token; None if there is none."""
        name = self.special_names.get("unk_token") or getattr(self._tokenizer.model, "unk_token", None)
        return self.id_of(name) if isinstance(name, str) else None

    @property
    def mask(self) -> str | None:
        """The name of the mask token; None if there is none."""
        named = [self.special_names.get("mask_token"), "[MASK]", "<mask>"]
        return next((name for name in named if name is not None and self.id_of(name) is not None), None)

    def need_mask(self, otherwise: Callable[[], str]) -> str:
        """Return the name of the mask token. Raises CheckpointError if no file names one.

        otherwise  returns the hint of the error for a vocabulary in which no special token looks like a mask
        """
        mask = self.mask
        if mask is None:
            near = next((name for name in self.special_tokens() if "mask" in name.lower()), None)
            raise CheckpointError(
                "the vocabulary has no mask token" if near is None else "no file names the mask token",
                hint=otherwise() if near is None else f'"mask_token": {json.dumps(near)} in {SETTINGS}',
            )
        return mask

    @property
    def word_prefix(self) -> str | None:
        """Prefix in the names of pieces that continue a word, such as ##; None if no file declares it."""
        return getattr(self._tokenizer.model, "continuing_subword_prefix", None) or None

    def join(self, names: Sequence[str]) -> str:
        """Return token names as text."""
        decoder = self._tokenizer.decoder
        return str(decoder.decode(list(names))) if decoder is not None else " ".join(names)

    def serialized(self) -> bytes:
        """Return the tokenizer as a tokenizer.json, which truncates no text."""
        made = copy.deepcopy(self._tokenizer)
        made.no_truncation()
        return str(made.to_str()).encode()

    def text_files(self, template: str | None = None) -> dict[str, bytes]:
        """Return the files of a folder with this tokenizer and a chat template, by name."""
        settings = {**self.special_names, **({} if template is None else {"chat_template": template})}
        return {FILE: self.serialized(), SETTINGS: json.dumps(settings, indent=2).encode()}

    @property
    def size(self) -> int:
        """Number of tokens, without added tokens that the model lacks."""
        return int(self._tokenizer.get_vocab_size()) - len(self._beyond)

    def vocabulary(self) -> dict[str, int]:
        """Return the ids of all tokens, by name."""
        return dict(self._tokenizer.get_vocab())

    def token(self, number: int) -> str:
        """Return the text of an id; a special token's name."""
        name = self._tokenizer.id_to_token(number)
        added = self._tokenizer.get_added_tokens_decoder()
        return str(name) if name is None or number in added else self._tokenizer.decode([number])

    def special_tokens(self) -> list[str]:
        """Return the names of the special tokens, which a text may contain literally."""
        added = self._tokenizer.get_added_tokens_decoder()
        return [token.content for _, token in sorted(added.items()) if token.special]

    def text(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return ids as text, without special tokens unless `special`; bytes that are not a whole character become
        U+FFFD.
        """
        _refuse_other_ids(ids)
        decoded = guarded(
            lambda: self._tokenizer.decode(list(ids), skip_special_tokens=not special), "ids cannot be decoded", FILE
        )
        return str(decoded)


def read_text_files(folder: PathLike | ModelFolder) -> dict[str, bytes]:
    """Return the files of a folder's tokenizer and chat template by name, without those that it lacks. An older
    vocabulary becomes a tokenizer.json. Raises CheckpointError if a file is too long, damaged or leads out of the
    folder.
    """
    place = ModelFolder.find(folder)
    found = {name: place.read(name, FILE_BYTES, "limit_bytes=") for name in TEXT_FILES if place.has(name)}
    if FILE not in found and any(map(place.has, OLDER)):
        found[FILE] = TextTokenizer.open(place, cut=False).serialized()
    return found


def _refuse_one_text(texts: Sequence[object], method: str) -> None:
    """Raise UsageError for a text in place of a list of texts."""
    if isinstance(texts, str):
        shown = texts if len(texts) < 40 else "the cat"
        what = f"{method} takes a list of texts"
        raise UsageError(what, received="a text", hint=f"{method}([{shown!r}])[0]")


def _refuse_other_ids(ids: Any) -> None:
    """Raise UsageError for a text, or for the ids of several texts, in place of the ids of one text."""
    if isinstance(ids, str) or (isinstance(ids, list | tuple) and any(isinstance(each, list | tuple) for each in ids)):
        hint = "tokenizer.ids([text])[0] returns the ids of a text" if isinstance(ids, str) else "text(ids[0])"
        raise UsageError("text takes the ids of one text", received=f"{ids!r:.80}", hint=hint)


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            "a text is not valid Unicode",
            received=f"{printable(text, 60)}, character {error.start}",
            hint="use text in UTF-8",
        ) from None


def _longest_input(settings: Mapping[str, Any]) -> int | None:
    """Return `model_max_length` of tokenizer_config.json: the maximum number of tokens of the model."""
    length = settings.get("model_max_length")
    return int(length) if isinstance(length, int | float) and 0 < length < _UNLIMITED else None
