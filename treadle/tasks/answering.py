"""Answer a question by a span of a text (Devlin et al. 2019, section 4.2).

    reader = QuestionAnswerer.open(Program("folder"))
    (best,) = reader.answer([("Where did Ada live?", "Ada lived in London.")])[0]
    best.text, best.start, best.end

If a text is too long for the model, it is read in overlapping windows. The score of a span is the probability of its
first token times the probability of its last token. These probabilities are a softmax over the tokens of the text in
the window and the window's first token, which stands for "no answer". Hugging Face's pipeline does the same
(transformers 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.frontends.text import EncodedText
from treadle.ir.errors import UsageError
from treadle.program.program import Program
from treadle.tasks.classifying import Progress
from treadle.tasks.heads import HEADS
from treadle.tasks.opening import OpenedModel
from treadle.tasks.scoring import softmax

Array = np.ndarray[Any, Any]

HEAD = HEADS["answer"]
WINDOW, OVERLAP = 384, 128
"""Number of tokens of a window, including the question, and number of tokens that two consecutive windows share."""


@dataclass(frozen=True)
class Answer:
    """A span of the text.

    text        the span, from the start of its first word to the end of its last word
    score       the probability of the span
    start, end  offsets of the span in the text, in characters
    """

    text: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class QuestionAnswerer:
    """A model that predicts the start and end of an answer."""

    opened: OpenedModel

    @classmethod
    def open(cls, program: Program) -> QuestionAnswerer:
        """Open a model. Raises as `OpenedModel.open` does, and UsageError if the head does not have two outputs."""
        opened = OpenedModel.open(program, HEAD)
        (logits,) = (port for port in opened.model.outputs if port.name == "logits")
        if logits.type.shape[-1].constant != 2:
            raise UsageError(
                "a question-answering head must have 2 labels, start and end",
                received=f"{logits.type.shape[-1]} labels",
            )
        return cls(opened)

    def answer(
        self,
        asked: Sequence[tuple[str, str]],
        *,
        top: int = 1,
        longest: int = 15,
        progress: Progress | None = None,
    ) -> list[list[Answer]]:
        """Return the best answers for each (question, text) pair, best first.

        top      number of answers, at different positions
        longest  maximum number of tokens of an answer

        Raises UsageError if there is no question, if a question or a text is empty, or if the question leaves no room
        for the text.
        """
        if not asked or not all(question.strip() and text.strip() for question, text in asked):
            raise UsageError("a question needs a text that may contain the answer")
        if top < 1 or longest < 1:
            raise UsageError("top and longest must be 1 or more", received=f"top={top}, longest={longest}")
        windows: list[EncodedText] = []
        owner: list[int] = []
        for number, pair in enumerate(asked):
            (found,) = self._windows(pair)
            windows += found
            owner += [number] * len(found)
        answers: list[dict[tuple[int, int], Answer]] = [{} for _ in asked]
        for done, (number, logits) in enumerate(self.opened.run(windows), 1):
            known = answers[owner[number]]
            for each in _best_spans(asked[owner[number]][1], windows[number], logits, top, longest):
                held = known.get((each.start, each.end))
                if held is None or held.score < each.score:
                    known[each.start, each.end] = each
            if progress is not None:
                progress(done)
        return [sorted(found.values(), key=lambda each: (-each.score, each.start))[:top] for found in answers]

    def _windows(self, pair: tuple[str, str]) -> list[list[EncodedText]]:
        tokenizer = self.opened.tokenizer
        most = WINDOW if tokenizer.max_tokens is None else min(WINDOW, tokenizer.max_tokens)
        ((question,),) = tokenizer.encode([pair[0]])
        room = most - len(question) - 2  # a pair has two more special tokens than a single text
        if room < 1:
            raise UsageError(
                f"the question leaves no room for the text in the {most} tokens that the model supports",
                received=f"{len(question)} tokens",
                hint="a shorter question",
            )
        return tokenizer.encode([pair], windows=(most, min(OVERLAP, most // 2, room - 1)))


def _best_spans(text: str, window: EncodedText, logits: Array, top: int, longest: int) -> list[Answer]:
    """Return the best spans of a window, best first. `logits` [S, 2] are the logits of the start and the end of an
    answer.
    """
    of_text = np.array([part == 1 for part in window.parts])
    if not of_text.any():
        return []
    known = of_text.copy()
    known[0] |= window.parts[0] is None  # the first token stands for "no answer"
    start, end = (np.where(of_text, softmax(np.where(known, logits[:, i], -np.inf)), 0) for i in (0, 1))
    scores = np.triu(np.outer(start, end))
    scores = np.tril(scores, longest - 1)
    found: list[Answer] = []
    seen: set[tuple[int, int]] = set()
    for flat in np.argsort(-scores, axis=None, kind="stable"):
        first, last = divmod(int(flat), len(window))
        if len(found) == top or scores[first, last] <= 0:
            break
        place = _word_bounds(window, first)[0], _word_bounds(window, last)[1]
        if place not in seen:
            seen.add(place)
            found.append(Answer(text[place[0] : place[1]], float(scores[first, last]), *place))
    return found


def _word_bounds(window: EncodedText, token: int) -> tuple[int, int]:
    """Return the start and end of the word that contains a token of the text, as character offsets."""
    same = [
        place
        for place, part, word in zip(window.offsets, window.parts, window.words, strict=True)
        if part == 1 and word == window.words[token]
    ]
    return same[0][0], same[-1][1]
