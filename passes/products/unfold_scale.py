"""Move scales out of weights again, so that every op reads the weight of the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from treadle.ir.builder import Builder
from treadle.passes.framework.pattern import Vocabulary
from treadle.passes.framework.rewrite import Match, Rewrite, RewriteSet


@dataclass(frozen=True)
class ScaleAfterRMSNorm(Rewrite):
    """rms_norm(x, w * c)   -->   rms_norm(x, w) * c        for a weight w and one number c"""

    def pattern(self, p: Vocabulary, x: Any, w: Any, c: Any, eps: Any) -> Any:
        return p.rms_norm(x, p.shared(w * c), eps=eps)

    def fits(self, m: Match) -> bool:
        return bool(m.w.value.kind == "parameter" and m.c.rank == 0)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.rms_norm(m.x, m.w, eps=m.eps) * m.c


@dataclass(frozen=True)
class ScaleAfterLayerNorm(Rewrite):
    """layer_norm(x, w * c, bias * c)   -->   layer_norm(x, w, bias) * c"""

    def pattern(self, p: Vocabulary, x: Any, w: Any, bias: Any, c: Any, eps: Any) -> Any:
        return p.layer_norm(x, p.shared(w * c), p.shared(bias * c), eps=eps)

    def fits(self, m: Match) -> bool:
        return bool(m.w.value.kind == m.bias.value.kind == "parameter" and m.c.rank == 0)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.layer_norm(m.x, m.w, m.bias, eps=m.eps) * m.c


@dataclass(frozen=True)
class UnfoldScale(RewriteSet):
    """The inverse of `FoldScale` for scales in weights."""

    rules: ClassVar[tuple[Rewrite, ...]] = (ScaleAfterRMSNorm(), ScaleAfterLayerNorm())
