"""The server's answers, tested in one process: bodies of answers, and responses to requests that are cancelled,
refused or timed out.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pprint import pformat
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from tests.golden import Golden
from treadle.ir.errors import UsageError
from treadle.runtime.generation import Token
from treadle.runtime.row_inputs import RowPrompt
from treadle.runtime.sampling import Sampling
from treadle.runtime.scheduler import Closed, Cut, Ended, Load, QueueFull, TextOrder
from treadle.runtime.token_rules import TokenRules
from treadle.sentence_embedding import Embedded
from treadle.serving import answering
from treadle.serving.answering import Answering
from treadle.serving.answers import AnswerForm, GrowingChoice, PromptTokens, embeddings, text_of
from treadle.serving.application import Limits, Server
from treadle.serving.models import ServedEmbedder, ServedWriter
from treadle.tasks.generation_settings import FolderRules

WORDS = ["the ", "cat ", "é", "sat"]
TOKENS = [
    Token(0, 0, None, -0.5, ((0, -0.5), (1, -1.25))),
    Token(0, 2, None, -math.inf, ((2, -math.inf), (3, -2.0))),
    Token(0, 3, "count", -3.0, ((3, -3.0), (0, -4.0))),
]


@pytest.mark.parametrize("chat", [False, True])
def test_bodies_are_as_the_reference_says(chat: bool, golden: Golden) -> None:
    """Bodies sent as a whole and in chunks. The logarithm of probability 0 becomes a number that JSON can express."""
    lines: list[str] = []
    for likely in (None, 2):
        form = AnswerForm("m", chat, likely, lambda id: WORDS[id], made=5, name="n")
        choices = [GrowingChoice(0), GrowingChoice(1, "", [], "stop"), GrowingChoice(2)]
        read = PromptTokens(7, 4)
        pieces = [body for body in [form.begin(choices[0])] if body]
        for token in TOKENS:
            choices[0].text += WORDS[token.id]
            choices[0].tokens.append(token)
            choices[0].ending = token.ending
            pieces.append(form.piece(choices[0], "" if token.id else WORDS[token.id], token))
        bodies = [*pieces, form.counts(choices, read), form.whole(choices, read)]
        assert all(json.loads(text_of(body)) == body for body in bodies)
        lines += [f"# likely={likely}", *(pformat(body, width=118, sort_dicts=False) for body in bodies)]
    golden(f"serving/{'chat' if chat else 'completions'}.txt", "\n".join(lines))


@pytest.mark.parametrize(
    ("ending", "expected"), [("end", "stop"), ("stop", "stop"), ("context", "length"), (None, "length")]
)
def test_why_a_text_ends(ending: Any, expected: str) -> None:
    form = AnswerForm("m", False, None, str)
    whole = form.whole([GrowingChoice(0, "a", [Token(0, 1, ending)], ending)], PromptTokens(1, 0))
    assert whole["choices"][0]["finish_reason"] == expected
    assert form.piece(GrowingChoice(0), "", Token(0, 1, ending))["choices"][0]["finish_reason"] == (ending and expected)


def test_vectors_as_numbers_and_as_bytes() -> None:
    vectors = np.array([[1.0, -0.5], [0.25, 2.0]], np.float32)
    head = {"object": "list", "model": "m", "usage": {"prompt_tokens": 9, "total_tokens": 9}}
    for as_bytes, expected in ((False, [[1.0, -0.5], [0.25, 2.0]]), (True, ["AACAPwAAAL8=", "AACAPgAAAEA="])):
        found = embeddings("m", vectors, 9, as_bytes)
        data = [{"object": "embedding", "index": i, "embedding": each} for i, each in enumerate(expected)]
        assert found == {**head, "data": data}


# -- in one process ------------------------------------------------------------------------------------------------


class Writer(ServedWriter):
    """A model with a scheduler that calls the test's function with the submitted requests."""

    def __init__(self, submit: Callable[[Sequence[tuple[TextOrder, Any]]], None]) -> None:
        def submitted(orders: Sequence[tuple[TextOrder, Any]]) -> list[Any]:
            submit(orders)
            return [
                SimpleNamespace(cancel=lambda: self.cancelled.append(1), reused=reused, waited=0.25)
                for _, reused in zip(orders, (5, 3, 1, 2, 9, 4), strict=False)
            ]

        self.cancelled: list[int] = []
        self.name = "tiny"
        tokenizer = SimpleNamespace(text=lambda ids, **_: "".join(WORDS[id] for id in ids))
        self.writer = SimpleNamespace(  # type: ignore[assignment]
            tokenizer=tokenizer,
            images=None,
            end=(),
            asked=FolderRules(),
            tokens=lambda texts: [[0, 1, 2, 3] for _ in texts],
        )
        self.clips = False
        session = SimpleNamespace(capacity=9, vocabulary=4)
        self.scheduler = SimpleNamespace(  # type: ignore[assignment]
            submit=submitted, session=session, check=lambda ids: None, load=lambda: Load(), positions=0
        )


