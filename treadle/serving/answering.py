"""Generation for a request: a scheduler's thread generates the texts and passes tokens to the server's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from treadle.continuation import GrowingText
from treadle.files.errors import TreadleError
from treadle.runtime.generation import Choosing, Token
from treadle.runtime.row_inputs import RowPrompt
from treadle.runtime.scheduler import Closed, Cut, Ended, QueueFull, Tell, TextOrder
from treadle.runtime.stop_strings import StopStrings
from treadle.serving.answers import PromptTokens
from treadle.serving.models import ServedWriter, queue_full
from treadle.serving.refusals import RequestRefusal, refused, shutting_down
from treadle.serving.requests import WantedTexts


@dataclass(frozen=True)
class TokenEvent:
    """A new token of a choice, and the text that is final after it."""

    index: int
    token: Token
    text: str


class Answering:
    """The generation of all choices of a request: for each prompt the requested number of texts.

    answering = Answering(served, prompts, how, seconds=600)
    async for burst in answering: ...        each burst is a list of the events that are ready
    answering.cancel()                       if the loop is left early
    """

    def __init__(
        self,
        served: ServedWriter,
        prompts: Sequence[tuple[int, ...]],
        how: WantedTexts,
        *,
        seconds: float,
        begin: RowPrompt | None = None,
    ) -> None:
        """Submit all texts, or none if there is an error. Raises RequestRefusal, also for a number of tokens that does
        not fit into a row.

        begin  the prompt of a chat with the inputs of its row, such as images
        """
        self._begin = begin
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[TokenEvent | Ended]()
        self._left, self._choices = len(prompts) * how.choices, how.choices
        self._count = sum(map(len, prompts))
        until = time.monotonic() + seconds
        drawn = [(prompt, draw) for prompt in prompts for draw in range(how.choices)]
        orders = [self._order(served, i, prompt, how, draw, until) for i, (prompt, draw) in enumerate(drawn)]
        try:
            self.tickets = served.scheduler.submit(orders)
        except QueueFull as error:
            raise queue_full(error.what) from error
        except Closed as error:
            raise _given_up(Cut.CLOSED) from error
        except TreadleError as error:
            raise refused(error) from error

    def cancel(self) -> None:
        """Cancel all texts."""
        for ticket in self.tickets:
            ticket.cancel()

    @property
    def read(self) -> PromptTokens:
        """Token counts of the prompts, valid after all events are read. A prompt with several choices counts once."""
        reused = [ticket.reused for ticket in self.tickets]
        held = sum(min(reused[n : n + self._choices]) for n in range(0, len(reused), self._choices))
        return PromptTokens(self._count, held)

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        """Yield lists of the events that are ready. Events of a choice are in order.

        Raises RequestRefusal if the scheduler cancels one of the texts.
        """
        while self._left:
            burst = list[TokenEvent]()
            why = self._take(await self._events.get(), burst)
            while why is None and not self._events.empty():
                why = self._take(self._events.get_nowait(), burst)
            if burst:
                yield burst
            if why is not None:
                self.cancel()
                raise _given_up(why)

    def _take(self, event: TokenEvent | Ended, burst: list[TokenEvent]) -> Cut | TreadleError | None:
        """Append a token to the burst. At the end of a text, return the reason if it was cancelled, else None."""
        if isinstance(event, TokenEvent):
            burst.append(event)
            return None
        self._left -= 1
        return event.why

    def _order(
        self, served: ServedWriter, index: int, prompt: tuple[int, ...], how: WantedTexts, draw: int, until: float
    ) -> tuple[TextOrder, Tell]:
        growing = GrowingText(served.writer.tokenizer, StopStrings(how.stop))
        stop = frozenset((*how.stop_ids, *(() if how.ignores_end else served.writer.end)))
        choosing = Choosing(
            most=served.most_tokens(prompt, how),
            sampling=how.sampling,
            rules=served.writer.asked.but(**how.rules).rules,
            stop=stop,
            until=lambda _, token: token not in stop and growing.add(token),
            likely=how.likely,
        )

        def tell(what: Token | Ended) -> None:
            event = what if isinstance(what, Ended) else TokenEvent(index, what, growing.tell(what.last))
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                self._loop.call_soon_threadsafe(self._events.put_nowait, event)

        return TextOrder(prompt, choosing, number=draw, until=until, begin=self._begin), tell


def _given_up(why: Cut | TreadleError) -> RequestRefusal:
    if isinstance(why, TreadleError):
        return refused(why, status=500)
    if why is Cut.LATE:
        return RequestRefusal(408, "the request exceeded the time limit", code="timeout")
    return shutting_down()
