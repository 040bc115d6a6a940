"""What a language model is trained for: the next token of a text, or those behind masks.

objective = MaskedToken(mask=103, vocab=30_522, special=(0, 101, 102, 103), seed=0)
objective.asked(tokens, 7)          # {"tokens": with masks, "targets": what they hide}, drawn for batch 7
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from treadle.training.texts import Tokens, mask_tokens, next_token_targets

NEXT_TOKEN, MASKED_TOKEN = "next-token", "masked-token"
OBJECTIVES = (NEXT_TOKEN, MASKED_TOKEN)


class Objective(Protocol):
    """Makes of tokens what a step takes."""

    def asked(self, tokens: Tokens, *number: int) -> dict[str, Tokens]:
        """Inputs and targets of tokens [B, S]; what is drawn depends on these numbers alone."""


@dataclass(frozen=True)
class NextToken:
    """Each token is foretold from those before it."""

    def asked(self, tokens: Tokens, *number: int) -> dict[str, Tokens]:
        """See `Objective`; nothing is drawn."""
        return {"tokens": tokens, "targets": next_token_targets(tokens)}


@dataclass(frozen=True)
class MaskedToken:
    """Some tokens are foretold from those around them: see `mask_tokens`.

    mask     the token that hides others
    vocab    how many tokens there are
    special  those that are never hidden
    """

    mask: int
    vocab: int
    special: tuple[int, ...]
    seed: int = 0

    def asked(self, tokens: Tokens, *number: int) -> dict[str, Tokens]:
        """See `Objective`."""
        rng = np.random.default_rng([self.seed, *number])
        inputs, targets = mask_tokens(tokens, rng, mask=self.mask, vocab=self.vocab, special=self.special)
        return {"tokens": inputs, "targets": targets}
