"""HTTP error responses: a status, and an error object in OpenAI's format."""

from __future__ import annotations

from typing import Any

from treadle.files.errors import TreadleError

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestRefusal(Exception):
    """An error response.

    status   HTTP status: 4xx if the client can correct the request
    message  one or two sentences
    field    path of the invalid field in the body, if any
    code     an error code for programs
    headers  additional headers
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        field: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The error object, as OpenAI's API returns it."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}


def refused(
    error: TreadleError, *, status: int = 400, field: str | None = None, code: str | None = None
) -> RequestRefusal:
    """Return the error response for one of our errors. Its message has the error, the received value and the hint."""
    said = [error.what]
    if error.received:
        said.append(f"received {error.received}")
    if error.hint:
        said.append(str(error.hint))
    return RequestRefusal(status, "; ".join(" ".join(part.split()) for part in said), field=field, code=code)


def shutting_down() -> RequestRefusal:
    """Return the error response while the server shuts down."""
    return RequestRefusal(503, "the server is being shut down", code="shutting_down")
