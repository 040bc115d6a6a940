"""The scheduler: texts of many callers run in one session, and each is the same as in a session of its own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import treadle as t
from treadle.compiled import Compiled
from treadle.ir.errors import TreadleError, UsageError
from treadle.runtime.generation import Choosing, Token, generate
from treadle.runtime.sampling import Sampling
from treadle.runtime.scheduler import Closed, Cut, Ended, Load, QueueFull, Scheduler, TextOrder, Ticket
from treadle.runtime.session import Session
from treadle.runtime.token_rules import TokenRules

VOCABULARY, CAPACITY = 61, 48
SECONDS = 60.0


@pytest.fixture(scope="module")
def model() -> Compiled:
    return t.compile("gpt2", seed=3, vocab=VOCABULARY, dim=32, heads=4, layers=2, context=64)


@pytest.fixture
def session(model: Compiled) -> Session:
    return model.session(rows=3, capacity=CAPACITY, chunk=8)


@pytest.fixture
def scheduler(session: Session) -> Iterator[Scheduler]:
    made = Scheduler(session, queue=40)
    made.start()
    yield made
    made.close()
    assert session.rows == ()


class Heard:
    """The events that one request received."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.ends: list[Ended] = []
        self._over = threading.Event()

    def __call__(self, report: Token | Ended) -> None:
        if isinstance(report, Token):
            self.tokens.append(report)
        else:
            self.ends.append(report)
            self._over.set()

    def wait(self) -> list[int]:
        """Wait until the request has ended; return the ids."""
        assert self._over.wait(SECONDS)
        return [token.id for token in self.tokens]


def alone(model: Compiled, prompt: tuple[int, ...], choosing: Choosing) -> list[int]:
    session = model.session(rows=1, capacity=CAPACITY, chunk=8)
    options = {"most": choosing.most, "sampling": choosing.sampling, "rules": choosing.rules}
    return [token.id for token in generate(session, [prompt], stop=tuple(choosing.stop), **options)]


def test_each_text_is_the_one_alone(model: Compiled, scheduler: Scheduler) -> None:
    rng = np.random.default_rng(0)
    orders = []
    for i in range(24):
        prompt = tuple(int(x) for x in rng.integers(0, VOCABULARY, rng.integers(1, 30)))
        sampling = Sampling(temperature=float(i % 3), seed=i, top_k=i % 5)
        rules = TokenRules(presence_penalty=0.5) if i % 4 == 0 else None
        orders.append(TextOrder(prompt, Choosing(int(rng.integers(1, 20)), sampling, rules, frozenset({7}))))
    heard = [Heard() for _ in orders]
    for order, each in zip(orders, heard, strict=True):
        scheduler.submit([(order, each)])
    for order, each in zip(orders, heard, strict=True):
        assert each.wait() == alone(model, order.prompt, order.choosing)
        assert [end.why for end in each.ends] == [None]
        assert each.tokens[-1].last
        assert not any(token.last for token in each.tokens[:-1])
    load = scheduler.load()
    assert load.generated == sum(len(each.tokens) for each in heard)
    assert load.prefilled == sum(len(order.prompt) for order in orders)
    assert load.waiting == 0


