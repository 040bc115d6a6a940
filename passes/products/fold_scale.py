"""Move a scaling of logits or of normalized values to the smallest tensor that can be scaled instead, at best a
weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from treadle.ir.analysis.cost import Cost, node_cost
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Node, Value
from treadle.ir.op_registry import find_op
from treadle.ir.target import Target
from treadle.ir.types import bf16, f16
from treadle.passes.framework.pattern import Vocabulary
from treadle.passes.framework.rewrite import Match, Refusal, Rewrite, RewriteSet

_LEAST, _GREATEST = 2.0**-10, 2.0**10


def _is_scale(c: Expr, x: Expr) -> bool:
    """Return True if c is one floating-point number."""
    return c.rank == 0 and x.dtype.is_float


def _leaves_range(c: Expr, x: Expr) -> Refusal | None:
    """Return a refusal if x * c may overflow, or lose digits, although the result of the op times c does not."""
    narrow = x.dtype in (f16, bf16)
    number = None if c.value.literal is None else c.value.literal.scalar
    if number is None:
        why = f"the scale is unknown, and x times the scale may be out of range for {x.dtype}"
        return Refusal(why) if narrow else None
    if _LEAST <= abs(number) <= (1.0 if narrow else _GREATEST):
        return None
    return Refusal(
        f"a scale by {number:.6g} stays after the product: x times the scale may be out of range for {x.dtype}"
    )


@dataclass(frozen=True)
class ScaleBeforeLinear(Rewrite):
    """linear(x, w) * c   -->   linear(x * c, w)        for one number c

    The result of a product with a vocabulary is wider than its operand x. Refuses: a number so large or small that x *
    c may be out of range although y * c is not (in f16 and bf16 a number above 1, or an unknown one); a product that is
    narrower than x, because there is less to scale after it, according to the target's cost.
    """

    def pattern(self, p: Vocabulary, x: Any, w: Any, c: Any) -> Any:
        return p.linear(x, w) * c

    def fits(self, m: Match) -> bool:
        return _is_scale(m.c, m.x)

    def check(self, m: Match) -> Refusal | None:
        return _leaves_range(m.c, m.x)

    def slower(self, m: Match, target: Target) -> Refusal | None:
        return _costs_more(m.x.value, m.result, m.c.value, target)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.linear(m.x * m.c, m.w, None)


@dataclass(frozen=True)
class ScaleBeforeMatmul(Rewrite):
    """matmul(x, w) * c   -->   matmul(x * c, w)        for a weight w and one number c

    Refuses the same cases as `ScaleBeforeLinear`.
    """

    def pattern(self, p: Vocabulary, x: Any, w: Any, c: Any) -> Any:
        return p.matmul(x, w) * c

    def fits(self, m: Match) -> bool:
        return m.w.value.weight is not None and m.w.rank == 2 and _is_scale(m.c, m.x)

    def check(self, m: Match) -> Refusal | None:
        return _leaves_range(m.c, m.x)

    def slower(self, m: Match, target: Target) -> Refusal | None:
        return _costs_more(m.x.value, m.result, m.c.value, target)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.matmul(m.x * m.c, m.w)


@dataclass(frozen=True)
class ScaleInRMSNorm(Rewrite):
    """rms_norm(x, w) * c   -->   rms_norm(x, w * c)        (w * c is computed once, when weights are bound)"""

    def pattern(self, p: Vocabulary, x: Any, w: Any, c: Any, eps: Any) -> Any:
        return p.rms_norm(x, w, eps=eps) * c

    def fits(self, m: Match) -> bool:
        return _is_bound(m.w, m.c) and _is_scale(m.c, m.x)

    def check(self, m: Match) -> Refusal | None:
        return _leaves_range(m.c, m.x)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.rms_norm(m.x, m.w * m.c, eps=m.eps)


@dataclass(frozen=True)
class ScaleInLayerNorm(Rewrite):
    """layer_norm(x, w, bias) * c   -->   layer_norm(x, w * c, bias * c)"""

    def pattern(self, p: Vocabulary, x: Any, w: Any, bias: Any, c: Any, eps: Any) -> Any:
        return p.layer_norm(x, w, bias, eps=eps) * c

    def fits(self, m: Match) -> bool:
        return _is_bound(m.w, m.bias, m.c) and _is_scale(m.c, m.x)

    def check(self, m: Match) -> Refusal | None:
        return _leaves_range(m.c, m.x)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.layer_norm(m.x, m.w * m.c, m.bias * m.c, eps=m.eps)


@dataclass(frozen=True)
class FoldScale(RewriteSet):
    """Scale logits where that costs least: before the product, or in the weight of the norm before the product, which
    costs nothing at run time.
    """

    rules: ClassVar[tuple[Rewrite, ...]] = (
        ScaleBeforeLinear(),
        ScaleBeforeMatmul(),
        ScaleInRMSNorm(),
        ScaleInLayerNorm(),
    )


def _is_bound(*values: Expr) -> bool:
    """Return True if these values are known when weights are bound."""
    return all(v.value.kind in ("parameter", "constant") for v in values)


def _costs_more(before: Value, after: Value, c: Value, target: Target) -> Refusal | None:
    """Return a refusal if scaling before a product takes longer than scaling after it; otherwise None."""
    sizes = dict.fromkeys(before.type.symbols | after.type.symbols, 1)
    early, late = (_scaling_cost(v, c, sizes) for v in (before, after))
    if target.seconds(early.flops, early.bytes) < target.seconds(late.flops, late.bytes):
        return None
    return Refusal(
        f"scaling {before.type.shape[-1]} elements per row before the product is not faster on {target} than "
        f"{after.type.shape[-1]} after it"
    )


def _scaling_cost(x: Value, c: Value, sizes: dict[str, int]) -> Cost:
    mul = find_op("mul")()
    return node_cost(Node(mul, (x, c), [x.type]), sizes)
