"""Texts as batches: blocks of tokens, what is to be foretold in them, and in which order they come.

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
"""The target of a place that is not to be foretold."""

MASKED = 0.8
"""The part of the chosen places that get the mask."""
REPLACED = 0.1
"""The part of them that get a drawn token; the others keep their own."""


def blocks_of(token_ids: Sequence[Sequence[int]], length: int, *, end: int | None) -> Tokens:
    """Documents, joined and cut into blocks [N, length].

    end  the token that stands between two documents, unless the first ends with it already; None: nothing does

    What is left over at the end is dropped. Raises UsageError where that is all.
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
    """What follows each of the tokens [B, S], in the same shape; nothing counted at the last place of a row.

    lengths  [B], how many tokens of each row are real
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
    """Inputs and targets [B, S] of a masked language model (Devlin et al. 2019, section 3.1).

    Each token that is not special is chosen with the probability `rate`. Of the chosen, 8 of 10 become the mask, 1 of
    10 a drawn token, and 1 of 10 stays as it is; these alone are targets. A row where none was chosen gets one, if it
    has any that is not special.

    vocab    from how many tokens one is drawn
    special  tokens that are never chosen: those around texts, and padding

    Raises UsageError for a rate that is no probability above 0.
    """
    if not 0 < rate <= 1:
        raise UsageError("the part of the tokens that is masked lies above 0 and up to 1", received=f"rate={rate}")
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
    """Blocks in batches of `rows`, in another order each epoch; what is left over of an epoch is dropped.

    The order is a function of the seed and the epoch, so that a run which goes on at any step sees what it would have.

    blocks  [N, S]

    Raises UsageError for fewer blocks than a batch has rows.
    """

    blocks: Tokens
    rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= len(self.blocks):
            raise UsageError(
                f"a batch of {counted(self.rows, 'row')} cannot be made of {counted(len(self.blocks), 'block')}",
                hint="smaller batches, more text, or shorter blocks",
            )

    @property
    def epoch(self) -> int:
        """How many batches an epoch has."""
        return len(self.blocks) // self.rows

    def after(self, steps: int = 0) -> Iterator[Tokens]:
        """The batches [rows, S] that follow the first `steps`, without end."""
        first, done = divmod(steps, self.epoch)
        return chain.from_iterable(self._of(epoch, done if epoch == first else 0) for epoch in count(first))

    def _of(self, epoch: int, done: int) -> Iterator[Tokens]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.blocks))
        for at in range(done, self.epoch):
            yield self.blocks[order[at * self.rows : (at + 1) * self.rows]]
