"""Parsing of requests' bodies: completions, chat completions and embeddings, as in OpenAI's API reference; texts and
token ids to convert, as in vLLM's.

Unknown fields are errors, and so are fields that would change an answer but are not supported. Supported in addition to
the reference, as in vLLM: top_k, min_p, repetition_penalty, ignore_eos, min_tokens, stop_token_ids,
chat_template_kwargs.
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
from treadle.serving.fields import Fields, is_id
from treadle.serving.refusals import RequestRefusal

MOST_TEXTS = 128
"""Maximum number of texts that one request generates: the number of prompts times the number of choices."""
MOST_INPUTS = 2048
"""Maximum number of texts to embed in one request."""
MOST_MESSAGES = 1024
MOST_LIKELY = 20
MOST_STOP_IDS, MOST_BIASES, MOST_BIAS = 128, 1024, 100.0
MOST_IDS = 1 << 20
"""Maximum number of token ids to decode in one request."""
_NO_EFFECT = (
    "user",
    "store",
    "metadata",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "safety_identifier",
    "prediction",
)
"""Fields of OpenAI's API that change no answer: they concern accounting, storage and speed."""
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
    most      maximum number of tokens per choice; None: the request sets no maximum
    default   maximum number of tokens if the request sets none; None: as many as fit into a row
    sampling, stop   see `treadle.runtime`
    rules     token rules by name; None: the rule of the model's folder
    stop_ids  token ids that end a text, in addition to the model's
    ignores_end  True if the model's own end tokens do not end a text
    likely    number of most likely tokens to report with each token; None: no logprobs
    echo      True if a text begins with its prompt
    streams   True if the response is streamed
    usage     True if a stream ends with token counts
    most_field  the name of the field that set `most`
    """

    model: str
    choices: int
    most: int | None
    default: int | None
    sampling: Sampling
    rules: Mapping[str, Any]
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    ignores_end: bool
    likely: int | None
    echo: bool
    streams: bool
    usage: bool
    most_field: str = "max_tokens"


@dataclass(frozen=True)
class WantedCompletions:
    """A request for completions: prompts and generation parameters."""

    prompts: tuple[Prompt, ...]
    how: WantedTexts


@dataclass(frozen=True)
class WantedChat:
    """A request for a chat completion: messages, each with role and content, and generation parameters.

    variables  variables of the model's chat template
    images     the files of the images in the messages, in order; a message with images has a list of parts as its
               content
    """

    messages: tuple[Mapping[str, Any], ...]
    variables: Mapping[str, Any]
    how: WantedTexts
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class WantedEmbeddings:
    """A request for embeddings.

    texts      texts, or the token ids of texts
    as_bytes   True if vectors are returned as base64 of their little-endian float32 elements, False for JSON numbers
    """

    model: str
    texts: tuple[str | tuple[int, ...], ...]
    as_bytes: bool


@dataclass(frozen=True)
class WantedTokens:
    """A request for the token ids of a prompt, or of messages.

    special  True if the tokenizer adds its special tokens to a prompt
    """

    model: str
    prompt: str | None
    messages: tuple[Mapping[str, Any], ...]
    variables: Mapping[str, Any]
    special: bool
    images: tuple[bytes, ...] = ()


def read_body(data: bytes) -> Fields:
    """Parse a body. Raises RequestRefusal if it is not a JSON object."""
    try:
        return Fields(read_json_object(data, "the body", nesting=_NESTING, values=_VALUES))
    except CheckpointError as error:
        place = f", at {error.within}" if error.within else ""
        raise RequestRefusal(400, f"the body is not a JSON object: {error.what}{place}", code="invalid_json") from None


def read_completions(fields: Fields) -> WantedCompletions:
    """Parse a request for completions. Raises RequestRefusal."""
    prompts = _prompts(fields, "prompt", MOST_TEXTS)
    likely = fields.whole("logprobs", most=MOST_LIKELY)
    echo = fields.truth("echo")
    if echo and likely is not None:
        raise fields.refuse("echo", "with logprobs asks for log probabilities of the prompt, which is not supported")
    fields.only("suffix", ("",), "asks for text before a suffix, which is not supported")
    most = fields.whole("max_tokens")
    choices = _choices(fields, len(prompts))
    fields.only("best_of", (1, choices), "selects among more texts than n, which is not supported")
    return WantedCompletions(prompts, _how(fields, choices, most, likely, default=16, echo=echo))


def read_chat(fields: Fields) -> WantedChat:
    """Parse a request for a chat completion. Raises RequestRefusal."""
    images: list[bytes] = []
    messages, variables = _messages(fields, images)
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
    fields.ignored("parallel_tool_calls")
    most, named = (first, "max_completion_tokens") if first is not None else (second, "max_tokens")
    likely = (likely or 0) if logprobs else None
    how = _how(fields, _choices(fields, 1), most, likely, most_field=named)
    return WantedChat(messages, variables, how, tuple(images))


def read_embeddings(fields: Fields) -> WantedEmbeddings:
    """Parse a request for embeddings. Raises RequestRefusal."""
    model = _model(fields)
    texts = [each.ids if each.text is None else each.text for each in _prompts(fields, "input", MOST_INPUTS)]
    if "" in texts:
        raise fields.refuse("input", "has an empty text")
    form = fields.text("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise fields.refuse("encoding_format", "must be float or base64")
    fields.only("dimensions", (), "asks for shorter vectors, which the served models do not support")
    fields.ignored(*_NO_EFFECT)
    fields.end()
    return WantedEmbeddings(model, tuple(texts), form == "base64")


def read_tokenize(fields: Fields) -> WantedTokens:
    """Parse a request for token ids. Raises RequestRefusal."""
    model, prompt = _model(fields), fields.text("prompt")
    special = fields.truth("add_special_tokens", otherwise=True)
    messages: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Any] = {}
    images: list[bytes] = []
    if prompt is None:
        messages, variables = _messages(fields, images)
    fields.end()
    return WantedTokens(model, prompt, messages, variables, special, tuple(images))


def read_detokenize(fields: Fields) -> tuple[str, tuple[int, ...]]:
    """Parse a request for the text of token ids. Return the model's name and the ids. Raises RequestRefusal."""
    model = _model(fields)
    if (ids := fields.ids("tokens", most=MOST_IDS)) == () and fields.is_absent("tokens"):
        raise fields.refuse("tokens", "must be a list of token ids")
    fields.end()
    return model, ids


