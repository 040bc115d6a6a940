"""Attention in one pass over the keys, with a running maximum and sum of the softmax (Dao et al. 2022).

    out[b, h, i] = sum_j p_j v[b, h // r, j]
    p = softmax over j of softcap(scale q[b, h, i] · k[b, h // r, j]) + biases

A task computes some queries of all heads that share keys. It processes the keys block by block: it packs a block of
keys (transposed) and values, and computes attention of every group of its queries to the block while the block is in
the CPU cache. For each query it stores three values: the maximum m of its scores so far, the sum l of exp(score - m),
and the sum of the weighted values.

Keys are divided into spans of `SPAN` positions that begin at multiples of `SPAN`. The three values restart with each
span, and are then merged with the result of the previous spans (`merging`). This is the same in every attention kernel,
since in a step each thread takes whole spans. If there is only one span, nothing is merged.

A row's bits depend only on its own query, and on the keys in spans and blocks that begin at multiples of `SPAN` and
`BLOCK`. A masked key adds exactly 0 to the sums. A block or span without a visible key changes nothing, so it may be
skipped. Queries in a tile do not affect each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from treadle.backends.tvm.kernels.attention.attention_masks import WRITERS
from treadle.backends.tvm.kernels.attention.attention_writer import AttentionWriter
from treadle.backends.tvm.kernels.attention.pair_attention_writer import PairAttentionWriter, multiplies_pairs
from treadle.backends.tvm.kernels.kernel import Kernel

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter


@dataclass(frozen=True)
class FlashAttention(Kernel):
    """Attention of any number of queries to any number of keys.

    d, e      the width of queries and keys, and of values
    scale     factor of the scores
    softcap   c: scores become c tanh(scores / c)
    padded    number of operands with the number of a row's valid keys
    terms     the other masks and biases: codes of `attention_masks.WRITERS`
    operands  dtype of q, k and v: f32, or bf16 for float32 sums of products of bf16 numbers

    Arguments: q, k, v; the lengths; the terms' operands; out, and the parts of `Scratch`. Then b, g, r (query heads
    that share keys), s, t; the smallest and largest j - i that a query sees; the largest number of queries of a head in
    a task, a multiple of GROUP; the number of slots, each with its own `Scratch`; the strides of q, k, v and out over
    batch, head and position; the strides of the terms.
    """

    d: int
    e: int
    scale: float
    softcap: float | None = None
    padded: int = 0
    terms: tuple[str, ...] = ()
    operands: str = "f32"

    @property
    def title(self) -> str:
        more = [WRITERS[code].kind for code in self.terms]
        more += [self.operands] if self.operands != "f32" else []
        return "_".join(["attention", str(self.d), *["padding"] * self.padded, *more])

    @property
    def multiplies(self) -> str:
        return self.operands

    def emit(self, k: Emitter) -> None:
        (PairAttentionWriter if multiplies_pairs(self.d, self.operands, k.isa) else AttentionWriter)(self, k).write()
