"""A scheduler: texts of many callers in one session. A separate thread runs the steps; between two steps, it opens and
closes rows.

    scheduler = Scheduler(session)
    scheduler.start()
    (ticket,) = scheduler.submit([(TextOrder(prompt=(464, 3139), choosing=Choosing(most=32)), receive)])
    ...                                   receive(token) for each token, then receive(ended), on the scheduler's thread
    ticket.cancel()                       the row of the request is free before the next step
    scheduler.close()

Between two steps, the scheduler closes the rows of cancelled requests, assigns free rows to waiting requests, and
prefills pieces of new prompts, the oldest prompt first. A step has a budget of tokens: the rows that generate take one
each, and prompts share the rest. So the time between two tokens of a text does not depend on the number and the length
of new prompts. While no row generates, prompts are prefilled together, which takes less time in total. The tokens of a
request do not depend on other requests: the bits of a row do not depend on the other rows of a step
(docs/generation.md).

If a slot holds a prefix of a prompt, from a running or a finished text, the prefix is not recomputed
(`Session.resume`). If another prompt with the same prefix is being prefilled, a prompt waits and continues from that
row. If several texts of a request have the same prompt, the prompt is prefilled once and its row is forked.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np

from treadle.ir.errors import TreadleError, UsageError
from treadle.runtime.generation import Choosing, Token, is_full, prompt_ahead
from treadle.runtime.row_inputs import RowPrompt
from treadle.runtime.session import Session

Array = np.ndarray[Any, Any]

BUDGET = 64
"""Default maximum number of tokens of a step: with SmolLM2 on one core, a burst of prompts then delays a running text
by three or four steps (docs/serving.md).
"""
_SPARE = 2
"""Number of unused rows whose memory is allocated in advance, so that a new text does not delay the running ones."""
_WIDTH = 16  # a piece that is not the end of its prompt is a multiple of this number, as prefill pads to it


class Cut(Enum):
    """Reason for the cancellation of a request."""

    CANCELLED = "it was cancelled"
    LATE = "its deadline has passed"
    CLOSED = "the scheduler was closed"


@dataclass(frozen=True)
class Ended:
    """The end of a request, passed to its receiver after all tokens.

    why   None if the text ended (its last token has the reason); otherwise the reason for the cancellation, or the
          error
    """

    why: Cut | TreadleError | None = None


Tell = Callable[[Token | Ended], None]
"""A receiver of the tokens and the end of a request. It is called on the scheduler's thread and must return at once.
If it raises an exception, the request is cancelled.
"""


@dataclass(frozen=True)
class TextOrder:
    """A request to continue a text.

    prompt    token ids
    choosing  the choice of tokens, and the conditions that end the text
    number    the text's number among the caller's texts; random draws depend on it
    until     deadline on the clock of time.monotonic(); None: no deadline
    begin     the prompt with the inputs of its row (`Session.prompt`); None: it has no inputs in addition to the tokens
    """

    prompt: tuple[int, ...]
    choosing: Choosing
    number: int = 0
    until: float | None = None
    begin: RowPrompt | None = None


@dataclass(frozen=True)
class Load:
    """The current load of a scheduler, and totals since its start.

    running   open rows
    waiting   requests without a row
    steps     number of steps
    prefilled, reused, generated   prompt tokens computed, prompt tokens that were cached, and new tokens
    filled    filled positions of the open rows
    cached    bytes of prefixes in host memory
    """

    running: int = 0
    waiting: int = 0
    steps: int = 0
    prefilled: int = 0
    reused: int = 0
    generated: int = 0
    filled: int = 0
    cached: int = 0


class QueueFull(UsageError):
    """The error for a request that is submitted while the request queue is full."""


class Closed(UsageError):
    """The error for a request that is submitted to a closed scheduler."""


class Ticket:
    """The handle returned to the caller that submitted a request.

    prompt  the prompt with its checked inputs
    reused  number of prompt tokens that were not computed for it; known with the first token
    waited  seconds until it had a row; None until then
    """

    def __init__(self, order: TextOrder, tell: Tell, prompt: RowPrompt | None = None) -> None:
        self.order, self._tell = order, tell
        self.prompt = prompt or RowPrompt(list(order.prompt))
        self.reused = 0
        self.waited: float | None = None
        self._submitted = time.monotonic()
        self._is_cancelled = threading.Event()
        self._has_ended = False

    def cancel(self) -> None:
        """Cancel the request. The receiver gets the end soon after. A finished request does not change. Safe on any
        thread.
        """
        self._is_cancelled.set()

    @property
    def cut(self) -> Cut | None:
        """The reason for cancelling the request now, or None."""
        if self._is_cancelled.is_set():
            return Cut.CANCELLED
        late = self.order.until is not None and time.monotonic() > self.order.until
        return Cut.LATE if late else None

    def join(self) -> None:
        """Record that the request has a row."""
        self.waited = time.monotonic() - self._submitted

    def tell(self, token: Token) -> None:
        """Pass a token to the receiver. An exception that the receiver raises cancels this request only."""
        try:
            self._tell(token)
        except Exception:
            self.cancel()

    def end(self, why: Cut | TreadleError | None = None) -> None:
        """Pass the end of the request to the receiver, at most once."""
        if self._has_ended:
            return
        self._has_ended = True
        try:
            self._tell(Ended(why))
        except Exception:  # the receiver itself raised the error
            return


@dataclass(eq=False)
class _Row:
    """A request that has a row.

    left    tokens of its prompt that are not prefilled yet
    ahead   another row, whose prompt is prefilled first; both prompts share the first `shared` tokens
    logits  the logits after its last token, once the prompt is complete
    """

    ticket: Ticket
    row: int
    left: list[int]
    ahead: _Row | None = None
    shared: int = 0
    logits: Array | None = None
    made: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> RowPrompt:
        """The prompt with its inputs."""
        return self.ticket.prompt


class Scheduler:
    """A scheduler of one session's rows for any number of callers.

    queue   maximum number of requests that wait for a row while all rows are in use
    budget  maximum number of tokens of a step while rows generate: one for each such row, and the tokens of prompts
            that are prefilled before it. If rows leave no budget, prompts advance by one token

    Raises UsageError for a budget below one token.
    """

    def __init__(self, session: Session, *, queue: int = 256, budget: int = BUDGET) -> None:
        if budget < 1:
            raise UsageError("a step needs a budget of 1 token or more", received=repr(budget))
        self.session, self.queue, self.budget = session, queue, budget
        self._places = session.free + len(session.rows)
        self._joined = 0  # requests that left the queue for a row and have not ended
        self._waiting: deque[Ticket] = deque()
        self._rows: list[_Row] = []
        self._changed = threading.Condition()
        self._closing: Cut | None = None
        self._drains = False
        self._thread: threading.Thread | None = None
        self._allocating = ThreadPoolExecutor(1, "memory of rows")
        self._load = Load()

    # -- the callers' side -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread. A scheduler is started once."""
        self._allocating.submit(self.session.prefault, _SPARE)
        self._thread = threading.Thread(target=self._run, name="treadle scheduler", daemon=True)
        self._thread.start()

    def submit(self, orders: Sequence[tuple[TextOrder, Tell]]) -> list[Ticket]:
        """Submit requests, and return a ticket for each. Requests get rows in order of arrival. Either all or none are
        accepted.

        Raises UsageError for an empty prompt, an id outside the vocabulary, a prompt longer than a row, and more
        requests than the rows and the queue can hold; QueueFull if too many requests are waiting; Closed after `close`.
        """
        for order, _ in orders:
            self.check(order.prompt)
        if len(orders) > self._places + self.queue:
            raise UsageError(
                f"{len(orders)} texts at once, and at most {self._places + self.queue} may be generated or wait"
            )
        tickets = [Ticket(order, tell, order.begin or self.session.prompt(order.prompt)) for order, tell in orders]
        with self._changed:
            if self._closing is not None or self._drains:
                raise Closed("the scheduler is closed")
            room = self.queue + self._places - self._joined  # free rows are assigned before the next step
            if len(self._waiting) + len(orders) > room:
                raise QueueFull(f"the request queue is full: {len(self._waiting)} texts wait", hint="try again later")
            self._waiting.extend(tickets)
            self._load = replace(self._load, waiting=len(self._waiting))
            self._changed.notify()
        return tickets

    def check(self, prompt: tuple[int, ...]) -> None:
        """Raise UsageError for a prompt that does not fit any row."""
        if not prompt:
            raise UsageError("the prompt has no tokens", hint="a prompt of at least one token")
        if len(prompt) > self.session.capacity:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens, {self.session.who_takes} takes {self.session.capacity}",
                hint="a shorter prompt",
            )
        most = self.session.vocabulary
        wrong = next((i for i in prompt if i < 0 or (most is not None and i >= most)), None)
        if wrong is not None:
            known = "0 or more" if most is None else f"0 to {most - 1}"
            raise UsageError(f"token {wrong} is not in the vocabulary", received=f"ids are {known}")

    @property
    def positions(self) -> int:
        """Number of positions of all rows."""
        return self._places * self.session.capacity

    def load(self) -> Load:
        """The current load and the totals."""
        with self._changed:
            return self._load

    def close(self, *, drain: float = 0.0) -> None:
        """Stop the scheduler. Running and waiting requests may finish within `drain` seconds; the others end with
        CLOSED.
        """
        with self._changed:
            self._drains = True
            self._changed.notify()
        if self._thread is None:
            self._give_up(Cut.CLOSED)
            return
        self._thread.join(drain)
        with self._changed:
            self._closing = Cut.CLOSED
            self._changed.notify()
        self._thread.join()

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._has_work():
            try:
                self._drop()
                self._join()
                self._prefill()
                self._go_on()
                self._choose_and_step()
            except Exception as error:  # a call for several rows failed: none of them can continue
                self._fail(error)
            filled = sum(self.session.length(each.row) for each in self._rows)
            with self._changed:
                self._load = replace(
                    self._load, running=len(self._rows), filled=filled, cached=self.session.cached_bytes
                )
        self._give_up(self._closing or Cut.CLOSED)

    def _has_work(self) -> bool:
        """Wait until there is work; return False if the thread should stop."""
        with self._changed:
            while not (self._rows or self._waiting or self._closing or self._drains):
                self._changed.wait()
            return self._closing is None and bool(self._rows or self._waiting)

    def _drop(self) -> None:
        """Close the rows of cancelled requests, and remove cancelled requests from the queue."""
        for each in list(self._rows):
            if (why := each.ticket.cut) is not None:
                self._leave(each, why)
        with self._changed:
            gone = [(ticket, why) for ticket in self._waiting if (why := ticket.cut) is not None]
            for ticket, _ in gone:
                self._waiting.remove(ticket)
        for ticket, why in gone:
            ticket.end(why)

    def _join(self) -> None:
        while self.session.free:
            with self._changed:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
                self._load = replace(self._load, waiting=len(self._waiting))
                self._joined += ticket.order.choosing.most > 0
            ticket.join()
            if ticket.order.choosing.most == 0:
                ticket.end()
                continue
            try:
                self._rows.append(self._begun(ticket, self._rows))
            except Exception as error:  # the inputs of this request could not be computed
                with self._changed:
                    self._joined -= 1
                ticket.end(_failure(error))
            else:
                self._allocating.submit(self.session.prefault, self._rows[-1].row + 1 + _SPARE)

    def _begun(self, ticket: Ticket, before: Sequence[_Row]) -> _Row:
        """Return a row for a request. The row resumes from a prefix that a slot holds, or waits for a row of `before`
        whose prompt has the same beginning and is being prefilled.
        """
        prompt = ticket.prompt
        ahead = prompt_ahead(self.session, prompt, {n: each.prompt for n, each in enumerate(before) if each.left})
        if ahead is not None:
            return _Row(ticket, self.session.reserve(), prompt.tokens, before[ahead[0]], ahead[1])
        row = self.session.begin(prompt)
        self._count_reused(ticket, self.session.length(row))
        return _Row(ticket, row, prompt.tokens[ticket.reused :])

    def _go_on(self) -> None:
        """Continue the rows that wait for another row's prompt, if this prompt is prefilled or cancelled."""
        for each in list(self._rows):
            n, ahead = self._rows.index(each), each.ahead
            if ahead is None or (ahead in self._rows and self.session.length(ahead.row) < each.shared):
                continue
            self.session.close(each.row)
            if ahead in self._rows and each.shared == len(each.prompt.tokens):
                self._rows[n] = _Row(each.ticket, self.session.fork(ahead.row), [], logits=ahead.logits)
                self._count_reused(each.ticket, each.shared)
                continue
            try:
                self._rows[n] = self._begun(each.ticket, self._rows[:n])
            except Exception as error:
                each.row = self.session.reserve()  # `_leave` closes it
                self._leave(each, _failure(error), keep=False)

    def _count_reused(self, ticket: Ticket, count: int) -> None:
        ticket.reused = count
        with self._changed:
            self._load = replace(self._load, reused=self._load.reused + count)

    def _prefill(self) -> None:
        """Prefill pieces of incomplete prompts, the oldest first, within the budget that the rows that generate leave.
        If no row generates, prefill a piece of each prompt.
        """
        generating = sum(each.logits is not None for each in self._rows)
        room = max(1, self.budget - generating) if generating else len(self._rows) * self.session.chunk
        pieces: dict[int, list[int]] = {}
        for each in self._rows:
            if each.left and each.ahead is None and room:
                size = min(len(each.left), room, self.session.chunk)
                room -= size
                if _WIDTH < size < len(each.left):
                    size -= size % _WIDTH
                pieces[each.row] = each.left[:size]
        if not pieces:
            return
        logits = self.session.prefill(pieces)
        for each in self._rows:
            if each.row not in pieces:
                continue
            each.left = each.left[len(pieces[each.row]) :]
            if not each.left:
                each.logits = logits[each.row]
        with self._changed:
            self._load = replace(self._load, prefilled=self._load.prefilled + sum(map(len, pieces.values())))

    def _choose_and_step(self) -> None:
        going: dict[int, int] = {}
        chosen = 0
        for each in list(self._rows):
            if each.logits is None:
                continue
            token = self._chosen(each)
            if token is None:
                continue
            chosen += 1
            each.ticket.tell(token)
            if token.last:
                self._leave(each, None)
            else:
                going[each.row] = token.id
        if going:
            found = self.session.step(going)
            for each in self._rows:
                if each.row in going:
                    each.logits = found[each.row]
        with self._changed:
            load = self._load
            self._load = replace(load, generated=load.generated + chosen, steps=load.steps + bool(going))

    def _chosen(self, each: _Row) -> Token | None:
        """Return the next token of a row. If no token can be chosen, end this row and return None."""
        order, logits = each.ticket.order, each.logits
        assert logits is not None
        try:
            each.made.append(order.choosing.choose(logits, order.number, order.prompt, each.made))
            return order.choosing.token(logits, order.number, each.made, is_full(self.session, each.row))
        except Exception as error:
            self._leave(each, _failure(error))
        return None

    def _leave(self, each: _Row, why: Cut | TreadleError | None, *, keep: bool = True) -> None:
        self._rows.remove(each)
        self.session.close(each.row, keep=keep)
        with self._changed:
            self._joined -= 1
        each.ticket.end(why)

    def _fail(self, error: Exception) -> None:
        failure = _failure(error)
        for each in list(self._rows):
            self._leave(each, failure, keep=False)  # their states are undefined after the failed call

    def _give_up(self, why: Cut) -> None:
        for each in list(self._rows):
            self._leave(each, why)
        self._allocating.shutdown(wait=False, cancel_futures=True)
        with self._changed:
            self._closing = why
            left = list(self._waiting)
            self._waiting.clear()
            self._load = replace(self._load, running=0, waiting=0, filled=0)
        for ticket in left:
            ticket.end(why)


def _failure(error: Exception) -> TreadleError:
    """Return our error for any error."""
    if isinstance(error, TreadleError):
        return error
    return TreadleError("a step failed", received=f"{type(error).__name__}: {error}"[:300])