class Asked:
    """An application that is called without a socket; it records status, headers and body of each answer."""

    def __init__(self, *served: Any, limits: Limits | None = None, key: str | None = None) -> None:
        self.server = Server(served, limits=limits, key=key)
        self.application = self.server.application()
        self.headers: dict[str, str] = {}

    def __call__(self, method: str, path: str, *messages: Any, **headers: str) -> tuple[int, Any]:
        kinds = {"content-type": "application/json", **headers}
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "query_string": b"",
            "path": path, "headers": [(name.encode(), value.encode()) for name, value in kinds.items()],
        }  # fmt: skip
        parts, sent = list(messages), list[Any]()

        async def receive() -> Any:
            return parts.pop(0) if parts else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(self.application(scope, receive, send))
        self.headers = {name.decode(): value.decode() for name, value in sent[0].get("headers", ())}
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]).decode()

    def post(self, path: str, body: Any, *more: Any, **headers: str) -> tuple[int, Any]:
        return self("POST", path, {"type": "http.request", "body": json.dumps(body).encode()}, *more, **headers)


PROMPT = {"model": "tiny", "prompt": "a", "max_tokens": 4}


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("ends", "status", "expected"),
    [
        (QueueFull("5 texts wait"), 429, ("5 texts wait; try again later", "rate_limit_error", "queue_full")),
        (Closed("closed"), 503, ("the server is being shut down", "server_error", "shutting_down")),
        (UsageError("no room", received="9"), 400, ("no room; received 9", "invalid_request_error")),
        (Cut.LATE, 408, ("the request exceeded the time limit", "invalid_request_error", "timeout")),
        (Cut.CLOSED, 503, ("the server is being shut down", "server_error", "shutting_down")),
        (UsageError("a step\nfailed", hint="less"), 500, ("a step failed; less", "server_error")),
    ],
)  # fmt: skip
def test_texts_that_are_given_up(stream: bool, ends: Any, status: int, expected: tuple[str, ...]) -> None:
    """The answer comes immediately and has its own status; in a stream that has begun, it is the last event."""

    def submit(orders: Sequence[tuple[TextOrder, Any]]) -> None:
        if isinstance(ends, Exception) and status != 500:
            raise ends
        for _, tell in orders:
            tell(Ended(ends))

    writer = Writer(submit)
    asked = Asked(writer)
    found, body = asked.post("/v1/completions", {**PROMPT, "stream": stream})
    assert (found, json.loads(body)) == (status, error(*expected))
    assert bool(writer.cancelled) == isinstance(ends, Cut) or status == 500
    assert asked.headers.get("retry-after") == ("1" if status == 429 else None)
    assert f'treadle_requests_total{{route="/v1/completions",status="{status}"}} 1.0' in asked("GET", "/metrics")[1]


def test_a_stream_that_is_given_up_ends_with_the_error() -> None:
    def submit(orders: Sequence[tuple[TextOrder, Any]]) -> None:
        (_, tell), (_, other) = orders
        tell(Token(0, 0))
        other(Ended(Cut.LATE))

    writer = Writer(submit)
    asked = Asked(writer)
    status, body = asked.post("/v1/completions", {**PROMPT, "n": 2, "stream": True})
    assert asked.headers["cache-control"] == "no-store"
    first, last, rest = body.split("\n\n")
    assert (status, rest) == (200, "")
    assert json.loads(first.removeprefix("data: "))["object"] == "text_completion"
    late = error("the request exceeded the time limit", "invalid_request_error", "timeout")
    assert json.loads(last.removeprefix("data: ")) == late
    assert len(writer.cancelled) >= 2


