"""The bodies of responses, in the format of OpenAI's API reference."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treadle.runtime.generation import Ending, Token

Array = np.ndarray[Any, Any]
Shown = Callable[[int], str]
"""A function that returns the text of one token."""

_REASONS = {"end": "stop", "stop": "stop", "context": "length", "count": "length", None: None}


@dataclass
class GrowingChoice:
    """One choice of a response, with the text and the tokens generated so far.

    prompt   the text of the prompt, if the response repeats it
    offset   number of characters of the tokens' texts that were reported with log probabilities
    """

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    ending: Ending | None = None
    prompt: str = ""
    offset: int = 0


@dataclass(frozen=True)
class PromptTokens:
    """The number of tokens in a request's prompts, and the number of these tokens that were in a cache."""

    count: int
    held: int


@dataclass(frozen=True)
class AnswerForm:
    """The format of a response: properties that all its bodies share.

    chat    True for a chat completion, False for a completion
    likely  number of most likely tokens to report; None: no logprobs
    shown   a function that returns the text of a token
    """

    model: str
    chat: bool
    likely: int | None
    shown: Shown
    made: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, choices: Sequence[GrowingChoice], read: PromptTokens) -> dict[str, Any]:
        """Return the body of a response that is not streamed."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            **self._head(kind),
            "choices": [self._choice(c) for c in choices],
            "usage": usage(choices, read),
        }

    def begin(self, choice: GrowingChoice) -> dict[str, Any] | None:
        """Return the first chunk of a choice: the role of a chat's message, or the prompt that a completion repeats.
        None if there is no such chunk.
        """
        if not self.chat and not choice.prompt:
            return None
        new: dict[str, Any] = {"delta": {"role": "assistant", "content": ""}} if self.chat else {"text": choice.prompt}
        first = {"index": choice.index, **new, "logprobs": None, "finish_reason": None}
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": [first]}

    def piece(self, choice: GrowingChoice, text: str, token: Token) -> dict[str, Any]:
        """Return the chunk for a token. The token is already part of the choice."""
        logprobs = self._logprobs([token], choice.offset)
        if self.likely is not None:
            choice.offset += len(self.shown(token.id))
        new: dict[str, Any] = {"index": choice.index, "logprobs": logprobs, "finish_reason": _REASONS[token.ending]}
        if self.chat:
            new["delta"] = {"content": text} if text or not token.last else {}
        else:
            new["text"] = text
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": [new]}

    def counts(self, choices: Sequence[GrowingChoice], read: PromptTokens) -> dict[str, Any]:
        """Return the last chunk of a stream, with the token counts (usage)."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage(choices, read)}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.name}", "object": kind, "created": self.made, "model": self.model}

    def _choice(self, choice: GrowingChoice) -> dict[str, Any]:
        logprobs = self._logprobs(choice.tokens, 0)
        reason = _REASONS[choice.ending or "count"]  # the choice has no tokens: the request set the maximum to 0
        made: dict[str, Any] = {"index": choice.index, "logprobs": logprobs, "finish_reason": reason}
        if self.chat:
            return {**made, "message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return {**made, "text": choice.prompt + choice.text}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        if self.likely is None:
            return None
        if self.chat:
            return {"content": [self._in_chat(token) for token in tokens], "refusal": None}
        texts = [self.shown(token.id) for token in tokens]
        offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [_representable(token.logprob) for token in tokens],
            "top_logprobs": [{self.shown(i): _representable(p) for i, p in token.likely} for token in tokens],
            "text_offset": offsets,
        }

    def _in_chat(self, token: Token) -> dict[str, Any]:
        likely = [self._one(i, p) for i, p in token.likely]
        return {**self._one(token.id, token.logprob), "top_logprobs": likely}

    def _one(self, id: int, logprob: float | None) -> dict[str, Any]:
        text = self.shown(id)
        return {"token": text, "logprob": _representable(logprob), "bytes": list(text.encode())}


def _representable(logprob: float | None) -> float:
    """Return a logarithm that JSON can represent: -9999 for the logarithm of zero."""
    assert logprob is not None, "the form reports log probabilities only if the request asks for them"
    return max(logprob, -9999.0)


def usage(choices: Sequence[GrowingChoice], read: PromptTokens) -> dict[str, Any]:
    """Return the token counts of prompts and completions, OpenAI's usage object."""
    made = sum(len(choice.tokens) for choice in choices)
    return {
        "prompt_tokens": read.count,
        "completion_tokens": made,
        "total_tokens": read.count + made,
        "prompt_tokens_details": {"cached_tokens": read.held},
    }


def embeddings(model: str, vectors: Array, tokens: int, as_bytes: bool) -> dict[str, Any]:
    """Return the response with vectors f32[N, D]; if `as_bytes`, each vector is base64 of its float32 elements."""

    def encoded(vector: Array) -> str | list[float]:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_bytes else vector.astype(float).tolist()

    data = [{"object": "embedding", "index": i, "embedding": encoded(vector)} for i, vector in enumerate(vectors)]
    used = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": used}


def text_of(body: object) -> bytes:
    """Return a body as JSON in UTF-8."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def event(body: object) -> bytes:
    """Return a body as an event of a stream (server-sent events, HTML standard, section 9.2), in bytes."""
    return b"data: " + text_of(body) + b"\n\n"


DONE = b"data: [DONE]\n\n"
