"""Attention in one pass over the keys, with the softmax's maximum and sum kept along (Dao et al. 2022).

    out[b, h, i] = sum_j p_j v[b, h // r, j]
    p = softmax over j of softcap(scale q[b, h, i] · k[b, h // r, j]) + biases

A task is some queries of all heads that share keys. It takes the keys block by block: packs a block of keys
(transposed) and values, and lets every group of its queries attend to it while it is in the cache. For each query
three things are kept: the maximum m of its scores so far, the sum l of exp(score - m), and that of the values.

Keys are taken in parts: the spans of `SPAN` positions, from multiples of it on. What is kept begins anew with each
span, and is merged with what came of those before (`merging`), wherever attention is computed: a step's threads take
spans one by one. Fewer keys are one part, and nothing is merged.

What a row's bits depend on: its own query, and the keys in spans and blocks that begin at multiples of `SPAN` and
`BLOCK`. A key that is masked adds exactly 0 to the sums, and a block or span without a key that is seen changes
nothing, so that it may be skipped; and a query's lanes know nothing of its neighbours in a tile.
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
    """Attention, any number of queries and keys.

    d, e      the width of queries and keys, and of values
    scale     what the products are multiplied by
    softcap   c: scores become c tanh(scores / c)
    padded    how many operands say how many of a row's keys are real
    terms     the other masks and biases: codes of `attention_masks.WRITERS`
    operands  the dtype of q, k and v: f32, or bf16 for float32 sums of products of bf16 numbers

    Passed: q, k, v; the lengths; the terms' operands; out, and the parts of `Scratch`. Then b, g, r (query heads that
    share keys), s, t; the least and greatest j - i that a query sees; how many queries of a head a task takes at
    most, a multiple of GROUP; the number of slots, each with a `Scratch` of its own; the strides of q, k, v and out
    over batch, head and position; those of the terms.
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
