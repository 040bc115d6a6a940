"""Fusion of activations written in primitives: gelu by erf and by tanh, quick gelu and silu."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from treadle.ir.builder import Builder
from treadle.passes.framework.pattern import Vocabulary
from treadle.passes.framework.rewrite import Match, Rewrite, RewriteSet


def _half(p: Vocabulary, x: Any) -> Any:
    return p.either(x * 0.5, x / 2)


def _halved(p: Vocabulary, x: Any, gate: Any) -> Any:
    """Match 0.5 * x * gate in any grouping."""
    return p.either(p.shared(_half(p, x)) * gate, x * _half(p, gate), _half(p, x * gate))


@dataclass(frozen=True)
class GeluErf(Rewrite):
    """x/2 * (1 + erf(x / sqrt 2))   -->   gelu(x)        (Hendrycks & Gimpel 2016)"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        scaled = p.either(x * p.near(math.sqrt(0.5)), x / p.near(math.sqrt(2)))
        return _halved(p, x, p.erf(scaled) + 1)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.gelu(m.x)


@dataclass(frozen=True)
class GeluTanh(Rewrite):
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))   -->   gelu_tanh(x)        (Hendrycks & Gimpel 2016)"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        scale, cubic = p.near(math.sqrt(2 / math.pi)), 0.044715
        square = p.shared(p.either(x * x, x**2))
        third = p.either(
            p.either(square * x, x**3) * cubic,  # 0.044715 * x^3
            (x * cubic) * x * x,
            (x * cubic) * square,
            (square * cubic) * x,
        )
        inside = p.either(
            (x + third) * scale,
            (x * scale) * (square * cubic + 1),
            (x * (square * cubic + 1)) * scale,
        )
        return _halved(p, x, p.tanh(inside) + 1)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.gelu_tanh(m.x)


@dataclass(frozen=True)
class Silu(Rewrite):
    """x * sigmoid(x), x / (1 + exp(-x))   -->   silu(x)        (Hendrycks & Gimpel 2016)"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        return p.either(x * p.sigmoid(x), x / (p.exp(-x) + 1))

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.silu(m.x)


@dataclass(frozen=True)
class QuickGelu(Rewrite):
    """x * sigmoid(1.702 x)   -->   quick_gelu(x)        (Hendrycks & Gimpel 2016)"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        return x * p.sigmoid(x * 1.702)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.quick_gelu(m.x)


@dataclass(frozen=True)
class FuseGelu(RewriteSet):
    """Activations in primitives   -->   one op

     1. x/2 * (1 + erf(x / sqrt 2))  -->  gelu(x)
     2. x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))  -->  gelu_tanh(x)
     3. x * sigmoid(x)  -->  silu(x)
     4. x * sigmoid(1.702 x)  -->  quick_gelu(x)

    The halves and the cube may be grouped in any of the usual ways. Refuses: other constants; an inner value that is
    used elsewhere.
    """

    rules: ClassVar[tuple[Rewrite, ...]] = (GeluErf(), GeluTanh(), Silu(), QuickGelu())
