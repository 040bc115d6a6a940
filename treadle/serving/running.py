"""The server process: listen on an address, serve, and shut down gracefully."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from treadle.ir.errors import Hint, UsageError
from treadle.serving.application import Limits, Server
from treadle.serving.models import Served

_BACKLOG = 2048
CONNECTIONS = 1024
"""Maximum number of connections. Further connections get status 503."""


def serve(
    served: Sequence[Served],
    *,
    host: str,
    port: int,
    limits: Limits,
    key: str | None = None,
    drain: float = 30.0,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve until SIGINT or SIGTERM. Then running requests have `drain` seconds to finish.

    port    the port to listen on; 0: any free port
    ready   called with the server's URL once it listens

    Raises UsageError if the server cannot listen at the address.
    """
    server = Server(served, limits=limits, key=key)
    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        server.application(drain=drain),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(drain)),
    )
    ready(f"http://{shown}:{listening.getsockname()[1]}/v1")
    with _ended_by_signals():
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            listening.close()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ignore the signal that uvicorn raises again after the shutdown, so that the process exits with status 0."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        made.close()
        raise UsageError(
            f"the server cannot listen at {host}, port {port}",
            received=str(error),
            hint=Hint("another port, or host", "another --port, or --host"),
        ) from error
    return made