def test_texts_that_begin_alike_read_it_once(model: Compiled) -> None:
    """Several texts of a prompt, prompts with a common prefix, and the next turn of a chat. Each text is the same as
    alone.
    """
    session = model.session(rows=6, capacity=CAPACITY, chunk=8, resumes=True)
    scheduler = Scheduler(session)
    system = tuple(range(20))
    prompts = [(*system, 30, 31), (*system, 40), (*system, 30, 31), (5, 4, 3), (*system, 30, 31), (5, 4, 3)]
    choosing = Choosing(6, Sampling(temperature=1.0, seed=2))
    heard = [Heard() for _ in prompts]
    tickets = scheduler.submit(
        [(TextOrder(prompt, choosing), each) for prompt, each in zip(prompts, heard, strict=True)]
    )
    scheduler.start()  # all of them join together
    found = [each.wait() for each in heard]
    assert found == [alone(model, prompt, choosing) for prompt in prompts]
    assert [ticket.reused for ticket in tickets] == [0, 20, 22, 0, 22, 3]
    load = scheduler.load()
    assert (load.prefilled, load.reused) == (22 + 1 + 3, 20 + 22 + 22 + 3)

    turn, again = (*prompts[0], *found[0], 7, 8), Heard()
    (ticket,) = scheduler.submit([(TextOrder(turn, choosing), again)])
    assert again.wait() == alone(model, turn, choosing)
    assert ticket.reused == 22 + 5, "all but the last token that was made, which no step has read"
    scheduler.close()
    assert session.rows == ()


def test_requests_that_share_a_cancelled_prompt_continue(model: Compiled) -> None:
    session = model.session(rows=3, capacity=CAPACITY, chunk=8, resumes=True)
    scheduler, system = Scheduler(session), tuple(range(20))
    prompts = [(*system, *range(30, 50)), (*system, 40, 41), (*system, 40, 41)]
    heard = [Heard() for _ in prompts]
    tickets = scheduler.submit([(TextOrder(p, Choosing(4)), each) for p, each in zip(prompts, heard, strict=True)])
    prefill, pieces = session.prefill, []

    def cancelling(tokens: dict[int, list[int]]) -> dict[int, object]:
        pieces.append([len(ids) for ids in tokens.values()])
        if len(pieces) == 2:
            tickets[0].cancel()
        return prefill(tokens)  # type: ignore[return-value]

    session.prefill = cancelling  # type: ignore[method-assign, assignment]
    scheduler.start()
    assert [each.wait() for each in heard[1:]] == [alone(model, p, Choosing(4)) for p in prompts[1:]]
    assert pieces == [[8], [8], [6]], "16 tokens were there when it went away"
    assert [end.why for end in heard[0].ends] == [Cut.CANCELLED]
    scheduler.close()


def test_sessions_that_do_not_resume_share_only_prompts(model: Compiled, session: Session) -> None:
    assert not session.resumes
    scheduler, system = Scheduler(session), tuple(range(20))
    prompts = [(*system, 30), (*system, 40), (*system, 30)]
    heard = [Heard() for _ in prompts]
    tickets = scheduler.submit([(TextOrder(p, Choosing(4)), each) for p, each in zip(prompts, heard, strict=True)])
    scheduler.start()
    assert [each.wait() for each in heard] == [alone(model, p, Choosing(4)) for p in prompts]
    assert [ticket.reused for ticket in tickets] == [0, 0, 21]
    scheduler.close()


def test_cancelled_requests_free_their_row(model: Compiled, scheduler: Scheduler) -> None:
    long = Choosing(40)
    first = [Heard() for _ in range(3)]
    started, cancelled = threading.Event(), threading.Event()

    def begin(report: Token | Ended) -> None:
        first[0](report)
        started.set()
        assert cancelled.wait(SECONDS)  # so that no request ends earlier

    tickets = scheduler.submit([(TextOrder((1, 2), long), begin if i == 0 else first[i]) for i in range(3)])
    waiting, next_one = Heard(), Heard()
    (gone,) = scheduler.submit([(TextOrder((3,), long), waiting)])
    scheduler.submit([(TextOrder((4, 5), Choosing(5)), next_one)])
    assert started.wait(SECONDS)
    gone.cancel()  # before it has a row
    tickets[0].cancel()
    cancelled.set()
    assert next_one.wait() == alone(model, (4, 5), Choosing(5))
    assert waiting.wait() == []
    assert [end.why for end in waiting.ends] == [Cut.CANCELLED]
    first[0].wait()
    assert [end.why for end in first[0].ends] == [Cut.CANCELLED]
    for each in first[1:]:
        assert each.wait() == alone(model, (1, 2), long)


