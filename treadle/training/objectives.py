"""Training objectives of a language model: predict the next token of a text, or predict masked tokens.

objective = MaskedToken(mask=103, vocab=30_522, special=(0, 101, 102, 103), seed=0)
objective.asked(tokens, 7)          # {"tokens": with masks, "targets": the masked tokens}, drawn for batch 7
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from treadle.training.texts import Tokens, mask_tokens, next_token_targets

NEXT_TOKEN, MASKED_TOKEN = "next-token", "masked-token"
OBJECTIVES = (NEXT_TOKEN, MASKED_TOKEN)


class Objective(Protocol):
    """Conversion of tokens to the inputs of a training step."""

    def asked(self, tokens: Tokens, *number: int) -> dict[str, Tokens]:
        """Return the inputs of a step, including `targets`, for tokens [B, S]. Random choices depend only on the seed
        and on `number`.
        """


@dataclass(frozen=True)
class NextToken:
    """Predict each token from the preceding tokens."""

    def asked(self, tokens: Tokens, *number: int) -> dict[str, Tokens]:
        """Return the tokens, and as targets the next tokens. There are no random choices."""
        return {"tokens": tokens, "targets": next_token_targets(tokens)}


@dataclass(frozen=True)
class MaskedToken:
    """Predict masked tokens from the tokens around them: see `mask_tokens`.

    mask     the mask token
    vocab    number of tokens in the vocabulary
    special  tokens that are never masked
    """

    mask: int
    vocab: int
    special: tuple[int, ...]
    seed: int = 0

    def asked(self, tokens: Tokens, *number: int) -> dict[str, Tokens]:
        """Return tokens with masks, and as targets the original tokens at the masked positions."""
        rng = np.random.default_rng([self.seed, *number])
        inputs, targets = mask_tokens(tokens, rng, mask=self.mask, vocab=self.vocab, special=self.special)
        return {"tokens": inputs, "targets": targets}
