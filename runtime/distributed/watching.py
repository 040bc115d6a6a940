"""The watch: ranks detect that another rank has died, failed or hangs, and all ranks end with the same error.

Every rank has one connection to rank 0. If the process at one end dies for any reason, the operating system closes the
connection, so a death is known immediately and is never inferred from silence. Several times a second, a rank reports
its activity and, if it waits for others, the duration of the wait. Rank 0 informs all ranks of a failure:

    a connection ends             its rank has died, during its last reported activity
    a rank reports a failure      the rank's own error
    a rank waits too long         the rank that does not arrive hangs, during its last reported activity

Then the main thread raises `RankError` as soon as it can: at its next collective, or when torch.distributed raises an
error. If the main thread is blocked in a collective that never completes, the process is killed. Only one rank reports
the error to the user: the rank that failed. If a rank died, rank 0 reports it; if rank 0 died, rank 1 does.
"""

from __future__ import annotations

import atexit
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from treadle.ir.errors import RankError
from treadle.runtime.distributed.rank_connections import RankConnection

PERIOD = 0.2
"""Seconds between two checks, and between two reports of a rank."""

GRACE = 1.5
"""Seconds that a main thread has to end by itself after a rank has failed."""

_PARTING = 5 * PERIOD
"""Maximum seconds that a leaving rank waits for rank 0 to receive its last message."""

FAILED = 2
"""Exit code of a process that ends because of a failure."""


@dataclass(frozen=True)
class Failure:
    """A failure, and the number of the rank that reports it to the user."""

    what: str
    received: str
    teller: int