def test_prompts_that_several_texts_follow_count_once() -> None:
    """The reported number of reused prompt tokens is the minimum over the texts of a prompt."""

    def submit(orders: Sequence[tuple[TextOrder, Any]]) -> None:
        assert [order.number for order, _ in orders] == [0, 1] * 3
        assert {order.choosing.most for order, _ in orders} == {6}
        for _, tell in orders:
            tell(Token(0, 0, "stop"))
            tell(Ended())

    asked = Asked(Writer(submit))
    status, body = asked.post("/v1/completions", {"model": "tiny", "prompt": ["a", "b", "c"], "max_tokens": 6, "n": 2})
    assert status == 200
    used = {"prompt_tokens": 12, "completion_tokens": 6, "total_tokens": 18}
    assert json.loads(body)["usage"] == {**used, "prompt_tokens_details": {"cached_tokens": 3 + 1 + 4}}
    assert 'treadle_first_token_seconds_count{model="tiny"} 1.0' in asked("GET", "/metrics")[1]


def test_without_an_event_loop_nothing_is_answered() -> None:
    how: Any = SimpleNamespace(choices=1)
    with pytest.raises(RuntimeError, match="no running event loop"):
        Answering(Writer(lambda orders: pytest.fail("they were submitted")), [(1,)], how, seconds=1.0)


def test_a_text_of_no_length_may_be_as_long_as_there_is_room() -> None:
    def submit(orders: Sequence[tuple[TextOrder, Any]]) -> None:
        assert [order.choosing.most for order, _ in orders] == [9 - 4 + 1]
        raise Closed("closed")

    writer = Writer(submit)
    writer.chat_prompt = lambda messages, images, variables: RowPrompt([0, 1, 2, 3])  # type: ignore[method-assign]
    messages = [{"role": "user", "content": "a"}]
    assert Asked(writer).post("/v1/chat/completions", {"model": "tiny", "messages": messages})[0] == 503


def test_limits_of_a_request() -> None:
    assert Limits() == Limits(body=2**20, arrival=30.0, seconds=600.0)


def test_a_caller_who_goes_is_counted_and_given_up() -> None:
    writer = Writer(lambda orders: None)
    asked = Asked(writer)
    asked.post("/v1/completions", PROMPT, {"type": "http.disconnect"})
    assert len(writer.cancelled) == 1
    assert 'treadle_requests_total{route="/v1/completions",status="499"} 1.0' in asked("GET", "/metrics")[1]


