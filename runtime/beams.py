"""Beam search: the most likely continuations of each prompt, over rows of a session.

    (best,) = beam_search(session, [[0]], most=40, beams=Beams(4), stop=[1], inputs=[{"tokens": source}])[0]

At each step the continuations of all rows are ranked together, and the best `count` continue, each in its own row. A
row that continues twice is forked; a row that does not continue is closed. A finished text is ranked by the sum of its
log probabilities divided by a power of its length (Wu et al. 2016, section 7), as in Hugging Face transformers, so that
both return the same texts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from treadle.ir.errors import UsageError
from treadle.ir.wording.checked_calls import with_checked_constructor
from treadle.runtime.generation import Ending, checked_prompts, count_of
from treadle.runtime.row_inputs import RowPrompt
from treadle.runtime.sampling import no_finite_logit
from treadle.runtime.session import Session
from treadle.runtime.token_rules import TokenRules, log_probabilities

Array = np.ndarray[Any, Any]
Early = bool | Literal["never"]


@with_checked_constructor(
    {
        **dict.fromkeys(("num_beams", "beam_size", "beam_width"), "count=4"),
        "num_return_sequences": "best=1",
        "early_stopping": "early=True",
    }
)
@dataclass(frozen=True)
class Beams:
    """Options of a beam search.

    count           number of beams that continue at each step, each in a row
    length_penalty  power of the length by which the sum of a finished text is divided; values above 0 favour long texts
    best            number of texts returned for each prompt, at most `count`
    early           condition that ends the search. True: `count` texts are finished. False: no beam that ended at its
                    current length would rank above one of the best `count` finished texts. "never": no beam could do so
                    at any length

    Raises UsageError for a value out of range.
    """

    count: int = 4
    length_penalty: float = 1.0
    best: int = 1
    early: Early = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError("count must be 1 or more", received=repr(self.count))
        if not 1 <= self.best <= self.count:
            raise UsageError(f"best must be from 1 to {self.count}, the number of beams", received=repr(self.best))
        if not -100 < self.length_penalty < 100:
            raise UsageError("length_penalty must lie between -100 and 100", received=repr(self.length_penalty))
        if self.early not in (True, False, "never"):
            raise UsageError("early must be True, False or 'never'", received=repr(self.early))


@dataclass(frozen=True)
class Hypothesis:
    """A finished text.

    tokens   the generated tokens, including the token that ends the text
    score    the score by which the texts of a prompt are ranked
    logprob  sum of the log probabilities of its tokens, after token rules
    ending   the reason for the end
    """

    tokens: tuple[int, ...]
    score: float
    logprob: float
    ending: Ending


@dataclass(frozen=True)
class _Beam:
    """An unfinished continuation: its row, its generated tokens, and the sum of their log probabilities."""

    row: int
    made: tuple[int, ...]
    total: float


@dataclass(frozen=True)
class _Task:
    """The options and the session that all searches of a call share."""

    session: Session
    beams: Beams
    rules: TokenRules
    stop: frozenset[int]


def beam_search(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    beams: Beams | None = None,
    rules: TokenRules | None = None,
    stop: Sequence[int] = (),
    inputs: Sequence[dict[str, Any]] | None = None,
) -> Iterator[list[Hypothesis]]:
    """Return the best continuations of each prompt by up to `most` tokens, best first, in the order of the prompts.

    If the session has enough free rows, several prompts are searched together; the other prompts wait.

    rules    token rules, applied to log probabilities
    stop     token ids that end a text
    inputs   for each prompt, the model's inputs in addition to the tokens; see `Session.open`

    Raises UsageError, before the search starts, for a prompt that `generate` refuses, or a session with fewer free rows
    than beams.
    """
    task = _Task(session, beams or Beams(), rules or TokenRules(), frozenset(stop))
    rows = checked_prompts(session, prompts, inputs)
    if rows and session.free < task.beams.count:
        raise UsageError(
            f"{task.beams.count} beams need {task.beams.count} rows, and {session.free} are free",
            hint=f"a session of rows={task.beams.count}, or fewer beams",
        )
    return _searched(task, rows, count_of(most))


def _searched(task: _Task, prompts: list[RowPrompt], most: int) -> Iterator[list[Hypothesis]]:
    session, count = task.session, task.beams.count
    waiting = deque(range(len(prompts)))
    running: dict[int, _Search] = {}
    done: dict[int, list[Hypothesis]] = {}
    yielded = 0
    if not most:
        yield from ([] for _ in prompts)
        return
    try:
        while yielded < len(prompts):
            joining: dict[int, int] = {}
            while waiting and session.free - sum(count - len(s.going) for s in running.values()) >= count:
                number = waiting.popleft()
                joining[number] = session.begin(prompts[number])
                running[number] = _Search(task, prompts[number].tokens, most, joining[number])
            left = {row: prompts[number].tokens[session.length(row) :] for number, row in joining.items()}
            logits = session.prefill(left)
            chosen: dict[int, int] = {}
            for number, search in list(running.items()):
                if number in joining:
                    search.logits = {joining[number]: logits[joining[number]]}
                following = search.advance()
                if following:
                    chosen |= following
                else:
                    done[number] = running.pop(number).best()
            if chosen:
                found = session.step(chosen)
                for search in running.values():
                    search.logits = {beam.row: found[beam.row] for beam in search.going}
            while yielded in done:
                yield done.pop(yielded)
                yielded += 1
    finally:
        for search in running.values():
            search.close()


class _Search:
    """The search for one prompt: the beams, the logits after each beam, and the finished texts, best first."""

    def __init__(self, task: _Task, prompt: list[int], most: int, row: int) -> None:
        self.task, self.prompt = task, prompt
        room = task.session.capacity - len(prompt) + 1 if task.session.full == "error" else most
        self.most = min(most, room)
        self.ending: Ending = "count" if most <= room else "context"
        self.going = [_Beam(row, (), 0.0)]
        self.logits: dict[int, Array] = {}
        self.finished: list[Hypothesis] = []

    def advance(self) -> dict[int, int]:
        """Run one step of the search. Return the next token of each row, or no tokens if the search is over and all
        rows are closed.
        """
        task, made = self.task, len(self.going[0].made) + 1
        running: list[tuple[_Beam, int, float]] = []
        for rank, (beam, token, total) in enumerate(self._candidates()):
            if token not in task.stop and made < self.most:
                running.append((beam, token, total))
            elif rank < task.beams.count:
                self._finish(beam, token, total)
        running = running[: task.beams.count]
        if not running or self._is_over(running[0][2], made):
            self.close()
            return {}
        self._go_on(running)
        return {beam.row: beam.made[-1] for beam in self.going}

    def close(self) -> None:
        """Close all rows."""
        for beam in self.going:
            self.task.session.close(beam.row)
        self.going = []

    def best(self) -> list[Hypothesis]:
        """Return the best texts, best first."""
        return self.finished[: self.task.beams.best]

    def _candidates(self) -> list[tuple[_Beam, int, float]]:
        """Return the most likely continuations of all beams by one token, most likely first.

        The list is long enough that `count` candidates remain even if every end token is among the candidates of every
        beam.
        """
        end, count = tuple(self.task.stop), max(2, 1 + len(self.task.stop)) * self.task.beams.count
        totals = []
        for beam in self.going:
            scores = self.task.rules.apply(
                log_probabilities(self.logits[beam.row]),
                prompt=self.prompt,
                generated=beam.made,
                end=end,
                is_last=len(beam.made) + 1 == self.most,
            )
            totals.append(scores + beam.total)
        flat = np.concatenate(totals)
        if np.isnan(flat).any():
            raise no_finite_logit()
        vocabulary = len(totals[0])
        order = np.argsort(-flat, kind="stable")[:count]
        return [(self.going[i // vocabulary], int(i % vocabulary), float(flat[i])) for i in order if flat[i] > -np.inf]

    def _finish(self, beam: _Beam, token: int, total: float) -> None:
        made = (*beam.made, token)
        ending: Ending = "end" if token in self.task.stop else self.ending
        score = total / float(len(made)) ** self.task.beams.length_penalty
        self.finished.append(Hypothesis(made, score, total, ending))
        self.finished.sort(key=lambda text: -text.score)
        del self.finished[self.task.beams.count :]

    def _is_over(self, best_total: float, made: int) -> bool:
        """Return True if the search ends. `best_total` is the sum of the log probabilities of the best beam."""
        beams = self.task.beams
        if len(self.finished) < beams.count:
            return False
        if beams.early is True:
            return True
        length = self.most if beams.early == "never" and beams.length_penalty > 0 else made
        possible: float = best_total / float(length) ** beams.length_penalty
        return possible <= self.finished[-1].score

    def _go_on(self, running: list[tuple[_Beam, int, float]]) -> None:
        """Assign a row to each continuation. The first continuation of a beam keeps the beam's row; the others get
        forks of it.
        """
        session, kept = self.task.session, {beam.row for beam, _, _ in running}
        for beam in self.going:
            if beam.row not in kept:
                session.close(beam.row)
        rows = dict.fromkeys(kept)
        self.going = [_Beam(row, (), 0.0) for row in rows]  # rows to close if a fork fails
        taken: list[_Beam] = []
        for beam, token, total in running:
            row = beam.row
            if row in rows:
                del rows[row]
            else:
                row = session.fork(row)
                self.going.append(_Beam(row, (), 0.0))
            taken.append(_Beam(row, (*beam.made, token), total))
        self.going = taken
