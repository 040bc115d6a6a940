"""Served models: a language model with a scheduler, which may embed too, or a sentence embedding model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from treadle.chatting.templates import ChatTemplate
from treadle.continuation import NotGeneratingError, TextWriter
from treadle.files.available_memory import free_memory
from treadle.files.errors import TreadleError
from treadle.files.shown_names import printable
from treadle.ir.errors import Hint, UsageError
from treadle.program.options import CompileOptions
from treadle.program.source import ModelSource
from treadle.reporting.counts import human
from treadle.runtime.row_inputs import RowPrompt
from treadle.runtime.scheduler import BUDGET, Scheduler
from treadle.sentence_embedding import Embedded, NotEmbeddingError, SentenceEmbedder
from treadle.serving.refusals import RequestRefusal, refused
from treadle.serving.requests import Prompt, WantedTexts

ROWS, CAPACITY, QUEUE = 16, 2048, 256
_SHARE = 0.5
"""Maximum part of the free memory that caches take if the number of rows is not set."""
_RESERVED = ("messages", "add_generation_prompt", "tools", "documents")
"""Variables of chat templates that a request cannot set."""


class ServedWriter:
    """A language model with its served name, its tokenizer, and a scheduler for its rows.

    clips   True if a number of tokens that does not fit into a row is reduced, False if it is an error
    notes   remarks on sizes that differ from the caller's, as sentences
    """

    _open_embedder: Callable[[], SentenceEmbedder] | None = None
    _embedder: ServedEmbedder | None = None
    _no_embeddings = ""  # the reason
    _queue = QUEUE
    _opening = threading.Lock()

    def __init__(
        self,
        name: str,
        writer: TextWriter,
        *,
        rows: int | None = None,
        capacity: int | None = None,
        queue: int = QUEUE,
        resumes: bool | None = None,
        budget: int | None = None,
        prefixes: int | None = None,
        clips: bool = False,
        embedder: Callable[[], SentenceEmbedder] | None = None,
    ) -> None:
        """Allocate the rows.

        rows      number of rows; None: 16, or fewer if their caches would take more than half of the free memory
        capacity  tokens of a row; None: 2048, or the model's maximum if this is less
        budget    maximum number of tokens of a step; None: the scheduler's default
        prefixes  maximum size of prefixes in host memory in bytes; None: none are stored
        embedder  opens the same model for embeddings, at the first request for them; None: it has no embeddings

        Raises as `SteppedModel.session` and `Session.cache_prefixes` do, and UsageError if the caches are larger than
        the free memory.
        """
        self.name, self.writer, self.clips = name, writer, clips
        self.notes: list[str] = []
        limits = [n for n in (writer.model.derived.context, writer.positions) if n is not None]
        tokens = min([capacity or CAPACITY, *limits])
        if capacity is not None and tokens < capacity:
            self.notes.append(f"{name} has {tokens:,} positions, so its rows have {tokens:,} tokens, not {capacity:,}")
        count = self._fitting_rows(rows, tokens, prefixes or 0)
        session = writer.session(rows=count, capacity=tokens, resumes=resumes)
        if prefixes is not None:
            session.cache_prefixes(prefixes)
        self.scheduler = Scheduler(session, queue=queue, budget=BUDGET if budget is None else budget)
        self._template: ChatTemplate | None = None
        self._open_embedder, self._queue = embedder, queue

    def embedder(self) -> ServedEmbedder:
        """Return the same model for embeddings. The first call compiles it.

        Raises RequestRefusal if the model has no embeddings, with the reason.
        """
        with self._opening:
            if self._embedder is None and self._open_embedder is not None:
                try:
                    self._embedder = ServedEmbedder(self.name, self._open_embedder(), queue=self._queue)
                except TreadleError as error:
                    self._no_embeddings, self._open_embedder = f": {error.what}", None
        if self._embedder is None:
            what = f"{self.name} generates text, and has no embeddings{self._no_embeddings}"
            raise RequestRefusal(400, what, field="model")
        return self._embedder

    def _fitting_rows(self, rows: int | None, tokens: int, prefixes: int) -> int:
        """Return the number of rows: the given one if it fits into the free memory, else the largest one up to 16."""
        free = free_memory()
        if free is None:
            return ROWS if rows is None else rows
        nbytes = self.writer.session(rows=1, capacity=tokens).nbytes  # its pages are not touched
        if (rows or 1) * nbytes + prefixes > free:
            parts = [f"{rows or 1} rows of {tokens:,} tokens take {human((rows or 1) * nbytes, 'B')}"]
            parts += [f"prefixes {human(prefixes, 'B')}"] if prefixes else []
            raise UsageError(
                f"there is not enough memory for the caches of {self.name}",
                received=f"{', '.join(parts)}; {human(free, 'B')} are free",
                hint=Hint(
                    "fewer rows, a smaller capacity or smaller prefixes",
                    "a smaller --rows, --context or --prefix-cache",
                ),
            )
        if rows is not None:
            return rows
        found = min(ROWS, max(1, int((free * _SHARE - prefixes) // nbytes)))
        if found < ROWS:
            self.notes.append(
                f"{self.name} has {found} rows: the caches of {ROWS} rows take {human(ROWS * nbytes, 'B')}, "
                f"and {human(free, 'B')} of memory are free"
            )
        return found

    @property
    def description(self) -> str:
        """The number and the length of its rows, and the size of their caches, as text."""
        session = self.scheduler.session
        rows = len(session.rows) + session.free
        return f"{rows} rows of {session.capacity} tokens, {session.nbytes / 1e6:.0f} MB of caches"

    def check(self, how: WantedTexts) -> None:
        """Raise RequestRefusal for a token id that is not in the vocabulary."""
        most = self.scheduler.session.vocabulary
        biased = [token for token, _ in how.rules.get("logit_bias") or ()]
        for field, ids in (("stop_token_ids", how.stop_ids), ("logit_bias", biased)):
            wrong = next((token for token in ids if most is not None and token >= most), None)
            if wrong is not None:
                known = f"ids are 0 to {(most or 0) - 1}"
                raise RequestRefusal(400, f"{field}: token {wrong} is not in the vocabulary; {known}", field=field)

    def most_tokens(self, prompt: Sequence[int], how: WantedTexts) -> int:
        """Return the maximum number of tokens of a text after a prompt. Raises RequestRefusal if the request sets a
        number that does not fit into a row, and the server does not reduce it.
        """
        capacity = self.scheduler.session.capacity
        room = capacity - len(prompt) + 1  # the last token is not stored
        if how.most is not None and how.most > room and not self.clips:
            raise RequestRefusal(
                400,
                f"{how.most_field} is {how.most}, and a prompt of {len(prompt)} tokens leaves room for {room}: "
                f"{self.name} takes {capacity} tokens",
                field=how.most_field,
                code="context_length_exceeded",
            )
        wanted = how.default if how.most is None else how.most
        return room if wanted is None else min(wanted, room)

    def text_ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Return the token ids of a text. Raises RequestRefusal for a text that is not valid Unicode.

        special  True if the tokenizer adds its special tokens
        """
        try:
            return tuple(self.writer.tokens([text], special=special)[0])
        except TreadleError as error:
            raise refused(error, field="prompt") from error

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. Raises RequestRefusal for an id that is not in the vocabulary."""
        most = self.scheduler.session.vocabulary
        wrong = next((token for token in ids if most is not None and token >= most), None)
        if wrong is not None:
            raise RequestRefusal(400, f"tokens: token {wrong} is not in the vocabulary", field="tokens")
        return self.writer.tokenizer.text(ids)

    def prompt_text(self, prompt: Prompt) -> str:
        """Return the text of a prompt."""
        return self.text_of(prompt.ids) if prompt.text is None else prompt.text

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the token ids of a prompt. Raises RequestRefusal if the prompt does not fit into a row."""
        try:
            ids = prompt.ids if prompt.text is None else tuple(self.writer.tokens([prompt.text])[0])
            if self.writer.images is not None:
                self.writer.images.refuse_marks(ids)
            self.scheduler.check(ids)
        except TreadleError as error:
            raise refused(error, field="prompt") from error
        return ids

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[bytes] = (),
        variables: Mapping[str, Any] | None = None,
        *,
        checked: bool = True,
    ) -> RowPrompt:
        """Return the prompt of a conversation, up to the start of the assistant's answer.

        images     the files of the images in the messages, in order
        variables  further variables of the chat template
        checked    True if the conversation must fit into a row

        Raises RequestRefusal if the model has no chat template, the template does not use one of the variables or
        raises an error, the conversation does not fit into a row, or an image cannot be read.
        """
        try:
            if self._template is None:
                self._template = self.writer.chat_template()
            values = self._template_values(self._template, variables or {})
            prompt = self.writer.chat_prompt(self._template, messages, self.writer.read_images(images), **values)
            if checked:
                self.scheduler.check(tuple(prompt.ids))
            return self.scheduler.session.prompt(prompt.ids, **prompt.inputs)
        except TreadleError as error:
            if self._template is None:
                error.hint = "/v1/completions, which continues a prompt"
            raise refused(error, field="messages") from error

    def _template_values(self, template: ChatTemplate, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Return the variables that the template uses. Raises RequestRefusal if it does not use one of them."""
        values = dict(variables)
        if not values:
            return values
        usable = template.variables.difference(_RESERVED, template.special)
        if values.get("reasoning_effort") == "none" and "reasoning_effort" not in usable:
            del values["reasoning_effort"]  # the model does not reason
        for name in values:
            if name not in usable:
                is_own = name == "reasoning_effort"
                field = name if is_own else "chat_template_kwargs"
                what = field if is_own else f"{field}.{name[:80]}"
                message = f"{what} is not supported: the chat template of {self.name} has no such variable"
                raise RequestRefusal(400, message, field=field)
        return values

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
        self._present = 0  # the request that is computed, and the waiting ones
        self.notes: list[str] = []
        self._count = threading.Lock()

    @property
    def description(self) -> str:
        """The length of its vectors, as text."""
        return f"embeddings of {self.embedder.width} numbers"

    def embed(self, texts: Sequence[str | Sequence[int]]) -> Embedded:
        """Return the vectors of texts, or of lists of token ids. This waits until earlier requests are done.

        Raises RequestRefusal if too many requests wait, or if a text is too long or cannot be embedded.
        """
        with self._count:
            if self._present > self.queue:
                raise queue_full(f"{self._present - 1} requests are waiting")
            self._present += 1
        try:
            with self._turn:
                return self.embedder.embed_reporting(texts, truncate=False)
        except TreadleError as error:
            raise refused(error, field="input") from error
        finally:
            with self._count:
                self._present -= 1


Served = ServedWriter | ServedEmbedder


def queue_full(why: str) -> RequestRefusal:
    """Return the error response to a request that may be accepted later: status 429."""
    return RequestRefusal(429, f"{why}; try again later", code="queue_full", headers={"Retry-After": "1"})


@dataclass(frozen=True)
class Opening:
    """Options for opening models: see `ServedWriter`, and `ServedEmbedder` for `queue`."""

    rows: int | None = None
    capacity: int | None = None
    queue: int = QUEUE
    resumes: bool | None = None
    budget: int | None = None
    prefixes: int | None = None
    clips: bool = False

    def open(self, model: str, *, prefers_own: bool = False, **options: Any) -> Served:
        """Compile a model for text generation, or, if it does not generate text, for embeddings.

        model    NAME=MODEL, or MODEL, which is then named after its function, or after the last part of its path
        prefers_own  True if the option `tokenizer` is for other models, too: a model that has a tokenizer uses its own
        options  the options of `treadle.compile`, and `cache`

        Raises the error of text generation if the model supports neither, and the error of embedding if it embeds but
        cannot be opened.
        """
        name, is_named, place = model.partition("=")
        if not is_named:
            name, place = model.rstrip("/").rpartition("/")[2].rpartition(".py:")[2], model
        if not name:
            raise UsageError("a model needs a name to be served under", received=model, hint="NAME=MODEL")
        chosen = CompileOptions.of("generate", options)
        source = chosen.open(place)
        notes = []
        if prefers_own and chosen.tokenizer is not None and ModelSource(source.form).has_tokenizer:
            notes.append(f"{name} uses its own tokenizer, not {printable(str(chosen.tokenizer))}")
            source, chosen = ModelSource(source.form), chosen.but(tokenizer=None)
        embedder = partial(SentenceEmbedder.open, source, **chosen.but(cache=None).keywords())
        try:
            writer = TextWriter.open(source, **chosen.keywords())
        except TreadleError as writes_not:
            try:
                served: Served = ServedEmbedder(name, embedder(), queue=self.queue)
            except NotEmbeddingError:
                raise writes_not from None
            except TreadleError as embeds_not:
                raise (embeds_not if isinstance(writes_not, NotGeneratingError) else writes_not) from None
        else:
            sizes = {each.name: getattr(self, each.name) for each in fields(self)}
            served = ServedWriter(name, writer, **sizes, embedder=embedder)
        served.notes += notes
        return served
