"""Fill masks: predict the masked tokens of a text.

filler = MaskFiller.open(Program("folder"))
filler.fill(["The capital of France is [MASK]."])[0].masks[0][0].token
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.frontends.text import EncodedText
from treadle.ir.errors import UsageError
from treadle.program.program import Program
from treadle.tasks.classifying import Progress
from treadle.tasks.heads import HEADS
from treadle.tasks.opening import OpenedModel, outputs_decide
from treadle.tasks.scoring import softmax

Array = np.ndarray[Any, Any]

HEAD = HEADS["fill"]


_GAP = re.compile(r"<mask>|\[mask\]|_{2,}|\.{3,}|\*{2,}", re.IGNORECASE)
_SHORT = 100
_TRAINED = "a model that `treadle train --objective masked-token --vocab 8000` has trained"


@dataclass(frozen=True)
class Filling:
    """A predicted token for a mask.

    token  the token as a string
    id     the token's id in the vocabulary
    score  the token's probability
    text   the whole text with this token in place of the mask; other masks are unchanged
    """

    token: str
    id: int
    score: float
    text: str


@dataclass(frozen=True)
class Filled:
    """The masks of a text, in order. For each mask, the most likely tokens, best first."""

    masks: tuple[tuple[Filling, ...], ...]

    @property
    def best(self) -> Filling:
        """The most likely token for the first mask."""
        return self.masks[0][0]


@dataclass(frozen=True)
class MaskFiller:
    """A masked language model.

    mask  the mask token, as a string
    """

    opened: OpenedModel
    mask: str

    @classmethod
    def open(cls, program: Program) -> MaskFiller:
        """Open a model. Raises as `OpenedModel.open` does, CheckpointError if the vocabulary has no mask token, and
        UsageError if a declaration's logits are not of all tokens.
        """
        opened = OpenedModel.open(program, HEAD, ["logits[:, asked]"])
        is_declared = outputs_decide(program.source)
        mask = opened.tokenizer.need_mask(lambda: _TRAINED if is_declared else "a folder with a mask token")
        classes, tokens = opened.model.outputs[0].type.shape[-1].constant, opened.tokenizer.size
        if is_declared and classes is not None and classes < tokens:
            raise UsageError(
                f"{opened.name} has no head to {HEAD.does}",
                received=f"logits of {classes:,} classes, a vocabulary of {tokens:,} tokens",
                hint=_TRAINED,
            )
        return cls(opened, mask)

    def _masked(self, text: str) -> str:
        """Return a short text with the mask token in place of another model's, or of a gap, or at its end."""
        if len(text) > _SHORT:
            return f"{self.mask} in place of a word; a long text is truncated"
        masked = _GAP.sub(lambda _: self.mask, text)
        return masked if masked != text else f"{text} {self.mask}".strip()

    def fill(
        self,
        texts: Sequence[str],
        *,
        top: int = 5,
        among: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> list[Filled]:
        """Return the most likely tokens for each mask of each text.

        top    number of tokens per mask
        among  consider only these tokens; their probabilities are still over the whole vocabulary

        Raises UsageError if the list is empty, if a text has no mask, or if a token of `among` is not in the
        vocabulary.
        """
        if not texts:
            raise UsageError("there is no text to fill")
        if top < 1:
            raise UsageError("top must be 1 or more", received=repr(top))
        encoded = [whole for (whole,) in self.opened.tokenizer.encode(texts)]
        number = self.opened.tokenizer.id_of(self.mask)
        for text, each in zip(texts, encoded, strict=True):
            if number not in each.ids:
                raise UsageError(f"a text has no {self.mask}", received=text[:200], hint=self._masked(text))
        # a model may have more ids than its tokenizer has tokens
        ids = self.opened.tokenizer.vocabulary().values() if among is None else self._ids(among)
        allowed = np.array(sorted(ids))
        found: dict[int, Filled] = {}
        places = [[i for i, each in enumerate(text.ids) if each == number] for text in encoded]
        for row, logits in self.opened.run(encoded, asked=places):
            found[row] = self._filled(encoded[row], places[row], logits, top, allowed)
            if progress is not None:
                progress(len(found))
        return [found[row] for row in range(len(texts))]

    def _ids(self, names: Sequence[str]) -> list[int]:
        ids = {name: self.opened.tokenizer.id_of(name) for name in names}
        unknown = [name for name, number in ids.items() if number is None]
        if unknown or not ids:
            received = unknown[0] if unknown else "no name"
            raise UsageError("`among` must be tokens of the vocabulary", received=received)
        return [number for number in ids.values() if number is not None]

    def _filled(self, encoded: EncodedText, places: Sequence[int], logits: Array, top: int, allowed: Array) -> Filled:
        """Return the predictions for a text's masks.

        places   the positions of the masks
        logits   the logits at these positions
        allowed  ids of the tokens to consider
        """
        tokenizer = self.opened.tokenizer
        masks = []
        for place, row in zip(places, logits, strict=True):
            scores = softmax(row)
            ids = allowed[allowed < len(scores)]
            best = ids[np.argsort(-scores[ids], kind="stable")[:top]]
            fillings = []
            for number in map(int, best):
                whole = [*encoded.ids[:place], number, *encoded.ids[place + 1 :]]
                text = tokenizer.text(whole, special=len(places) > 1)
                fillings.append(Filling(tokenizer.text([number], special=True), number, float(scores[number]), text))
            masks.append(tuple(fillings))
        return Filled(tuple(masks))
