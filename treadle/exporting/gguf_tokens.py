"""A tokenizer.json as the metadata of a GGUF file: byte-level BPE, which the format calls "gpt2".

`treadle.frontends.vocabularies.gguf_tokenizer` reads it back. Sources: as there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from treadle.files.shown_names import printable
from treadle.frontends.text import TextTokenizer
from treadle.frontends.vocabularies.gguf_tokenizer import PRE_TOKENIZERS
from treadle.ir.errors import UsageError

_NORMAL, _CONTROL, _DEFINED, _UNUSED = 1, 3, 4, 5


def gguf_vocabulary(
    tokenizer: TextTokenizer, count: int, end_tokens: tuple[int, ...], template: str | None
) -> dict[str, Any]:
    """Return the keys of a tokenizer for a model of `count` tokens.

    end_tokens  the ids that end a text; empty: the tokenizer's own end token

    Raises UsageError for a tokenizer that the format cannot hold.
    """
    read = json.loads(tokenizer.serialized())
    bpe = read["model"]
    if bpe.get("type") != "BPE" or bpe.get("byte_fallback"):
        raise _refusal("it is not byte-level BPE", str(bpe.get("type")))
    tokens: dict[int, str] = {number: token for token, number in bpe["vocab"].items()}
    types = dict.fromkeys(tokens, _NORMAL)
    for added in read.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _DEFINED
    if max(tokens, default=-1) >= count:
        raise _refusal("it has more tokens than the model", f"{max(tokens) + 1}, of {count}")
    names = [tokens.get(number, f"[PAD{number}]") for number in range(count)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(read),
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [types.get(number, _UNUSED) for number in range(count)],
        "tokenizer.ggml.merges": merges,
    }
    numbers = {name: number for number, name in tokens.items()}
    special = {role: numbers[name] for role, name in tokenizer.special_names.items() if name in numbers}
    ends = list(end_tokens) or [special[role] for role in ("eos_token",) if role in special]
    for role, key in (("bos_token", "bos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        if role in special:
            found[f"tokenizer.ggml.{key}_token_id"] = special[role]
    for key, number in zip(("eos", "eot", "eom"), ends, strict=False):
        found[f"tokenizer.ggml.{key}_token_id"] = number
    found["tokenizer.ggml.add_bos_token"] = _adds_first(read, special.get("bos_token"), numbers)
    if template is not None:
        found["tokenizer.chat_template"] = template
    return found


def _steps(step: Any) -> list[tuple[Any, ...]]:
    """Return the steps of a pre-tokenizer, each with the settings that change its splits."""
    match step:
        case None:
            return []
        case {"type": "Sequence", "pretokenizers": steps}:
            return [each for one in steps for each in _steps(one)]
        case {"type": "Digits"}:
            return [("Digits", step["individual_digits"])]
        case {"type": "Split", "pattern": {"Regex": pattern}}:
            return [("Split", pattern, step["behavior"], step["invert"])]
        case {"type": "ByteLevel"}:
            return [("ByteLevel", step["add_prefix_space"], step.get("use_regex", True))]
    return [(step.get("type"),)]


def _pre_tokenizer(read: Mapping[str, Any]) -> str:
    """Return the format's name of a pre-tokenizer and normalizer. Raises UsageError if it has none."""
    steps, normalizer = _steps(read.get("pre_tokenizer")), (read.get("normalizer") or {}).get("type")
    for name, (pattern, digits) in PRE_TOKENIZERS.items():
        wanted: list[tuple[Any, ...]] = [("Digits", True)] if digits else []
        wanted += [] if pattern is None else [("Split", pattern, "Isolated", False)]
        wanted.append(("ByteLevel", False, pattern is None))
        if name != "default" and steps == wanted and normalizer == ("NFC" if name == "qwen2" else None):
            return name
    raise _refusal("GGUF has no name for the way in which it splits text", printable(str(steps))[:120])


def _adds_first(read: Mapping[str, Any], first: int | None, numbers: Mapping[str, int]) -> bool:
    """Return True if a text gets the first token of the model. Raises UsageError if it gets any other token."""
    post = read.get("post_processor")
    posts = post.get("processors", [post]) if isinstance(post, Mapping) else []
    added: list[int] = []
    for each in posts:
        if each.get("type") == "TemplateProcessing":
            pieces = each["single"]
            last = max((n for n, piece in enumerate(pieces) if "Sequence" in piece), default=-1)
            if any("SpecialToken" in piece for piece in pieces[last:]):
                raise _refusal("it appends tokens to a text", None)
            of = each["special_tokens"]
            for piece in pieces[:last]:
                added += [numbers[token] for token in of[piece["SpecialToken"]["id"]]["tokens"]]
        elif each.get("type") != "ByteLevel":
            raise _refusal("it changes texts after they are split", each.get("type"))
    if added not in ([], [first]):
        raise _refusal("it adds other tokens than one BOS token before a text", str(added))
    return bool(added)


def _refusal(why: str, received: str | None) -> UsageError:
    return UsageError(
        f"the tokenizer cannot be written to a GGUF file: {why}",
        received=received,
        hint="a model with byte-level BPE, or a folder without its tokenizer",
    )