def test_errors_of_a_receiver_end_only_its_text(model: Compiled, scheduler: Scheduler) -> None:
    def fail(report: Token | Ended) -> None:
        raise RuntimeError("the receiver is broken")

    scheduler.submit([(TextOrder((1, 2, 3), Choosing(30)), fail)])
    other = Heard()
    scheduler.submit([(TextOrder((1, 2, 3), Choosing(6)), other)])
    assert other.wait() == alone(model, (1, 2, 3), Choosing(6))


def test_a_text_of_which_no_token_can_be_chosen_ends_alone(model: Compiled, scheduler: Scheduler) -> None:
    banned, other = Heard(), Heard()
    rules = TokenRules(banned=tuple(range(VOCABULARY)))
    scheduler.submit([(TextOrder((5,), Choosing(4, rules=rules)), banned)])
    scheduler.submit([(TextOrder((5,), Choosing(4)), other)])
    assert other.wait() == alone(model, (5,), Choosing(4))
    assert banned.wait() == []
    (end,) = banned.ends
    assert isinstance(end.why, UsageError)
    assert "every token" in end.why.what


def test_a_text_whose_choice_fails_ends_alone(model: Compiled, scheduler: Scheduler) -> None:
    def fail(made: Any, token: int) -> bool:
        raise ZeroDivisionError("by nothing")

    failing, other = Heard(), Heard()
    scheduler.submit([(TextOrder((5,), Choosing(4, until=fail)), failing)])
    scheduler.submit([(TextOrder((5,), Choosing(4)), other)])
    assert other.wait() == alone(model, (5,), Choosing(4))
    assert failing.wait() == []
    (end,) = failing.ends
    assert isinstance(end.why, TreadleError)
    assert (end.why.what, end.why.received) == ("a step failed", "ZeroDivisionError: by nothing")


def test_waiting_requests_end_when_the_server_stops(session: Session) -> None:
    scheduler, heard = Scheduler(session), Heard()
    scheduler.submit([(TextOrder((5,), Choosing(4)), heard)])
    assert scheduler.load().waiting == 1
    scheduler.close()
    assert heard.wait() == []
    assert [end.why for end in heard.ends] == [Cut.CLOSED]
    assert scheduler.load() == Load()


def test_a_step_that_fails_ends_its_rows_and_no_others(model: Compiled, session: Session) -> None:
    scheduler, heard = Scheduler(session), Heard()
    step = session.step

    def broken(tokens: dict[int, int]) -> dict[int, object]:
        raise MemoryError("no memory")

    session.step = broken  # type: ignore[method-assign, assignment]
    scheduler.start()
    scheduler.submit([(TextOrder((1,), Choosing(4)), heard)])
    assert len(heard.wait()) == 1
    assert "no memory" in str(heard.ends[0].why)
    session.step = step  # type: ignore[method-assign]
    again = Heard()
    scheduler.submit([(TextOrder((1,), Choosing(4)), again)])
    assert again.wait() == alone(model, (1,), Choosing(4))
    scheduler.close()


