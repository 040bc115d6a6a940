"""Attention in a narrower dtype: queries, keys and values are rounded, while scores and sums keep their dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from treadle.ir.builder import Builder
from treadle.ir.graph import Value
from treadle.ir.ops.attention import Attention
from treadle.ir.types import DType, bf16, f32
from treadle.passes.cleanup.common_subexpressions import CommonSubexpressions
from treadle.passes.framework.facts import BEFORE_LOWERING, FULL_PRECISION, Facts
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.rewriting import Rewriting, Site, SiteRewrite


@dataclass(frozen=True)
class NarrowAttention(SiteRewrite[Site]):
    """attention(q, k, v, ...)   -->   attention(cast(q, to=bf16), cast(k, to=bf16), cast(v, to=bf16), ..., to=f32)

    Scores, biases, the softmax and sums stay float32. A CPU that multiplies pairs also rounds probabilities before it
    multiplies values with them. Attention over a cache is unchanged: it reads keys and values in the cache's dtype.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING
    ends: ClassVar[Facts] = frozenset({FULL_PRECISION})

    tidying: ClassVar[Pass | None] = CommonSubexpressions()
    dtype: DType = bf16

    def sites(self, work: Rewriting) -> Iterator[Site]:
        for node in work.walk():
            if isinstance(node.op, Attention) and node.op.to is None and node.result.type.dtype is f32:
                yield Site(node)

    def build(self, b: Builder, site: Site) -> Sequence[Value]:
        node = site.root
        operands: list[Any] = [
            v if v is None or n >= 3 else b.cast(b.expr(v), to=self.dtype) for n, v in enumerate(node.operands)
        ]
        op = dataclasses.replace(node.op, to=node.result.type.dtype)  # type: ignore[type-var]
        return b.emit(op, [getattr(v, "value", v) for v in operands]).results
