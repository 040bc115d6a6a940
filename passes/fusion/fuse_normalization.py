"""Fusion of normalizations written in primitives: layer norm and RMS norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from treadle.ir.builder import Builder, Expr
from treadle.passes.framework.pattern import Vocabulary
from treadle.passes.framework.rewrite import Match, Refusal, Rewrite, RewriteSet


def _scaled(p: Vocabulary, x: Any, mean_square: Any) -> Any:
    """Match x / sqrt(mean_square + eps) in any of its forms."""
    shifted = mean_square + p.constant("eps")
    return p.either(
        x * p.either(p.rsqrt(shifted), p.reciprocal(p.sqrt(shifted))),
        x / p.sqrt(shifted),
    )


def _square(p: Vocabulary, x: Any) -> Any:
    return p.either(x * x, x**2)


def _shortest(number: float, x: Expr) -> float:
    """Return the shortest decimal that rounds to this number in x's dtype: 1e-05 for 9.999999747378752e-06."""
    return number if x.dtype.numpy is None else float(str(x.dtype.numpy.type(number)))


def _over_last(name: str, x: Expr, axes: Sequence[int]) -> Refusal | None:
    if tuple(axis % x.rank for axis in axes) == (x.rank - 1,):
        return None
    hint = "rearrange so that this axis comes last" if len(axes) == 1 else ""
    return Refusal(f"the mean is over axes {tuple(axes)}, but {name} needs the last axis only", hint=hint)


def _is_vector(vector: Expr, x: Expr) -> bool:
    return vector.rank == 1 and x.rank >= 1 and vector.shape[0] == x.shape[-1]


@dataclass(frozen=True)
class LayerNorm(Rewrite):
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)   -->   layer_norm(x, eps)        (Ba, Kiros & Hinton 2016)

    Refuses: a mean over axes other than the last.
    """

    def pattern(self, p: Vocabulary, x: Any, axes: Any) -> Any:
        centered = x - p.reduce_mean(x, axes=axes, keep=True)
        return _scaled(p, centered, p.reduce_mean(_square(p, centered), axes=axes, keep=True))

    def check(self, m: Match) -> Refusal | None:
        return _over_last("layer_norm", m.x, m.axes)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.layer_norm(m.x, eps=_shortest(m.eps, m.x))


@dataclass(frozen=True)
class LayerNormWeight(Rewrite):
    """layer_norm(x) * w   -->   layer_norm(x, w)        for a vector w of the last axis"""

    def pattern(self, p: Vocabulary, x: Any, w: Any, eps: Any) -> Any:
        return p.layer_norm(x, eps=eps) * w

    def fits(self, m: Match) -> bool:
        return _is_vector(m.w, m.x)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.layer_norm(m.x, m.w, eps=m.eps)


@dataclass(frozen=True)
class LayerNormBias(Rewrite):
    """layer_norm(x, w) + bias   -->   layer_norm(x, w, bias)        for a vector bias of the last axis"""

    def pattern(self, p: Vocabulary, x: Any, w: Any, bias: Any, eps: Any) -> Any:
        return p.layer_norm(x, p.either(None, w), eps=eps) + bias

    def fits(self, m: Match) -> bool:
        return _is_vector(m.bias, m.x)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.layer_norm(m.x, m.w, m.bias, eps=m.eps)


@dataclass(frozen=True)
class RMSNorm(Rewrite):
    """x / sqrt(mean(x^2) + eps)   -->   rms_norm(x, eps)        (Zhang & Sennrich 2019)

    Refuses: a mean over axes other than the last.
    """

    def pattern(self, p: Vocabulary, x: Any, axes: Any) -> Any:
        return _scaled(p, x, p.reduce_mean(_square(p, x), axes=axes, keep=True))

    def check(self, m: Match) -> Refusal | None:
        return _over_last("rms_norm", m.x, m.axes)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.rms_norm(m.x, eps=_shortest(m.eps, m.x))


@dataclass(frozen=True)
class RMSNormWeight(Rewrite):
    """rms_norm(x) * w   -->   rms_norm(x, w)        for a vector w of the last axis"""

    def pattern(self, p: Vocabulary, x: Any, w: Any, eps: Any) -> Any:
        return p.rms_norm(x, eps=eps) * w

    def fits(self, m: Match) -> bool:
        return _is_vector(m.w, m.x)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.rms_norm(m.x, m.w, eps=m.eps)


@dataclass(frozen=True)
class FuseNormalization(RewriteSet):
    """Normalizations over the last axis in primitives   -->   one op

     1. (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)  -->  layer_norm(x, eps)
     2. layer_norm(x) * w  -->  layer_norm(x, w);   layer_norm(x, w) + b  -->  layer_norm(x, w, b)
     3. x / sqrt(mean(x^2) + eps)  -->  rms_norm(x, eps)
     4. rms_norm(x) * w  -->  rms_norm(x, w)

    Refuses: means over other axes; an inner value that is used elsewhere.
    """

    rules: ClassVar[tuple[Rewrite, ...]] = (LayerNorm(), LayerNormWeight(), LayerNormBias(), RMSNorm(), RMSNormWeight())
