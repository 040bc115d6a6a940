"""Special and added tokens of a folder, from tokenizer_config.json or the files that preceded it.

    special_tokens_map.json   the names of special tokens by their roles, and further special tokens
    added_tokens.json         tokens that were added to the vocabulary, with their numbers

Both are read if tokenizer_config.json has no added_tokens_decoder, as in Hugging Face transformers 5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from treadle.files.shown_names import printable
from treadle.frontends.model_folder import ModelFolder
from treadle.ir.errors import CheckpointError

_SETTINGS, _NAMES, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FLAGS = ("lstrip", "rstrip", "normalized", "special", "single_word")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The roles of special tokens. Tokens that the vocabulary lacks get their ids in this order."""
_FURTHER = ("extra_special_tokens", "additional_special_tokens")
"""Lists of special tokens without a role; the first list that is present is read."""


def read_tokenizer_settings(place: ModelFolder, limit_bytes: int) -> dict[str, Any]:
    """Return the settings of tokenizer_config.json and of the older files; an empty mapping if there is no such file.

    Raises CheckpointError for a file that is too long or not JSON, and for an added token without a number.
    """
    return place.once((_SETTINGS, limit_bytes), lambda: _read_settings(place, limit_bytes))


def _read_settings(place: ModelFolder, limit_bytes: int) -> dict[str, Any]:
    settings = _read_object(place, _SETTINGS, limit_bytes)
    if "added_tokens_decoder" in settings:
        return settings
    named = _read_object(place, _NAMES, limit_bytes)
    settings |= {key: value for key, value in named.items() if key.endswith("_token") or key in _FURTHER}
    added = _read_object(place, _ADDED, limit_bytes)
    if added:
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 10**9 for n in added.values()):
            raise CheckpointError("an added token must have a number, 0 or more", within=place.show(_ADDED))
        special = {*read_special_tokens(settings).values(), *_further(settings)}
        settings["added_tokens_decoder"] = {
            str(number): {"content": token, "special": token in special, "normalized": token not in special}
            for token, number in added.items()
        }
    return settings


def read_special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of special tokens by their roles in the settings: texts, or the `content` of objects."""
    found = {}
    for role, name in settings.items():
        content = _content(name)
        if role.endswith("_token") and content:
            found[role] = content
    return found


def add_named_tokens(
    library: Any,
    tokenizer: Any,
    special: Mapping[str, str],
    settings: Mapping[str, Any],
    shown: str,
    *,
    strips: Mapping[str, tuple[bool, bool]],
    before: Sequence[str] = (),
    after: Sequence[str] = (),
) -> None:
    """Add the tokens that the folder lists to a tokenizer, then its special tokens; existing tokens keep their numbers.

    library  the module tokenizers
    special  the names of special tokens by their roles
    strips   by role, a pair of defaults: True if the token includes the space before it, and the same for the space
             after it
    before   special tokens without a role that are added before the tokens with a role
    after    special tokens without a role that are added after them

    Raises CheckpointError if a listed token has another number in the vocabulary.
    """
    plain = {"special": True, "normalized": False}
    tokens: dict[str, dict[str, bool]] = dict.fromkeys(before, plain)
    for role in sorted(special, key=lambda role: (_ROLES.index(role) if role in _ROLES else len(_ROLES), role)):
        left, right = _strips(settings, role, strips.get(role))
        tokens[special[role]] = {**plain, "lstrip": left, "rstrip": right}
    for token, flags in (*dict.fromkeys(after, plain).items(), *_further(settings).items()):
        tokens.setdefault(token, flags)
    for number, options in sorted(_listed(settings).items()):
        token = options["content"]
        tokens.pop(token, None)
        tokenizer.add_tokens([library.AddedToken(token, **{name: options.get(name) is True for name in _FLAGS})])
        if tokenizer.token_to_id(token) != number:
            raise CheckpointError(
                "tokenizer_config.json: an added token has another number in the vocabulary",
                received=f"{printable(token)}, {number} and {tokenizer.token_to_id(token)}",
                within=shown,
            )
    tokenizer.add_special_tokens([library.AddedToken(token, **flags) for token, flags in tokens.items()])


def put_around(
    library: Any, tokenizer: Any, special: Mapping[str, str], settings: Mapping[str, Any], shown: str
) -> None:
    """Add a token before each text and a token after it, if the folder requests them (`add_bos_token`).

    Raises CheckpointError for a token that the vocabulary lacks.
    """
    roles = [role for role in ("bos_token", "eos_token") if settings.get(f"add_{role}") is True and role in special]
    numbers = [(special[role], tokenizer.token_to_id(special[role])) for role in roles]
    for token, number in numbers:
        if number is None:
            raise lacks_special_token(token, shown)
    begin, end = ([special[role] for role in roles if role == each] for each in ("bos_token", "eos_token"))
    first = [*(f"{t}:0" for t in begin), "$A:0", *(f"{t}:0" for t in end)]
    second = [*(f"{t}:1" for t in begin), "$B:1", *(f"{t}:1" for t in end)]
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=first, pair=[*first, *second], special_tokens=numbers
    )


def lacks_special_token(token: str, shown: str) -> CheckpointError:
    """Return the error for a vocabulary that lacks a required special token."""
    return CheckpointError("the vocabulary lacks a special token", received=printable(token), within=shown)


def _content(token: object) -> str | None:
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _further(settings: Mapping[str, Any]) -> dict[str, dict[str, bool]]:
    """Return the special tokens without a role, with their flags. If the setting is an object, its values are the
    tokens.
    """
    given = next((settings[name] for name in _FURTHER if name in settings), None)
    listed = list(given.values()) if isinstance(given, Mapping) else given if isinstance(given, list) else []
    found: dict[str, dict[str, bool]] = {}
    for token in listed:
        if content := _content(token):
            left, right = _strips({content: token}, content, None)
            found[content] = {"special": True, "normalized": False, "lstrip": left, "rstrip": right}
    return found


def _listed(settings: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Return the tokens that the folder adds, by their numbers."""
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
    """Return a special token's `lstrip` and `rstrip`: True if the token includes the whitespace before it, and after
    it.
    """
    given = settings.get(role)
    if isinstance(given, Mapping):
        return given.get("lstrip") is True, given.get("rstrip") is True
    return default or (False, False)


def _read_object(place: ModelFolder, name: str, limit_bytes: int) -> dict[str, Any]:
    """Return the object that a file holds; an empty mapping if the file does not exist or holds no object."""
    if not place.has(name):
        return {}
    data = place.read(name, limit_bytes, "limit_bytes=")
    try:
        found = json.loads(data)  # the strict reader refuses long integers, which these files contain
    except (ValueError, RecursionError) as error:
        raise CheckpointError("the file is not JSON", received=str(error), within=place.show(name)) from None
    return found if isinstance(found, dict) else {}
