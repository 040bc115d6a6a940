"""Connections between two ranks that exchange JSON objects, one per line. A send never blocks for long.

Nagle's algorithm is disabled, so data is sent immediately. Otherwise TCP would hold back a short text until an earlier
one is acknowledged, which may take tens of milliseconds. Closing a connection, or ending the process, would then
discard the data that is held back. `end` waits until the other side has read everything.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

LONGEST = 1 << 16
"""Maximum number of bytes of one message."""


class RankConnection:
    """A connection between two ranks.

    rank  the rank at the other end, once it has identified itself
    """

    def __init__(self, connection: socket.socket, patience: float) -> None:
        """patience  maximum seconds that a send, or a poll for data, waits"""
        self.socket = connection
        self.socket.settimeout(patience)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rank: int | None = None
        self._begun = b""

    def send(self, message: Mapping[str, Any]) -> None:
        with suppress(OSError):  # a lost connection is detected on receiving
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def received(self) -> list[dict[str, Any]] | None:
        """Return the received messages; None if the connection has ended or sent an invalid message."""
        try:
            data = self.socket.recv(LONGEST)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data or len(self._begun) > LONGEST:
            return None
        *lines, self._begun = (self._begun + data).split(b"\n")
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return found if all(isinstance(each, dict) for each in found) else None

    def end(self, within: float) -> None:
        """Stop sending, and close the connection after the other side has read everything and closed it.

        within  seconds after which the connection is closed in any case
        """
        until = time.monotonic() + within
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            while (left := until - time.monotonic()) > 0:
                self.socket.settimeout(left)
                if not self.socket.recv(LONGEST):
                    break
        self.close()

    def close(self) -> None:
        """Close the connection immediately. Data in flight may be lost."""
        with suppress(OSError):
            self.socket.close()
