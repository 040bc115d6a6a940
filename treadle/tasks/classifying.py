"""Classify texts, or pairs of texts, with one label for the whole input: sentiment, topic, entailment.

classifier = TextClassifier.open(Program("folder"))
classifier.classify(["I like it.", ("A man sleeps.", "A man is awake.")])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from treadle.ir.errors import UsageError
from treadle.program.program import Program
from treadle.tasks.heads import HEADS
from treadle.tasks.opening import OpenedModel, read_labels
from treadle.tasks.scoring import Scored, best_first, label_scores

Text = str | tuple[str, str]
Texts = Text | list[Text] | list[str] | list[tuple[str, str]]
Progress = Callable[[int], None]
"""A function that is called with the number of finished inputs."""

HEAD = HEADS["classify"]


@dataclass(frozen=True)
class Classified:
    """The labels of a text.

    scores  all labels with their scores, best first
    tokens  number of tokens of the text after truncation, including special tokens
    cut     True if the text was too long and was truncated
    """

    scores: tuple[Scored, ...]
    tokens: int
    cut: bool

    @property
    def label(self) -> str:
        """The best label."""
        return self.scores[0].label

    @property
    def score(self) -> float:
        """The score of the best label."""
        return self.scores[0].score


@dataclass(frozen=True)
class TextClassifier:
    """A model that classifies texts."""

    opened: OpenedModel
    labels: tuple[str, ...]

    @classmethod
    def open(cls, program: Program) -> TextClassifier:
        """Open a model. Raises as `OpenedModel.open` does."""
        opened = OpenedModel.open(program, HEAD)
        return cls(opened, read_labels(opened.config, opened.model))

    def classify(self, texts: Sequence[Text], *, progress: Progress | None = None) -> list[Classified]:
        """Return the labels of each text, or of each pair of texts. Raises UsageError if the list is empty, and for a
        text without tokens.
        """
        if not texts:
            raise UsageError("there is no text to classify")
        encoded = [whole for (whole,) in self.opened.tokenizer.encode(texts)]
        found: dict[int, Classified] = {}
        for number, logits in self.opened.run(encoded):
            scores = best_first(label_scores(logits, self.opened.config), self.labels)
            found[number] = Classified(scores, len(encoded[number]), encoded[number].cut)
            if progress is not None:
                progress(len(found))
        return [found[number] for number in range(len(texts))]
