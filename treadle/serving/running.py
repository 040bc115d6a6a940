"""The server process: listen on an address, serve, and shut down gracefully."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from treadle.ir.collector_pause import objects_kept
from treadle.ir.errors import Hint, UsageError
from treadle.serving.application import Limits, Server
from treadle.serving.models import Served
from treadle.serving.observing import RequestLog

_BACKLOG = 2048
CONNECTIONS = 1024
"""Maximum number of connections. Further connections get status 503."""
_LINGER = 2
"""Seconds in which clients can read the ends of their responses before connections are closed."""


class _Process(uvicorn.Server):
    """uvicorn's server, which announces itself when it accepts requests, and drains the application before it closes
    connections.
    """

    def __init__(self, config: uvicorn.Config, server: Server, drain: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._server, self._drain, self._ready = server, drain, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._server.drain(self._drain, is_hurried=lambda: self.force_exit)
        await super().shutdown(sockets)


def serve(
    served: Sequence[Served],
    *,
    host: str,
    port: int,
    limits: Limits,
    key: str | None = None,
    drain: float = 30.0,
    log: RequestLog | None = None,
    origins: Sequence[str] = (),
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve until SIGINT or SIGTERM. Then running requests have `drain` seconds to finish; new ones get status 503.

    port    the port to listen on; 0: any free port
    ready   called with the server's URL once it accepts requests, and a signal ends it in order

    Raises UsageError if the server cannot listen at the address.
    """
    server = Server(served, limits=limits, key=key, log=log, origins=origins)
    listening = _listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"
    config = uvicorn.Config(
        server.application(),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=_LINGER,
    )
    process = _Process(config, server, drain, lambda: ready(address))
    with _ended_by_signals(process), objects_kept():
        try:
            process.run(sockets=[listening])
        finally:
            listening.close()


@contextmanager
def _ended_by_signals(process: uvicorn.Server) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the server, also before it has started. uvicorn raises a signal again after the
    shutdown, which then has no further effect, so that the process exits with status 0.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, process.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
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
