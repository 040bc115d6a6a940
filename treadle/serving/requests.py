"""Parsing of requests' bodies: completions, chat completions and embeddings, as in OpenAI's API reference.

Unknown fields are errors, and so are fields that would change an answer but are not supported. Supported in addition to
the reference: top_k, min_p, repetition_penalty.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treadle.files.errors import CheckpointError
from treadle.files.strict_json import read_json_object
from treadle.runtime.sampling import Sampling
from treadle.serving.fields import Fields
from treadle.serving.refusals import RequestRefusal

MOST_TEXTS = 128
"""Maximum number of texts that one request generates: the number of prompts times the number of choices."""
MOST_INPUTS = 2048
"""Maximum number of texts to embed in one request."""
MOST_MESSAGES = 1024
MOST_LIKELY = 20
ROLES = ("system", "developer", "user", "assistant")
_NESTING, _VALUES = 16, 200_000


@dataclass(frozen=True)
class Prompt:
    """A prompt: either text or token ids."""

    text: str | None = None
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class WantedTexts:
    """Generation parameters of a request.

    model     the served name of the model
    choices   number of choices per prompt
    most      maximum number of tokens per choice; None: as many as fit into a row
    sampling, stop   see `treadle.runtime`
    penalties   penalties by name; None: the penalties of the model's folder
    likely    number of most likely tokens to report with each token; None: no logprobs
    streams   True if the response is streamed
    usage     True if a stream ends with token counts
    """

    model: str
    choices: int
    most: int | None
    sampling: Sampling
    penalties: Mapping[str, float | None]
    stop: tuple[str, ...]
    likely: int | None
    streams: bool
    usage: bool


@dataclass(frozen=True)
class WantedCompletions:
    """A request for completions: prompts and generation parameters."""

    prompts: tuple[Prompt, ...]
    how: WantedTexts


@dataclass(frozen=True)
class WantedChat:
    """A request for a chat completion: messages, each with role and content, and generation parameters.

    images   the files of the images in the messages, in order; a message with images has a list of parts as its content
    """

    messages: tuple[Mapping[str, Any], ...]
    how: WantedTexts
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class WantedEmbeddings:
    """A request for embeddings.

    as_bytes   True if vectors are returned as base64 of their little-endian float32 elements, False for JSON numbers
    """

    model: str
    texts: tuple[str, ...]
    as_bytes: bool


def read_body(data: bytes) -> Fields:
    """Parse a body. Raises RequestRefusal if it is not a JSON object."""
    try:
        return Fields(read_json_object(data, "the body", nesting=_NESTING, values=_VALUES))
    except CheckpointError as error:
        place = f", at {error.within}" if error.within else ""
        raise RequestRefusal(400, f"the body is not a JSON object: {error.what}{place}", code="invalid_json") from None


def read_completions(fields: Fields) -> WantedCompletions:
    """Parse a request for completions. Raises RequestRefusal."""
    prompts = _prompts(fields)
    likely = fields.whole("logprobs", most=MOST_LIKELY)
    fields.only("echo", (False,), "repeats the prompt, which is not supported")
    fields.only("suffix", ("",), "asks for text before a suffix, which is not supported")
    most = fields.whole("max_tokens")
    choices = _choices(fields, len(prompts))
    fields.only("best_of", (1, choices), "selects among more texts than n, which is not supported")
    how = _how(fields, choices, 16 if most is None else most, likely)
    return WantedCompletions(prompts, how)


def read_chat(fields: Fields) -> WantedChat:
    """Parse a request for a chat completion. Raises RequestRefusal."""
    images: list[bytes] = []
    messages = tuple([_message(each, images) for each in fields.objects("messages", most=MOST_MESSAGES)])
    logprobs, likely = fields.truth("logprobs"), fields.whole("top_logprobs", most=MOST_LIKELY)
    if likely is not None and not logprobs:
        raise fields.refuse("top_logprobs", "needs logprobs to be true")
    first, second = fields.whole("max_completion_tokens"), fields.whole("max_tokens")
    for name in ("tools", "functions"):
        fields.only(name, ([],), "lets the model call functions, which is not supported")
    fields.only("tool_choice", ("none", "auto"), "lets the model call functions, which is not supported")
    fields.only("function_call", ("none", "auto"), "lets the model call functions, which is not supported")
    fields.only("response_format", ({"type": "text"},), "must be text: grammars are not supported")
    fields.only("modalities", (["text"],), "must be text")
    fields.ignored("parallel_tool_calls", "store", "metadata", "service_tier")
    how = _how(fields, _choices(fields, 1), first if first is not None else second, (likely or 0) if logprobs else None)
    return WantedChat(messages, how, tuple(images))


def read_embeddings(fields: Fields) -> WantedEmbeddings:
    """Parse a request for embeddings. Raises RequestRefusal."""
    model = _model(fields)
    texts = fields.texts("input", most=MOST_INPUTS)
    if not texts:
        raise fields.refuse("input", "must be a string, or a list of strings")
    form = fields.text("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise fields.refuse("encoding_format", "must be float or base64")
    fields.only("dimensions", (), "asks for shorter vectors, which the served models do not support")
    fields.ignored("user")
    fields.end()
    return WantedEmbeddings(model, tuple(texts), form == "base64")


def _how(fields: Fields, choices: int, most: int | None, likely: int | None) -> WantedTexts:
    """Return the generation parameters that completions and chats share. Raises RequestRefusal for invalid fields and
    for fields that no one has read.
    """
    temperature = fields.number("temperature", least=0, most=2)
    top_p = fields.number("top_p", least=0, most=1)
    seed = fields.whole("seed", most=2**63 - 1)
    sampling = Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_k=fields.whole("top_k") or 0,
        top_p=1.0 if top_p is None else max(top_p, 1e-9),  # 0 selects only the most likely token
        min_p=fields.number("min_p", least=0, most=1) or 0.0,
        seed=secrets.randbits(62) if seed is None else seed,
    )
    presence = fields.number("presence_penalty", least=-2, most=2)
    repetition = fields.number("repetition_penalty", least=0.01, most=100)
    fields.only(
        "frequency_penalty", (0, 0.0), "penalizes tokens by count, which is not supported; use presence_penalty"
    )
    fields.only("logit_bias", ({},), "changes single logits, which is not supported")
    penalties = {"presence_penalty": presence, "repetition_penalty": repetition}
    stop = tuple(fields.texts("stop", most=16, longest=1000))
    streams = fields.truth("stream")
    options = fields.take("stream_options")
    usage = False
    if options is not None:
        if not streams or not isinstance(options, dict):
            raise fields.refuse("stream_options", "must be an object, and needs stream to be true")
        inside = Fields(options, "stream_options")
        usage = inside.truth("include_usage")
        inside.ignored("include_obfuscation")
        inside.end()
    fields.ignored("user")
    model = _model(fields)
    fields.end()
    return WantedTexts(model, choices, most, sampling, penalties, stop, likely, streams, usage)


def _model(fields: Fields) -> str:
    found = fields.text("model", longest=1000)
    if not found:
        raise fields.refuse("model", "must be the name of a served model")
    return found


def _choices(fields: Fields, prompts: int) -> int:
    found = fields.whole("n", least=1, most=MOST_TEXTS) or 1
    if found * prompts > MOST_TEXTS:
        raise fields.refuse(
            "n", f"asks for {found * prompts} texts with the prompts; a request has at most {MOST_TEXTS}"
        )
    return found


def _prompts(fields: Fields) -> tuple[Prompt, ...]:
    found = fields.take("prompt")
    if isinstance(found, str) or (isinstance(found, list) and found and all(_is_id(x) for x in found)):
        found = [found]
    if isinstance(found, list) and 1 <= len(found) <= MOST_TEXTS:
        if all(isinstance(x, str) for x in found):
            return tuple([Prompt(text=x) for x in found])
        if all(isinstance(x, list) and x and all(_is_id(i) for i in x) for x in found):
            return tuple([Prompt(ids=tuple(x)) for x in found])
    raise fields.refuse("prompt", f"must be a string, token ids, or a list of 1 to {MOST_TEXTS} of them")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _message(fields: Fields, images: list[bytes]) -> Mapping[str, Any]:
    """Return a message. Its images are appended to `images`."""
    role = fields.text("role")
    if role not in ROLES:
        raise fields.refuse("role", "must be " + ", ".join(ROLES[:-1]) + f" or {ROLES[-1]}")
    content = fields.take("content")
    if isinstance(content, list):
        before = len(images)
        content = [_part(fields, i, part, images) for i, part in enumerate(content)]
        if len(images) == before:
            content = "".join(part["text"] for part in content)
    if not isinstance(content, str | list):
        raise fields.refuse("content", "must be a string, or a list of parts of type text or image_url")
    fields.ignored("name", "refusal")
    for name in ("tool_calls", "function_call", "audio"):
        fields.only(name, ([],), "is not supported")
    fields.end()
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(fields: Fields, number: int, part: Any, images: list[bytes]) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        images.append(_image(fields, f"content[{number}].image_url", part.get("image_url")))
        return {"type": "image"}
    raise fields.refuse(f"content[{number}]", "must be of type text or image_url: other types are not supported")


def _image(fields: Fields, name: str, value: Any) -> bytes:
    """Return the file in a data URL (RFC 2397). Raises RequestRefusal for any other URL, which is never fetched."""
    url = value.get("url") if isinstance(value, dict) else None
    if not isinstance(url, str) or set(value) - {"url", "detail"}:
        raise fields.refuse(name, "must be an object with a url")
    head, comma, data = url.partition(",")
    if not head.lower().startswith("data:image/") or not head.lower().endswith(";base64") or not comma:
        raise fields.refuse(f"{name}.url", "must be data:image/...;base64,...: the server fetches no addresses")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise fields.refuse(f"{name}.url", "is not valid base64") from None
