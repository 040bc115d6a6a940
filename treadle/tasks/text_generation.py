"""A text generation run: a language model continues prompts by sampling or beam search, and reports the results.

run = TextGeneration.open("smollm2", ["The capital of France is"], DecodingSettings(most=8), backend="tvm")
for piece in run.pieces():
    print(piece.text, end="")
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from treadle.continuation import FoundText, Piece, TextWriter, need_for_text
from treadle.program.further_models import open_further
from treadle.program.options import CompileOptions
from treadle.reporting.counts import counted
from treadle.runtime.speculation import Guess, PromptLookup, SpeculationTally
from treadle.stepped import SteppedModel, open_stepped
from treadle.tasks.decoding_settings import DecodingSettings
from treadle.tasks.generation_settings import FolderRules


@dataclass
class TextGeneration:
    """A text generation run. Create it by `open`, then call either `pieces` or `searched`, once.

    texts     the prompts as the user passed them
    prompts   the prompts to continue: the texts, in the chat template if the settings request it
    rules     the folder's token rules, with the values that the settings override
    guess     the draft method of speculative decoding
    continuations  the continuation of each prompt so far
    """

    settings: DecodingSettings
    options: CompileOptions
    writer: TextWriter
    texts: Sequence[str]
    prompts: Sequence[str]
    rules: FolderRules
    guess: Guess | None = None
    tally: SpeculationTally | None = None
    continuations: list[Written] = field(default_factory=list)
    pace: Pace = field(default_factory=lambda: Pace())

    @classmethod
    def open(
        cls,
        model: str,
        prompts: Sequence[str],
        settings: DecodingSettings,
        *,
        stepped: Callable[..., SteppedModel] = open_stepped,
        **options: Any,
    ) -> TextGeneration:
        """Compile the model, and a draft model if the settings name one. Options are the options of `treadle.compile`,
        and `cache`.

        stepped  the function that opens the model's step, as `treadle.stepped.open_stepped` does

        Raises as `TextWriter.open` does, and UsageError for more tokens than the model has positions.
        """
        chosen = CompileOptions.of("generate", options)
        if settings.samples_on_device:
            options["device_sampling"] = "random" if settings.temperature > 0 else "greedy"
        need_for_text(model, chat=settings.chat)
        draft = None if settings.draft is None else open_further(settings.draft, "draft")
        writer = TextWriter.open(model, stepped=stepped, **options)
        if settings.most != DecodingSettings.most:  # the default applies to models with fewer positions, too
            writer.check_count(settings.most, "most", "--tokens")
        guess: Guess | None = PromptLookup(count=16) if settings.speculate else None
        if draft is not None:
            how = {name: options[name] for name in ("backend", "target", "cache") if name in chosen.explicit}
            guess = TextWriter.open(draft, **how).draft_for(writer)
        shown = list(prompts)
        if settings.chat:
            template = writer.chat_template()
            before = [] if settings.system is None else [{"role": "system", "content": settings.system}]
            shown = [template.render([*before, {"role": "user", "content": text}]) for text in prompts]
        rules = writer.asked.but(**settings.penalties)
        return cls(
            settings,
            chosen,
            writer,
            prompts,
            shown,
            rules,
            guess,
            None if guess is None else SpeculationTally(),
            [Written(prompt) for prompt in prompts],
        )

    def pieces(self) -> Iterator[Piece]:
        """Return an iterator over the tokens of all continuations, as soon as each is chosen. The continuations are
        also recorded in `continuations`.

        Raises UsageError at once, before the first token, for an invalid prompt.
        """
        settings = self.settings
        pieces = self.writer.continued(
            self.prompts,
            most=settings.most,
            sampling=settings.sampling,
            rules=self.rules.rules,
            stop=settings.stop,
            likely=settings.logprobs,
            guess=self.guess,
            tally=self.tally,
            special=not settings.chat,
        )
        return self._recorded(pieces)

    def _recorded(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            self.continuations[piece.row].add(piece)
            self.pace.count()
            yield piece

    def searched(self) -> list[list[FoundText]]:
        """Return the continuations of each prompt that a beam search finds, best first."""
        search = self.settings.search
        assert search is not None
        return self.writer.searched(
            self.prompts, most=self.settings.most, beams=search, rules=self.rules.rules, special=not self.settings.chat
        )

    def _facts(self) -> dict[str, Any]:
        made = {"model": self.writer.model.name, "backend": self.writer.model.backend}
        return {**made, "from_folder": self.rules.as_dict()}

    def facts(self) -> dict[str, Any]:
        """Return the results of `pieces` as a dict for JSON."""
        sampling, rules = asdict(self.settings.sampling), self.rules.rules
        sampling |= {"repetition_penalty": rules.repetition_penalty, "presence_penalty": rules.presence_penalty}
        found = {**self._facts(), "sampling": sampling, "chat_template": self.writer.template is not None}
        found |= self.pace.facts()
        if self.tally is not None:
            found["speculation"] = _tally_facts(self.tally)
        with_logprobs = self.settings.logprobs is not None
        return {**found, "texts": [each.facts(self.writer, with_logprobs) for each in self.continuations]}

    def searched_facts(self, searched: Sequence[Sequence[FoundText]]) -> dict[str, Any]:
        """Return the results of `searched` as a dict for JSON."""
        search = self.settings.search
        assert search is not None
        pairs = zip(self.texts, searched, strict=True)
        texts = [{"prompt": prompt, "found": list(map(asdict, found))} for prompt, found in pairs]
        return {**self._facts(), "beams": asdict(search), "texts": texts}

    def reasons(self) -> list[str]:
        """Return lines about the end of each text, the folder's settings that apply, the speed, and the accepted draft
        tokens.
        """
        lines = []
        for number, each in enumerate(self.continuations, 1):
            which = f"text {number}: " if len(self.continuations) > 1 else ""
            lines.append(which + each.reason(self.writer))
        pieces = [piece for each in self.continuations for piece in each.pieces]
        unnamed = sum(not self.writer.tokenizer.has(piece.id) for piece in pieces)
        if unnamed:
            lines.append(f"{unnamed} of {counted(len(pieces), 'token')} have no text: the tokenizer lacks their ids")
        if self.rules.options:
            lines.append(str(self.rules))
        if pace := self.pace.summary():
            lines.append(pace)
        if self.tally is not None:
            right = f"{self.tally.accepted} of {counted(self.tally.guessed, 'guessed token')} accepted"
            right += f", {self.tally.unused} after the end of a text" if self.tally.unused else ""
            lines.append(f"{right}, {self.tally.accepted_length:.2f} per call of the model")
        return lines


def _tally_facts(tally: SpeculationTally) -> dict[str, Any]:
    """Return the counts of speculation for JSON. `margin` is None if no chosen token was the most likely one."""
    margin = tally.margin if math.isfinite(tally.margin) else None
    return {**asdict(tally), "margin": margin, "accepted_length": tally.accepted_length}


class Pace:
    """The speed of generation: the time to the first token, and the rate of the tokens after it."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first = self.last = 0.0
        self.tokens = 0

    def count(self) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += 1

    @property
    def a_second(self) -> float | None:
        """Tokens per second after the first token; None for fewer than two tokens."""
        return (self.tokens - 1) / (self.last - self.first) if self.last > self.first else None

    def facts(self) -> dict[str, float | None]:
        return {
            "seconds_to_first_token": self.first - self.started if self.tokens else None,
            "tokens_per_second": self.a_second,
        }

    def summary(self) -> str:
        """Return the speed as text, or an empty string for fewer than two tokens."""
        if self.a_second is None:
            return ""
        return f"first token after {self.first - self.started:.2f} s, then {self.a_second:.1f} tokens per second"