def _how(
    fields: Fields,
    choices: int,
    most: int | None,
    likely: int | None,
    *,
    default: int | None = None,
    echo: bool = False,
    most_field: str = "max_tokens",
) -> WantedTexts:
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
    fewest = fields.whole("min_tokens")
    if fewest is not None and most is not None and fewest > most:
        raise fields.refuse("min_tokens", f"must be at most {most_field}, {most}")
    rules = {
        "presence_penalty": presence,
        "repetition_penalty": repetition,
        "frequency_penalty": fields.number("frequency_penalty", least=-2, most=2),
        "logit_bias": fields.biases("logit_bias", most=MOST_BIASES, bound=MOST_BIAS) or None,
        "fewest": fewest,
    }
    stop_ids, ignores_end = fields.ids("stop_token_ids", most=MOST_STOP_IDS), fields.truth("ignore_eos")
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
    fields.ignored(*_NO_EFFECT)
    model = _model(fields)
    fields.end()
    ends: dict[str, Any] = {"stop": stop, "stop_ids": stop_ids, "ignores_end": ignores_end}
    output: dict[str, Any] = {"likely": likely, "echo": echo, "streams": streams, "usage": usage}
    return WantedTexts(model, choices, most, default, sampling, rules, **ends, **output, most_field=most_field)


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


def _prompts(fields: Fields, name: str, most: int) -> tuple[Prompt, ...]:
    """Return the texts of a field: a string, token ids, or a list of 1 to `most` of them."""
    found = fields.take(name)
    if isinstance(found, str) or (isinstance(found, list) and found and all(is_id(x) for x in found)):
        found = [found]
    if isinstance(found, list) and 1 <= len(found) <= most:
        if all(isinstance(x, str) for x in found):
            return tuple([Prompt(text=x) for x in found])
        if all(isinstance(x, list) and x and all(is_id(i) for i in x) for x in found):
            return tuple([Prompt(ids=tuple(x)) for x in found])
    raise fields.refuse(name, f"must be a string, token ids, or a list of 1 to {most} of them")


def _messages(fields: Fields, images: list[bytes]) -> tuple[tuple[Mapping[str, Any], ...], Mapping[str, Any]]:
    """Return messages, and the variables of the chat template that a request sets. The messages' images are appended to
    `images`.
    """
    messages = tuple([_message(each, images) for each in fields.objects("messages", most=MOST_MESSAGES)])
    variables = fields.mapping("chat_template_kwargs")
    effort = fields.text("reasoning_effort", longest=100)
    if effort is not None:
        variables.setdefault("reasoning_effort", effort)
    return messages, variables


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
