"""Served models: a language model with a scheduler, or a sentence embedding model."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treadle.chatting.templates import ChatTemplate
from treadle.continuation import TextWriter
from treadle.files.errors import TreadleError
from treadle.ir.errors import UsageError
from treadle.program.options import CompileOptions
from treadle.runtime.row_inputs import RowPrompt
from treadle.runtime.scheduler import Scheduler
from treadle.sentence_embedding import Embedded, SentenceEmbedder
from treadle.serving.refusals import RequestRefusal, refused
from treadle.serving.requests import Prompt

ROWS, CAPACITY, QUEUE = 16, 2048, 256


class ServedWriter:
    """A language model with its served name, its tokenizer, and a scheduler for its rows."""

    def __init__(
        self, name: str, writer: TextWriter, *, rows: int, capacity: int, queue: int, resumes: bool | None = None
    ) -> None:
        """Allocate the rows. Raises as `SteppedModel.session` does."""
        self.name, self.writer = name, writer
        context = writer.model.derived.context
        most = capacity if context is None else min(capacity, context)
        self.scheduler = Scheduler(writer.session(rows=rows, capacity=most, resumes=resumes), queue=queue)
        self._template: ChatTemplate | None = None

    @property
    def description(self) -> str:
        """The number and the length of its rows, and the size of their caches, as text."""
        session = self.scheduler.session
        rows = len(session.rows) + session.free
        return f"{rows} rows of {session.capacity} tokens, {session.nbytes / 1e6:.0f} MB of caches"

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the token ids of a prompt. Raises RequestRefusal if the prompt does not fit into a row."""
        try:
            ids = prompt.ids if prompt.text is None else tuple(self.writer.tokens([prompt.text])[0])
            self.scheduler.check(ids)
        except TreadleError as error:
            raise refused(error, field="prompt") from error
        return ids

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], images: Sequence[bytes] = ()) -> RowPrompt:
        """Return the prompt of a conversation, up to the start of the assistant's answer. Raises RequestRefusal if the
        model has no chat template, the template raises an error, the conversation does not fit into a row, or an image
        cannot be read.
        """
        try:
            if self._template is None:
                self._template = self.writer.chat_template()
            prompt = self.writer.chat_prompt(self._template, messages, self.writer.read_images(images))
            self.scheduler.check(tuple(prompt.ids))
            return self.scheduler.session.prompt(prompt.ids, **prompt.inputs)
        except TreadleError as error:
            raise refused(error, field="messages") from error

    def close(self, *, drain: float) -> None:
        """Stop generation, with `drain` seconds for running texts; see `Scheduler.close`."""
        self.scheduler.close(drain=drain)
        if self._template is not None:
            self._template.close()

    def shown(self, token: int) -> str:
        """Return the text of a single token."""
        return self.writer.tokenizer.text([token])


class ServedEmbedder:
    """A sentence embedding model with its served name. It computes one request at a time; at most `queue` requests
    wait.
    """

    def __init__(self, name: str, embedder: SentenceEmbedder, *, queue: int) -> None:
        self.name, self.embedder, self.queue = name, embedder, queue
        self._turn = threading.Lock()
        self._waiting = 0
        self._count = threading.Lock()

    @property
    def description(self) -> str:
        """The length of its vectors, as text."""
        return f"embeddings of {self.embedder.width} numbers"

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Return the vectors of texts. This waits until earlier requests are done.

        Raises RequestRefusal if too many requests wait, or if a text cannot be embedded.
        """
        with self._count:
            if self._waiting >= self.queue:
                raise queue_full(f"{self._waiting} requests are waiting")
            self._waiting += 1
        try:
            with self._turn:
                return self.embedder.embed_reporting(texts)
        except TreadleError as error:
            raise refused(error, field="input") from error
        finally:
            with self._count:
                self._waiting -= 1


Served = ServedWriter | ServedEmbedder


def queue_full(why: str) -> RequestRefusal:
    """Return the error response to a request that may be accepted later: status 429."""
    return RequestRefusal(429, f"{why}; try again later", code="queue_full", headers={"Retry-After": "1"})


@dataclass(frozen=True)
class Opening:
    """Options for opening models: see `treadle serve`."""

    rows: int = ROWS
    capacity: int = CAPACITY
    queue: int = QUEUE
    resumes: bool | None = None

    def open(self, model: str, **options: Any) -> Served:
        """Compile a model for text generation, or, if it does not generate text, for embeddings.

        model    NAME=MODEL, or MODEL, which is then named after the last part of its path
        options  the options of `treadle.compile`, and `cache`

        If the model supports neither, raises the error of text generation.
        """
        name, is_named, place = model.partition("=")
        if not is_named:
            name, place = model.rstrip("/").rpartition("/")[2], model
        if not name:
            raise UsageError("a model needs a name to be served under", received=model, hint="NAME=MODEL")
        chosen = CompileOptions.of("generate", options)
        source = chosen.open(place)
        try:
            writer = TextWriter.open(source, **options)
        except TreadleError as writes_not:
            try:
                embedder = SentenceEmbedder.open(source, **chosen.but(cache=None).keywords())
            except TreadleError:
                raise writes_not from None
            return ServedEmbedder(name, embedder, queue=self.queue)
        rows: dict[str, Any] = {"rows": self.rows, "capacity": self.capacity, "resumes": self.resumes}
        return ServedWriter(name, writer, queue=self.queue, **rows)
