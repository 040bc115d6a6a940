"""Continuing text: a language model with its tokenizer, from a folder, a GGUF file or a fetched model.

writer = TextWriter.open("smollm2", backend="torch")
for piece in writer.continued(["The capital of France is"], most=8):
    print(piece.text, end="")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.extras import need_packages
from treadle.files.shown_names import printable
from treadle.frontends.ctranslate2_file import find_ctranslate2
from treadle.frontends.gguf_file import GGUFFile
from treadle.frontends.huggingface import open_checkpoint
from treadle.frontends.text import TextTokenizer, folder_chat_template
from treadle.frontends.vocabularies.gguf_tokenizer import gguf_chat_template, gguf_end_tokens, gguf_text_tokenizer
from treadle.ir.errors import UsageError
from treadle.ir.target import Target
from treadle.models.registry import family_of, read_gguf
from treadle.passes.stepping.derivation import NoStep
from treadle.resolving import GGUF_SUFFIX, find_folder
from treadle.runtime.beams import Beams, beam_search
from treadle.runtime.generation import Ending, Token, generate
from treadle.runtime.sampling import Sampling
from treadle.runtime.session import Session
from treadle.runtime.speculation import DraftModel, Guess, SpeculationTally, speculate
from treadle.runtime.stop_strings import StopStrings
from treadle.runtime.token_rules import TokenRules
from treadle.stepped import SteppedModel, open_stepped
from treadle.tasks.generation_settings import FolderRules

if TYPE_CHECKING:
    from treadle.chatting.templates import ChatTemplate

MOST_ROWS = 8
"""Texts that are continued at a time; more wait for one to end."""


@dataclass(frozen=True)
class Piece:
    """A part of one row's continuation, as soon as it is known.

    row     the prompt's number
    text    what is new of the text: none where a character's bytes are not complete, or a stop string may have begun
    id      the token
    ending  why the row ends with it: "end", "stop" (a stop string), "context" or "count"; None where it goes on
    logprob the natural logarithm of the probability that the model gave the token
    likely  the likeliest tokens in its place with theirs, as many as were asked for
    """

    row: int
    text: str
    id: int
    ending: Ending | None
    logprob: float
    likely: tuple[tuple[int, float], ...]

    @property
    def last(self) -> bool:
        """Whether the row ends with it."""
        return self.ending is not None


@dataclass(frozen=True)
class FoundText:
    """A continuation that a beam search found.

    text    without the token that ends it
    tokens  the ids, that one included
    score   by which a prompt's continuations are ranked
    ending  why it ends
    """

    text: str
    tokens: tuple[int, ...]
    score: float
    ending: Ending


class GrowingText:
    """The text of a row, as far as it is certain."""

    def __init__(self, tokenizer: TextTokenizer, stop: StopStrings) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.whole = self.told = ""

    def add(self, token: int) -> bool:
        """Whether a stop string ends the text with this token."""
        self.ids.append(token)
        self.whole = self.tokenizer.text(self.ids)
        return self.stop.split(self.whole)[1]

    def tell(self, is_last: bool) -> str:
        """What is new and certain; all, up to a stop string, where the row has ended."""
        certain, ends = self.stop.split(self.whole)
        if is_last and not ends:
            certain = self.whole
        elif not ends:
            certain = certain.rstrip("\N{REPLACEMENT CHARACTER}")
        new, self.told = certain[len(self.told) :], certain
        return new


@dataclass(frozen=True)
class TextWriter:
    """A causal language model, its tokenizer, and its chat template if it has one.

    asked  what its folder asks of each token, and the ids that end a text
    """

    model: SteppedModel
    tokenizer: TextTokenizer
    asked: FolderRules
    template: str | None = None

    @property
    def end(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return self.asked.end

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        backend: str = "numpy",
        target: str | Target = "cpu",
        limits: Mapping[str, int] | None = None,
        cache: str | None = None,
        stepped: Callable[..., SteppedModel] = open_stepped,
        **config: Any,
    ) -> TextWriter:
        """Compile a model that has a tokenizer; `cache` is the dtype of its caches, None: the model's own.

        stepped  what opens it, if not `treadle.stepped.open_stepped`, which it is called as

        Raises UsageError where MODEL names no weights or no causal language model, and the errors of reading it: what
        no family reads is told before what its tokenizer lacks.
        """
        place = find_folder(model)
        need_for_text(model)
        tokenizer, file = _read_tokenizer(place, limits)
        if file is not None:
            asked, template = FolderRules(end=gguf_end_tokens(file)), gguf_chat_template(file)
        else:
            asked, template = FolderRules.read(place), folder_chat_template(place)
        try:
            made = stepped(model, backend=backend, target=target, limits=limits, cache=cache, **config)
        except NoStep as error:
            raise UsageError(
                f"{printable(str(model))} does not continue text: it is no causal language model",
                received=error.what,
                hint="a model that is, such as smollm2; treadle embed, classify, fill and others ask other ones",
            ) from error
        if made.derived.prologue or len(made.derived.tokens) != 1:
            raise UsageError(
                "text is continued by a model of one input, the tokens [B, S]",
                received=f"{made.name} takes {', '.join((*made.derived.prologue, *made.derived.tokens))}",
                hint="an encoder-decoder model, or one with optional inputs, runs in a session of `compile`",
            )
        return cls(made, tokenizer, asked, template)

    def continued(
        self,
        prompts: Sequence[str],
        *,
        most: int,
        sampling: Sampling | None = None,
        rules: TokenRules | None = None,
        stop: Sequence[str] = (),
        likely: int = 0,
        guess: Guess | None = None,
        tally: SpeculationTally | None = None,
        special: bool = True,
    ) -> Iterator[Piece]:
        """Continue each prompt by up to `most` tokens, to the model's end of text, or to a stop string.

        rules   what is asked of the next token, by those before it; None: what the folder asks
        stop    strings that end a text, and are no part of it
        likely  how many of the likeliest tokens are told beside each one
        guess   what guesses tokens that the model then checks, prompt after prompt; `tally` counts what came of it
        special whether the tokenizer puts its special tokens around a prompt, as it does not around a chat template's

        Raises UsageError at once for an empty prompt, or one that leaves no room.
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
            tokens = speculate(self._session(rows, most, 1), rows, guess=guess, tally=tally, **options)
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
        """The best continuations of each prompt that a beam search finds, best first. Rules and errors are those of
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
        """The ids of each prompt. Raises UsageError for no prompt, one that is no string, or not valid Unicode."""
        if not prompts:
            raise UsageError("there is no text")
        given: Sequence[object] = prompts
        wrong = [prompt for prompt in given if not isinstance(prompt, str)]
        if wrong:
            raise UsageError("a prompt must be a string", received=f"{wrong[0]!r}"[:200])
        return [list(whole.ids) for (whole,) in self.tokenizer.encode(prompts, special=special)]

    def chat_template(self) -> ChatTemplate:
        """The template in which the model expects a conversation. Raises UsageError where it was not trained for
        one.
        """
        from treadle.chatting.templates import ChatTemplate

        if self.template is None:
            raise UsageError(
                f"{self.model.name} has no chat template: it was not made for conversations",
                hint="a model that was, or a prompt to continue",
            )
        return ChatTemplate(self.template, self.tokenizer.special_names)

    def draft_for(self, other: TextWriter, *, count: int = 4) -> DraftModel:
        """This model as the one that guesses `count` tokens at a time for a larger one.

        Raises UsageError where the two have other vocabularies, or this one's rows cannot take tokens back.
        """
        if self.tokenizer.vocabulary() != other.tokenizer.vocabulary():
            raise UsageError(
                "a draft model must have the same vocabulary as the model that checks its tokens",
                received=f"{self.model.name} and {other.model.name} have different ones",
            )
        context, most = self.model.derived.context, other.model.derived.context
        return DraftModel(self.model.session(rows=1, capacity=context or most or 4096), count=count)

    def _session(self, prompts: Sequence[Sequence[int]], most: int, rows: int) -> Session:
        longest = max(map(len, prompts), default=0)
        context = self.model.derived.context
        capacity = longest + most if context is None else min(longest + most, context)
        return self.model.session(rows=max(1, rows), capacity=max(1, capacity))

    @property
    def marks(self) -> list[str]:
        """The special tokens that the chat template writes around what is said, such as <|im_start|>."""
        return [token for token in self.tokenizer.special_tokens() if self.template and token in self.template]

    @staticmethod
    def _pieces(tokens: Iterator[Token], growing: Sequence[GrowingText]) -> Iterator[Piece]:
        for token in tokens:
            text = growing[token.row].tell(token.last)
            yield Piece(token.row, text, token.id, token.ending, token.logprob, token.likely)


def text_tokenizer(model: str | Path, limits: Mapping[str, int] | None = None) -> TextTokenizer:
    """The tokenizer of a folder, a GGUF file or a fetched model, which cuts no text.

    Raises the errors of reading it; what no family reads is told before what its tokenizer lacks.
    """
    return _read_tokenizer(find_folder(model), limits)[0]


def _read_tokenizer(place: Path, limits: Mapping[str, int] | None) -> tuple[TextTokenizer, GGUFFile | None]:
    """The tokenizer, and the GGUF file where it is of one."""
    if place.suffix == GGUF_SUFFIX:
        file = GGUFFile.open(place, limits)
        read_gguf(file)
        return gguf_text_tokenizer(file), file
    if place.is_dir() and find_ctranslate2(place, limits) is None:
        family_of(open_checkpoint(place, limits).config)
    return TextTokenizer.open(place, cut=False), None


def need_for_text(model: str | Path, *, chat: bool = False) -> None:
    """Raises FrontendError where packages are missing that a text writer, or a conversation, needs of this model."""
    of_file = ["gguf"] if find_folder(model).suffix == GGUF_SUFFIX else []
    need_packages(f"text from {printable(str(model))}", "tokenizers", *of_file, *(["jinja2"] if chat else []))
