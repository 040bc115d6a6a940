"""The files of a tokenizer in a model's folder: the vocabulary, as the tokenizers library parses it, and the chat
template.

    tokenizer, truncation = FolderVocabulary.read(folder, limit_bytes).take()
    folder_chat_template("path/to/model")     # its text; None if there is none
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from treadle.files.contained_files import PathLike
from treadle.files.shown_names import printable
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.vocabularies.older_vocabularies import build_older_tokenizer, kind_names
from treadle.frontends.vocabularies.sentencepiece_vocabularies import FILES as _SENTENCEPIECE
from treadle.frontends.vocabularies.sentencepiece_vocabularies import (
    build_sentencepiece_tokenizer,
    is_sentencepiece_kind,
)
from treadle.frontends.vocabularies.special_tokens import read_tokenizer_settings
from treadle.ir.errors import CheckpointError, Hint, TreadleError

FILE, SETTINGS, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_OLDER_TEMPLATE = "chat_template.json"  # of models that read images, before transformers 4.52
OLDER = ("vocab.txt", "vocab.json", *_SENTENCEPIECE)
"""Vocabularies in the forms older than tokenizer.json, which transformers converts to it."""
VOCABULARIES = (FILE, *OLDER)
"""The files of which a folder with a tokenizer has one."""

TEXT_FILES = (FILE, SETTINGS, "special_tokens_map.json", "added_tokens.json", _TEMPLATE, _OLDER_TEMPLATE)
TOKENIZER_FILES = (*TEXT_FILES, *OLDER, "merges.txt")
"""The files of a tokenizer and its chat template in all forms."""

_UNREAD = ("source.spm", "target.spm")
_UNCONVERTED = {"marian", "m2m_100", "m2m100", "fsmt"}
"""Kinds, as `kind_names` returns them, whose tokenizers transformers cannot convert to tokenizer.json."""
FILE_BYTES = 64 << 20
"""Default limit on a file; the largest of known models is 33 MB."""

T = TypeVar("T")


class FolderVocabulary:
    """A folder's tokenizer as the library parsed it, for the first caller of `take`; the others get a copy."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._taken = tokenizer, False
        self._truncation: Mapping[str, Any] | None = tokenizer.truncation  # each caller of `take` sets its own

    @classmethod
    def read(cls, place: ModelFolder, limit_bytes: int) -> FolderVocabulary:
        """Parse tokenizer.json, or one of the older forms.

        Raises CheckpointError if the file is missing, leads out of the folder, is too long or damaged.
        """
        import tokenizers

        shown = place.show(FILE)
        if not place.has(FILE):
            older = [name for name in OLDER if place.has(name)]
            settings = read_tokenizer_settings(place, limit_bytes)
            made: Any = older and guarded(
                lambda: (
                    build_older_tokenizer(place, settings, limit_bytes)
                    or build_sentencepiece_tokenizer(place, settings, limit_bytes)
                ),
                "the vocabulary is damaged",
                place.show(older[0]),
            )
            if not made:
                raise CheckpointError(
                    f"the folder has no {FILE}, which holds the vocabulary and how text is tokenized",
                    received=", ".join(each for each in (*older, *_UNREAD) if place.has(each)) or "no vocabulary",
                    within=place.shown,
                    hint=_way_to_get(place, settings, older),
                )
        else:
            data = place.read(FILE, limit_bytes, "limit_bytes=")
            made = guarded(lambda: tokenizers.Tokenizer.from_buffer(data), "the tokenizer is damaged", shown)
        if made.get_vocab_size() <= sum(token.special for token in made.get_added_tokens_decoder().values()):
            raise CheckpointError(
                "the tokenizer has no tokens but special ones",
                received=", ".join(map(printable, sorted(made.get_vocab())[:8])) or "no tokens",
                within=shown,
                hint=f"a {FILE} of the same model",
            )
        return cls(made)

    def take(self) -> tuple[Any, Mapping[str, Any] | None]:
        """Return a tokenizer that the caller may change, and the file's truncation."""
        made = copy.deepcopy(self._tokenizer) if self._taken else self._tokenizer
        self._taken = True
        return made, self._truncation


def _way_to_get(place: ModelFolder, settings: Mapping[str, Any], older: Sequence[str]) -> str:
    """Return a hint on how to get a folder's tokenizer.json.

    older  the vocabularies that the folder has in older forms
    """
    if set(kind_names(place, settings)[:1]) & _UNCONVERTED:
        return (
            f"put a {FILE} of the same model there, such as its ONNX export has: transformers tokenizes this kind in "
            "Python, and cannot write one"
        )
    if older and not set(older) & set(_SENTENCEPIECE) and is_sentencepiece_kind(place, settings):
        pieces = " or ".join(_SENTENCEPIECE)  # without it, transformers writes a tokenizer of special tokens alone
        return f"put a {FILE} of the same model there: tokenizers of this kind are built from {pieces}"
    name = place.shown if older else "NAME OF THE MODEL"
    made = (
        "create it with transformers, in Python:\nfrom transformers import AutoTokenizer\n"
        f"AutoTokenizer.from_pretrained({name!r}).save_pretrained({place.shown!r})"
    )
    return Hint(made, f"--tokenizer FOLDER, of a model with the same vocabulary; or {made}")


def folder_chat_template(folder: PathLike | ModelFolder) -> str | None:
    """Return the chat template of a folder's model, if it was trained with one: chat_template.jinja, or the entry in
    chat_template.json or tokenizer_config.json. It is not run. Raises CheckpointError if the file is too long or
    damaged.
    """
    place = ModelFolder.find(folder)
    if place.has(_TEMPLATE):
        return place.read(_TEMPLATE, FILE_BYTES, "limit_bytes=").decode("utf-8", "replace")
    older = place.read_settings(_OLDER_TEMPLATE) if place.has(_OLDER_TEMPLATE) else {}
    template = older.get("chat_template") or read_tokenizer_settings(place, FILE_BYTES).get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t.get("template") for t in template if isinstance(t, dict)), None)
    return template if isinstance(template, str) else None


def guarded(action: Callable[[], T], what: str, shown: str) -> T:
    """Return the library's result; raise its failures, some of which a hostile file can cause, as CheckpointError."""
    try:
        return action()
    except TreadleError:
        raise
    except BaseException as error:
        # A panic of the library's Rust is a BaseException of a class that cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(what, received=printable(str(error), 400), within=shown) from None
