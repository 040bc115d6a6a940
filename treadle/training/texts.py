"""Batches of texts: blocks of tokens, their targets, and the order of blocks.

    blocks = blocks_of(documents, 128, end=tokenizer.id_of("<|endoftext|>"))    # i64[N, 128]
    for tokens in BlockBatches(blocks, 8, seed=0).after(step):                  # i64[8, 128], epoch after epoch
        targets = next_token_targets(tokens)

Positions with the target -100 do not count in the loss, as in PyTorch's cross-entropy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count

import numpy as np
import numpy.typing as npt

from treadle.ir.errors import Hint, UsageError
from treadle.ir.ops.losses import IGNORED
from treadle.reporting.counts import counted

Tokens = npt.NDArray[np.int64]

NOT_COUNTED = IGNORED
"""The target of a position that does not count in the loss."""

MASKED = 0.8
"""Fraction of the chosen positions that are masked."""
REPLACED = 0.1
"""Fraction of the chosen positions that get a random token. The other chosen positions are unchanged."""

_SHORTER = Hint("more text, or shorter blocks", "more text, a smaller --length, or a smaller --holdout")


def _or_more_text(python: str, command: str) -> Hint:
    return Hint(f"{python}, or more text", f"{command}, or more text")


def blocks_of(token_ids: Sequence[Sequence[int]], length: int, *, end: int | None) -> Tokens:
    """Join documents and split them into blocks [N, length].

    end  the token to insert between two documents, unless the first already ends with it; None: no token is inserted

    The incomplete block at the end is dropped. Raises UsageError if there is no complete block.
    """
    if length < 1:
        raise UsageError("a block must have 1 token or more", received=f"length={length}")
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
            hint=_SHORTER if len(joined) < 2 else _or_more_text(f"length={len(joined)}", f"--length {len(joined)}"),
        )
    return joined[: whole * length].reshape(whole, length)


def next_token_targets(tokens: npt.ArrayLike, lengths: npt.ArrayLike | None = None) -> Tokens:
    """Return the next token of each position of tokens [B, S], as targets in the same shape. The last position of a row
    has the target -100.

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
    """Return inputs and targets, both [B, S], for a masked language model (Devlin et al. 2019, section 3.1).

    Each token that is not special is chosen with probability `rate`. Of the chosen tokens, 80 % become the mask, 10 % a
    random token, and 10 % are unchanged. The chosen tokens are the targets; all other targets are -100. If no token of
    a row was chosen and the row has a token that is not special, one is chosen.

    vocab    number of tokens from which a random one is drawn
    special  tokens that are never chosen: special tokens around texts, and padding

    Raises UsageError unless 0 < rate <= 1.
    """
    if not 0 < rate <= 1:
        raise UsageError("the rate of masked tokens must be above 0 and at most 1", received=f"rate={rate}")
    ids = np.asarray(tokens, np.int64)
    open_to = ~np.isin(ids, list(special))
    drawn = np.where(open_to, rng.random(ids.shape), 2.0)  # 2.0 is above every rate, so special tokens are never chosen
    chosen = drawn < rate
    least = drawn == drawn.min(axis=1, keepdims=True)
    chosen |= open_to & least & ~chosen.any(axis=1, keepdims=True)
    kind, others = rng.random(ids.shape), rng.integers(0, vocab, ids.shape)
    inputs = np.where(chosen & (kind < MASKED), mask, ids)
    inputs = np.where(chosen & (kind >= MASKED) & (kind < MASKED + REPLACED), others, inputs)
    return inputs, np.where(chosen, ids, NOT_COUNTED)


@dataclass(frozen=True)
class BlockBatches:
    """Batches of `rows` blocks, shuffled in each epoch. The incomplete batch at the end of an epoch is dropped.

    The order depends only on the seed and the epoch, so a run that resumes at any step gets the same batches.

    blocks  [N, S]

    Raises UsageError if there are fewer blocks than `rows`.
    """

    blocks: Tokens
    rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= len(self.blocks):
            raise UsageError(
                f"a batch of {counted(self.rows, 'row')} cannot be formed from {counted(len(self.blocks), 'block')}",
                hint=_or_more_text(f"rows={most}", f"--batch {most}") if (most := len(self.blocks)) else _SHORTER,
            )

    @property
    def epoch(self) -> int:
        """Number of batches in an epoch."""
        return len(self.blocks) // self.rows

    def after(self, steps: int = 0) -> Iterator[Tokens]:
        """Yield the batches [rows, S] after the first `steps` batches, endlessly."""
        first, done = divmod(steps, self.epoch)
        return chain.from_iterable(self._of(epoch, done if epoch == first else 0) for epoch in count(first))

    def _of(self, epoch: int, done: int) -> Iterator[Tokens]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.blocks))
        for at in range(done, self.epoch):
            yield self.blocks[order[at * self.rows : (at + 1) * self.rows]]
