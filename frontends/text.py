"""Text as token ids: the tokenizer.json of a model's folder, run by the tokenizers library.

    tokenizer = TextTokenizer.open(folder)
    batch = tokenizer.batch(["a cat", "a longer sentence"])
    batch.ids        # i64[2, S], padded to the longest
    batch.lengths    # i64[2], how many of a row's ids are real

Source: the format of Hugging Face tokenizers, https://huggingface.co/docs/tokenizers. The file holds data only. Padding
that it asks for is replaced by ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from treadle.files.contained_files import PathLike, read_regular
from treadle.files.shown_names import printable
from treadle.frontends.huggingface import ModelFolder
from treadle.ir.errors import CheckpointError, FrontendError, UsageError

_FILE, _SETTINGS, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_OLDER = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
"""Vocabularies in the forms that were there before tokenizer.json, which transformers turns into one."""
_FILE_BYTES = 64 << 20  # the largest of known models is 33 MB
_UNLIMITED = 1 << 31  # files say 10^30 where they mean no limit

T = TypeVar("T")


@dataclass(frozen=True)
class TokenBatch:
    """Texts as ids.

    ids      i64[B, S], each row padded at its end to the longest
    lengths  i64[B], how many ids of each row are real, special ones included
    cut      bool[B], whether a text was longer than the limit and lost its end
    """

    ids: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    cut: npt.NDArray[np.bool_]


class TextTokenizer:
    """The tokenizer of a model's folder."""

    def __init__(self, tokenizer: Any, max_tokens: int | None) -> None:
        """`tokenizer` is a `tokenizers.Tokenizer` without padding; texts are cut to `max_tokens` ids."""
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens

    @classmethod
    def open(
        cls,
        folder: PathLike,
        *,
        max_tokens: int | None = None,
        context: int | None = None,
        cut: bool = True,
        limit_bytes: int = _FILE_BYTES,
    ) -> TextTokenizer:
        """Read tokenizer.json of a model's folder, or of its place in a hub cache.

        max_tokens   what texts are cut to, special tokens included; without it, what tokenizer_config.json says
                     (model_max_length), else tokenizer.json (truncation)
        context      how many positions the model has: texts are cut to these, whatever the files say
        cut          False keeps texts whole, whatever their length
        limit_bytes  the longest file that is read

        Raises CheckpointError where the file is missing, leads out of the folder, is too long or damaged, and
        FrontendError where the tokenizers library is not installed.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise FrontendError(
                "reading text needs the package tokenizers",
                received=str(error),
                hint="pip install 'treadle[text]'",
            ) from error
        place = ModelFolder.find(folder)
        shown = place.show(_FILE)
        older = [name for name in _OLDER if place.has(name)]
        if older and not place.has(_FILE):
            raise CheckpointError(
                f"the folder has no {_FILE}, which holds the vocabulary and how text is cut",
                received=", ".join(older),
                within=place.shown,
                hint="make it with transformers, in Python:\n"
                f"from transformers import AutoTokenizer\n"
                f"AutoTokenizer.from_pretrained({place.shown!r}).save_pretrained({place.shown!r})",
            )
        data = read_regular(place.file(_FILE), limit_bytes, shown, "limit_bytes=")
        made = _guarded(lambda: tokenizers.Tokenizer.from_buffer(data), "the tokenizer is damaged", shown)
        made.no_padding()
        asked = max_tokens if max_tokens is not None else _longest_input(place, limit_bytes)
        if asked is None and made.truncation is not None:
            asked = int(made.truncation["max_length"])
        most = min((n for n in (asked, context) if n is not None), default=None) if cut else None
        if most is None:
            made.no_truncation()
        else:
            _guarded(lambda: made.enable_truncation(most), f"texts cannot be cut to {most} tokens", shown)
        return cls(made, most)

    def batch(self, texts: Sequence[str]) -> TokenBatch:
        """Texts as one padded array. Raises UsageError for no texts, and for one that is not valid Unicode."""
        if not texts:
            raise UsageError("there is no text")
        for text in texts:
            if not text.isascii():
                _refuse_surrogates(text)
        encoded = _guarded(lambda: self._tokenizer.encode_batch(list(texts)), "the tokenizer failed on a text", _FILE)
        lengths = np.array([len(e.ids) for e in encoded], np.int64)
        ids = np.zeros((len(encoded), max(1, int(lengths.max()))), np.int64)
        for row, e in zip(ids, encoded, strict=True):
            row[: len(e.ids)] = e.ids
        return TokenBatch(ids, lengths, np.array([bool(e.overflowing) for e in encoded]))

    def vocabulary(self) -> dict[str, int]:
        """The ids of all tokens, by name."""
        return dict(self._tokenizer.get_vocab())

    def token(self, number: int) -> str:
        """What an id stands for, as it is written in a text; a special token's name."""
        name = self._tokenizer.id_to_token(number)
        added = self._tokenizer.get_added_tokens_decoder()
        return str(name) if name is None or number in added else self._tokenizer.decode([number])

    def special_tokens(self) -> list[str]:
        """The special tokens by name, which a text may hold as they are written."""
        added = self._tokenizer.get_added_tokens_decoder()
        return [token.content for _, token in sorted(added.items()) if token.special]

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text, special ones left out; bytes that are no whole character come as U+FFFD."""
        decoded = _guarded(
            lambda: self._tokenizer.decode(list(ids), skip_special_tokens=True), "ids are no text", _FILE
        )
        return str(decoded)


def folder_chat_template(folder: PathLike) -> str | None:
    """The template in which a folder's model expects a conversation, if it was trained for one: chat_template.jinja, or
    what tokenizer_config.json holds. It is not run. Raises CheckpointError where the file is too long or damaged."""
    place = ModelFolder.find(folder)
    if place.has(_TEMPLATE):
        data = read_regular(place.file(_TEMPLATE), _FILE_BYTES, place.show(_TEMPLATE), "limit_bytes=")
        return data.decode("utf-8", "replace")
    template = _settings(place, _FILE_BYTES).get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t.get("template") for t in template if isinstance(t, dict)), None)
    return template if isinstance(template, str) else None


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            "a text is not valid Unicode",
            received=f"{printable(text, 60)}, character {error.start}",
            hint="text in UTF-8",
        ) from None


def _longest_input(place: ModelFolder, limit_bytes: int) -> int | None:
    """`model_max_length` of tokenizer_config.json: the number of tokens that the model was made for."""
    length = _settings(place, limit_bytes).get("model_max_length")
    return int(length) if isinstance(length, int | float) and 0 < length < _UNLIMITED else None


def _settings(place: ModelFolder, limit_bytes: int) -> dict[str, Any]:
    """What tokenizer_config.json holds; nothing where it is not there or no object."""
    if not place.has(_SETTINGS):
        return {}
    shown = place.show(_SETTINGS)
    data = read_regular(place.file(_SETTINGS), limit_bytes, shown, "limit_bytes=")
    try:
        settings = json.loads(data)  # the strict reader refuses integers as long as these files hold
    except (ValueError, RecursionError) as error:
        raise CheckpointError("the file is not JSON", received=str(error), within=shown) from None
    return settings if isinstance(settings, dict) else {}


def _guarded(action: Callable[[], T], what: str, shown: str) -> T:
    """What the library answers; its failures, of which a hostile file can bring about some, as CheckpointError."""
    try:
        return action()
    except BaseException as error:
        # A panic of the library's Rust is a BaseException of a class that cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(what, received=printable(str(error), 400), within=shown) from None
