"""The settings of a server: the flags of `treadle serve`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from treadle.files.shown_names import printable
from treadle.ir.errors import Hint, UsageError
from treadle.program.budgets import parse_bytes
from treadle.program.option_declarations import Flag, declare

if TYPE_CHECKING:
    from treadle.serving.application import Limits
    from treadle.serving.models import Opening
    from treadle.serving.observing import RequestLog

_ORIGIN = re.compile(r"https?://[^/\s?#@]+")


@dataclass(frozen=True)
class ServingSettings:
    """Address, rows and caches, limits, and observation of a server. Raises UsageError for invalid values, and for
    settings that need another one.
    """

    host: str = declare("127.0.0.1", "Address to listen on; 0.0.0.0 for all interfaces.", flag=Flag("host", "ADDRESS"))
    port: int = declare(8000, "Port to listen on; 0 for any free port.", flag=Flag("port", "N", least=0, most=65535))
    rows: int | None = declare(
        None,
        "Maximum number of texts generated at a time. By default 16, or fewer if memory is short.",
        flag=Flag("rows", "N", least=1),
    )
    capacity: int | None = declare(
        None,
        "Maximum number of tokens of a text, including its prompt. By default 2048.",
        flag=Flag("context", "N", least=1),
    )
    step_tokens: int | None = declare(
        None,
        "Maximum number of tokens of a step while texts are generated; prompts are split into chunks. By default 64.",
        flag=Flag("step-tokens", "N", least=1),
    )
    queue: int = declare(
        256, "Maximum number of waiting texts; further ones get HTTP status 429.", flag=Flag("queue", "N", least=1)
    )
    seconds: float = declare(600.0, "Time limit of a request in seconds.", flag=Flag("seconds", "S", least=0.1))
    body: int = declare(1 << 20, "Maximum size of a request in bytes.", flag=Flag("body", "BYTES", least=1))
    clips: bool = declare(
        False,
        "If max_tokens exceeds the context, generate fewer tokens in place of HTTP status 400.",
        flag=Flag("clip-max-tokens"),
    )
    key_file: Path | None = declare(  # noqa: RUF009
        None, "File with the API key that clients must send.", flag=Flag("key-file", "FILE")
    )
    resumes: bool | None = declare(
        None,
        "Reuse cached prefixes of prompts. By default if this keeps answers bitwise identical.",
        flag=Flag("reuse", negated=True),
    )
    prefix_cache: str | None = declare(
        None,
        "Store prefixes that no row holds in up to this much memory. By default they are dropped.",
        flag=Flag("prefix-cache", "512MB"),
    )
    log: str | None = declare(None, "Log requests: json writes a line of JSON for each.", flag=Flag(metavar="json"))
    log_file: Path | None = declare(  # noqa: RUF009
        None, "With --log: append to this file. By default standard error.", flag=Flag("log-file", "FILE")
    )
    origins: Sequence[str] = declare(
        (),
        "Origin of web pages that may send requests, such as https://example.org; '*': all. Repeatable.",
        flag=Flag("cors", "ORIGIN", tuple, many=True),
    )

    def __post_init__(self) -> None:
        self.prefix_bytes  # noqa: B018  an invalid size is refused
        if self.log_file is not None and self.log is None:
            raise UsageError("only --log accepts --log-file", hint=Hint('log="json"', "--log json"))
        wrong = next((each for each in self.origins if each != "*" and not _ORIGIN.fullmatch(each)), None)
        if wrong is not None:
            raise UsageError("an origin is a scheme and a host", received=printable(wrong), hint="https://example.org")

    @property
    def prefix_bytes(self) -> int | None:
        """The size of the prefix cache in bytes, or None. Raises UsageError for a text that is not a size."""
        return parse_bytes(self.prefix_cache, keyword="prefix_cache", flag="--prefix-cache")

    @property
    def opening(self) -> Opening:
        """The options for opening models."""
        from treadle.serving.models import Opening

        sizes = {"budget": self.step_tokens, "prefixes": self.prefix_bytes}
        return Opening(self.rows, self.capacity, self.queue, self.resumes, **sizes, clips=self.clips)

    @property
    def limits(self) -> Limits:
        """The limits of a request."""
        from treadle.serving.application import Limits

        return Limits(body=self.body, seconds=self.seconds)

    def open_log(self) -> RequestLog | None:
        """Open the log of requests, or return None. Raises UsageError for a file that cannot be written."""
        from treadle.serving.observing import RequestLog

        return None if self.log is None else RequestLog.open(self.log, self.log_file)

    def read_key(self) -> str | None:
        """Return the API key in the first line of the key file. Raises UsageError if the file has none."""
        from treadle.files.contained_files import read_regular

        if self.key_file is None:
            return None
        data = read_regular(self.key_file, 1 << 16, str(self.key_file))
        try:
            key = data.decode("ascii").strip()
        except UnicodeDecodeError:
            key = ""
        if not key or len(key.split()) != 1:
            raise UsageError(f"{self.key_file} has no key", hint="one word of ASCII characters")
        return key