@pytest.mark.parametrize(
    ("prompt", "said"),
    [((), "no tokens"), ((VOCABULARY,), "not in the vocabulary"), ((-1,), "not in the"), ((1,) * 49, "49 tokens")],
)
def test_a_prompt_that_no_row_takes_is_refused_at_once(
    scheduler: Scheduler, prompt: tuple[int, ...], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        scheduler.submit([(TextOrder(prompt, Choosing(1)), Heard())])
    assert scheduler.load().waiting == 0


def test_no_more_wait_than_may(session: Session) -> None:
    scheduler = Scheduler(session, queue=2)  # not started: no request leaves the queue
    for _ in range(5):  # three for the free rows
        scheduler.submit([(TextOrder((1,), Choosing(1)), Heard())])
    with pytest.raises(UsageError, match="6 texts at once, and at most 5 may be generated or wait"):
        scheduler.submit([(TextOrder((1,), Choosing(1)), Heard())] * 6)
    with pytest.raises(QueueFull, match="queue is full: 5 texts wait"):
        scheduler.submit([(TextOrder((1,), Choosing(1)), Heard())])
    scheduler.start()
    scheduler.close(drain=SECONDS)
    assert scheduler.load().generated == 5


def test_rows_that_were_used_are_free_for_the_queue_again(scheduler: Scheduler) -> None:
    scheduler.queue = 1
    for _ in range(3):
        heard = [Heard() for _ in range(4)]  # three rows, and one that waits
        scheduler.submit([(TextOrder((1, 2), Choosing(2)), each) for each in heard])
        for each in heard:
            each.wait()


def test_a_text_that_cannot_begin_ends_alone(model: Compiled, session: Session) -> None:
    scheduler, heard = Scheduler(session, queue=1), Heard()
    begin = session.begin

    def broken(prompt: Any) -> int:
        raise MemoryError("no memory")

    session.begin = broken  # type: ignore[method-assign]
    scheduler.submit([(TextOrder((1,), Choosing(4)), heard)])
    scheduler.start()
    assert heard.wait() == []
    assert "no memory" in str(heard.ends[0].why)
    session.begin = begin  # type: ignore[method-assign]
    others = [Heard() for _ in range(4)]
    scheduler.submit([(TextOrder((1,), Choosing(4)), each) for each in others])
    assert [each.wait() for each in others] == [alone(model, (1,), Choosing(4))] * 4
    scheduler.close()


def test_a_text_ends_when_its_time_is_over(scheduler: Scheduler) -> None:
    late = Heard()
    scheduler.submit([(TextOrder((1, 2), Choosing(40), until=time.monotonic() - 1), late)])
    assert late.wait() == []
    assert [end.why for end in late.ends] == [Cut.LATE]


def test_closing_drains_or_cuts_and_takes_no_more(model: Compiled, session: Session) -> None:
    scheduler, heard = Scheduler(session), [Heard() for _ in range(5)]
    scheduler.start()
    for each in heard:
        scheduler.submit([(TextOrder((2, 3), Choosing(9)), each)])
    scheduler.close(drain=SECONDS)
    for each in heard:
        assert each.wait() == alone(model, (2, 3), Choosing(9))
    with pytest.raises(Closed):
        scheduler.submit([(TextOrder((1,), Choosing(1)), Heard())])

    slow = Scheduler(session)
    slow.start()
    report: queue.SimpleQueue[Token | Ended] = queue.SimpleQueue()
    (ticket,) = slow.submit([(TextOrder((2, 3), Choosing(40)), report.put)])
    assert isinstance(report.get(timeout=SECONDS), Token)
    slow.close()
    assert isinstance(ticket, Ticket)
    while not isinstance(last := report.get(timeout=SECONDS), Ended):
        pass
    assert last.why in (Cut.CLOSED, None)
    assert session.rows == ()


def test_a_long_prompt_holds_others_up_by_a_piece_at_a_time(model: Compiled, scheduler: Scheduler) -> None:
    """A running text continues between two chunks of a prompt of 40 tokens."""
    order: list[str] = []
    short, long = Heard(), Heard()

    def first(report: Token | Ended) -> None:
        order.append("short")
        if len(order) == 2:
            scheduler.submit([(TextOrder((1,) * 40, Choosing(1)), second)])
        short(report)

    def second(report: Token | Ended) -> None:
        order.append("long")
        long(report)

    scheduler.submit([(TextOrder((2,), Choosing(30)), first)])
    assert short.wait() == alone(model, (2,), Choosing(30))
    assert long.wait() == alone(model, (1,) * 40, Choosing(1))
    assert order.index("long") >= 2 + 40 // 8 - 1


@pytest.mark.parametrize(
    ("budget", "pieces"),
    [
        (64, [[2], [32, 20, 11], [8]]),
        (33, [[2], [32], [8, 20, 4], [7]]),
        (20, [[2], [16], [16], [8, 11], [9, 10], [1]]),
        (17, [[2], [16], [16], [8, 8], [12, 4], [7]]),
    ],
)
def test_a_step_has_a_budget_of_tokens(model: Compiled, budget: int, pieces: list[list[int]]) -> None:
    """A text runs, and then three prompts of 40, 20 and 11 tokens join. The oldest is prefilled first. The texts are
    the same as alone for each budget.
    """
    session = model.session(rows=4, capacity=CAPACITY, chunk=32)
    scheduler, long, heard = Scheduler(session, budget=budget), Heard(), [Heard() for _ in range(3)]
    prompts = [(1,) * 40, (2,) * 20, (3,) * 11]
    found: list[list[int]] = []
    prefill = session.prefill

    def counting(tokens: dict[int, list[int]]) -> dict[int, Any]:
        found.append([len(ids) for ids in tokens.values()])
        return prefill(tokens)

    def receive(report: Token | Ended) -> None:
        if not long.tokens:
            scheduler.submit([(TextOrder(p, Choosing(1)), each) for p, each in zip(prompts, heard, strict=True)])
        long(report)

    session.prefill = counting  # type: ignore[method-assign, assignment]
    scheduler.submit([(TextOrder((4, 5), Choosing(40)), receive)])
    scheduler.start()
    assert long.wait() == alone(model, (4, 5), Choosing(40))
    assert [each.wait() for each in heard] == [alone(model, prompt, Choosing(1)) for prompt in prompts]
    scheduler.close()
    assert found == pieces


def test_a_budget_is_one_token_or_more(session: Session) -> None:
    with pytest.raises(UsageError, match="a step needs a budget of 1 token or more"):
        Scheduler(session, budget=0)


def test_a_prefix_that_lost_its_slot_is_read_from_host_memory(model: Compiled) -> None:
    """After more texts than there are rows, a prompt resumes from the prefix cache, and its text is the same."""
    session = model.session(rows=2, capacity=CAPACITY, chunk=16, resumes=True)
    session.cache_prefixes(10**6)
    scheduler, prompt = Scheduler(session), tuple(range(40))
    scheduler.start()
    wanted = alone(model, prompt, Choosing(4))
    for number in range(6):
        heard = Heard()
        (ticket,) = scheduler.submit(
            [(TextOrder(prompt if number in (0, 5) else (50 + number,) * 20, Choosing(4)), heard)]
        )
        assert heard.wait() == (wanted if number in (0, 5) else alone(model, (50 + number,) * 20, Choosing(4)))
        assert ticket.reused == (32 if number == 5 else 0)
    scheduler.close()
    assert scheduler.load().cached == session.cached_bytes > 0


def test_rows_have_their_memory_before_texts_need_them(model: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of used rows, and of the two rows after them, is allocated in order, each once."""
    session = model.session(rows=8, capacity=40)
    first = next(iter(session.states.values()))
    rows: list[int] = []
    changed = threading.Condition()

    def record(part: np.ndarray[Any, Any]) -> bool:
        with changed:
            if np.shares_memory(part, first):
                rows.append((part.ctypes.data - first.ctypes.data) // part.nbytes)
                changed.notify()
        return True

    def reached(count: int) -> bool:
        with changed:
            return changed.wait_for(lambda: len(rows) >= count, timeout=30)

    monkeypatch.setattr("treadle.runtime.session.prefault", record)
    scheduler = Scheduler(session)
    scheduler.start()
    assert reached(2)
    assert rows == [0, 1]
    ended = queue.Queue[Any]()
    orders = [TextOrder(prompt=(3, n, 5), choosing=Choosing(most=2)) for n in range(3)]
    scheduler.submit([(order, ended.put) for order in orders])
    assert reached(5)
    scheduler.close(drain=30)
    assert rows == [0, 1, 2, 3, 4]
