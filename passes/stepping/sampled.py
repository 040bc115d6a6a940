"""Sampling in the entries of a step: a token for each row in place of its logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from treadle.ir.builder import Builder, Expr
from treadle.ir.ops.sampling import SampleToken
from treadle.ir.types import DType, f32, i32

SAMPLING = ("greedy", "random")
"""The ways of sampling: the greatest logit of each row, or the op `sample_token`."""

_TYPES = zip(SampleToken().operand_names(6), SampleToken.samples[0].types, strict=True)
OPTIONS = {name: type.dtype for name, type in _TYPES if type is not None and name != "x"}
"""The inputs of an entry that samples randomly, one number for each row; see the op `sample_token`."""

SAMPLED = "sampled"
"""The output of an entry that samples: the token of each row, i32[B], or -1 if its logits are not finite."""


@dataclass(frozen=True)
class TokenChooser:
    """The ops that replace the logits of an entry by tokens.

    logits     the name of the output that they replace
    is_random  True for the op `sample_token`, False for the greatest logit
    """

    logits: str
    is_random: bool

    def token(self, b: Builder, logits: Expr, option: Callable[[str, DType], Expr]) -> Expr:
        """Return the tokens i32[b] for logits [b, 1, vocab]. `option` returns an input of the entry, [b]."""
        rows = b.rearrange(logits, pattern="b 1 v -> b v").cast(f32)
        if self.is_random:
            token = b.sample_token(rows, *(option(name, dtype) for name, dtype in OPTIONS.items()))
        else:
            greatest = b.reduce_max(rows, axes=(1,))
            token = b.where(b.equal(greatest - greatest, 0), b.argmax(rows, axis=1), -1)
        return token.cast(i32)
