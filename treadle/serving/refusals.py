"""What a caller is told who asked for what cannot be: a status, and an error object as OpenAI's clients read it."""

from __future__ import annotations

from typing import Any

from treadle.files.errors import TreadleError

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestRefusal(Exception):
    """An answer that is no answer.

    status   of HTTP: 4xx where the caller can do something about it
    message  one sentence or two
    field    of the body that is wrong, if one is
    code     a word for programs
    headers  beside the body
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
        """The error object."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}


def refused(
    error: TreadleError, *, status: int = 400, field: str | None = None, code: str | None = None
) -> RequestRefusal:
    """An error of ours as an answer: what is wrong, what was received, what to do."""
    said = [error.what]
    if error.received:
        said.append(f"received {error.received}")
    if error.hint:
        said.append(str(error.hint))
    return RequestRefusal(status, "; ".join(" ".join(part.split()) for part in said), field=field, code=code)
