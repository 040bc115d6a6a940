"""Batches of texts: blocks of tokens, their targets, and the order of blocks.

    blocks = blocks_of(documents, 128, end=tokenizer.id_of("<|endoftext|>"))    # i64[N, 128]
    for tokens in BlockBatches(blocks, 8, seed=0).after(step):                  # i64[8, 128], epoch after epoch
        targets = next_token_targets(tokens)

A target of -100 is not counted, as in PyTorch's cross-entropy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count

import numpy as np
import numpy.typing as npt

from treadle.ir.errors import UsageError
from treadle.ir.ops.losses import IGNORED
from treadle.reporting.counts import counted

Tokens = npt.NDArray[np.int64]

NOT_COUNTED = IGNORED
"""The target of a position that is not predicted."""

MASKED = 0.8
"""Fraction of the chosen positions that are masked."""
REPLACED = 0.1
"""Fraction of them that get a random token; the others are unchanged."""


def blocks_of(token_ids: Sequence[Sequence[int]], length: int, *, end: int | None) -> Tokens:
    """Join documents and split them into blocks [N, length].

    end  the token between two documents, unless the first one ends with it already; None: no token

    The incomplete block at the end is dropped. Raises UsageError if there is no other block.
    """
    if length < 1:
        raise UsageError("a block has 1 token or more", received=f"length={length}")
    parts: list[Tokens] = []
    for number, document in enumerate(token_ids):
        ids = np.asarray(document, np.int64)
        parts.append(ids)
        if end is not None and number + 1 < len(token_ids) and (not len(ids) or ids[-1] != end):
            parts.append(np.array([end], np.int64))
    joined = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    whole = len(joined) // length
    if not whole:
        raise UsageError(
            f"the texts are too short for a block of {counted(length, 'token')}",
            received=f"{counted(len(joined), 'token')} in {counted(len(token_ids), 'document')}",
            hint="more text, or shorter blocks",
        )
    return joined[: whole * length].reshape(whole, length)


def next_token_targets(tokens: npt.ArrayLike, lengths: npt.ArrayLike | None = None) -> Tokens:
    """Return the next token for each of the tokens [B, S], in the same shape; the last position of a row is not
    counted.

    lengths  [B], number of tokens of each row without padding
    """
    ids = np.asarray(tokens, np.int64)
    targets = np.full_like(ids, NOT_COUNTED)
    targets[:, :-1] = ids[:, 1:]
    if lengths is not None:
        ends = np.asarray(lengths, np.int64)[:, None] - 1
        targets[np.arange(ids.shape[1]) >= ends] = NOT_COUNTED
    return targets


def mask_tokens(
    tokens: npt.ArrayLike,
    rng: np.random.Generator,
    *,
    mask: int,
    vocab: int,
    special: Collection[int],
    rate: float = 0.15,
) -> tuple[Tokens, Tokens]:
    """Return inputs and targets [B, S] of a masked language model (Devlin et al. 2019, section 3.1).

    Each token that is not special is chosen with the probability `rate`. Of the chosen tokens, 8 of 10 become the mask,
    1 of 10 a random token, and 1 of 10 is unchanged; only these are targets. If no token of a row was chosen, one is
    chosen, if the row has any that is not special.

    vocab    number of tokens from which a random one is drawn
    special  tokens that are never chosen: special tokens around texts, and padding

    Raises UsageError for a rate that is not a probability above 0.
    """
    if not 0 < rate <= 1:
        raise UsageError("the rate of masked tokens must be above 0 and at most 1", received=f"rate={rate}")
    ids = np.asarray(tokens, np.int64)
    open_to = ~np.isin(ids, list(special))
    drawn = np.where(open_to, rng.random(ids.shape), 2.0)  # above every rate: never chosen
    chosen = drawn < rate
    least = drawn == drawn.min(axis=1, keepdims=True)
    chosen |= open_to & least & ~chosen.any(axis=1, keepdims=True)
    kind, others = rng.random(ids.shape), rng.integers(0, vocab, ids.shape)
    inputs = np.where(chosen & (kind < MASKED), mask, ids)
    inputs = np.where(chosen & (kind >= MASKED) & (kind < MASKED + REPLACED), others, inputs)
    return inputs, np.where(chosen, ids, NOT_COUNTED)


@dataclass(frozen=True)
class BlockBatches:
    """Batches of `rows` blocks, in another order each epoch; the incomplete batch at the end of an epoch is dropped.

    The order is a function of the seed and the epoch, so that a run which resumes at any step gets the same batches.

    blocks  [N, S]

    Raises UsageError for fewer blocks than a batch has rows.
    """

    blocks: Tokens
    rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= len(self.blocks):
            raise UsageError(
                f"a batch of {counted(self.rows, 'row')} cannot be formed from {counted(len(self.blocks), 'block')}",
                hint="smaller batches, more text, or shorter blocks",
            )

    @property
    def epoch(self) -> int:
        """Number of batches in an epoch."""
        return len(self.blocks) // self.rows

    def after(self, steps: int = 0) -> Iterator[Tokens]:
        """Yield the batches [rows, S] that follow the first `steps`, without end."""
        first, done = divmod(steps, self.epoch)
        return chain.from_iterable(self._of(epoch, done if epoch == first else 0) for epoch in count(first))

    def _of(self, epoch: int, done: int) -> Iterator[Tokens]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.blocks))
        for at in range(done, self.epoch):
            yield self.blocks[order[at * self.rows : (at + 1) * self.rows]]
