"""Connections on which two ranks say JSON objects, a line each. A send never waits for long.

What is said is under way at once: TCP would hold a short text back until an earlier one is acknowledged, which may take
tens of milliseconds. To close a connection with something unread then throws away what was held back, and so does a
process that ends: `end` lets the other side hear everything first.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

LONGEST = 1 << 16
"""Bytes of what one rank says at once."""


class RankConnection:
    """A connection between two ranks.

    rank  which one is at the other end, once it has said so
    """

    def __init__(self, connection: socket.socket, patience: float) -> None:
        """patience  seconds that a send, or a look for what came, waits at most"""
        self.socket = connection
        self.socket.settimeout(patience)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rank: int | None = None
        self._begun = b""

    def send(self, message: Mapping[str, Any]) -> None:
        with suppress(OSError):  # that the other side is gone is known from what is received
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def received(self) -> list[dict[str, Any]] | None:
        """What came; None where the connection has ended, or says what none of ours does."""
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
        """Say nothing more, and close it when the other side has: it has heard everything then.

        within  seconds after which it is closed anyway
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
        """Close it at once, whatever is under way."""
        with suppress(OSError):
            self.socket.close()
