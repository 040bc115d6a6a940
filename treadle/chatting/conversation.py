"""A conversation with a chat model, whose history stays in one row of a session.

    chat = Conversation.open(TextWriter.open("smollm2"), system="You are brief.")
    for piece in chat.say("What is the capital of France?", most=64):
        print(piece.text, end="")

The model's chat template renders the whole conversation again at every turn. If the rendered tokens have a prefix in
common with the row, that prefix is not recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.chatting.prompts import ChatPrompt
from treadle.chatting.templates import ChatTemplate, Message
from treadle.continuation import GrowingText, Piece, TextWriter
from treadle.ir.errors import UsageError
from treadle.runtime.generation import Choosing, count_of, is_full
from treadle.runtime.sampling import Sampling
from treadle.runtime.session import Session
from treadle.runtime.stop_strings import StopStrings
from treadle.runtime.token_rules import TokenRules
from treadle.tasks.option_hints import with_task_calls

if TYPE_CHECKING:
    from treadle.tasks.images.prompts import ReadImage
    from treadle.tasks.images.reading import Image

Array = np.ndarray[Any, Any]

CAPACITY = 4096
"""Maximum number of tokens of a conversation, unless the model has a smaller limit."""


@with_task_calls
@dataclass
class Conversation:
    """The messages of a conversation, and the model that replies. Create it with `open`."""

    writer: TextWriter
    template: ChatTemplate
    session: Session
    messages: list[Message] = field(default_factory=list)
    images: list[ReadImage] = field(default_factory=list)
    _row: int | None = None

    @classmethod
    def open(cls, writer: TextWriter, *, system: str | None = None, capacity: int | None = None) -> Conversation:
        """Start a conversation.

        system    the system prompt
        capacity  maximum number of tokens of the conversation; None: the model's maximum, but at most CAPACITY

        Raises UsageError for a model without a chat template.
        """
        context = writer.model.derived.context
        most = capacity or min(context or CAPACITY, CAPACITY)
        session = writer.session(rows=1, capacity=most, resumes=True)
        said: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        return cls(writer, writer.chat_template(), session, said)

    def say(
        self,
        text: str,
        *,
        images: Sequence[Image] = (),
        most: int = 512,
        sampling: Sampling | None = None,
        rules: TokenRules | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Yield the reply to a user's message piece by piece. When the reply has ended, the message and the reply are
        added to `messages`.

        images  images, such as the paths of files, which the message shows before its text; the model must read images
        rules   token rules; None: the folder's rules

        If the caller stops before the reply ends, `messages` is unchanged. Raises UsageError if the conversation has
        become too long for the model, if the model reads no images, or if a file is not an image.
        """
        if count_of(most) < 1:
            raise UsageError("a reply must have 1 token or more", received=repr(most))
        shown = self.writer.read_images(images)
        content = [*[{"type": "image"}] * len(shown), {"type": "text", "text": text}] if shown else text
        asked: list[Message] = [*self.messages, {"role": "user", "content": content}]
        prompt = self.writer.chat_prompt(self.template, asked, [*self.images, *shown])
        ids = prompt.ids
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
        (row, logits), made, reply = self._read(prompt), list[int](), ""
        turn = len(asked)  # a different random draw at each turn
        while True:
            chosen = choosing.choose(logits, turn, ids, made)
            made.append(chosen)
            token = choosing.token(logits, turn, made, is_full(self.session, row))
            new = growing.tell(token.last)
            reply += new
            if token.last:
                self.messages = [*asked, {"role": "assistant", "content": reply}]
                self.images += shown
            yield Piece(0, new, token.id, token.ending, token.logprob, token.likely)
            if token.last:
                return
            logits = self.session.step({row: chosen})[row]

    def forget(self) -> None:
        """Start the conversation again, with the same system prompt."""
        self.images = []
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def _read(self, prompt: ChatPrompt) -> tuple[int, Array]:
        """Return the row that holds these tokens, and the logits after them. A prefix that the row already holds is
        reused.
        """
        if self._row is not None:
            self.session.close(self._row, keep=True)
        self._row, ids = self.session.resume(prompt.ids, **prompt.inputs), prompt.ids
        return self._row, self.session.prefill({self._row: ids[self.session.length(self._row) :]})[self._row]
