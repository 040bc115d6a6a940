"""Rewrite texts with an encoder-decoder model: translate and summarize (T5, BART, Marian).

    rewriter = TextRewriter.open(Program("folder"))
    rewriter.rewrite(["translate English to German: The house is small."])[0].text

The folder's settings determine the beam search or greedy decoding (`treadle.tasks.generation_settings`). The prefix of
a task, such as T5's "summarize: ", is in config.json's task_specific_params.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import CheckpointError, Hint, UsageError
from treadle.program.program import Program
from treadle.runtime.beams import Beams, beam_search
from treadle.runtime.generation import generate
from treadle.stepped import SteppedModel, stepped_program
from treadle.tasks.batching import batches_by_length
from treadle.tasks.classifying import Progress
from treadle.tasks.fitted_tokenizers import fit_tokenizer
from treadle.tasks.generation_settings import GenerationSettings
from treadle.tasks.heads import HEADS
from treadle.tasks.opening import checked_folder

HEAD = HEADS["translate"]
_ROWS = 8
_MOST = 128
"""Default maximum number of generated tokens per text."""


@dataclass(frozen=True)
class Rewritten:
    """A rewritten text.

    text    the text without special tokens
    tokens  the generated ids, including the end token
    ending  the reason why the text ends: "end", "count" or "context"
    cut     True if the source text was too long for the model and was truncated
    """

    text: str
    tokens: tuple[int, ...]
    ending: str
    cut: bool


@dataclass(frozen=True)
class TextRewriter:
    """An encoder-decoder model with its tokenizer."""

    model: SteppedModel
    tokenizer: TextTokenizer
    place: ModelFolder
    config: Mapping[str, Any]

    @classmethod
    def open(cls, program: Program) -> TextRewriter:
        """Open a model. Raises UsageError if the folder's class is not such a model, CheckpointError for a damaged
        file, and the errors of `compile`.
        """
        place, config = checked_folder(program, HEAD)
        made = stepped_program(program)
        if made.derived.prologue != ("tokens",):
            raise UsageError(
                f"{made.name} is not an encoder-decoder model of tokens, and does not rewrite texts",
                received=f"inputs of a row: {', '.join(made.derived.prologue) or 'none'}",
                hint="an encoder-decoder model such as T5, BART or Marian",
            )
        symbol = next(iter(made.derived.memories), None)
        context = None if symbol is None else made.derived.graph.symbols[symbol].upper
        prologue = made.derived.graph.functions["prologue"]
        tokenizer = fit_tokenizer(program.source.tokenizer(context=context), program.source, prologue)
        return cls(made, tokenizer, place, config)

    def translate(
        self,
        texts: Sequence[str],
        *,
        source: str | None = None,
        target: str | None = None,
        most: int | None = None,
        beams: Beams | None = None,
        progress: Progress | None = None,
    ) -> list[Rewritten]:
        """Translate texts.

        source, target  languages such as "en" and "de", for a model that translates between several languages

        Raises UsageError if the model needs the languages, or does not know one of them; and as `rewrite` does.
        """
        known = [name for name in self._tasks if name.startswith("translation_")]
        name = f"translation_{source}_to_{target}"
        if name not in known and (known or source is not None or target is not None):
            pairs = ", ".join(name.removeprefix("translation_").replace("_to_", " to ") for name in known)
            raise UsageError(
                f"{self.model.name} translates {pairs or 'between two languages, which need not be said'}",
                received=f"{source or 'no language'} to {target or 'no language'}",
                hint=None if known else Hint("leave source= and target= out", "leave --from and --to out"),
            )
        return self.rewrite(texts, task=name if known else None, most=most, beams=beams, progress=progress)

    def summarize(
        self,
        texts: Sequence[str],
        *,
        most: int | None = None,
        beams: Beams | None = None,
        progress: Progress | None = None,
    ) -> list[Rewritten]:
        """Summarize texts. Raises as `rewrite` does."""
        task = "summarization" if "summarization" in self._tasks else None
        return self.rewrite(texts, task=task, most=most, beams=beams, progress=progress)

    def rewrite(
        self,
        texts: Sequence[str],
        *,
        task: str | None = None,
        most: int | None = None,
        beams: Beams | None = None,
        progress: Progress | None = None,
    ) -> list[Rewritten]:
        """Rewrite texts.

        task   apply the settings of this task in config.json's task_specific_params, and add its prefix to each text
        most   maximum number of generated tokens; None: the folder's setting
        beams  settings of the beam search; None: the folder's settings

        Raises UsageError if the list is empty or a text is empty, and CheckpointError if the folder does not name the
        decoder's first token.
        """
        if not texts or not all(text.strip() for text in texts):
            raise UsageError("there is no text to rewrite")
        said = self._tasks.get(task or "", {})
        settings = GenerationSettings.read(self.place, self.config, said)
        if settings.start is None:
            raise CheckpointError(
                "the folder does not name the decoder's start token",
                within=self.place.shown,
                hint="decoder_start_token_id in config.json",
            )
        prefix = said.get("prefix", self.config.get("prefix"))
        batch = self.tokenizer.batch([(prefix if isinstance(prefix, str) else "") + text for text in texts])
        sources = [ids[:length] for ids, length in zip(batch.ids, batch.lengths, strict=True)]
        chosen = beams or settings.beams
        count = _most_tokens(most, settings, self.model)
        rules = replace(
            settings.rules,
            fewest=min(settings.rules.fewest, count),
            shortest=min(settings.rules.shortest, 1 + count),
        )
        found: dict[int, Rewritten] = {}
        for numbers in batches_by_length([len(source) for source in sources], _ROWS):
            given = [{"tokens": sources[number]} for number in numbers]
            width = 1 if chosen is None else chosen.count
            session = self.model.session(
                rows=max(width, min(_ROWS, width * len(numbers))),
                capacity=self._capacity(count),
                memory=self._memory(given),
            )
            prompts = [[settings.start]] * len(numbers)
            if chosen is not None:
                searched = beam_search(
                    session, prompts, most=count, beams=chosen, rules=rules, stop=settings.end, inputs=given
                )
                made = [(best.tokens, str(best.ending)) for best, *_ in searched]
            else:
                rows: list[list[int]] = [[] for _ in numbers]
                endings = [""] * len(numbers)
                for token in generate(session, prompts, most=count, rules=rules, stop=settings.end, inputs=given):
                    rows[token.row].append(token.id)
                    endings[token.row] = str(token.ending)
                made = [(tuple(row), ending) for row, ending in zip(rows, endings, strict=True)]
            for number, (tokens, ending) in zip(numbers, made, strict=True):
                found[number] = Rewritten(self.tokenizer.text(tokens), tokens, ending, bool(batch.cut[number]))
            if progress is not None:
                progress(len(found))
        return [found[number] for number in range(len(texts))]

    @property
    def _tasks(self) -> Mapping[str, Mapping[str, Any]]:
        """The settings of each task in config.json, by the task's name."""
        found = self.config.get("task_specific_params")
        if not isinstance(found, Mapping):
            return {}
        return {name: said for name, said in found.items() if isinstance(said, Mapping)}

    def _capacity(self, count: int) -> int:
        context = self.model.derived.context
        return 1 + count if context is None else min(1 + count, context)

    def _memory(self, given: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        longest = max(len(each["tokens"]) for each in given)
        return dict.fromkeys(self.model.derived.memories.values(), longest)


def _most_tokens(most: int | None, settings: GenerationSettings, model: SteppedModel) -> int:
    if most is not None and most < 1:
        raise UsageError("a text must have 1 token or more", received=repr(most))
    context = model.derived.context
    if most is not None and context is not None and most > context:
        raise UsageError(
            f"{model.name} has {context:,} positions",
            received=f"{most:,} tokens",
            hint=Hint(f"most={context}", f"--tokens {context}"),
        )
    wanted = most or settings.most or _MOST
    return wanted if context is None else min(wanted, context)
