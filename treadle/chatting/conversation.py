"""A conversation with a model that was trained for it, its history kept in one row of a session.

    chat = Conversation.open(TextWriter.open("smollm2"), system="You are brief.")
    for piece in chat.say("What is the capital of France?", most=64):
        print(piece.text, end="")

The whole conversation is written anew by the model's chat template at every turn. As far as it begins with the tokens
that the row holds, they are not computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treadle.chatting.templates import ChatTemplate, Message
from treadle.continuation import GrowingText, Piece, TextWriter
from treadle.ir.errors import UsageError
from treadle.runtime.generation import Choosing, count_of, is_full
from treadle.runtime.sampling import Sampling
from treadle.runtime.session import Session
from treadle.runtime.stop_strings import StopStrings
from treadle.runtime.token_rules import TokenRules

Array = np.ndarray[Any, Any]

CAPACITY = 4096
"""Tokens of a conversation, where the model has no limit of its own or a larger one."""


@dataclass
class Conversation:
    """What was said, and a model that replies. Make it with `open`."""

    writer: TextWriter
    template: ChatTemplate
    session: Session
    messages: list[Message] = field(default_factory=list)
    _row: int | None = None

    @classmethod
    def open(cls, writer: TextWriter, *, system: str | None = None, capacity: int | None = None) -> Conversation:
        """Begin a conversation.

        system    what the model is told before
        capacity  the most tokens of the whole; None: as many as the model takes, up to CAPACITY

        Raises UsageError for a model without a chat template.
        """
        context = writer.model.derived.context
        most = capacity or min(context or CAPACITY, CAPACITY)
        session = writer.model.session(rows=1, capacity=most, resumes=True)
        said: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        return cls(writer, writer.chat_template(), session, said)

    def say(
        self,
        text: str,
        *,
        most: int = 512,
        sampling: Sampling | None = None,
        rules: TokenRules | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """The reply to what the user says, piece by piece; both are part of the conversation once it has ended.

        rules  what is asked of each token; None: what the folder asks

        A reply that is not taken to its end leaves the conversation as it was. Raises UsageError where the conversation
        has become too long for the model.
        """
        if count_of(most) < 1:
            raise UsageError("a reply has 1 token or more", received=repr(most))
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = self.writer.tokens([self.template.render(asked)], special=False)[0]
        if len(ids) > self.session.capacity:
            raise UsageError(
                f"the conversation has {len(ids)} tokens, {self.session.who_takes} takes {self.session.capacity}",
                hint="a new conversation",
            )
        growing = GrowingText(self.writer.tokenizer, StopStrings(stop))
        choosing = Choosing(
            most,
            sampling or Sampling(),
            rules or self.writer.asked.rules,
            frozenset(self.writer.end),
            lambda _, token: growing.add(token),
        )
        (row, logits), made, reply = self._read(ids), list[int](), ""
        turn = len(asked)  # draws differ from turn to turn
        while True:
            chosen = choosing.choose(logits, turn, ids, made)
            made.append(chosen)
            token = choosing.token(logits, turn, made, is_full(self.session, row))
            new = growing.tell(token.last)
            reply += new
            if token.last:
                self.messages = [*asked, {"role": "assistant", "content": reply}]
            yield Piece(0, new, token.id, token.ending, token.logprob, token.likely)
            if token.last:
                return
            logits = self.session.step({row: chosen})[row]

    def forget(self) -> None:
        """Begin again, with what the model was told before."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def _read(self, ids: list[int]) -> tuple[int, Array]:
        """The row that holds these tokens, of which it may have held the first, and the logits after them."""
        if self._row is not None:
            self.session.close(self._row, keep=True)
        self._row = self.session.resume(ids)
        return self._row, self.session.prefill({self._row: ids[self.session.length(self._row) :]})[self._row]