def test_a_failure_of_the_server_is_told_to_both(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(texts: Any, truncate: bool) -> Embedded:
        raise ZeroDivisionError("by nothing")

    asked = Asked(ServedEmbedder("vectors", SimpleNamespace(embed_reporting=fail, width=2), queue=1))  # type: ignore[arg-type]
    status, body = asked.post("/v1/embeddings", {"model": "vectors", "input": "a"})
    assert (status, json.loads(body)) == (500, error("the server failed to answer", "server_error", "internal"))
    assert capsys.readouterr().err == "POST /v1/embeddings: ZeroDivisionError: by nothing\n"


def test_a_body_that_is_late_or_too_long_is_refused() -> None:
    asked = Asked(Writer(lambda orders: None), limits=Limits(body=4, arrival=0.01))
    part = {"type": "http.request", "body": b"{", "more_body": True}
    late = error("the body did not arrive in time", "invalid_request_error", "timeout")
    long = error("the body has more than 4 bytes", "invalid_request_error", "body_too_large")
    for parts, status, expected in ((1, 408, late), (4, 408, late), (5, 413, long)):
        found, body = asked("POST", "/v1/completions", *[part] * parts)
        assert (found, json.loads(body)) == (status, expected)


@pytest.mark.parametrize(
    ("given", "status"),
    [(None, 401), ("Bearer a-key", 200), ("bearer  a-key", 200), ("Basic a-key", 401), ("Bearer a-key2", 401)],
)
def test_requests_with_the_key_are_served(given: str | None, status: int) -> None:
    """The server's health can be queried without a key."""
    asked = Asked(Writer(lambda orders: None), key="a-key")
    headers = {} if given is None else {"authorization": given}
    found, body = asked("GET", "/v1/models", **headers)
    assert found == status
    if status == 401:
        assert json.loads(body) == error("this server needs an API key", "authentication_error", "invalid_api_key")
        assert asked.headers["www-authenticate"] == "Bearer"
    assert asked("GET", "/health") == (200, '{"status":"ok"}')
    assert asked("GET", "/metrics", **headers)[0] == status


def test_served_models_are_listed() -> None:
    asked = Asked(Writer(lambda orders: None))
    asked.server.started = 7
    facts = {"id": "tiny", "object": "model", "created": 7, "owned_by": "treadle"}
    assert json.loads(asked("GET", "/v1/models")[1]) == {"object": "list", "data": [facts]}
    assert json.loads(asked("GET", "/v1/models/tiny")[1]) == facts
    status, body = asked("GET", f"/v1/models/{'x' * 99}")
    missing = error(f"no model '{'x' * 80}' is served, only tiny", "not_found_error", "model_not_found", "model")
    assert (status, json.loads(body)) == (404, missing)
    assert json.loads(asked("GET", "/v1/nothing")[1]) == error("there is no route with this path", "not_found_error")
    assert asked("GET", "/health/")[0] == 404
    for path in ("/v1/models", "/v1/completions"):
        status, body = asked("PUT", path)
        other = error("this path does not support this method", "invalid_request_error")
        assert (status, json.loads(body)) == (405, other)
    asked("GET", "/metrics")
    assert asked.headers["content-type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize("stream", [False, True])
def test_a_talk_is_answered_as_a_talk(stream: bool) -> None:
    """If several tokens arrive one after the other, only the first is timed."""

    def submit(orders: Sequence[tuple[TextOrder, Any]]) -> None:
        ((_, tell),) = orders
        loop = asyncio.get_running_loop()
        for n, event in enumerate([Token(0, 0), Token(0, 1), Token(0, 3, "stop"), Ended()]):
            loop.call_later(n / 200, tell, event)

    writer = Writer(submit)
    writer.chat_prompt = lambda messages, images, variables: RowPrompt([0, 1])  # type: ignore[method-assign]
    asked = Asked(writer)
    messages = [{"role": "user", "content": "a"}]
    status, body = asked.post("/v1/chat/completions", {"model": "tiny", "messages": messages, "stream": stream})
    assert status == 200
    if stream:
        *events, done, rest = body.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        output = [json.loads(each.removeprefix("data: ")) for each in events]
        assert {each["object"] for each in output} == {"chat.completion.chunk"}
        assert output[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert [each["choices"][0]["finish_reason"] for each in output] == [None, None, None, "stop"]
    else:
        whole = json.loads(body)
        assert whole["object"] == "chat.completion"
        assert whole["choices"][0]["message"]["role"] == "assistant"
        assert whole["usage"]["completion_tokens"] == 3
    lines = dict(line.rsplit(" ", 1) for line in asked("GET", "/metrics")[1].splitlines() if line[0] != "#")
    assert lines['treadle_first_token_seconds_count{model="tiny"}'] == "1.0"
    assert 0 <= float(lines['treadle_first_token_seconds_sum{model="tiny"}']) < 60
    assert 0 <= float(lines['treadle_request_seconds_sum{route="/v1/chat/completions"}']) < 60


@pytest.mark.parametrize(("logprobs", "likely"), [(None, None), (0, 0), (3, 3)])
def test_an_order_is_what_was_asked_for(
    logprobs: int | None, likely: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts of a request end at the model's own end tokens, at the caller's strings, and when the request's time is
    over.
    """
    orders: list[TextOrder] = []

    def submit(given: Sequence[tuple[TextOrder, Any]]) -> None:
        orders.extend(order for order, _ in given)
        raise Closed("closed")

    writer = Writer(submit)
    writer.writer.end = (2, 1)
    monkeypatch.setattr(answering, "time", SimpleNamespace(monotonic=lambda: 100.0))
    how = {"logprobs": logprobs, "stop": ["at"], "temperature": 0.5, "seed": 4, "presence_penalty": 1, "n": 2}
    Asked(writer, limits=Limits(seconds=7.0)).post("/v1/completions", {**PROMPT, **how})
    assert [(order.prompt, order.number, order.until) for order in orders] == [((0, 1, 2, 3), n, 107.0) for n in (0, 1)]
    choosing = orders[0].choosing
    assert (choosing.most, choosing.likely, choosing.stop) == (4, likely, frozenset({1, 2}))
    assert choosing.sampling == Sampling(temperature=0.5, seed=4)
    assert choosing.rules == TokenRules(presence_penalty=1.0)
    assert choosing.until is not None
    assert [choosing.until(0, token) for token in (0, 2, 3)] == [False, False, True], "the sat, without the end token"


@pytest.mark.parametrize(
    ("kind", "status"),
    [("application/json", 503), (" Application/JSON ; charset=utf-8", 503), ("text/plain", 415), ("", 415)],
)
def test_bodies_are_json(kind: str, status: int) -> None:
    def submit(orders: Any) -> None:
        raise Closed("closed")

    asked = Asked(Writer(submit))
    assert asked.post("/v1/completions", PROMPT, **{"content-type": kind})[0] == status


def test_bodies_are_as_long_as_they_may_be() -> None:
    def submit(orders: Any) -> None:
        raise Closed("closed")

    body = json.dumps(PROMPT).encode()
    parts = [{"type": "http.request", "body": body[:9], "more_body": True}, {"type": "http.request", "body": body[9:]}]
    for limit, status in ((len(body), 503), (len(body) - 1, 413)):
        asked = Asked(Writer(submit), limits=Limits(body=limit))
        found, answer = asked("POST", "/v1/completions", *parts)
        assert found == status
    message = f"the body has more than {len(body) - 1} bytes"
    assert json.loads(answer) == error(message, "invalid_request_error", "body_too_large")


def test_models_do_what_they_are_for() -> None:
    writer = Writer(lambda orders: None)
    found = Embedded(np.array([[0.5, 1.0]], np.float32), (3,), ())
    opened: Any = SimpleNamespace(width=2, embed_reporting=lambda texts, truncate: found)
    embedder: Any = ServedEmbedder("vectors", opened, queue=1)
    asked = Asked(writer, embedder)
    status, body = asked.post("/v1/embeddings", {"model": "vectors", "input": "a"})
    assert (status, json.loads(body)) == (200, embeddings("vectors", found.vectors, 3, as_bytes=False))
    for path, given, what in (
        ("/v1/completions", {**PROMPT, "model": "vectors"}, "vectors computes embeddings, and does not generate text"),
        ("/v1/embeddings", {"model": "tiny", "input": "a"}, "tiny generates text, and has no embeddings"),
    ):
        status, body = asked.post(path, given)
        assert (status, json.loads(body)) == (400, error(what, "invalid_request_error", param="model"))


def test_a_model_that_generates_may_embed() -> None:
    """It is opened for embeddings at the first request for them, and opened once, also if this fails."""
    opened: list[str] = []

    def embedder() -> Any:
        opened.append("embedder")
        return SimpleNamespace(embed_reporting=lambda texts, truncate: Embedded(np.ones((1, 2), np.float32), (3,), ()))

    def fails() -> Any:
        opened.append("failure")
        raise UsageError("model tiny has no input lengths")

    both, one = Writer(lambda orders: None), Writer(lambda orders: None)
    both._open_embedder, one._open_embedder, one.name = embedder, fails, "other"
    asked = Asked(both, one)
    for _ in range(2):
        status, body = asked.post("/v1/embeddings", {"model": "tiny", "input": "a"})
        assert (status, json.loads(body)["data"][0]["embedding"]) == (200, [1.0, 1.0])
        status, body = asked.post("/v1/embeddings", {"model": "other", "input": "a"})
        what = "other generates text, and has no embeddings: model tiny has no input lengths"
        assert (status, json.loads(body)) == (400, error(what, "invalid_request_error", param="model"))
    assert opened == ["embedder", "failure"]
