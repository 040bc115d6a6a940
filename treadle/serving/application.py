"""The server: routes, limits, API key and metrics, on Starlette.

    POST /v1/completions, /v1/chat/completions, /v1/embeddings, /tokenize, /detokenize
    GET  /v1/models, /v1/models/NAME, /metrics (Prometheus's text format), /health, /ready, /version

Every error response is an error object, with status 4xx, or 5xx if the server failed. If the client of a request
disconnects, the request is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

import treadle
from treadle.runtime.row_inputs import RowPrompt
from treadle.serving import requests
from treadle.serving.answering import Answering, TokenEvent
from treadle.serving.answers import DONE, AnswerForm, GrowingChoice, embeddings, event, text_of
from treadle.serving.fields import Fields
from treadle.serving.metrics import Metrics
from treadle.serving.models import Served, ServedWriter
from treadle.serving.observing import HEADER, HttpExchange, Observed, RequestLog
from treadle.serving.refusals import RequestRefusal, shutting_down
from treadle.serving.requests import WantedTexts

JSON = "application/json"
GONE = 499
"""The status, in metrics, of a request whose client has disconnected, as in nginx."""


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    body     maximum size of the body in bytes
    arrival  seconds within which the body must arrive
    seconds  seconds within which the response must end
    """

    body: int = 1 << 20
    arrival: float = 30.0
    seconds: float = 600.0