@dataclass(frozen=True)
class RankStatus:
    """The last report of a rank.

    doing    its activity, in words
    since    seconds since the activity began
    waiting  True if it waits for others
    heard    time of the report, on this process's clock
    """

    doing: str = "starting"
    since: float = 0.0
    waiting: bool = False
    heard: float = field(default_factory=time.monotonic)

    def for_seconds(self) -> float:
        """Duration of the activity so far, if it has not changed since the report."""
        return self.since + time.monotonic() - self.heard

    def silent_for(self) -> float:
        """Seconds since the report arrived."""
        return time.monotonic() - self.heard

    def message(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {"doing": self.doing, "since": self.since, "waiting": self.waiting}

    def __str__(self) -> str:
        silent = self.silent_for()
        status = f"{'in ' * self.waiting}{self.doing}"
        return status + (f", silent for {silent:.1f} s" if silent > 10 * PERIOD else "")


class Watch:
    """One rank's part of the watch. Rank 0 is connected to all other ranks.

    rank, size  this process's rank, and the number of ranks
    timeout     seconds that a rank may wait for others
    is_orphan   a function that returns True if the process that started this one has ended
    """

    def __init__(self, rank: int, size: int, timeout: float, is_orphan: Callable[[], bool] = lambda: False) -> None:
        self.rank, self.size, self.timeout, self.is_orphan = rank, size, timeout, is_orphan
        self.failure: Failure | None = None
        self._failed = threading.Event()
        self._over = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._now = ("starting", False, time.monotonic())
        self._connections: dict[int, RankConnection] = {}
        self._said: dict[int, RankStatus] = {}
        self._left: set[int] = set()
        self._gone: set[int] = set()
        self._listener: socket.socket | None = None
        self._token = ""
        self._has_reported = False

    # -- called by the main thread -----------------------------------------------------------------------------

    def doing(self, activity: str) -> None:
        """Report a new activity. Raises RankError if a rank has failed."""
        self.check()
        self._now = activity, False, time.monotonic()

    @contextmanager
    def waiting(self, activity: str) -> Iterator[None]:
        """A context in which this rank waits for other ranks; the wait is reported. Raises RankError if a rank has
        failed.
        """
        self.check()
        before = self._now[0]
        self._now = activity, True, time.monotonic()
        try:
            yield
        finally:
            self._now = before, False, time.monotonic()

    def check(self) -> None:
        """Raise RankError if a rank has failed."""
        if self.failure is not None:
            raise self.error()

    def error(self) -> RankError:
        """Return the error of the rank that has failed."""
        assert self.failure is not None
        return RankError(self.failure.what, received=self.failure.received or None)

    def explained(self, error: Exception, activity: str) -> Exception:
        """Return the exception to raise in place of an error of torch.distributed: if known, the error of the rank that
        caused it.
        """
        if self._failed.wait(GRACE):
            return self.error()
        return RankError(f"{activity}: the ranks could not communicate", received=str(error).splitlines()[0][:300])

    def settle(self, what: str, received: str = "") -> bool:
        """Report this rank's failure to all ranks; return True if this rank should also report it to the user."""
        if self.failure is None:
            what, received = what[:2000], received[:2000]  # no message may exceed `LONGEST`
            if self.rank == 0:
                self._fail(Failure(what, received, 0))
            else:
                self._say({"failed": what, "received": received})
                self._failed.wait(GRACE)
        return (self.failure is None or self.failure.teller == self.rank) and self._first_to_tell()

    def _first_to_tell(self) -> bool:
        """Return True at the first call in this process, so that only one error is reported to the user."""
        with self._lock:
            first, self._has_reported = not self._has_reported, True
        return first

    def leave(self) -> None:
        """End the watch. Rank 0 waits until the other ranks have ended, so that all are watched until then. Raises
        RankError if a rank fails.
        """
        if self.rank:
            self._left.add(self.rank)  # set before the message is sent: rank 0 may end as soon as the message arrives
            self._say({"bye": True})
        else:
            with self.waiting("waiting for other ranks to end"):
                while len(self._left) < self.size - 1:
                    self.check()
                    time.sleep(PERIOD / 20)
        self._end()

    def close(self) -> None:
        """End the watch after a failure that was or will be reported: the main thread ends the process.

        The process then skips PyTorch's cleanup, which may wait for other ranks.
        """
        if not self._closing.is_set():
            self._closing.set()
            atexit.register(self._end_at_once)

    def _end_at_once(self) -> None:
        """Exit the process. Rank 0 first waits a moment for the other ranks, so that their last messages are
        not lost.
        """
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        until = time.monotonic() + GRACE
        while self.rank == 0 and len(self._gone) < len(self._connections) and time.monotonic() < until:
            time.sleep(PERIOD / 20)
        os._exit(FAILED)

    def _end(self) -> None:
        self._over.set()
        self._thread.join(2 * _PARTING)

    # -- starting ----------------------------------------------------------------------------------------------

    def listen(self, host: str) -> str:
        """Rank 0: accept connections of other ranks from now on. Returns the port and a token, which other ranks pass
        to `connect`.
        """
        self._listener = socket.create_server((host, 0), backlog=self.size)
        self._token = secrets.token_hex(16)
        self._start(self._serve)
        return f"{self._listener.getsockname()[1]} {self._token}"

    def connect(self, host: str, port_and_token: str) -> None:
        """Another rank: connect to rank 0, with the string from `listen`. Raises RankError if rank 0 does not
        listen.
        """
        port, token = port_and_token.split()
        try:
            connection = socket.create_connection((host, int(port)), timeout=self.timeout)
        except OSError as error:
            raise RankError("rank 0 cannot be reached", received=f"{host}:{port}: {error}") from error
        self._connections[0] = RankConnection(connection, PERIOD)
        self._said[0] = RankStatus()
        self._say({"rank": self.rank, "token": token})
        self._start(self._attend)

    def absent(self) -> list[int]:
        """Rank 0: return the ranks that have not connected yet."""
        return [rank for rank in range(1, self.size) if rank not in self._connections]

    def _start(self, run: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=run, name="treadle watch", daemon=True)
        self._thread.start()

    # -- rank 0's thread ---------------------------------------------------------------------------------------

    def _serve(self) -> None:
        assert self._listener is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ, None)
            while not self._over.is_set():
                for key, _ in selector.select(PERIOD):
                    if key.data is None:
                        connection = RankConnection(self._listener.accept()[0], PERIOD)
                        selector.register(connection.socket, selectors.EVENT_READ, connection)
                    elif not self._hear(key.data):
                        selector.unregister(key.data.socket)
                self._look()
        self._listener.close()
        for connection in self._connections.values():
            connection.close()

    def _hear(self, connection: RankConnection) -> bool:
        """Process a rank's messages; return True if the connection is still open."""
        messages = connection.received()
        for message in messages or ():
            if connection.rank is None:
                rank = message.get("rank")
                if message.get("token") != self._token or not isinstance(rank, int) or rank in self._connections:
                    connection.close()  # not a connection of these ranks
                    return False
                connection.rank = rank
                self._connections[rank], self._said[rank] = connection, RankStatus()
                if self.failure is not None:  # a connected rank failed before this one connected
                    with self._lock:
                        connection.send(asdict(self.failure))
            elif "doing" in message:
                self._said[connection.rank] = RankStatus(**message)
            elif "failed" in message:
                self._fail(Failure(message["failed"], message["received"], connection.rank))
                self._left.add(connection.rank)
            elif "bye" in message:
                self._left.add(connection.rank)
        if messages is not None:
            return True
        connection.close()  # the rank that has left waits for this
        if connection.rank is not None:
            self._gone.add(connection.rank)
            if connection.rank not in self._left:
                self._left.add(connection.rank)
                self._fail(Failure(f"rank {connection.rank} has died", f"{self._said[connection.rank]}", 0))
        return False

    def _look(self) -> None:
        """Perform the periodic checks."""
        self._leave_orphan()
        self._said[0] = self._own()
        if self.failure is None:
            self._look_for_hung()
        self._tell(self._said[0].message(), self._left)

    def _look_for_hung(self) -> None:
        here = {rank: said for rank, said in self._said.items() if rank not in self._left}
        late = [r for r, said in here.items() if said.waiting and said.for_seconds() > self.timeout]
        if not late:
            return
        first = min(late)
        received = f"rank {first} waits in {here[first].doing} for {here[first].for_seconds():.1f} s"
        behind = {r: said for r, said in here.items() if not said.waiting or said.silent_for() > self.timeout / 2}
        hung = [r for r, said in behind.items() if said.for_seconds() > self.timeout / 2] or list(behind)
        if hung:
            what = f"rank {', '.join(map(str, hung))} does not arrive"
            received += "".join(f"; rank {r}: {here[r]}" for r in hung)
        else:
            what = "ranks wait for others that do not arrive"
            received = "; ".join(f"rank {r}: {said}" for r, said in sorted(here.items()))
        self._fail(Failure(what, received, 0))

    # -- another rank's thread ---------------------------------------------------------------------------------

    def _attend(self) -> None:
        connection = self._connections[0]
        with selectors.DefaultSelector() as selector:
            selector.register(connection.socket, selectors.EVENT_READ)
            while not self._over.is_set():
                if selector.select(PERIOD) and not self._obey(connection):
                    break
                self._leave_orphan()
                own = self._own()
                self._say(own.message())
                self._look_for_silence(own)
                self._over.wait(PERIOD / 4)
        connection.end(_PARTING)

    def _look_for_silence(self, own: RankStatus) -> None:
        """Record a failure if this rank waits too long and rank 0, which would name the missing rank, is silent."""
        silent = self._said[0].silent_for()
        if own.waiting and own.since > self.timeout and silent > self.timeout / 2:
            self._fail(Failure("rank 0 does not arrive", f"silent for {silent:.1f} s", 1))

    def _obey(self, connection: RankConnection) -> bool:
        """Process rank 0's messages; return True if the connection is still open."""
        messages = connection.received()
        for message in messages or ():
            if "teller" in message:
                self._fail(Failure(**message))
            else:
                self._said[0] = RankStatus(**message)
        if messages is None and self.failure is None and self.rank not in self._left:
            self._fail(Failure("rank 0 has died", f"{self._said[0]}", 1))
        return messages is not None

    # -- both --------------------------------------------------------------------------------------------------

    def _own(self) -> RankStatus:
        doing, waiting, began = self._now
        return RankStatus(doing, time.monotonic() - began, waiting)

    def _say(self, message: Mapping[str, Any]) -> None:
        """Send to rank 0; a lost connection is detected on receiving."""
        with self._lock:
            self._connections[0].send(message)

    def _tell(self, message: Mapping[str, Any], besides: Collection[int] = ()) -> None:
        """Send to all other ranks except `besides`."""
        with self._lock:
            for rank, connection in list(self._connections.items()):
                if rank not in besides:
                    connection.send(message)

    def _fail(self, failure: Failure) -> None:
        """Record the first failure, inform other ranks, and let the process end."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
        if self.rank == 0:  # also to failed ranks: if several failed, one of them learns that it has to report
            self._tell(asdict(failure))
        self._failed.set()
        threading.Thread(target=self._end_process, name="treadle end", daemon=True).start()

    def _end_process(self) -> None:
        """End a process whose main thread does not end by itself."""
        time.sleep(GRACE)
        if self._closing.is_set():
            time.sleep(GRACE)
            os._exit(FAILED)
        assert self.failure is not None
        if self.failure.teller == self.rank and self._first_to_tell():
            text = f"{self.failure.what}\n  received  {self.failure.received}" if self.failure.received else ""
            print(text or self.failure.what, file=sys.stderr, flush=True)
        os._exit(FAILED)

    def _leave_orphan(self) -> None:
        if self.is_orphan():
            os._exit(FAILED)
