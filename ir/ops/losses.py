"""Losses, which training minimizes: one number for each prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Composite, Demand, Grads, Operand
from treadle.ir.ops.along_axes import not_empty, wide_array, widened
from treadle.ir.samples import S
from treadle.ir.sizing.sizes import ONE
from treadle.ir.types import Type, f32

IGNORED = -100
"""The target of a position that does not count towards the loss, as in PyTorch and in files of the Hugging Face Hub."""


@op("cross_entropy", axes="... [n], ... -> ...", dtypes="f, i64 -> f")
class CrossEntropy(Composite):
    """y = ln(sum of e^x over the last axis) - x[target], and 0 where the target is `ignored`

    This is the negative logarithm of the target's probability in softmax(x). 16-bit floats are computed in f32, and the
    result is rounded.
    """

    x = Operand()
    target = Operand()
    ignored: int = IGNORED
    accumulates = f32

    def check(self, types: Sequence[Type | None]) -> None:
        """Raise RuleError for a target that would be repeated along an axis of x, or x along an axis of the target."""
        x, target = (None if type is None else type.shape for type in types)
        if not x or target is None:
            return
        if len(target) != len(x) - 1:
            what = f"target must have rank {len(x) - 1}, one class for each row of x, has {len(target)}"
            raise RuleError(what, hint="target.squeeze(-1)" if target[-1:] == (ONE,) else None)
        if any(ONE in pair and pair[0] != pair[1] for pair in zip(x, target, strict=False)):
            raise RuleError("target must have the sizes of x without its last axis")

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        return not_empty(types[0], (-1,), "softmax")

    def body(self, b: Builder, x: Expr, target: Expr) -> Any:
        wide = widened(x)
        last = (x.rank - 1,)
        shifted = wide - b.reduce_max(wide, axes=last, keep=True)
        total = b.log(b.reduce_sum(b.exp(shifted), axes=last))
        counts, at = self._counted(b, target)
        found = b.rearrange(b.take_along_axis(shifted, at, axis=-1), pattern="... 1 -> ...")
        return b.where(counts, total - found, b.constant(0, wide.dtype)).cast(x.dtype)

    def _counted(self, b: Builder, target: Expr) -> tuple[Expr, Expr]:
        """Return a mask of the targets that count, and their positions along the last axis. The position of a target
        that does not count is 0.
        """
        counts = target != self.ignored
        return counts, b.rearrange(b.where(counts, target, 0), pattern="... -> ... 1")

    def reference(self, x: Any, target: Any) -> Any:
        wide = wide_array(x)
        shifted = wide - np.max(wide, -1, keepdims=True)
        total = np.log(np.sum(np.exp(shifted), -1))
        counts = target != self.ignored
        found = np.take_along_axis(shifted, np.where(counts, target, 0)[..., None], -1)[..., 0]
        return np.asarray(np.where(counts, total - found, 0)).astype(x.dtype)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        """Build the gradient: softmax(x) minus the one-hot target, times the gradient of y."""
        (g,), (x, target) = grads, inputs
        counts, at = self._counted(b, target)
        wide = widened(x)
        g_wide = b.rearrange(b.where(counts, widened(g), b.constant(0, wide.dtype)), pattern="... -> ... 1")
        p = b.softmax(wide, axis=-1)
        is_target = b.iota(size=x.shape[-1], dtype=target.dtype) == at
        return [(b.where(is_target, p - 1.0, p) * g_wide).cast(x.dtype), None]

    samples = [
        S("f32[2,3,5]", "i64[2,3] < 5"),
        S("f32[4]", "i64[] < 4"),
        S("f32[6,3]", "i64[6] < 3", ignored=1),
    ]
    errors = [
        (S("f32[2,3]", "i64[3]"), "sizes disagree"),
        (S("f32[]", "i64[]"), "x must have rank 1 or more"),
        (S("f32[2,0]", "i64[2]"), "an axis of size 0 has no softmax"),
        (S("f32[2,3]", "f32[2]"), "target must be"),
        (S("f32[2,4,3]", "i64[4]"), "target must have rank 2"),
        (S("f32[2,3]", "i64[2,1]"), "target must have rank 1"),
        (S("f32[2,3]", "i64[1]"), "target must have the sizes of x"),
    ]


@op("divergence", axes="... [n], ... [n] -> ...", dtypes="f, f -> f")
class Divergence(Composite):
    """y = T^2 (sum of p (ln p - ln q) over the last axis), where p = softmax(teacher / T), q = softmax(x / T)

    The divergence of a student's distribution from its teacher's, at a temperature T (Hinton et al. 2015). With the
    factor T^2 its gradient is as large as the gradient of `cross_entropy` for any T. 16-bit floats are computed in f32,
    and the result is rounded.
    """

    x = Operand()
    teacher = Operand()
    temperature: float = 1.0
    accumulates = f32

    def check(self, types: Sequence[Type | None]) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise RuleError(f"temperature must be above 0, is {self.temperature!r}")

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        return not_empty(types[0], (-1,), "softmax")

    def body(self, b: Builder, x: Expr, teacher: Expr) -> Any:
        share = 1 / self.temperature
        ln_q, ln_p = (b.log_softmax(widened(each) * share, axis=-1) for each in (x, teacher))
        apart = b.reduce_sum(b.exp(ln_p) * (ln_p - ln_q), axes=(x.rank - 1,))
        return (apart * self.temperature**2).cast(x.dtype)

    samples = [
        S("f32[2,3,5]", "f32[2,3,5]"),
        S("f32[4]", "f32[4]", temperature=2.5),
    ]
    errors = [
        (S("f32[2,3]", "f32[2,4]"), "sizes disagree"),
        (S("f32[2,3]", "f32[2,3]", temperature=0.0), "temperature must be above 0, is 0.0"),
        (S("f32[2,3]", "f32[2,3]", temperature=float("inf")), "temperature must be above 0, is inf"),
        (S("f32[2,0]", "f32[2,0]"), "an axis of size 0 has no softmax"),
        (S("f32[2,3]", "f16[2,3]"), "x is f32, teacher is f16"),
    ]