class Server:
    """The application's state.

    served   models by name
    key      the API key that clients must send; None: no key is needed
    log      the log of requests, if there is one
    origins  the origins of web pages that may send requests; "*": all
    active   number of requests whose responses have not ended
    """

    def __init__(
        self,
        served: Sequence[Served],
        *,
        limits: Limits | None = None,
        key: str | None = None,
        log: RequestLog | None = None,
        origins: Sequence[str] = (),
    ) -> None:
        self.served = {each.name: each for each in served}
        self.limits, self.key, self.log, self.origins = limits or Limits(), key, log, tuple(origins)
        self.active = 0
        self._is_closing = False
        self._arriving: set[asyncio.Timeout] = set()
        self.started = int(time.time())
        self.metrics = Metrics([each for each in served if isinstance(each, ServedWriter)])

    def application(self, *, drain: float = 0.0) -> Starlette:
        """Return an ASGI application. It starts the schedulers. When it ends, running requests have `drain` seconds to
        finish, unless `drain` was called before.
        """

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            writers = [each for each in self.served.values() if isinstance(each, ServedWriter)]
            for each in writers:
                each.scheduler.start()
            try:
                yield
            finally:
                for each in writers:
                    await asyncio.to_thread(each.close, drain=drain)

        routes = [
            self._route("/v1/completions", "POST", self.complete),
            self._route("/v1/chat/completions", "POST", self.chat),
            self._route("/v1/embeddings", "POST", self.embed),
            self._route("/v1/models", "GET", self.models),
            self._route("/v1/models/{name:path}", "GET", self.model),
            self._route("/metrics", "GET", self.scrape),
            self._route("/tokenize", "POST", self.tokenize),
            self._route("/detokenize", "POST", self.detokenize),
            self._route("/health", "GET", self.health),
            self._route("/ready", "GET", self.ready),
            self._route("/version", "GET", self.version),
        ]
        middleware = [Middleware(Observed, metrics=self.metrics, log=self.log, count=self._count)]
        if self.origins:
            middleware.append(
                Middleware(
                    CORSMiddleware,
                    allow_origins=self.origins,
                    allow_methods=["GET", "POST"],
                    allow_headers=["*"],
                    expose_headers=[HEADER, "retry-after"],
                )
            )
        handlers: Mapping[Any, Callable[[Request, Any], Awaitable[Response]]] = {HTTPException: _unrouted}
        made = Starlette(routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers=handlers)
        made.router.redirect_slashes = False
        return made

    async def drain(self, seconds: float, *, is_hurried: Callable[[], bool] = lambda: False) -> None:
        """Refuse new requests, and those whose bodies have not arrived. Wait until the other requests are answered, at
        most this number of seconds, or until `is_hurried`. Then end the remaining ones with an error.
        """
        self._is_closing = True
        for limit in self._arriving:
            with contextlib.suppress(RuntimeError):  # it has just expired
                limit.reschedule(0.0)
        until = time.monotonic() + seconds
        while self.active and time.monotonic() < until and not is_hurried():
            await asyncio.sleep(0.02)
        for each in self.served.values():
            if isinstance(each, ServedWriter):
                await asyncio.to_thread(each.close, drain=0.0)

    def _count(self, change: int) -> None:
        self.active += change

    # -- routes ------------------------------------------------------------------------------------------------

    async def complete(self, request: Request) -> Response:
        """Return completions of prompts."""
        wanted = requests.read_completions(await self._fields(request))
        served = self._writer(wanted.how.model)
        prompts = [served.prompt_ids(prompt) for prompt in wanted.prompts]
        echoed = [served.prompt_text(prompt) for prompt in wanted.prompts] if wanted.how.echo else []
        return await self._answered(request, served, prompts, wanted.how, chat=False, echoed=echoed)

    async def chat(self, request: Request) -> Response:
        """Return a chat completion of messages."""
        wanted = requests.read_chat(await self._fields(request))
        served = self._writer(wanted.how.model)
        prompt = await asyncio.to_thread(served.chat_prompt, wanted.messages, wanted.images, wanted.variables)
        return await self._answered(request, served, [tuple(prompt.tokens)], wanted.how, chat=True, begin=prompt)

    async def embed(self, request: Request) -> Response:
        """Return embeddings of texts."""
        wanted = requests.read_embeddings(await self._fields(request))
        served = self._named(wanted.model)
        if isinstance(served, ServedWriter):
            served = await asyncio.to_thread(served.embedder)
        found = await asyncio.to_thread(served.embed, wanted.texts)
        return _json(embeddings(served.name, found.vectors, sum(found.tokens), wanted.as_bytes))

    async def models(self, request: Request) -> Response:
        """Return the list of served models."""
        return _json({"object": "list", "data": [self._model_facts(each) for each in self.served.values()]})

    async def model(self, request: Request) -> Response:
        """Return one of the served models."""
        return _json(self._model_facts(self._named(request.path_params["name"])))

    async def scrape(self, request: Request) -> Response:
        """Return the metrics."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def health(self, request: Request) -> Response:
        """Return status 200 while the server runs."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Return status 200 while the server accepts requests, 503 while it is shutting down."""
        if self._is_closing:
            raise shutting_down()
        return _json({"status": "ready"})

    async def version(self, request: Request) -> Response:
        """Return the version of Treadle."""
        return _json({"version": treadle.__version__})

    async def tokenize(self, request: Request) -> Response:
        """Return the token ids of a prompt, or of messages, as vLLM does."""
        wanted = requests.read_tokenize(await self._fields(request))
        served = self._writer(wanted.model)
        if wanted.prompt is None:
            asked = (wanted.messages, wanted.images, wanted.variables)
            ids = tuple((await asyncio.to_thread(served.chat_prompt, *asked, checked=False)).tokens)
        else:
            ids = served.text_ids(wanted.prompt, special=wanted.special)
        capacity = served.scheduler.session.capacity
        return _json({"count": len(ids), "max_model_len": capacity, "tokens": list(ids)})

    async def detokenize(self, request: Request) -> Response:
        """Return the text of token ids, as vLLM does."""
        name, ids = requests.read_detokenize(await self._fields(request))
        return _json({"prompt": self._writer(name).text_of(ids)})

    # -- shared by routes ---------------------------------------------------------------------------------------

    def _route(self, path: str, method: str, answer: Callable[[Request], Awaitable[Response]]) -> Route:
        async def answered(request: Request) -> Response:
            started = time.monotonic()
            _exchange(request).route = path
            try:
                if path not in ("/health", "/ready"):
                    self._check_key(request)
                if self._is_closing and method == "POST":
                    raise shutting_down()
                response = await answer(request)
            except RequestRefusal as refusal:
                response = _json(refusal.body, refusal.status, refusal.headers)
            except ClientDisconnect:
                response = Response(status_code=GONE)  # the client has gone and does not read it
            except Exception as error:
                print(f"{method} {path}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                response = _json(RequestRefusal(500, "the server failed to answer", code="internal").body, 500)
            self.metrics.count(path, response.status_code, time.monotonic() - started)
            return response

        return Route(path, answered, methods=[method])

    def _check_key(self, request: Request) -> None:
        if self.key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            raise RequestRefusal(
                401, "this server needs an API key", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )

    async def _fields(self, request: Request) -> Fields:
        """Return the fields of the body. Raises RequestRefusal if the body is not JSON, is too large, or arrives too
        late.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON:
            raise RequestRefusal(415, f"the body must be of the type {JSON}", code="unsupported_media_type")
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.arrival) as limit:
                self._arriving.add(limit)
                try:
                    async for part in request.stream():
                        size += len(part)
                        if size > self.limits.body:
                            raise RequestRefusal(
                                413, f"the body has more than {self.limits.body} bytes", code="body_too_large"
                            )
                        parts.append(part)
                finally:
                    self._arriving.remove(limit)
        except TimeoutError:
            if self._is_closing:
                raise shutting_down() from None
            raise RequestRefusal(408, "the body did not arrive in time", code="timeout") from None
        return requests.read_body(b"".join(parts))

    def _named(self, name: str) -> Served:
        found = self.served.get(name)
        if found is None:
            known = ", ".join(self.served)
            raise RequestRefusal(
                404, f"no model {name[:80]!r} is served, only {known}", field="model", code="model_not_found"
            )
        return found

    def _writer(self, name: str) -> ServedWriter:
        found = self._named(name)
        if not isinstance(found, ServedWriter):
            raise RequestRefusal(400, f"{found.name} computes embeddings, and does not generate text", field="model")
        return found

    def _model_facts(self, served: Served) -> dict[str, Any]:
        return {"id": served.name, "object": "model", "created": self.started, "owned_by": "treadle"}

    async def _answered(
        self,
        request: Request,
        served: ServedWriter,
        prompts: Sequence[tuple[int, ...]],
        how: WantedTexts,
        *,
        chat: bool,
        begin: RowPrompt | None = None,
        echoed: Sequence[str] = (),
    ) -> Response:
        exchange = _exchange(request)
        exchange.facts |= {"model": served.name, "stream": how.streams, "prompt_tokens": sum(map(len, prompts))}
        served.check(how)
        answer = AnswerForm(served.name, chat, how.likely, served.shown)
        choices = [GrowingChoice(i) for i in range(len(prompts) * how.choices)]
        for choice in choices if echoed else ():
            choice.prompt = echoed[choice.index // how.choices]
        started = time.monotonic()  # the scheduler's thread may begin before the next statement
        answering = Answering(served, prompts, how, seconds=self.limits.seconds, begin=begin)
        bursts = self._timed(answering, served, choices, exchange, started)
        if how.streams:
            first = asyncio.ensure_future(anext(bursts, None))  # an error before the first token sets the status
            await asyncio.wait([first])
            if (error := first.exception()) is not None:
                raise error
            events = _events(answer, answering, first.result(), bursts, choices, how.usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        gone = asyncio.ensure_future(_gone(request))
        whole = asyncio.ensure_future(_collected(bursts, choices))
        try:
            await asyncio.wait([gone, whole], return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise ClientDisconnect
            whole.result()
        finally:
            gone.cancel()
            whole.cancel()
            answering.cancel()
        return _json(answer.whole(choices, answering.read))

    async def _timed(
        self,
        answering: Answering,
        served: ServedWriter,
        choices: Sequence[GrowingChoice],
        exchange: HttpExchange,
        started: float,
    ) -> AsyncIterator[list[TokenEvent]]:
        """Yield the events. Record their times in the metrics, and the facts of the texts in the log.

        started  the time on the monotonic clock before the texts were submitted
        """
        last: dict[int, float] = {}
        try:
            async for burst in answering:
                now = time.monotonic()
                if not last:
                    self.metrics.first(served.name, now - started)
                    exchange.facts["first_token_seconds"] = round(now - started, 6)
                for each in burst:
                    if each.index in last:
                        self.metrics.between(served.name, now - last[each.index])
                    last[each.index] = now
                yield burst
        finally:
            waited = [ticket.waited for ticket in answering.tickets if ticket.waited is not None]
            for seconds in waited:
                self.metrics.queued(served.name, seconds)
            exchange.facts |= {
                "cached_tokens": answering.read.held,
                "completion_tokens": sum(len(choice.tokens) for choice in choices),
                "queue_seconds": round(max(waited, default=0.0), 6),
                "finish_reasons": [choice.ending for choice in choices],
            }


async def _collected(bursts: AsyncIterator[list[TokenEvent]], choices: Sequence[GrowingChoice]) -> None:
    async for burst in bursts:
        for each in burst:
            _add(choices, each)


def _add(choices: Sequence[GrowingChoice], event: TokenEvent) -> GrowingChoice:
    choice = choices[event.index]
    choice.text += event.text
    choice.tokens.append(event.token)
    choice.ending = event.token.ending
    return choice


async def _events(
    answer: AnswerForm,
    answering: Answering,
    first: list[TokenEvent] | None,
    bursts: AsyncIterator[list[TokenEvent]],
    choices: Sequence[GrowingChoice],
    counts: bool,
) -> AsyncIterator[bytes]:
    """Yield a stream's events. The status is already sent, so an error is sent as an event.

    Events that are ready at the same time are sent as one part of the body. After each part the event loop runs other
    tasks, so that it notices a disconnected client: asyncio warns about many writes to a lost connection.
    """
    part = [event(body) for choice in choices if (body := answer.begin(choice)) is not None]
    burst = first
    try:
        while burst is not None:
            part += [event(answer.piece(_add(choices, each), each.text, each.token)) for each in burst]
            yield b"".join(part)
            part = []
            await asyncio.sleep(0)
            burst = await anext(bursts, None)
        if counts:
            part.append(event(answer.counts(choices, answering.read)))
        part.append(DONE)
    except RequestRefusal as refusal:
        part.append(event(refusal.body))
    finally:
        answering.cancel()
    yield b"".join(part)


def _exchange(request: Request) -> HttpExchange:
    exchange: HttpExchange = request.state.exchange
    return exchange


async def _gone(request: Request) -> None:
    """Wait until the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unrouted(request: Request, error: HTTPException) -> Response:
    """Return the error for an unknown route, or for a method that a route does not support."""
    what = {404: "there is no route with this path", 405: "this path does not support this method"}
    said = what.get(error.status_code, str(error.detail))
    return _json(RequestRefusal(error.status_code, said).body, error.status_code, dict(error.headers or {}))


def _json(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(text_of(body), status, headers, media_type=JSON)