@dataclass
class Written:
    """The continuation of one prompt."""

    prompt: str
    text: str = ""
    pieces: list[Piece] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.pieces.append(piece)

    @property
    def ending(self) -> str | None:
        """The reason why the text ended, or None."""
        return self.pieces[-1].ending if self.pieces else None

    def facts(self, writer: TextWriter, with_logprobs: bool) -> dict[str, Any]:
        ids = [piece.id for piece in self.pieces]
        facts: dict[str, Any] = {"prompt": self.prompt, "text": self.text, "tokens": ids, "ending": self.ending}
        if with_logprobs:
            facts["logprobs"] = [
                {
                    **_priced(writer, piece.id, piece.logprob),
                    "likely": [_priced(writer, number, logprob) for number, logprob in piece.likely],
                }
                for piece in self.pieces
            ]
        return facts

    def probabilities(self, writer: TextWriter) -> list[str]:
        """Return one line per token: its log probability, its text, and the most likely tokens at its position."""
        lines = []
        for piece in self.pieces:
            others = "  ".join(f"{writer.tokenizer.token(i)!r} {logprob:.4f}" for i, logprob in piece.likely)
            lines.append(f"{piece.logprob:9.4f}  {writer.tokenizer.token(piece.id)!r:20} {others}".rstrip())
        return lines

    def reason(self, writer: TextWriter) -> str:
        """Return the reason why generation stopped, as a sentence."""
        tokens = counted(len(self.pieces), "token")
        if self.ending == "context":
            return f"stopped after {tokens}: the model's context is full"
        if self.ending == "count":
            return f"stopped after {tokens}: the limit of --tokens"
        if self.ending == "stop":
            return f"stopped after {tokens}: --stop appeared"
        text = f"stopped after {tokens}: the model ended the text"
        if self.text.strip() or writer.template is None:
            return text
        marks = f", which adds {', '.join(writer.marks)}" if writer.marks else ""
        return f"{text} at once. It is a chat model: --chat puts the prompt into its chat template{marks}"


def _priced(writer: TextWriter, number: int, logprob: float | None) -> dict[str, Any]:
    return {"token": number, "text": writer.tokenizer.token(number), "logprob": logprob}
