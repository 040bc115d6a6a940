"""Observation of requests: an id for each, a log of requests, and the time of whole requests.

Each request has an `HttpExchange`, to which the routes add facts while they answer. When the response has ended, the
facts become a line of the log.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from treadle.ir.errors import Hint, UsageError
from treadle.serving.metrics import Metrics

HEADER = "x-request-id"
_ID = re.compile(r"[\x21-\x7e]{1,128}")
FORMS = ("json",)
"""Formats of the request log."""


@dataclass
class HttpExchange:
    """A request and its response.

    id      the client's X-Request-Id, or a random one
    route   path of the route; "" if there is none
    status  status of the response; None until it begins
    facts   further facts for the log
    """

    id: str
    route: str = ""
    status: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class RequestLog:
    """A log with a line of JSON for each request. It contains no prompts and no answers."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    @classmethod
    def open(cls, form: str, path: Path | None) -> RequestLog:
        """Open a log.

        form  a format in `FORMS`
        path  the file to append to; None: standard error

        Raises UsageError for another format, and for a file that cannot be written.
        """
        if form not in FORMS:
            raise UsageError("there is no such format of the request log", received=form, hint=" or ".join(FORMS))
        if path is None:
            return cls(sys.stderr)
        try:
            return cls(path.open("a", buffering=1, encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"the request log {path} cannot be written",
                received=error.strerror or str(error),
                hint=Hint("another file", "another --log-file"),
            ) from error

    def write(self, facts: dict[str, Any]) -> None:
        """Write the facts of a request. If the disk is full, the line is lost and the request is answered."""
        try:
            self._stream.write(json.dumps(facts, ensure_ascii=False) + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            return


class Observed:
    """An ASGI application that observes the requests of another one.

    count  called with 1 when a request begins, and with -1 when its response has ended
    """

    def __init__(
        self, application: Any, metrics: Metrics, log: RequestLog | None, count: Callable[[int], None]
    ) -> None:
        self.application, self.metrics, self.log, self.count = application, metrics, log, count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.application(scope, receive, send)
            return
        headers = dict(scope["headers"])
        wanted = headers.get(HEADER.encode(), b"").decode("latin-1")
        exchange = HttpExchange(wanted if _ID.fullmatch(wanted) else secrets.token_hex(16))
        scope.setdefault("state", {})["exchange"] = exchange

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                own = (HEADER.encode(), exchange.id.encode())
                message = {**message, "headers": [*message.get("headers", ()), own]}
            await send(message)

        started = time.monotonic()
        self.count(1)
        try:
            await self.application(scope, receive, sending)
        finally:
            self.count(-1)
            seconds = time.monotonic() - started
            self.metrics.whole(exchange.route or "other", seconds)
            if self.log is not None:
                self.log.write(_line(scope, exchange, seconds))


def _line(scope: Any, exchange: HttpExchange, seconds: float) -> dict[str, Any]:
    client = scope.get("client")
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": exchange.id,
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"],
        "status": exchange.status,
        "seconds": round(seconds, 6),
        **exchange.facts,
    }
