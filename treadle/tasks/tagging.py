"""Tag tokens: predict a label for each token, such as the kind of a name, and join consecutive tokens to labeled spans.

    tagger = TokenTagger.open(Program("folder"))
    for span in tagger.tag(["Ada Lovelace lived in London."])[0]:
        print(span.label, span.text, span.start, span.end)

Tokens are grouped as in Hugging Face's pipeline. "none": every token is a span. "simple": adjacent tokens are joined if
their labels continue each other (B-, I-). "first", "average" and "max": the same, but one label is first chosen for all
tokens of a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.frontends.text import EncodedText
from treadle.ir.errors import UsageError
from treadle.program.program import Program
from treadle.tasks.classifying import Progress
from treadle.tasks.heads import HEADS
from treadle.tasks.opening import OpenedModel, read_labels
from treadle.tasks.scoring import softmax

Array = np.ndarray[Any, Any]

HEAD = HEADS["tag"]
GROUPINGS = ("none", "simple", "first", "average", "max")
OUTSIDE = "O"
"""The label of tokens outside any span."""


@dataclass(frozen=True)
class TaggedSpan:
    """A part of a text with a label.

    label       the label, without B- or I- if tokens were grouped
    score       the label's probability, averaged over the group
    text        the joined tokens, which may differ from the characters of the text
    start, end  offsets in the text, in characters
    """

    label: str
    score: float
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class _Piece:
    """A token of a text: its name, its label probabilities, its offsets, and True if it continues a word."""

    name: str
    scores: Array
    start: int
    end: int
    continues: bool


@dataclass(frozen=True)
class TokenTagger:
    """A model that labels tokens."""

    opened: OpenedModel
    labels: tuple[str, ...]

    @classmethod
    def open(cls, program: Program) -> TokenTagger:
        """Open a model. Raises as `OpenedModel.open` does."""
        opened = OpenedModel.open(program, HEAD)
        return cls(opened, read_labels(opened.config, opened.model))

    def tag(
        self,
        texts: Sequence[str],
        *,
        grouping: str = "simple",
        ignore: Sequence[str] = (OUTSIDE,),
        progress: Progress | None = None,
    ) -> list[list[TaggedSpan]]:
        """Return the spans of each text, in the order of the text. Spans with a label in `ignore` are left out.

        Raises UsageError if the list of texts is empty, for a text without tokens, and for an unknown grouping.
        """
        if grouping not in GROUPINGS:
            raise UsageError(f"there is no grouping {grouping!r}", hint="one of " + ", ".join(GROUPINGS))
        if not texts:
            raise UsageError("there is no text to tag")
        encoded = [whole for (whole,) in self.opened.tokenizer.encode(texts)]
        found: dict[int, list[TaggedSpan]] = {}
        for number, logits in self.opened.run(encoded):
            pieces = list(self._pieces(texts[number], encoded[number], softmax(logits)))
            spans = self._grouped(pieces, grouping)
            found[number] = [span for span in spans if span.label not in ignore]
            if progress is not None:
                progress(len(found))
        return [found[number] for number in range(len(texts))]

    def _pieces(self, text: str, encoded: EncodedText, scores: Array) -> Iterator[_Piece]:
        tokenizer = self.opened.tokenizer
        unknown = tokenizer.unknown
        for number, part, (start, end), row in zip(encoded.ids, encoded.parts, encoded.offsets, scores, strict=True):
            if part is None:
                continue
            name = tokenizer.name_of(number)
            if number == unknown:
                yield _Piece(text[start:end], row, start, end, False)
            elif tokenizer.word_prefix is not None:
                yield _Piece(name, row, start, end, len(name) != end - start)
            else:
                yield _Piece(name, row, start, end, start > 0 and " " not in text[start - 1 : start + 1])

    def _grouped(self, pieces: Sequence[_Piece], grouping: str) -> list[TaggedSpan]:
        if grouping in ("none", "simple"):
            single = [self._span([piece], piece.scores) for piece in pieces]
            return single if grouping == "none" else list(self._joined(single))
        words: list[list[_Piece]] = []
        for piece in pieces:
            if piece.continues and words:
                words[-1].append(piece)
            else:
                words.append([piece])
        spans = []
        for word in words:
            match grouping:
                case "first":
                    scores = word[0].scores
                case "max":
                    scores = max((piece.scores for piece in word), key=np.max)
                case _:
                    scores = np.mean([piece.scores for piece in word], axis=0)
            text = self.opened.tokenizer.join([piece.name for piece in word])
            spans.append(self._span(word, scores, text))
        return list(self._joined(spans))

    def _span(self, pieces: Sequence[_Piece], scores: Array, text: str | None = None) -> TaggedSpan:
        best = int(scores.argmax())
        named = pieces[0].name if text is None else text
        return TaggedSpan(self.labels[best], float(scores[best]), named, pieces[0].start, pieces[-1].end)

    def _joined(self, spans: Sequence[TaggedSpan]) -> Iterator[TaggedSpan]:
        """Join adjacent spans with the same label. A label with the prefix B- starts a new span."""
        group: list[TaggedSpan] = []
        for span in spans:
            if group and (_kind(span.label) != _kind(group[-1].label) or span.label.startswith("B-")):
                yield self._one(group)
                group = []
            group.append(span)
        if group:
            yield self._one(group)

    def _one(self, group: Sequence[TaggedSpan]) -> TaggedSpan:
        text = self.opened.tokenizer.join([span.text for span in group])
        score = float(np.mean([span.score for span in group]))
        return TaggedSpan(group[0].label.split("-", 1)[-1], score, text, group[0].start, group[-1].end)


def _kind(label: str) -> str:
    """Return a label without its B- or I- prefix."""
    return label[2:] if label.startswith(("B-", "I-")) else label
