"""Text generation: a language model with its tokenizer, from a folder, a GGUF file or a fetched model.

writer = TextWriter.open("smollm2", backend="torch")
for piece in writer.continued(["The capital of France is"], most=8):
    print(piece.text, end="")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.chatting.prompts import ChatPrompt
from treadle.compiling import optimized_graph
from treadle.extras import need_packages
from treadle.files.shown_names import printable
from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import Hint, TreadleError, UsageError
from treadle.passes.stepping.derivation import DerivedStep, NoStep, derive_step
from treadle.program.options import CompileOptions
from treadle.program.program import Program
from treadle.program.source import AnyModel, ModelSource
from treadle.runtime.beams import Beams, beam_search
from treadle.runtime.generation import Ending, Token, generate
from treadle.runtime.guess_pace import GuessPace
from treadle.runtime.language_models import token_ports
from treadle.runtime.sampling import Sampling
from treadle.runtime.session import Session
from treadle.runtime.speculation import DraftModel, Guess, SpeculationTally, speculate
from treadle.runtime.stop_strings import StopStrings
from treadle.runtime.token_rules import TokenRules
from treadle.stepped import SteppedModel, open_stepped
from treadle.tasks.causal_models import causality_of
from treadle.tasks.fitted_tokenizers import are_logits, fit_tokenizer
from treadle.tasks.generation_settings import FolderRules
from treadle.tasks.images.prompts import ImagePrompts, ReadImage, without_images

if TYPE_CHECKING:
    from treadle.chatting.templates import ChatTemplate, Message
    from treadle.tasks.images.reading import Image

_CAUSAL = "a causal language model, such as smollm2"
_OTHER_KINDS = Hint(
    f"{_CAUSAL}; the methods embed, classify, fill, ... of t.load run other kinds",
    f"{_CAUSAL}; treadle embed, classify, fill, ... run other kinds",
)

MOST_ROWS = 8
"""Maximum number of texts that are generated at the same time; further prompts wait."""


class NotGeneratingError(UsageError):
    """The error for a model that does not continue text, whatever its files are."""


@dataclass(frozen=True)
class Piece:
    """One token of a row's continuation, yielded as soon as the token is chosen.

    row     the index of the prompt
    text    new text; empty while a character's bytes are incomplete, or while the text may begin a stop string
    id      the token's id
    ending  the reason why the row ends with this token: "end", "stop" (a stop string), "context" or "count"; None if it
            does not end
    logprob the natural logarithm of the probability that the model gave the token; None if the caller did not request
            log probabilities
    likely  the most likely tokens at this position with their logprobs, as many as the caller requested
    """

    row: int
    text: str
    id: int
    ending: Ending | None
    logprob: float | None
    likely: tuple[tuple[int, float], ...]

    @property
    def last(self) -> bool:
        """True if the row ends with this token."""
        return self.ending is not None


@dataclass(frozen=True)
class FoundText:
    """A continuation that a beam search found.

    text    the text without the end token
    tokens  the ids, including the end token
    score   the score by which the continuations of a prompt are ranked
    ending  the reason why the text ends, as in `Piece.ending`
    """

    text: str
    tokens: tuple[int, ...]
    score: float
    ending: Ending


_CONTEXT, _TAIL = 8, 32
"""The numbers of tokens before the tail of a growing text that are decoded together with it, and of tokens that the
tail has before its first half becomes settled.
"""


class GrowingText:
    """The decoded text of a row, without the last characters while further tokens can still change them.

    Only the tail of the text is decoded for each token, after a few tokens of context: the text of a token can depend
    on its neighbors. The first half of a tail is settled if the rest decodes to the same text without it.
    """

    def __init__(self, tokenizer: TextTokenizer, stop: StopStrings) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self._ids: list[int] = []  # the context and the tail
        self._context = 0  # number of tokens of the context
        self._passed = ""  # text of the context
        self._returned = 0  # number of characters of the tail's text that were returned
        self._tail = ""

    def add(self, token: int) -> bool:
        """Add a token. Return True if the text now contains a stop string."""
        self._ids.append(token)
        self._tail = self.tokenizer.text(self._ids)[len(self._passed) :]
        return self.stop.split(self._tail[self._returned :])[1]

    def tell(self, is_last: bool) -> str:
        """Return the text that is new and final. If the row has ended (`is_last`), return all remaining text, up to a
        stop string.
        """
        left = self._tail[self._returned :]
        new, ends = self.stop.split(left)
        if is_last and not ends:
            new = left
        elif not ends:
            new = new.rstrip("\N{REPLACEMENT CHARACTER}")
        self._returned += len(new)
        if len(self._ids) - self._context >= _TAIL:
            self._settle()
        return new

    def _settle(self) -> None:
        """Settle the first half of the tail if its text was returned and the text of the rest does not depend on it."""
        at = (self._context + len(self._ids)) // 2  # moves on, since the first try may be within a character
        first = self.tokenizer.text(self._ids[:at])[len(self._passed) :]
        passed = self.tokenizer.text(self._ids[at - _CONTEXT : at])
        rest = self.tokenizer.text(self._ids[at - _CONTEXT :])
        if len(first) <= self._returned and rest.startswith(passed) and first + rest[len(passed) :] == self._tail:
            self._ids, self._context, self._passed = self._ids[at - _CONTEXT :], _CONTEXT, passed
            self._returned -= len(first)
            self._tail = self._tail[len(first) :]


@dataclass(frozen=True)
class TextWriter:
    """A causal language model with its tokenizer, and with its chat template if it has one.

    asked      the folder's generation settings: the token rules, and the ids that end a text
    positions  the maximum number of tokens of a text, according to its files
    images     the images of its prompts, if it reads images
    """

    model: SteppedModel
    tokenizer: TextTokenizer
    asked: FolderRules
    template: str | None = None
    positions: int | None = None
    images: ImagePrompts | None = None

    def check_count(self, count: int, keyword: str, flag: str) -> None:
        """Raise UsageError for a number of tokens, the value of an option, that is above the model's maximum."""
        limits = [n for n in (self.model.derived.context, self.positions) if n is not None]
        if limits and count > min(limits):
            raise UsageError(
                f"{self.model.name} has {min(limits):,} positions",
                received=f"{count:,} tokens",
                hint=Hint(f"{keyword}={min(limits)}", f"{flag} {min(limits)}"),
            )

    @property
    def end(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return self.asked.end

    @classmethod
    def open(
        cls,
        model: AnyModel,
        *,
        stepped: Callable[..., SteppedModel] = open_stepped,
        **options: Any,
    ) -> TextWriter:
        """Compile a model that has a tokenizer. Options are the options of `treadle.compile`, and `cache`.

        stepped  the function that opens the model, called as `treadle.stepped.open_stepped`, the default

        Raises NotGeneratingError if MODEL is not a causal language model, UsageError if it has no weights or the
        tokenizer does not fit, and
        the errors of reading it. If the model is unsupported and the tokenizer has an error, too, the error is about
        the model.
        """
        chosen = CompileOptions.of("generate", options)
        source = chosen.open(model).for_text()
        need_for_text(source)
        try:
            tokenizer = source.tokenizer(cut=False)
            asked, template = FolderRules.read(source), source.chat_template
        except TreadleError:  # of a file; first the errors of a model that no file mends
            graph = optimized_graph(Program(source, chosen))
            with _refusing_other_kinds(source, chosen):
                _check_inputs(graph.name, derive_step(graph))
            raise
        with _refusing_other_kinds(source, chosen):
            made = stepped(source, **chosen.keywords())
        derived = made.derived
        _check_inputs(made.name, derived)
        (name,) = set(derived.tokens) - set(derived.generated)
        verify = derived.graph.functions["verify"]
        tokenizer = fit_tokenizer(tokenizer, source, verify, name)
        logits = token_ports(derived).logits
        if not are_logits(logits, verify.outputs[logits].type, tokenizer):
            raise NotGeneratingError(
                f"{printable(source.label)} does not continue text: its output is not the logits of all tokens",
                received=f"{logits}: {verify.outputs[logits].type}, and {tokenizer.largest_id + 1:,} tokens",
                hint=_OTHER_KINDS,
            )
        images = ImagePrompts.open(source, tokenizer) if derived.prologue else None
        return cls(made, tokenizer, asked, template, source.positions, images)

    def session(self, *, rows: int, capacity: int, resumes: bool | None = None) -> Session:
        """Open a session with room for the images of its texts. Raises as `SteppedModel.session` does."""
        names = self.model.derived.memories.values()
        memory = dict.fromkeys(names, 1) if self.images is None else self.images.memory(capacity)
        return self.model.session(rows=rows, capacity=capacity, memory=memory, resumes=resumes)

    def read_images(self, images: Sequence[Image]) -> list[ReadImage]:
        """Convert the images of a message. Raises UsageError if the model reads no
        images, or a file is not an image.
        """
        if not images:
            return []
        if self.images is None:
            if self.model.derived.prologue:
                raise without_images(self.model.name, why="was opened without its settings for images")
            raise without_images(self.model.name)
        return [self.images.read(image) for image in images]

    def chat_prompt(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        images: Sequence[ReadImage] = (),
        **variables: Any,
    ) -> ChatPrompt:
        """Return the prompt of a conversation, up to the start of a reply. A message with images has a list of parts as
        its content: {"type": "image"}, {"type": "text", "text": "..."}. `variables` are further variables of the
        template.

        Raises UsageError if the template rejects the conversation, or places another number of images.
        """
        if self.images is None:
            return ChatPrompt(self.tokens([template.render(messages, **variables)], special=False)[0])
        shown = self.images.messages(messages, template.template)
        return self.images.prompt(template.render(shown, **variables), images)

    def continued(
        self,
        prompts: Sequence[str],
        *,
        most: int,
        sampling: Sampling | None = None,
        rules: TokenRules | None = None,
        stop: Sequence[str] = (),
        likely: int | None = None,
        guess: Guess | None = None,
        tally: SpeculationTally | None = None,
        special: bool = True,
    ) -> Iterator[Piece]:
        """Continue each prompt by up to `most` tokens, to the model's end-of-text token, or to a stop string.

        rules   token rules (logits processors); None: the folder's rules
        stop    strings that end a text; they are not part of the text
        likely  number of most likely tokens to report with each token, and its log probability; None: no log
                probabilities
        guess   the draft method of speculative decoding; prompts are then continued one after another. The lengths of
                guesses follow from measured times, so that speculation is used only where it saves time
        tally   counts the drafted tokens and the accepted ones
        special True if the tokenizer adds its special tokens to a prompt; pass False for prompts from a chat template,
                which already has them

        Raises UsageError at once for an empty prompt, or for a prompt that leaves no room for a token.
        """
        watch, rows = StopStrings(stop), self.tokens(prompts, special=special)
        growing = [GrowingText(self.tokenizer, watch) for _ in rows]

        def until(row: int, token: int) -> bool:
            return growing[row].add(token)

        options: dict[str, Any] = {"most": most, "sampling": sampling, "rules": rules or self.asked.rules}
        options |= {"stop": self.end, "until": until, "likely": likely}
        if guess is None:
            tokens = generate(self._session(rows, most, min(len(rows), MOST_ROWS)), rows, **options)
        else:
            how: dict[str, Any] = {"guess": guess, "tally": tally, "pace": GuessPace(tries=not guess.is_cheap)}
            tokens = speculate(self._session(rows, most, 1), rows, **how, **options)
        return self._pieces(tokens, growing)

    def searched(
        self,
        prompts: Sequence[str],
        *,
        most: int,
        beams: Beams,
        rules: TokenRules | None = None,
        special: bool = True,
    ) -> list[list[FoundText]]:
        """Return the best continuations of each prompt that a beam search finds, best first. Rules and errors are as in
        `continued`.
        """
        rows = self.tokens(prompts, special=special)
        session = self._session(rows, most, beams.count)
        return [
            [FoundText(self.tokenizer.text(each.tokens), each.tokens, each.score, each.ending) for each in found]
            for found in beam_search(
                session, rows, most=most, beams=beams, rules=rules or self.asked.rules, stop=self.end
            )
        ]

    def tokens(self, prompts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Return the token ids of each prompt. Raises UsageError if there are no prompts, or if a prompt is not a
        string, is not valid Unicode, or marks an image.
        """
        if not prompts:
            raise UsageError("there is no text")
        given: Sequence[object] = prompts
        wrong = [prompt for prompt in given if not isinstance(prompt, str)]
        if wrong:
            raise UsageError("a prompt must be a string", received=f"{wrong[0]!r}"[:200])
        if self.images is not None:
            for prompt in prompts:
                self.images.refuse_marks(prompt)
        return [list(whole.ids) for (whole,) in self.tokenizer.encode(prompts, special=special)]

    def chat_template(self) -> ChatTemplate:
        """Return the chat template that the model was trained with. Raises UsageError if the model has none."""
        from treadle.chatting.templates import ChatTemplate

        if self.template is None:
            raise UsageError(
                f"{self.model.name} has no chat template: it was not trained for conversations",
                hint=Hint(
                    "the method generate continues a prompt",
                    "treadle generate, without --chat, continues a prompt",
                ),
            )
        return ChatTemplate(self.template, self.tokenizer.special_names)

    def draft_for(self, other: TextWriter, *, count: int = 4) -> DraftModel:
        """Return this model as a draft model that guesses `count` tokens at a time for a larger one.

        Raises UsageError if the vocabularies differ, or if this model's rows cannot be truncated.
        """
        if self.tokenizer.vocabulary() != other.tokenizer.vocabulary():
            raise UsageError(
                "a draft model must have the same vocabulary as the model that checks its tokens",
                received=f"the vocabularies of {self.model.name} and {other.model.name} differ",
            )
        context, most = self.model.derived.context, other.model.derived.context
        return DraftModel(self.session(rows=1, capacity=context or most or 4096), count=count)

    def _session(self, prompts: Sequence[Sequence[int]], most: int, rows: int) -> Session:
        longest = max(map(len, prompts), default=0)
        context = self.model.derived.context
        capacity = longest + most if context is None else min(longest + most, context)
        return self.session(rows=max(1, rows), capacity=max(1, capacity))

    @property
    def marks(self) -> list[str]:
        """Special tokens that the chat template writes around a message, such as <|im_start|>."""
        return [token for token in self.tokenizer.special_tokens() if self.template and token in self.template]

    @staticmethod
    def _pieces(tokens: Iterator[Token], growing: Sequence[GrowingText]) -> Iterator[Piece]:
        for token in tokens:
            text = growing[token.row].tell(token.last)
            yield Piece(token.row, text, token.id, token.ending, token.logprob, token.likely)


@contextmanager
def _refusing_other_kinds(source: ModelSource, options: CompileOptions) -> Iterator[None]:
    """Raise NotGeneratingError if no step can be derived from the model."""
    try:
        yield
    except NoStep as error:
        why = "it is not a causal language model"
        received: str | None = error.what
        hint: str | None = _OTHER_KINDS
        if error.is_fixed:
            why, received, hint = "the length of its inputs is fixed", error.received, error.hint
        elif error.is_causal or _is_causal(source, options):
            why = "it has no decoding step"
            hint = f"{_CAUSAL}; treadle run and perplexity compute all positions of a text at once"
        raise NotGeneratingError(
            f"{printable(source.label)} does not continue text: {why}", received=received, hint=hint
        ) from error


def _is_causal(source: ModelSource, options: CompileOptions) -> bool:
    try:
        return bool(causality_of(options.resolve(source, deferred=True)))
    except TreadleError:  # an artifact has no model to resolve
        return False


def _check_inputs(name: str, derived: DerivedStep) -> None:
    """Raise UsageError if a model has required inputs other than its tokens."""
    needed = [each for each in derived.prologue if each not in derived.may_be_empty]
    if needed or len(derived.tokens) != 1 + len(derived.generated):
        raise UsageError(
            "text generation needs a model whose only required input is the tokens [B, S]",
            received=f"{name} takes {', '.join((*derived.prologue, *derived.tokens))}",
            hint=Hint(
                "treadle.compile(model).session(), which also runs encoder-decoder models and models with optional "
                "inputs",
                "treadle translate or summarize, for an encoder-decoder model; treadle run, for one call of any model",
            ),
        )


def need_for_text(model: AnyModel, *, chat: bool = False) -> None:
    """Raise FrontendError if a package is missing that text generation with this model needs, or, if `chat`, a
    conversation with it.
    """
    source = ModelSource.open(model)
    of_file = [source.kind] if source.kind in ("gguf", "onnx") else []
    need_packages(f"text from {printable(source.label)}", "tokenizers", *of_file, *(["jinja2"] if chat else []))
